"""Logits that are computed where a metric looks."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Protocol, runtime_checkable

import torch
from torch import Tensor

from assay.subjects.tokens import is_whole_number


@runtime_checkable
class Ends(Protocol):
    """The stream after the last block, for rows of prompts."""

    @property
    def n_rows(self) -> int:
        """The number of rows."""

    @property
    def width(self) -> int:
        """The number of positions."""

    def column(self, position: int) -> Tensor:
        """One position of each row, `[rows, d_model]`."""

    def tokens(self) -> tuple[Tensor, Tensor]:
        """Tokens `[tokens, d_model]`, and which of them is where, `[rows, pos]`; rows may share them."""


@dataclass(frozen=True, slots=True)
class Known:
    """A stream that has been computed.

    Args:
        stream: `[tokens, d_model]`.
        index: Which token is where, `[rows, pos]`.
    """

    stream: Tensor
    index: Tensor

    @property
    def n_rows(self) -> int:
        """The number of rows."""
        return self.index.shape[0]

    @property
    def width(self) -> int:
        """The number of positions."""
        return self.index.shape[1]

    def column(self, position: int) -> Tensor:
        """One position of each row, `[rows, d_model]`."""
        return self.stream.index_select(0, self.index[:, position].to(self.stream.device))

    def tokens(self) -> tuple[Tensor, Tensor]:
        """The tokens that are anywhere, and which of them is where."""
        used, index = torch.unique(self.index, return_inverse=True)
        return self.stream.index_select(0, used.to(self.stream.device)), index


class LazyLogits:
    """Stands for logits `[rows, pos, vocab]` and computes those that are indexed.

    `logits[:, -1]`, `logits[..., -1, :]` and `logits[rows, -1]` compute one position; `logits[:, -1, ids]` computes
    these entries alone; any other use computes all of them. The values are those of the full logits.

    Args:
        ends: The stream before the final norm.
        unembed: From any part of the stream, `[..., d_model]`, to its logits, or to those of some ids `[n]`.
        vocab: The size of the vocabulary.
    """

    def __init__(self, ends: Ends, unembed: Callable[[Tensor, Tensor | None], Tensor], vocab: int) -> None:
        self._ends = ends
        self._unembed = unembed
        self._streams: dict[int, Tensor] = {}
        self._columns: dict[int, Tensor] = {}
        self._whole: Tensor | None = None
        self.shape = torch.Size((ends.n_rows, ends.width, vocab))
        self.ndim = 3

    @property
    def device(self) -> torch.device:
        """Where the logits are."""
        return self._stream(self.shape[1] - 1).device

    @property
    def dtype(self) -> torch.dtype:
        """Their type."""
        return self._stream(self.shape[1] - 1).dtype

    def full(self) -> Tensor:
        """All the logits, `[rows, pos, vocab]`."""
        if self._whole is None:
            tokens, index = self._ends.tokens()
            logits = self._unembed(tokens, None)
            self._whole = logits[index.to(logits.device)]
        return self._whole

    def rows(self, start: int, stop: int) -> LazyLogits:
        """Some of the rows, sharing what has been computed."""
        return _LazyRows(self, start, stop)

    def alone(self, row: int) -> LazyLogits:
        """One row, of which nothing is shared: writing to it leaves these logits as they are."""
        return _Alone(self, row, row + 1)

    def column(self, position: int) -> Tensor:
        """One position's logits, `[rows, vocab]`."""
        at = self._at(position)
        if at not in self._columns:
            whole = self._whole
            self._columns[at] = self._unembed(self._stream(at), None) if whole is None else whole[:, at]
        return self._columns[at]

    def entries(self, position: int, ids: Tensor) -> Tensor:
        """One position's logits of some ids, `[rows, n]`."""
        at = self._at(position)
        if self._whole is not None or at in self._columns:
            return self.column(at)[:, ids.to(self.column(at).device)]
        return self._unembed(self._stream(at), ids)

    def _made(self) -> dict[int, Tensor]:
        """The columns that have been computed."""
        return self._columns

    def _stream(self, at: int) -> Tensor:
        if at not in self._streams:
            self._streams[at] = self._ends.column(at)
        return self._streams[at]

    def _at(self, position: int) -> int:
        width = self.shape[1]
        if not -width <= position < width:
            raise IndexError(f"position {position} is outside {width} positions")
        return position % width

    def size(self, dim: int | None = None) -> Any:
        """The shape, or one dimension of it."""
        return self.shape if dim is None else self.shape[dim]

    def __len__(self) -> int:
        """The number of rows."""
        return self.shape[0]

    def __getitem__(self, key: Any) -> Tensor:
        """Index as a tensor is indexed, computing one position, or some of its entries, where that is enough."""
        index = list(key) if isinstance(key, tuple) else [key]
        dots = next((i for i, k in enumerate(index) if k is Ellipsis), None)
        if dots is not None:
            index[dots : dots + 1] = [slice(None)] * (4 - len(index))
        simple = 2 <= len(index) <= 3 and is_whole_number(index[1])
        if not simple or not isinstance(index[0], int | slice | Tensor | list) or isinstance(index[0], bool):
            return self.full()[key]
        ids = _whole_numbers(index[2], self.shape[2]) if len(index) == 3 else None
        if ids is None:
            return self.column(int(index[1]))[(index[0], *index[2:])]
        some, inverse = torch.unique(ids, return_inverse=True)
        return self.entries(int(index[1]), some)[index[0], inverse if ids.ndim else int(inverse)]

    def __setitem__(self, key: Any, value: Any) -> None:
        """Assign as to a tensor, which these logits then are: what was not computed is computed first."""
        whole = self.full().clone()
        for at, column in self._made().items():  # it may have been written to in place
            whole[:, at] = column
        whole[key] = value.full() if isinstance(value, LazyLogits) else value
        self._whole = whole
        self._columns.clear()

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
        self._whole: Tensor | None = None
        self._columns: dict[int, Tensor] = {}
        self.shape = torch.Size((stop - start, *parent.shape[1:]))
        self.ndim = 3

    def full(self) -> Tensor:
        return self._parent.full()[self._start : self._stop] if self._whole is None else self._whole

    def column(self, position: int) -> Tensor:
        if self._whole is not None:
            return self._whole[:, self._at(position)]
        return self._parent.column(position)[self._start : self._stop]

    def entries(self, position: int, ids: Tensor) -> Tensor:
        if self._whole is not None:
            return self.column(position)[:, ids.to(self._whole.device)]
        return self._parent.entries(position, ids)[self._start : self._stop]

    def _made(self) -> dict[int, Tensor]:
        if self._whole is not None:
            return {}
        return {at: column[self._start : self._stop] for at, column in self._parent._made().items()}

    def _stream(self, at: int) -> Tensor:
        return self._parent._stream(at)


