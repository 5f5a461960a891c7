"""Intervals cover, p-values are uniform, corrections equal the published ones."""

from __future__ import annotations

import itertools
import math

import numpy as np
import pytest
import scipy.stats
from hypothesis import given
from hypothesis import strategies as st

from assay.base.errors import NumericalError, SpecError
from assay.base.stats import (
    Interval,
    benjamini_hochberg,
    bootstrap_interval,
    correlation_interval,
    holm,
    pearson,
    permutation_p,
    sign_flip_test,
    spearman,
)

P_VALUES = st.lists(st.floats(0, 1), min_size=1, max_size=30)


def coverage(truth, sample, interval, n=400):
    return sum(truth in interval(sample(np.random.default_rng(i)), i) for i in range(n)) / n


# Nominal 0.95. Over 400 samples the standard error is 0.011; the bounds are the measured coverage within 3 of it.
@pytest.mark.parametrize(
    ("sample", "truth", "low"),
    [
        (lambda rng: rng.normal(size=16), 0.0, 0.92),
        (lambda rng: rng.normal(size=50), 0.0, 0.92),
        (lambda rng: rng.exponential(size=16), 1.0, 0.89),
        (lambda rng: rng.exponential(size=100), 1.0, 0.91),
    ],
    ids=["normal 16", "normal 50", "exponential 16", "exponential 100"],
)
def test_the_bootstrap_interval_of_a_mean_covers_as_often_as_it_says(sample, truth, low):
    rate = coverage(truth, sample, lambda values, i: bootstrap_interval(values, n_boot=1000, seed=i))
    assert low < rate < 0.985


def test_the_bootstrap_interval_of_a_median_covers_as_often_as_it_says():
    rate = coverage(
        math.log(2),
        lambda rng: rng.exponential(size=40),
        lambda values, i: bootstrap_interval(values, np.median, n_boot=1000, seed=i),
    )
    assert 0.92 < rate < 0.985


def clustered(rng):
    sizes = rng.integers(1, 6, size=12)
    labels = np.repeat(np.arange(12), sizes)
    return rng.normal(size=12)[labels] + 0.3 * rng.normal(size=labels.size), labels.tolist()


def test_only_resampling_groups_covers_when_values_share_groups():
    by_group = coverage(0.0, clustered, lambda s, i: bootstrap_interval(s[0], groups=s[1], n_boot=500, seed=i))
    by_row = coverage(0.0, clustered, lambda s, i: bootstrap_interval(s[0], n_boot=500, seed=i))
    assert 0.91 < by_group < 0.985
    assert by_row < 0.8


def test_the_level_sets_the_coverage():
    rate = coverage(
        0.0, lambda rng: rng.normal(size=30), lambda v, i: bootstrap_interval(v, level=0.5, n_boot=500, seed=i)
    )
    assert 0.42 < rate < 0.58


def test_for_normal_values_the_interval_is_students():
    ratios = []
    for i in range(40):
        values = np.random.default_rng(i).normal(size=8)
        interval = bootstrap_interval(values, n_boot=4000, seed=i)
        student = scipy.stats.t.interval(0.95, 7, values.mean(), values.std(ddof=1) / math.sqrt(8))
        ratios.append((interval.high - interval.low) / (student[1] - student[0]))
    assert np.mean(ratios) == pytest.approx(1, abs=0.03)  # 0.94 without the factor sqrt(n / (n - 1))
    assert (interval.level, interval.method) == (0.95, "BCa bootstrap")


def theirs(values, i):
    found = scipy.stats.bootstrap(
        (values,), np.mean, n_resamples=4000, rng=np.random.default_rng(i)
    ).confidence_interval
    return found.low, found.high


def test_for_many_values_the_interval_is_scipys_bca():
    values = np.random.default_rng(1).exponential(size=400)
    interval = bootstrap_interval(values, n_boot=4000)
    low, high = theirs(values, 2)
    assert interval.low == pytest.approx(low, abs=0.06 * (high - low))
    assert interval.high == pytest.approx(high, abs=0.06 * (high - low))


def test_for_skewed_values_the_interval_leans_as_far_as_scipys_bca():
    leans: dict[str, list[float]] = {"ours": [], "theirs": []}
    for i in range(30):
        values = np.random.default_rng(i).exponential(size=80)
        interval = bootstrap_interval(values, n_boot=4000, seed=i)
        for name, (low, high) in {"ours": (interval.low, interval.high), "theirs": theirs(values, i)}.items():
            leans[name].append((high - values.mean()) / (values.mean() - low))
    assert np.mean(leans["theirs"]) > 1.3
    assert np.mean(leans["ours"]) == pytest.approx(np.mean(leans["theirs"]), abs=0.06)


