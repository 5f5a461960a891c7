"""Exact sweeps by replay: a cell is computed only from the block and the position that its edit touches.

1. The base runs once, recorded (`recording`): what enters each block, its other arguments, attention's keys and values.
2. A cell whose first edit is in block l joins when block l is reached, as a copy of the base stream entering l. What
   has not joined costs nothing: over all layers that is half the work.
3. A cell that changes nothing before column p has only the columns from p on; an edit of every position that puts back
   what is there (a patch from a prompt that begins alike) changes nothing. The suffixes of all cells lie end to end in
   one sequence of tokens, without a gap (`packing`), which goes through the model's own blocks (`blocks`).
4. The last block, the final norm and the unembedding are computed at the columns that the metric looks at (`ending`).

The blocks called are the model's own, with the arguments the model gave them, so nothing is re-implemented. An unedited
cell lies among the others, and all is refused unless it ends where the base ended. One is enough: what could go wrong
outside attention is that tokens meet there (a convolution, a mean over positions), and then the unedited cell meets
edited ones; inside attention, recorded masks say who sees whom.

Where suffixes cannot be packed (attention of a module's own, a state space, attention that looks ahead), cells have all
their columns, as rows of a batch, and still join late.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence

import torch
from torch import Tensor

from assay.activations.apply import Placed, Window, apply_edits
from assay.activations.blocks import Blocks, Cell
from assay.activations.edits import Ablate, Apply, Edit
from assay.activations.ending import Ending
from assay.activations.forward import forward
from assay.activations.lazy import LazyLogits
from assay.activations.recording import Recording, unembed
from assay.base.errors import AssayError
from assay.base.sites import Site
from assay.subjects.model import Model
from assay.subjects.tokens import Batch

PASS = 8
"""How many chunks go down the blocks together: enough to read each block's weights rarely, few enough to hear how far a
sweep is."""

WORTH = 8
"""With so many edits of every position, it is worth a forward to know what they change."""

LOGITS = 2**29
"""How many bytes the logits of the rows that are measured together may take, should a metric want all of them."""

Report = Callable[[Sequence[int], Tensor], None]


class Replay:
    """A recorded base run, ready to be replayed with edits.

    Args:
        model: The subject.
        batch: The base prompts.
        base_edits: Edits on the embeddings, made in the base itself.
        measure: From the logits of some rows to `[cells, prompts]`.
        max_rows: The largest number of rows computed together, or None.

    Raises:
        ReplayRefused: If the base cannot be recorded.
    """

    def __init__(
        self,
        model: Model,
        batch: Batch,
        base_edits: Sequence[Edit],
        measure: Callable[[LazyLogits], Tensor],
        max_rows: int | None = None,
    ) -> None:
        self.model, self.batch, self.measure, self.max_rows = model, batch, measure, max_rows
        self.base_edits = tuple(base_edits)
        self.values: dict[str, Tensor] = {}
        self.base = Recording(model, batch, base_edits)
        self.blocks = Blocks(self.base, max_rows)

    def run(self, cells: Sequence[tuple[Edit, ...]], report: Report) -> list[int]:
        """Measure the cells that replay can serve.

        Args:
            cells: All cells.
            report: Called with cell indices and their values, `[cells, prompts]`.

        Returns:
            The indices of the cells that are left for full forwards.

        Raises:
            ReplayRefused: If the unedited cell does not end where the base ended.
        """
        self.values = self._values(cells)
        found = [self._cell(i, cell) for i, cell in enumerate(cells)]
        self.values.clear()
        served = _in_order([cell for cell in found if cell is not None])
        for n, group in enumerate(self.blocks.split(served, PASS * self.blocks.chunk)):
            self._pass(group, [] if n else [self._unedited(group)], report)
        return [i for i, cell in enumerate(found) if cell is None]

    def _unedited(self, group: list[Cell]) -> Cell:
        """A cell that changes nothing: a short one, but of several tokens, since it is there to be checked."""
        starts = [cell.start for cell in group]
        short = [start for start in starts if self.batch.width - start >= 4]
        return Cell(-1, group[0].block, max(short) if short else min(starts), {})

    def _cell(self, index: int, cell: tuple[Edit, ...]) -> Cell | None:
        """Where a cell's computation starts, or None if replay does not serve it."""
        edits: dict[int, list[tuple[Site, Edit]]] = {}
        for edit in cell:
            site = self.model.site(edit.site)
            if site.module is not None or site.block is None:
                return None
            edits.setdefault(site.block, []).append((site, edit))
        start = min(self._first_column(site, edit) for each in edits.values() for site, edit in each)
        return Cell(index, min(edits), start, edits)

    def _values(self, cells: Sequence[tuple[Edit, ...]]) -> dict[str, Tensor]:
        """What the base has at the sites that edits change at every position, where there are many such edits."""
        edits = [edit for cell in cells for edit in cell if getattr(edit, "positions", None) is None]
        if not self.blocks.packed or len(edits) < WORTH or self.batch.padded:
            return {}
        sites = {self.model.site(edit.site).whole for edit in edits}
        names = [str(site) for site in sites if site.block is not None and self.model.point(site).side != "attention"]
        run = forward(self.model, self.batch, capture=names, edits=self.base_edits)
        return {name: run[name] for name in names}

    def _first_changed(self, site: Site, edit: Edit) -> int:
        """The first column at which an edit of every position changes anything."""
        value = self.values.get(str(site.whole))
        if value is None:
            return 0
        try:
            new = apply_edits(value, [Placed(edit, site.head)], Window(self.batch), self.model.point(site.whole))
        except AssayError:
            return 0  # the edit itself will say what is wrong
        changed = (new != value).flatten(2).any(-1).any(0).nonzero()
        return int(changed[0]) if len(changed) else self.batch.width - 1

    def _first_column(self, site: Site, edit: Edit) -> int:
        """The first column that an edit may change; 0 where it is to see the whole run."""
        whole = isinstance(edit, Apply) or (isinstance(edit, Ablate) and edit.needs_run)
        positions = getattr(edit, "positions", None)
        if not self.blocks.packed or whole or site.point.endswith((".scores", ".pattern")):
            return 0
        if positions is None:
            return self._first_changed(site, edit)
        try:
            columns = self.batch.columns(positions)
        except (AssayError, IndexError, TypeError, ValueError):
            return 0  # if something is wrong with them, the edit will say what
        return min((column for row in columns or [] for column in row), default=0)

    def _pass(self, group: list[Cell], unedited: list[Cell], report: Report) -> None:
        """Take cells down all blocks but the last, joining on the way, and measure them there."""
        cells = _in_order([*group, *unedited])
        last, streams = self.blocks.last, self.base.streams
        spans = self.blocks.packing(last, cells).spans
        stream = streams[cells[0].block].new_empty(spans[-1].stop, streams[0].shape[-1])
        joined = 0
        for block in range(cells[0].block, last + 1):
            while joined < len(cells) and cells[joined].block == block:
                stream[spans[joined]] = streams[block][:, cells[joined].start :].flatten(0, 1)
                joined += 1
            if block < last:
                self.blocks.through(block, cells[:joined], stream[: spans[joined - 1].stop])
        entering = {cell.index: stream[span] for cell, span in zip(cells, spans, strict=True)}
        for cell in unedited:
            self.base.verify(last, entering[-1], slice(cell.start, None))
        for part in self._measured_together(group):
            ends = Ending(self.blocks, more := [*part, *unedited], torch.cat([entering[cell.index] for cell in more]))
            logits = LazyLogits(ends, lambda hidden, ids: unembed(self.model, hidden, ids), self.base.vocab)
            report([cell.index for cell in part], self.measure(logits))
            unedited = []

    def _measured_together(self, group: list[Cell]) -> Iterator[list[Cell]]:
        """Cells that the last block leaves as they are, and cells that it edits; no more than their logits may take."""
        row = self.batch.width * self.base.vocab * self.base.streams[-1].element_size()
        rows = self.max_rows or min(256, max(16, LOGITS // row))
        for touched in (False, True):
            cells = [cell for cell in group if (self.blocks.last in cell.edits) == touched]
            for at in range(0, len(cells), per := max(1, rows // self.batch.size)):
                yield cells[at : at + per]


def _in_order(cells: Sequence[Cell]) -> list[Cell]:
    """Cells as they join; of one block, those with the most columns first."""
    return sorted(cells, key=lambda cell: (cell.block, cell.start, cell.index))
