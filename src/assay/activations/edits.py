"""Edits: frozen values that say how one site changes.

Every edit names its site first, then its value, then where it applies: `positions` (relative to each prompt; negative
counts from its end; `"last"`; by text with `At` and `Span`), `rows` of the batch, and `heads` where the site has them.
Only `Apply` holds code; all others are data.

Shapes: a value must broadcast to what is selected, `[rows, positions, (heads,) features]`, in the order in which
`rows=` and `positions=` name them. So a value may have an entry of its own for each row.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor

from assay.activations.ablations import choose_donors, contents, standard_noise
from assay.activations.checking import name_of, number, prepare, real, unit_rows
from assay.activations.current import no_run
from assay.activations.values import Donor, Run
from assay.base.errors import InvalidEdit
from assay.subjects.positions import At, Span
from assay.subjects.tokens import Batch, from_ids, is_whole_number

Positions = int | str | slice | Sequence[int] | Sequence[Sequence[int]] | At | Span | None
Indices = int | slice | Sequence[int] | None


@dataclass(frozen=True, slots=True)
class Edit:
    """What every edit says: where it applies.

    Args:
        site: A site name; a head may be its last part.
        scale: A factor on the value, where the edit has one.
        positions: None (all), "last", an int, a slice or a sequence of ints, relative to each prompt; a sequence of
            such sequences, one a row; or `At` and `Span`, looked up in each prompt's text.
        rows: None (all), an int, a slice, or a sequence of ints.
        heads: None (all), an int, or a sequence of ints.
    """

    site: str
    needs_numbers: ClassVar[bool] = False
    """Whether its value is a number or a tensor, and nothing else."""

    def __post_init__(self) -> None:
        """Refuse what fits no site, and read iterators once."""
        prepare(self)

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
        batch: The base prompts.
        rows: The base rows selected.
        columns: Their columns, the same for all of them; None stands for every column, or a site without positions.
        order: Each row's place among all rows that the edit selects, and how many those are; None for all in order.
        slots: Each column's place among all positions that the edit selects in these rows, and how many those are.
        site: The site's canonical name, with all its heads.
        head: The one head selected by an int (its dimension is gone), or None.
        heads: The heads selected by a sequence, or None.
        head_axis: Which dimension of an unselected value counts heads, if one does.
        dims: How a captured tensor's dimensions are put in the order rows, positions, heads, features.
        has_positions: Whether the site has positions.
        moments: The mean and standard deviation over the run's real tokens, `[1, 1, (heads,) features]`, where the edit
            asked for them.
        run: All the values of the run that the edit belongs to, by base row, and their first column, likewise.
        stack: The stack whose positions the site counts.
        whole: The prompts as they were given, where the batch has the positions of another site.
    """

    batch: Batch
    rows: list[int]
    columns: list[int] | None
    order: tuple[list[int], int] | None = None
    slots: tuple[list[int], int] | None = None
    site: str = ""
    head: int | None = None
    heads: list[int] | None = None
    head_axis: int | None = None
    dims: tuple[int, ...] = ()
    has_positions: bool = True
    moments: tuple[Tensor, Tensor] | None = None
    run: tuple[Tensor, int] | None = None
    stack: str = ""
    whole: Batch | None = None

    def some_heads(self, x: Tensor) -> Tensor:
        """The selected heads of a tensor that has all of them."""
        if self.head_axis is None or (self.head is None and self.heads is None):
            return x
        if self.head is not None:
            return x.select(self.head_axis, self.head)
        return x.index_select(self.head_axis, torch.tensor(self.heads, device=x.device))


def _broadcast(value: Any, x: Tensor, edit: Edit, where: Where) -> Tensor:
    """A value for each selected entry; entries of its own for each row or position are picked by their place."""
    name, tensor = name_of(edit), torch.as_tensor(value)
    real(tensor, x, edit)
    given = tuple(tensor.shape)
    fraction_of_whole = tensor.is_floating_point() and not x.is_floating_point()  # refused once it is put in place
    tensor = tensor.to(device=x.device, dtype=tensor.dtype if fraction_of_whole else x.dtype)
    axes = (("rows", where.order), ("positions", where.slots)) if where.has_positions else (("rows", where.order),)
    for axis, (what, picks) in enumerate(axes):
        at = axis - (x.ndim - tensor.ndim)
        if picks is None or at < 0 or tensor.shape[at] == 1:
            continue
        if tensor.shape[at] != picks[1]:
            raise InvalidEdit(
                f"{name}: a value shaped {given} has {tensor.shape[at]} entries for the {picks[1]} {what} selected "
                f"(the order is {', '.join(w for w, _ in axes)}, heads, features)"
            )
        tensor = tensor.index_select(at, torch.tensor(picks[0], device=x.device))
    try:
        return tensor.expand(x.shape)
    except RuntimeError:
        raise InvalidEdit(
            f"{name}: a value shaped {given} does not broadcast to what is selected, {tuple(x.shape)}"
        ) from None


