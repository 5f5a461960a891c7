"""Edits: frozen values that say how one site changes.

Every edit names its site first, then its value, then where it applies: `positions` (relative to each prompt; negative
counts from its end; `"last"`), `rows` of the batch, and `heads` where the site has them. Only `Apply` holds code; all
others are data.

Shapes: a value must broadcast to what is selected, `[rows, positions, (heads,) features]`.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from torch import Tensor

from assay.activations.current import no_run
from assay.activations.values import Run
from assay.base.errors import InvalidEdit
from assay.subjects.tokens import Batch

Positions = int | str | slice | Sequence[int] | None
Indices = int | slice | Sequence[int] | None


@dataclass(frozen=True, slots=True)
class Edit:
    """What every edit says: where it applies.

    Args:
        site: A site name; a head may be its last part.
        scale: A factor on the value, where the edit has one.
        positions: None (all), "last", an int, a slice, or a sequence of ints, relative to each prompt.
        rows: None (all), an int, a slice, or a sequence of ints.
        heads: None (all), an int, or a sequence of ints.
    """

    site: str

    def transform(self, x: Tensor, where: Where) -> Tensor:
        """The new value of what was selected.

        Args:
            x: What is there, `[rows, positions, (heads,) features]`.
            where: Which rows and columns of the batch these are.
        """
        raise TypeError(f"{type(self).__name__} cannot be applied")


@dataclass(slots=True, kw_only=True)
class Where:
    """Which part of the batch an edit is looking at.

    Args:
        rows: The base rows selected.
        columns: Their columns, the same for all of them; None stands for every column.
        starts: The column of the first real token of each base row.
        mean: The mean over all real tokens of the run, `[1, 1, (heads,) features]`, where the edit asked for it.
        head: The one head selected by an int (its dimension is gone), or None.
        heads: The heads selected by a sequence, or None.
        transposed: Whether the site counts heads before positions (patterns and scores).
    """

    rows: list[int]
    columns: list[int] | None
    starts: tuple[int, ...]
    mean: Tensor | None = None
    head: int | None = None
    heads: list[int] | None = None
    transposed: bool = False


def _broadcast(value: Any, x: Tensor, edit: Edit) -> Tensor:
    try:
        tensor = torch.as_tensor(value)
    except (TypeError, ValueError, RuntimeError):
        raise InvalidEdit(
            f"{type(edit).__name__}({edit.site!r}): a number or a tensor is needed, not {value!r:.60}"
        ) from None
    try:
        return tensor.to(device=x.device, dtype=x.dtype).expand(x.shape)
    except RuntimeError:
        raise InvalidEdit(
            f"{type(edit).__name__}({edit.site!r}): a value shaped {tuple(tensor.shape)} does not broadcast to "
            f"what is selected, {tuple(x.shape)}"
        ) from None


@dataclass(frozen=True, slots=True)
class Add(Edit):
    """Add a vector: `x + scale * value`. Steering is this."""

    value: Tensor | float
    scale: float = field(default=1.0, kw_only=True)
    positions: Positions = field(default=None, kw_only=True)
    rows: Indices = field(default=None, kw_only=True)
    heads: Indices = field(default=None, kw_only=True)

    def transform(self, x: Tensor, where: Where) -> Tensor:
        """`x + scale * value`."""
        return x + self.scale * _broadcast(self.value, x, self)


@dataclass(frozen=True, slots=True)
class Set(Edit):
    """Put a value in place: `scale * value`."""

    value: Tensor | float
    scale: float = field(default=1.0, kw_only=True)
    positions: Positions = field(default=None, kw_only=True)
    rows: Indices = field(default=None, kw_only=True)
    heads: Indices = field(default=None, kw_only=True)

    def transform(self, x: Tensor, where: Where) -> Tensor:
        """`scale * value`, broadcast."""
        return torch.zeros_like(x) + self.scale * _broadcast(self.value, x, self)


@dataclass(frozen=True, slots=True)
class Scale(Edit):
    """Multiply: `scale * value * x`."""

    value: Tensor | float
    scale: float = field(default=1.0, kw_only=True)
    positions: Positions = field(default=None, kw_only=True)
    rows: Indices = field(default=None, kw_only=True)
    heads: Indices = field(default=None, kw_only=True)

    def transform(self, x: Tensor, where: Where) -> Tensor:
        """`scale * value * x`."""
        return x * _broadcast(self.value, x, self) * self.scale


@dataclass(frozen=True, slots=True)
class Clamp(Edit):
    """Keep values between `low` and `high`: elementwise, or the component along a direction when a value is given.

    With a direction `v` of any norm and `c = x . v / |v|`: `x + (clamp(c) - c) v / |v|`.
    """

    value: Tensor | None = None
    low: float | None = field(default=None, kw_only=True)
    high: float | None = field(default=None, kw_only=True)
    positions: Positions = field(default=None, kw_only=True)
    rows: Indices = field(default=None, kw_only=True)
    heads: Indices = field(default=None, kw_only=True)

    def __post_init__(self) -> None:
        """Refuse a clamp without bounds."""
        if self.low is None and self.high is None:
            raise InvalidEdit(f"Clamp({self.site!r}) needs low=, high= or both")

    def transform(self, x: Tensor, where: Where) -> Tensor:
        """Clamp the values or the component."""
        if self.value is None:
            return x.clamp(self.low, self.high)
        rows = _unit_rows(self.value, x, self)
        if len(rows) != 1:
            raise InvalidEdit(f"Clamp({self.site!r}) clamps along one direction, and {len(rows)} were given")
        unit = rows[0]
        component = (x * unit).sum(-1, keepdim=True)
        return x + (component.clamp(self.low, self.high) - component) * unit


@dataclass(frozen=True, slots=True)
class Ablate(Edit):
    """Replace by something uninformative: zero, the mean over all of this run's real tokens, or a given tensor."""

    value: Literal["zero", "mean"] | Tensor = "zero"
    positions: Positions = field(default=None, kw_only=True)
    rows: Indices = field(default=None, kw_only=True)
    heads: Indices = field(default=None, kw_only=True)

    def __post_init__(self) -> None:
        """Refuse an unknown kind."""
        if isinstance(self.value, str) and self.value not in ("zero", "mean"):
            raise InvalidEdit(f"Ablate({self.site!r}): {self.value!r} is not 'zero', 'mean' or a tensor")

    def transform(self, x: Tensor, where: Where) -> Tensor:
        """Zeros, the mean, or the tensor."""
        if isinstance(self.value, Tensor):
            return torch.zeros_like(x) + _broadcast(self.value, x, self)
        if self.value == "zero":
            return torch.zeros_like(x)
        if self.value != "mean":
            raise InvalidEdit(f"Ablate({self.site!r}): {self.value!r:.60} is not 'zero', 'mean' or a tensor")
        assert where.mean is not None
        mean = where.mean
        if where.head is not None:
            mean = mean[:, :, where.head]
        elif where.heads is not None:
            mean = mean[:, :, where.heads]
        return mean.expand_as(x).clone()

    @property
    def needs_mean(self) -> bool:
        """Whether the mean over the whole run has to be known."""
        return isinstance(self.value, str) and self.value == "mean"


