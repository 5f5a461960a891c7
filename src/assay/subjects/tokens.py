"""From text to token batches: padding, positions relative to each prompt, and single-token answers."""

from __future__ import annotations

import copy
import operator
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

import torch
from jaxtyping import Int
from torch import Tensor

from assay.base.errors import SpecError
from assay.subjects.positions import At, Reading, Span, read_ids, read_text, select


@dataclass(frozen=True, slots=True, kw_only=True)
class Batch:
    """Token ids with, for each row, where its prompt starts and how long it is.

    Args:
        ids: `[batch, pos]`.
        starts: The column of each row's first real token (0 unless padded on the left).
        lengths: The number of real tokens of each row.
        inputs: The module's own keyword arguments, where they are not these ids: pixels, or an encoder's ids and a
            decoder's. The ids are then those of the stack that leads to the logits, or zeros where it has none.
        args: The module's positional arguments, likewise.
        stacks: The rows and positions of the other stacks, by name.
        texts: The prompts as they were given, if they were texts.
        tokenizer: What made the ids, or can read them; needed for positions by text.
    """

    ids: Int[Tensor, "batch pos"]
    starts: tuple[int, ...]
    lengths: tuple[int, ...]
    inputs: Mapping[str, Any] | None = None
    args: tuple[Any, ...] = ()
    stacks: Mapping[str, Batch] = field(default_factory=dict)
    texts: tuple[str, ...] | None = None
    tokenizer: Any = field(default=None, repr=False, compare=False)
    _read: dict[int, Reading] = field(default_factory=dict, init=False, repr=False, compare=False)

    @property
    def size(self) -> int:
        """The number of rows."""
        return self.ids.shape[0]

    @property
    def width(self) -> int:
        """The number of columns, padding included."""
        return self.ids.shape[1]

    @property
    def padded(self) -> bool:
        """Whether any row is shorter than the batch is wide."""
        return any(length != self.width for length in self.lengths)

    @property
    def mask(self) -> Int[Tensor, "batch pos"]:
        """1 at real tokens, 0 at padding; `[batch, pos]`."""
        columns = torch.arange(self.width, device=self.ids.device)[None]
        starts = torch.tensor(self.starts, device=self.ids.device)[:, None]
        lengths = torch.tensor(self.lengths, device=self.ids.device)[:, None]
        return ((columns >= starts) & (columns < starts + lengths)).long()

    @property
    def positions(self) -> Int[Tensor, "batch pos"]:
        """Each token's place in its own prompt, from 0; `[batch, pos]`."""
        return (self.mask.cumsum(1) - 1).clamp(min=0)

    def last(self, x: Tensor) -> Tensor:
        """Each row's value at its last real token: `[batch, pos, ...] -> [batch, ...]`."""
        columns = [start + length - 1 for start, length in zip(self.starts, self.lengths, strict=True)]
        return x[torch.arange(self.size, device=x.device), torch.tensor(columns, device=x.device)]

    def of(self, stack: str) -> Batch:
        """The rows and positions of a stack: this batch, unless the stack has its own."""
        return self.stacks.get(stack, self) if self.stacks else self

    def repeat(self, times: int) -> Batch:
        """The same prompts several times over."""

        def again(value: Any) -> Any:
            fits = isinstance(value, Tensor) and value.ndim > 0 and value.shape[0] == self.size
            return value.repeat(times, *[1] * (value.ndim - 1)) if fits else value

        return replace(
            self,
            ids=self.ids.repeat(times, 1),
            starts=self.starts * times,
            lengths=self.lengths * times,
            inputs=None if self.inputs is None else {name: again(value) for name, value in self.inputs.items()},
            args=tuple(map(again, self.args)),
            stacks={name: batch.repeat(times) for name, batch in self.stacks.items()},
            texts=None if self.texts is None else self.texts * times,
        )

    def forward_inputs(self) -> dict[str, Any]:
        """Keyword arguments for a transformers model: mask and positions only where padding makes them matter.

        A cache among the inputs is copied: the model writes to what it is given.
        """
        if self.inputs is not None or self.args:
            return {name: copied(value) for name, value in (self.inputs or {}).items()}
        if not self.padded:
            return {"input_ids": self.ids}
        return {"input_ids": self.ids, "attention_mask": self.mask, "position_ids": self.positions}

    def sized(self, width: int) -> Batch:
        """The same rows at a site with positions of its own (frames, patches): as many as it has, all real.

        Args:
            width: How many positions the site has.

        Raises:
            SpecError: If the rows are padded, and the site's positions are not the prompts'.
        """
        if width == self.width:
            return self
        if self.padded:
            raise SpecError(f"the prompts are padded to {self.width} tokens, and the site has {width} positions")
        ids = torch.zeros(self.size, width, dtype=torch.long, device=self.ids.device)
        return replace(self, ids=ids, starts=(0,) * self.size, lengths=(width,) * self.size, texts=None, tokenizer=None)

    def prompt(self, row: int) -> list[int]:
        """The real tokens of a row."""
        start, length = self.starts[row], self.lengths[row]
        ids: list[int] = self.ids[row, start : start + length].tolist()
        return ids

    def read(self, row: int) -> Reading:
        """A row as its tokens spell it, for positions by text.

        Raises:
            SpecError: If there is no tokenizer to read it with.
        """
        if row not in self._read:
            if self.tokenizer is None:
                raise SpecError(
                    "positions by text need a tokenizer to read the prompts with: load the subject with tokenizer=",
                    "positions",
                )
            ids = self.prompt(row)
            own = None if self.texts is None else read_text(self.tokenizer, self.texts[row], ids)
            self._read[row] = read_ids(self.tokenizer, ids) if own is None else own
        return self._read[row]

    def columns(self, positions: Any, rows: Sequence[int] | None = None) -> list[list[int]] | None:
        """Turn prompt-relative positions into columns, one list a row; None stands for every column.

        Args:
            positions: None (all), "last", an int (negative counts from the row's end), a slice, a sequence of ints,
                a sequence of such sequences (one a row), `At` or `Span`.
            rows: The rows that are looked at; the lists of others are empty.

        Returns:
            One list of columns a row.

        Raises:
            IndexError: If a position lies outside a prompt, or a text is not in it.
            SpecError: If positions by text are asked of prompts that cannot be read.
        """
        if positions is None:
            return None
        each = _each_row(positions, self.size)
        wanted = range(self.size) if rows is None else set(rows)
        return [self._row_columns(each[row], row) if row in wanted else [] for row in range(self.size)]

    def _row_columns(self, positions: Any, row: int) -> list[int]:
        if isinstance(positions, Span) and (self.texts is None or not getattr(self.tokenizer, "is_fast", False)):
            why = "were token ids" if self.texts is None else "have a tokenizer without offsets"
            raise SpecError(f"{positions} counts characters of a text, and these prompts {why}", "positions")
        if isinstance(positions, At | Span):
            return [self.starts[row] + p for p in select(positions, partial(self.read, row), row)]
        return _row_columns(positions, self.starts[row], self.lengths[row])


