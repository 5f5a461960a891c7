"""Exact activation patching: put one run's activation into the other and measure, cell by cell.

*Denoising* puts clean activations into the corrupt run: what restores the behaviour is sufficient for it, given the
rest.
*Noising* puts corrupt activations into the clean run: what breaks the behaviour is necessary for it, given the rest.
With `m` the logit difference and `m(donor)` that of the run the activation comes from, the normalised effect of a
cell is

    (m(patched) - m(base)) / (m(donor) - m(base)),

0 where nothing happens and 1 where the cell alone carries everything (Heimersheim & Nanda 2024, arXiv 2404.15255).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal

from jaxtyping import Float
from torch import Tensor

from assay.activations.edits import Patch
from assay.activations.subject import Subject
from assay.activations.values import Run
from assay.circuits.components import Component
from assay.circuits.task import Task

Direction = Literal["denoising", "noising"]
Progress = Callable[[int, int], None]


@dataclass(frozen=True, slots=True, kw_only=True)
class Effects:
    """The metric with each cell patched, and with none and everything patched.

    Args:
        values: The metric with that cell patched, any shape.
        base: The metric of the run that is patched.
        donor: The metric of the run that activations come from.
    """

    values: Float[Tensor, "*cells"]
    base: float
    donor: float

    @property
    def effects(self) -> Float[Tensor, "*cells"]:
        """`m(patched) - m(base)`, in logits."""
        return self.values - self.base

    @property
    def normalised(self) -> Float[Tensor, "*cells"]:
        """`(m(patched) - m(base)) / (m(donor) - m(base))`."""
        return self.effects / (self.donor - self.base)


def sides(direction: Direction) -> tuple[str, str]:
    """Which side is patched and which gives the activations."""
    return ("corrupt", "clean") if direction == "denoising" else ("clean", "corrupt")


def patch_grid(
    subject: Subject,
    task: Task,
    point: str,
    direction: Direction,
    *,
    positions: Sequence[int] | None = None,
    donor: Run | None = None,
    progress: Progress | None = None,
) -> Effects:
    """Patch one point of every block at every position.

    Args:
        subject: The subject.
        task: The clean and the corrupt input.
        point: `resid_pre`, `attn.out`, `mlp.out`, or another point of a block.
        direction: "denoising" or "noising".
        positions: Which positions; all of them when None.
        donor: A run of the giving side that captured the point, if there is one already.
        progress: Called with (cells done, all cells).

    Returns:
        Effects with values `[block, pos]`.
    """
    where = list(range(task.clean.width)) if positions is None else list(positions)
    names = [f"blocks.{block}.{point}" for block in range(subject.n_blocks)]
    donor = donor or task.run(subject, sides(direction)[1], capture=names)
    cells = [Patch(name, donor, positions=p) for name in names for p in where]
    return _sweep(subject, task, cells, direction, (subject.n_blocks, len(where)), donor, progress)


def patch_components(
    subject: Subject,
    task: Task,
    parts: Sequence[Component],
    direction: Direction,
    *,
    donor: Run | None = None,
    progress: Progress | None = None,
) -> Effects:
    """Patch each head's `z` or each MLP's output, at all positions.

    Args:
        subject: The subject.
        task: The clean and the corrupt input.
        parts: The heads and MLPs.
        direction: "denoising" or "noising".
        donor: A run of the giving side that captured them, if there is one already.
        progress: Called with (cells done, all cells).

    Returns:
        Effects with values `[parts]`.
    """
    donor = donor or task.run(subject, sides(direction)[1], capture=component_sites(parts))
    cells = [Patch(part.site, donor) for part in parts]
    return _sweep(subject, task, cells, direction, (len(parts),), donor, progress)


def component_sites(parts: Sequence[Component]) -> list[str]:
    """The whole sites that hold these components."""
    return sorted({part.whole_site for part in parts})


def _sweep(
    subject: Subject,
    task: Task,
    cells: Sequence[Patch],
    direction: Direction,
    shape: tuple[int, ...],
    donor: Run,
    progress: Progress | None,
) -> Effects:
    batch, edits = task.base(sides(direction)[0])
    base = task.metric(subject.run(batch, edits=edits).logits)
    values = subject.sweep(batch, cells, task.metric, base_edits=edits, progress=progress)
    return Effects(
        values=values.float().reshape(shape),
        base=float(base.float().mean()),
        donor=float(task.metric(donor.logits).float().mean()),
    )
