"""Apply edits to a tensor: which rows, columns and heads, and what goes there."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from assay.activations.ablations import moments
from assay.activations.checking import put
from assay.activations.edits import Ablate, Edit, Patch, Where
from assay.base.errors import InvalidEdit, UnknownSite
from assay.base.sites import parse_site
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
        whole: The prompts as they were given, where the batch stands for a site with positions of its own.
    """

    batch: Batch
    first: int = 0
    width: int | None = None
    low: int = 0
    high: int | None = None
    whole: Batch | None = None

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


@dataclass(frozen=True, slots=True, kw_only=True)
class Layout:
    """In which order an edit sees a site's dimensions: rows, positions, heads, and the rest.

    Args:
        dims: The site's dimensions, by number, in that order.
        rows: Whether it has rows.
        positions: Whether it has positions.
        heads: Which of the ordered dimensions counts heads, or None.
    """

    dims: tuple[int, ...]
    rows: bool
    positions: bool
    heads: int | None

    @classmethod
    def of(cls, x: Tensor, point: Point, window: Window) -> Layout:
        """Read a point's dimensions; those of a raw module site are guessed from the shape of its tensor."""
        names = point.dims
        if not names:  # rows first; then positions, where the second of three dimensions is as long as the prompts
            positions = x.ndim == 3 and x.shape[1] == window.last - window.first
            return cls(dims=tuple(range(x.ndim)), rows=x.ndim > 0, positions=positions, heads=None)
        batch = names.index("batch") if "batch" in names else None
        along = next((names.index(name) for name in ("pos", "query") if name in names), None)
        lead = [at for at in (batch, along, point.head_dim) if at is not None]
        rest = [at for at in range(x.ndim) if at not in lead]
        heads = None if point.head_dim is None else len(lead) - 1
        return cls(dims=(*lead, *rest), rows=batch is not None, positions=along is not None, heads=heads)

    def ordered(self, x: Tensor) -> Tensor:
        """The tensor with its dimensions in this order."""
        return x if self.dims == tuple(range(x.ndim)) else x.permute(self.dims)

    def restored(self, y: Tensor) -> Tensor:
        """The tensor with its dimensions back in the site's own order."""
        if self.dims == tuple(range(y.ndim)):
            return y
        return y.permute([self.dims.index(at) for at in range(y.ndim)])


@dataclass(frozen=True, slots=True, kw_only=True)
class Group:
    """Rows that an edit changes at the same columns.

    Args:
        rows: Rows of the forward; None for all.
        base: The rows of the base batch that they are.
        columns: Columns of the forward; None for all.
        order: See `Where.order`.
        slots: See `Where.slots`.
    """

    rows: list[int] | None
    base: list[int]
    columns: list[int] | None
    order: tuple[list[int], int] | None = None
    slots: tuple[list[int], int] | None = None


def apply_edits(x: Tensor, edits: Sequence[Placed], window: Window, point: Point) -> Tensor:
    """Apply edits in order.

    Args:
        x: What the point reads.
        edits: The edits, placed on this forward's rows.
        window: What the forward covers.
        point: The point, for its dimensions.

    Returns:
        The new tensor; `x` itself when nothing applied.

    Raises:
        InvalidEdit: If positions, rows, heads or values do not fit.
    """
    layout = Layout.of(x, point, window)
    y = origin = layout.ordered(x)
    if layout.positions and y.shape[1] != window.last - window.first and window.first == 0 and window.width is None:
        window = Window(window.batch.sized(y.shape[1]), whole=window.batch)
    fresh = False
    for placed in edits:
        heads = _heads(placed, point, layout, y)
        run, spread = _whole_run(origin, placed, window, layout, point)
        for group in _groups(placed, window, layout, y):
            everything = group.rows is None and group.columns is None and heads is None
            if not fresh and not everything:
                y, fresh = y.clone(), True
            where = Where(
                batch=window.batch,
                rows=group.base,
                columns=_absolute(group.columns, window, layout, y, placed.edit),
                order=group.order,
                slots=group.slots,
                site=_site_name(placed),
                head=heads if isinstance(heads, int) else None,
                heads=heads if isinstance(heads, list) else None,
                head_axis=layout.heads,
                dims=layout.dims,
                has_positions=layout.positions,
                moments=spread,
                run=run,
                stack=point.stack,
                whole=window.whole,
            )
            if everything:
                y = put(placed.edit.transform(y, where), y, placed.edit)
            else:
                index = _index(y, group, heads, layout)
                y[index] = put(placed.edit.transform(y[index], where), y, placed.edit)
    if y is origin:
        return x
    return layout.restored(y)


