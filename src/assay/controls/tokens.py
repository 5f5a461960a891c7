"""Random tokens: text without language, to hold a claim about language against."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Literal, get_args

import numpy as np

from assay.base.errors import SpecError
from assay.base.rng import numpy_stream

TokenDraw = Literal["uniform", "unigram"]
"""Where random tokens come from."""


def random_tokens(
    ids: Sequence[Sequence[int]],
    draw: TokenDraw,
    seed: int,
    *,
    vocab: int | None = None,
    keep: Iterable[int] = (),
) -> list[list[int]]:
    """Return as many prompts of the same lengths, each token drawn on its own.

    - "uniform": every token of the vocabulary is as likely as any other. Mostly tokens that a model rarely saw.
    - "unigram": as frequent as in the given prompts; only order and company are gone.

    Args:
        ids: The prompts' token ids.
        draw: Where tokens come from.
        seed: Seed of the stream.
        vocab: The size of the vocabulary, for "uniform".
        keep: Special tokens (beginning of text, padding): they stay in their places and are never drawn.

    Raises:
        SpecError: The kind of draw is unknown, the vocabulary's size is missing, or nothing is left to draw.

    Example:
        >>> random_tokens([[1, 7, 7, 9], [1, 9]], "unigram", seed=0, keep=[1])
        [[1, 7, 9, 7], [1, 9]]
    """
    if draw not in get_args(TokenDraw):
        raise SpecError(f"draw is {draw!r}; valid: {', '.join(map(repr, get_args(TokenDraw)))}", "draw")
    special = np.array(sorted(set(keep)), dtype=np.int64)
    rows = [np.array(row, dtype=np.int64).ravel() for row in ids]
    flat = np.concatenate(rows) if rows else np.zeros(0, dtype=np.int64)
    if draw == "unigram":
        pool = flat[~np.isin(flat, special)]
    else:
        if vocab is None or vocab < 1:
            raise SpecError(f"vocab is {vocab}; uniform tokens need the size of the vocabulary", "vocab")
        pool = np.setdiff1d(np.arange(vocab), special)
    if not pool.size:
        raise SpecError("there is no token to draw: the prompts, or the vocabulary, hold special tokens only", "ids")
    rng = numpy_stream(seed, "random tokens", draw)
    return [np.where(np.isin(row, special), row, pool[rng.integers(pool.size, size=row.size)]).tolist() for row in rows]
