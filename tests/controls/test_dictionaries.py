"""Random dictionaries and random errors."""

from __future__ import annotations

import numpy as np
import pytest
import scipy.stats
import torch
from hypothesis import given
from hypothesis import strategies as st

import assay
from assay.activations import Texts, harvest
from assay.base.errors import NumericalError, SpecError
from assay.base.rng import torch_stream
from assay.controls.dictionaries import RandomTokens, harvest_arm, random_dictionaries, random_errors
from assay.controls.weights import reinitialised_module
from assay.subjects.tiny import tiny_model


def rows(n: int = 60, d: int = 8, seed: int = 0) -> torch.Tensor:
    return torch.randn(n, d, generator=torch.Generator().manual_seed(seed)) * torch.arange(1.0, d + 1)


def test_one_direction_explains_the_best_projection():
    x = rows()
    centred = x - x.mean(0)
    for draw, share in enumerate(random_dictionaries(x, 30, 1, draws=3, seed=4)):
        v = torch.nn.functional.normalize(
            torch.randn(30, 8, generator=torch_stream(4, "random dictionary", draw)), dim=1
        )
        best = (centred @ v.T).square().max(1).values.sum() / centred.square().sum()
        assert share == pytest.approx(float(best), rel=1e-4)


@given(seed=st.integers(0, 50), n_latents=st.integers(4, 40))
def test_more_directions_a_row_explain_more_and_all_dimensions_everything(seed, n_latents):
    x = rows(12, 4, seed)
    shares = [random_dictionaries(x, n_latents, k, draws=1, seed=seed)[0] for k in (1, 2, 4)]
    assert 0 <= shares[0] <= shares[1] + 1e-9 <= shares[2] + 2e-9 <= 1 + 1e-6
    assert random_dictionaries(x + 100, n_latents, 2, draws=1, seed=seed)[0] == pytest.approx(shares[1], abs=1e-3)


def test_draws_are_named_by_the_seed_and_told():
    told = []
    found = random_dictionaries(rows(), 20, 2, draws=3, seed=1, progress=lambda *now: told.append(now[:2]))
    assert told == [(1, 3), (2, 3), (3, 3)] and len(set(found)) == 3
    assert random_dictionaries(rows(), 20, 2, draws=2, seed=1) == found[:2]
    assert random_dictionaries(rows(), 20, 2, draws=1, seed=2)[0] != found[0]


def test_what_cannot_be_drawn_is_refused():
    for k in (0, 21):
        with pytest.raises(SpecError, match=f"k is {k}"):
            random_dictionaries(rows(), 20, k)
    with pytest.raises(NumericalError, match="no variance"):
        random_dictionaries(torch.ones(5, 3), 4, 1)


@given(seed=st.integers(0, 50))
def test_errors_keep_their_lengths_row_by_row(seed):
    error = torch.randn(3, 4, 6, generator=torch.Generator().manual_seed(seed))
    error[1, 2] = 0
    drawn = list(random_errors(error, draws=3, seed=seed))
    for one in drawn:
        torch.testing.assert_close(one.norm(dim=-1), error.norm(dim=-1))
    assert not torch.equal(drawn[0], drawn[1])


def test_errors_of_two_sites_point_apart():
    error = torch.ones(50, 32)
    one, two = (next(random_errors(error, of=name)) for name in ("blocks.0.mlp.out 0", "blocks.1.mlp.out 0"))
    cosines = torch.nn.functional.cosine_similarity(one, two)
    assert float(cosines.abs().mean()) < 0.3 and torch.equal(one, next(random_errors(error, of="blocks.0.mlp.out 0")))
    mean = torch.stack(list(random_errors(error, draws=40))).mean(0)
    assert float(mean.norm(dim=1).mean() / error.norm(dim=1).mean()) < 0.25, "they point anywhere"


@given(seed=st.integers(0, 50), start=st.integers(0, 4))
def test_random_tokens_keep_lengths_and_special_tokens_and_begin_anywhere(seed, start):
    documents = [[1, 7, 7, 9], [1, 4], [5, 6, 2, 8, 9], [3], [1, 2, 3, 4, 5, 6]]
    corpus = RandomTokens(corpus=Texts(documents), vocab=40, keep=(1, 2), seed=seed)
    whole = list(corpus.pieces())
    assert list(corpus.pieces(start)) == whole[start:]
    for (_, _, ids), given_ids in zip(whole, documents, strict=True):
        assert [i for i, token in enumerate(ids) if token in (1, 2)] == [
            i for i, token in enumerate(given_ids) if token in (1, 2)
        ]
        assert len(ids) == len(given_ids) and all(0 <= token < 40 for token in ids)


