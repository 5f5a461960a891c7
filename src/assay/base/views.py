"""Chart values: what a report, a notebook or the workbench draws, as data and nothing else.

A view holds labels and numbers, says what it shows (`title`, `caption`), where it belongs (`section`), and how to
recompute it (`python`). It knows no HTML. `View.table` is its table twin: the same numbers as columns and rows, for
readers, screen readers, spreadsheets and agents.

    View
    ├── Heatmap        a labelled grid: layer x token, layer x head
    ├── Lines          series over a common x, with interval bands
    ├── Bars           signed values with intervals, in groups
    ├── Scatter        labelled points, with the identity line when both axes mean the same
    ├── Distribution   nulls, and the estimate among them
    ├── Tokens         a text with one value a token
    ├── Prompt         the prompt, its contrast, the answer and the foil: a report draws it in its header
    ├── Table          columns and rows
    └── Text           paragraphs

Numbers that are not finite mean "not measured" and are stored as None, so that every view is valid JSON.
"""

from __future__ import annotations

import dataclasses
import math
from abc import ABC, abstractmethod
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar

from assay.base.errors import FindingError, nearest
from assay.base.labels import SLUG, slug

Cell = str | int | float | bool | None
"""One value of a table."""

TableData = tuple[tuple[str, ...], tuple[tuple[Cell, ...], ...]]
"""A table twin: column names, then rows."""


def _number(value: Any) -> float | None:
    if value is None:
        return None
    number = float(value)
    return number if math.isfinite(number) else None


def _numbers(values: Iterable[Any]) -> tuple[float | None, ...]:
    return tuple(_number(value) for value in values)


def _texts(values: Iterable[Any]) -> tuple[str, ...]:
    if isinstance(values, str):
        raise FindingError(f"labels must be a sequence of texts, not the one text {values!r}")
    return tuple(str(value) for value in values)


def _cell(value: Any) -> Cell:
    if value is None or isinstance(value, str | bool | int):
        return value
    if hasattr(value, "item"):  # numpy and torch scalars
        value = value.item()
    return _number(value) if isinstance(value, float) else value if isinstance(value, int | bool) else str(value)


@dataclass(frozen=True, slots=True, kw_only=True)
class View(ABC):
    """What every view has; build one of its final classes.

    Args:
        id: Unique in its report; lower-case letters, digits, and single `-`, `_` or `.` between them.
        section: The heading of the report under which the view stands; sections keep the order of first appearance.
        title: What the view shows, in a few words.
        caption: What to see in it and how it was made, in a sentence or two.
        python: A snippet that recomputes or plots the view.

    Raises:
        FindingError: The id is not a slug, or the data do not fit together.
    """

    kind: ClassVar[str] = ""

    id: str
    section: str
    title: str
    caption: str = ""
    python: str = ""

    def __post_init__(self) -> None:
        if not SLUG.fullmatch(self.id):
            raise FindingError(f"view id {self.id!r} is not a slug; {slug(self.id)!r} would be")
        self._normalise()

    @abstractmethod
    def table(self) -> TableData:
        """Return the table twin: column names, and rows of the same length."""

    def to_dict(self) -> dict[str, Any]:
        """Return the view as JSON-able data, with its `kind`; `view_from_dict` reads it back."""
        data = {"kind": self.kind}
        for item in dataclasses.fields(self):
            data[item.name] = _plain(getattr(self, item.name))
        return data

    @abstractmethod
    def _normalise(self) -> None:
        """Make every field plain and immutable, and check that they fit together."""

    def _set(self, **values: Any) -> None:
        for name, value in values.items():
            object.__setattr__(self, name, value)

    def _same_length(self, expected: int, what: str, **columns: Sequence[Any] | None) -> None:
        for name, column in columns.items():
            if column is not None and len(column) != expected:
                raise FindingError(f"view {self.id!r}: {name} has {len(column)} entries for {expected} {what}")


def _plain(value: Any) -> Any:
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return {item.name: _plain(getattr(value, item.name)) for item in dataclasses.fields(value)}
    if isinstance(value, Mapping):
        return {str(key): _plain(item) for key, item in value.items()}
    if isinstance(value, tuple | list):
        return [_plain(item) for item in value]
    return value


