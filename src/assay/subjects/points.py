"""How a named site is read from and written into the tensors that pass through a module.

A `Point` belongs to one module and one side of it (what goes in, or what comes out). Every point that can be edited
is a view of one tensor, so writing is: copy the tensor, write through the same view.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from torch import Tensor, nn

from assay.base.errors import InvalidEdit
from assay.subjects.norms import Norm

Dims = tuple[str, ...]
RESIDUAL: Dims = ("batch", "pos", "d_model")


@dataclass(slots=True)
class Traffic:
    """What passes through a module in one call; hooks read it and may replace its parts."""

    module: nn.Module
    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    output: Any = None
    rows: int = 1
    """How many rows the forward has, for modules that are called with positions and rows in one dimension."""

    def tensor_in(self) -> Tensor:
        """The first tensor argument, positional or by name."""
        for value in (*self.args, *self.kwargs.values()):
            if isinstance(value, Tensor):
                return value
        raise TypeError(f"{type(self.module).__name__} was called without a tensor argument")

    def replace_in(self, value: Tensor) -> None:
        """Replace the first tensor argument."""
        for index, old in enumerate(self.args):
            if isinstance(old, Tensor):
                self.args = (*self.args[:index], value, *self.args[index + 1 :])
                return
        key = next(key for key, old in self.kwargs.items() if isinstance(old, Tensor))
        self.kwargs = {**self.kwargs, key: value}

    def tensor_out(self, item: int = 0) -> Tensor:
        """The output tensor: the output itself, its `logits`, or one of its items."""
        if isinstance(self.output, Tensor):
            return self.output
        logits = getattr(self.output, "logits", None)
        value = self.output[item] if logits is None else logits
        if not isinstance(value, Tensor):
            raise TypeError(f"{type(self.module).__name__} returned no tensor at {item}, but {type(value).__name__}")
        return value

    def replace_out(self, value: Tensor, item: int = 0) -> None:
        """Replace the output tensor, keeping the rest of the output."""
        if isinstance(self.output, Tensor):
            self.output = value
        elif getattr(self.output, "logits", None) is not None:
            self.output.logits = value
        elif type(self.output) is tuple or isinstance(self.output, list):
            self.output = type(self.output)((*self.output[:item], value, *self.output[item + 1 :]))
        else:
            self.output[list(self.output.keys())[item]] = value


def identity(raw: Tensor) -> Tensor:
    """Return the tensor as it is."""
    return raw


@dataclass(frozen=True, slots=True, kw_only=True)
class Point:
    """A readable and writable view of the tensor at one side of a module.

    Args:
        module: The module to hook.
        path: Its dotted path.
        side: `in`, `out`, or what only attention sees: through transformers' `attention` interface, or through the
            torch `function` that the module calls.
        dims: The names of the dimensions of what is read.
        view: From the raw tensor to what is read; must return a view.
        head_dim: Which dimension of what is read counts heads, if one does.
        in_place: Write into the tensor itself, because the model holds the same tensor elsewhere too (`resid_mid`).
        item: Which item of the output, where the module returns several.
        factor: What the model multiplies the tensor by before it uses it; it is part of what is read.
        stack: The stack whose positions it counts.
        read_only: Why it cannot be edited, if it cannot.
        derived: Whether what is read is computed beside the model, so that a write does not show in it.
    """

    module: nn.Module
    path: str
    side: Literal["in", "out", "attention", "function"]
    dims: Dims
    view: Callable[[Tensor], Tensor] = identity
    head_dim: int | None = None
    in_place: bool = False
    item: int = 0
    factor: float = 1.0
    stack: str = ""
    read_only: str = ""
    derived: bool = False

    def raw(self, traffic: Traffic) -> Tensor:
        """The whole tensor this point is a part of."""
        return traffic.tensor_in() if self.side == "in" else traffic.tensor_out(self.item)

    def unflatten(self, raw: Tensor, rows: int) -> Tensor:
        """The raw tensor as `[rows, pos, features]`, where the module is called with `[rows * pos, features]`."""
        return raw.view(rows, -1, raw.shape[-1]) if raw.ndim == 2 and self.dims[:2] == RESIDUAL[:2] else raw

    def flatten(self, value: Tensor, raw: Tensor) -> Tensor:
        """A new value in the raw tensor's shape."""
        return value.reshape(raw.shape) if raw.ndim == 2 else value

    def read(self, traffic: Traffic) -> Tensor:
        """What the site's name promises, shaped as `dims`."""
        value = self.view(self.unflatten(self.raw(traffic), traffic.rows))
        return value if self.factor == 1.0 else value * self.factor

    def write(self, traffic: Traffic, value: Tensor) -> None:
        """Put a new value where `read` reads."""
        if self.read_only:
            raise InvalidEdit(f"{self.path!r}: {self.read_only}")
        raw = self.raw(traffic)
        value = value if self.factor == 1.0 else value / self.factor
        if self.in_place:
            self.view(self.unflatten(raw, traffic.rows)).copy_(value)
            return
        if self.view is identity:
            new = self.flatten(value, raw)
        else:
            new = raw.clone(memory_format=torch.contiguous_format)
            self.view(self.unflatten(new, traffic.rows)).copy_(value)
        self.replace(traffic, new)

    def replace(self, traffic: Traffic, raw: Tensor) -> None:
        """Put another whole tensor in the place of the raw one."""
        if self.side == "in":
            traffic.replace_in(raw)
        else:
            traffic.replace_out(raw, self.item)

    def gradient(self, raw_gradient: Tensor, rows: int = 1) -> Tensor:
        """The gradient at the site from the gradient at the raw tensor of a forward with `rows` rows."""
        gradient = self.view(self.unflatten(raw_gradient, rows))
        return gradient if self.factor == 1.0 else gradient / self.factor