@dataclass(frozen=True, slots=True)
class Add(Edit):
    """Add a vector: `x + scale * value`. Steering is this."""

    needs_numbers: ClassVar[bool] = True
    value: Tensor | float
    scale: float = field(default=1.0, kw_only=True)
    positions: Positions = field(default=None, kw_only=True)
    rows: Indices = field(default=None, kw_only=True)
    heads: Indices = field(default=None, kw_only=True)

    def transform(self, x: Tensor, where: Where) -> Tensor:
        """`x + scale * value`."""
        return x + self.scale * _broadcast(self.value, x, self, where)


@dataclass(frozen=True, slots=True)
class Set(Edit):
    """Put a value in place: `scale * value`."""

    needs_numbers: ClassVar[bool] = True
    value: Tensor | float
    scale: float = field(default=1.0, kw_only=True)
    positions: Positions = field(default=None, kw_only=True)
    rows: Indices = field(default=None, kw_only=True)
    heads: Indices = field(default=None, kw_only=True)

    def transform(self, x: Tensor, where: Where) -> Tensor:
        """`scale * value`, broadcast."""
        return torch.zeros_like(x) + self.scale * _broadcast(self.value, x, self, where)


@dataclass(frozen=True, slots=True)
class Scale(Edit):
    """Multiply: `scale * value * x`."""

    needs_numbers: ClassVar[bool] = True
    value: Tensor | float
    scale: float = field(default=1.0, kw_only=True)
    positions: Positions = field(default=None, kw_only=True)
    rows: Indices = field(default=None, kw_only=True)
    heads: Indices = field(default=None, kw_only=True)

    def transform(self, x: Tensor, where: Where) -> Tensor:
        """`scale * value * x`."""
        return x * _broadcast(self.value, x, self, where) * self.scale


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
        """Refuse a clamp without bounds, or between bounds that leave nothing."""
        prepare(self)
        if self.low is None and self.high is None:
            raise InvalidEdit(f"Clamp({self.site!r}) needs low=, high= or both")
        low, high = (b if b is None else number(self, what, b) for what, b in (("low", self.low), ("high", self.high)))
        if low is not None and high is not None and low > high:
            raise InvalidEdit(f"Clamp({self.site!r}): low={low} is above high={high}, and nothing lies between")
        for what, bound in (("low", low), ("high", high)):
            if not isinstance(getattr(self, what), int | float):
                object.__setattr__(self, what, bound)

    def transform(self, x: Tensor, where: Where) -> Tensor:
        """Clamp the values or the component."""
        if self.value is None:
            return x.clamp(self.low, self.high)
        rows = unit_rows(self.value, x, self)
        if len(rows) != 1:
            raise InvalidEdit(f"Clamp({self.site!r}) clamps along one direction, and {len(rows)} were given")
        unit = rows[0]
        component = (x.to(unit.dtype) * unit).sum(-1, keepdim=True)
        return x + (component.clamp(self.low, self.high) - component) * unit


ABLATIONS = ("zero", "mean", "resample", "noise")