@dataclass(frozen=True, slots=True, kw_only=True)
class Heatmap(View):
    """A grid of values with a label for each row and column.

    Args:
        rows: Row labels, drawn from top to bottom.
        columns: Column labels, from left to right.
        values: One sequence of numbers a row, `[row][column]`; None or NaN where nothing was measured.
        row_title: What the rows are.
        column_title: What the columns are.
        unit: The unit of the values.
        diverging: Whether zero is the middle of the colours (signed effects) or the values are amounts.
        column_tokens: Whether the column labels are tokens, to be shown with visible spaces.
        row_tokens: The same for the rows.

    Example:
        >>> view = Heatmap(id="z", section="s", title="Heads", rows=["0", "1"], columns=["0"], values=[[1], [2]])
        >>> view.table()
        (('row', '0'), (('0', 1.0), ('1', 2.0)))
    """

    kind: ClassVar[str] = "heatmap"

    rows: Sequence[str]
    columns: Sequence[str]
    values: Sequence[Sequence[float | None]]
    row_title: str = ""
    column_title: str = ""
    unit: str = ""
    diverging: bool = True
    column_tokens: bool = False
    row_tokens: bool = False

    def _normalise(self) -> None:
        self._set(rows=_texts(self.rows), columns=_texts(self.columns))
        self._set(values=tuple(_numbers(row) for row in self.values))
        self._same_length(len(self.rows), "rows", values=self.values)
        for label, row in zip(self.rows, self.values, strict=True):
            self._same_length(len(self.columns), "columns", **{f"row {label!r}": row})

    def table(self) -> TableData:
        """Return one row a row of the grid; columns that may repeat, as tokens do, get their position in front."""
        numbered = self.column_tokens or len(set(self.columns)) < len(self.columns)
        names = tuple(f"{i} {label}" if numbered else label for i, label in enumerate(self.columns))
        rows = tuple((label, *row) for label, row in zip(self.rows, self.values, strict=True))
        return (self.row_title or "row", *names), rows


@dataclass(frozen=True, slots=True, kw_only=True)
class Series:
    """One line of a `Lines` view: a value for each x, and the ends of its interval where it has one."""

    name: str
    values: Sequence[float | None]
    low: Sequence[float | None] | None = None
    high: Sequence[float | None] | None = None

    def __post_init__(self) -> None:
        object.__setattr__(self, "values", _numbers(self.values))
        for name in ("low", "high"):
            ends = getattr(self, name)
            object.__setattr__(self, name, None if ends is None else _numbers(ends))
        if (self.low is None) != (self.high is None):
            raise FindingError(f"series {self.name!r} has one end of its interval and not the other")


@dataclass(frozen=True, slots=True, kw_only=True)
class Lines(View):
    """Series over a common x.

    Args:
        x: The positions: numbers, or labels for ordered categories (layers, say).
        series: One or more `Series`, each with a value for each x.
        x_title: What x is.
        y_title: What the values are, with the unit.
        log_x: Whether x is drawn on a logarithmic axis; every x must then be positive.
        zero: Whether the y axis must include zero.

    Example:
        >>> view = Lines(id="c", section="Lens", title="t", x=[0, 1], series=[Series(name="clean", values=[0.5, 2])])
        >>> view.table()
        (('x', 'clean'), ((0.0, 0.5), (1.0, 2.0)))
    """

    kind: ClassVar[str] = "lines"

    x: Sequence[float] | Sequence[str]
    series: Sequence[Series]
    x_title: str = ""
    y_title: str = ""
    log_x: bool = False
    zero: bool = True

    def _normalise(self) -> None:
        labels = any(isinstance(value, str) for value in self.x)
        x = _texts(self.x) if labels else _numbers(self.x)
        if not labels and any(value is None for value in x):
            raise FindingError(f"view {self.id!r}: every x must be finite, got {list(self.x)!r}")
        self._set(x=x, series=tuple(self.series))
        if self.log_x and (labels or any(value <= 0 for value in self.x)):  # type: ignore[operator]
            raise FindingError(f"view {self.id!r}: a logarithmic x needs positive numbers, got {list(self.x)!r}")
        for line in self.series:
            columns = {"values": line.values, "low": line.low, "high": line.high}
            self._same_length(len(self.x), "x", **{f"{line.name!r} {name}": c for name, c in columns.items()})

    def table(self) -> TableData:
        """Return one row an x, with three columns for a series that has an interval."""
        columns: list[tuple[str, Sequence[Cell]]] = [(self.x_title or "x", self.x)]
        for line in self.series:
            columns.append((line.name, line.values))
            if line.low is not None and line.high is not None:
                columns += [(f"{line.name} low", line.low), (f"{line.name} high", line.high)]
        names, data = zip(*columns, strict=True)
        return names, tuple(zip(*data, strict=True))


