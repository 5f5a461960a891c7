"""Whether an eraser erases: a probe fitted after it, read on rows that neither has seen.

On the rows it was fitted on, erasure always looks perfect. Here groups are split three ways at most: the eraser and the
probe are fitted on some, the AUC is of the others; and, as the harder question, a probe is fitted on half of the
held-out groups and read on the other half, which is what somebody with data of their own would find. That is more: the
direction erased is an estimate from n rows, and what it misses is about `2 sqrt(d / n)` standard deviations long.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from jaxtyping import Float, Shaped

from assay.base.errors import SpecError
from assay.base.stats import Interval, bootstrap_interval
from assay.directions.erasure.eraser import Eraser, activation_rows, class_columns
from assay.directions.erasure.inlp import logistic, split_groups

_Z = 1.959963984540054  # the normal quantile of a two-sided 5% band


@dataclass(frozen=True, slots=True, kw_only=True)
class Leak:
    """How well a probe tells one class from the rest, on rows it has not seen.

    Args:
        label: The class.
        auc: The area under the ROC curve.
        null_sd: Its standard deviation where nothing is to be found: `sqrt((n+ + n- + 1) / (12 n+ n-))`.
        interval: Its bootstrap interval over groups.
        n: Rows, of this class and of others.
    """

    label: str
    auc: float
    null_sd: float
    interval: Interval
    n: tuple[int, int]

    @property
    def in_band(self) -> bool:
        """Whether the AUC lies in the 95% band around .5 that independent rows would give."""
        return abs(self.auc - 0.5) <= _Z * self.null_sd

    @property
    def erased(self) -> bool:
        """Whether nothing is found: the AUC is in that band, or its interval over groups holds .5.

        Rows of one group are alike, so the band is too narrow for them, and the interval is the one to go by.
        """
        return self.in_band or 0.5 in self.interval


@dataclass(frozen=True, slots=True, kw_only=True)
class ErasureScore:
    """What probes find before and after erasure, on held-out rows; one `Leak` a class (one alone for two classes).

    Args:
        eraser: As it was fitted on the training rows.
        before: A probe fitted on training rows, without erasure.
        after: A probe fitted on erased training rows.
        fresh: A probe fitted on erased held-out rows, half to fit and half to read; None where the groups are too few.
        moved: Mean squared change of the held-out rows, as a share of their variance.
        train: Rows fitted on.
        test: Rows held out.
    """

    eraser: Eraser
    before: tuple[Leak, ...]
    after: tuple[Leak, ...]
    fresh: tuple[Leak, ...] | None
    moved: float
    train: tuple[int, ...]
    test: tuple[int, ...]

    @property
    def erased(self) -> bool:
        """Whether nothing is found after erasure, of any class."""
        return all(leak.erased for leak in self.after)


def null_band(positive: int, negative: int) -> float:
    """The standard deviation of an AUC that says nothing: `sqrt((n+ + n- + 1) / (12 n+ n-))`.

    Raises:
        SpecError: A class has no rows.

    Example:
        >>> round(null_band(32, 32), 3), round(null_band(250, 250), 3)
        (0.073, 0.026)
    """
    if positive < 1 or negative < 1:
        raise SpecError(f"an AUC needs rows of both classes, got {positive} and {negative}", "y")
    return math.sqrt((positive + negative + 1) / (12 * positive * negative))


def auc(scores: Float[np.ndarray, " rows"], positive: Shaped[np.ndarray, " rows"]) -> float:
    """The area under the ROC curve, ties counting half; NaN where one class is absent.

    Example:
        >>> auc(np.array([0.1, 0.4, 0.35, 0.8]), np.array([False, False, True, True]))
        0.75
    """
    from scipy.stats import rankdata

    high = np.asarray(positive, dtype=bool)
    n, m = int(high.sum()), int((~high).sum())
    if not n or not m:
        return math.nan
    return float((rankdata(scores)[high].sum() - n * (n + 1) / 2) / (n * m))


def score_erasure(
    fit: Callable[[Float[np.ndarray, "rows d"], Shaped[np.ndarray, " rows"]], Eraser],
    X: Any,
    y: Any,
    groups: Sequence[Hashable] | None = None,
    *,
    held_out: float = 0.25,
    seed: int = 0,
    n_boot: int = 1000,
) -> ErasureScore:
    """Fit an eraser on some groups, and score it on the others.

    Args:
        fit: Makes the eraser from rows and labels, such as `leace`.
        X: Activations, `[rows, d]`.
        y: Their labels, `[rows]`.
        groups: What each row is about: no group is on both sides. Each row is its own without.
        held_out: The share of groups that is held out.
        seed: Seed of split and bootstrap.
        n_boot: Resamples of each interval.

    Raises:
        SpecError: The shapes do not fit, there is one class only, or the groups are too few to split.
        NumericalError: A row is not finite.

    Example:
        >>> from assay.directions.erasure.leace import leace
        >>> rng = np.random.default_rng(0)
        >>> y = rng.integers(2, size=800)
        >>> X = rng.normal(size=(800, 8)) + 2.0 * y[:, None] * np.eye(8)[0]
        >>> score = score_erasure(leace, X, y, n_boot=200)
        >>> score.before[0].auc > 0.85, score.erased
        (True, True)
    """
    rows = activation_rows(X)
    classes, z = class_columns(y, len(rows))
    codes = z.argmax(axis=1)
    train, test = split_groups(codes, groups, held_out, seed)
    names = None if groups is None else list(groups)
    eraser = fit(rows[train], np.asarray(y)[train])
    erased = eraser(rows)

    def leaks(values: np.ndarray, on: np.ndarray, at: np.ndarray) -> tuple[Leak, ...]:
        return _leaks(values, codes, classes, on, at, names, seed, n_boot)

    try:
        half, rest = split_groups(codes[test], names and [names[i] for i in test], 0.5, seed)
    except SpecError:
        fresh = None
    else:
        fresh = leaks(erased, test[half], test[rest])
    spread = float(((rows[test] - rows[test].mean(axis=0)) ** 2).sum())
    return ErasureScore(
        eraser=eraser,
        before=leaks(rows, train, test),
        after=leaks(erased, train, test),
        fresh=fresh,
        moved=float(((erased[test] - rows[test]) ** 2).sum() / spread) if spread else math.nan,
        train=tuple(int(i) for i in train),
        test=tuple(int(i) for i in test),
    )


def _leaks(
    values: Float[np.ndarray, "rows d"],
    codes: Shaped[np.ndarray, " rows"],
    classes: Shaped[np.ndarray, " classes"],
    fit: Shaped[np.ndarray, " fit"],
    held: Shaped[np.ndarray, " held"],
    groups: Sequence[Hashable] | None,
    seed: int,
    n_boot: int,
) -> tuple[Leak, ...]:
    mean, sd = values[fit].mean(axis=0), values[fit].std(axis=0)
    scaled = (values - mean) / np.where(sd > 1e-12 * max(sd.max(), 1e-300), sd, np.inf)
    probe = logistic(scaled[fit], codes[fit])
    found = probe.decision_function(scaled[held])
    columns = {1: found} if len(classes) == 2 else {k: found[:, k] for k in range(len(classes))}
    named = groups and [groups[i] for i in held]
    return tuple(_leak(str(classes[k]), column, codes[held] == k, named, seed, n_boot) for k, column in columns.items())


def _leak(
    label: str,
    scores: Float[np.ndarray, " rows"],
    positive: Shaped[np.ndarray, " rows"],
    groups: Sequence[Hashable] | None,
    seed: int,
    n_boot: int,
) -> Leak:
    pairs = np.stack([scores, positive.astype(np.float64)], axis=1)
    n, m = int(positive.sum()), int((~positive).sum())

    def statistic(rows: np.ndarray) -> float:
        return auc(rows[:, 0], rows[:, 1] > 0.5)

    interval = bootstrap_interval(pairs, statistic, n_boot=n_boot, seed=seed, groups=groups)
    return Leak(label=label, auc=statistic(pairs), null_sd=null_band(n, m), interval=interval, n=(n, m))
