"""Many edits of one base, each on its own, computed together and exactly.

Two ways, one answer. *Replay* (`assay.activations.replay`) computes a cell only from the block and the position it
touches. *Full forwards* put several cells into the rows of one batch; they serve where replay is not valid.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

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
from assay.subjects.tokens import Batch

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
        SpecError: If an option is not one of those above, or the metric does not give one value a row.
        InvalidEdit: If a cell is not made of edits, or an edit does not fit.
    """
    if exact not in ("auto", "forward"):
        raise SpecError(f"exact={exact!r}: 'auto' or 'forward'", "exact")
    if reduce not in ("mean", None):
        raise SpecError(f"reduce={reduce!r}: 'mean' or None", "reduce")
    each = [(cell,) if isinstance(cell, Edit) else tuple(cell) for cell in cells]
    for cell in each:
        if not cell or not all(isinstance(edit, Edit) for edit in cell):
            raise InvalidEdit(f"a cell is an edit or a non-empty sequence of edits, not {cell!r:.80}")
    if max_rows is not None and max_rows < 1:
        raise SpecError(f"max_rows={max_rows}: at least 1", "max_rows")
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
                replay = Replay(model, batch, base_edits, lambda lazy: measure(metric, lazy, batch.size), max_rows)
                left = replay.run(each, report)
            except ReplayRefused:
                left = [i for i in left if values[i] is None]
        full_forwards(model, batch, each, left, metric, base_edits, rows, report)
    stacked = torch.stack([value for value in values if value is not None]) if values else torch.empty(0, batch.size)
    return stacked.mean(1) if reduce == "mean" else stacked


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


def measure(metric: Metric, logits: LazyLogits, n_base: int) -> Tensor:
    """Measure the cells in a batch of rows: `[cells, prompts]`."""
    if n_base == 1:
        return measure_rows(metric, logits)[:, None]
    starts = range(0, len(logits), n_base)
    return torch.stack([measure_rows(metric, logits.rows(start, start + n_base)) for start in starts])


def measure_rows(metric: Metric, logits: Tensor | LazyLogits) -> Tensor:
    """Call a metric and insist on one value a row."""
    value = metric(logits)  # type: ignore[arg-type]
    if not isinstance(value, Tensor) or value.shape != (logits.shape[0],):
        got = f"a tensor shaped {tuple(value.shape)}" if isinstance(value, Tensor) else repr(value)
        raise SpecError(
            f"the metric must map logits [rows, pos, vocab] to one value a row, [{logits.shape[0]}]; it gave {got}",
            "metric",
        )
    return value
