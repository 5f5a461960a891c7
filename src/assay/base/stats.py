"""Estimates with their uncertainty: bootstrap intervals, permutation p-values, correlations, multiplicity.

Everything is plain numpy on small arrays; scipy is imported where a quantile of Student's t is needed. Random draws
come from named streams, so a result depends on its inputs and its seed alone.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Hashable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from statistics import NormalDist
from typing import Any, Literal, NamedTuple, get_args

import numpy as np
from jaxtyping import Float, Int
from numpy.typing import ArrayLike

from assay.base.errors import NumericalError, SpecError
from assay.base.rng import numpy_stream

Side = Literal["greater", "less", "two"]
"""The direction of a claim: the estimate lies above its null, below it, or on either side."""

Numbers = ArrayLike | Sequence[Any]
"""Numbers in an array, a tensor on the CPU, or any nested sequence."""

Statistic = Callable[[np.ndarray], float]

_BLOCK = 4_000_000  # numbers held at once while resampling
_TIE = 1e-12  # relative; two computations of one number may differ by rounding
_NORMAL = NormalDist()
_JACKKNIFE = 400  # at most this many leave-one-out evaluations


@dataclass(frozen=True, slots=True, kw_only=True)
class Interval:
    """A confidence interval.

    Args:
        low: Lower end, in the unit of the estimate.
        high: Upper end.
        level: Nominal coverage, between 0 and 1.
        method: How it was made.

    Raises:
        NumericalError: An end is not finite, or the ends are in the wrong order.

    Example:
        >>> Interval(low=0.2, high=0.9, method="by hand").excludes(0.0)
        True
    """

    low: float
    high: float
    level: float = 0.95
    method: str = ""

    def __post_init__(self) -> None:
        for name in ("low", "high", "level"):
            object.__setattr__(self, name, float(getattr(self, name)))
        if not (math.isfinite(self.low) and math.isfinite(self.high)):
            raise NumericalError(f"an interval needs finite ends, got [{self.low}, {self.high}]")
        if self.low > self.high:
            raise NumericalError(f"an interval needs low <= high, got [{self.low}, {self.high}]")
        _check_level(self.level)

    def __contains__(self, value: float) -> bool:
        return self.low <= value <= self.high

    def excludes(self, value: float = 0.0) -> bool:
        """Whether `value` lies outside the interval."""
        return value not in self

    def to_dict(self) -> dict[str, Any]:
        """Return the interval as JSON-able data."""
        return {"low": self.low, "high": self.high, "level": self.level, "method": self.method}

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> Interval:
        """Read back what `to_dict` wrote."""
        return cls(low=data["low"], high=data["high"], level=data["level"], method=data["method"])


class SignFlipResult(NamedTuple):
    """The mean of the values, its sign-flip p-value, and the null it was held against."""

    value: float
    p: float
    null: Float[np.ndarray, " draws"]


def bootstrap_interval(
    values: Numbers,
    statistic: Statistic = np.mean,
    level: float = 0.95,
    n_boot: int = 2000,
    seed: int = 0,
    groups: Sequence[Hashable] | None = None,
) -> Interval:
    """Return the bias-corrected and accelerated (BCa) bootstrap interval of a statistic, widened for small samples.

    BCa moves the percentiles of the resampled statistic by its median bias z0 and its skew a. A plain bootstrap is
    too narrow for few values (it has variance (n-1)/n and normal tails), so the normal quantile z is replaced by
    `t_{n-1} sqrt(n / (n-1))`, which for the mean of normal values gives Student's interval.

    Args:
        values: The sample, `[n]`, or `[n, ...]` for a statistic of rows. n >= 2.
        statistic: Maps a resample to a number. `numpy.mean` and `numpy.median` are fast.
        level: Nominal coverage.
        n_boot: Number of resamples.
        seed: Seed of the stream.
        groups: A label a value. Whole groups are resampled, which is what repeated measures of one prompt, template
            or word need; n is then the number of groups.

    Raises:
        SpecError: Fewer than two values or groups, or the lengths of `groups` and `values` differ.
        NumericalError: A value, or the statistic of the sample, is not finite.

    Source: Efron 1987 (BCa); Hesterberg 2015, "What teachers should know about the bootstrap", section 5.3.

    Example:
        >>> interval = bootstrap_interval([2.1, 1.9, 2.5, 2.0, 2.3, 1.8])
        >>> round(interval.low, 1), round(interval.high, 1)
        (1.9, 2.4)
    """
    data = _finite(values, "values", min_ndim=1)
    if data.ndim == 1 and statistic in (np.mean, np.median):
        batch: _Batch | None = lambda index: np.asarray(statistic(data[index], axis=1))  # noqa: E731
    else:
        batch = None
    return _bca(data, statistic, batch, level, n_boot, numpy_stream(seed, "bootstrap"), groups)


def permutation_p(value: float, null: Numbers, side: Side = "greater") -> float:
    """Return the place of a value among draws from its null: `(1 + #{null >= value}) / (n + 1)`.

    The value counts as one of its own draws, so p is never zero and P(p <= alpha) <= alpha under the null. `"less"`
    counts the draws below; `"two"` doubles the smaller side. Draws equal to the value up to rounding (1e-12 relative)
    count as ties.

    Raises:
        SpecError: The null is empty, or the side is not one of the three.
        NumericalError: The value or a draw is not finite.

    Source: Phipson and Smyth 2010.

    Example:
        >>> permutation_p(3.0, [1.0, 2.0, 2.5, 4.0])
        0.4
    """
    draws = _finite(null, "null", min_ndim=1).ravel()
    point = float(_finite(value, "value"))
    if side not in get_args(Side):
        raise SpecError(f"side is {side!r}; valid: {', '.join(map(repr, get_args(Side)))}", "side")
    if not draws.size:
        raise SpecError("a p-value needs at least one draw from the null, got none", "null")
    tie = _TIE * np.maximum(np.abs(draws), abs(point))
    above = (1 + int(np.sum(draws >= point - tie))) / (draws.size + 1)
    below = (1 + int(np.sum(draws <= point + tie))) / (draws.size + 1)
    return {"greater": above, "less": below, "two": min(1.0, 2 * min(above, below))}[side]


def sign_flip_test(
    values: Numbers,
    n: int = 9999,
    seed: int = 0,
    side: Side = "greater",
    groups: Sequence[Hashable] | None = None,
) -> SignFlipResult:
    """Test whether the mean of paired differences is zero by flipping their signs.

    Under the null each value is as likely as its negative (answer and foil could be swapped), so every pattern of
    signs is as likely as the one observed. With few values all 2^m - 1 other patterns are the null and p is exact;
    else n random patterns are. With groups, the m groups are flipped, each as a whole.

    Args:
        values: The differences, `[rows]`.
        n: Number of random patterns; also the limit up to which all patterns are listed.
        seed: Seed of the stream.
        side: The direction of the claim.
        groups: A label a value; values of one group keep their signs relative to each other.

    Raises:
        SpecError: No values, or the lengths of `groups` and `values` differ.
        NumericalError: A value is not finite.

    Example:
        >>> sign_flip_test([1.0, 2.0, 3.0, 4.0]).p  # 1 of 16 patterns
        0.0625
    """
    data = _finite(values, "values", min_ndim=1).ravel()
    if not data.size:
        raise SpecError("a sign-flip test needs at least one value, got none", "values")
    if n < 1:
        raise SpecError(f"n is {n}; a sign-flip test needs at least one pattern", "n")
    sums = np.array([data[rows].sum() for rows in _units(data.size, groups)]) / data.size
    m = sums.size
    blocks = _all_patterns(m) if m < 62 and 2**m - 1 <= n else _random_patterns(m, n, numpy_stream(seed, "sign-flip"))
    null = np.concatenate([sums.sum() - 2.0 * (flips @ sums) for flips in blocks])
    value = float(sums.sum())
    return SignFlipResult(value, permutation_p(value, null, side), null)


def pearson(x: Numbers, y: Numbers) -> float:
    """Return the Pearson correlation of two samples, or NaN where it is undefined (one pair, or a constant side).

    Raises:
        SpecError: The lengths differ.
        NumericalError: A value is not finite.

    Example:
        >>> round(pearson([1, 2, 3], [1, 2, 4]), 3)
        0.982
    """
    return float(_pearson_rows(*(side[None] for side in _pair(x, y)))[0])


def spearman(x: Numbers, y: Numbers) -> float:
    """Return the Spearman rank correlation: the Pearson correlation of the ranks, ties sharing their mean rank.

    Example:
        >>> spearman([1, 2, 3, 4], [1, 4, 9, 16])
        1.0
    """
    return float(_pearson_rows(*(_ranks(side[None]) for side in _pair(x, y)))[0])


def correlation_interval(
    x: Numbers,
    y: Numbers,
    kind: Literal["pearson", "spearman"] = "pearson",
    level: float = 0.95,
    n_boot: int = 2000,
    seed: int = 0,
    groups: Sequence[Hashable] | None = None,
) -> Interval:
    """Return the bootstrap interval of a correlation, resampling pairs (or whole groups of pairs).

    Resamples in which one side is constant have no correlation and are left out.

    Raises:
        SpecError: The lengths differ, there are fewer than three pairs, or `kind` is unknown.
        NumericalError: A value is not finite, or the correlation of the sample is undefined.
    """
    if kind not in ("pearson", "spearman"):
        raise SpecError(f"kind is {kind!r}; valid: 'pearson', 'spearman'", "kind")
    pairs = np.stack(_pair(x, y), axis=1)
    if len(pairs) < 3:
        raise SpecError(f"the interval of a correlation needs at least three pairs, got {len(pairs)}", "x")
    rank = _ranks if kind == "spearman" else (lambda rows: rows)

    def batch(index: Int[np.ndarray, "draws n"]) -> Float[np.ndarray, " draws"]:
        return _pearson_rows(rank(pairs[index, 0]), rank(pairs[index, 1]))

    def statistic(rows: np.ndarray) -> float:
        return float(_pearson_rows(rank(rows[None, :, 0]), rank(rows[None, :, 1]))[0])

    return _bca(pairs, statistic, batch, level, n_boot, numpy_stream(seed, "bootstrap", kind), groups)


def holm(p_values: Numbers) -> Float[np.ndarray, " tests"]:
    """Return Holm's adjusted p-values: `max_{j <= i} min(1, (m - j + 1) p_(j))`.

    They bound the family-wise error under any dependence.

    Raises:
        SpecError: A p-value lies outside [0, 1].

    Example:
        >>> holm([0.01, 0.04, 0.03]).round(4).tolist()
        [0.03, 0.06, 0.06]
    """
    p = _p_values(p_values)
    order = np.argsort(p, kind="stable")
    adjusted = np.empty_like(p)
    adjusted[order] = np.minimum(1.0, np.maximum.accumulate(np.arange(p.size, 0, -1) * p[order])) if p.size else p
    return adjusted


def benjamini_hochberg(p_values: Numbers) -> Float[np.ndarray, " tests"]:
    """Return Benjamini-Hochberg adjusted p-values: `min_{j >= i} min(1, m p_(j) / j)`; false discovery rate.

    Holds for independent or positively dependent tests.

    Raises:
        SpecError: A p-value lies outside [0, 1].

    Example:
        >>> benjamini_hochberg([0.01, 0.04, 0.03]).round(4).tolist()
        [0.03, 0.04, 0.04]
    """
    p = _p_values(p_values)
    order = np.argsort(p, kind="stable")[::-1]
    adjusted = np.empty_like(p)
    adjusted[order] = np.minimum(1.0, np.minimum.accumulate(p[order] * p.size / np.arange(p.size, 0, -1)))
    return adjusted


# --- resampling ----------------------------------------------------------------------------------------------------

_Batch = Callable[[np.ndarray], np.ndarray]


def _bca(
    data: np.ndarray,
    statistic: Statistic,
    batch: _Batch | None,
    level: float,
    n_boot: int,
    rng: np.random.Generator,
    groups: Sequence[Hashable] | None,
) -> Interval:
    """The BCa interval; `batch`, when given, is `statistic` on many index rows of equal length at once."""
    _check_level(level)
    if n_boot < 100:
        raise SpecError(f"n_boot is {n_boot}; a bootstrap interval needs at least 100 resamples", "n_boot")
    units = _units(len(data), groups)
    m = len(units)
    if m < 2:
        name = "values" if groups is None else "groups"
        advice = "" if groups is None else ": bring more groups, or hold out more of them"
        raise SpecError(f"an interval needs at least two {name}, got {m}{advice}", name)
    value = float(statistic(data))
    if not math.isfinite(value):
        raise NumericalError(f"the statistic of the sample is {value}; an interval needs a finite one")
    even = len({rows.size for rows in units}) == 1
    draws = _even_draws(units, batch, n_boot, rng) if batch and even else _draws(data, units, statistic, n_boot, rng)
    draws = draws[np.isfinite(draws)]
    method = "BCa bootstrap" + ("" if groups is None else f" over {m} groups")
    if draws.size < n_boot / 2:
        raise NumericalError(
            f"the statistic is finite in only {draws.size} of {n_boot} resamples: no interval; give more values or "
            "groups"
        )
    left_out = _jackknife(data, units, statistic)
    if left_out.size < 2:
        raise NumericalError(
            f"without one of the {m} {'values' if groups is None else 'groups'}, the statistic is finite "
            f"{left_out.size} times: no interval; give more of them"
        )
    low, high = np.quantile(draws, _bca_levels(value, draws, left_out, level, m))
    return Interval(low=low, high=high, level=level, method=method)


def _bca_levels(value: float, draws: np.ndarray, left_out: np.ndarray, level: float, units: int) -> list[float]:
    from scipy.special import stdtrit

    m = min(units, _JACKKNIFE)
    below = (np.sum(draws < value) + 0.5 * np.sum(draws == value)) / draws.size
    z0 = _NORMAL.inv_cdf(float(np.clip(below, 0.5 / draws.size, 1 - 0.5 / draws.size)))
    pull = np.mean(left_out) - left_out
    spread = np.sum(pull**2)
    a = float(np.sum(pull**3) / (6 * spread**1.5)) if spread > 0 else 0.0
    z = float(stdtrit(m - 1, 0.5 + level / 2)) * math.sqrt(m / (m - 1))
    levels = []
    for end in (z0 - z, z0 + z):
        scale = 1 - a * end
        # Past its pole the formula turns round; the end of the distribution is what it was heading for.
        levels.append(_NORMAL.cdf(z0 + end / scale) if scale > 1e-6 else float(end > 0))
    return levels


def _even_draws(units: list[np.ndarray], batch: _Batch, n_boot: int, rng: np.random.Generator) -> np.ndarray:
    table = np.stack(units)
    size = max(1, _BLOCK // table.size)
    picks = [(len(table), min(size, n_boot - start)) for start in range(0, n_boot, size)]
    return np.concatenate([batch(table[rng.integers(m, size=(k, m))].reshape(k, -1)) for m, k in picks])


def _draws(
    data: np.ndarray, units: list[np.ndarray], statistic: Statistic, n_boot: int, rng: np.random.Generator
) -> np.ndarray:
    m = len(units)
    if data.ndim == 1 and statistic is np.mean:  # the mean of a resample of uneven groups: sums over counts
        sums, counts = np.array([data[rows].sum() for rows in units]), np.array([rows.size for rows in units])
        blocks = np.array_split(np.arange(n_boot), max(1, n_boot * m // _BLOCK))
        picks = [rng.integers(m, size=(block.size, m)) for block in blocks if block.size]
        return np.concatenate([sums[pick].sum(1) / counts[pick].sum(1) for pick in picks])
    rows_of = (np.concatenate([units[i] for i in rng.integers(m, size=m)]) for _ in range(n_boot))
    return np.array([float(statistic(data[rows])) for rows in rows_of])


def _jackknife(data: np.ndarray, units: list[np.ndarray], statistic: Statistic) -> np.ndarray:
    """The statistic without each unit; without blocks of units where there are many (the skew is the same)."""
    blocks = np.array_split(np.arange(len(units)), min(len(units), _JACKKNIFE))
    out = np.empty(len(blocks))
    keep = np.ones(len(data), dtype=bool)
    for i, block in enumerate(blocks):
        rows = np.concatenate([units[j] for j in block])
        keep[rows] = False
        out[i] = statistic(data[keep])
        keep[rows] = True
    return out[np.isfinite(out)]


def _units(n: int, groups: Sequence[Hashable] | None) -> list[np.ndarray]:
    """The row numbers of each group, in order of first appearance; one row each without groups."""
    if groups is None:
        return list(np.arange(n)[:, None])
    if len(groups) != n:
        raise SpecError(f"groups has {len(groups)} labels for {n} values; it needs one a value", "groups")
    return list(group_rows(groups).values())


def group_rows(groups: Sequence[Hashable]) -> dict[Hashable, Int[np.ndarray, " members"]]:
    """Return the row numbers of each group, in order of first appearance.

    Raises:
        SpecError: A group is NaN, which equals nothing, so that each such row would be a group of its own; or is no
            single label.

    Example:
        >>> {group: rows.tolist() for group, rows in group_rows(["a", "b", "a"]).items()}
        {'a': [0, 2], 'b': [1]}
    """
    rows: dict[Hashable, list[int]] = {}
    for i, label in enumerate(groups):
        try:
            if isinstance(label, float | np.floating) and label != label:
                raise SpecError(f"the group of row {i} is NaN; name it, or leave the row out", "groups")
            rows.setdefault(label, []).append(i)
        except TypeError as error:
            raise SpecError(f"the group of row {i} is {label!r}; a group is one label a row", "groups") from error
    return {label: np.array(members) for label, members in rows.items()}


def _all_patterns(m: int) -> Iterator[np.ndarray]:
    size = max(1, _BLOCK // m)
    for start in range(1, 2**m, size):  # pattern 0 flips nothing: it is the observed value
        numbers = np.arange(start, min(2**m, start + size), dtype=np.int64)
        yield ((numbers[:, None] >> np.arange(m)) & 1).astype(np.float64)


def _random_patterns(m: int, n: int, rng: np.random.Generator) -> Iterator[np.ndarray]:
    size = max(1, _BLOCK // m)
    for start in range(0, n, size):
        yield rng.integers(0, 2, size=(min(size, n - start), m), dtype=np.int8).astype(np.float64)


# --- small parts ---------------------------------------------------------------------------------------------------


def _pearson_rows(x: Float[np.ndarray, "rows n"], y: Float[np.ndarray, "rows n"]) -> Float[np.ndarray, " rows"]:
    if x.shape[1] < 2:
        return np.full(len(x), np.nan)
    # Divide by the largest size first, so that squares neither overflow nor vanish.
    x, y = (side - side.mean(axis=1, keepdims=True) for side in (x, y))
    scale_x, scale_y = (np.abs(side).max(axis=1, keepdims=True) for side in (x, y))
    with np.errstate(invalid="ignore", divide="ignore"):
        x, y = x / scale_x, y / scale_y
        r = np.sum(x * y, axis=1) / np.sqrt(np.sum(x * x, axis=1) * np.sum(y * y, axis=1))
    return np.asarray(np.clip(r, -1.0, 1.0))


def _ranks(rows: Float[np.ndarray, "rows n"]) -> Float[np.ndarray, "rows n"]:
    from scipy.stats import rankdata

    return np.asarray(rankdata(rows, axis=1), dtype=np.float64)


def _pair(x: Numbers, y: Numbers) -> tuple[np.ndarray, np.ndarray]:
    a, b = _finite(x, "x", min_ndim=1).ravel(), _finite(y, "y", min_ndim=1).ravel()
    if a.size != b.size:
        raise SpecError(f"x has {a.size} values and y has {b.size}; a correlation needs pairs", "y")
    return a, b


def _p_values(values: Numbers) -> np.ndarray:
    p = np.asarray(values, dtype=np.float64).ravel()
    if not np.all((p >= 0) & (p <= 1)):
        raise SpecError(f"p-values must lie in [0, 1], got {p[~((p >= 0) & (p <= 1))].tolist()}", "p_values")
    return p


def _finite(values: Numbers, what: str, min_ndim: int = 0) -> np.ndarray:
    given: Any = values
    if hasattr(given, "detach"):  # a tensor, in any precision
        given = given.detach().to("cpu").double().numpy()
    try:
        data = np.array(given, dtype=np.float64, ndmin=min_ndim)
    except (TypeError, ValueError) as error:
        raise SpecError(f"{what} must be numbers: {error}", what) from error
    bad = int(np.sum(~np.isfinite(data)))
    if bad:
        raise NumericalError(f"{what}: {bad} of {data.size} numbers are NaN or infinite")
    return data


def _check_level(level: float) -> None:
    if not 0 < level < 1:
        raise SpecError(f"level is {level!r}; an interval's coverage lies between 0 and 1, such as 0.95", "level")