def test_random_tokens_are_uniform():
    corpus = RandomTokens(corpus=Texts([[5] * 4000]), vocab=8, keep=(0,))
    counts = np.bincount(next(corpus.pieces())[2], minlength=8)
    assert counts[0] == 0 and scipy.stats.chisquare(counts[1:]).pvalue > 1e-3


def test_random_tokens_need_something_to_draw():
    with pytest.raises(SpecError, match="no token to draw"):
        RandomTokens(corpus=Texts([[1]]), vocab=2, keep=(0, 1))


@pytest.fixture(scope="module")
def stored(tmp_path_factory):
    """A tiny model, and a store of two of its sites."""
    subject = assay.load(tiny_model("llama"))
    ids = torch.randint(3, 67, (30, 12), generator=torch.Generator().manual_seed(0))
    sites = ["blocks.0.resid_post", "blocks.1.mlp.out"]
    out = tmp_path_factory.mktemp("arms") / "store"
    texts = Texts(ids.tolist())
    return (
        subject,
        ids,
        harvest(subject, texts, sites, out=out, context=12, layout="split", tokens=350, dtype="float32"),
    )


def test_an_arm_with_redrawn_weights_reads_the_same_tokens(stored, tmp_path):
    subject, ids, store = stored
    before = {name: value.clone() for name, value in subject.module.state_dict().items()}
    arm = harvest_arm(subject, store, "reinitialised", out=tmp_path / "arm", seed=3)
    assert (arm.n, arm.sites, arm.dtype) == (store.n, store.sites, store.dtype)
    index = np.arange(arm.n)
    assert (arm.tokens(index)["token"] == store.tokens(index)["token"]).all()
    assert all(torch.equal(before[name], value) for name, value in subject.module.state_dict().items())
    redrawn = assay.load(reinitialised_module(subject.module, "gaussian", 3))
    expected = redrawn.run(ids[:1], capture=store.sites[0])[store.sites[0]][0]
    torch.testing.assert_close(arm.rows(index[:12])[store.sites[0]], torch.Tensor(expected), atol=1e-5, rtol=1e-5)


def test_an_arm_of_random_tokens_is_the_same_model_on_other_tokens(stored, tmp_path):
    subject, _, store = stored
    arm = harvest_arm(subject, store, "random-tokens", out=tmp_path / "arm", sites=store.sites[1:], seed=3)
    assert arm.n == store.n and arm.sites == store.sites[1:]
    index = np.arange(arm.n)
    assert (arm.tokens(index)["token"] == store.tokens(index)["token"]).mean() < 0.2
    context = torch.from_numpy(arm.context(0))[None]
    expected = subject.run(context, capture=arm.sites[0])[arm.sites[0]][0]
    torch.testing.assert_close(arm.rows(index[:12])[arm.sites[0]], torch.Tensor(expected), atol=1e-5, rtol=1e-5)
    again = harvest_arm(subject, store, "random-tokens", out=tmp_path / "arm", sites=store.sites[1:], seed=3)
    assert again.describe() == arm.describe()
    with pytest.raises(SpecError, match="holds another harvest"):
        harvest_arm(subject, store, "random-tokens", out=tmp_path / "arm", sites=store.sites[1:], seed=4)


def test_the_share_is_that_of_all_rows_however_many_there_are():
    rows = torch.randn(1100, 12, generator=torch.Generator().manual_seed(5)) * torch.linspace(0.1, 3, 12)
    (whole,) = random_dictionaries(rows, 40, 3, draws=1)
    centred = rows - rows.mean(0)
    parts = [random_dictionaries(torch.cat([p, -p]), 40, 3, draws=1)[0] for p in centred.split(300)]  # each of mean 0
    sizes = [float(p.square().sum()) for p in centred.split(300)]
    assert whole == pytest.approx(float(np.average(parts, weights=sizes)), abs=1e-5)
