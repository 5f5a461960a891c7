"""Splits that keep groups whole.

Rows of one word, template or entity share more than their label. Split by row, a probe that memorises words is rewarded
for it, and one control task gives a selectivity of 0 or 0.47 depending on nothing but the split. So there is no other
kind of split here.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from jaxtyping import Int

from assay.base.errors import SpecError
from assay.base.rng import numpy_stream
from assay.controls.labels import label_array
from assay.directions.probes.inputs import Groups, Labels, group_ids

_TRIES = 8  # random orders of the groups; the best balanced one is taken


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Split:
    """Rows to fit on and rows to test on, which share no group.

    Args:
        train: Row numbers, in order.
        test: Row numbers, in order.
    """

    train: Int[np.ndarray, " train"]
    test: Int[np.ndarray, " test"]


def grouped_split(groups: Groups, y: Labels, *, test: float = 0.3, seed: int = 0) -> Split:
    """Split rows in two that share no group, the classes in each as near their shares as the groups allow.

    Args:
        groups: The group of each row.
        y: The label of each row.
        test: The share of the rows to test on.
        seed: Seed of the stream.

    Raises:
        SpecError: There is one class, or the groups are too few for both classes on both sides.

    Example:
        >>> split = grouped_split(["a", "a", "b", "b", "c", "c", "d", "d"], [0, 0, 0, 0, 1, 1, 1, 1], test=0.5)
        >>> len(split.train), len(split.test)
        (4, 4)
    """
    train, held = grouped_parts(groups, y, (1 - test, test), seed=seed)
    return Split(train=train, test=held)


def grouped_folds(groups: Groups, y: Labels, *, folds: int = 5, seed: int = 0) -> tuple[Split, ...]:
    """Split rows into folds that share no group; each is the test of one split.

    Args:
        groups: The group of each row.
        y: The label of each row.
        folds: How many.
        seed: Seed of the stream.

    Raises:
        SpecError: There is one class, or the groups are too few for both classes in every fold.

    Example:
        >>> splits = grouped_folds(list("aabbccdd"), [0, 1] * 4, folds=4)
        >>> sorted(row for split in splits for row in split.test.tolist())
        [0, 1, 2, 3, 4, 5, 6, 7]
    """
    if folds < 2:
        raise SpecError(f"folds is {folds}; there must be at least 2", "folds")
    parts = grouped_parts(groups, y, (1 / folds,) * folds, seed=seed)
    everything = np.arange(len(groups))
    return tuple(Split(train=np.setdiff1d(everything, part), test=part) for part in parts)


def grouped_parts(
    groups: Groups, y: Labels, shares: Sequence[float], *, seed: int = 0
) -> tuple[Int[np.ndarray, " part"], ...]:
    """Divide rows into parts of given shares that share no group, each class divided as nearly alike as groups allow.

    Groups are placed one after another, in random order, where they bring the counts of every class nearest to
    their targets; the best of a few orders is taken.

    Args:
        groups: The group of each row.
        y: The label of each row.
        shares: The share of each part; they sum to 1.
        seed: Seed of the stream.

    Raises:
        SpecError: There is one class, a share is not positive, or the groups are too few for every class in every part.

    Example:
        >>> sorted(part.tolist() for part in grouped_parts(list("aabb"), [0, 1, 0, 1], (0.5, 0.5)))
        [[0, 1], [2, 3]]
    """
    classes, labels = np.unique(label_array(y), return_inverse=True)
    ids = group_ids(groups, labels.size)
    if classes.size < 2:
        raise SpecError(f"all {labels.size} rows have one label; a split needs at least two classes", "y")
    if len(shares) < 2 or min(shares) <= 0 or not math.isclose(sum(shares), 1.0, rel_tol=1e-9):
        raise SpecError(f"the shares are {tuple(shares)}; give two or more, positive, with the sum 1", "shares")
    counts = np.zeros((ids.max() + 1, classes.size))
    np.add.at(counts, (ids, labels), 1)
    rng = numpy_stream(seed, "grouped parts", len(shares))
    tries = [_place(counts, shares, rng.permutation(len(counts))) for _ in range(_TRIES)]
    missing, _, place = min(tries, key=lambda found: found[:2])
    if missing:
        holding = {str(label): int((counts[:, i] > 0).sum()) for i, label in enumerate(classes)}
        raise SpecError(
            f"{len(counts)} groups are too few for {len(shares)} parts that each hold every class (groups with each: "
            f"{holding}): bring more groups, or make fewer and more even parts",
            "groups",
        )
    return tuple(np.flatnonzero(place[ids] == part) for part in range(len(shares)))


def _place(
    counts: np.ndarray, shares: Sequence[float], order: np.ndarray
) -> tuple[int, float, Int[np.ndarray, " groups"]]:
    """Where each group goes: how many classes some part lacks, how far the counts are off, and the part of each."""
    total = counts.sum(axis=0).tolist()
    target = [[share * n for n in total] for share in shares]
    held = [[0.0] * len(total) for _ in shares]
    place = np.empty(len(counts), dtype=int)
    table = counts.tolist()
    for group in order.tolist():
        here = [(c, n) for c, n in enumerate(table[group]) if n]
        # What the squared distance to the targets, relative to them, grows by.
        costs = [
            sum(n * (n + 2 * (has[c] - want[c])) / want[c] for c, n in here)
            for has, want in zip(held, target, strict=True)
        ]
        part = costs.index(min(costs))
        place[group] = part
        for c, n in here:
            held[part][c] += n
    off = sum((h - w) ** 2 / w for has, want in zip(held, target, strict=True) for h, w in zip(has, want, strict=True))
    missing = sum(h == 0 for has in held for h in has)
    return missing, off, place
