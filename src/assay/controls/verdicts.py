"""An estimate against its controls, and the one word that follows."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from typing import get_args

import numpy as np

from assay.base.errors import SpecError
from assay.base.findings import Control, Verdict
from assay.base.stats import Interval, Numbers, Side, permutation_p


def compare(name: str, description: str, estimate: float, null: Numbers, side: Side = "greater") -> Control:
    """Return a control: the null, the estimate's p-value under it, and its place in it.

    p is None, and the control only describes, when there are no draws or the estimate is not finite.

    Args:
        name: A short name, such as "random sets".
        description: What was destroyed and what was kept.
        estimate: The estimate under test.
        null: The same estimate in each draw of the control.
        side: The direction of the claim.

    Raises:
        FindingError: A draw is not finite.

    Example:
        >>> control = compare("random sets", "as many heads and MLPs", 0.9, [0.1, 0.3, 0.2, 0.4])
        >>> control.p, control.place
        (0.2, 100.0)
    """
    draws = tuple(float(value) for value in np.asarray(null, dtype=np.float64).ravel())
    control = Control(name=name, description=description, null=draws, side=side)
    if not draws or not math.isfinite(estimate):
        return control
    p = permutation_p(estimate, draws, side)
    return Control(name=name, description=description, null=draws, p=p, side=side).placed(estimate)


def verdict(
    estimate: float,
    controls: Sequence[Control],
    interval: Interval | None = None,
    alpha: float = 0.05,
    claim_side: Side = "greater",
) -> Verdict:
    """Return what the controls say about a claim.

    - "not testable": the estimate is not finite, or no control has draws enough for p <= alpha (`min_p` > alpha; 19
      draws are the least for 0.05). A control without a p only describes and does not count.
    - "supported": p <= alpha under *every* testable control, on the claimed side, and the interval, if there is one,
      lies beyond 0 on that side (excludes 0, for a two-sided claim).
    - "contradicted": p <= alpha under every testable control on the *opposite* side.
    - "not distinguishable from control": anything else.

    No correction for the number of controls is needed: a claim that must beat all of them is an intersection-union
    test, whose level is alpha if each part has level alpha; a Holm correction would only lose power. Searching over
    many estimates does need one: hold the best of them against `max_null`.

    Args:
        estimate: The number.
        controls: The nulls it was held against.
        interval: Its uncertainty.
        alpha: The level.
        claim_side: The direction of the claim. p-values are taken from the nulls on this side, whatever side the
            control was built with.

    Raises:
        SpecError: alpha or the side is out of range.

    Source: Berger 1982, "Multiparameter hypothesis testing and acceptance sampling" (intersection-union tests).

    Example:
        >>> control = compare("random sets", "same size", 3.0, [0.1 * i for i in range(99)])
        >>> verdict(3.0, [control]), verdict(20.0, [control]), verdict(-20.0, [control]), verdict(20.0, [])
        ('not distinguishable from control', 'supported', 'contradicted', 'not testable')
    """
    if not 0 < alpha < 1:
        raise SpecError(f"alpha is {alpha!r}; a level lies between 0 and 1, such as 0.05", "alpha")
    if claim_side not in get_args(Side):
        raise SpecError(f"claim_side is {claim_side!r}; valid: 'greater', 'less', 'two'", "claim_side")
    share = 2 if claim_side == "two" else 1
    testable = [c for c in controls if c.p is not None and c.null and share / (len(c.null) + 1) <= alpha]
    if not math.isfinite(estimate) or not testable:
        return "not testable"
    if _beats_all(estimate, testable, claim_side, alpha) and _beyond_zero(interval, claim_side):
        return "supported"
    opposite: dict[Side, Side] = {"greater": "less", "less": "greater"}
    if claim_side in opposite and _beats_all(estimate, testable, opposite[claim_side], alpha):
        return "contradicted"
    return "not distinguishable from control"


def _beats_all(estimate: float, controls: Iterable[Control], side: Side, alpha: float) -> bool:
    return all(permutation_p(estimate, control.null, side) <= alpha for control in controls)


def _beyond_zero(interval: Interval | None, side: Side) -> bool:
    if interval is None:
        return True
    return {"greater": interval.low > 0, "less": interval.high < 0, "two": interval.excludes(0.0)}[side]
