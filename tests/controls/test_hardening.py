"""Input that is no sound input: what is missing, constant, repeated or of the wrong kind is refused, not computed."""

from __future__ import annotations

import numpy as np
import pytest
import torch

import assay
from assay.base.errors import NumericalError, SpecError
from assay.base.stats import bootstrap_interval, group_rows, sign_flip_test
from assay.controls.activations import spectrum_matched_activations
from assay.controls.directions import (
    covariance_matched_directions,
    isotropic_directions,
    shuffled_difference_directions,
)
from assay.controls.labels import control_labels, label_array, permutation_test
from assay.controls.multiplicity import best_of
from assay.controls.repair import self_repair
from assay.controls.tasks import score, selectivity

NAN = float("nan")
MISSING = ([0.0, 1.0, NAN, 1.0], [0, 1, None, 1], ["a", "b", NAN, "b"], np.array([0.0, 1.0, np.nan, 1.0]))
"""Labels of which one is missing, in the kinds that a table gives them in."""


@pytest.mark.parametrize("y", MISSING)
def test_a_missing_label_is_no_class(y):
    rows = np.arange(8.0).reshape(4, 2)
    with pytest.raises(SpecError, match="1 of 4 labels are missing"):
        label_array(y)
    with pytest.raises(SpecError, match="missing"):
        permutation_test(lambda X, y: 0.0, rows, y, n=19)
    with pytest.raises(SpecError, match="missing"):
        best_of(lambda X, y: X[0], rows, y, n=19)
    with pytest.raises(SpecError, match="missing"):
        control_labels(list("abcd"), y, seed=0)
    with pytest.raises(SpecError, match="missing"):
        selectivity(lambda X, y, Z: np.zeros(len(Z)), rows, y, list("aabb"))
    with pytest.raises(SpecError, match="missing"):
        shuffled_difference_directions(np.ones(2), rows, y, n=2, seed=0)
    with pytest.raises(SpecError, match="missing"):
        score(y, [0, 1, 1, 1])


@pytest.mark.parametrize("y", [[1, 0], ["b", "a"], [True, False], np.array([2.5, 1.5]), torch.tensor([1, 0])])
def test_labels_of_every_kind_are_kept(y):
    assert label_array(y).tolist() == (y.tolist() if hasattr(y, "tolist") else y)


def test_labels_of_kinds_that_have_no_order_are_refused():
    with pytest.raises(SpecError, match="one kind"):
        label_array(np.array([1, "a"], dtype=object))


def test_labels_that_no_permutation_changes_are_refused():
    for groups in (None, [0] * 6, [0, 0, 1, 1, 2, 2]):
        with pytest.raises(SpecError, match="all 6 labels are the same"):
            permutation_test(lambda X, y: 1.0, np.arange(6.0), np.ones(6), groups, n=19)


def test_a_group_that_is_nan_is_refused_and_not_one_for_each_row():
    with pytest.raises(SpecError, match="row 1 is NaN"):
        bootstrap_interval([1.0, 2.0, 3.0], groups=["a", NAN, NAN])
    with pytest.raises(SpecError, match="row 0 is NaN"):
        sign_flip_test([1.0, 2.0], groups=np.array([np.nan, np.nan]).tolist())
    with pytest.raises(SpecError, match="one label a row"):
        group_rows([[1], [2]])


def test_an_interval_that_no_jackknife_supports_is_refused():
    values = np.arange(4.0)
    never = lambda rows: float(rows.mean()) if len(rows) == 4 else NAN  # noqa: E731
    once = lambda rows: float(rows.mean()) if len(rows) == 4 or rows[0] == 1 else NAN  # noqa: E731
    for statistic, times in ((never, 0), (once, 1)):
        with pytest.raises(NumericalError, match=f"finite {times} times"):
            bootstrap_interval(values, statistic)


def test_an_undefined_jackknife_value_does_not_widen_the_interval():
    # Without the only positive row the statistic is undefined; the sample still has 30 values, not 29.
    values = np.random.default_rng(0).normal(size=30)
    rare = lambda rows: float(rows.mean()) if (rows == values[0]).any() else NAN  # noqa: E731
    whole, part = bootstrap_interval(values), bootstrap_interval(values, rare)
    assert part.high - part.low < 1.1 * (whole.high - whole.low)


def test_numbers_in_half_precision_and_with_a_gradient_are_numbers():
    values = torch.tensor([1.0, 2.0, 4.0], dtype=torch.bfloat16, requires_grad=True)
    assert bootstrap_interval(values) == bootstrap_interval([1.0, 2.0, 4.0])
    with pytest.raises(SpecError, match="must be numbers"):
        bootstrap_interval(["a", "b"])


def test_no_pattern_of_signs_is_no_test():
    with pytest.raises(SpecError, match="n is 0"):
        sign_flip_test([1.0, 2.0], n=0)


@pytest.mark.parametrize("value", [0.0, 0.1, 1e8 / 3])
def test_nothing_is_drawn_from_the_rounding_of_constant_rows(value):
    rows, y = np.full((7, 6), value), np.array([0, 1, 0, 1, 0, 1, 1])
    for draw in (
        lambda: covariance_matched_directions(np.ones(6), rows, 3, 0),
        lambda: shuffled_difference_directions(np.ones(6), rows, y, 3, 0),
        lambda: spectrum_matched_activations(rows),
    ):
        with pytest.raises(NumericalError, match="do not vary"):
            draw()


def test_random_directions_of_whole_numbers_keep_the_norm():
    draws = isotropic_directions(torch.tensor([3, 4]), 20, 0)
    assert draws.is_floating_point()
    assert torch.allclose(draws.norm(dim=1), torch.full((20,), 5.0))
    with pytest.raises(SpecError, match="at least one"):
        isotropic_directions(np.ones(3), -1, 0)


def test_predictions_are_scored_on_as_many_rows():
    for wrong in (
        lambda: score([0, 1], [0, 1, 1]),
        lambda: score([], []),
        lambda: score(["a", "b"], ["a", "b"], "auc"),
    ):
        with pytest.raises(SpecError):
            wrong()


def test_selectivity_sees_rows_of_a_tensor_that_are_not_finite():
    X = torch.zeros(8, 2)
    X[3, 1] = NAN
    with pytest.raises(NumericalError, match="row 3 first"):
        selectivity(lambda X, y, Z: np.zeros(len(Z)), X, np.arange(8) % 2, list("aabbccdd"))


@pytest.fixture(scope="module")
def llama(tiny_module):
    return assay.load(tiny_module("llama"))


@pytest.mark.parametrize(
    "components",
    [
        ["blocks.1.mlp.out", "blocks.1.mlp.out"],
        ["blocks.1.attn.z", "blocks.1.attn.z.0"],
        ["blocks.1.attn.z.2", "blocks.0.mlp.out", "blocks.1.attn.z"],
    ],
)
def test_a_part_named_twice_is_not_counted_twice(llama, components):
    ids = torch.tensor([[5, 17, 40, 9], [8, 30, 21, 77]])
    with pytest.raises(SpecError, match="same part"):
        self_repair(llama, ids, components, 12, 99)


def test_token_ids_are_whole_numbers(llama):
    ids = torch.tensor([[5, 17, 40, 9], [8, 30, 21, 77]])
    with pytest.raises(SpecError, match="whole numbers"):
        self_repair(llama, ids, "blocks.1.mlp.out", torch.tensor([9.5, 1.0]), 9)
