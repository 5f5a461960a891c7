"""How well a readout tells two classes apart, with intervals that respect groups."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Literal, get_args

import numpy as np
from jaxtyping import Bool, Float

from assay.base.errors import NumericalError, SpecError
from assay.base.stats import Interval, bootstrap_interval
from assay.directions.probes.inputs import Groups, Labels, positives

Metric = Literal["auroc", "auprc", "balanced accuracy", "log loss", "ece"]
"""What a readout is scored by. The first two see its order only; the last two take it as a log odds."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Score:
    """A score with its interval.

    Args:
        value: On all rows.
        interval: BCa bootstrap, groups resampled whole.
    """

    value: float
    interval: Interval


def auroc(readout: Any, y: Labels) -> float:
    """The chance that a positive row reads higher than a negative one, ties counting half.

    Raises:
        SpecError: There are not two classes, or not one label a row.
        NumericalError: A readout is not finite.

    Example:
        >>> auroc([0.1, 0.4, 0.35, 0.8], [0, 0, 1, 1])
        0.75
    """
    values, up = _pair(readout, y)
    return float(many_auroc(values[:, None], up[:, None])[0])


def many_auroc(readouts: Float[np.ndarray, "rows n"], labels: Bool[np.ndarray, "rows n"]) -> Float[np.ndarray, " n"]:
    """The AUROC of each column of readouts for the same column of labels; NaN where a column has one class."""
    from scipy.stats import rankdata

    ranks = rankdata(readouts, axis=0)
    up = labels.sum(axis=0).astype(np.float64)
    down = len(labels) - up
    with np.errstate(invalid="ignore", divide="ignore"):
        return np.asarray((np.where(labels, ranks, 0.0).sum(axis=0) - up * (up + 1) / 2) / (up * down))


def many_accuracy(readouts: Float[np.ndarray, "rows n"], labels: Bool[np.ndarray, "rows n"]) -> Float[np.ndarray, " n"]:
    """The balanced accuracy of each column at the threshold 0; NaN where a column has one class."""
    said = readouts > 0
    up = labels.sum(axis=0).astype(np.float64)
    with np.errstate(invalid="ignore", divide="ignore"):
        hits = (said & labels).sum(axis=0) / up + (~said & ~labels).sum(axis=0) / (len(labels) - up)
    return np.asarray(hits / 2)


def auroc_null_sd(positive: int, negative: int) -> float:
    """The standard deviation of the AUROC of a readout that has nothing to do with independent labels.

    `sqrt((n+ + n- + 1) / (12 n+ n-))`

    Raises:
        SpecError: A class is empty.

    Source: Mann and Whitney 1947, "On a test of whether one of two random variables is stochastically larger".

    Example:
        >>> round(auroc_null_sd(32, 32), 3), round(auroc_null_sd(250, 250), 3)
        (0.073, 0.026)
    """
    if positive < 1 or negative < 1:
        raise SpecError(f"an AUROC needs both classes; got {positive} positive and {negative} negative rows", "y")
    return math.sqrt((positive + negative + 1) / (12 * positive * negative))


def auprc(readout: Any, y: Labels) -> float:
    """The area under precision over recall, as average precision: `sum_k (R_k - R_{k-1}) P_k`.

    Raises:
        SpecError: There are not two classes, or not one label a row.
        NumericalError: A readout is not finite.

    Example:
        >>> round(auprc([0.1, 0.4, 0.35, 0.8], [0, 0, 1, 1]), 3)
        0.833
    """
    return _auprc(*_pair(readout, y))


def balanced_accuracy(readout: Any, y: Labels) -> float:
    """The mean of the shares of positive rows that read above 0 and of negative rows that do not.

    Example:
        >>> balanced_accuracy([-1.0, 0.5, 2.0, 1.0], [0, 0, 1, 1])
        0.75
    """
    values, up = _pair(readout, y)
    return float(many_accuracy(values[:, None], up[:, None])[0])


def log_loss(readout: Any, y: Labels) -> float:
    """The mean of `-ln p(label)`, in nats, with `p = sigmoid(readout)`.

    Example:
        >>> round(log_loss([0.0, 0.0], [0, 1]), 4)
        0.6931
    """
    return _log_loss(*_pair(readout, y))