def test_the_ways_to_compute_a_mean_interval_agree():
    values = np.random.default_rng(3).exponential(size=60)
    fast = bootstrap_interval(values, n_boot=4000)
    any_statistic = bootstrap_interval(values, lambda v: float(np.mean(v)), n_boot=4000)
    even_groups = bootstrap_interval(np.repeat(values, 2), groups=np.repeat(np.arange(60), 2).tolist(), n_boot=4000)
    for other in (any_statistic, even_groups):
        assert other.low == pytest.approx(fast.low, abs=0.03)
        assert other.high == pytest.approx(fast.high, abs=0.03)
    uneven = np.repeat(np.arange(24), [1, 4] * 12).tolist()
    sums = bootstrap_interval(values, groups=uneven, n_boot=4000)
    loop = bootstrap_interval(values, lambda v: float(np.mean(v)), groups=uneven, n_boot=4000)
    assert sums.low == pytest.approx(loop.low, abs=0.04)
    assert sums.high == pytest.approx(loop.high, abs=0.04)


def test_intervals_follow_their_seed_and_scale_with_their_values():
    values = np.random.default_rng(4).normal(size=20)
    assert bootstrap_interval(values, seed=1) == bootstrap_interval(values, seed=1)
    assert bootstrap_interval(values, seed=1) != bootstrap_interval(values, seed=2)
    moved = bootstrap_interval(3 * values + 100, seed=1)
    still = bootstrap_interval(values, seed=1)
    assert moved.low == pytest.approx(3 * still.low + 100)
    assert moved.high == pytest.approx(3 * still.high + 100)


def test_the_interval_of_equal_values_is_a_point():
    for statistic in (np.mean, np.median, np.max):
        interval = bootstrap_interval([0.1] * 7, statistic)
        assert (interval.low, interval.high) == pytest.approx((0.1, 0.1))


def test_many_values_are_resampled_in_pieces():
    values = np.random.default_rng(5).normal(size=30_000)  # 2000 x 30000 numbers would not be held at once
    interval = bootstrap_interval(values, n_boot=400)
    assert values.mean() in interval
    assert interval.high - interval.low == pytest.approx(2 * 1.96 / math.sqrt(30_000), rel=0.15)


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda: bootstrap_interval([1.0]), SpecError, "at least two values, got 1"),
        (lambda: bootstrap_interval([1.0, 2.0], groups=["a", "a"]), SpecError, "at least two groups, got 1"),
        (lambda: bootstrap_interval([1.0, 2.0], groups=["a"]), SpecError, "groups has 1 labels for 2 values"),
        (lambda: bootstrap_interval([1.0, math.nan]), NumericalError, "1 of 2 numbers are NaN or infinite"),
        (lambda: bootstrap_interval([1.0, 2.0], level=95), SpecError, "level is 95"),
        (lambda: bootstrap_interval([1.0, 2.0], n_boot=10), SpecError, "n_boot is 10"),
        (lambda: bootstrap_interval([1.0, 2.0], lambda v: math.nan), NumericalError, "statistic of the sample is nan"),
        (lambda: permutation_p(1.0, []), SpecError, "at least one draw"),
        (lambda: permutation_p(1.0, [0.0, math.inf]), NumericalError, "null: 1 of 2"),
        (lambda: permutation_p(math.nan, [0.0]), NumericalError, "value: 1 of 1"),
        (lambda: permutation_p(1.0, [0.0], side="both"), SpecError, "'both'; valid: 'greater', 'less', 'two'"),
        (lambda: sign_flip_test([]), SpecError, "at least one value"),
        (lambda: pearson([1, 2], [1, 2, 3]), SpecError, "x has 2 values and y has 3"),
        (lambda: correlation_interval([1, 2], [1, 2]), SpecError, "at least three pairs, got 2"),
        (lambda: correlation_interval([1, 2, 3], [1, 2, 3], kind="kendall"), SpecError, "'kendall'"),
        (lambda: correlation_interval([1, 1, 1], [1, 2, 3]), NumericalError, "statistic of the sample is nan"),
        (lambda: holm([0.5, 1.5]), SpecError, "got [1.5]"),
        (lambda: benjamini_hochberg([math.nan]), SpecError, "got [nan]"),
        (lambda: Interval(low=1.0, high=0.0), NumericalError, "low <= high"),
        (lambda: Interval(low=math.nan, high=0.0), NumericalError, "finite ends"),
        (lambda: Interval(low=0.0, high=1.0, level=1.0), SpecError, "level is 1.0"),
    ],
)
def test_bad_input_is_quoted(call, error, message):
    with pytest.raises(error) as caught:
        call()
    assert message in str(caught.value)


