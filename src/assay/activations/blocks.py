"""The model's own blocks, called on cells: on packed suffixes, or on rows of whole prompts, with the cells' edits."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from assay.activations.apply import Placed, Window, apply_edits
from assay.activations.attention import attend
from assay.activations.context import Request, RunState
from assay.activations.edits import Edit
from assay.activations.hooks import running
from assay.activations.packing import Packing
from assay.activations.recording import Recording, ReplayRefused
from assay.base.errors import AssayError
from assay.base.sites import Site
from assay.subjects.points import Point, Traffic

CHUNK = {"cpu": 1024, "other": 8192}
"""How many tokens go through a block at once: enough for matrix products to run at full speed, few enough for what lies
between the products to stay in a cache."""

PACKINGS = 2**24
"""How many entries the masks of the packings may have that are kept to be used again."""


@dataclass(frozen=True, slots=True)
class Cell:
    """A cell, and where its computation starts.

    Args:
        index: Its place among all cells; -1 for the unedited one.
        block: The first block it touches.
        start: The first column it touches.
        edits: What it changes, with the sites read, by block.
    """

    index: int
    block: int
    start: int
    edits: dict[int, list[tuple[Site, Edit]]]


@dataclass(slots=True)
class PackedRun(RunState):
    """One call of a block on packed cells.

    Args:
        places: By site: which tokens of the sequence an edit changes, and the columns of the base that they are.
    """

    places: dict[str, list[tuple[slice, Window, Placed]]] = field(default_factory=dict)

    def serve(self, request: Request, traffic: Traffic) -> bool:
        """Apply the edits, each to its cell, which it sees as a run of its own."""
        request.fired = True
        new = request.point.read(traffic).clone(memory_format=torch.contiguous_format)
        for tokens, window, placed in self.places[str(request.site)]:
            part = new[0, tokens].view(window.batch.size, -1, *new.shape[2:])
            part.copy_(apply_edits(part, [placed], window, request.point))
        request.point.write(traffic, new)
        return True


class Blocks:
    """The blocks of a recorded base, to be called again.

    Args:
        base: The recording.
        max_rows: The largest number of rows computed together, or None.
    """

    def __init__(self, base: Recording, max_rows: int | None) -> None:
        self.base, self.batch = base, base.batch
        self.last = len(base.blocks) - 1
        self.packed = not base.why_not_packed
        most = CHUNK.get(self.batch.ids.device.type, CHUNK["other"])
        self.chunk = most if max_rows is None else min(most, max_rows * self.batch.width)
        self._points: dict[str, Point] = {}
        self._packings: dict[tuple[torch.device, tuple[int, ...]], Packing] = {}

    def split(self, cells: Sequence[Cell], most: int) -> Iterator[list[Cell]]:
        """Cells in their order, in groups of so many tokens at most (of one cell at least)."""
        group: list[Cell] = []
        tokens = 0
        for cell in cells:
            n = self.batch.size * (self.batch.width - cell.start)
            if group and tokens + n > most:
                yield group
                group, tokens = [], 0
            group.append(cell)
            tokens += n
        if group:
            yield group

    def packing(self, block: int, cells: Sequence[Cell]) -> Packing:
        """Where the tokens of cells are when they lie end to end, for a block's device."""
        device = self.base.attended(block).key.device if self.packed else self.batch.ids.device
        starts = tuple(cell.start for cell in cells)
        if (device, starts) not in self._packings:
            if len(self._packings) * self.chunk * self.batch.width > PACKINGS:
                self._packings.clear()
            self._packings[device, starts] = Packing(self.batch, starts, device)
        return self._packings[device, starts]

    def chunks(self, block: int, cells: Sequence[Cell]) -> Iterator[tuple[list[Cell], Packing, slice]]:
        """Cells that go through a block together, their packing, and which of all tokens are theirs."""
        at = 0
        for chunk in self.split(cells, self.chunk):
            packing = self.packing(block, chunk)
            yield chunk, packing, slice(at, at := at + len(packing.columns))

    def through(self, block: int, cells: Sequence[Cell], stream: Tensor) -> None:
        """Replace the stream that enters a block by the one that leaves it, `[tokens, d_model]`, chunk by chunk."""
        for chunk, packing, tokens in self.chunks(block, cells):
            if self.packed:
                state = self._packed(block, chunk, packing)
                left = self.call(block, state, stream[None, tokens], self.arguments(block, packing))
            else:
                times = len(chunk)
                rows = stream[tokens].view(times * self.batch.size, -1, stream.shape[-1])
                left = self.call(block, self._rows(block, chunk), rows, self.base.repeated_arguments(block, times))
            stream[tokens] = left.flatten(0, 1)

    def arguments(self, block: int, packing: Packing) -> dict[str, Any]:
        """A block's arguments for packed tokens."""
        return self.base.packed_arguments(block, packing.rows, packing.columns, packing.taken)

    def call(self, block: int, state: RunState, stream: Tensor, arguments: dict[str, Any]) -> Tensor:
        """Call a block in a run, `[rows, pos, d_model]` to the same.

        Raises:
            ReplayRefused: If the block, or an edit, fails: full forwards will tell.
        """
        try:
            with running(state):
                output = self.base.blocks[block](stream, **arguments)
        except (AssayError, Enough):
            raise
        except Exception as error:
            raise ReplayRefused(f"block {block} cannot be called again: {error}") from error
        state.check_fired()
        left: Tensor = output if isinstance(output, Tensor) else output[0]
        return left

    def _packed(self, block: int, cells: Sequence[Cell], packing: Packing) -> PackedRun:
        """A run of packed cells, with their edits in a block."""
        requests: dict[str, Request] = {}
        places: dict[str, list[tuple[slice, Window, Placed]]] = {}
        inside: dict[int, RunState] = {}
        for k, cell in enumerate(cells):
            if block not in cell.edits:
                continue
            window = Window(self.batch, first=cell.start, width=self.batch.width - cell.start)
            own: dict[str, Request] = {}
            for site, edit in cell.edits[block]:
                name, placed = str(site.whole), Placed(edit, site.head)
                in_attention = self._point(site).side == "attention"
                request = self._request(own if in_attention else requests, site)
                request.edits.append(placed)
                if not in_attention:
                    places.setdefault(name, []).append((packing.spans[k], window, placed))
            if own:
                inside[k] = RunState(own, window)
        state = PackedRun(requests, Window(self.batch), rows=1, places=places)
        state.attention = partial(self._attention, block, packing, inside)
        return state

    def _attention(
        self,
        block: int,
        packing: Packing,
        inside: dict[int, RunState],
        function: Callable[..., tuple[Tensor, Tensor | None]],
        module: nn.Module,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        mask: Tensor | None,
        more: dict[str, Any],
    ) -> tuple[Tensor, None]:
        """Attention for packed cells; cells that are edited inside it are computed one by one."""
        given, attended = (query, key, value), self.base.attended(block)
        mixed = packing.attend(function, module, given, attended, more)
        for k, run in inside.items():
            q, k_, v, seen = packing.of_cell(k, given, attended)
            mixed[packing.spans[k]] = attend(run, function, module, q, k_, v, seen, **more)[0].flatten(0, 1)
            run.check_fired()
        return mixed[None], None

    def _rows(self, block: int, cells: Sequence[Cell]) -> RunState:
        """A run of whole prompts, several times over, with the cells' edits in a block."""
        size = self.batch.size
        requests: dict[str, Request] = {}
        for k, cell in enumerate(cells):
            rows = tuple((size * k + b, b) for b in range(size))
            for site, edit in cell.edits.get(block, ()):
                self._request(requests, site).edits.append(Placed(edit, site.head, rows))
        return RunState(requests, Window(self.batch), rows=size * len(cells))

    def _request(self, requests: dict[str, Request], site: Site) -> Request:
        name = str(site.whole)
        if name not in requests:
            requests[name] = Request(site.whole, self._point(site))
        return requests[name]

    def _point(self, site: Site) -> Point:
        name = str(site.whole)
        if name not in self._points:
            self._points[name] = self.base.model.point(site.whole)
        return self._points[name]


class Enough(Exception):
    """Raised inside a block's attention when its keys and values are all that was wanted."""
