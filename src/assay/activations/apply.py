"""Apply edits to a tensor: which rows, columns and heads, and what goes there."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from assay.activations.edits import Ablate, Edit, Patch, Where
from assay.base.errors import InvalidEdit
from assay.subjects.points import Point
from assay.subjects.tokens import Batch, is_whole_number, whole_numbers


@dataclass(frozen=True, slots=True)
class Placed:
    """An edit put to work on one forward's batch.

    Args:
        edit: The edit.
        head: The head its site's name ends in, or None.
        rows: Pairs (row of this forward, row of the base batch), or None when they are the same and all are meant.
    """

    edit: Edit
    head: int | None = None
    rows: tuple[tuple[int, int], ...] | None = None


@dataclass(frozen=True, slots=True)
class Window:
    """Which columns of which prompts a forward covers.

    Args:
        batch: The base prompts.
        first: The first column covered.
        width: The number of columns covered; None for all that the batch has.
        low: Columns below this one are not edited (generation, `apply_to="new"`).
        high: Columns from this one on are not edited (`apply_to="prompt"`); None for no limit.
    """

    batch: Batch
    first: int = 0
    width: int | None = None
    low: int = 0
    high: int | None = None

    @property
    def last(self) -> int:
        """One past the last column covered."""
        return self.first + (self.batch.width if self.width is None else self.width)

    @property
    def span(self) -> tuple[int, int]:
        """The columns that may be edited, as a half-open range."""
        return max(self.first, self.low), self.last if self.high is None else min(self.last, self.high)

    @property
    def empty(self) -> bool:
        """Whether nothing here may be edited or captured."""
        low, high = self.span
        return low >= high


def apply_edits(x: Tensor, edits: Sequence[Placed], window: Window, point: Point) -> Tensor:
    """Apply edits in order.

    Args:
        x: What the point reads, batch first.
        edits: The edits, placed on this forward's rows.
        window: What the forward covers.
        point: The point, for its dimensions.

    Returns:
        The new tensor; `x` itself when nothing applied.

    Raises:
        InvalidEdit: If positions, rows, heads or values do not fit.
    """
    transposed = point.head_dim == 1
    y = origin = x.transpose(1, 2) if transposed else x
    fresh = False
    for placed in edits:
        heads = _heads(placed, point, y)
        mean = _mean(origin, placed, window) if isinstance(placed.edit, Ablate) and placed.edit.needs_mean else None
        for rows, base_rows, columns in _groups(placed, window, y):
            if not fresh and not (rows is None and columns is None and heads is None):
                y, fresh = y.clone(), True
            where = Where(
                rows=base_rows,
                columns=None if columns is None and window.first == 0 else _absolute(columns, window, y),
                starts=window.batch.starts,
                mean=mean,
                head=heads if isinstance(heads, int) else None,
                heads=heads if isinstance(heads, list) else None,
                transposed=transposed,
            )
            if rows is None and columns is None and heads is None:
                y = placed.edit.transform(y, where)
            else:
                index = _index(y, rows, columns, heads)
                y[index] = placed.edit.transform(y[index], where)
    if y is x:
        return x
    return y.transpose(1, 2) if transposed else y


def _absolute(columns: list[int] | None, window: Window, y: Tensor) -> list[int]:
    local = range(y.shape[1]) if columns is None else columns
    return [window.first + column for column in local]


def _mean(y: Tensor, placed: Placed, window: Window) -> Tensor:
    """The mean over all real tokens of the run that the edit belongs to, before edits, `[1, 1, (heads,) features]`."""
    pairs = placed.rows
    mine = y if pairs is None else y[[row for row, _ in pairs]]
    base = list(range(window.batch.size)) if pairs is None else [b for _, b in pairs]
    if not window.batch.padded:
        return mine.mean((0, 1), keepdim=True)
    mask = window.batch.mask[base][:, window.first : window.last].to(mine.dtype)
    weight = mask.reshape(*mask.shape, *[1] * (mine.ndim - 2))
    return (mine * weight).sum((0, 1), keepdim=True) / weight.sum()


def _index(
    y: Tensor, rows: list[int] | None, columns: list[int] | None, heads: int | list[int] | None
) -> tuple[Any, ...]:
    """An index whose result keeps the order rows, columns, heads, features."""
    device = y.device
    row = torch.arange(y.shape[0], device=device) if rows is None else torch.tensor(rows, device=device)
    column = torch.arange(y.shape[1], device=device) if columns is None else torch.tensor(columns, device=device)
    if isinstance(heads, list):
        return row[:, None, None], column[None, :, None], torch.tensor(heads, device=device)[None, None, :]
    if isinstance(heads, int):
        return row[:, None], column[None, :], torch.full((1, 1), heads, device=device)
    return row[:, None], column[None, :]


def _groups(placed: Placed, window: Window, y: Tensor) -> list[tuple[list[int] | None, list[int], list[int] | None]]:
    """Rows of the forward, rows of the base, and local columns; rows that share columns are one group."""
    edit = placed.edit
    rows = _rows(placed, window, y)
    base = [b for _, b in rows] if rows is not None else list(range(window.batch.size))
    low, high = window.span
    everything = low == window.first and high == window.last
    positions = getattr(edit, "positions", None)
    if positions is None and isinstance(edit, Patch) and (window.batch.padded or edit.padded):
        positions = slice(None)
    if positions is None:
        columns = None if everything else [c - window.first for c in range(low, high)]
        return [(None if rows is None else [r for r, _ in rows], base, columns)]
    try:
        by_row = window.batch.columns(positions)
    except (IndexError, TypeError, ValueError) as error:
        raise InvalidEdit(f"{type(edit).__name__}({edit.site!r}): positions={positions!r}: {error}") from None
    assert by_row is not None
    if not any(by_row):
        raise InvalidEdit(f"{type(edit).__name__}({edit.site!r}): positions={positions!r} selects no token")
    groups: dict[tuple[int, ...], tuple[list[int], list[int]]] = {}
    for row, b in rows if rows is not None else enumerate(range(window.batch.size)):
        local = tuple(c - window.first for c in by_row[b] if low <= c < high)
        if local:
            members = groups.setdefault(local, ([], []))
            members[0].append(row)
            members[1].append(b)
    return [(r, b, list(local)) for local, (r, b) in groups.items()]


def _rows(placed: Placed, window: Window, y: Tensor) -> list[tuple[int, int]] | None:
    wanted = getattr(placed.edit, "rows", None)
    size = window.batch.size
    if placed.rows is None and wanted is None:
        return None
    pairs = list(placed.rows) if placed.rows is not None else [(i, i) for i in range(size)]
    if wanted is None:
        return pairs
    try:
        keep = set(_integers(wanted, size))
    except (IndexError, TypeError, ValueError) as error:
        raise InvalidEdit(f"{type(placed.edit).__name__}({placed.edit.site!r}): rows={wanted!r}: {error}") from None
    return [pair for pair in pairs if pair[1] in keep]


def _heads(placed: Placed, point: Point, y: Tensor) -> int | list[int] | None:
    edit, wanted = placed.edit, getattr(placed.edit, "heads", None)
    if placed.head is not None:
        if wanted is not None:
            raise InvalidEdit(f"{edit.site!r} names a head already; heads={wanted!r} is one too many")
        return placed.head
    if wanted is None:
        return None
    if point.head_dim is None:
        raise InvalidEdit(f"{edit.site!r} has no heads, and heads={wanted!r} was given")
    try:
        chosen = _integers(wanted, y.shape[2])
    except (IndexError, TypeError, ValueError) as error:
        raise InvalidEdit(f"{type(edit).__name__}({edit.site!r}): heads={wanted!r}: {error}") from None
    return chosen if isinstance(wanted, slice) or not is_whole_number(wanted) else chosen[0]


def _integers(selector: Any, size: int) -> list[int]:
    if isinstance(selector, slice):
        return list(range(*selector.indices(size)))
    many = whole_numbers(selector)
    if not many:
        raise IndexError("nothing is selected")
    for i in many:
        if not -size <= i < size:
            raise IndexError(f"{i} is outside 0 to {size - 1}")
    return [i % size for i in many]
