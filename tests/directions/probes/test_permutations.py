"""Permuted probes are refitted probes, their p is uniform under the null, and the best site pays for the search."""

from __future__ import annotations

import numpy as np
import pytest
import scipy.stats
from sklearn.covariance import ledoit_wolf_shrinkage
from sklearn.discriminant_analysis import LinearDiscriminantAnalysis
from sklearn.linear_model import RidgeCV
from sklearn.metrics import balanced_accuracy_score, roc_auc_score
from sklearn.preprocessing import StandardScaler

from assay.base.errors import NumericalError, SpecError
from assay.directions.probes.closed import PENALTIES, factor, lda, ridge
from assay.directions.probes.linear import fit_linear
from assay.directions.probes.permutations import best_site, permuted_labels, permuted_probes
from assay.directions.probes.splits import Split, grouped_split

KINDS = ["difference of means", "lda", "ridge"]


def sample(n=60, d=8, sites=2, seed=0, shift=0.0):
    rng = np.random.default_rng(seed)
    groups = np.arange(n) // 2
    y = np.tile([0, 1], n // 2)
    X = {
        f"blocks.{i}.resid_post": rng.normal(size=(n, d)) @ rng.normal(size=(d, d)) + shift * i * y[:, None]
        for i in range(sites)
    }
    return X, y, groups


def scikit_learn(kind, train, y, test):
    """The readout of a probe that scikit-learn fits from scratch, choices included."""
    scaler = StandardScaler().fit(train)
    Z, T = scaler.transform(train), scaler.transform(test)
    if kind == "ridge":
        model = RidgeCV(alphas=[len(y) * each for each in PENALTIES]).fit(Z, 2.0 * y - 1)
        return model.predict(T)
    if kind == "lda":
        residuals = np.where(y[:, None], Z - Z[y].mean(axis=0), Z - Z[~y].mean(axis=0))
        shrinkage = float(ledoit_wolf_shrinkage(residuals, assume_centered=True))
        return LinearDiscriminantAnalysis(solver="lsqr", shrinkage=shrinkage).fit(Z, y).decision_function(T)
    weight = train[y].mean(axis=0) - train[~y].mean(axis=0)
    return (test - (train[y].mean(axis=0) + train[~y].mean(axis=0)) / 2) @ weight


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("d", [8, 70], ids=["more rows than columns", "fewer rows than columns"])
@pytest.mark.parametrize("metric", ["auroc", "balanced accuracy"])
def test_every_permutation_is_a_refit(kind, d, metric):
    X, y, groups = sample(d=d, shift=0.3)
    split = grouped_split(groups, y)
    found = permuted_probes(kind, X, y, groups, split=split, n=12, metric=metric)
    scheme, labels = permuted_labels(y, groups, split, 12, 0)
    assert (found.scheme, found.null.shape) == (scheme, (12, 2)) == ("within", (12, 2))
    scores = np.vstack([found.values, found.null])
    for s, name in enumerate(found.sites):
        for i in range(13):
            own = labels[:, i]
            readout = scikit_learn(kind, X[name][split.train], own[split.train], X[name][split.test])
            truth = own[split.test]
            expected = (
                roc_auc_score(truth, readout) if metric == "auroc" else balanced_accuracy_score(truth, readout > 0)
            )
            assert scores[i, s] == pytest.approx(expected, abs=1e-9)


@pytest.mark.parametrize("n", [40, 12])
def test_readouts_of_many_label_vectors_are_those_of_one_at_a_time_whatever_their_base_rates(n):
    rng = np.random.default_rng(0)
    X = rng.normal(size=(n, 20)) * np.logspace(-1, 1, 20)
    labels = np.stack([rng.permutation(n) < k for k in (2, n // 2, n - 2)], axis=1)
    rows = factor(X)
    for kind, fit in (("ridge", ridge), ("lda", lda)):
        many = rows.unfold(*(lambda found: (found.c, found.bias))(fit(rows, labels)))
        for i in range(3):
            alone = scikit_learn(kind, X, labels[:, i], X)
            assert np.allclose(X @ many.weight[:, i] + many.bias[i], alone, atol=1e-8)


def test_labels_move_inside_their_side_of_the_split_by_their_scheme():
    y, groups = np.tile([0, 1, 1], 20), np.repeat(np.arange(20), 3)
    split = grouped_split(groups, y)
    scheme, labels = permuted_labels(y, groups, split, 30, 0)
    assert scheme == "within"
    assert np.array_equal(labels[:, 0], y == 1)
    assert all((labels[groups == g].sum(axis=0) == 2).all() for g in range(20))
    constant = (groups % 2).astype(int)
    split = grouped_split(groups, constant)
    scheme, labels = permuted_labels(constant, groups, split, 30, 0)
    assert scheme == "among"
    for rows in (split.train, split.test):
        assert (labels[rows].sum(axis=0) == constant[rows].sum()).all()
    assert all((labels[groups == g] == labels[groups == g][:1]).all() for g in range(20))
    assert len(np.unique(labels, axis=1).T) > 25


def test_a_side_where_no_label_can_move_stays_as_it_is():
    groups = np.array([0, 0, 1, 1, 2, 2, 3, 3, 4, 4])
    y = np.array([0, 1, 0, 1, 1, 0, 0, 0, 1, 1])  # labels vary inside groups 0 to 2 only
    split = Split(train=np.arange(6), test=np.arange(6, 10))
    scheme, labels = permuted_labels(y, groups, split, 20, 0)
    assert scheme == "within"
    assert (labels[6:] == (y[6:, None] == 1)).all()
    assert len(np.unique(labels[:6], axis=1).T) > 4
    sizes = np.array([0, 1, 1, 2, 3, 3])  # no group can trade places with one of its size on its own side
    with pytest.raises(SpecError, match="no two groups have the same size"):
        permuted_labels([0, 0, 1, 0, 1, 0], sizes, Split(train=np.arange(3), test=np.arange(3, 6)), 5, 0, "among")


@pytest.mark.parametrize("kind", KINDS)
def test_p_is_uniform_under_the_null_alone_and_for_the_best_of_the_sites(kind):
    """Split, standardisation, penalty and the choice of the site are inside."""
    alone, best = [], []
    for seed in range(120):
        X, y, _ = sample(n=32, d=4, sites=3, seed=seed)
        y = np.random.default_rng(1000 + seed).permutation(y)
        split = grouped_split(np.arange(32), y, test=0.5, seed=seed)
        found = permuted_probes(kind, X, y, split=split, n=39, seed=seed)
        alone.append(found.p[0])
        best.append(found.best_p)
        assert found.familywise.min() == pytest.approx(found.best_p)
    uniform = np.linspace(1 / 40, 1, 40)
    assert scipy.stats.kstest(alone, uniform).pvalue > 0.01
    assert scipy.stats.kstest(best, uniform).pvalue > 0.01


def test_groups_keep_p_uniform_where_rows_of_a_group_are_alike():
    by_group, by_row = [], []
    for seed in range(80):
        rng = np.random.default_rng(seed)
        groups = np.repeat(np.arange(16), 4)
        X = {"embed": rng.normal(size=(16, 3))[groups] + 0.1 * rng.normal(size=(64, 3))}
        y = rng.permutation(np.arange(16) % 2)[groups]
        split = grouped_split(groups, y, test=0.5, seed=seed)
        by_group.append(permuted_probes("lda", X, y, groups, split=split, n=39, seed=seed).p[0])
        by_row.append(permuted_probes("lda", X, y, groups, split=split, n=39, seed=seed, scheme="rows").p[0])
    assert scipy.stats.kstest(by_group, np.linspace(1 / 40, 1, 40)).pvalue > 0.01
    assert np.mean(np.array(by_row) <= 0.05) > 0.15  # rows that claim to be independent find what is not there


def test_the_best_of_many_noise_sites_looks_good_and_is_not():
    """The figures of the reference: 64 rows each side, best of 24 independent sites has a mean AUROC of .62."""
    rng = np.random.default_rng(0)
    y = np.arange(128) % 2
    sites = {f"blocks.{i}.resid_post": rng.normal(size=(128, 8)) for i in range(24)}
    best = best_site("ridge", sites, y, split=grouped_split(np.arange(128), y, test=0.5), n=299)
    assert best.expected == pytest.approx(0.62, abs=0.03)
    assert best.p > 0.05
    assert best.p >= best.p_alone


def test_a_site_that_holds_the_labels_is_found_and_its_probe_is_the_training_rows():
    X, y, groups = sample(n=80, sites=3, shift=2.0)
    split = grouped_split(groups, y)
    best = best_site("lda", X, y, groups, split=split, n=99, shrinkage=0.3)
    assert best.probe.site == "blocks.2.resid_post"
    assert best.p == pytest.approx(0.01)
    alone = fit_linear("lda", X["blocks.2.resid_post"][split.train], y[split.train], shrinkage=0.3)
    assert np.allclose(best.probe.weight.numpy(), alone.weight, rtol=1e-5)
    assert best.probe.origin.test == tuple(split.test.tolist())
    assert best.probe.origin.detail["best of"] == 3


def test_the_result_depends_on_its_seed_and_not_on_how_it_is_cut(monkeypatch):
    X, y, groups = sample()
    split = grouped_split(groups, y)
    told = []
    whole = permuted_probes("ridge", X, y, groups, split=split, n=20, progress=lambda *at: told.append(at))
    assert told == [(1, 2), (2, 2)]
    monkeypatch.setattr("assay.directions.probes.permutations._HELD", 200)
    cut = permuted_probes("ridge", X, y, groups, split=split, n=20)
    assert np.allclose(whole.null, cut.null, atol=1e-12)
    assert not np.array_equal(whole.null, permuted_probes("ridge", X, y, groups, split=split, n=20, seed=1).null)


def test_bad_input_is_refused():
    X, y, groups = sample()
    split = grouped_split(groups, y)
    refused = [
        ({"sites": {}}, "no sites"),
        ({"n": 0}, "n is 0"),
        ({"sites": {"embed": np.ones((3, 2))}}, "embed has 3 rows for 60 labels"),
        ({"split": Split(train=np.arange(31), test=np.arange(31, 60))}, "1 groups are in both"),
        ({"split": Split(train=np.arange(31), test=np.arange(30, 60)), "groups": None}, "1 rows are in both"),
        ({"split": Split(train=np.arange(58), test=np.array([58, 58]))}, "test rows have one class"),
        ({"penalty": 1.0}, "no penalty"),
        ({"shrinkage": 0.0}, "10 rows a dimension"),
    ]
    for change, message in refused:
        given = {"kind": "lda", "sites": X, "y": y, "groups": groups, "split": split, "n": 5, **change}
        with pytest.raises(SpecError, match=message):
            permuted_probes(given.pop("kind"), given.pop("sites"), given.pop("y"), given.pop("groups"), **given)
    X["blocks.1.resid_post"][4, 1] = np.inf
    with pytest.raises(NumericalError, match=r"blocks\.1\.resid_post is NaN or infinite in 1 of 60 rows, row 4"):
        permuted_probes("lda", X, y, groups, split=split, n=5)
