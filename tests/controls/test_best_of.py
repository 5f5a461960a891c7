"""A search is repeated in its null, and a screen keeps its rate."""

from __future__ import annotations

import math

import numpy as np
import pytest
import scipy.stats

from assay.base.errors import NumericalError, SpecError
from assay.base.stats import benjamini_hochberg
from assay.controls import permutation_test
from assay.controls.multiplicity import best_of, screen

UNIFORM = np.linspace(0.01, 1, 100).tolist()


def gaps(X, y):
    return X[y == 1].mean(axis=0) - X[y == 0].mean(axis=0)


@pytest.mark.parametrize(("side", "standardise"), [("greater", False), ("less", True), ("two", False), ("two", True)])
def test_the_best_of_24_noise_sites_has_a_uniform_p(side, standardise):
    rng = np.random.default_rng(0)
    y, p = np.arange(30) % 2, []
    for seed in range(120):
        X = rng.normal(size=(30, 24)) * np.geomspace(1, 5, 24) + rng.normal(size=(30, 1))
        p.append(best_of(gaps, X, y, n=99, seed=seed, side=side, standardise=standardise).best_p)
    assert scipy.stats.kstest(p, UNIFORM).pvalue > 0.01
    assert np.mean(np.array(p) <= 0.05) == pytest.approx(0.05, abs=0.055)


def test_groups_are_kept_in_the_search():
    """Noise shared by the rows of a word: rows as if independent reject far too often, whole words do not."""
    rng = np.random.default_rng(1)
    words, by_word, by_row = np.repeat(np.arange(16), 5), [], []
    y = (np.arange(16) % 2)[words]
    for seed in range(100):
        X = rng.normal(size=(80, 6)) + 2 * rng.normal(size=(16, 6))[words]
        by_word.append(best_of(gaps, X, y, words.tolist(), n=99, seed=seed).best_p)
        by_row.append(best_of(gaps, X, y, n=99, seed=seed).best_p)
    assert scipy.stats.kstest(by_word, UNIFORM).pvalue > 0.01
    assert np.mean(np.array(by_row) <= 0.05) > 0.3


def test_the_parts_are_what_they_say():
    rng = np.random.default_rng(2)
    y = np.arange(40) % 2
    X = rng.normal(size=(40, 12))
    X[:, 4] -= 3 * y
    found = best_of(gaps, X, y, n=99, side="less", names=[f"site {i}" for i in range(12)])
    assert (found.best_name, found.best, found.best_p, found.family) == ("site 4", 4, 0.01, 12)
    assert found.values == pytest.approx(gaps(X, y).tolist())
    assert found.score == min(found.values)
    control = found.control()
    assert control.p == pytest.approx(found.best_p)
    assert "best of 12 tests" in control.description
    both = best_of(gaps, X, y, n=99, side="two", standardise=True)
    assert both.best == 4
    assert both.score > 0
    assert both.control().p == pytest.approx(both.best_p)


def test_a_family_of_one_is_a_permutation_test():
    rng = np.random.default_rng(3)
    X, y = rng.normal(size=(60, 1)), np.arange(60) % 2
    one = permutation_test(lambda X, y: float(gaps(X, y)[0]), X, y, n=999)
    assert best_of(gaps, X, y, n=999).best_p == pytest.approx(one.p, abs=0.06)


def test_the_rate_of_false_discoveries_is_kept_and_storey_finds_more():
    rng = np.random.default_rng(4)
    wrong, found = {"bh": [], "storey": []}, {"bh": [], "storey": []}
    for _ in range(40):
        z = rng.normal(size=2000) + 3.0 * (np.arange(2000) < 800)
        p = scipy.stats.norm.sf(z)
        for method in wrong:
            result = screen(p, alpha=0.1, method=method)
            wrong[method].append(result.found[800:].sum() / max(1, result.found.sum()))
            found[method].append(int(result.found.sum()))
        assert result.null_share == pytest.approx(0.6, abs=0.1)
    assert np.mean(wrong["bh"]) == pytest.approx(0.06, abs=0.01)  # alpha times the share of nulls
    assert np.mean(wrong["storey"]) == pytest.approx(0.1, abs=0.012)
    assert np.mean(found["storey"]) > np.mean(found["bh"]) + 20


def test_storey_is_used_above_a_thousand_tests_only():
    p = np.linspace(1e-4, 1, 1001) ** 2
    assert screen(p[:1000]).method == "bh"
    assert np.array_equal(screen(p[:1000]).q, benjamini_hochberg(p[:1000]))
    assert screen(p).method == "storey"
    assert screen(p, method="bh").method == "bh"
    assert screen(np.full(2000, 0.9)).null_share == 1.0
    assert screen(p).family == 1001
    with pytest.raises(SpecError, match="1000 tests are too few"):
        screen(p[:1000], method="storey")


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda: best_of(gaps, np.eye(2), []), SpecError, "needs labels"),
        (lambda: best_of(gaps, np.eye(2), [0, 1], n=0), SpecError, "n is 0"),
        (lambda: best_of(gaps, np.eye(2), [0, 1], names=["a"]), SpecError, "1 entries for 2 tests"),
        (lambda: best_of(lambda X, y: [math.nan, 0.0], None, [0, 1]), NumericalError, "1 of 2 statistics"),
        (lambda: best_of(lambda X, y: [0.0] * (1 + y[0]), None, [0, 1]), SpecError, "1 statistics on the true labels"),
        (lambda: best_of(lambda X, y: [math.nan if y[0] else 0.0], None, [0, 1]), NumericalError, "permutations"),
        (lambda: screen([]), SpecError, "at least one"),
        (lambda: screen([0.5], alpha=1.0), SpecError, r"alpha is 1\.0"),
        (lambda: screen([1.5]), SpecError, r"lie in \[0, 1\]"),
    ],
)
def test_bad_input_is_quoted(call, error, message):
    with pytest.raises(error, match=message):
        call()
