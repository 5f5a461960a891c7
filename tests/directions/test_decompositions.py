"""Decompositions under one interface: each finds what it is for, and is a `Dictionary`."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch

from assay.base.errors import NumericalError, SpecError
from assay.base.protocols import Dictionary
from assay.directions.decompositions import FittedBasis, fit_basis

KINDS = ("pca", "ica", "nmf", "kmeans", "sparse coding")
D = 10
RNG = np.random.default_rng(0)
X = RNG.laplace(size=(400, 4)) @ RNG.standard_normal((4, D)) + 0.05 * RNG.standard_normal((400, D)) + 1.0


@pytest.fixture(scope="module")
def fitted() -> dict[str, FittedBasis]:
    return {kind: fit_basis(kind, X, 4, site="blocks.1.mlp.out", active=2) for kind in KINDS}  # type: ignore[arg-type]


@pytest.mark.parametrize("kind", KINDS)
def test_each_is_a_dictionary(kind: str, fitted: dict[str, FittedBasis]) -> None:
    basis = fitted[kind]
    assert isinstance(basis, Dictionary)
    assert (basis.site, basis.n_latents, basis.decoder.shape) == ("blocks.1.mlp.out", 4, (4, D))
    z = basis.encode(X)
    assert z.shape == (400, 4) and basis(X).shape == X.shape
    assert basis(X) == pytest.approx(basis.decode(z))
    whole = torch.from_numpy(X[:6]).float().reshape(2, 3, D)
    assert basis(whole).dtype == torch.float32 and basis.encode(whole).shape == (2, 3, 4)
    assert basis(whole).reshape(6, D).numpy() == pytest.approx(basis(X[:6]), abs=1e-3)
    assert np.linalg.norm(basis.unit_directions, axis=1) == pytest.approx(np.ones(4))
    assert basis.direction(2).site == "blocks.1.mlp.out"
    assert fit_basis(kind, X, 4, active=2).decoder == pytest.approx(basis.decoder)  # type: ignore[arg-type]


def test_no_other_explains_more_than_pca(fitted: dict[str, FittedBasis]) -> None:
    explained = {kind: basis.fve(X) for kind, basis in fitted.items()}
    assert max(explained, key=explained.get) in ("pca", "ica")  # type: ignore[arg-type]
    assert explained["ica"] == pytest.approx(explained["pca"], abs=1e-6)
    assert all(0 < value <= 1 for value in explained.values())
    spread = np.linalg.svd(X - X.mean(0))[1] ** 2
    assert explained["pca"] == pytest.approx(spread[:4].sum() / spread.sum())


def test_how_many_units_are_active(fitted: dict[str, FittedBasis]) -> None:
    assert fitted["kmeans"].l0(X) == 1
    assert fitted["sparse coding"].l0(X) <= 2
    assert (fitted["nmf"].encode(X) >= 0).all()


def test_ica_finds_independent_directions_that_pca_mixes() -> None:
    """Sources of a heavy tail, mixed: ICA's directions are the columns of the mixing, up to order and sign."""
    rng = np.random.default_rng(1)
    mixing = rng.standard_normal((3, 6))
    rows = rng.laplace(size=(5000, 3)) ** 3 @ mixing
    true = mixing / np.linalg.norm(mixing, axis=1, keepdims=True)
    best = {k: np.abs(fit_basis(k, rows, 3).unit_directions @ true.T).max(axis=0).min() for k in ("ica", "pca")}  # type: ignore[arg-type]
    assert best["ica"] > 0.98 > best["pca"]


def test_kmeans_finds_planted_centres() -> None:
    rng = np.random.default_rng(2)
    centres = 10 * rng.standard_normal((5, D))
    rows = centres[np.arange(500) % 5] + 0.1 * rng.standard_normal((500, D))
    found = fit_basis("kmeans", rows, 5)
    assert found.encode(rows).argmax(1).reshape(-1, 5).std(axis=0).max() == 0
    assert np.linalg.norm(found.decoder[:, None] - centres, axis=2).min(axis=1).max() < 0.1


def test_nmf_finds_parts_and_encodes_by_the_exact_minimum() -> None:
    rng = np.random.default_rng(3)
    parts = np.abs(rng.standard_normal((3, D))) * (rng.random((3, D)) < 0.5)
    rows = rng.gamma(0.5, size=(300, 3)) @ parts
    found = fit_basis("nmf", rows, 3, iterations=1000)
    assert found.fve(rows) > 0.98
    z = found.encode(rows[:5])
    for row, best in zip(rows[:5], z, strict=True):
        error = ((row - best @ found.decoder) ** 2).sum()
        for _ in range(20):
            other = np.maximum(best + 0.05 * rng.standard_normal(3), 0)
            full = np.concatenate([row, np.zeros(D)])
            assert found.parts is not None
            assert ((full - best @ found.parts) ** 2).sum() <= ((full - other @ found.parts) ** 2).sum() + 1e-9
        assert error < 0.1 * (row**2).sum() + 1e-6


def test_sparse_coding_may_have_more_units_than_dimensions() -> None:
    rng = np.random.default_rng(4)
    atoms = rng.standard_normal((16, 8))
    codes = np.zeros((600, 16))
    for row in codes:
        row[rng.choice(16, 2, replace=False)] = rng.standard_normal(2) + 2
    rows = codes @ atoms
    found = fit_basis("sparse coding", rows, 16, active=2)
    assert found.decoder.shape == (16, 8) and found.l0(rows) <= 2
    assert found.fve(rows) > fit_basis("pca", rows, 2).fve(rows)


@pytest.mark.parametrize(
    ("given", "error", "said"),
    [
        (("pca", X, 11), SpecError, "needs 1 to 10"),
        (("kmeans", X, 0), SpecError, "k is 0"),
        (("nmf", X[:3], 4), SpecError, "3 rows"),
        (("pca", X[0], 2), SpecError, r"must be \[rows, d\]"),
        (("pca", np.where(np.arange(400)[:, None] == 3, np.nan, X), 2), NumericalError, "1 of 400 rows"),
    ],
)
def test_what_cannot_be_decomposed_is_refused(given: Any, error: Any, said: str) -> None:
    with pytest.raises(error, match=said):
        fit_basis(*given)


def test_other_misuse_is_refused(fitted: dict[str, FittedBasis]) -> None:
    with pytest.raises(SpecError, match="active is 9"):
        fit_basis("sparse coding", X, 4, active=9)
    with pytest.raises(SpecError, match="last dimension must be 10"):
        fitted["pca"].encode(np.zeros((2, 3)))
    with pytest.raises(SpecError, match="unit 4"):
        fitted["pca"].direction(4)
    with pytest.raises(NumericalError, match="do not vary"):
        fitted["pca"].fve(np.ones((5, D)))
