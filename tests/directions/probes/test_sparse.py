"""k-sparse probes find planted latents, and the ranking sees training rows only."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from scipy.sparse import csr_matrix

from assay.base.errors import NumericalError, SpecError
from assay.directions.probes.scores import auroc
from assay.directions.probes.sparse import fit_sparse, rank_latents


def codes(n=240, latents=60, seed=0):
    """Latents 5 and 17 fire for the class, 30 fires against it; the others fire one time in ten."""
    rng = np.random.default_rng(seed)
    y = np.arange(n) % 2
    z = np.maximum(rng.normal(size=(n, latents)), 0) * (rng.random((n, latents)) < 0.1)
    z[:, 5] += 3.0 * y * (rng.random(n) < 0.9)
    z[:, 17] += 2.0 * y * (rng.random(n) < 0.7)
    z[:, 30] += 2.5 * (1 - y) * (rng.random(n) < 0.8)
    return z, y


@pytest.mark.parametrize("by", ["mean difference", "l1"])
def test_planted_latents_rank_first(by):
    z, y = codes()
    assert set(rank_latents(z, y, by)[:3].tolist()) == {5, 17, 30}
    signed = rank_latents(z, y, by, positive_only=True)
    assert set(signed[:2].tolist()) == {5, 17}
    assert 30 not in signed


def test_more_latents_read_better_on_new_rows_and_the_others_weigh_nothing():
    z, y = codes()
    found = fit_sparse(z[:160], y[:160], np.arange(160), site="blocks.3.resid_post", ks=(1, 2, 3))
    reads = [auroc(found[k](z[160:]), y[160:]) for k in (1, 2, 3)]
    assert reads[0] < reads[2]
    assert reads[2] > 0.95
    for k, probe in found.items():
        assert len(probe.latents) == k
        assert set(torch.nonzero(probe.probe.weight)[:, 0].tolist()) == set(probe.latents)
        assert np.allclose(probe(z), probe.probe(torch.tensor(z)).numpy(), atol=1e-4)
        assert (probe.probe.origin.method, probe.probe.origin.detail["k"]) == ("k-sparse", k)


def test_dense_arrays_tensors_and_sparse_values_are_the_same():
    z, y = codes()
    expected = rank_latents(z, y)[:5].tolist()
    assert rank_latents(torch.tensor(z), y)[:5].tolist() == expected

    class Sparse:
        def to_dense(self):
            return torch.tensor(csr_matrix(z).toarray())

    assert rank_latents(Sparse(), y)[:5].tolist() == expected


def test_ranked_on_test_rows_noise_would_separate_them():
    """The trap itself: with many latents and few rows, some latent separates the rows it was ranked on."""
    rng = np.random.default_rng(0)
    z, y = np.maximum(rng.normal(size=(80, 500)), 0), np.arange(80) % 2
    honest = fit_sparse(z[:40], y[:40], np.arange(40), site="embed", ks=(5,))[5]
    peeked = rank_latents(z[40:], y[40:])[:5]
    assert auroc(honest(z[40:]), y[40:]) < 0.7
    signs = np.sign(z[40:][y[40:] == 1].mean(axis=0) - z[40:][y[40:] == 0].mean(axis=0))
    assert auroc(z[40:][:, peeked] @ signs[peeked], y[40:]) > 0.8


def test_bad_input_is_refused():
    z, y = codes(40)
    with pytest.raises(SpecError, match="ks is"):
        fit_sparse(z, y, np.arange(40), site="embed", ks=(0,))
    with pytest.raises(NumericalError, match="no latent differs"):
        rank_latents(np.ones((40, 3)), y)
    with pytest.raises(SpecError, match="two classes"):
        rank_latents(z, np.ones(40))
    with pytest.raises(NumericalError, match="codes is NaN"):
        rank_latents(np.full((40, 3), np.nan), y)
    with pytest.raises(SpecError, match="reads 60 latents; got 3"):
        fit_sparse(z, y, np.arange(40), site="embed", ks=(1,))[1](np.ones((4, 3)))