def calibration_error(readout: Any, y: Labels, bins: int = 10) -> float:
    """Expected calibration error: `sum_b n_b/n |share of positives - mean p|` over bins of equal width of p.

    Raises:
        SpecError: There are not two classes, or no bins.

    Source: Guo et al. 2017, "On calibration of modern neural networks", section 2.

    Example:
        >>> calibration_error([0.0, 0.0, 0.0, 0.0], [0, 1, 1, 1])
        0.25
    """
    if bins < 1:
        raise SpecError(f"bins is {bins}; there must be at least one", "bins")
    values, up = _pair(readout, y)
    return _ece(values, up, bins)


def evaluate(
    readout: Any,
    y: Labels,
    groups: Groups | None = None,
    *,
    metrics: tuple[Metric, ...] = get_args(Metric),
    level: float = 0.95,
    n_boot: int = 1000,
    seed: int = 0,
) -> Mapping[str, Score]:
    """Score a readout on held-out rows, each score with a bootstrap interval that resamples whole groups.

    Resamples that hold one class only are left out.

    Args:
        readout: One number a row; a log odds for "log loss" and "ece".
        y: Two labels, one a row.
        groups: The group of each row; without, rows count as independent.
        metrics: Which scores.
        level: Coverage of the intervals.
        n_boot: Number of resamples.
        seed: Seed of the stream.

    Raises:
        SpecError: There are not two classes, fewer than two groups, or an unknown metric.
        NumericalError: A readout is not finite.

    Example:
        >>> scores = evaluate([-2.0, -1.0, 0.5, -0.5, 1.0, 2.0], [0, 0, 0, 1, 1, 1], metrics=("auroc",))
        >>> round(scores["auroc"].value, 3), scores["auroc"].interval.high <= 1
        (0.889, True)
    """
    values, up = _pair(readout, y)
    table = np.stack([values, up], axis=1)
    found: dict[str, Score] = {}
    for metric in metrics:
        if metric not in _STATISTICS:
            raise SpecError(f"metric is {metric!r}; valid: {', '.join(map(repr, _STATISTICS))}", "metrics")
        statistic = on_rows(metric)
        interval = bootstrap_interval(table, statistic, level, n_boot, seed, None if groups is None else list(groups))
        found[metric] = Score(value=statistic(table), interval=interval)
    return found


def on_rows(metric: Metric) -> Callable[[np.ndarray], float]:
    """A metric as a statistic of rows (readout, label as 0 or 1); NaN where one class is missing."""
    score = _STATISTICS[metric]

    def statistic(table: np.ndarray) -> float:
        up = table[:, 1] > 0.5
        return score(table[:, 0], up) if up.any() and not up.all() else math.nan

    return statistic


def _auroc(values: np.ndarray, up: np.ndarray) -> float:
    # By counting, which is several times faster than ranks for one column.
    low = np.sort(values[~up])
    high = values[up]
    below = np.searchsorted(low, high, side="left").sum() + np.searchsorted(low, high, side="right").sum()
    return float(below / (2 * low.size * high.size))


def _auprc(values: np.ndarray, up: np.ndarray) -> float:
    order = np.argsort(-values, kind="stable")
    last = np.append(np.flatnonzero(np.diff(values[order])), len(values) - 1)  # where a run of ties ends
    hits = np.cumsum(up[order])[last]
    return float(np.sum(np.diff(hits, prepend=0) * hits / (last + 1)) / hits[-1])


def _balanced(values: np.ndarray, up: np.ndarray) -> float:
    said = values > 0
    return float((said[up].mean() + (~said[~up]).mean()) / 2)


def _log_loss(values: np.ndarray, up: np.ndarray) -> float:
    return float(np.logaddexp(0.0, np.where(up, -values, values)).mean())


def _ece(values: np.ndarray, up: np.ndarray, bins: int = 10) -> float:
    from scipy.special import expit

    p = expit(values)
    index = np.minimum((p * bins).astype(int), bins - 1)
    off = np.bincount(index, weights=up - p, minlength=bins)
    return float(np.abs(off).sum() / len(values))


_STATISTICS: dict[str, Callable[[np.ndarray, np.ndarray], float]] = {
    "auroc": _auroc,
    "auprc": _auprc,
    "balanced accuracy": _balanced,
    "log loss": _log_loss,
    "ece": _ece,
}


def _pair(readout: Any, y: Labels) -> tuple[Float[np.ndarray, " rows"], Bool[np.ndarray, " rows"]]:
    values = np.asarray(readout, dtype=np.float64)
    if values.ndim != 1:
        raise SpecError(f"the readout has the shape {values.shape}; it needs one number a row", "readout")
    if not np.isfinite(values).all():
        raise NumericalError(f"{int(np.sum(~np.isfinite(values)))} of {values.size} readouts are NaN or infinite")
    return values, positives(y, values.size)