@dataclass(frozen=True, slots=True, kw_only=True)
class Bars(View):
    """Signed values, one bar each, with an interval and a group where they have one.

    Args:
        labels: What each bar is.
        values: Its value; None where nothing was measured.
        low: The lower ends of the intervals.
        high: The upper ends of the intervals.
        unit: The unit of the values.
        groups: The group of each bar; neighbours of one group stand under one heading.
        label_tokens: Whether the labels are tokens, to be shown with visible spaces.

    Example:
        >>> Bars(id="b", section="s", title="t", labels=["L9H6"], values=[1.5]).table()
        (('label', 'value'), (('L9H6', 1.5),))
    """

    kind: ClassVar[str] = "bars"

    labels: Sequence[str]
    values: Sequence[float | None]
    low: Sequence[float | None] | None = None
    high: Sequence[float | None] | None = None
    unit: str = ""
    groups: Sequence[str] | None = None
    label_tokens: bool = False

    def _normalise(self) -> None:
        self._set(labels=_texts(self.labels), values=_numbers(self.values))
        self._set(low=None if self.low is None else _numbers(self.low))
        self._set(high=None if self.high is None else _numbers(self.high))
        self._set(groups=None if self.groups is None else _texts(self.groups))
        if (self.low is None) != (self.high is None):
            raise FindingError(f"view {self.id!r} has one end of its intervals and not the other")
        columns = {"values": self.values, "low": self.low, "high": self.high, "groups": self.groups}
        self._same_length(len(self.labels), "labels", **columns)

    def table(self) -> TableData:
        """Return one row a bar: group, label, value, low and high, as far as they are given."""
        columns: list[tuple[str, Sequence[Cell]]] = [] if self.groups is None else [("group", self.groups)]
        columns += [("label", self.labels), (f"value ({self.unit})" if self.unit else "value", self.values)]
        if self.low is not None and self.high is not None:
            columns += [("low", self.low), ("high", self.high)]
        names, data = zip(*columns, strict=True)
        return names, tuple(zip(*data, strict=True))


@dataclass(frozen=True, slots=True, kw_only=True)
class Scatter(View):
    """Labelled points.

    Args:
        x: Horizontal positions.
        y: Vertical positions.
        labels: The name of each point.
        x_title: What x is, with the unit.
        y_title: What y is, with the unit.
        identity_line: Whether both axes measure the same thing, so that the line y = x is drawn and the points
            farthest from it are named.
    """

    kind: ClassVar[str] = "scatter"

    x: Sequence[float | None]
    y: Sequence[float | None]
    labels: Sequence[str]
    x_title: str = ""
    y_title: str = ""
    identity_line: bool = False

    def _normalise(self) -> None:
        self._set(x=_numbers(self.x), y=_numbers(self.y), labels=_texts(self.labels))
        self._same_length(len(self.labels), "labels", x=self.x, y=self.y)

    def table(self) -> TableData:
        """Return one row a point."""
        return ("label", self.x_title or "x", self.y_title or "y"), tuple(zip(self.labels, self.x, self.y, strict=True))


@dataclass(frozen=True, slots=True, kw_only=True)
class Distribution(View):
    """One or more null distributions, and the place of the estimate among them.

    Args:
        null: The values of each null, by the name of the control.
        estimate: The value that was claimed; None when it could not be measured.
        unit: The unit of all of them.
    """

    kind: ClassVar[str] = "distribution"

    null: Mapping[str, Sequence[float]] = field(hash=False)
    estimate: float | None
    unit: str = ""

    def _normalise(self) -> None:
        null = {str(name): tuple(v for v in _numbers(values) if v is not None) for name, values in self.null.items()}
        self._set(null=null, estimate=_number(self.estimate))

    def table(self) -> TableData:
        """Return the estimate, then one row a draw with a column for each null."""
        longest = max((len(values) for values in self.null.values()), default=0)
        rows: list[tuple[Cell, ...]] = [("estimate", *(self.estimate for _ in self.null))]
        for i in range(longest):
            rows.append((i, *(values[i] if i < len(values) else None for values in self.null.values())))
        return ("draw", *self.null), tuple(rows)