def _site_name(placed: Placed) -> str:
    """The canonical name of the whole site: what random draws are keyed by, however it was spelled."""
    name = placed.edit.site
    try:
        return str(parse_site(name).whole)
    except UnknownSite:
        return name if placed.head is None else name.rpartition(".")[0]


def _absolute(columns: list[int] | None, window: Window, layout: Layout, y: Tensor, edit: Edit) -> list[int] | None:
    """The batch's columns; None for all of a forward that covers the batch from its start."""
    if not layout.positions or (columns is None and window.first == 0 and not _by_prompt(edit)):
        return None
    local = range(y.shape[1]) if columns is None else columns
    return [window.first + column for column in local]


def _by_prompt(edit: Edit) -> bool:
    """Whether an edit gives each prompt something of its own, counted from the prompt's start."""
    return isinstance(edit, Ablate) and edit.by_prompt


def _whole_run(
    y: Tensor, placed: Placed, window: Window, layout: Layout, point: Point
) -> tuple[tuple[Tensor, int] | None, tuple[Tensor, Tensor] | None]:
    """What the whole run that an edit belongs to has at the site, before edits: its values, or mean and spread."""
    edit = placed.edit
    if not (isinstance(edit, Ablate) and edit.needs_run):
        return None, None
    if edit.kind != "mean" and "key" in point.dims:
        raise InvalidEdit(f"Ablate({edit.site!r}, {edit.kind!r}): scores and patterns have 'zero', 'mean' or a tensor")
    _needs_rows(placed, layout, y, window)
    mine = y if placed.rows is None else y[[row for row, _ in placed.rows]]
    if layout.positions:  # generated tokens come after the prompts and are no part of them
        mine = mine[:, : window.batch.width - window.first]
    base = list(range(window.batch.size)) if placed.rows is None else [b for _, b in placed.rows]
    if edit.kind == "resample":
        by_base = mine if base == list(range(len(base))) else mine[[base.index(b) for b in range(len(base))]]
        return (by_base, window.first), None
    over = (0, 1) if layout.positions else (0,)
    padded = layout.positions and window.batch.padded
    real = window.batch.mask[base][:, window.first : window.last] if padded else None
    return None, moments(mine, real, over)


def _needs_rows(placed: Placed, layout: Layout, y: Tensor, window: Window) -> None:
    """Refuse to tell rows apart in a tensor that does not have them."""
    rows = window.batch.size if placed.rows is None else 1 + max(row for row, _ in placed.rows)
    if not layout.rows or y.shape[0] < rows or (placed.rows is None and y.shape[0] != rows):
        edit = placed.edit
        raise InvalidEdit(
            f"{type(edit).__name__}({edit.site!r}): its tensor is shaped {tuple(y.shape)} and does not have the {rows} "
            f"rows of this run first"
        )


def _index(y: Tensor, group: Group, heads: int | list[int] | None, layout: Layout) -> tuple[Any, ...]:
    """An index whose result keeps the order rows, positions, heads, features; one head given by an int drops out."""
    chosen: list[Any] = []
    if layout.rows:
        chosen.append(range(y.shape[0]) if group.rows is None else group.rows)
    if layout.positions:
        chosen.append(range(y.shape[len(chosen)]) if group.columns is None else group.columns)
    if heads is not None:
        chosen.append(heads)
    spread = sum(not isinstance(item, int) for item in chosen)
    index, axis = [], 0
    for item in chosen:
        shape = [1] * spread
        if not isinstance(item, int):
            shape[axis], axis = len(item), axis + 1
        values = [item] if isinstance(item, int) else list(item)
        index.append(torch.tensor(values, dtype=torch.long, device=y.device).reshape(shape))
    return tuple(index)


