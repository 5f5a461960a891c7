"""Permuted labels give uniform p-values, with selection inside and groups respected."""

from __future__ import annotations

import math
from collections import Counter

import numpy as np
import pytest
import scipy.stats
from hypothesis import given
from hypothesis import strategies as st

from assay.base.errors import NumericalError, SpecError
from assay.controls import control_labels, permutation_test, shuffled

UNIFORM = np.linspace(0.01, 1, 100).tolist()  # what p is distributed as with 99 permutations


def mean_gap(X, y):
    return float(X[y == 1].mean() - X[y == 0].mean())


def best_gap(X, y):
    """Selection inside the statistic: the best of all columns."""
    return float((X[y == 1].mean(axis=0) - X[y == 0].mean(axis=0)).max())


def noise_p(rng, *, grouped=False, per_group=6, statistic=best_gap, vary=False, **options):
    """The p of noise: features and labels that have nothing to do with each other, perhaps shared inside groups."""
    groups = np.repeat(np.arange(12), per_group)
    X = rng.normal(size=(groups.size, 5)) + 2 * rng.normal(size=(12, 5))[groups]
    y = np.array([1, 0] * 6)[groups]
    if vary:  # labels vary inside groups, at rates that differ between groups
        y = (rng.random(groups.size) < np.where(y, 0.8, 0.2)).astype(int)
    labels = groups.tolist() if grouped else None
    return permutation_test(statistic, X, y, labels, n=99, seed=int(rng.integers(1 << 30)), **options).p


def test_p_is_uniform_under_the_null_with_selection_inside():
    rng = np.random.default_rng(0)
    p = [noise_p(rng, per_group=1) for _ in range(500)]
    assert scipy.stats.kstest(p, UNIFORM).pvalue > 0.01


@pytest.mark.parametrize("vary", [False, True], ids=["one label a group", "labels vary inside groups"])
def test_groups_keep_p_uniform_where_rows_share_their_noise(vary):
    rng = np.random.default_rng(1)
    by_group = np.array([noise_p(rng, grouped=True, vary=vary) for _ in range(400)])
    by_row = np.array([noise_p(rng, vary=vary) for _ in range(200)])
    assert scipy.stats.kstest(by_group, UNIFORM).pvalue > 0.01
    assert np.mean(by_row <= 0.05) > 0.15


def test_blocks_of_labels_can_trade_places_among_groups_of_one_size():
    rng = np.random.default_rng(2)
    p = [noise_p(rng, grouped=True, vary=True, scheme="among") for _ in range(300)]
    assert scipy.stats.kstest(p, UNIFORM).pvalue > 0.01


def test_a_real_effect_is_found_under_each_scheme():
    groups = np.repeat(np.arange(12), 6)
    X, inside = np.random.default_rng(3).normal(size=72), np.tile([0, 1], 36)
    among = np.array([1, 0] * 6)[groups]
    assert permutation_test(mean_gap, X + 5 * inside, inside, n=199).p == pytest.approx(1 / 200)
    result = permutation_test(mean_gap, X + 5 * inside, inside, groups.tolist(), n=199)
    assert (result.p, result.scheme) == (pytest.approx(1 / 200), "within")
    result = permutation_test(mean_gap, X + 5 * among, among, groups.tolist(), n=199)
    assert (result.p, result.scheme) == (pytest.approx(1 / 200), "among")


def recorded_labels(y, groups, **options):
    seen = []

    def statistic(X, labels):
        seen.append(np.array(labels))
        return 0.0

    permutation_test(statistic, None, y, groups, n=50, **options)
    assert np.array_equal(seen[0], y)
    return seen[1:]


@given(st.lists(st.tuples(st.integers(0, 3), st.integers(0, 2)), min_size=2, max_size=20))
def test_within_groups_every_group_keeps_its_own_labels(rows):
    groups, y = [g for g, _ in rows], np.array([label for _, label in rows])
    if all(len({y[i] for i in range(len(y)) if groups[i] == g}) == 1 for g in groups):
        return
    for labels in recorded_labels(y, groups):
        assert sorted(zip(groups, labels, strict=True)) == sorted(zip(groups, y, strict=True))


several_labels = st.lists(st.integers(0, 2), min_size=2, max_size=6).filter(lambda labels: len(set(labels)) > 1)


@given(several_labels, st.integers(1, 4))
def test_among_groups_each_group_keeps_one_label_and_the_groups_keep_their_marginal(labels, size):
    groups = [f"g{i}" for i in range(len(labels)) for _ in range(size + i % 2)]
    y = np.array([labels[int(g[1:])] for g in groups])
    for drawn in recorded_labels(y, groups):
        by_group = {g: {int(label) for h, label in zip(groups, drawn, strict=True) if h == g} for g in groups}
        assert all(len(values) == 1 for values in by_group.values())
        assert Counter(v for values in by_group.values() for v in values) == Counter(labels)