@dataclass(frozen=True, slots=True)
class Ablate(Edit):
    """Replace by something uninformative.

    Args:
        value: What takes the value's place:

            - "zero";
            - "mean": the mean over all of this run's real tokens, feature by feature;
            - "noise": that mean plus Gaussian noise of the site's own standard deviation (feature by feature, over the
              same tokens), or of `sigma`;
            - "resample": what another prompt of this run has at the same positions;
            - a `Run` or a `Donor`: what one of its prompts has there, another than the row's own;
            - a tensor: a mean over a data set, say (`Subject.mean`).
        sigma: The standard deviation of the noise, when it is not to be the site's own.
        seed: The seed of the noise and of the choice of donors. Both also depend on the site and on the prompt's
            tokens, and on nothing else: not on the row, the batch or the device.

    Raises:
        InvalidEdit: If the kind is unknown, or `sigma` is given without "noise".

    Example:
        >>> Ablate("blocks.1.mlp.out", "noise", sigma=0.5, seed=3).needs_run
        True
    """

    value: Literal["zero", "mean", "resample", "noise"] | Tensor | Run | Donor = "zero"
    sigma: float | None = field(default=None, kw_only=True)
    seed: int = field(default=0, kw_only=True)
    positions: Positions = field(default=None, kw_only=True)
    rows: Indices = field(default=None, kw_only=True)
    heads: Indices = field(default=None, kw_only=True)

    def __post_init__(self) -> None:
        """Refuse an unknown kind."""
        prepare(self)
        if not is_whole_number(self.seed):
            raise InvalidEdit(f"Ablate({self.site!r}): seed={self.seed!r:.60}: a whole number is needed")
        if self.sigma is not None:
            number(self, "sigma", self.sigma)
        if not isinstance(self.value, Tensor | Run | Donor) and self.kind not in ABLATIONS:
            kinds = ", ".join(map(repr, ABLATIONS))
            raise InvalidEdit(f"Ablate({self.site!r}): {self.value!r:.60} is not {kinds}, a tensor, a Run or a Donor")
        if self.sigma is not None and (self.kind != "noise" or not 0 <= self.sigma < float("inf")):
            raise InvalidEdit(f"Ablate({self.site!r}): sigma={self.sigma} is a finite size of 'noise', 0 or more")

    @property
    def kind(self) -> str:
        """Which ablation it is: one of the words, "run" or "tensor"."""
        if isinstance(self.value, str):
            return self.value
        return "run" if isinstance(self.value, Run | Donor) else "tensor"

    @property
    def needs_run(self) -> bool:
        """Whether other tokens of the run than those it is put at have to be known."""
        return self.kind in ("mean", "noise", "resample")

    @property
    def by_prompt(self) -> bool:
        """Whether each prompt gets something of its own, so that padding is left alone."""
        return self.kind in ("noise", "resample", "run")

    def transform(self, x: Tensor, where: Where) -> Tensor:
        """What takes the place of `x`."""
        if isinstance(self.value, Tensor):
            return torch.zeros_like(x) + _broadcast(self.value, x, self, where)
        if self.kind == "zero":
            return torch.zeros_like(x)
        if self.kind in ("resample", "run"):
            return self._resampled(x, where)
        assert where.moments is not None
        mean, spread = where.moments
        if self.kind == "mean":
            return where.some_heads(mean).expand_as(x).clone()
        lead = 2 if where.has_positions else 1
        features = mean.shape[lead:]
        noise = standard_noise(
            where.batch, where.rows, where.columns, features, self.seed, where.site, whole=where.whole
        )
        if self.sigma is None and not bool((spread > 0).any()):
            raise InvalidEdit(f"Ablate({self.site!r}, 'noise'): the values of one token have no spread; give sigma=")
        noise = noise.to(mean.device) * (spread if self.sigma is None else self.sigma)
        return where.some_heads(mean + noise)

    def _resampled(self, x: Tensor, where: Where) -> Tensor:
        if self.kind == "resample":
            assert where.run is not None
            source, first, donors, made_of = *where.run, where.batch, where.whole or where.batch
        else:
            source, donors, first = *_source(self.value, self, where), 0
            assert isinstance(self.value, Run | Donor)
            made_of = self.value.batch
        keys = contents(made_of)
        chosen = choose_donors(
            where.batch, where.rows, donors, where.columns, self.seed, where.site, whole=where.whole, made_of=keys
        )
        picked = [source[at] if c is None else source[at][[column - first for column in c]] for at, c in chosen]
        return _selected(torch.stack(picked), x, self, where)


@dataclass(frozen=True, slots=True)
class ProjectOut(Edit):
    """Remove the span of the rows of `value`: `x - Q Q' x`, with `Q` an orthonormal basis of it."""

    needs_numbers: ClassVar[bool] = True
    value: Tensor
    positions: Positions = field(default=None, kw_only=True)
    rows: Indices = field(default=None, kw_only=True)
    heads: Indices = field(default=None, kw_only=True)

    def transform(self, x: Tensor, where: Where) -> Tensor:
        """Remove the span."""
        basis = unit_rows(self.value, x, self)
        wide = x.to(basis.dtype)
        return wide - (wide @ basis.T) @ basis


