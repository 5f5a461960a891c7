"""The components a circuit is made of: attention heads, MLPs and state-space layers."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from assay.subjects.model import Model

LAYERS: tuple[Literal["ssm", "mlp"], ...] = ("ssm", "mlp")


@dataclass(frozen=True, slots=True, order=True)
class Component:
    """One head, one MLP or one state-space layer.

    Args:
        block: The block it is in.
        kind: `head`, `mlp` or `ssm`.
        head: Which head, for heads.
    """

    block: int
    kind: Literal["head", "mlp", "ssm"]
    head: int | None = None

    @property
    def site(self) -> str:
        """The site it writes at: `blocks.5.attn.z.3`, `blocks.5.mlp.out` or `blocks.5.ssm.out`."""
        return f"{self.whole_site}.{self.head}" if self.kind == "head" else self.whole_site

    @property
    def whole_site(self) -> str:
        """The site with all heads."""
        return f"blocks.{self.block}." + ("attn.z" if self.kind == "head" else f"{self.kind}.out")

    @property
    def name(self) -> str:
        """The field's short name: `L5H3`, `MLP5` or `SSM5`."""
        return f"L{self.block}H{self.head}" if self.kind == "head" else f"{self.kind.upper()}{self.block}"


def components(model: Model) -> list[Component]:
    """Every head, state-space layer and MLP of a model, in forward order.

    Example:
        >>> [c.name for c in components(subject)][:3]  # doctest: +SKIP
        ['L0H0', 'L0H1', 'L0H2']
    """
    parts, found = model.parts, []
    for block in range(model.n_blocks):
        if parts.has("attn.z", block):
            found += [Component(block, "head", head) for head in range(parts.n_heads)]
        found += [Component(block, kind) for kind in LAYERS if parts.has(f"{kind}.out", block)]
    return found
