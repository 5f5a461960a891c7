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

    def tensor_out(self) -> Tensor:
        """The output tensor: the output itself, its `logits`, or its first item."""
        if isinstance(self.output, Tensor):
            return self.output
        logits = getattr(self.output, "logits", None)
        value = self.output[0] if logits is None else logits
        if not isinstance(value, Tensor):
            raise TypeError(f"{type(self.module).__name__} returned no tensor first, but {type(value).__name__}")
        return value

    def replace_out(self, value: Tensor) -> None:
        """Replace the output tensor, keeping the rest of the output."""
        if isinstance(self.output, Tensor):
            self.output = value
        elif getattr(self.output, "logits", None) is not None:
            self.output.logits = value
        elif isinstance(self.output, tuple) and type(self.output) is tuple:
            self.output = (value, *self.output[1:])
        elif isinstance(self.output, list):
            self.output = [value, *self.output[1:]]
        else:
            self.output[next(iter(self.output.keys()))] = value


def identity(raw: Tensor) -> Tensor:
    """Return the tensor as it is."""
    return raw


@dataclass(frozen=True, slots=True, kw_only=True)
class Point:
    """A readable and writable view of the tensor at one side of a module.

    Args:
        module: The module to hook.
        path: Its dotted path.
        side: `in`, `out`, or `attention` for what only the attention function sees.
        dims: The names of the dimensions of what is read.
        view: From the raw tensor to what is read; must return a view.
        head_dim: Which dimension of what is read counts heads, if one does.
        in_place: Write into the tensor itself, because the model holds the same tensor elsewhere too (`resid_mid`).
    """

    module: nn.Module
    path: str
    side: Literal["in", "out", "attention"]
    dims: Dims
    view: Callable[[Tensor], Tensor] = identity
    head_dim: int | None = None
    in_place: bool = False

    def raw(self, traffic: Traffic) -> Tensor:
        """The whole tensor this point is a part of."""
        return traffic.tensor_in() if self.side == "in" else traffic.tensor_out()

    def read(self, traffic: Traffic) -> Tensor:
        """What the site's name promises, shaped as `dims`."""
        return self.view(self.raw(traffic))

    def write(self, traffic: Traffic, value: Tensor) -> None:
        """Put a new value where `read` reads."""
        raw = self.raw(traffic)
        if self.in_place:
            self.view(raw).copy_(value)
            return
        if self.view is identity:
            new = value
        else:
            new = raw.clone(memory_format=torch.contiguous_format)
            self.view(new).copy_(value)
        if self.side == "in":
            traffic.replace_in(new)
        else:
            traffic.replace_out(new)

    def gradient(self, raw_gradient: Tensor) -> Tensor:
        """The gradient at the site from the gradient at the raw tensor."""
        return self.view(raw_gradient)


@dataclass(frozen=True, slots=True, kw_only=True)
class ScalePoint(Point):
    """The denominator of a norm, `[batch, pos, 1]`: computed from the norm's input, and read-only."""

    norm: Norm = field()

    def read(self, traffic: Traffic) -> Tensor:
        """The denominator, as the norm computes it."""
        return self.norm.scale(traffic.tensor_in())

    def write(self, traffic: Traffic, value: Tensor) -> None:
        """Refuse: the module computes its scale inside."""
        raise InvalidEdit(f"the scale of the norm {self.path!r} can be captured, not edited; edit the norm's output")

    def gradient(self, raw_gradient: Tensor) -> Tensor:
        """Refuse: the scale is not a tensor of the model's own graph."""
        raise InvalidEdit(f"there is no gradient at the scale of {self.path!r}; ask for the norm's output")


@dataclass(frozen=True, slots=True, kw_only=True)
class ResultPoint(Point):
    """Each head's own output, `z_h W_O^h`, `[batch, pos, head, d_model]`; their sum and the bias is what leaves.

    Writing adds the change, summed over heads, to the projection's output.
    """

    n_heads: int = field()
    weight: Callable[[], Tensor] = field()

    def read(self, traffic: Traffic) -> Tensor:
        """Each head's contribution to the output projection."""
        z = traffic.tensor_in()
        z = z.reshape(*z.shape[:-1], self.n_heads, -1)
        weight = self.weight().reshape(self.n_heads, z.shape[-1], -1)
        return torch.einsum("bphd,hdm->bphm", z, weight)

    def write(self, traffic: Traffic, value: Tensor) -> None:
        """Add the heads' change to the output."""
        traffic.replace_out(traffic.tensor_out() + (value - self.read(traffic)).sum(2))

    def gradient(self, raw_gradient: Tensor) -> Tensor:
        """The output's gradient, the same for every head."""
        return raw_gradient.unsqueeze(2).expand(-1, -1, self.n_heads, -1)