@dataclass(frozen=True, slots=True)
class Patch(Edit):
    """Put in what another run had at the same site.

    Args:
        value: A `Run` that captured the site, its `Donor` there, or its tensor `[rows, positions, ...]`; one row serves
            every row.
        source_positions: Where to read in the source; the same positions as are written when None.
    """

    value: Run | Donor | Tensor
    source_positions: Positions = field(default=None, kw_only=True)
    positions: Positions = field(default=None, kw_only=True)
    rows: Indices = field(default=None, kw_only=True)
    heads: Indices = field(default=None, kw_only=True)

    def transform(self, x: Tensor, where: Where) -> Tensor:
        """The source's value for these rows and columns."""
        source, batch = _source(self.value, self, where)
        size = source.shape[0]
        if size > max(1, where.batch.size):
            raise InvalidEdit(
                f"Patch({self.site!r}): the source has {size} rows, and this run {where.batch.size}; row k gets row k "
                f"of the source, and a source of one row serves them all"
            )
        picked = []
        for row in where.rows:
            at = row if size > 1 else 0
            if at >= size:
                raise InvalidEdit(f"Patch({self.site!r}): the source has {size} rows, row {row} was asked for")
            columns = self._columns(batch, at, where, row) if where.has_positions else None
            picked.append(source[at] if columns is None else source[at][columns])
        return _selected(torch.stack(picked), x, self, where)

    @property
    def padded(self) -> bool:
        """Whether the source's rows are padded, so that columns and positions are not the same thing."""
        return isinstance(self.value, Run | Donor) and self.value.batch.padded

    def _columns(self, batch: Batch, at: int, where: Where, base_row: int) -> list[int] | None:
        """The source's columns for one row: the same positions of its own prompt; None for every column."""
        if self.source_positions is not None:
            try:
                columns = batch.columns(self.source_positions, [at])
            except (IndexError, TypeError) as error:
                raise InvalidEdit(f"Patch({self.site!r}): source_positions: {error}") from None
            return None if columns is None else columns[at]
        if where.columns is None:
            return None
        relative = [column - where.batch.starts[base_row] for column in where.columns]
        outside = [position for position in relative if not 0 <= position < batch.lengths[at]]
        if outside:
            raise InvalidEdit(
                f"Patch({self.site!r}): the source has {batch.lengths[at]} positions, position {outside[0]} was "
                f"asked for"
            )
        return [batch.starts[at] + position for position in relative]


def _source(value: Any, edit: Edit, where: Where) -> tuple[Tensor, Batch]:
    """Another run's values as `[rows, positions, (heads,) features]`, and where its prompts lie in them."""
    name = f"{type(edit).__name__}({edit.site!r})"
    tensor = value.whole(edit.site) if isinstance(value, Run) else getattr(value, "tensor", value)
    if not isinstance(tensor, Tensor) or tensor.ndim < (3 if where.has_positions else 1):
        raise InvalidEdit(f"{name}: a Run, a Donor or a tensor [rows, positions, ...] is needed")
    if tensor.ndim == len(where.dims):
        tensor = tensor.permute(where.dims)
    elif where.heads is not None:
        raise InvalidEdit(f"{name}: heads are selected, and the source has no heads")
    if isinstance(value, Run | Donor):
        batch = value.batch.of(where.stack)
        return tensor, batch.sized(tensor.shape[1]) if where.has_positions else batch
    length = tensor.shape[1] if where.has_positions else 1
    return tensor, from_ids(torch.zeros(len(tensor), length).long())


def _selected(found: Tensor, x: Tensor, edit: Edit, where: Where) -> Tensor:
    """Select the heads of what a source gave, and see that it fits."""
    n_dims = len(where.dims) or x.ndim
    found = where.some_heads(found) if found.ndim == n_dims else found
    if found.shape != x.shape:
        raise InvalidEdit(
            f"{type(edit).__name__}({edit.site!r}): the source gives {tuple(found.shape)} where {tuple(x.shape)} is "
            f"selected; prompts of different length need positions= and source_positions="
        )
    return found.to(x.device)


@dataclass(frozen=True, slots=True)
class Apply(Edit):
    """Call a Python function on what is selected. It cannot be sent over the wire."""

    value: Callable[[Tensor], Tensor]
    positions: Positions = field(default=None, kw_only=True)
    rows: Indices = field(default=None, kw_only=True)
    heads: Indices = field(default=None, kw_only=True)

    def __post_init__(self) -> None:
        """Refuse what cannot be called."""
        prepare(self)
        if not callable(self.value):
            raise InvalidEdit(f"Apply({self.site!r}): a function of a tensor is needed, not {self.value!r:.60}")

    def transform(self, x: Tensor, where: Where) -> Tensor:
        """`value(x)`, which must keep the shape."""
        with no_run():
            new = self.value(x.clone())
        if not isinstance(new, Tensor) or new.shape != x.shape:
            got = tuple(new.shape) if isinstance(new, Tensor) else type(new).__name__
            raise InvalidEdit(f"Apply({self.site!r}): the function returned {got} for a tensor shaped {tuple(x.shape)}")
        return new
