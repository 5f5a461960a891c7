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
from assay.directions.erasure.inlp import logistic
from assay.directions.probes.scores import auroc_null_sd, on_rows
from assay.directions.probes.splits import grouped_split

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
        """Whether a probe of new rows finds nothing after erasure, of any class; False where there are too few to tell.

        It is `fresh` that is asked. After LEACE, or mean projection, a probe fitted on the eraser's own rows is
        constant by construction, whatever is left in others. An interval so wide that it holds chance and what was
        found before says nothing, and does not count. Each class has its own 5%, so of several classes one is outside
        by chance more often than that.
        """
        if self.fresh is None:
            return False
        pairs = zip(self.before, self.fresh, strict=True)
        return all(left.erased and left.interval.high < before.auc for before, left in pairs)


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
        SpecError: The shapes do not fit, there is one class only, or the groups are too few to split or to hold out
            two of each class.
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
    if not 0 < held_out < 1:
        raise SpecError(f"held_out is {held_out}; it must be between 0 and 1", "held_out")
    names = list(range(len(rows))) if groups is None else list(groups)
    split = grouped_split(names, codes, test=held_out, seed=seed)
    train, test = split.train, split.test
    eraser = fit(rows[train], np.asarray(y)[train])
    erased = eraser(rows)

    def leaks(values: np.ndarray, on: np.ndarray, at: np.ndarray) -> tuple[Leak, ...]:
        return _leaks(values, codes, classes, on, at, None if groups is None else names, seed, n_boot)

    before, after = leaks(rows, train, test), leaks(erased, train, test)
    try:
        half = grouped_split([names[i] for i in test], codes[test], test=0.5, seed=seed)
        fresh = leaks(erased, test[half.train], test[half.test])
    except SpecError:  # too few groups are held out
        fresh = None
    spread = float(((rows[test] - rows[test].mean(axis=0)) ** 2).sum())
    return ErasureScore(
        eraser=eraser,
        before=before,
        after=after,
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
    found = np.round(probe.decision_function(scaled[held]), 6)  # a fit to 1e-5: a constant probe must read as one
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
    for side in (True, False):
        if groups is not None and len({groups[int(i)] for i in np.flatnonzero(positive == side)}) < 2:
            raise SpecError(
                f"one held-out group has all rows {'of' if side else 'that are not of'} class {label!r}: there is no "
                "interval over groups; give more groups, or hold out more of them",
                "groups",
            )
    auroc = on_rows("auroc")
    interval = bootstrap_interval(pairs, auroc, n_boot=n_boot, seed=seed, groups=groups)
    return Leak(label=label, auc=auroc(pairs), null_sd=auroc_null_sd(n, m), interval=interval, n=(n, m))