class _Alone(_LazyRows):
    """One row of other lazy logits, with memory of its own."""

    def full(self) -> Tensor:
        if self._whole is None:
            self._whole = super().full().clone()
        return self._whole

    def column(self, position: int) -> Tensor:
        at = self._at(position)
        if at not in self._columns:
            found = super().column(at)
            self._columns[at] = found if self._whole is not None else found.clone()
        return self._columns[at]

    def entries(self, position: int, ids: Tensor) -> Tensor:
        if self._at(position) in self._columns:
            return self.column(position)[:, ids.to(self.column(position).device)]
        return super().entries(position, ids)

    def _made(self) -> dict[int, Tensor]:
        return self._columns


def _whole_numbers(ids: Any, size: int) -> Tensor | None:
    """Integers that index a dimension, as a tensor of those counted from its start; None for any other index."""
    if isinstance(ids, slice) or ids is None or isinstance(ids, bool):
        return None
    try:
        tensor = torch.as_tensor(ids)
    except (TypeError, ValueError, RuntimeError):
        return None
    if tensor.dtype not in (torch.int64, torch.int32, torch.int16, torch.int8) or not tensor.numel():
        return None
    if int(tensor.min()) < -size or int(tensor.max()) >= size:
        raise IndexError(f"ids {int(tensor.min())} to {int(tensor.max())} are outside {size}")
    return tensor % size


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