def is_whole_number(value: Any) -> bool:
    """Whether a value is one integer, of Python, numpy or torch; booleans are not."""
    if isinstance(value, bool) or (isinstance(value, Tensor) and (value.ndim or value.dtype == torch.bool)):
        return False
    try:
        operator.index(value)
    except TypeError:
        return False
    return True


def whole_numbers(selector: Any) -> list[int]:
    """One integer or several as a list.

    Raises:
        TypeError: If one of them is a boolean or a fraction.
    """
    if is_whole_number(selector):
        return [operator.index(selector)]
    values = selector.reshape(-1).tolist() if isinstance(selector, Tensor) else list(selector)
    for value in values:
        if not is_whole_number(value):
            raise TypeError(f"whole numbers are needed (0 is the first), not {value!r}")
    return [operator.index(value) for value in values]


def _row_columns(positions: Any, start: int, length: int) -> list[int]:
    if isinstance(positions, str):
        if positions != "last":
            raise IndexError(f"positions={positions!r}; the only word is 'last' (a text is found by At({positions!r}))")
        positions = -1
    if isinstance(positions, slice):
        return [start + p for p in range(*positions.indices(length))]
    many = whole_numbers(positions)
    for p in many:
        if not -length <= p < length:
            raise IndexError(f"position {p} is outside a prompt of {length} tokens")
    return [start + (p % length) for p in many]


def _each_row(positions: Any, size: int) -> Sequence[Any]:
    """One selector a row: a sequence of sequences is already that."""
    nested = isinstance(positions, Sequence) and not isinstance(positions, str)
    if isinstance(positions, Tensor):
        nested, positions = positions.ndim == 2, positions.tolist() if positions.ndim == 2 else positions
    if not nested or not any(isinstance(item, Sequence | Tensor) and not is_whole_number(item) for item in positions):
        return [positions] * size
    if len(positions) != size:
        raise IndexError(f"positions for {len(positions)} rows, and there are {size}")
    return list(positions)


