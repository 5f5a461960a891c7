"""Suffixes end to end: many cells as one sequence of tokens, and attention that keeps them apart.

A cell that changes nothing before column `s` needs only the columns from `s` on: under causal attention all before is
the base's. What a block does outside attention it does to each token alone, so the suffixes of many cells, however
long each is, are given to it as one sequence without a gap. In attention every token sees, of its own cell, the columns
up to its own, and before `s` the base's keys and values.

    base    a b c d e f          cell 1 (s = 2)    c d e f
    cell 2 (s = 4)  e f          the sequence      c d e f e f
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from torch import Tensor, nn

from assay.activations.recording import Attended
from assay.subjects.tokens import Batch

SHORT = 16
"""Suffixes of at most so many tokens share a row of attention, longer ones have a row of their own."""

KEYS = 16
"""Rows have a multiple of this many keys: kernels are up to twice as fast there, and the ones too many are closed."""


@dataclass(frozen=True, slots=True)
class Rows:
    """Suffixes of about one length, as attention gets them: in rows, with what each row may look at as its keys.

    Args:
        tokens: The token of each entry, `[rows, entry]`.
        keys: Where each key is found, `[rows, key]`: the base is counted first, then the tokens.
        columns: The column of each entry, `[rows, entry]`.
        key_columns: The column of each key, `[rows, key]`.
        prompts: The prompt of each row, `[rows]`.
        open: Which keys belong to what an entry may see, `[rows, entry, key]`.
    """

    tokens: Tensor
    keys: Tensor
    columns: Tensor
    key_columns: Tensor
    prompts: Tensor
    open: Tensor

    def mask(self, base: Tensor | None, dtype: torch.dtype) -> Tensor:
        """The additive mask of the rows, `[rows, heads or 1, entry, key]`, from the mask of the base."""
        query, key = self.columns[:, :, None], self.key_columns[:, None, :]
        if base is None:
            seen = (key <= query)[:, None]
        else:
            prompts = self.prompts if len(base) > 1 else torch.zeros_like(self.prompts)
            heads = torch.arange(base.shape[1], device=base.device)[None, :, None, None]
            seen = base[prompts[:, None, None, None], heads, query[:, None], key[:, None]]
        closed = torch.finfo(dtype).min
        if seen.dtype == torch.bool:
            seen = torch.zeros(seen.shape, dtype=dtype, device=seen.device).masked_fill_(~seen, closed)
        return seen.masked_fill_(~self.open[:, None], closed)


class Packing:
    """Where the tokens of some cells are: cell by cell, in a cell prompt by prompt, from the cell's start on.

    Args:
        batch: The base prompts.
        starts: The first column of each cell.
        device: Where attention is computed.
    """

    def __init__(self, batch: Batch, starts: Sequence[int], device: torch.device) -> None:
        size, width = batch.size, batch.width
        self.batch, self.starts, self.device = batch, tuple(starts), device
        self.first = torch.tensor(self.starts).repeat_interleave(size)
        """The start of each suffix, `[suffixes]`; a cell has one for each prompt."""
        self.prompts = torch.arange(size).repeat(len(self.starts))
        column = torch.arange(width)[None]
        own = column >= self.first[:, None]
        lengths = width - self.first
        offsets = size * width + lengths.cumsum(0) - lengths - self.first
        self.suffixes, columns = own.nonzero(as_tuple=True)
        self.columns, self.rows = columns.to(self.device), self.prompts[self.suffixes].to(self.device)
        source = torch.where(own, offsets[:, None] + column, self.prompts[:, None] * width + column)
        self.source = source.to(self.device)
        """Where each column of each suffix is found, `[suffixes, pos]`: the base is counted first, then the tokens."""
        self.taken: dict[int, Any] = {}
        """A block's arguments at these tokens, by the argument's id: blocks share most of them."""
        self._masks: dict[int, list[Tensor]] = {}

    @property
    def whole(self) -> bool:
        """Whether every cell starts at the first column."""
        return not any(self.starts)

    @cached_property
    def spans(self) -> list[slice]:
        """The tokens of each cell."""
        size, width, at, spans = self.batch.size, self.batch.width, 0, []
        for start in self.starts:
            spans.append(slice(at, at + size * (width - start)))
            at = spans[-1].stop
        return spans

    def attend(
        self,
        function: Callable[..., tuple[Tensor, Tensor | None]],
        module: nn.Module,
        given: tuple[Tensor, Tensor, Tensor],
        attended: Attended,
        more: dict[str, Any],
    ) -> Tensor:
        """Call a layer's own attention function so that each suffix sees itself and what comes before it in the base.

        Args:
            function: The function.
            module: The attention module.
            given: Queries, keys and values of the tokens, `[1, heads, tokens, d_head]`.
            attended: What the function was given in the base.
            more: Its other arguments.

        Returns:
            `[tokens, heads, d_head]`.
        """
        query, key, value = (x[0].transpose(0, 1) for x in given)
        if self.whole:
            shape = (len(self.prompts), self.batch.width)
            q, k, v = (x.reshape(*shape, *x.shape[1:]).transpose(1, 2) for x in (query, key, value))
            return function(module, q, k, v, self._whole_mask(attended.mask), **more)[0].flatten(0, 1)
        keys, values = self._pool(attended.key, key), self._pool(attended.value, value)
        classes, entries = self._classes
        mixed = [
            function(module, take(query, rows.tokens), take(keys, rows.keys), take(values, rows.keys), mask, **more)[0]
            for rows, mask in zip(classes, self._class_masks(attended.mask, query.dtype), strict=True)
        ]
        return torch.cat([x.flatten(0, 1) for x in mixed]).index_select(0, entries)

    def of_cell(
        self, index: int, given: tuple[Tensor, Tensor, Tensor], attended: Attended
    ) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
        """One cell's queries, keys, values and mask, as attention would get them in a run of its own."""
        size, start, span = self.batch.size, self.starts[index], self.spans[index]
        query, key, value = (x[0].transpose(0, 1) for x in given)
        source = self.source[index * size : (index + 1) * size]
        q = query[span].reshape(size, -1, *query.shape[1:]).transpose(1, 2)
        k, v = (take(self._pool(*pair), source) for pair in ((attended.key, key), (attended.value, value)))
        return q, k, v, suffix_mask(attended.mask, self.batch.width, slice(start, None), self.device)

    def _whole_mask(self, mask: Tensor | None) -> Tensor | None:
        if mask is None or mask.shape[0] == 1:
            return mask
        return mask.repeat(len(self.starts), 1, 1, 1)

    def _class_masks(self, mask: Tensor | None, dtype: torch.dtype) -> list[Tensor]:
        """The masks of the rows, made once for all layers that share a mask."""
        if id(mask) not in self._masks:
            self._masks[id(mask)] = [rows.mask(mask, dtype) for rows in self._classes[0]]
        return self._masks[id(mask)]

    @staticmethod
    def _pool(base: Tensor, tokens: Tensor) -> Tensor:
        """Keys or values of the base, `[batch, pos, heads, d]`, then of the tokens, `[tokens, heads, d]`."""
        return torch.cat([base.flatten(0, 1), tokens])

    @cached_property
    def _classes(self) -> tuple[list[Rows], Tensor]:
        """Rows of suffixes of about one length, and which entry of all of them each token has."""
        classes, entries, before = [], torch.zeros(len(self.columns), dtype=torch.long), 0
        for members in _share((self.batch.width - self.first).tolist(), self.prompts.tolist()):
            rows, tokens, places = self._make_rows(members)
            classes.append(rows)
            entries[tokens] = before + places
            before += rows.tokens.numel()
        return classes, entries.to(self.device)

    def _make_rows(self, members: list[list[int]]) -> tuple[Rows, Tensor, Tensor]:
        """Rows of the suffixes given, the tokens in them, and each one's entry."""
        size, width = self.batch.size, self.batch.width
        row_of, offset, past = [-1] * len(self.prompts), [0] * len(self.prompts), []
        for i, suffixes in enumerate(members):
            filled = 0
            for one in suffixes:
                row_of[one], offset[one] = i, filled
                filled += width - self.starts[one // size]
            past.append(max(self.starts[one // size] for one in suffixes))
        place = torch.tensor([row_of, offset])[:, self.suffixes]
        tokens = (place[0] >= 0).nonzero()[:, 0]
        suffix, column = self.suffixes[tokens], self.columns.cpu()[tokens]
        row, start = place[0, tokens], self.first[suffix]
        at = place[1, tokens] + column - start
        before = torch.tensor(past)[:, None]
        prompts = self.prompts[[suffixes[0] for suffixes in members]]
        n_entries, n_keys = int(at.max()) + 1, -(-(int((before[row, 0] + at).max()) + 1) // KEYS) * KEYS

        def table(n: int, places: Tensor, values: Tensor, empty: int) -> Tensor:
            return torch.full((len(members), n), empty).index_put_((row, places), values)

        key_at, base = before[row, 0] + at, torch.arange(n_keys)[None]
        keys = torch.where(
            base < before, prompts[:, None] * width + base, table(n_keys, key_at, size * width + tokens, 0)
        )
        key_columns = torch.where(base < before, base, table(n_keys, key_at, column, 0))
        own = table(n_entries, at, suffix, -1)[:, :, None] == table(n_keys, key_at, suffix, -1)[:, None, :]
        earlier = (base < before)[:, None, :] & (base < table(n_entries, at, start, 0)[:, :, None])
        found = (
            table(n_entries, at, tokens, 0),
            keys,
            table(n_entries, at, column, 0),
            key_columns,
            prompts,
            own | earlier,
        )
        return Rows(*(x.to(self.device) for x in found)), tokens, row * n_entries + at


def _share(lengths: list[int], prompts: list[int]) -> list[list[list[int]]]:
    """Put suffixes into rows, and rows of about one length into classes.

    Args:
        lengths: The length of each suffix.
        prompts: Its prompt; those of one prompt alone may share a row.

    Returns:
        For each class, the suffixes in each row.
    """
    classes: dict[int, list[list[int]]] = {}
    shared: dict[int, tuple[list[int], int]] = {}
    for suffix in sorted(range(len(lengths)), key=lambda s: -lengths[s]):
        if lengths[suffix] > SHORT:
            classes.setdefault((lengths[suffix] - 1).bit_length(), []).append([suffix])
            continue
        row, room = shared.get(prompts[suffix], ([], 0))
        if room < lengths[suffix]:
            classes.setdefault(0, []).append(row := [])
            room = 2 * SHORT
        row.append(suffix)
        shared[prompts[suffix]] = row, room - lengths[suffix]
    return list(classes.values())


def suffix_mask(mask: Tensor | None, width: int, columns: slice, device: torch.device) -> Tensor | None:
    """The queries at some columns of a mask; a mask that was not needed is made when the queries leave columns out."""
    if mask is not None:
        return mask[:, :, columns]
    at = torch.arange(width, device=device)
    return None if len(at[columns]) == width else (at[columns, None] >= at[None])[None, None]


def take(tokens: Tensor, index: Tensor) -> Tensor:
    """Heads of tokens as attention gets them: `[tokens, heads, d]` to `[rows, heads, pos, d]`, at `[rows, pos]`."""
    taken = tokens.index_select(0, index.flatten())
    return taken.view(*index.shape, *tokens.shape[1:]).transpose(1, 2)
