"""The null of the largest of many statistics: what the best of 300 heads looks like when none of them matters."""

from __future__ import annotations

import numpy as np
from jaxtyping import Float

from assay.base.errors import NumericalError, SpecError
from assay.base.stats import Numbers, Side, permutation_p


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
        together = np.vstack([observed, table])
        sd = together.std(axis=0)
        together = (together - together.mean(axis=0)) / np.where(sd > 0, sd, 1.0)
        observed, table = together[0], together[1:]
    null = max_null(table, side)
    points, one_sided = (np.abs(observed), "greater") if side == "two" else (observed, side)
    return np.array([permutation_p(point, null, one_sided) for point in points])  # type: ignore[arg-type]
