"""Probes that are no line read what lines cannot, do not depend on padding, and stop before they memorise."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from assay.base.errors import NumericalError, SpecError
from assay.directions.probes.nonlinear import AttentionProbe, fit_attention, fit_mlp
from assay.directions.probes.scores import auroc


def parity(n, seed=0, d=4):
    rng = np.random.default_rng(seed)
    X = rng.normal(size=(n, d)) * np.logspace(-1, 1, d) + 3.0
    return X, ((X - 3.0)[:, 0] * (X - 3.0)[:, 1] > 0).astype(int)


def needles(n, seed=0, tokens=6, d=5):
    """One token of each row holds the label in its first number and a mark in its second."""
    rng = np.random.default_rng(seed)
    y = np.arange(n) % 2
    X = rng.normal(size=(n, tokens, d))
    at = rng.integers(0, tokens, n)
    X[np.arange(n), at, 0] += 4.0 * (2 * y - 1)
    X[np.arange(n), at, 1] += 6.0
    return torch.tensor(X, dtype=torch.float32), torch.ones(n, tokens, dtype=torch.bool), y, at


def test_an_mlp_reads_on_new_rows_what_no_line_does():
    X, y = parity(700)
    probe = fit_mlp(X[:500], y[:500], np.arange(500), site="embed", rate=1e-2)
    assert auroc(probe(torch.tensor(X[500:])).numpy(), y[500:]) > 0.9
    assert probe.reads == "1, not 0"
    assert probe.origin.detail["steps"] > 0


def test_an_mlp_does_not_depend_on_the_units_of_its_rows():
    X, y = parity(150)
    one = fit_mlp(X, y, np.arange(150), site="embed", steps=40)
    other = fit_mlp(X * 100.0 + 7.0, y, np.arange(150), site="embed", steps=40)
    assert torch.allclose(one(torch.tensor(X)), other(torch.tensor(X * 100.0 + 7.0)), atol=1e-2)
    again = fit_mlp(X, y, np.arange(150), site="embed", steps=40)
    assert torch.equal(one.hidden, again.hidden)


def test_early_stopping_asks_groups_that_the_fit_has_not_seen():
    """Words with random labels: the rows of a word could be memorised, other words say that nothing was learned."""
    rng = np.random.default_rng(0)
    groups = np.repeat(np.arange(40), 8)
    X = rng.normal(size=(40, 30))[groups] + 0.05 * rng.normal(size=(320, 30))
    y = rng.permutation(np.arange(40) % 2)[groups]
    by_word = fit_mlp(X, y, groups, site="embed", rate=1e-2, steps=200)
    by_row = fit_mlp(X, y, np.arange(320), site="embed", rate=1e-2, steps=200)
    assert by_word.origin.detail["held-out loss"] > 0.5
    assert by_row.origin.detail["held-out loss"] < 0.05


def test_attention_finds_the_token_and_reads_it_on_new_rows():
    X, mask, y, at = needles(500)
    probe = fit_attention(X[:350], mask[:350], y[:350], np.arange(350), site="embed", heads=2, rate=0.02, epochs=40)
    assert auroc(probe(X[350:], mask[350:]).numpy(), y[350:]) > 0.95
    looks = probe.attention(X[350:], mask[350:])
    assert torch.allclose(looks.sum(dim=1), torch.ones(150, 2))
    assert max((looks.argmax(dim=1) == torch.tensor(at[350:])[:, None]).float().mean(dim=0)) > 0.8
    assert float(probe.entropy(X[350:], mask[350:]).min()) < 0.6


@pytest.mark.parametrize("side", ["left", "right"])
def test_padding_changes_nothing(side):
    X, mask, *_ = needles(8)
    generator = torch.Generator().manual_seed(0)
    probe = AttentionProbe(
        site="embed",
        queries=torch.randn(3, 5, generator=generator),
        slopes=torch.tensor([0.5, -1.0, 0.0]),
        values=torch.randn(3, 5, generator=generator),
        bias=0.3,
    )
    pad, no = torch.full((8, 4, 5), 1e3), torch.zeros(8, 4, dtype=torch.bool)
    parts = ((pad, X), (no, mask)) if side == "left" else ((X, pad), (mask, no))
    padded, marked = (torch.cat(part, dim=1) for part in parts)
    assert torch.allclose(probe(X, mask), probe(padded, marked), atol=1e-5)
    assert torch.allclose(probe.entropy(X, mask), probe.entropy(padded, marked), atol=1e-5)


def test_a_probe_that_reads_position_fails_without_it():
    """The label is the sign of the last token; every token has such a sign, so only position tells which."""
    generator = torch.Generator().manual_seed(0)
    X = torch.randn(600, 6, 2, generator=generator)
    y = (X[:, -1, 0] > 0).int().numpy()
    mask = torch.ones(600, 6, dtype=torch.bool)
    fitted = {
        position: fit_attention(
            X[:400], mask[:400], y[:400], np.arange(400), site="embed", heads=1, rate=0.05, epochs=50, position=position
        )
        for position in (True, False)
    }
    reads = {name: auroc(probe(X[400:], mask[400:]).numpy(), y[400:]) for name, probe in fitted.items()}
    assert reads[True] > reads[False] + 0.1
    assert float(fitted[True].slopes[0]) > 0.3
    assert not fitted[False].slopes.any()
    ablated = auroc(fitted[True].without_position()(X[400:], mask[400:]).numpy(), y[400:])
    assert ablated < reads[True] - 0.1
    told = fitted[True].origin.detail
    assert told["held-out auroc without position"] < told["held-out auroc"] - 0.1
    assert 0 < told["entropy"][0] < 1


def test_attention_everywhere_has_an_entropy_of_one():
    X, mask, *_ = needles(6)
    flat = AttentionProbe(
        site="embed", queries=torch.zeros(1, 5), slopes=torch.zeros(1), values=torch.ones(1, 5), bias=0.0
    )
    assert flat.entropy(X, mask).tolist() == pytest.approx([1.0])
    assert torch.allclose(flat(X, mask), X.mean(dim=1).sum(dim=1), atol=1e-5)


def test_bad_input_is_refused():
    X, y = parity(40)
    with pytest.raises(SpecError, match="width is 65"):
        fit_mlp(X, y, np.arange(40), site="embed", width=65)
    with pytest.raises(SpecError, match="two classes"):
        fit_mlp(X, np.ones(40), np.arange(40), site="embed")
    with pytest.raises(SpecError, match="too few"):
        fit_mlp(X, y, np.zeros(40), site="embed")
    S, mask, labels, _ = needles(20)
    with pytest.raises(SpecError, match="heads is 0"):
        fit_attention(S, mask, labels, np.arange(20), site="embed", heads=0)
    blank = mask.clone()
    blank[3] = False
    with pytest.raises(SpecError, match="row 3 has no token"):
        fit_attention(S, blank, labels, np.arange(20), site="embed")
    S[1, 2, 0] = torch.nan
    with pytest.raises(NumericalError, match="NaN"):
        fit_attention(S, mask, labels, np.arange(20), site="embed")
    with pytest.raises(SpecError, match="reads 4 numbers"):
        fit_mlp(X, y, np.arange(40), site="embed", steps=1)(torch.zeros(2, 3))
