"""Logits that are computed where a metric looks."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor


class LazyLogits:
    """Stands for logits `[rows, pos, vocab]` and unembeds only the positions that are indexed.

    `logits[:, -1]`, `logits[:, -1, ids]`, `logits[..., -1, :]` and `logits[rows, -1, ids]` compute that one position,
    once; any other use computes all of them. The values are those of the full logits.

    Args:
        hidden: The stream before the final norm, `[rows, pos, d_model]`, for columns `first` to the end.
        unembed: From any part of the stream, `[..., d_model]`, to its logits.
        vocab: The size of the vocabulary.
        prefix: The logits of the columns before `hidden`, `[1 or rows, first, vocab]`; computed when called.
        first: How many such columns there are.
    """

    def __init__(
        self,
        hidden: Tensor,
        unembed: Callable[[Tensor], Tensor],
        vocab: int,
        first: int = 0,
        prefix: Callable[[], Tensor] | None = None,
    ) -> None:
        self._hidden = hidden
        self._unembed = unembed
        self._prefix = prefix
        self._first = first
        self._columns: dict[int, Tensor] = {}
        self._whole: Tensor | None = None
        self.shape = torch.Size((hidden.shape[0], first + hidden.shape[1], vocab))
        self.device = hidden.device
        self.dtype = hidden.dtype
        self.ndim = 3

    def full(self) -> Tensor:
        """All the logits, `[rows, pos, vocab]`."""
        if self._whole is None:
            self._whole = self._unembed(self._hidden)
            if self._first and self._prefix is not None:
                prefix = self._prefix()
                self._whole = torch.cat([prefix.expand(self.shape[0], *prefix.shape[1:]), self._whole], 1)
        return self._whole

    def rows(self, start: int, stop: int) -> LazyLogits:
        """Some of the rows, sharing what has been computed."""
        return _LazyRows(self, start, stop)

    def column(self, position: int) -> Tensor | None:
        """One position's logits, `[rows, vocab]`, or None if it lies before `hidden`."""
        width = self.shape[1]
        if not -width <= position < width:
            raise IndexError(f"position {position} is outside {width} positions")
        at = position % width - self._first
        if at < 0:
            return None
        if at not in self._columns:
            self._columns[at] = self._unembed(self._hidden[:, at])
        return self._columns[at]

    def size(self, dim: int | None = None) -> Any:
        """The shape, or one dimension of it."""
        return self.shape if dim is None else self.shape[dim]

    def __len__(self) -> int:
        """The number of rows."""
        return self.shape[0]

    def __getitem__(self, key: Any) -> Tensor:
        """Index as a tensor is indexed, unembedding one position where one is enough."""
        index = list(key) if isinstance(key, tuple) else [key]
        dots = next((i for i, k in enumerate(index) if k is Ellipsis), None)
        if dots is not None:
            index[dots : dots + 1] = [slice(None)] * (4 - len(index))
        if not 2 <= len(index) <= 3 or not isinstance(index[1], int) or isinstance(index[0], int | bool):
            return self.full()[key]
        column = self.column(index[1])
        if column is None or not isinstance(index[0], slice | Tensor | list):
            return self.full()[key]
        return column[(index[0], *index[2:])]

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None) -> Any:
        """Any torch function computes all the logits first."""

        def full(value: Any) -> Any:
            if isinstance(value, LazyLogits):
                return value.full()
            return type(value)(map(full, value)) if isinstance(value, list | tuple) else value

        return func(*map(full, args), **{k: full(v) for k, v in (kwargs or {}).items()})

    def __getattr__(self, name: str) -> Any:
        """Any other attribute is the full tensor's."""
        if name.startswith("_"):
            raise AttributeError(name)
        return getattr(self.full(), name)


class _LazyRows(LazyLogits):
    """Some rows of other lazy logits."""

    def __init__(self, parent: LazyLogits, start: int, stop: int) -> None:
        self._parent, self._start, self._stop = parent, start, stop
        self.shape = torch.Size((stop - start, *parent.shape[1:]))
        self.device, self.dtype, self.ndim = parent.device, parent.dtype, 3

    def full(self) -> Tensor:
        return self._parent.full()[self._start : self._stop]

    def column(self, position: int) -> Tensor | None:
        column = self._parent.column(position)
        return None if column is None else column[self._start : self._stop]


def _binary(name: str) -> Callable[[Any, Any], Any]:
    def operate(self: LazyLogits, other: Any) -> Any:
        return getattr(self.full(), name)(other.full() if isinstance(other, LazyLogits) else other)

    return operate


def _unary(name: str) -> Callable[[Any], Any]:
    def operate(self: LazyLogits) -> Any:
        return getattr(self.full(), name)()

    return operate


for _name in ("neg", "pos", "abs"):
    setattr(LazyLogits, f"__{_name}__", _unary(f"__{_name}__"))
for _name in (
    "floordiv",
    "rpow",
    "rtruediv",
    "mod",
    "add",
    "sub",
    "mul",
    "truediv",
    "radd",
    "rsub",
    "rmul",
    "matmul",
    "lt",
    "gt",
    "le",
    "ge",
    "pow",
):
    setattr(LazyLogits, f"__{_name}__", _binary(f"__{_name}__"))
