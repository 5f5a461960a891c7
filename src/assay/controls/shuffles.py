"""Shuffles of latent codes: each destroys one kind of structure in a matrix `[tokens, latents]` and keeps the rest.

| name (what it destroys) | function | keeps exactly |
|---|---|---|
| co-occurrence | `curveball` | each latent's rate and values, each token's L0 |
| co-occurrence and token counts | `permute_latents` | each latent's rate and values |
| co-occurrence and latent rates | `permute_tokens` | each token's L0 and values |
| alignment | `circular_shift` | each latent's values in their order, so its autocorrelation |
| alignment and long-range order | `shuffle_blocks` | each latent's values, in their order inside blocks |

A claim about which latents fire together must die under "co-occurrence", the one shuffle that keeps both margins: the
others also change how many latents a token has, or how often a latent fires, and a claim may die of that alone.
Codes are numpy arrays or scipy sparse matrices, nonnegative; what comes back is of the same kind.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Hashable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, TypeVar, get_args

import numpy as np
from jaxtyping import Int, Shaped

from assay.base.errors import NumericalError, SpecError, nearest
from assay.base.findings import Control
from assay.base.rng import numpy_stream
from assay.base.stats import Side
from assay.controls.verdicts import compare

Codes = TypeVar("Codes")

Destroys = Literal[
    "co-occurrence",
    "co-occurrence and token counts",
    "co-occurrence and latent rates",
    "alignment",
    "alignment and long-range order",
]
"""The shuffles, by what they destroy."""

TRADES = 10
"""Curveball trades for each token; margins are kept whatever the number, and co-occurrence is gone by then."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Shuffle:
    """One way to shuffle codes.

    Args:
        destroys: What it destroys: its name.
        keeps: What it keeps.
        draw: Maps codes and a seed to shuffled codes.
    """

    destroys: Destroys
    keeps: str
    draw: Callable[[Any, int], Any]


def curveball(codes: Codes, seed: int, trades: int = TRADES) -> Codes:
    """Return codes with the same two margins and no other structure: tokens trade latents pairwise.

    In a trade two tokens put the latents that only one of them has into a pool, and each draws as many from it as it
    put in: every token keeps its L0 and every latent its rate. Trades are made in rounds, each a random pairing of all
    tokens, until each token traded about `2 trades` times. Then every latent's values are permuted among the tokens
    that have it.

    Args:
        codes: `[tokens, latents]`, nonnegative; the support is what is above zero.
        seed: Seed of the stream.
        trades: Trades for each token; `trades * tokens` in all.

    Raises:
        SpecError: The codes are no matrix, or are negative somewhere, or `trades` is not positive.
        NumericalError: A code is not finite.

    Source: Strona et al. 2014, "A fast and unbiased procedure to randomize ecological binary matrices with fixed row
    and column totals"; rounds of disjoint trades: Carstens et al. 2018, "Parallel and I/O-efficient randomisation of
    massive networks using global curveball trades".

    Example:
        >>> codes = np.array([[1.0, 2.0, 0.0], [0.0, 0.0, 3.0], [4.0, 0.0, 0.0]])
        >>> mixed = curveball(codes, seed=0)
        >>> (mixed > 0).sum(axis=0).tolist(), (mixed > 0).sum(axis=1).tolist()
        ([2, 1, 1], [2, 1, 1])
    """
    if trades < 1:
        raise SpecError(f"trades is {trades}; each token trades at least once", "trades")
    entries = _Entries.of(codes)
    rng = numpy_stream(seed, "shuffles", "curveball")
    rows, columns = entries.rows, entries.columns
    for _ in range(2 * trades):  # a round is half a trade for each token
        rows, columns = _round(rows, columns, entries.shape, rng)
    before = np.lexsort((rng.random(len(columns)), entries.columns))
    after = np.lexsort((rows, columns))
    return _back(entries, rows[after], columns[after], entries.values[before], codes)


def permute_latents(codes: Codes, seed: int) -> Codes:
    """Return codes in which each latent's column is permuted on its own: rates and values stay, tokens' L0 does not.

    Raises:
        SpecError: The codes are no matrix, or are negative somewhere.
        NumericalError: A code is not finite.

    Example:
        >>> mixed = permute_latents(np.array([[1.0, 2.0], [0.0, 3.0], [0.0, 0.0]]), seed=1)
        >>> sorted(mixed[:, 0].tolist()), sorted(mixed[:, 1].tolist())
        ([0.0, 0.0, 1.0], [0.0, 2.0, 3.0])
    """
    entries = _Entries.of(codes)
    rng = numpy_stream(seed, "shuffles", "latents")
    rows = _places(entries.columns, entries.shape[0], rng)
    return _back(entries, rows, entries.columns, entries.values, codes)


def permute_tokens(codes: Codes, seed: int) -> Codes:
    """Return codes in which each token's row is permuted on its own: L0 and values stay, latents' rates do not.

    Raises:
        SpecError: The codes are no matrix, or are negative somewhere.
        NumericalError: A code is not finite.
    """
    entries = _Entries.of(codes)
    rng = numpy_stream(seed, "shuffles", "tokens")
    columns = _places(entries.rows, entries.shape[1], rng)
    return _back(entries, entries.rows, columns, entries.values, codes)


