"""The word that follows from an estimate and its controls."""

from __future__ import annotations

import math

import numpy as np
import pytest

from assay.base.errors import FindingError, SpecError
from assay.base.findings import Control
from assay.base.stats import Interval
from assay.controls import compare, verdict

AROUND_ZERO = tuple(np.linspace(-1, 1, 99))
AROUND_FOUR = tuple(np.linspace(3, 5, 99))
ABOVE_ZERO = Interval(low=0.5, high=4.0)
ACROSS_ZERO = Interval(low=-0.5, high=4.0)


def control(null, estimate=2.0, side="greater"):
    return compare("c", "a control", estimate, null, side)


def test_compare_places_the_estimate():
    made = compare("random sets", "same size", 0.35, [0.1, 0.2, 0.3, 0.4], "greater")
    assert (made.p, made.place, made.null) == (pytest.approx(0.4), 75.0, (0.1, 0.2, 0.3, 0.4))
    assert compare("c", "", 0.35, [0.1, 0.2, 0.3, 0.4], "less").p == pytest.approx(0.8)
    assert compare("c", "", 0.35, np.array([[0.1, 0.2], [0.3, 0.4]])).null == made.null


def test_without_draws_or_an_estimate_a_control_only_describes():
    assert compare("c", "", 1.0, []).p is None
    described = compare("c", "", math.nan, [0.0, 1.0])
    assert (described.p, described.place) == (None, None)


def test_a_draw_that_is_not_finite_is_refused():
    with pytest.raises(FindingError, match="1 of 2 draws"):
        compare("c", "", 1.0, [0.0, math.nan])


@pytest.mark.parametrize(
    ("estimate", "nulls", "interval", "side", "expected"),
    [
        (2.0, [AROUND_ZERO], None, "greater", "supported"),
        (2.0, [AROUND_ZERO], ABOVE_ZERO, "greater", "supported"),
        (2.0, [AROUND_ZERO], ACROSS_ZERO, "greater", "not distinguishable from control"),
        (0.5, [AROUND_ZERO], ABOVE_ZERO, "greater", "not distinguishable from control"),
        (-2.0, [AROUND_ZERO], None, "greater", "contradicted"),
        (-2.0, [AROUND_ZERO], Interval(low=-3, high=-1), "greater", "contradicted"),
        (2.0, [AROUND_FOUR], ABOVE_ZERO, "greater", "contradicted"),  # positive, and yet less than chance gives
        (-2.0, [AROUND_ZERO], Interval(low=-3, high=-1), "less", "supported"),
        (-2.0, [AROUND_ZERO], ACROSS_ZERO, "less", "not distinguishable from control"),
        (2.0, [AROUND_ZERO], None, "less", "contradicted"),
        (2.0, [AROUND_ZERO], None, "two", "supported"),
        (-2.0, [AROUND_ZERO], None, "two", "supported"),
        (-2.0, [AROUND_ZERO], ACROSS_ZERO, "two", "not distinguishable from control"),
        (0.0, [AROUND_ZERO], None, "two", "not distinguishable from control"),
        (2.0, [AROUND_ZERO, AROUND_FOUR], None, "greater", "not distinguishable from control"),  # beats one of two
        (6.0, [AROUND_ZERO, AROUND_FOUR], None, "greater", "supported"),
        (-6.0, [AROUND_ZERO, AROUND_FOUR], None, "greater", "contradicted"),
    ],
)
def test_the_word_for_each_case(estimate, nulls, interval, side, expected):
    controls = [control(null, estimate) for null in nulls]
    assert verdict(estimate, controls, interval, claim_side=side) == expected


@pytest.mark.parametrize("estimate", [math.nan, math.inf, -math.inf])
def test_an_estimate_that_is_not_finite_is_not_testable(estimate):
    assert verdict(estimate, [control(AROUND_ZERO)]) == "not testable"


def test_too_few_draws_are_not_testable_at_any_estimate():
    nineteen, eighteen = np.zeros(19), np.zeros(18)
    assert verdict(9.0, [control(eighteen)]) == "not testable"
    assert verdict(9.0, [control(nineteen)]) == "supported"
    assert verdict(9.0, [control(eighteen)], alpha=0.1) == "supported"
    assert verdict(9.0, [control(nineteen)], claim_side="two") == "not testable"  # 2/20
    assert verdict(9.0, [control(np.zeros(39))], claim_side="two") == "supported"
    assert verdict(9.0, []) == "not testable"


def test_a_control_that_cannot_be_tested_does_not_count():
    small, described = control(AROUND_FOUR[:5]), Control(name="c", description="", null=AROUND_FOUR)
    assert verdict(2.0, [control(AROUND_ZERO), small, described]) == "supported"
    assert verdict(2.0, [described]) == "not testable"


def test_the_side_of_the_claim_decides_not_the_side_of_the_control():
    assert verdict(-2.0, [control(AROUND_ZERO, -2.0, "less")], claim_side="greater") == "contradicted"


def test_no_effect_is_called_supported_at_most_as_often_as_alpha():
    rng = np.random.default_rng(0)
    words = []
    for _ in range(1500):
        estimate, *nulls = rng.normal(size=1), rng.normal(size=39), rng.normal(size=39)
        words.append(verdict(float(estimate[0]), [control(null, float(estimate[0])) for null in nulls]))
    supported, contradicted = np.mean([w == "supported" for w in words]), np.mean([w == "contradicted" for w in words])
    assert 0.002 < supported < 0.05
    assert 0.002 < contradicted < 0.05


@pytest.mark.parametrize(("change", "message"), [({"alpha": 0.0}, "alpha is 0.0"), ({"alpha": 5.0}, "alpha is 5")])
def test_a_level_outside_its_range_is_refused(change, message):
    with pytest.raises(SpecError, match=message):
        verdict(1.0, [control(AROUND_ZERO)], **change)