@dataclass(frozen=True, slots=True, kw_only=True)
class PositionsPoint(Point):
    """Position embeddings, which come once for all rows: `[1, pos, d_model]`, or `[pos, d_model]` in some models."""

    def unflatten(self, raw: Tensor, rows: int) -> Tensor:
        """The embeddings with a dimension for rows."""
        return raw[None] if raw.ndim == 2 else raw

    def flatten(self, value: Tensor, raw: Tensor) -> Tensor:
        """The value as it is: with a row for each prompt, it is added to the embeddings all the same."""
        return value


@dataclass(frozen=True, slots=True, kw_only=True)
class ColumnsPoint(Point):
    """Some columns of a wide tensor, in any order, seen as heads: what no view can show (Falcon's fused queries).

    Args:
        columns: The columns, head by head, `[heads * d_head]`.
        n_heads: How many heads they make.
    """

    columns: Tensor = field()
    n_heads: int = field()

    def read(self, traffic: Traffic) -> Tensor:
        """The columns as `[batch, pos, head, d_head]`."""
        return self._pick(self.raw(traffic))

    def write(self, traffic: Traffic, value: Tensor) -> None:
        """Put new values into the columns."""
        new = self.raw(traffic).clone()
        new[..., self.columns.to(new.device)] = value.flatten(-2)
        self.replace(traffic, new)

    def gradient(self, raw_gradient: Tensor, rows: int = 1) -> Tensor:
        """The gradient at the columns."""
        return self._pick(raw_gradient)

    def _pick(self, raw: Tensor) -> Tensor:
        picked = raw[..., self.columns.to(raw.device)]
        return picked.view(*picked.shape[:-1], self.n_heads, -1)


@dataclass(frozen=True, slots=True, kw_only=True)
class ExpertsPoint(Point):
    """The numbers of the experts that a router chose; the first item of its output has an entry for each there is."""

    def write(self, traffic: Traffic, value: Tensor) -> None:
        """Put other experts in their place, all of which must be there.

        Raises:
            InvalidEdit: If one is not.
        """
        n = traffic.tensor_out(0).shape[-1]
        outside = value[(value < 0) | (value >= n)]
        if outside.numel():
            raise InvalidEdit(f"{self.path!r} has experts 0 to {n - 1}, and an edit chose number {int(outside[0])}")
        Point.write(self, traffic, value)


@dataclass(frozen=True, slots=True, kw_only=True)
class ScalePoint(Point):
    """The denominator of a norm, `[batch, pos, 1]`: computed from the norm's input, and read-only."""

    norm: Norm = field()

    def read(self, traffic: Traffic) -> Tensor:
        """The denominator, as the norm computes it."""
        return self.norm.scale(self.unflatten(traffic.tensor_in(), traffic.rows))

    def write(self, traffic: Traffic, value: Tensor) -> None:
        """Refuse: the module computes its scale inside."""
        raise InvalidEdit(f"the scale of the norm {self.path!r} can be captured, not edited; edit the norm's output")

    def gradient(self, raw_gradient: Tensor, rows: int = 1) -> Tensor:
        """Refuse: the scale is not a tensor of the model's own graph."""
        raise InvalidEdit(f"there is no gradient at the scale of {self.path!r}; ask for the norm's output")


@dataclass(frozen=True, slots=True, kw_only=True)
class ResultPoint(Point):
    """Each head's own output, `z_h W_O^h`, `[batch, pos, head, d_model]`; their sum and the bias is what leaves.

    Writing adds the change, summed over heads, to the projection's output.
    """

    n_heads: int = field()
    weight: Callable[[], Tensor] = field()
    derived: bool = True

    def read(self, traffic: Traffic) -> Tensor:
        """Each head's contribution to the output projection."""
        z = traffic.tensor_in()
        z = z.reshape(*z.shape[:-1], self.n_heads, -1)
        weight = self.weight().to(z).reshape(self.n_heads, z.shape[-1], -1)
        result = torch.einsum("bphd,hdm->bphm", z, weight)
        return result if self.factor == 1.0 else result * self.factor

    def write(self, traffic: Traffic, value: Tensor) -> None:
        """Add the heads' change to the output."""
        traffic.replace_out(traffic.tensor_out() + (value - self.read(traffic)).sum(2) / self.factor)

    def gradient(self, raw_gradient: Tensor, rows: int = 1) -> Tensor:
        """The output's gradient, the same for every head."""
        return raw_gradient.unsqueeze(2).expand(-1, -1, self.n_heads, -1) / self.factor