def test_an_interval_knows_what_it_excludes_and_survives_json():
    interval = Interval(low=-1, high=2, level=0.9, method="by hand")
    assert 0 in interval
    assert 2.0 in interval
    assert not interval.excludes(0.0)
    assert interval.excludes(2.1)
    assert Interval.from_dict(interval.to_dict()) == interval


# --- p-values ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("value", "side", "p"),
    [
        (2.5, "greater", 3 / 5),
        (2.5, "less", 3 / 5),
        (9, "greater", 1 / 5),
        (9, "less", 1.0),
        (9, "two", 2 / 5),
        (2.0, "greater", 4 / 5),
        (2.0, "less", 3 / 5),
        (2.5, "two", 1.0),
    ],
)
def test_p_counts_the_draws_and_itself(value, side, p):
    assert permutation_p(value, [1, 2, 3, 4], side) == pytest.approx(p)


def test_draws_equal_up_to_rounding_are_ties():
    assert permutation_p(0.3, [0.1 + 0.2, 0.0]) == permutation_p(0.1 + 0.2, [0.3, 0.0]) == pytest.approx(2 / 3)


@pytest.mark.parametrize("side", ["greater", "less"])
def test_p_is_uniform_when_the_value_is_a_draw_of_its_null(side):
    rng = np.random.default_rng(0)
    p = [permutation_p(draws[0], draws[1:], side) for draws in rng.normal(size=(2000, 100))]
    assert scipy.stats.kstest(p, np.linspace(0.01, 1, 100).tolist() * 20).pvalue > 0.01
    assert min(p) == pytest.approx(0.01)


def test_a_two_sided_p_keeps_its_level():
    rng = np.random.default_rng(1)
    p = np.array([permutation_p(draws[0], draws[1:], "two") for draws in rng.exponential(size=(4000, 100))])
    for alpha in (0.02, 0.05, 0.1):
        assert np.mean(p <= alpha) == pytest.approx(alpha, abs=3.5 * math.sqrt(alpha / 4000))


def test_the_exact_sign_flip_p_is_that_of_all_patterns():
    values = np.array([0.3, -0.1, 0.7, 0.2, 0.4])
    means = [np.mean(values * signs) for signs in itertools.product([1, -1], repeat=5)]
    result = sign_flip_test(values)
    assert result.value == pytest.approx(values.mean())
    assert sorted(np.append(result.null, result.value)) == pytest.approx(sorted(means))
    assert result.p == pytest.approx(np.mean(np.array(means) >= values.mean() - 1e-12))
    assert sign_flip_test(values, side="less").p == pytest.approx(np.mean(np.array(means) <= values.mean() + 1e-12))


def test_random_sign_flips_agree_with_the_exact_ones_and_are_as_many_as_asked():
    values = np.random.default_rng(2).normal(0.35, 1, size=14)
    exact, drawn = sign_flip_test(values, n=2**14), sign_flip_test(values, n=9999)
    assert (exact.null.size, drawn.null.size) == (2**14 - 1, 9999)
    assert 0.01 < exact.p < 0.3
    assert drawn.p == pytest.approx(exact.p, abs=0.015)


def test_sign_flip_p_is_uniform_without_an_effect_and_small_with_one():
    rng = np.random.default_rng(3)
    p = [sign_flip_test(rng.standard_t(3, size=20), n=199, seed=i).p for i in range(600)]
    assert scipy.stats.kstest(p, np.linspace(0.005, 1, 200).tolist()).pvalue > 0.01
    assert sign_flip_test(rng.normal(2, 1, size=20), n=999).p == pytest.approx(0.001)


