"""Random directions have the norm of the direction, and point where their null says."""

from __future__ import annotations

import math

import numpy as np
import pytest
import scipy.stats
import torch

from assay.base.errors import NumericalError, SpecError
from assay.controls import covariance_matched_directions, isotropic_directions, shuffled_difference_directions

RNG = np.random.default_rng(0)
D = 12
DIRECTION = RNG.normal(size=D)
SCALES = np.geomspace(10, 0.1, D)
ACTIVATIONS = 5 + RNG.normal(size=(400, D)) * SCALES
LABELS = np.arange(400) % 5 == 0

DRAWS = {
    "isotropic": lambda v, n, seed: isotropic_directions(v, n, seed),
    "covariance": lambda v, n, seed: covariance_matched_directions(v, ACTIVATIONS, n, seed),
    "shuffled": lambda v, n, seed: shuffled_difference_directions(v, ACTIVATIONS, LABELS, n, seed),
}


@pytest.mark.parametrize("draw", DRAWS.values(), ids=DRAWS.keys())
def test_norm_shape_and_seed(draw):
    draws = draw(DIRECTION, 50, 1)
    assert draws.shape == (50, D)
    assert np.linalg.norm(draws, axis=1) == pytest.approx(np.linalg.norm(DIRECTION))
    assert np.array_equal(draw(DIRECTION, 50, 1), draws)
    assert not np.allclose(draw(DIRECTION, 50, 2), draws)
    assert np.allclose(draw(3 * DIRECTION, 50, 1), 3 * draws)


@pytest.mark.parametrize("draw", DRAWS.values(), ids=DRAWS.keys())
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_tensors_come_back_as_tensors_of_their_kind(draw, dtype):
    draws = draw(torch.tensor(DIRECTION, dtype=dtype), 7, 0)
    assert (draws.dtype, draws.shape) == (dtype, (7, D))
    norm = torch.tensor(DIRECTION, dtype=dtype).double().norm()
    assert torch.allclose(draws.double().norm(dim=1), norm, rtol=1e-2)


def test_isotropic_directions_are_uniform_on_the_sphere():
    units = isotropic_directions(DIRECTION, 4000, 0) / np.linalg.norm(DIRECTION)
    # A coordinate of a uniform unit vector squared is Beta(1/2, (d - 1)/2).
    for column in (0, D - 1):
        assert scipy.stats.kstest(units[:, column] ** 2, scipy.stats.beta(0.5, (D - 1) / 2).cdf).pvalue > 0.01
    assert np.abs(units.mean(axis=0)).max() < 5 / math.sqrt(4000 * D)


def angular_covariance(draws):
    units = draws / np.linalg.norm(draws, axis=1, keepdims=True)
    return units.T @ units / len(units)


def test_covariance_matched_directions_follow_the_covariance():
    draws = covariance_matched_directions(DIRECTION, ACTIVATIONS, 4000, 0)
    expected = RNG.multivariate_normal(np.zeros(D), np.cov(ACTIVATIONS.T), size=4000)
    assert angular_covariance(draws) == pytest.approx(angular_covariance(expected), abs=0.03)
    assert np.abs(draws.mean(axis=0)).max() < 5 * np.linalg.norm(DIRECTION) / math.sqrt(4000)  # not the mean: 5


def test_covariance_matched_directions_stay_in_the_span_of_few_rows():
    few = RNG.normal(size=(4, D))
    draws = covariance_matched_directions(DIRECTION, few, 30, 0)
    assert np.linalg.matrix_rank(np.vstack([few - few.mean(axis=0), draws]), tol=1e-8) == 3


def test_shuffled_differences_follow_the_covariance_and_forget_the_labels():
    planted = ACTIVATIONS + 30 * LABELS[:, None] * np.eye(D)[D - 1]
    draws = shuffled_difference_directions(DIRECTION, ACTIVATIONS, LABELS, 3000, 0)
    assert angular_covariance(draws) == pytest.approx(
        angular_covariance(covariance_matched_directions(DIRECTION, ACTIVATIONS, 3000, 1)), abs=0.04
    )
    true = planted[LABELS].mean(axis=0) - planted[~LABELS].mean(axis=0)
    shuffled = shuffled_difference_directions(true, planted, LABELS, 300, 0)
    cosines = shuffled @ true / np.linalg.norm(true) ** 2
    assert abs(cosines.mean()) < 5 / math.sqrt(300)  # as often against the true difference as along it


def test_a_shuffled_difference_is_a_difference_of_class_means():
    rows, labels = np.eye(5), np.array([1, 1, 0, 0, 0])
    for draw in shuffled_difference_directions(np.ones(5), rows, labels, 20, 0):
        values = np.sort(draw / np.abs(draw).max())
        assert values == pytest.approx([-2 / 3] * 3 + [1] * 2)


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda: isotropic_directions(np.zeros(3), 1, 0), NumericalError, "zero or not finite"),
        (lambda: isotropic_directions(np.array([1.0, math.nan]), 1, 0), NumericalError, "zero or not finite"),
        (lambda: isotropic_directions(np.ones((2, 2)), 1, 0), SpecError, r"shape \(2, 2\)"),
        (lambda: covariance_matched_directions(np.ones(3), np.ones((5, 3)), 1, 0), NumericalError, "do not vary"),
        (lambda: covariance_matched_directions(np.ones(3), np.ones((5, 4)), 1, 0), SpecError, r"\[rows, 3\]"),
        (lambda: covariance_matched_directions(np.ones(3), np.full((5, 3), math.nan), 1, 0), NumericalError, "finite"),
        (lambda: shuffled_difference_directions(np.ones(2), np.eye(2), [0, 0], 1, 0), SpecError, "1 classes"),
        (lambda: shuffled_difference_directions(np.ones(2), np.eye(2), [0, 1, 1], 1, 0), SpecError, "one a row"),
    ],
)
def test_bad_input_is_quoted(call, error, message):
    with pytest.raises(error, match=message):
        call()