def circular_shift(codes: Codes, seed: int, documents: Sequence[Hashable] | None = None) -> Codes:
    """Return codes in which each latent's column is rotated by a random amount of its own.

    Args:
        codes: `[tokens, latents]`, the tokens in their order.
        seed: Seed of the stream.
        documents: The document of each token, each in one stretch; then every stretch is rotated by itself, which also
            keeps each latent's rate in each document.

    Raises:
        SpecError: The codes are no matrix or are negative somewhere, or a document is in two stretches.
        NumericalError: A code is not finite.

    Example:
        >>> circular_shift(np.array([[1.0], [2.0], [3.0]]), seed=0).ravel().tolist()
        [2.0, 3.0, 1.0]
    """
    entries = _Entries.of(codes)
    n, latents = entries.shape
    rng = numpy_stream(seed, "shuffles", "circular")
    starts, stretch = _stretches(documents, n)
    lengths = np.diff(np.append(starts, n))
    where = stretch[entries.rows]
    pairs, inverse = np.unique(where * np.int64(latents) + entries.columns, return_inverse=True)
    shift = rng.integers(lengths[pairs // latents]) if pairs.size else pairs
    start, length = starts[where], lengths[where]
    rows = start + (entries.rows - start + shift[inverse]) % length
    return _back(entries, rows, entries.columns, entries.values, codes)


def shuffle_blocks(codes: Codes, seed: int, block: int = 32) -> Codes:
    """Return codes in which each latent's column is cut into blocks of tokens, which trade places.

    Tokens after the last whole block stay where they are.

    Args:
        codes: `[tokens, latents]`, the tokens in their order.
        seed: Seed of the stream.
        block: Tokens in a block: as long as the order that is to be kept.

    Raises:
        SpecError: The codes are no matrix or are negative somewhere, or there are fewer than two blocks.
        NumericalError: A code is not finite.
    """
    entries = _Entries.of(codes)
    n, latents = entries.shape
    whole = n // block if block > 0 else 0
    if whole < 2:
        raise SpecError(f"blocks of {block} tokens, and there are {n}; at least two blocks can trade places", "block")
    rng = numpy_stream(seed, "shuffles", "blocks")
    rows = entries.rows.copy()
    order = np.argsort(entries.columns, kind="stable")
    ends = np.searchsorted(entries.columns[order], np.arange(latents + 1))
    for first, last in itertools.pairwise(ends):
        mine = order[first:last]
        mine = mine[rows[mine] < whole * block]
        rows[mine] = rng.permutation(whole)[rows[mine] // block] * block + rows[mine] % block
    return _back(entries, rows, entries.columns, entries.values, codes)


SHUFFLES: Mapping[Destroys, Shuffle] = {
    shuffle.destroys: shuffle
    for shuffle in (
        Shuffle(destroys="co-occurrence", keeps="each latent's rate and values and each token's L0", draw=curveball),
        Shuffle(destroys="co-occurrence and token counts", keeps="each latent's rate and values", draw=permute_latents),
        Shuffle(destroys="co-occurrence and latent rates", keeps="each token's L0 and values", draw=permute_tokens),
        Shuffle(destroys="alignment", keeps="each latent's values and their autocorrelation", draw=circular_shift),
        Shuffle(
            destroys="alignment and long-range order",
            keeps="each latent's values and their order over 32 tokens",
            draw=shuffle_blocks,
        ),
    )
}
"""Every shuffle, by what it destroys."""


def shuffle_control(
    statistic: Callable[[Any], float],
    codes: Any,
    destroys: Destroys,
    n: int = 99,
    seed: int = 0,
    side: Side = "greater",
) -> Control:
    """Hold a statistic of codes against the same statistic of shuffled codes.

    Args:
        statistic: The whole pipeline, from codes to a number.
        codes: `[tokens, latents]`.
        destroys: Which shuffle.
        n: Number of draws.
        seed: Seed of the streams.
        side: The direction of the claim.

    Raises:
        SpecError: There is no such shuffle, or `n` is not positive.

    Example:
        >>> codes = np.repeat(np.eye(4), 5, axis=0)[:, [0, 0, 1, 1]]  # latents in pairs
        >>> together = lambda codes: float(((codes[:, 0] > 0) & (codes[:, 1] > 0)).sum())
        >>> shuffle_control(together, codes, "co-occurrence", n=19).p
        0.05
    """
    if destroys not in get_args(Destroys):
        valid = ", ".join(map(repr, get_args(Destroys)))
        raise SpecError(f"no shuffle destroys {destroys!r}{nearest(destroys, get_args(Destroys))}; valid: {valid}")
    if n < 1:
        raise SpecError(f"n is {n}; a control needs at least one draw", "n")
    shuffle = SHUFFLES[destroys]
    rng = numpy_stream(seed, "shuffles", "control", destroys)
    null = [float(statistic(shuffle.draw(codes, int(rng.integers(1 << 62))))) for _ in range(n)]
    return compare(f"shuffled {destroys}", f"keeps {shuffle.keeps}", float(statistic(codes)), null, side)


@dataclass(frozen=True, slots=True, kw_only=True)
class _Entries:
    """The nonzero codes, as (token, latent, value)."""

    rows: Int[np.ndarray, " entries"]
    columns: Int[np.ndarray, " entries"]
    values: Shaped[np.ndarray, " entries"]
    shape: tuple[int, int]

    @classmethod
    def of(cls, codes: Any) -> _Entries:
        from scipy.sparse import coo_array, issparse

        if issparse(codes):
            found = coo_array(codes)
            found.sum_duplicates()
            rows, columns, values, shape = found.row, found.col, found.data, found.shape
        else:
            dense = np.asarray(codes)
            shape = dense.shape
            rows, columns = np.nonzero(dense) if dense.ndim == 2 else (np.zeros(0, int),) * 2
            values = dense[rows, columns] if dense.ndim == 2 else dense
        if len(shape) != 2 or not all(shape):
            raise SpecError(f"codes has the shape {tuple(shape)}; it must be [tokens, latents]", "codes")
        if not np.isfinite(values).all():
            raise NumericalError(f"{int(np.sum(~np.isfinite(values)))} codes are NaN or infinite")
        if np.any(values < 0):
            raise SpecError(f"codes are nonnegative, and {int(np.sum(values < 0))} are below zero", "codes")
        real = values != 0  # a sparse matrix may store zeros
        rows, columns = rows[real].astype(np.int64), columns[real].astype(np.int64)
        order = np.lexsort((columns, rows))
        return cls(
            rows=rows[order], columns=columns[order], values=values[real][order], shape=(int(shape[0]), int(shape[1]))
        )


def _round(
    rows: np.ndarray, columns: np.ndarray, shape: tuple[int, int], rng: np.random.Generator
) -> tuple[np.ndarray, np.ndarray]:
    """One trade between the tokens of each pair of a random pairing; with an odd number, one token waits."""
    tokens, latents = shape
    order = rng.permutation(tokens)
    place = np.empty(tokens, dtype=np.int64)
    place[order] = np.arange(tokens)
    place = place[rows]  # pair place // 2, side place % 2
    key = (place // 2) * latents + columns
    sort = np.argsort(key)
    key, place, columns = key[sort], place[sort], columns[sort]
    twin = np.zeros(len(key), dtype=bool)
    twin[1:] = key[1:] == key[:-1]
    twin[:-1] |= twin[1:]
    pool = np.flatnonzero(~twin)  # what only one of the two has, pair after pair
    # One key orders by pair and at random inside it; the factor keeps it from being rounded up into the next pair.
    dealt = np.argsort(place[pool] // 2 + rng.random(len(pool)) * (1 - 1e-6))
    place[pool] = place[pool][dealt]
    return order[place], columns


def _places(lines: np.ndarray, length: int, rng: np.random.Generator) -> np.ndarray:
    """Distinct random places from 0 to `length` for the entries of each line, uniform over all choices."""
    order = np.argsort(lines, kind="stable")
    places = np.empty(len(lines), dtype=np.int64)
    found, starts = np.unique(lines[order], return_index=True)
    ends = np.append(starts, len(lines))
    for at in range(len(found)):
        mine = order[ends[at] : ends[at + 1]]
        places[mine] = rng.choice(length, size=len(mine), replace=False)
    return places


def _stretches(documents: Sequence[Hashable] | None, n: int) -> tuple[np.ndarray, np.ndarray]:
    """Where each document starts, and which document each token is in."""
    if documents is None:
        return np.zeros(1, dtype=np.int64), np.zeros(n, dtype=np.int64)
    if len(documents) != n:
        raise SpecError(f"documents has {len(documents)} entries for {n} tokens; it needs one a token", "documents")
    starts = [at for at in range(n) if at == 0 or documents[at] != documents[at - 1]]
    if len({documents[at] for at in starts}) != len(starts):
        raise SpecError("a document is in two stretches; sort the tokens by document", "documents")
    marks = np.zeros(n, dtype=np.int64)
    marks[starts[1:]] = 1
    return np.array(starts, dtype=np.int64), np.cumsum(marks)


def _back(entries: _Entries, rows: np.ndarray, columns: np.ndarray, values: np.ndarray, codes: Codes) -> Codes:
    """Entries as codes of the kind that was given."""
    from scipy.sparse import coo_array, coo_matrix, issparse, isspmatrix

    given: Any = codes
    if issparse(given):
        kind = coo_matrix if isspmatrix(given) else coo_array
        out: Codes = kind((values, (rows, columns)), shape=entries.shape).asformat(given.format)
        return out
    dense = np.zeros(entries.shape, dtype=np.asarray(given).dtype)
    dense[rows, columns] = values
    return dense  # type: ignore[return-value]  # Codes is numpy's here