def test_blocks_trade_whole_in_their_order():
    y = np.array([0, 1, 2, 3, 4, 5, 9])
    for labels in recorded_labels(y, ["a", "a", "b", "b", "c", "c", "alone"], scheme="among"):
        assert labels[6] == 9
        assert {tuple(labels[i : i + 2]) for i in (0, 2, 4)} == {(0, 1), (2, 3), (4, 5)}


def test_every_order_is_as_likely_as_any_other():
    draws = Counter()
    for seed in range(60):
        draws.update(tuple(labels.tolist()) for labels in recorded_labels(np.arange(3), None, seed=seed))
    assert len(draws) == 6
    assert scipy.stats.chisquare(list(draws.values())).pvalue > 0.001


def test_the_result_is_what_it_says():
    X, y = np.arange(12.0), np.arange(12) % 2
    result = permutation_test(mean_gap, X, y, n=49, seed=3)
    assert result.value == mean_gap(X, y)
    assert len(result.null) == 49
    assert result.p == (1 + sum(draw >= result.value - 1e-12 for draw in result.null)) / 50
    assert result.null == permutation_test(mean_gap, X, y, n=49, seed=3).null
    assert result.null != permutation_test(mean_gap, X, y, n=49, seed=4).null
    assert permutation_test(mean_gap, X, 1 - y, n=49, seed=3, side="less").value == -result.value


def test_labels_with_several_columns_move_by_rows():
    y = np.arange(8).reshape(4, 2)
    for labels in recorded_labels(y, None):
        assert sorted(map(tuple, labels)) == sorted(map(tuple, y))


@pytest.mark.parametrize(
    ("y", "groups", "options", "error", "message"),
    [
        ([], None, {}, SpecError, "needs labels"),
        ([0, 1], ["a"], {}, SpecError, "groups has 1 labels for 2 rows"),
        ([0, 1], None, {"n": 0}, SpecError, "n is 0"),
        ([0, 1], None, {"scheme": "within"}, SpecError, "give groups"),
        ([0, 1], ["a", "b"], {"scheme": "within"}, SpecError, "changes nothing"),
        ([0, 1, 1], ["a", "a", "b"], {"scheme": "among"}, SpecError, "no two groups have the same size"),
    ],
)
def test_bad_input_is_quoted(y, groups, options, error, message):
    with pytest.raises(error, match=message):
        permutation_test(lambda X, y: 0.0, None, y, groups, **options)


def test_a_statistic_that_is_not_finite_is_refused_with_its_permutation():
    with pytest.raises(NumericalError, match="nan on the true labels"):
        permutation_test(lambda X, y: math.nan, None, [0, 1])
    with pytest.raises(NumericalError, match="nan on permutation"):
        permutation_test(lambda X, y: 0.0 if y[0] == 0 else math.nan, None, [0, 1])


@given(st.lists(st.integers(0, 3), min_size=1), st.integers(0, 9))
def test_shuffling_keeps_every_label(y, seed):
    labels = shuffled(np.array(y), seed)
    assert sorted(labels.tolist()) == sorted(y)
    assert np.array_equal(shuffled(np.array(y), seed), labels)


def test_shuffling_moves_labels():
    assert not np.array_equal(shuffled(np.arange(50), 0), np.arange(50))
    assert not np.array_equal(shuffled(np.arange(50), 0), shuffled(np.arange(50), 1))


@given(st.lists(st.tuples(st.sampled_from("abcdefgh"), st.integers(0, 2)), min_size=1, max_size=40), st.integers(0, 9))
def test_a_control_task_has_one_label_a_type_and_the_base_rates_of_the_task(rows, seed):
    types, y = [t for t, _ in rows], [label for _, label in rows]
    labels = control_labels(types, y, seed)
    by_type = {t: {int(label) for u, label in zip(types, labels, strict=True) if u == t} for t in types}
    assert all(len(values) == 1 for values in by_type.values())
    drawn = Counter(next(iter(values)) for values in by_type.values())
    for label, count in Counter(y).items():
        exact = count * len(by_type) / len(y)
        assert math.floor(exact - 1e-9) <= drawn[label] <= math.ceil(exact + 1e-9)
    assert set(drawn) <= set(y)


def test_control_labels_have_nothing_to_do_with_the_task():
    types, y = list(range(200)), np.arange(200) // 50
    agreement = [np.mean(control_labels(types, y, seed) == y) for seed in range(60)]
    assert np.mean(agreement) == pytest.approx(0.25, abs=0.02)
    assert np.array_equal(control_labels(types, y, 3), control_labels(types, y, 3))


def test_rare_labels_get_their_share_of_few_types_on_average():
    """Two types and 10% positives: the rounding must not always favour the common label."""
    y = np.array([1] + [0] * 9)
    types = ["a"] * 5 + ["b"] * 5
    share = np.mean([control_labels(types, y, seed).mean() for seed in range(800)])
    assert share == pytest.approx(0.1, abs=0.03)


def test_control_labels_need_one_type_a_row():
    with pytest.raises(SpecError, match="types has 1 entries"):
        control_labels(["a"], [0, 1], 0)
