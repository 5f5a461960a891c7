"""Many edits of one base, each on its own, computed together and exactly.

Two ways, one answer. *Replay* (`assay.activations.replay`) computes a cell only from the block and the position it
touches. *Full forwards* put several cells into the rows of one batch; they serve where replay is not valid.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
from torch import Tensor

from assay.activations.apply import Placed, Window
from assay.activations.context import Request, RunState
from assay.activations.edits import Edit
from assay.activations.forward import Metric, call, main_output
from assay.activations.hooks import running
from assay.activations.lazy import LazyLogits
from assay.activations.recording import ReplayRefused
from assay.activations.replay import Replay
from assay.activations.serving import watch
from assay.base.errors import InvalidEdit, SpecError
from assay.subjects.model import Model
from assay.subjects.tokens import Batch, is_cache, is_whole_number

Cell = Edit | Sequence[Edit]
Progress = Callable[[int, int], None]


def sweep(
    model: Model,
    batch: Batch,
    cells: Sequence[Cell],
    metric: Metric,
    *,
    base_edits: Sequence[Edit] = (),
    reduce: str | None = "mean",
    exact: str = "auto",
    max_rows: int | None = None,
    progress: Progress | None = None,
) -> Tensor:
    """Measure every cell; see `Subject.sweep`.

    Args:
        model: The subject.
        batch: The base prompts.
        cells: An edit each, or several edits made together.
        metric: From logits to one value a row.
        base_edits: Edits made in every cell.
        reduce: "mean" over prompts, or None.
        exact: "auto" or "forward".
        max_rows: The largest number of rows computed together.
        progress: Called with (cells done, all cells).

    Returns:
        `[cells]`, or `[cells, prompts]` when `reduce` is None.

    Raises:
        SpecError: If an option is not one of those above, the metric does not give each row a value of its own, or the
            base holds a cache.
        InvalidEdit: If a cell is not made of edits, or an edit does not fit.
    """
    _check(batch, metric, reduce, exact, max_rows, progress)
    each, base_edits = _cells(cells), _several(base_edits, "base_edits")
    model.require_eval()
    rows = max_rows or default_rows(model, batch)
    values: list[Tensor | None] = [None] * len(each)
    done = 0

    def report(index: Sequence[int], found: Tensor) -> None:
        nonlocal done
        for i, value in zip(index, found, strict=True):
            values[i] = value
        done += len(index)
        if progress is not None:
            progress(done, len(each))

    left = list(range(len(each)))
    with torch.no_grad():
        if exact == "auto" and model.architecture is not None and len(each) > 1:
            try:
                replay = Replay(model, batch, base_edits, Measure(metric, batch.size), max_rows)
                left = replay.run(each, report)
            except ReplayRefused:
                left = [i for i in left if values[i] is None]
        full_forwards(model, batch, each, left, metric, base_edits, rows, report)
    stacked = torch.stack([value for value in values if value is not None]) if values else torch.empty(0, batch.size)
    return stacked.mean(1) if reduce == "mean" else stacked


def _check(batch: Batch, metric: Any, reduce: Any, exact: Any, max_rows: Any, progress: Any) -> None:
    """Refuse options before anything runs."""
    if exact not in ("auto", "forward"):
        raise SpecError(f"exact={exact!r}: 'auto' or 'forward'", "exact")
    if reduce not in ("mean", None):
        raise SpecError(f"reduce={reduce!r}: 'mean' or None", "reduce")
    if max_rows is not None and (not is_whole_number(max_rows) or max_rows < 1):
        raise SpecError(f"max_rows={max_rows!r}: a whole number from 1, or None", "max_rows")
    for name, function in (("metric", metric), ("progress", progress)):
        if not callable(function) and not (name == "progress" and function is None):
            raise SpecError(f"{name}={function!r:.60}: a function is needed", name)
    caches = [name for name, value in (batch.inputs or {}).items() if is_cache(value)]
    if caches or any(map(is_cache, batch.args)):
        raise SpecError(
            f"{caches[0] if caches else 'an argument'} is a cache, and a sweep runs its base many times over: give the "
            f"prompt with all its tokens, without the cache",
            "base",
        )


def _several(edits: Any, name: str) -> tuple[Edit, ...]:
    """Edits of one cell, or of all, as a tuple."""
    if isinstance(edits, Edit) or not isinstance(edits, Iterable):
        raise InvalidEdit(f"{name}= is a sequence of edits, [Add(...), ...], not {edits!r:.80}")
    each = tuple(edits)
    for edit in each:
        if not isinstance(edit, Edit):
            raise InvalidEdit(
                f"{name}: edits are Add, Set, Scale, Clamp, Ablate, ProjectOut, Patch or Apply, not {edit!r:.80}"
            )
    return each


def _cells(cells: Any) -> list[tuple[Edit, ...]]:
    """Cells as tuples of edits."""
    if isinstance(cells, Edit) or not isinstance(cells, Iterable):
        raise InvalidEdit(f"edits= is a sequence of cells, an edit or a sequence of edits each, not {cells!r:.80}")
    found: list[tuple[Edit, ...]] = []
    for cell in cells:
        each = (cell,) if isinstance(cell, Edit) else tuple(cell) if isinstance(cell, Iterable) else ()
        if not each or not all(isinstance(edit, Edit) for edit in each):
            raise InvalidEdit(f"a cell is an edit or a non-empty sequence of edits, not {cell!r:.80}")
        found.append(each)
    return found


def default_rows(model: Model, batch: Batch) -> int:
    """How many rows to compute together: about 1,000 tokens at a time, where matrix products are already efficient."""
    return max(batch.size, min(256, 1024 // batch.width))


def full_forwards(
    model: Model,
    batch: Batch,
    cells: Sequence[tuple[Edit, ...]],
    left: Sequence[int],
    metric: Metric,
    base_edits: Sequence[Edit],
    rows: int,
    report: Callable[[Sequence[int], Tensor], None],
) -> None:
    """Measure cells by full forwards, several cells to a batch."""
    per = 1 if model.compares_rows else max(1, rows // batch.size)
    for start in range(0, len(left), per):
        chunk = left[start : start + per]
        stacked = batch.repeat(len(chunk))
        requests = place(model, [cells[i] for i in chunk], base_edits, batch.size)
        state = RunState(requests, Window(batch), rows=stacked.size)
        with running(state):
            handles = watch(state, model)
            try:
                output = call(model, stacked)
            finally:
                for handle in handles:
                    handle.remove()
        state.check_fired()
        logits = main_output(output)
        found = [measure_rows(metric, logits[k * batch.size : (k + 1) * batch.size]) for k in range(len(chunk))]
        report(chunk, torch.stack(found))


def place(
    model: Model, cells: Sequence[tuple[Edit, ...]], base_edits: Sequence[Edit], n_base: int, first_row: int = 0
) -> dict[str, Request]:
    """Requests that put cell k on rows `first_row + k * n_base` and following, after the base edits.

    Args:
        model: The subject.
        cells: The cells, in the order of their rows.
        base_edits: Edits made in every cell.
        n_base: The number of base prompts.
        first_row: The row at which the first cell starts.
    """
    requests: dict[str, Request] = {}
    for k, cell in enumerate(cells):
        rows = tuple((first_row + k * n_base + b, b) for b in range(n_base))
        for edit in (*base_edits, *cell):
            site = model.site(edit.site)
            whole = str(site.whole)
            if whole not in requests:
                requests[whole] = Request(site.whole, model.point(site.whole))
            requests[whole].edits.append(Placed(edit, site.head, rows))
    return requests


class Measure:
    """A metric on rows of cells, held to giving each row a value of its own.

    A cell's prompts are measured together, as in a run of that cell. With one prompt, many cells are measured in one
    call: a metric that looks across rows (that subtracts their mean, say) would then give other values than in a run.
    So until values differ from row to row, the first and the last row are measured alone as well.

    Args:
        metric: From logits to one value a row.
        n_base: The number of base prompts.
    """

    def __init__(self, metric: Metric, n_base: int) -> None:
        self.metric, self.n_base, self._trusted = metric, n_base, False

    def __call__(self, logits: LazyLogits) -> Tensor:
        """Measure the cells in a batch of rows: `[cells, prompts]`.

        Raises:
            SpecError: If the metric does not give one value a row, or looks across rows.
        """
        if self.n_base > 1:
            starts = range(0, len(logits), self.n_base)
            return torch.stack([measure_rows(self.metric, logits.rows(s, s + self.n_base)) for s in starts])
        last = len(logits) - 1
        if self._trusted or not last:
            return measure_rows(self.metric, logits)[:, None]
        alone = torch.cat([measure_rows(self.metric, logits.alone(row)) for row in (0, last)])
        values = measure_rows(self.metric, logits)
        self._hold(values, alone)
        self._trusted = bool((values != values[0]).any())
        return values[:, None]

    @staticmethod
    def _hold(values: Tensor, alone: Tensor) -> None:
        together = values[[0, -1]]
        loose = 2e-2 if values.dtype in (torch.float16, torch.bfloat16) else 1e-4
        allowed = loose * values.abs()[values.isfinite()].max() + loose / 10 if values.isfinite().any() else 0.0
        same = (together == alone) | (together.isnan() & alone.isnan()) | ((together - alone).abs() <= allowed)
        if not bool(same.all()):
            at = int((~same).nonzero()[0])
            raise SpecError(
                f"the metric gives a row {together[at].item():.4g} among {len(values)} rows and {alone[at].item():.4g} "
                f"alone: each row's value must come from its own logits, because a sweep measures many cells together",
                "metric",
            )


def measure_rows(metric: Metric, logits: Tensor | LazyLogits) -> Tensor:
    """Call a metric and insist on one value a row; whole numbers and booleans become floats."""
    value = metric(logits)  # type: ignore[arg-type]
    _one_a_row(value, logits.shape[0])
    return value if value.is_floating_point() or value.is_complex() else value.to(torch.get_default_dtype())


def _one_a_row(value: Any, rows: int) -> None:
    """Refuse what is not one number for each row."""
    if not isinstance(value, Tensor) or value.shape != (rows,):
        got = f"a tensor shaped {tuple(value.shape)}" if isinstance(value, Tensor) else repr(value)
        raise SpecError(
            f"the metric must map logits [rows, pos, vocab] to one value a row, [{rows}]; it gave {got}",
            "metric",
        )
