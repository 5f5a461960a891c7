"""The components a circuit is made of: attention heads and MLPs."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from assay.subjects.model import Model


@dataclass(frozen=True, slots=True, order=True)
class Component:
    """One head or one MLP.

    Args:
        block: The block it is in.
        kind: `head` or `mlp`.
        head: Which head, for heads.
    """

    block: int
    kind: Literal["head", "mlp"]
    head: int | None = None

    @property
    def site(self) -> str:
        """The site it writes at: `blocks.5.attn.z.3` or `blocks.5.mlp.out`."""
        return f"blocks.{self.block}.mlp.out" if self.kind == "mlp" else f"blocks.{self.block}.attn.z.{self.head}"

    @property
    def name(self) -> str:
        """The field's short name: `L5H3` or `MLP5`."""
        return f"MLP{self.block}" if self.kind == "mlp" else f"L{self.block}H{self.head}"


def components(model: Model) -> list[Component]:
    """Every head and every MLP of a model, in forward order.

    Example:
        >>> [c.name for c in components(subject)][:3]  # doctest: +SKIP
        ['L0H0', 'L0H1', 'L0H2']
    """
    heads = model.parts.n_heads
    return [
        part
        for block in range(model.n_blocks)
        for part in (*(Component(block, "head", h) for h in range(heads)), Component(block, "mlp"))
    ]
