"""Sets of components: is a set enough for the behaviour, and is it needed?

All components are run on the clean input; those outside (or inside) a set are resample-ablated, that is, replaced by
their activations on the corrupt input. With `m` the logit difference, `m_clean` nothing ablated and `m_none` every
component ablated (token embeddings stay clean):

    kept(S) = (m(only S) - m_none) / (m_clean - m_none)          sufficiency
    lost(S) = (m_clean - m(all but S)) / (m_clean - m_none)      necessity
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from assay.activations.edits import Edit, Patch
from assay.activations.subject import Subject
from assay.activations.values import Run
from assay.circuits.components import Component
from assay.circuits.patching import component_sites
from assay.circuits.task import Task

Progress = Callable[[int, int], None]


@dataclass(frozen=True, slots=True, kw_only=True)
class SetEffects:
    """The metric with only each set kept, and with only each set ablated.

    Args:
        only: The metric with everything outside the set ablated, `[sets]`.
        without: The metric with the set ablated, `[sets]`.
        clean: The metric with nothing ablated.
        none: The metric with every component ablated.
    """

    only: Float[Tensor, " sets"]
    without: Float[Tensor, " sets"]
    clean: float
    none: float

    @property
    def kept(self) -> Float[Tensor, " sets"]:
        """Sufficiency, `[sets]`."""
        return (self.only - self.none) / (self.clean - self.none)

    @property
    def lost(self) -> Float[Tensor, " sets"]:
        """Necessity, `[sets]`."""
        return (self.clean - self.without) / (self.clean - self.none)


def ablate_sets(
    subject: Subject,
    task: Task,
    parts: Sequence[Component],
    sets: Sequence[Collection[Component]],
    *,
    progress: Progress | None = None,
) -> SetEffects:
    """Resample-ablate the complement of each set, and each set.

    Args:
        subject: The subject.
        task: The clean and the corrupt input.
        parts: The universe of components.
        sets: Subsets of it.
        progress: Called with (runs done, all runs).

    Returns:
        The metric for each set, both ways.
    """
    donor = task.run(subject, "corrupt", capture=component_sites(parts))
    chosen = [frozenset(s) for s in sets]
    removed = [frozenset(parts) - s for s in chosen] + chosen + [frozenset(parts)]
    cells = [ablation(donor, gone, subject.parts.n_heads) for gone in removed]
    batch, _ = task.base("clean")
    clean = float(task.metric(subject.run(batch).logits).float().mean())
    where = [i for i, cell in enumerate(cells) if cell]
    found = subject.sweep(batch, [cells[i] for i in where], task.metric, progress=progress).float()
    values = torch.full((len(cells),), clean)
    values[where] = found.cpu()
    n = len(chosen)
    return SetEffects(only=values[:n], without=values[n : 2 * n], clean=clean, none=float(values[-1]))


def ablation(donor: Run, gone: Collection[Component], n_heads: int) -> list[Edit]:
    """Edits that replace components by the donor's activations, heads of one block together."""
    heads: dict[int, list[int]] = {}
    edits: list[Edit] = []
    for part in sorted(gone):
        if part.head is None:
            edits.append(Patch(part.site, donor))
        else:
            heads.setdefault(part.block, []).append(part.head)
    for block, members in heads.items():
        whole = len(members) == n_heads
        edits.append(Patch(f"blocks.{block}.attn.z", donor, heads=None if whole else tuple(members)))
    return edits
