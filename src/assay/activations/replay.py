"""Exact sweeps by replay: a cell is computed only from the block and the position that its edit touches.

1. The base runs once; each block's call is recorded: the stream that enters, the other arguments, and attention's
   keys and values.
2. A cell whose first edit is in block l joins the batch when block l is reached, as a copy of the base stream entering
   l. Rows that have not joined cost nothing: over all layers that is half the work.
3. A cell that touches nothing before position p runs only positions p and after. Under causal attention the keys and
   values before p are the base's, and are handed to the layer as a cache holds them.
4. After the last block, the final norm and the unembedding are applied where the metric looks.

The blocks called are the model's own, with the arguments the model gave them, so nothing is re-implemented. Every
replay carries an unedited row, and is refused unless that row ends where the base ended.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from assay.activations.apply import Placed, Window
from assay.activations.context import Request, RunState, current_run
from assay.activations.edits import Ablate, Apply, Edit
from assay.activations.forward import call, plan_requests
from assay.activations.hooks import running
from assay.activations.lazy import LazyLogits
from assay.base.errors import InvalidEdit
from assay.subjects.model import Model
from assay.subjects.points import Traffic
from assay.subjects.tokens import Batch

CACHE_NAMES = ("past_key_values", "layer_past")
STRIDE = 4
"""Cells share a pass when their first columns fall in one stride: a few columns too many cost less than another pass
over the weights (the optimum is flat, between 3 and 5, for 30 cells a position on a model whose single forward is
bound by memory)."""

_KNOWN_TENSORS = {
    "hidden_states",
    "attention_mask",
    "position_ids",
    "position_embeddings",
    "cache_position",
    "input_ids",
}


class ReplayRefused(Exception):
    """Replay is not valid here; the caller runs full forwards instead."""


@dataclass(frozen=True, slots=True)
class Joined:
    """A cell, and where its computation starts.

    Args:
        index: Its place among all cells.
        edits: What it changes.
        block: The first block it touches; the number of blocks when it only touches what follows them.
        start: The first column it touches.
    """

    index: int
    edits: tuple[Edit, ...]
    block: int
    start: int


class Replay:
    """A recorded base run, ready to be replayed with edits.

    Args:
        model: The subject.
        batch: The base prompts.
        base_edits: Edits on the embeddings, made in the base itself.
        measure: From the logits of some rows to `[cells, prompts]`.

    Raises:
        ReplayRefused: If the base cannot be recorded.
    """

    def __init__(
        self,
        model: Model,
        batch: Batch,
        base_edits: Sequence[Edit],
        measure: Callable[[LazyLogits], Tensor],
    ) -> None:
        if any(edit.site not in ("embed", "pos_embed", "hook_embed", "hook_pos_embed") for edit in base_edits):
            raise ReplayRefused("base edits beyond the embeddings")
        self.model, self.batch, self.measure = model, batch, measure
        self.blocks = model.parts.blocks
        self.calls: dict[int, tuple[Tensor, dict[str, Any]]] = {}
        self.kept: dict[nn.Module, tuple[Tensor, Tensor]] = {}
        self.final = self._record(base_edits)
        self.can_slice = self._sliceable()

    def run(
        self, cells: Sequence[tuple[Edit, ...]], max_rows: int, report: Callable[[Sequence[int], Tensor], None]
    ) -> list[int]:
        """Measure the cells that replay can serve.

        Args:
            cells: All cells.
            max_rows: The largest number of rows at the end of one pass.
            report: Called with cell indices and their values, `[cells, prompts]`.

        Returns:
            The indices of the cells that are left for full forwards.
        """
        joined = [self._join(i, cell) for i, cell in enumerate(cells)]
        left = [i for i, cell in enumerate(joined) if cell is None]
        for group in self._groups([cell for cell in joined if cell is not None], max_rows):
            hidden = self._pass(group)
            unedited, edited = hidden[: self.batch.size], hidden[self.batch.size :]
            self._check(unedited, group[0].start)
            logits = LazyLogits(
                edited, self.unembed, self.vocab, group[0].start, self._prefix(group[0].start, len(group))
            )
            report([cell.index for cell in group], self.measure(logits))
        return left

    @property
    def vocab(self) -> int:
        """The number of logits."""
        weight: Tensor = self.model.parts.unembed.weight  # type: ignore[assignment]
        return weight.shape[0]

    def unembed(self, hidden: Tensor) -> Tensor:
        """From the stream after the last block to logits: the model's own norm and unembedding, and its soft-cap."""
        parts = self.model.parts
        logits: Tensor = parts.unembed(parts.final_norm(hidden))
        return logits if parts.softcap is None else torch.tanh(logits / parts.softcap) * parts.softcap

    def _record(self, base_edits: Sequence[Edit]) -> Tensor:
        handles = []
        final: list[Tensor] = []

        def before(block: int) -> Any:
            def hook(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
                stream = Traffic(module, args, kwargs).tensor_in()
                if args and args[0] is stream:
                    named = dict(zip(_parameter_names(module)[1:], args[1:], strict=False))
                    self.calls[block] = (stream, {**named, **kwargs})
                else:
                    self.calls[block] = (stream, {k: v for k, v in kwargs.items() if v is not stream})

            return hook

        def after(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
            final.append(Traffic(module, args, kwargs, output).tensor_out())

        state = RunState(plan_requests(self.model, (), base_edits), Window(self.batch))
        state.record_attention = lambda module, key, value: self.kept.update({module: (key, value)})
        try:
            for i, block in enumerate(self.blocks):
                handles.append(block.register_forward_pre_hook(_only(state, before(i)), with_kwargs=True))
            handles.append(self.blocks[-1].register_forward_hook(_only(state, after), with_kwargs=True))
            with running(state):
                call(self.model, self.batch)
        finally:
            for handle in handles:
                handle.remove()
        state.check_fired()
        if len(self.calls) != len(self.blocks) or len(final) != 1:
            raise ReplayRefused("the blocks were not each called once")
        return final[0]

    def _sliceable(self) -> bool:
        """Whether positions before a cell's first can be left out: known arguments, causal attention, keys recorded."""
        for block, (_, kwargs) in self.calls.items():
            attention = self.model.parts.attention(block)
            if attention not in self.kept or not getattr(attention, "is_causal", True):
                return False
            if not any(name in kwargs or name in _parameter_names(self.blocks[block]) for name in CACHE_NAMES):
                return False
            tensors = {name for name, value in kwargs.items() if _holds_tensor(value)}
            if tensors - _KNOWN_TENSORS:
                return False
            mask = kwargs.get("attention_mask")
            if mask is not None and (not isinstance(mask, Tensor) or mask.ndim != 4):
                return False
        implementation = str(getattr(self.model.config, "_attn_implementation", ""))
        return implementation in ("sdpa", "eager")

    def _join(self, index: int, cell: tuple[Edit, ...]) -> Joined | None:
        """Where a cell's computation starts, or None if replay does not serve it."""
        n_blocks = len(self.blocks)
        block, start = n_blocks, self.batch.width
        for edit in cell:
            site = self.model.site(edit.site)
            if site.module is not None or site.block is None:
                return None
            block = min(block, site.block)
            start = min(start, self._first_column(edit, site.point))
        return Joined(index, cell, block, start - start % STRIDE if self.can_slice else 0)

    def _first_column(self, edit: Edit, point: str) -> int:
        if point in ("attn.scores", "attn.pattern") or isinstance(edit, Apply):
            return 0
        if isinstance(edit, Ablate) and edit.needs_mean:
            return 0
        try:
            columns = self.batch.columns(getattr(edit, "positions", None))
        except IndexError as error:
            raise InvalidEdit(f"{type(edit).__name__}({edit.site!r}): {error}") from None
        return 0 if columns is None else min((c for row in columns for c in row), default=0)

    def _groups(self, cells: list[Joined], max_rows: int) -> Iterator[list[Joined]]:
        """Cells that start at one column, neighbours in depth together, no more than fit."""
        cells = sorted(cells, key=lambda cell: (cell.start, cell.block, cell.index))
        at = 0
        while at < len(cells):
            start = cells[at].start
            width = max(1, self.batch.width - start)
            room = max(1, max_rows * self.batch.width // width // self.batch.size)
            end = at
            while end < len(cells) and end - at < room and cells[end].start == start:
                end += 1
            yield cells[at:end]
            at = end

    def _pass(self, group: list[Joined]) -> Tensor:
        """Run a group down the blocks, cells joining on the way; rows: the unedited base first, then the cells."""
        start, n_base = group[0].start, self.batch.size
        first = group[0].block
        stream: Tensor | None = None
        joined = 0
        for block in range(first, len(self.blocks)):
            entering = self.calls[block][0][:, start:]
            if stream is None:
                stream = entering
            new = sum(1 for cell in group[joined:] if cell.block == block)
            if new:
                stream = torch.cat([stream, entering.repeat(new, 1, 1)])
                joined += new
            stream = self._block(block, stream, group[:joined], start)
        assert stream is not None and stream.shape[0] == n_base * (1 + len(group))
        return stream

    def _block(self, block: int, stream: Tensor, cells: list[Joined], start: int) -> Tensor:
        n_base = self.batch.size
        requests: dict[str, Request] = {}
        for k, cell in enumerate(cells):
            rows = tuple((n_base * (1 + k) + b, b) for b in range(n_base))
            for edit in cell.edits:
                site = self.model.site(edit.site)
                if site.block != block:
                    continue
                whole = str(site.whole)
                if whole not in requests:
                    requests[whole] = Request(site.whole, self.model.point(site.whole))
                requests[whole].edits.append(Placed(edit, site.head, rows))
        window = Window(self.batch, first=start, width=self.batch.width - start)
        state = RunState(requests, window)
        kwargs = self._arguments(block, stream.shape[0] // n_base, start)
        with running(state):
            output = self.blocks[block](stream, **kwargs)
        state.check_fired()
        return output if isinstance(output, Tensor) else output[0]

    def _arguments(self, block: int, times: int, start: int) -> dict[str, Any]:
        """The recorded arguments, for `times` copies of the base, from column `start` on."""
        _, recorded = self.calls[block]
        kwargs = {name: self._fit(name, value, times, start) for name, value in recorded.items()}
        if start:
            module = self.model.parts.attention(block)
            names = _parameter_names(self.blocks[block])
            cache = next(name for name in CACHE_NAMES if name in kwargs or name in names)
            kwargs[cache] = _Prefix(*self.kept[module], times=times, start=start)
            if kwargs.get("attention_mask") is None:
                kwargs["attention_mask"] = self._causal_mask(start)
        return kwargs

    def _fit(self, name: str, value: Any, times: int, start: int) -> Any:
        if isinstance(value, tuple | list):
            return type(value)(self._fit(name, item, times, start) for item in value)
        if not isinstance(value, Tensor) or value.ndim < 2:
            return value[start:] if start and isinstance(value, Tensor) and name == "cache_position" else value
        if self.batch.size > 1 and value.shape[0] == self.batch.size:
            value = value.repeat(times, *[1] * (value.ndim - 1))
        if start:
            value = value[..., start:, :] if name == "attention_mask" else value[:, start:]
        return value

    def _causal_mask(self, start: int) -> Tensor:
        width, device = self.batch.width, self.batch.ids.device
        columns = torch.arange(width, device=device)
        visible = (columns[start:, None] >= columns[None])[None, None]
        if getattr(self.model.config, "_attn_implementation", "") != "eager":
            return visible
        stream = self.calls[0][0]
        blocked = torch.full((), torch.finfo(stream.dtype).min, dtype=stream.dtype, device=device)
        return torch.where(visible, torch.zeros_like(blocked), blocked)

    def _prefix(self, start: int, n_cells: int) -> Callable[[], Tensor] | None:
        if not start:
            return None
        return lambda: self.unembed(self.final[:, :start]).repeat(n_cells, 1, 1)

    def _check(self, unedited: Tensor, start: int) -> None:
        """Refuse a replay whose unedited row does not end where the base ended."""
        real = self.batch.mask.bool()[:, start:]
        expected, found = self.final[:, start:][real], unedited[real]
        error = (expected.float() - found.float()).abs().max()
        tolerance = 1e-3 if expected.dtype == torch.float32 else 5e-2
        if not bool(error <= tolerance * expected.float().abs().max()):
            raise ReplayRefused(f"an unedited replay differs from the base by {float(error):.2g}")


class _Prefix:
    """A cache that holds the base's keys and values before a column, as far as a layer looks at one."""

    def __init__(self, key: Tensor, value: Tensor, *, times: int, start: int) -> None:
        self.key, self.value = key[:, :, :start], value[:, :, :start]
        self.times, self.start = times, start

    def update(self, key: Tensor, value: Tensor, *_: Any, **__: Any) -> tuple[Tensor, Tensor]:
        """Return the prefix and the new keys and values, joined along positions."""
        return self._join(self.key, key), self._join(self.value, value)

    def get_seq_length(self, *_: Any, **__: Any) -> int:
        """The number of positions held."""
        return self.start

    def _join(self, old: Tensor, new: Tensor) -> Tensor:
        return torch.cat([old.repeat(self.times, 1, 1, 1).to(new.dtype), new], 2)


def _only(state: RunState, hook: Callable[..., None]) -> Callable[..., None]:
    """A hook that acts for one run alone."""

    def guarded(module: nn.Module, *rest: Any) -> None:
        if current_run() is state:
            hook(module, *rest)

    return guarded


def _parameter_names(module: nn.Module) -> list[str]:
    return list(inspect.signature(module.forward).parameters)


def _holds_tensor(value: Any) -> bool:
    return isinstance(value, Tensor) or (isinstance(value, tuple | list) and any(_holds_tensor(v) for v in value))
