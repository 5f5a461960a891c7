"""Linear probes agree with scikit-learn, and standardisation is folded in."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from sklearn.covariance import ledoit_wolf_shrinkage
from sklearn.discriminant_analysis import LinearDiscriminantAnalysis
from sklearn.linear_model import LogisticRegression, Ridge, RidgeCV
from sklearn.preprocessing import StandardScaler

from assay.base.errors import NumericalError, SpecError
from assay.directions.probes.closed import PENALTIES, factor
from assay.directions.probes.linear import calibrated, check_settings, fit_linear, fit_probe
from assay.directions.probes.logistic import path
from assay.directions.probes.scores import auroc, log_loss
from assay.directions.vectors import Origin

SHAPES = [(120, 15), (30, 50), (40, 40)]
KINDS = ["difference of means", "lda", "ridge", "logistic"]


def sample(n, d, seed=0, shift=0.5):
    """Correlated columns of very different size, as in a residual stream."""
    rng = np.random.default_rng(seed)
    y = (rng.random(n) < 0.4).astype(int)
    X = rng.normal(size=(n, d)) + shift * y[:, None] * (np.arange(d) < 3)
    return (X @ rng.normal(size=(d, d))) * np.logspace(-2, 2, d) + 5.0, y


def standardised(X):
    return StandardScaler().fit_transform(X)


def residuals(Z, y):
    return np.where(y[:, None] == 1, Z - Z[y == 1].mean(axis=0), Z - Z[y == 0].mean(axis=0))


@pytest.mark.parametrize(("n", "d"), SHAPES)
def test_ridge_is_scikit_learns_with_its_leave_one_out_penalty(n, d):
    X, y = sample(n, d)
    fitted = fit_linear("ridge", X, y)
    reference = RidgeCV(alphas=[n * each for each in PENALTIES]).fit(standardised(X), 2.0 * y - 1)
    assert fitted.detail["penalty"] == pytest.approx(reference.alpha_)
    assert np.allclose(fitted(X), reference.predict(standardised(X)), atol=1e-8)
    fixed = fit_linear("ridge", X, y, penalty=3.0)
    assert np.allclose(fixed(X), Ridge(alpha=3.0).fit(standardised(X), 2.0 * y - 1).predict(standardised(X)), atol=1e-8)


def test_closed_form_leave_one_out_is_leaving_one_out():
    X, y = sample(25, 6)
    grid = [25 * each for each in PENALTIES]
    Z, target = standardised(X), 2.0 * y - 1
    keep = ~np.eye(25, dtype=bool)
    losses = [
        sum(
            (target[i] - Ridge(alpha=a).fit(Z[keep[i]], target[keep[i]]).predict(Z[i : i + 1])[0]) ** 2
            for i in range(25)
        )
        for a in grid
    ]
    assert fit_linear("ridge", X, y).detail["penalty"] == pytest.approx(grid[int(np.argmin(losses))])


@pytest.mark.parametrize(("n", "d"), SHAPES)
def test_lda_is_scikit_learns_with_ledoit_and_wolfs_shrinkage(n, d):
    X, y = sample(n, d)
    Z = standardised(X)
    shrinkage = ledoit_wolf_shrinkage(residuals(Z, y), assume_centered=True)
    fitted = fit_linear("lda", X, y)
    assert fitted.detail["shrinkage"] == pytest.approx(shrinkage, abs=1e-10)
    reference = LinearDiscriminantAnalysis(solver="lsqr", shrinkage=float(shrinkage)).fit(Z, y)
    assert np.allclose(fitted(X), reference.decision_function(Z), atol=1e-8)


def test_unshrunk_lda_is_scikit_learns_and_needs_rows():
    X, y = sample(200, 10)
    reference = LinearDiscriminantAnalysis(solver="lsqr").fit(standardised(X), y)
    assert np.allclose(
        fit_linear("lda", X, y, shrinkage=0.0)(X), reference.decision_function(standardised(X)), atol=1e-7
    )
    with pytest.raises(SpecError, match="99 rows of 10: leave shrinkage out"):
        fit_linear("lda", X[:99], y[:99], shrinkage=0.0)


@pytest.mark.parametrize(("n", "d"), SHAPES)
def test_logistic_is_scikit_learns(n, d):
    """At the optimum that its Newton solver finds, in the span of the rows where there are fewer rows than columns."""
    X, y = sample(n, d)
    Z = standardised(X)
    for C in (1e-3, 0.1, 10.0):
        reference = LogisticRegression(C=C, tol=1e-10, solver="newton-cholesky").fit(Z, y)
        assert np.allclose(fit_linear("logistic", X, y, C=C)(X), reference.decision_function(Z), atol=1e-4)


def test_a_path_of_penalties_is_each_penalty_alone_and_a_steep_spectrum_is_no_obstacle():
    rng = np.random.default_rng(0)
    X = rng.normal(size=(150, 60)) @ (rng.normal(size=(60, 60)) * np.logspace(-4, 2, 60)[:, None])
    y = X[:, 0] + 0.3 * X[:, 5] > 0
    rows = factor(X)
    weights, biases = path(rows, y, (100.0, 1e-3, 1.0))
    for i, C in enumerate((100.0, 1e-3, 1.0)):
        reference = LogisticRegression(C=C, tol=1e-10, solver="newton-cholesky").fit(standardised(X), y)
        expected = reference.decision_function(standardised(X))
        assert np.allclose(rows.Z @ weights[:, i] + biases[i], expected, atol=1e-3 * np.abs(expected).max())


def test_difference_of_means_is_that():
    X, y = sample(60, 5)
    fitted = fit_linear("difference of means", X, y)
    assert np.allclose(fitted.weight, X[y == 1].mean(axis=0) - X[y == 0].mean(axis=0))
    middle = (X[y == 1].mean(axis=0) + X[y == 0].mean(axis=0)) / 2
    assert fitted(middle[None])[0] == pytest.approx(0.0, abs=1e-6)


@given(st.sampled_from(["lda", "ridge", "logistic"]), st.integers(0, 20))
def test_folding_standardisation_leaves_scores_unchanged(kind, seed):
    X, y = sample(60, 8, seed)
    settings = {"lda": {"shrinkage": 0.2}, "ridge": {"penalty": 2.0}, "logistic": {"C": 0.5}}[kind]
    folded = fit_probe(kind, X, y, site="embed", **settings)
    aside = fit_linear(kind, standardised(X), y, standardise=False, **settings)
    expected = aside(standardised(X))
    got = folded(torch.tensor(X)).numpy()
    assert np.allclose(got, expected, atol=1e-3 * np.abs(expected).max())
    assert np.allclose(fit_linear(kind, X, y, **settings)(X), expected, atol=1e-3)


@pytest.mark.parametrize("kind", KINDS)
def test_a_probe_reads_what_its_kind_separates_and_says_where_it_comes_from(kind):
    X, y = sample(150, 6, shift=4.0)
    names = np.where(y == 1, "true", "false")
    origin = Origin(method="", subject="abc", train=(1, 2), detail={"data set": "cities"})
    probe = fit_probe(kind, X, names, site="blocks.1.resid_post", groups=np.arange(150), origin=origin, seed=4)
    assert probe.reads == "true, not false"
    assert auroc(probe(torch.tensor(X)).numpy(), y) > 0.9
    assert (probe.origin.method, probe.origin.seed, probe.origin.subject) == (kind, 4, "abc")
    assert probe.origin.detail["data set"] == "cities"


@pytest.mark.parametrize("kind", ["difference of means", "lda", "ridge"])
def test_swapping_the_labels_turns_the_readout_round(kind):
    X, y = sample(80, 6)
    assert np.allclose(fit_linear(kind, X, y)(X), -fit_linear(kind, X, 1 - y)(X), atol=1e-8)


def test_a_choice_of_C_sees_only_folds_of_whole_groups():
    """Labels are those of the words and rows of a word are alike: split by row, memory would choose a large C."""
    rng = np.random.default_rng(0)
    groups = np.repeat(np.arange(30), 6)
    X = rng.normal(size=(30, 40))[groups] + 0.05 * rng.normal(size=(180, 40))
    y = rng.permutation(np.arange(30) % 2)[groups]
    by_word = fit_linear("logistic", X, y, groups=groups).detail["C"]
    by_row = fit_linear("logistic", X, y, groups=np.arange(180)).detail["C"]
    assert by_word <= 1e-3
    assert by_row >= 1


def test_calibration_keeps_the_order_and_lowers_the_loss():
    X, y = sample(400, 6, shift=1.0)
    train, test = slice(0, 200), slice(200, 400)
    probe = fit_probe("ridge", X[train], y[train], site="embed")
    better = calibrated(probe, X[test], y[test])
    before, after = (p(torch.tensor(X[test])).numpy() for p in (probe, better))
    assert auroc(before, y[test]) == pytest.approx(auroc(after, y[test]), abs=1e-6)
    assert log_loss(after, y[test]) < log_loss(before, y[test])
    with pytest.raises(SpecError, match="without an error"):
        calibrated(probe, X[test][[before.argmin(), before.argmax()]], np.array([0, 1]))
    with pytest.raises(NumericalError, match="no higher"):
        calibrated(probe, X[test], 1 - y[test])


@pytest.mark.parametrize(
    ("change", "options", "error", "message"),
    [
        ({"y": np.ones(40)}, {}, SpecError, "all 40 rows have the label 1.0; a probe needs two classes"),
        ({"y": np.arange(40) % 3}, {}, SpecError, "3 labels"),
        ({"y": np.arange(39) % 2}, {}, SpecError, r"\(40 rows\)"),
        ({"nan": True}, {}, NumericalError, "1 of 40 rows, row 3 first"),
        ({}, {"penalty": 1.0}, SpecError, "a lda probe has no penalty"),
        ({}, {"kind": "ridge", "penalty": 0.0}, SpecError, "must be positive"),
        ({}, {"shrinkage": 1.5}, SpecError, "between 0"),
        ({}, {"kind": "logistic"}, SpecError, "give groups, or C"),
        ({}, {"kind": "logistic", "C": -1.0}, SpecError, "C is -1.0"),
        ({}, {"kind": "logistic", "groups": np.arange(40) % 2}, SpecError, "one class lives in a single group"),
        ({"constant": True}, {}, NumericalError, "all rows of X are the same"),
        ({"constant": True}, {"kind": "difference of means"}, NumericalError, "means are the same"),
    ],
)
def test_bad_input_is_refused(change, options, error, message):
    X, y = sample(40, 5)
    y = np.arange(40) % 2
    if change.get("nan"):
        X[3, 2] = np.nan
    if change.get("constant"):
        X = np.ones_like(X)
    options = {"kind": "lda", **options}
    with pytest.raises(error, match=message):
        fit_linear(options.pop("kind"), X, change.get("y", y), **options)


def test_an_unknown_kind_is_quoted_beside_the_valid_ones():
    with pytest.raises(SpecError, match="kind is 'svm'; valid: 'difference of means', 'lda'"):
        check_settings("svm")
