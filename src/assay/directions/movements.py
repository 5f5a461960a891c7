"""How far readouts move when something is written: many edits and many probes at once."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from assay.activations.edits import Edit, Positions, Where
from assay.activations.lazy import LazyLogits
from assay.activations.subject import Subject
from assay.base.errors import NumericalError, SpecError
from assay.directions.vectors import Probe


def movements(
    subject: Subject,
    texts: Sequence[str],
    edits: Sequence[Edit],
    probes: Sequence[Probe],
    *,
    progress: Callable[[int, int], object] | None = None,
) -> Float[np.ndarray, "edits texts probes"]:
    """How far each probe's readout moves on each text under each edit: measured in the model, each edit on its own.

        m = r(x edited) - r(x)

    Args:
        subject: The subject.
        texts: What it reads.
        edits: One experiment each. Those that name one position are cheap: only what follows from it is computed.
        probes: At any sites, the edited one too, where a readout is taken after the edit.
        progress: Told how many edits are done, of how many.

    Returns:
        In the units of the readouts, float64.

    Raises:
        SpecError: There is nothing to read, edit or read by, or a probe is of another model.
        NumericalError: A readout is not finite.

    Example:
        >>> from assay import Add
        >>> probe = Probe(site="blocks.2.resid_post", weight=torch.ones(32))
        >>> edit = Add("blocks.2.resid_post", torch.ones(32), scale=0.5, positions="last")
        >>> movements(subject, ["When Mary", "When Mary went to"], [edit], [probe]).round(3).tolist()
        [[[16.0], [16.0]]]
    """
    for name, given in (("texts", texts), ("edits", edits), ("probes", probes)):
        if not len(given):
            raise SpecError(f"there are no {name}: nothing would be measured", name)
    for probe in probes:
        probe.check(subject)
    places: dict[tuple[str, str], list[int]] = {}
    for i, probe in enumerate(probes):
        places.setdefault((probe.site, repr(probe.positions)), []).append(i)
    arms: list[list[Edit]] = [[], *([edit] for edit in edits)]
    read = np.full((len(arms), len(texts), len(probes)), np.nan)
    cells = [
        [*arm, *(_reading([probes[i] for i in place], _Notes(read[a], place)) for place in places.values())]
        for a, arm in enumerate(arms)
    ]
    subject.sweep(subject.batch(list(texts)), cells, _anything, reduce=None, progress=progress)
    if not np.isfinite(read).all():
        edit, text, which = np.argwhere(~np.isfinite(read))[0]
        said = "without an edit" if edit == 0 else f"under edit {edit - 1}"
        raise NumericalError(f"the readout of probe {which} on text {text} is not finite {said}")
    return np.asarray(read[1:] - read[:1])


@dataclass(frozen=True, slots=True)
class _Notes:
    """Where the readouts of some probes are written: `[text, probe]`, and which columns."""

    table: Float[np.ndarray, "texts probes"]
    columns: list[int]


@dataclass(frozen=True, slots=True)
class _Reading(Edit):
    """Notes what probes read in each row, and changes nothing."""

    weights: Float[Tensor, "k d"]
    biases: Float[np.ndarray, " k"]
    notes: _Notes
    positions: Positions = field(default="last", kw_only=True)
    rows: Any = field(default=None, kw_only=True)
    heads: Any = field(default=None, kw_only=True)

    def transform(self, x: Tensor, where: Where) -> Tensor:
        """The same, once its readouts are noted."""
        held = x.detach().reshape(*x.shape[:2], -1).mean(1).double().cpu()
        self.notes.table[np.ix_(where.rows, self.notes.columns)] = (held @ self.weights.T).numpy() + self.biases
        return x


def _reading(probes: Sequence[Probe], notes: _Notes) -> _Reading:
    """What reads several probes of one site and one position."""
    weights = torch.stack([probe.weight for probe in probes]).double()
    biases = np.asarray([probe.bias for probe in probes], dtype=np.float64)
    return _Reading(probes[0].site, weights, biases, notes, positions=probes[0].positions)


def _anything(logits: Tensor | LazyLogits) -> Tensor:
    """Some number of each row: a sweep asks for one, and it is not looked at."""
    return logits[:, -1, torch.tensor([0])][:, 0]
