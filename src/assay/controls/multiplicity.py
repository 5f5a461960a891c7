"""Many tests at once: the best of 300 heads against the best of 300 heads when none of them matters.

`best_of` is for a search whose winner is reported (family-wise error, max-T); `screen` is for a list of which some
may be wrong (false discovery rate).
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass
from typing import Any, Literal, get_args

import numpy as np
from jaxtyping import Bool, Float

from assay.base.errors import NumericalError, SpecError
from assay.base.findings import Control
from assay.base.rng import numpy_stream
from assay.base.stats import Numbers, Side, benjamini_hochberg, permutation_p
from assay.controls.labels import Scheme, exchange, label_array
from assay.controls.verdicts import compare

ScreenMethod = Literal["auto", "bh", "storey"]
"""How a screen controls the share of false discoveries."""

STOREY_ABOVE = 1000
"""Fewer tests do not say well enough how many of them are null."""


@dataclass(frozen=True, slots=True, kw_only=True)
class BestOf:
    """The outcome of a search over tests.

    Args:
        names: The tests.
        values: The statistic of each on the true labels.
        p: For each, the p-value that allows for the whole family.
        best: The place of the best test.
        null: The best statistic in each permutation, on the scale of `score`.
        score: The best statistic on that scale: the statistic itself; its size on side "two"; in standard deviations
            of its own null where the tests were standardised.
        side: The direction of the claim.
        scheme: How the labels were permuted.
    """

    names: tuple[str, ...]
    values: tuple[float, ...]
    p: tuple[float, ...]
    best: int
    null: tuple[float, ...]
    score: float
    side: Side
    scheme: str

    @property
    def family(self) -> int:
        """How many tests were searched: the number that belongs on the card."""
        return len(self.values)

    @property
    def best_p(self) -> float:
        """The p-value of the best test, the search allowed for."""
        return self.p[self.best]

    @property
    def best_name(self) -> str:
        """The name of the best test."""
        return self.names[self.best]

    def control(self) -> Control:
        """The search as a control of its best test's `score`, with the family's size in its description."""
        one_sided: Side = "greater" if self.side == "two" else self.side
        said = f"labels permuted ({self.scheme}), the best of {self.family} tests chosen again each time"
        return compare("best of permuted labels", said, self.score, self.null, one_sided)


@dataclass(frozen=True, slots=True, kw_only=True)
class Screen:
    """Which of many tests to believe, with at most a share `alpha` of them wrong on average.

    Args:
        q: The p-values adjusted for the false discovery rate, `[tests]`.
        found: Which tests have `q <= alpha`, `[tests]`.
        null_share: The estimated share of tests without an effect; 1 where it is not estimated.
        method: "bh" or "storey".
        alpha: The rate.
    """

    q: Float[np.ndarray, " tests"]
    found: Bool[np.ndarray, " tests"]
    null_share: float
    method: str
    alpha: float

    @property
    def family(self) -> int:
        """How many tests were screened."""
        return len(self.q)


def max_null(draws: Numbers, side: Side = "greater") -> Float[np.ndarray, " draws"]:
    """Return the extreme of each joint draw over all tests: the null of the best of them.

    Held against this null, the best of many statistics has a p-value that allows for the search (family-wise error).
    Because each draw is joint, tests that move together cost no more than one.

    Args:
        draws: Joint draws of all statistics under the null, `[draws, tests]`.
        side: "greater" takes the maximum, "less" the minimum, "two" the largest absolute value.

    Raises:
        SpecError: The shape or the side is wrong.
        NumericalError: A draw is not finite.

    Source: Westfall and Young 1993.

    Example:
        >>> max_null([[1.0, 3.0], [2.0, -5.0]]).tolist(), max_null([[1.0, 3.0], [2.0, -5.0]], side="two").tolist()
        ([3.0, 2.0], [3.0, 5.0])
    """
    table = np.array(draws, dtype=np.float64)
    if table.ndim != 2 or not table.size:
        raise SpecError(f"draws has shape {table.shape}; it must be [draws, tests]", "draws")
    if not np.isfinite(table).all():
        raise NumericalError(f"{int(np.sum(~np.isfinite(table)))} of {table.size} draws are NaN or infinite")
    if side not in ("greater", "less", "two"):
        raise SpecError(f"side is {side!r}; valid: 'greater', 'less', 'two'", "side")
    if side == "two":
        return np.asarray(np.abs(table).max(axis=1))
    return np.asarray(table.max(axis=1) if side == "greater" else table.min(axis=1))


def familywise_p(
    values: Numbers, draws: Numbers, side: Side = "greater", *, standardise: bool = False
) -> Float[np.ndarray, " tests"]:
    """Return a p-value for each test that allows for all of them: its place among the maxima of the joint draws.

    Args:
        values: The observed statistics, `[tests]`.
        draws: Their joint null, `[draws, tests]`.
        side: The direction of the claims; "two" compares absolute values with absolute values.
        standardise: Put the tests on one scale first, by the mean and standard deviation of observation and draws
            together (which keeps the p-values exact). Without it, the test with the widest null decides for all.

    Raises:
        SpecError: The shapes do not fit.
        NumericalError: A number is not finite.

    Example:
        >>> familywise_p([5.0, 1.0], [[0.0, 2.0], [1.0, 0.0], [3.0, 1.0]]).tolist()
        [0.25, 1.0]
    """
    observed, table = np.array(values, dtype=np.float64).ravel(), np.array(draws, dtype=np.float64)
    if table.ndim != 2 or table.shape[1] != observed.size:
        raise SpecError(f"draws has shape {table.shape} for {observed.size} values; it must be [draws, tests]", "draws")
    if standardise:
        together = _standardised(np.vstack([observed, table]))
        observed, table = together[0], together[1:]
    null = max_null(table, side)
    points, one_sided = (np.abs(observed), "greater") if side == "two" else (observed, side)
    return np.array([permutation_p(point, null, one_sided) for point in points])  # type: ignore[arg-type]


def best_of(
    statistics: Callable[[Any, np.ndarray], Numbers],
    X: Any,
    y: Numbers,
    groups: Sequence[Hashable] | None = None,
    n: int = 999,
    seed: int = 0,
    *,
    side: Side = "greater",
    scheme: Scheme = "auto",
    names: Sequence[str] | None = None,
    standardise: bool = False,
) -> BestOf:
    """Test the best of many statistics of (X, y) against the best of them under permuted labels.

    `p_j = (1 + #{b: max_k T_bk >= T_j}) / (n + 1)`: each permutation runs every site, position and method again and
    takes its own best, so the winner's p-value is uniform under the null however many were tried.

    Args:
        statistics: Maps (X, labels) to one number a test, `[tests]`, the whole pipeline of each.
        X: Passed on as it is.
        y: Labels, one a row.
        groups: The group of each row; see `permutation_test` for what may then be exchanged.
        n: Number of random permutations.
        seed: Seed of the stream.
        side: The direction of the claims; "two" compares sizes.
        scheme: What is exchangeable.
        names: The tests' names; their numbers by default.
        standardise: See `familywise_p`.

    Raises:
        SpecError: The lengths differ, no permutation could change the labels, or the number of tests changes.
        NumericalError: A statistic is not finite.

    Source: Westfall and Young 1993, "Resampling-based multiple testing", section 2.3.

    Example:
        >>> rng = np.random.default_rng(0)
        >>> X, y = rng.normal(size=(40, 30)), np.arange(40) % 2
        >>> X[:, 7] += 2 * y
        >>> gaps = lambda X, y: X[y == 1].mean(axis=0) - X[y == 0].mean(axis=0)
        >>> found = best_of(gaps, X, y, n=199)
        >>> found.best_name, found.best_p, found.family
        ('7', 0.005, 30)
    """
    labels = label_array(y)
    if labels.ndim < 1 or not len(labels):
        raise SpecError("a permutation test needs labels, got none", "y")
    if n < 1:
        raise SpecError(f"n is {n}; a permutation test needs at least one permutation", "n")
    chosen, draw = exchange(labels, groups, scheme)
    rng = numpy_stream(seed, "permutation", "best of", chosen)
    values = np.array(statistics(X, labels), dtype=np.float64).ravel()
    if not values.size or not np.isfinite(values).all():
        raise NumericalError(f"{int(np.sum(~np.isfinite(values)))} of {values.size} statistics are not finite")
    if names is not None and len(names) != values.size:
        raise SpecError(f"names has {len(names)} entries for {values.size} tests; it needs one a test", "names")
    table = np.empty((n + 1, values.size))
    table[0] = values
    for row in table[1:]:
        drawn = np.array(statistics(X, labels[draw(rng)]), dtype=np.float64).ravel()
        if drawn.shape != row.shape:
            raise SpecError(f"{values.size} statistics on the true labels and {drawn.size} on others", "statistics")
        row[:] = drawn
    if not np.isfinite(table).all():
        bad = np.flatnonzero(~np.isfinite(table).all(axis=1))
        raise NumericalError(f"a statistic is not finite in {bad.size} of {n} permutations, {bad[0] - 1} first")
    p = familywise_p(values, table[1:], side, standardise=standardise)
    scores = _standardised(table) if standardise else table
    extremes = max_null(scores, side)
    sized = np.abs(scores[0]) if side == "two" else scores[0]
    return BestOf(
        names=tuple(map(str, range(values.size) if names is None else names)),
        values=tuple(values.tolist()),
        p=tuple(p.tolist()),
        best=int(sized.argmin() if side == "less" else sized.argmax()),
        null=tuple(extremes[1:].tolist()),
        score=float(extremes[0]),
        side=side,
        scheme=chosen,
    )


def screen(p_values: Numbers, alpha: float = 0.05, method: ScreenMethod = "auto") -> Screen:
    """Return which of many tests are discoveries, at a false discovery rate of `alpha`.

    Benjamini-Hochberg, `q_(i) = min_{j >= i} m p_(j) / j`; above 1000 tests times Storey's share of nulls,
    `pi0 = min(1, (1 + #{p > 1/2}) / (m / 2))`.

    Args:
        p_values: One a test.
        alpha: The rate.
        method: "bh", "storey", or "auto": Storey above 1000 tests.

    Raises:
        SpecError: A p-value lies outside [0, 1], alpha or the method is unknown, or Storey is asked of too few tests.

    Source: Benjamini and Hochberg 1995; Storey, Taylor and Siegmund 2004, "Strong control, conservative point
    estimation and simultaneous conservative consistency of false discovery rates", section 3.

    Example:
        >>> result = screen([0.001, 0.01, 0.04, 0.9])
        >>> result.found.tolist(), result.method
        ([True, True, False, False], 'bh')
    """
    if method not in get_args(ScreenMethod):
        raise SpecError(f"method is {method!r}; valid: {', '.join(map(repr, get_args(ScreenMethod)))}", "method")
    if not 0 < alpha < 1:
        raise SpecError(f"alpha is {alpha!r}; a rate lies between 0 and 1, such as 0.05", "alpha")
    p = np.array(p_values, dtype=np.float64).ravel()
    if not p.size:
        raise SpecError("a screen needs at least one p-value, got none", "p_values")
    if method == "storey" and p.size <= STOREY_ABOVE:
        raise SpecError(
            f"{p.size} tests are too few to estimate the share of nulls; use 'bh' up to {STOREY_ABOVE}", "method"
        )
    q, share = benjamini_hochberg(p), 1.0
    if method == "storey" or (method == "auto" and p.size > STOREY_ABOVE):
        method, share = "storey", min(1.0, (1 + int(np.sum(p > 0.5))) / (p.size / 2))
    else:
        method = "bh"
    q = np.asarray(q * share)
    return Screen(q=q, found=np.asarray(q <= alpha), null_share=share, method=method, alpha=alpha)


def _standardised(together: Float[np.ndarray, "draws tests"]) -> Float[np.ndarray, "draws tests"]:
    """Each test by the mean and standard deviation of its observation and draws together."""
    sd = together.std(axis=0)
    return np.asarray((together - together.mean(axis=0)) / np.where(sd > 0, sd, 1.0))
