"""What a dictionary explains and a model keeps, against formulas by hand and dictionaries whose answer is known."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn.metrics import r2_score

import assay
from assay.base.errors import NumericalError, SpecError
from assay.dictionaries import Card, CrossLayer, Dictionary, ReLU, Site, TopK
from assay.dictionaries.metrics import random_error_losses, reconstruction, recovered
from assay.subjects.tiny import tiny_model

D, F = 6, 20


def drawn(seed: int = 0, **change) -> Dictionary:
    stream = torch.Generator().manual_seed(seed)
    parts = {
        "W_enc": torch.randn(F, D, generator=stream),
        "b_enc": torch.randn(F, generator=stream),
        "W_dec": torch.randn(F, D, generator=stream) * 0.3,
        "b_dec": torch.randn(D, generator=stream) * 0.1,
        "card": Card(reads=(Site("blocks.0.resid_post", D),)),
    }
    return Dictionary(**(parts | change))


def sites(*names: str, width: int) -> tuple[Site, ...]:
    return tuple(Site(name, width) for name in names)


def identity(reads: tuple[Site, ...], scale: float = 1.0) -> Dictionary:
    """A dictionary that gives back what it is given (times a scale): each dimension has a latent for either sign."""
    eye = torch.eye(sum(site.width for site in reads))
    both = torch.cat([eye, -eye])
    zeros = torch.zeros(len(eye))
    return Dictionary(W_enc=both, b_enc=torch.zeros(len(both)), W_dec=both * scale, b_dec=zeros, card=Card(reads=reads))


@settings(max_examples=15)
@given(seed=st.integers(0, 200))
def test_reconstruction_is_its_formulas(seed):
    d = drawn(seed, activation=TopK(k=3) if seed % 2 else ReLU())
    x = torch.randn(40, D, generator=torch.Generator().manual_seed(seed + 1)) + 1
    found, guess, z = reconstruction(d, x, seed=1), d(x), d.encode(x)
    assert found.fve == pytest.approx(r2_score(x, guess, multioutput="variance_weighted"), rel=1e-5, abs=1e-6)
    by_row = 1 - (x - guess).square().sum(1) / (x - x.mean(0)).square().sum(1)
    assert found.fve_rowwise == pytest.approx(float(by_row.mean()), rel=1e-4)
    assert found.cosine == pytest.approx(float(torch.nn.functional.cosine_similarity(x, guess).mean()), rel=1e-4)
    assert found.length_ratio == pytest.approx(float((guess.norm(dim=1) / x.norm(dim=1)).mean()), rel=1e-4)
    counts = (z != 0).sum(1).double().numpy()
    assert found.l0 == pytest.approx(counts.mean())
    assert found.l0_quantiles == pytest.approx(tuple(np.quantile(counts, (0.05, 0.25, 0.5, 0.75, 0.95))))
    active = z != 0
    np.testing.assert_allclose(found.frequency, active.double().mean(0).numpy())
    assert found.dead == pytest.approx(float((~active.any(0)).double().mean()))
    assert found.dense == pytest.approx(float((active.double().mean(0) > 0.1).double().mean()))
    mean = z.double().sum(0) / active.sum(0)
    np.testing.assert_allclose(found.scale, (mean * d.W_dec.double().norm(dim=1)).numpy(), rtol=1e-5)
    np.testing.assert_allclose(
        found.alignment, torch.nn.functional.cosine_similarity(d.W_enc, d.W_dec).numpy(), rtol=1e-4, atol=1e-6
    )
    assert found.fve_interval.low <= found.fve <= found.fve_interval.high
    assert found.l0_interval.low <= found.l0 <= found.l0_interval.high
    edges, counted = found.density(8)
    assert counted.sum() == int(active.any(0).sum()) and len(edges) == 9


def test_more_rows_than_a_block_and_any_order_of_them():
    d, x = drawn(), torch.randn(5000, D, generator=torch.Generator().manual_seed(2))
    groups = [row % 50 for row in range(5000)]
    one = reconstruction(d, x, groups=groups)
    two = reconstruction(d, x.flip(0), groups=groups[::-1])
    assert one.fve == pytest.approx(two.fve, rel=1e-9) and one.l0 == two.l0 and one.rows == 5000
    assert one.fve == pytest.approx(r2_score(x, d(x), multioutput="variance_weighted"), rel=1e-6)


def test_a_perfect_dictionary_and_one_that_says_the_mean():
    x = torch.randn(30, D, generator=torch.Generator().manual_seed(3))
    perfect = reconstruction(identity(sites("blocks.0.resid_post", width=D)), x)
    assert (perfect.fve, perfect.fve_rowwise, perfect.length_ratio, perfect.l0) == (1.0, 1.0, 1.0, D)
    mean = drawn(W_dec=torch.zeros(F, D), b_dec=x.mean(0))
    assert reconstruction(mean, x).fve == pytest.approx(0, abs=1e-6)


def test_groups_widen_the_interval_of_alike_rows():
    block = torch.randn(8, D, generator=torch.Generator().manual_seed(4))
    x = block.repeat_interleave(40, dim=0) + 0.01 * torch.randn(320, D, generator=torch.Generator().manual_seed(5))
    alone = reconstruction(drawn(), x).fve_interval
    grouped = reconstruction(drawn(), x, groups=[row // 40 for row in range(320)]).fve_interval
    assert grouped.high - grouped.low > 1.5 * (alone.high - alone.low)


def test_a_cross_layer_transcoder_is_measured_site_by_site():
    writes = sites("blocks.0.mlp.out", "blocks.1.mlp.out", width=D)
    stream = torch.Generator().manual_seed(8)
    decoder, x, y = (torch.randn(n, 2 * D, generator=stream) for n in (F, 25, 25))
    one = drawn(
        0, W_dec=decoder, b_dec=torch.zeros(2 * D), card=Card(reads=sites("blocks.0.mlp.in", width=D), writes=writes)
    )
    two = drawn(1, card=Card(reads=sites("blocks.1.mlp.in", width=D), writes=writes[1:]))
    clt = CrossLayer(layers=(one, two))
    found = reconstruction(clt, x, y)
    guess = clt(x.unflatten(1, (2, D))).flatten(1)
    assert found.fve == pytest.approx(r2_score(y, guess, multioutput="variance_weighted"), rel=1e-5)
    assert len(found.frequency) == 2 * F and np.isnan(found.alignment).all()
    with pytest.raises(SpecError, match="give the rows it should write as y"):
        reconstruction(clt, x)


def test_rows_that_say_nothing_are_refused():
    d = drawn()
    for x, error, said in (
        (torch.ones(1, D), SpecError, "two or more"),
        (torch.ones(5, D), NumericalError, "no variance"),
        (torch.full((5, D), float("nan")), NumericalError, "NaN"),
    ):
        with pytest.raises(error, match=said):
            reconstruction(d, x)
    with pytest.raises(SpecError, match="one group"):
        reconstruction(d, torch.randn(4, D), groups=[0, 0, 0, 0])
    with pytest.raises(SpecError, match="3 groups for 4 rows"):
        reconstruction(d, torch.randn(4, D), groups=[0, 0, 1])


# -- the model on its reconstructions

TOKENS = torch.randint(0, 60, (5, 9), generator=torch.Generator().manual_seed(0))


@pytest.fixture(scope="module")
def llama():
    return assay.load(tiny_model("llama"))


@pytest.fixture(scope="module")
def gpt2():
    return assay.load(tiny_model("gpt2", activation_function="relu"))


def widths(subject, *names: str) -> tuple[Site, ...]:
    run = subject.run(TOKENS, capture=list(names))
    return tuple(Site(name, run[name].flatten(2).shape[-1]) for name in names)


CASES = [
    ("blocks.0.resid_post",),
    ("blocks.1.attn.z",),
    ("blocks.0.mlp.out",),
    ("blocks.0.mlp.out", "blocks.1.attn.z"),
    ("blocks.0.resid_mid", "blocks.1.resid_post"),
]


@pytest.mark.parametrize("names", CASES, ids="+".join)
def test_the_identity_recovers_everything_and_nothing_recovers_nothing(names, llama):
    reads = widths(llama, *names)
    kept = recovered(llama, identity(reads), TOKENS, batch=2)
    assert kept.ce == kept.ce_dictionary and kept.kl_dictionary == 0
    assert all(getattr(kept, name) == 1.0 for name in kept.intervals)
    lost = recovered(llama, identity(reads, scale=0.0), TOKENS, batch=2)
    assert lost.ce_dictionary == lost.ce_zero and lost.kl_dictionary == lost.kl_zero > 0
    assert lost.ce_recovered_zero == 0 and lost.kl_recovered_zero == 0
    assert lost.tokens == TOKENS.shape[0] * (TOKENS.shape[1] - 1) == kept.tokens


def mean_cross_entropy(subject, edits=()) -> float:
    logits = subject.run(TOKENS, edits=list(edits)).logits[:, :-1].double()
    return float(torch.nn.functional.cross_entropy(logits.flatten(0, 1), TOKENS[:, 1:].flatten()))


@pytest.mark.parametrize("site", ["blocks.0.resid_post", "blocks.1.attn.z", "blocks.1.mlp.out"])
@pytest.mark.parametrize("first", [0, 2])
def test_arms_are_the_edits_they_say(site, first, llama):
    """Half the activation, zero and the mean, each put there by hand; the first positions may stay as they are."""
    clean = llama.run(TOKENS, capture=[site])[site]
    d = identity(widths(llama, site), scale=0.5)
    found = recovered(llama, d, TOKENS, leave_first=first, batch=3)
    mean = clean[:, first:].double().mean((0, 1)).float().expand_as(clean)
    wanted = {}
    for arm, value in (("ce_dictionary", clean * 0.5), ("ce_zero", clean * 0), ("ce_mean", mean)):
        value = value.clone()
        value[:, :first] = clean[:, :first]
        wanted[arm] = mean_cross_entropy(llama, [assay.Set(site, value)])
    wanted["ce"] = mean_cross_entropy(llama)
    for arm, value in wanted.items():
        assert getattr(found, arm) == pytest.approx(value, rel=1e-5), arm
    for name, against in (("ce_recovered_zero", "ce_zero"), ("ce_recovered_mean", "ce_mean")):
        share = (wanted[against] - wanted["ce_dictionary"]) / (wanted[against] - wanted["ce"])
        assert getattr(found, name) == pytest.approx(share, rel=1e-2), name
    for name, interval in found.intervals.items():
        assert interval.low <= getattr(found, name) <= interval.high, name


def test_kl_is_that_of_the_model_from_the_edited_one(llama):
    site = "blocks.0.mlp.out"
    found = recovered(llama, identity(widths(llama, site), scale=0.5), TOKENS)
    clean = llama.run(TOKENS, capture=[site])
    edited = llama.run(TOKENS, edits=[assay.Set(site, clean[site] * 0.5)])
    logs, others = (run.logits[:, :-1].double().log_softmax(-1) for run in (clean, edited))
    wanted = float((logs.exp() * (logs - others)).sum(-1).mean())
    assert found.kl_dictionary == pytest.approx(wanted, rel=1e-3)


def test_rows_of_extreme_length_stay_as_they_are(llama):
    site = "blocks.0.resid_post"
    clean = llama.run(TOKENS, capture=[site])[site]
    lengths = clean.norm(dim=-1)
    longest = float(lengths.flatten().sort().values[-6])
    found = recovered(llama, identity(widths(llama, site), scale=0.0), TOKENS, leave_longer_than=longest)
    value = torch.where((lengths > longest)[..., None], clean, 0)
    assert found.ce_dictionary == pytest.approx(mean_cross_entropy(llama, [assay.Set(site, value)]), rel=1e-5)


def test_the_model_s_own_mlp_is_a_transcoder_that_loses_nothing(gpt2):
    mlp = gpt2.module.transformer.h[1].mlp
    read, write = widths(gpt2, "blocks.1.mlp.in", "blocks.1.mlp.out")
    exact = Dictionary(
        W_enc=mlp.c_fc.weight.detach().T.contiguous(),
        b_enc=mlp.c_fc.bias.detach(),
        W_dec=mlp.c_proj.weight.detach(),
        b_dec=mlp.c_proj.bias.detach(),
        card=Card(reads=(read,), writes=(write,)),
    )
    found = recovered(gpt2, exact, TOKENS)
    assert found.ce_dictionary == pytest.approx(found.ce, rel=1e-6)
    assert found.ce_recovered_mean == pytest.approx(1, abs=1e-3) and found.kl_dictionary < 1e-6
    run = gpt2.run(TOKENS, capture=["blocks.1.mlp.in", "blocks.1.mlp.out"])
    y = run["blocks.1.mlp.out"].flatten(0, 1)
    assert reconstruction(exact, run["blocks.1.mlp.in"].flatten(0, 1), y).fve == pytest.approx(1, abs=1e-6)
    silent = replace(exact, W_dec=exact.W_dec * 0, b_dec=exact.b_dec * 0)
    assert recovered(gpt2, silent, TOKENS).ce_dictionary == found.ce_zero


def test_random_errors_of_no_length_change_nothing_and_the_batch_does_not_matter(llama):
    site = "blocks.1.attn.z"
    reads = widths(llama, site)
    clean = mean_cross_entropy(llama)
    assert random_error_losses(llama, identity(reads), TOKENS, draws=2) == pytest.approx([clean] * 2, rel=1e-6)
    half = identity(reads, scale=0.5)
    losses = random_error_losses(llama, half, TOKENS, draws=3, batch=2)
    assert losses == pytest.approx(random_error_losses(llama, half, TOKENS, draws=3, batch=5), rel=1e-5)
    assert len(set(losses)) == 3 and losses != random_error_losses(llama, half, TOKENS, draws=3, seed=1)
    every = random_error_losses(llama, half, TOKENS, draws=2, leave_first=TOKENS.shape[1])
    assert every == pytest.approx([clean] * 2, rel=1e-6)


def test_texts_too_few_or_too_short_are_refused(llama):
    d = identity(widths(llama, "blocks.0.resid_post"))
    for tokens in (TOKENS[:1], TOKENS[:, :1]):
        with pytest.raises(SpecError, match="two or more texts"):
            recovered(llama, d, tokens)