def _groups(placed: Placed, window: Window, layout: Layout, y: Tensor) -> list[Group]:
    """Rows that share columns are one group."""
    edit = placed.edit
    positions = getattr(edit, "positions", None)
    rows, order = _rows(placed, window, layout, y)
    base = [b for _, b in rows] if rows is not None else list(range(window.batch.size))
    low, high = window.span
    everything = low == window.first and high == window.last
    name = f"{type(edit).__name__}({edit.site!r})"
    if not layout.positions and not (positions is None and everything):
        what = f"positions={positions!r}" if positions is not None else "apply_to= without a cache"
        raise InvalidEdit(f"{name}: {what}, and the site has no positions (its tensor is shaped {tuple(y.shape)})")
    by_prompt = (isinstance(edit, Patch) and (window.batch.padded or edit.padded)) or (
        _by_prompt(edit) and window.batch.padded
    )
    if positions is None and layout.positions and by_prompt:
        positions = slice(None)
    if positions is None:
        columns = None if everything else [c - window.first for c in range(low, high)]
        return [Group(rows=None if rows is None else [r for r, _ in rows], base=base, columns=columns, order=order)]
    try:
        by_row = window.batch.columns(positions, base)
    except (IndexError, TypeError, ValueError) as error:
        raise InvalidEdit(f"{name}: positions={positions!r}: {error}") from None
    assert by_row is not None
    if not any(by_row):
        raise InvalidEdit(f"{name}: positions={positions!r} selects no token")
    by_row = [list(dict.fromkeys(columns)) for columns in by_row]  # a position that is said twice is one position
    pairs = rows if rows is not None else [(b, b) for b in base]
    places = order[0] if order is not None else base
    n_rows = order[1] if order is not None else len(base)
    groups: dict[tuple[Any, ...], tuple[list[int], list[int], list[int]]] = {}
    for (row, b), place in zip(pairs, places, strict=True):
        within = [(c - window.first, slot) for slot, c in enumerate(by_row[b]) if low <= c < high]
        if within:
            members = groups.setdefault((tuple(within), len(by_row[b])), ([], [], []))
            for member, value in zip(members, (row, b, place), strict=True):
                member.append(value)
    return [
        Group(
            rows=r,
            base=b,
            columns=[column for column, _ in within],
            order=(place, n_rows),
            slots=([slot for _, slot in within], n_slots),
        )
        for (within, n_slots), (r, b, place) in groups.items()
    ]


def _rows(
    placed: Placed, window: Window, layout: Layout, y: Tensor
) -> tuple[list[tuple[int, int]] | None, tuple[list[int], int] | None]:
    """Pairs (row of the forward, row of the base) that an edit selects, and each one's place among those selected."""
    wanted = getattr(placed.edit, "rows", None)
    size = window.batch.size
    if placed.rows is None and wanted is None:
        return None, None
    _needs_rows(placed, layout, y, window)
    pairs = list(placed.rows) if placed.rows is not None else [(i, i) for i in range(size)]
    if wanted is None:
        return pairs, ([b for _, b in pairs], size)
    try:
        chosen = list(dict.fromkeys(_integers(wanted, size)))
    except (IndexError, TypeError, ValueError) as error:
        raise InvalidEdit(f"{type(placed.edit).__name__}({placed.edit.site!r}): rows={wanted!r}: {error}") from None
    pairs = [pair for pair in pairs if pair[1] in chosen]
    return pairs, ([chosen.index(b) for _, b in pairs], len(chosen))


def _heads(placed: Placed, point: Point, layout: Layout, y: Tensor) -> int | list[int] | None:
    edit, wanted = placed.edit, getattr(placed.edit, "heads", None)
    if placed.head is not None:
        if wanted is not None:
            raise InvalidEdit(f"{edit.site!r} names a head already; heads={wanted!r} is one too many")
        if layout.heads is not None and placed.head >= y.shape[layout.heads]:
            raise InvalidEdit(f"{edit.site!r}: there are {y.shape[layout.heads]} heads, and 0 is the first")
        return placed.head
    if wanted is None:
        return None
    if layout.heads is None:
        raise InvalidEdit(f"{edit.site!r} has no heads, and heads={wanted!r} was given")
    try:
        chosen = list(dict.fromkeys(_integers(wanted, y.shape[layout.heads])))
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
