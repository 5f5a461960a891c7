"""Minimum description length: how many bits the labels cost somebody who has the activations.

A probe's accuracy says what it reaches with all the data; the online code says how soon. The labels are sent in blocks,
each under the probe fitted on the blocks before it: easily read labels soon cost little.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from itertools import pairwise

import numpy as np
from jaxtyping import Float, Int

from assay.base.errors import NumericalError, SpecError
from assay.base.rng import numpy_stream
from assay.directions.probes.inputs import Groups, Labels, group_ids, matrix, positives
from assay.directions.probes.logistic import held_out_losses, logistic
from assay.directions.probes.splits import grouped_folds

BLOCKS = (0.001, 0.002, 0.004, 0.008, 0.016, 0.032, 0.0625, 0.125, 0.25, 0.5, 1.0)
"""The shares of the data after which the probe is fitted again."""

FitOnline = Callable[[np.ndarray, np.ndarray, np.ndarray], Callable[[np.ndarray], np.ndarray]]
"""Maps training rows, labels (true for the larger) and groups to a function from rows to log odds."""

_STRENGTHS = (1e-4, 1e-3, 1e-2, 1e-1, 1.0)
_FOLDS = 4


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class DescriptionLength:
    """What the labels cost, in bits.

    Args:
        online: Under the online code, one a shuffle of the groups.
        uniform: At one bit a label: `n log2 K`.
        entropy: At their entropy, `n H(y)`. The fair comparison where one class is rare.
    """

    online: tuple[float, ...]
    uniform: float
    entropy: float

    @property
    def bits(self) -> float:
        """The online code, mean over shuffles."""
        return float(np.mean(self.online))

    @property
    def compression(self) -> float:
        """`uniform / bits`: flattered by imbalanced labels."""
        return self.uniform / self.bits

    @property
    def entropy_compression(self) -> float:
        """`entropy / bits`: about 1, never much above, where the activations say nothing."""
        return self.entropy / self.bits


def description_length(
    X: Float[np.ndarray, "rows d"],
    y: Labels,
    groups: Groups,
    *,
    fit: FitOnline | None = None,
    shuffles: int = 3,
    seed: int = 0,
) -> DescriptionLength:
    """Send labels by the online code: `t_1 log2 K - sum_i sum_{n in block i+1} log2 p_i(y_n | x_n)`.

    Blocks end at .1, .2, .4, .8, 1.6, 3.2, 6.25, 12.5, 25, 50 and 100% of the rows, moved to the end of a group: no
    block is predicted from rows of its own groups. p_i is fitted from scratch on the rows before.

    Compare with the same labels permuted, or with a control task: `assay.controls.control_labels`.

    Args:
        X: Rows.
        y: Two labels, one a row.
        groups: The group of each row.
        fit: How each probe is fitted; by default logistic regression that may decline, see `fit_online`.
        shuffles: How many orders of the groups; the order matters.
        seed: Seed of the orders.

    Raises:
        SpecError: There are not two classes, fewer than two groups, or no shuffle.
        NumericalError: A row or a log odds is not finite.

    Source: Voita and Titov 2020, "Information-theoretic probing with minimum description length", section 2.2.

    Example:
        >>> rng = np.random.default_rng(0)
        >>> y = np.arange(200) % 2
        >>> X = rng.normal(size=(200, 3)) + 6.0 * y[:, None]
        >>> description_length(X, y, np.arange(200)).compression > 3
        True
    """
    data = matrix(X)
    up = positives(y, len(data))
    ids = group_ids(groups, len(data))
    if shuffles < 1:
        raise SpecError(f"shuffles is {shuffles}; there must be at least one", "shuffles")
    if ids.max() == 0:
        raise SpecError("all rows are one group, so no probe can be fitted before them: bring more groups", "groups")
    share = float(up.mean())
    entropy = -share * math.log2(share) - (1 - share) * math.log2(1 - share)
    online = []
    for shuffle in range(shuffles):
        order, ends = _order(ids, numpy_stream(seed, "online code", shuffle))
        online.append(_online(data[order], up[order], ids[order], ends, fit or fit_online))
    return DescriptionLength(online=tuple(online), uniform=float(len(data)), entropy=entropy * len(data))


def fit_online(X: np.ndarray, up: np.ndarray, groups: np.ndarray) -> Callable[[np.ndarray], np.ndarray]:
    """Fit logistic regression, or decline: the prefix decides by grouped cross-validation.

    The most penalised probe whose held-out loss lies within a standard error of the least is taken; and none at all,
    but the share of each class (one row of each added), where the base rate is within it. So labels that cannot be
    read cost their entropy and little more. The standard error is over groups.

    Args:
        X: The rows so far.
        up: Which have the larger label.
        groups: Their groups.
    """
    count, total = float(up.sum()), len(up)
    prior = math.log((count + 1) / (total - count + 1))
    fewest = min(len(np.unique(groups[up])), len(np.unique(groups[~up])))
    if fewest < _FOLDS:
        return lambda rows: np.full(len(rows), prior)
    folds = grouped_folds(groups.tolist(), up, folds=_FOLDS)
    base = np.empty(total)
    for fold in folds:
        own = up[fold.train]
        odds = math.log((own.sum() + 1) / (len(own) - own.sum() + 1))
        base[fold.test] = np.logaddexp(0.0, np.where(up[fold.test], -odds, odds))
    losses = [base, *held_out_losses(X, up, folds, _STRENGTHS)]
    least = min(losses, key=lambda loss: float(loss.mean()))
    chosen = next(i for i, loss in enumerate(losses) if loss is least or _within_error(loss - least, groups))
    if chosen == 0:
        return lambda rows: np.full(len(rows), prior)
    weight, bias = logistic(X, up, _STRENGTHS[chosen - 1])
    return lambda rows: np.asarray(rows @ weight + bias)


def _within_error(excess: np.ndarray, groups: np.ndarray) -> bool:
    sums = np.bincount(np.unique(groups, return_inverse=True)[1], weights=excess)
    m = len(sums)
    return bool(sums.mean() <= sums.std(ddof=1) / math.sqrt(m))


def _order(ids: np.ndarray, rng: np.random.Generator) -> tuple[Int[np.ndarray, " rows"], list[int]]:
    """Rows with their groups in random order, and where each block ends."""
    rank = rng.permutation(ids.max() + 1)[ids]
    order = np.lexsort((rng.random(ids.size), rank))
    stops = np.append(np.flatnonzero(np.diff(rank[order])) + 1, ids.size)  # where a group ends
    ends = {int(stops[np.searchsorted(stops, max(1, round(share * ids.size)))]) for share in BLOCKS}
    return order, sorted(ends)


def _online(X: np.ndarray, up: np.ndarray, ids: np.ndarray, ends: list[int], fit: FitOnline) -> float:
    bits = float(ends[0])
    for start, end in pairwise(ends):
        odds = np.asarray(fit(X[:start], up[:start], ids[:start])(X[start:end]), dtype=np.float64)
        if odds.shape != (end - start,) or not np.isfinite(odds).all():
            raise NumericalError(
                f"the probe fitted on {start} rows gave log odds that are not finite, or not one a row"
            )
        bits += float(np.logaddexp(0.0, np.where(up[start:end], -odds, odds)).sum()) / math.log(2)
    return bits