def from_ids(ids: Tensor, mask: Tensor | None = None) -> Batch:
    """Wrap token ids; without a mask every column is a real token.

    Args:
        ids: `[batch, pos]` or `[pos]`, integers.
        mask: `[batch, pos]`, 1 at real tokens; each row's ones must be contiguous.

    Raises:
        SpecError: If the ids are empty, not integers, or the mask has holes.
    """
    ids = ids[None] if ids.ndim == 1 else ids
    whole = not (ids.is_floating_point() or ids.is_complex() or ids.dtype == torch.bool)
    if ids.ndim != 2 or ids.numel() == 0 or not whole:
        kind = "" if whole else f" {str(ids.dtype).removeprefix('torch.')}"
        raise SpecError(f"token ids must be integers shaped [batch, pos] and not empty, not{kind} {tuple(ids.shape)}")
    ids = long_ids(ids)
    if mask is None:
        return Batch(ids=ids, starts=(0,) * len(ids), lengths=(ids.shape[1],) * len(ids))
    if mask.shape != ids.shape:
        raise SpecError(f"the mask is shaped {tuple(mask.shape)}, the ids {tuple(ids.shape)}", "mask")
    real = mask.to(ids.device).bool()
    starts = real.int().argmax(1)
    lengths = real.sum(1)
    batch = Batch(ids=ids, starts=tuple(starts.tolist()), lengths=tuple(lengths.tolist()))
    if bool((lengths == 0).any()) or not torch.equal(batch.mask.bool(), real):
        raise SpecError("each row of a mask must be one unbroken run of real tokens")
    return batch


def long_ids(ids: Tensor) -> Tensor:
    """Token ids in a type that an embedding takes: short integers as int64, all else as it is."""
    kept = ids.is_floating_point() or ids.is_complex() or ids.dtype in (torch.int64, torch.int32, torch.bool)
    return ids if kept else ids.long()


def is_cache(value: Any) -> bool:
    """Whether an argument holds keys, values or states that a forward adds to."""
    if isinstance(value, Tensor | Mapping | list | tuple | set):
        return False
    return any(hasattr(value, name) for name in ("get_seq_length", "update_conv_state", "update_ssm_state"))


def copied(value: Any) -> Any:
    """A copy of a cache, outside of any graph; all else as it is."""
    if not is_cache(value):
        return value
    return copy.deepcopy(value, {id(found): found.detach().clone() for found in _tensors(value, set())})


def _tensors(value: Any, seen: set[int]) -> Iterator[Tensor]:
    """The tensors that an object holds, at any depth."""
    if id(value) in seen:
        return
    seen.add(id(value))
    if isinstance(value, Tensor):
        yield value
        return
    parts = value.values() if isinstance(value, Mapping) else value if isinstance(value, list | tuple) else ()
    for part in (*parts, *getattr(value, "__dict__", {}).values()):
        yield from _tensors(part, seen)


def encode(tokenizer: Any, text: str, *, special: bool = True) -> list[int]:
    """Token ids of one text, with the special tokens the tokenizer adds (or without).

    Raises:
        SpecError: If the text is no valid Unicode.
    """
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise SpecError(
            f"the text {text!r:.60} has half a character (a lone surrogate) at {error.start}, which no tokenizer reads",
            "x",
        ) from None
    ids: list[int] = tokenizer(text, add_special_tokens=special)["input_ids"]
    return ids


def from_texts(tokenizer: Any, texts: Sequence[str], *, side: str = "left", special: bool = True) -> Batch:
    """Tokenise texts into one batch, padded on one side.

    Args:
        tokenizer: A transformers tokenizer.
        texts: At least one, none empty.
        side: `right` or `left`.
        special: Whether the tokenizer adds its special tokens (BOS and the like).

    Returns:
        The batch; the pad token's id is immaterial, because padding is masked.

    Raises:
        SpecError: If there is no text or one gives no tokens.
    """
    if side not in ("left", "right"):
        raise SpecError(f"padding is on the 'left' or the 'right', not {side!r}", "padding")
    if not all(isinstance(text, str) for text in texts):
        raise SpecError("prompts are texts; token ids are given as a tensor [batch, pos]", "x")
    rows = [encode(tokenizer, text, special=special) for text in texts]
    if not rows:
        raise SpecError("no prompt was given")
    for text, row in zip(texts, rows, strict=True):
        if not row:
            raise SpecError(f"the prompt {text!r} has no tokens")
    width = max(map(len, rows))
    pad = tokenizer.pad_token_id if getattr(tokenizer, "pad_token_id", None) is not None else 0
    ids = torch.full((len(rows), width), int(pad))
    starts = tuple(width - len(row) if side == "left" else 0 for row in rows)
    for i, (start, row) in enumerate(zip(starts, rows, strict=True)):
        ids[i, start : start + len(row)] = torch.tensor(row)
    lengths = tuple(map(len, rows))
    return Batch(ids=ids, starts=starts, lengths=lengths, texts=tuple(texts), tokenizer=tokenizer)


def token_strings(tokenizer: Any, ids: Sequence[int]) -> list[str]:
    """Each token as text, spaces kept."""
    return [tokenizer.decode([int(i)]) for i in ids]
