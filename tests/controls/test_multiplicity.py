"""The best of many is held against the best of many."""

from __future__ import annotations

import math

import numpy as np
import pytest
import scipy.stats

from assay.base.errors import NumericalError, SpecError
from assay.base.stats import permutation_p
from assay.controls import familywise_p, max_null

DRAWS = [[1.0, -4.0, 2.0], [0.0, 3.0, -1.0]]


@pytest.mark.parametrize(("side", "expected"), [("greater", [2, 3]), ("less", [-4, -1]), ("two", [4, 3])])
def test_the_extreme_of_each_draw(side, expected):
    assert max_null(DRAWS, side).tolist() == expected


def test_the_best_of_many_noise_sites_has_a_uniform_p_only_against_the_max_null():
    """24 sites correlated at .5: naive p of the best is far too small, the max null makes it uniform."""
    rng = np.random.default_rng(0)
    naive, right = [], []
    for _ in range(800):
        shared, own = rng.normal(size=(100, 1)), rng.normal(size=(100, 24))
        sites = math.sqrt(0.5) * shared + math.sqrt(0.5) * own
        best = int(sites[0].argmax())
        naive.append(permutation_p(sites[0, best], sites[1:, best]))
        right.append(permutation_p(sites[0, best], max_null(sites[1:])))
    assert scipy.stats.kstest(right, np.linspace(0.01, 1, 100).tolist()).pvalue > 0.01
    assert np.mean(np.array(right) <= 0.05) == pytest.approx(0.05, abs=0.025)
    assert np.mean(np.array(naive) <= 0.05) > 0.25


@pytest.mark.parametrize("standardise", [False, True])
def test_the_family_keeps_its_level(standardise):
    rng = np.random.default_rng(1)
    scales = np.array([1.0, 10.0, 0.1, 3.0])
    tables = rng.normal(size=(1500, 40, 4)) * scales
    wrong = [(familywise_p(t[0], t[1:], standardise=standardise) <= 0.05).any() for t in tables]
    assert np.mean(wrong) == pytest.approx(0.05, abs=0.02)


def test_standardising_lets_a_quiet_test_be_heard():
    rng = np.random.default_rng(2)
    draws = rng.normal(size=(199, 2)) * [100.0, 1.0]
    assert familywise_p([0.0, 8.0], draws)[1] > 0.2
    assert familywise_p([0.0, 8.0], draws, standardise=True)[1] == pytest.approx(1 / 200)
    far = np.array([1e4, 0.0])  # a null far from zero
    moved = familywise_p(np.array([0.0, 8.0]) + far, draws + far, standardise=True)
    assert moved == pytest.approx(familywise_p([0.0, 8.0], draws, standardise=True))


def test_one_test_needs_no_correction():
    draws = np.random.default_rng(3).normal(size=(99, 1))
    for side in ("greater", "less"):
        assert familywise_p([0.7], draws, side)[0] == permutation_p(0.7, draws[:, 0], side)


def test_a_two_sided_family_compares_sizes():
    assert familywise_p([-5.0, 0.0], [[1.0, -4.0], [0.0, 3.0]], "two").tolist() == pytest.approx([1 / 3, 1.0])
    assert familywise_p([-5.0, 0.0], [[1.0, -4.0], [0.0, 3.0]], "greater").tolist() == pytest.approx([1.0, 1.0])


def test_corrected_p_values_are_never_below_plain_ones():
    rng = np.random.default_rng(4)
    table = rng.normal(size=(60, 7))
    plain = [permutation_p(table[0, i], table[1:, i]) for i in range(7)]
    assert (familywise_p(table[0], table[1:]) >= np.array(plain) - 1e-12).all()


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda: max_null([1.0, 2.0]), SpecError, r"shape \(2,\)"),
        (lambda: max_null([[1.0, math.nan]]), NumericalError, "1 of 2"),
        (lambda: familywise_p([1.0], DRAWS), SpecError, "for 1 values"),
    ],
)
def test_bad_input_is_quoted(call, error, message):
    with pytest.raises(error, match=message):
        call()