@dataclass(frozen=True, slots=True)
class ProjectOut(Edit):
    """Remove the span of the rows of `value`: `x - Q Q' x`, with `Q` an orthonormal basis of it."""

    value: Tensor
    positions: Positions = field(default=None, kw_only=True)
    rows: Indices = field(default=None, kw_only=True)
    heads: Indices = field(default=None, kw_only=True)

    def transform(self, x: Tensor, where: Where) -> Tensor:
        """Remove the span."""
        basis = _unit_rows(self.value, x, self)
        return x - (x @ basis.T) @ basis


@dataclass(frozen=True, slots=True)
class Patch(Edit):
    """Put in what another run had at the same site.

    Args:
        value: A `Run` that captured the site, or its tensor `[rows, positions, ...]`; one row serves every row.
        source_positions: Where to read in the source; the same positions as are written when None.
    """

    value: Run | Tensor
    source_positions: Positions = field(default=None, kw_only=True)
    positions: Positions = field(default=None, kw_only=True)
    rows: Indices = field(default=None, kw_only=True)
    heads: Indices = field(default=None, kw_only=True)

    def transform(self, x: Tensor, where: Where) -> Tensor:
        """The source's value for these rows and columns."""
        source = self._source(where)
        size = source.shape[0]
        picked = []
        for row in where.rows:
            at = row if size > 1 else 0
            if at >= size:
                raise InvalidEdit(f"Patch({self.site!r}): the source has {size} rows, row {row} was asked for")
            columns = self._columns(source, at, where, row)
            picked.append(source[at] if columns is None else source[at][columns])
        value = torch.stack(picked)
        if value.shape != x.shape:
            raise InvalidEdit(
                f"Patch({self.site!r}): the source gives {tuple(value.shape)} where {tuple(x.shape)} is selected; "
                f"prompts of different length need positions= and source_positions="
            )
        return value.to(device=x.device, dtype=x.dtype)

    @property
    def padded(self) -> bool:
        """Whether the source's rows are padded, so that columns and positions are not the same thing."""
        return isinstance(self.value, Run) and self.value.batch.padded

    def _source(self, where: Where) -> Tensor:
        """The source as `[rows, positions, (heads,) features]`, heads selected."""
        tensor = self.value.whole(self.site) if isinstance(self.value, Run) else self.value
        if not isinstance(tensor, Tensor) or tensor.ndim < 3:
            raise InvalidEdit(f"Patch({self.site!r}): a Run or a tensor [rows, positions, ...] is needed")
        tensor = tensor.transpose(1, 2) if where.transposed and tensor.ndim == 4 else tensor
        if where.head is not None and tensor.ndim == 4:
            return tensor[:, :, where.head]
        if where.heads is not None:
            if tensor.ndim != 4:
                raise InvalidEdit(f"Patch({self.site!r}): heads are selected, and the source has no heads")
            return tensor[:, :, where.heads]
        return tensor

    def _columns(self, source: Tensor, at: int, where: Where, base_row: int) -> list[int] | None:
        """The source's columns for one row: the same positions of its own prompt; None for every column."""
        if isinstance(self.value, Run):
            batch = self.value.batch
        else:
            batch = Batch(
                ids=torch.zeros(source.shape[:2]).long(),
                starts=(0,) * len(source),
                lengths=(source.shape[1],) * len(source),
            )
        if self.source_positions is not None:
            try:
                columns = batch.columns(self.source_positions)
            except (IndexError, TypeError) as error:
                raise InvalidEdit(f"Patch({self.site!r}): source_positions: {error}") from None
            return None if columns is None else columns[at]
        if where.columns is None:
            return None
        relative = [column - where.starts[base_row] for column in where.columns]
        outside = [position for position in relative if not 0 <= position < batch.lengths[at]]
        if outside:
            raise InvalidEdit(
                f"Patch({self.site!r}): the source has {batch.lengths[at]} positions, position {outside[0]} was "
                f"asked for"
            )
        return [batch.starts[at] + position for position in relative]


