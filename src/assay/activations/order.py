"""The order in which stored rows are read: a permutation computed from its key, never held.

`Permutation` is a Feistel network over the smallest power of two that holds `n`, walked until it lands inside (cycle
walking): a bijection of 0..n-1 in constant memory. `Order` makes epochs of it. Rows lie on the disk in chunks; an epoch
takes whole chunks in permuted order, `window` of them at a time, and reads the rows of a window in permuted order. So a
row may follow any other, each part of a file is read in one stretch of the epoch, and a store that is larger than
memory is read at the speed of the disk. With `chunk * window` rows or fewer it is one permutation of all rows.

Source: Luby and Rackoff 1988, "How to construct pseudorandom permutations from pseudorandom functions"; Black and
Rogaway 2002, "Ciphers with arbitrary finite domains", section 3 (cycle walking).
"""

from __future__ import annotations

from functools import lru_cache

import numpy as np
from jaxtyping import Int

from assay.base.errors import SpecError
from assay.base.rng import stream_key

CHUNK, WINDOW = 256, 1024
_ROUNDS = 6
_WORD = (1 << 64) - 1


class Permutation:
    """A bijection of 0..n-1, by key.

    Args:
        n: How many there are.
        seed: The seed.
        names: The name of the stream.

    Example:
        >>> sorted(Permutation(7, 0, "example")(np.arange(7)).tolist())
        [0, 1, 2, 3, 4, 5, 6]
    """

    def __init__(self, n: int, seed: int, *names: str | int) -> None:
        if n < 1:
            raise SpecError(f"a permutation of {n} things", "n")
        self.n = n
        bits = max(2, (n - 1).bit_length())
        self._low, self._high = np.uint64(bits // 2), np.uint64(bits - bits // 2)
        key = stream_key(seed, *names)  # 256 bits: four words, used again with the round's number mixed in
        words = [(key >> 64 * (i % 4)) + i * 0x9E3779B97F4A7C15 & _WORD for i in range(_ROUNDS)]
        self._keys = [np.uint64(word) for word in words]

    def __call__(self, x: Int[np.ndarray, " k"]) -> Int[np.ndarray, " k"]:
        """Where each goes: int64."""
        out = self._rounds(x.astype(np.uint64))
        outside = np.flatnonzero(out >= self.n)
        while len(outside):
            out[outside] = again = self._rounds(out[outside])
            outside = outside[again >= self.n]
        return out.astype(np.int64)

    def _rounds(self, x: np.ndarray) -> np.ndarray:
        """A Feistel network whose halves trade widths, so that any number of bits will do."""
        wide, narrow = self._high, self._low
        left, right = x >> narrow, x & ((np.uint64(1) << narrow) - np.uint64(1))
        for key in self._keys:
            # left has `wide` bits; what is mixed into it comes from right
            left, right = right, left ^ (_mix(right ^ key) >> (np.uint64(64) - wide))
            wide, narrow = narrow, wide
        return np.asarray((left << narrow) | right)


def _mix(x: np.ndarray) -> np.ndarray:
    """The finaliser of splitmix64."""
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return np.asarray(x ^ (x >> np.uint64(31)))


class Order:
    """Epoch after epoch of 0..n-1, each in an order of its own.

    Args:
        n: How many rows there are.
        seed: The seed of the order.
        chunk: How many rows that lie together are taken together.
        window: How many chunks are mixed with each other.

    Example:
        >>> order = Order(10, seed=0)
        >>> sorted(order.rows(20, 10).tolist())  # the third epoch
        [0, 1, 2, 3, 4, 5, 6, 7, 8, 9]
    """

    def __init__(self, n: int, seed: int, *, chunk: int = CHUNK, window: int = WINDOW) -> None:
        if n < 1 or chunk < 1 or window < 1:
            raise SpecError(f"an order of n={n} rows in chunks of {chunk}, {window} at a time: each is at least 1", "n")
        self.n, self.seed, self.chunk, self.window = n, seed, chunk, window
        self._whole, self._rest = divmod(n, chunk)  # whole chunks, and how long the last one is if it is shorter
        self._chunks = self._whole + bool(self._rest)
        self._short = chunk - self._rest if self._rest else 0  # by how much it is shorter

    def rows(self, start: int, count: int) -> Int[np.ndarray, " count"]:
        """The rows that the reader meets from place `start` on, counted over all epochs."""
        parts: list[np.ndarray] = []
        while count:
            epoch, at = divmod(start, self.n)
            take = min(count, self.n - at)
            parts.append(self._epoch(epoch, np.arange(at, at + take)))
            start, count = start + take, count - take
        return np.concatenate(parts) if parts else np.empty(0, np.int64)

    def _epoch(self, epoch: int, places: np.ndarray) -> np.ndarray:
        """The rows at some places of one epoch."""
        short_at = self._short_at(epoch)
        size = self.window * self.chunk
        end = (short_at // self.window + 1) * size - self._short  # of the window that has the short chunk
        shifted = np.where(places >= end, places + self._short, places)
        windows = shifted // size
        out = np.empty(len(places), np.int64)
        for window in np.unique(windows):
            mine = windows == window
            out[mine] = self._window(epoch, int(window), shifted[mine] - window * size, short_at)
        return out

    def _window(self, epoch: int, window: int, inside: np.ndarray, short_at: int) -> np.ndarray:
        """The rows at some places of a window."""
        first = window * self.window
        chunks = min(self.window, self._chunks - first)
        has = first <= short_at < first + chunks
        mixed = _permutation(chunks * self.chunk - self._short * has, self.seed, "rows", epoch, window)(inside)
        if has:
            after = (short_at - first + 1) * self.chunk - self._short
            mixed = np.where(mixed >= after, mixed + self._short, mixed)
        slot, offset = first + mixed // self.chunk, mixed % self.chunk
        return np.asarray(self._chunk(epoch, slot, short_at) * self.chunk + offset)

    def _chunk(self, epoch: int, slot: np.ndarray, short_at: int) -> np.ndarray:
        """Which chunk is taken when."""
        if not self._whole:
            return np.zeros_like(slot)
        turn = slot if not self._rest else np.minimum(slot - (slot > short_at), self._whole - 1)
        found = _permutation(self._whole, self.seed, "chunks", epoch)(turn)
        return np.where(slot == short_at, self._whole, found) if self._rest else found

    def _short_at(self, epoch: int) -> int:
        """When the short chunk is taken; after the end where there is none."""
        if not self._rest:
            return self._chunks
        return int(stream_key(self.seed, "activations order", "short", epoch) % self._chunks)


@lru_cache(maxsize=64)
def _permutation(n: int, seed: int, *names: str | int) -> Permutation:
    return Permutation(n, seed, "activations order", *names)