def test_groups_flip_whole():
    values, groups = [1.0, 3.0, 2.0, 2.0], ["a", "a", "b", "c"]
    result = sign_flip_test(values, groups=groups)
    assert sorted(result.null) == pytest.approx(sorted([0.0, 1.0, 1.0, -1.0, -1.0, 0.0, -2.0]))
    rng = np.random.default_rng(4)
    rates = {}
    for kind in ("rows", "groups"):
        samples = [clustered(rng) for _ in range(300)]
        p = [
            sign_flip_test(v, n=199, seed=i, groups=g if kind == "groups" else None).p
            for i, (v, g) in enumerate(samples)
        ]
        rates[kind] = np.mean(np.array(p) <= 0.05)
    assert rates["groups"] < 0.09
    assert rates["rows"] > 0.12


# --- correlations -----------------------------------------------------------------------------------------------------


def test_correlations_equal_scipys():
    rng = np.random.default_rng(5)
    x, y = rng.normal(size=40), rng.integers(0, 5, size=40).astype(float)  # with ties
    assert pearson(x, y) == pytest.approx(scipy.stats.pearsonr(x, y).statistic, abs=1e-12)
    assert spearman(x, y) == pytest.approx(scipy.stats.spearmanr(x, y).statistic, abs=1e-12)


@given(st.sampled_from([1e-250, 1e-9, 1.0, 1e9, 1e250]), st.floats(-1e3, 1e3))
def test_a_correlation_does_not_depend_on_units(scale, shift):
    x, y = np.array([1.0, 2.0, 4.0, 3.0]), np.array([2.0, 1.0, 5.0, 4.0])
    assert pearson(scale * x, y + shift) == pytest.approx(pearson(x, y), abs=1e-9)
    assert spearman(scale * x, y) == spearman(x, y)


@pytest.mark.parametrize(("x", "y"), [([1.0], [2.0]), ([1, 1, 1], [1, 2, 3]), ([], [])])
def test_a_correlation_that_is_not_defined_is_nan(x, y):
    assert math.isnan(pearson(x, y))


@pytest.mark.parametrize("kind", ["pearson", "spearman"])
def test_the_interval_of_a_correlation_covers(kind):
    truth = 0.6 if kind == "pearson" else 6 / math.pi * math.asin(0.3)

    def sample(rng):
        x = rng.normal(size=40)
        return x, 0.6 * x + 0.8 * rng.normal(size=40)

    rate = coverage(truth, sample, lambda s, i: correlation_interval(*s, kind, n_boot=400, seed=i), n=250)
    assert 0.90 < rate < 0.99


def test_the_interval_of_a_correlation_can_resample_groups():
    rng = np.random.default_rng(6)
    labels = np.repeat(np.arange(10), 8)
    x, y = rng.normal(size=10)[labels], rng.normal(size=10)[labels]
    by_row, by_group = correlation_interval(x, y), correlation_interval(x, y, groups=labels.tolist())
    assert by_group.high - by_group.low > 1.5 * (by_row.high - by_row.low)
    assert by_group.method == "BCa bootstrap over 10 groups"


# --- multiplicity -----------------------------------------------------------------------------------------------------


def test_holm_equals_the_worked_example():
    """Holm 1979 step-down by hand: 4 x .005, 3 x .01, then the running maximum of 2 x .03 and 1 x .04."""
    assert holm([0.01, 0.04, 0.03, 0.005]) == pytest.approx([0.03, 0.06, 0.06, 0.02])


@given(P_VALUES)
def test_benjamini_hochberg_equals_scipys(p):
    assert benjamini_hochberg(p) == pytest.approx(scipy.stats.false_discovery_control(p))


@given(P_VALUES)
def test_holm_rejects_what_the_step_down_procedure_rejects(p):
    order = np.argsort(p, kind="stable")
    rejected = np.zeros(len(p), dtype=bool)
    for rank, i in enumerate(order):
        if p[i] * (len(p) - rank) > 0.05:
            break
        rejected[i] = True
    assert ((holm(p) <= 0.05) == rejected).all()


@given(P_VALUES)
def test_corrections_keep_the_order_and_only_raise(p):
    for adjusted in (holm(p), benjamini_hochberg(p)):
        assert (adjusted >= np.array(p) - 1e-12).all()
        assert (adjusted <= 1).all()
        assert (np.diff(adjusted[np.argsort(p, kind="stable")]) >= -1e-12).all()
    assert (benjamini_hochberg(p) <= holm(p) + 1e-12).all()


def test_no_tests_need_no_correction():
    assert holm([]).size == benjamini_hochberg([]).size == 0