@dataclass(frozen=True, slots=True)
class Apply(Edit):
    """Call a Python function on what is selected. It cannot be sent over the wire."""

    value: Callable[[Tensor], Tensor]
    positions: Positions = field(default=None, kw_only=True)
    rows: Indices = field(default=None, kw_only=True)
    heads: Indices = field(default=None, kw_only=True)

    def transform(self, x: Tensor, where: Where) -> Tensor:
        """`value(x)`, which must keep the shape."""
        with no_run():
            new = self.value(x.clone())
        if not isinstance(new, Tensor) or new.shape != x.shape:
            got = tuple(new.shape) if isinstance(new, Tensor) else type(new).__name__
            raise InvalidEdit(f"Apply({self.site!r}): the function returned {got} for a tensor shaped {tuple(x.shape)}")
        return new


def _unit_rows(value: Tensor, x: Tensor, edit: Edit) -> Tensor:
    try:
        value = torch.as_tensor(value)
        rows = value.reshape(-1, value.shape[-1]).to(device=x.device, dtype=x.dtype)
    except (TypeError, ValueError, RuntimeError, IndexError):
        raise InvalidEdit(
            f"{type(edit).__name__}({edit.site!r}): directions [k, d] are needed, not {value!r:.60}"
        ) from None
    if rows.shape[-1] != x.shape[-1]:
        raise InvalidEdit(
            f"{type(edit).__name__}({edit.site!r}): directions of width {rows.shape[-1]} at a site of width "
            f"{x.shape[-1]}"
        )
    q, r = torch.linalg.qr(rows.T.float())
    diagonal = torch.diagonal(r)
    if not bool((diagonal.abs() > 1e-6 * rows.float().norm(dim=1).clamp(min=1e-30)).all()):
        raise InvalidEdit(f"{type(edit).__name__}({edit.site!r}): the directions are zero or linearly dependent")
    signed: Tensor = q * diagonal.sign()
    return signed.T.to(x.dtype)
