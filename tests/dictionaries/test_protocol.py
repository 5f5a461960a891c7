"""What is made for any dictionary (`assay.base.protocols`) works with assay's own: latents steered and clamped."""

from __future__ import annotations

import pytest
import torch

import assay
from assay.base.errors import SpecError
from assay.base.protocols import Dictionary as Protocol
from assay.dictionaries import Card, Dictionary, Site, TopK, Training, train
from assay.dictionaries.training.source import Rows
from assay.directions.steering import clamp_latents, steer_latent
from assay.subjects.tiny import tiny_model

SITE = "blocks.0.resid_post"


@pytest.fixture(scope="module")
def subject():
    return assay.load(tiny_model("llama"))


@pytest.fixture(scope="module")
def ids():
    return torch.randint(3, 67, (24, 16), generator=torch.Generator().manual_seed(1))


@pytest.fixture(scope="module", params=["topk", "batchtopk", "jumprelu", "l1", "gated"])
def dictionary(request, subject, ids) -> Dictionary:
    """A dictionary trained for a moment on a tiny model's stream."""
    rows = subject.run(ids, capture=SITE)[SITE].flatten(0, 1)
    own = {"k": 6} if "topk" in request.param else {"sparsity": 0.5}
    settings = Training(family=request.param, latents=48, steps=60, batch=96, lr=5e-3, **own)
    found = train(Rows({SITE: torch.Tensor(rows)}, batch=96), settings, reads=SITE).dictionary
    assert isinstance(found, Dictionary)
    return found


def test_it_is_a_dictionary(dictionary):
    assert isinstance(dictionary, Protocol)


def test_a_dose_adds_so_much_of_the_decoders_row(subject, ids, dictionary):
    before, edit = subject.run(ids, capture=SITE)[SITE], steer_latent(dictionary, 5, 2.0, dose=1.5)
    after = subject.run(ids, capture=SITE, edits=[edit])[SITE]
    torch.testing.assert_close(after - before, (3.0 * dictionary.decoder[5]).expand_as(after), atol=1e-4, rtol=1e-4)


def test_a_clamp_keeps_what_the_dictionary_misses(subject, ids, dictionary):
    x = torch.Tensor(subject.run(ids, capture=SITE)[SITE])
    z = dictionary.encode(x)
    latent = int(z.flatten(0, 1).sum(0).argmax())
    after = subject.run(ids, capture=SITE, edits=[clamp_latents(dictionary, {latent: 0.0})])[SITE]
    error = x - dictionary(x)
    z[..., latent] = 0
    torch.testing.assert_close(torch.Tensor(after), dictionary.decode(z) + error, atol=1e-4, rtol=1e-4)
    assert float((after - x).abs().max()) > 1e-3


def test_a_clamp_to_what_is_there_changes_nothing(subject, ids, dictionary):
    z = dictionary.encode(torch.Tensor(subject.run(ids, capture=SITE)[SITE]))
    silent = int((z.flatten(0, 1) > 0).sum(0).argmin())
    one = ids[:1]
    x = torch.Tensor(subject.run(one, capture=SITE)[SITE])
    z = dictionary.encode(x)[0, -1]
    kept = clamp_latents(dictionary, {silent: float(z[silent])}, positions="last")
    after = subject.run(one, capture=SITE, edits=[kept])[SITE]
    torch.testing.assert_close(torch.Tensor(after), x, atol=1e-5, rtol=1e-5)


def one(reads: str, writes: str, normalisation: str = "none") -> Dictionary:
    stream = torch.Generator().manual_seed(0)
    weights = torch.randn(8, 32, generator=stream)
    card = Card(reads=(Site(reads, 32),), writes=(Site(writes, 32),), normalisation=normalisation)
    return Dictionary(
        W_enc=weights, b_enc=torch.zeros(8), W_dec=weights, b_dec=torch.zeros(32), activation=TopK(k=2), card=card
    )


def test_what_a_latent_cannot_steer_is_refused():
    transcoder = one("blocks.0.mlp.in", "blocks.0.mlp.out")
    with pytest.raises(SpecError, match="transcoder writes elsewhere"):
        steer_latent(transcoder, 1, 1.0)
    with pytest.raises(SpecError, match="transcoder writes elsewhere"):
        clamp_latents(transcoder, {1: 0.0})
    with pytest.raises(SpecError, match="normalises each row"):
        clamp_latents(one(SITE, SITE, "layer_norm"), {1: 0.0})
    with pytest.raises(SpecError, match="normalises each row"):
        steer_latent(one(SITE, SITE, "constant_norm"), 1, 1.0)