@dataclass(frozen=True, slots=True, kw_only=True)
class Tokens(View):
    """A text with one value a token, drawn as shaded words.

    Args:
        tokens: The tokens in order, white space included.
        values: One value each; None where nothing was measured.
        unit: The unit of the values.
        diverging: Whether zero is the middle of the colours.
    """

    kind: ClassVar[str] = "tokens"

    tokens: Sequence[str]
    values: Sequence[float | None]
    unit: str = ""
    diverging: bool = True

    def _normalise(self) -> None:
        self._set(tokens=_texts(self.tokens), values=_numbers(self.values))
        self._same_length(len(self.tokens), "tokens", values=self.values)

    def table(self) -> TableData:
        """Return one row a token."""
        names = ("position", "token", f"value ({self.unit})" if self.unit else "value")
        rows = zip(range(len(self.tokens)), self.tokens, self.values, strict=True)
        return names, tuple(rows)


@dataclass(frozen=True, slots=True, kw_only=True)
class Prompt(View):
    """The question: the prompt as tokens, the contrast it is held against, the answer and the foil.

    A report draws the first one in its header.

    Args:
        tokens: The clean prompt's tokens.
        contrast: The corrupt prompt's tokens, when there is one; same length.
        answer: The token whose preference is explained.
        foil: The token it is preferred to.
    """

    kind: ClassVar[str] = "prompt"

    tokens: Sequence[str]
    contrast: Sequence[str] | None = None
    answer: str = ""
    foil: str = ""

    def _normalise(self) -> None:
        contrast = None if self.contrast is None else _texts(self.contrast)
        self._set(tokens=_texts(self.tokens), contrast=contrast)
        self._same_length(len(self.tokens), "tokens", contrast=self.contrast)

    def table(self) -> TableData:
        """Return one row a position."""
        if self.contrast is None:
            return ("position", "token"), tuple(enumerate(self.tokens))
        return ("position", "clean", "corrupt"), tuple(
            (i, clean, corrupt) for i, (clean, corrupt) in enumerate(zip(self.tokens, self.contrast, strict=True))
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class Table(View):
    """Columns and rows, shown as a table.

    Args:
        columns: Column names.
        rows: One sequence of cells a row.
    """

    kind: ClassVar[str] = "table"

    columns: Sequence[str]
    rows: Sequence[Sequence[Cell]]

    def _normalise(self) -> None:
        self._set(columns=_texts(self.columns), rows=tuple(tuple(_cell(value) for value in row) for row in self.rows))
        for i, row in enumerate(self.rows):
            self._same_length(len(self.columns), "columns", **{f"row {i}": row})

    def table(self) -> TableData:
        """Return the table itself."""
        return tuple(self.columns), tuple(tuple(row) for row in self.rows)


@dataclass(frozen=True, slots=True, kw_only=True)
class Text(View):
    """Paragraphs of plain text.

    Args:
        paragraphs: One text each.
    """

    kind: ClassVar[str] = "text"

    paragraphs: Sequence[str]

    def _normalise(self) -> None:
        self._set(paragraphs=_texts(self.paragraphs))

    def table(self) -> TableData:
        """Return one row a paragraph."""
        return ("paragraph",), tuple((text,) for text in self.paragraphs)


KINDS: dict[str, type[View]] = {
    cls.kind: cls for cls in (Heatmap, Lines, Bars, Scatter, Distribution, Tokens, Prompt, Table, Text)
}
"""Every final class of view, by the `kind` it is saved under."""


def view_from_dict(data: Mapping[str, Any]) -> View:
    """Return the view that `View.to_dict` wrote.

    Raises:
        FindingError: The kind is unknown, or a field is missing, unknown or malformed.

    Example:
        >>> view = Text(id="a", section="s", title="t", paragraphs=["one"])
        >>> view_from_dict(view.to_dict()) == view
        True
    """
    fields = dict(data)
    kind = fields.pop("kind", None)
    if kind not in KINDS:
        raise FindingError(f"no view of kind {kind!r}; there are {sorted(KINDS)}{nearest(str(kind), KINDS)}")
    try:
        if kind == "lines":
            fields["series"] = tuple(Series(**item) for item in fields["series"])
        return KINDS[kind](**fields)
    except (TypeError, KeyError, ValueError) as error:
        raise FindingError(f"a {kind} view cannot be read: {error}") from error
