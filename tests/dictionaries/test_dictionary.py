"""A dictionary: the two encoders agree, conventions are undone, and what does not fit is refused by name."""

from __future__ import annotations

import math
import warnings
from dataclasses import replace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from assay.base.errors import NumericalError, SpecError
from assay.dictionaries import Card, Dictionary, Gated, GroupMax, JumpReLU, ReLU, Site, TopK, load

D, F = 8, 24
REFUSED = (SpecError, TypeError)  # a TypeError where the checks of shapes that tests run with come first
NAMES = ("relu", "topk", "jumprelu", "gated", "groupmax")


def activation(name: str):
    stream = torch.Generator().manual_seed(7)
    return {
        "relu": ReLU(),
        "topk": TopK(k=3),
        "jumprelu": JumpReLU(threshold=torch.rand(F, generator=stream)),
        "gated": Gated(log_gain=torch.randn(F, generator=stream) * 0.3, offset=torch.randn(F, generator=stream) * 0.3),
        "groupmax": GroupMax(k=4),
    }[name]


def made(name: str = "relu", d_out: int = D, seed: int = 0, skip: bool = False, **card) -> Dictionary:
    stream = torch.Generator().manual_seed(seed)

    def draw(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=stream)

    writes = () if d_out == D and not skip else (Site("blocks.0.mlp.out", d_out),)
    return Dictionary(
        W_enc=draw(F, D) / math.sqrt(D),
        b_enc=draw(F) * 0.1,
        W_dec=draw(F, d_out),
        b_dec=draw(d_out),
        activation=activation(name),
        W_skip=draw(d_out, D) if skip else None,
        card=Card(reads=(Site("blocks.0.mlp.in", D),), writes=writes, **card),
    )


def rows(*shape: int, seed: int = 1) -> torch.Tensor:
    return torch.randn(*shape, D, generator=torch.Generator().manual_seed(seed)) * 2 + 0.5


@given(
    name=st.sampled_from(NAMES),
    centred=st.booleans(),
    normalisation=st.sampled_from(["none", "layer_norm", "constant_norm"]),
    shape=st.sampled_from([(), (0,), (5,), (2, 3), (2, 0, 3)]),
    seed=st.integers(0, 20),
)
def test_pairs_and_dense_activations_agree(name, centred, normalisation, shape, seed):
    normalisation = "none" if 0 in shape else normalisation  # torch warns of the deviation of no rows
    d = made(name, seed=seed, centred=centred, normalisation=normalisation)
    x = rows(*shape, seed=seed)
    z, sparse = d.encode(x), d.encode_sparse(x)
    assert z.shape == (*shape, F) and sparse.shape == shape
    torch.testing.assert_close(sparse.to_dense(), z, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(d.decode(sparse), d.decode(z), rtol=1e-5, atol=1e-5)
    assert d(x).shape == x.shape


@pytest.mark.parametrize("name", NAMES)
def test_the_formula(name):
    d, x = made(name, centred=True), rows(5)
    h = (x - d.b_dec) @ d.W_enc.T + d.b_enc
    torch.testing.assert_close(d.pre_activations(x), h, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(d(x), d.activation(h) @ d.W_dec + d.b_dec, rtol=1e-4, atol=1e-4)


def test_a_transcoder_with_a_skip():
    d, x = made(d_out=5, skip=True), rows(3)
    assert d.kind == "transcoder" and "blocks.0.mlp.in -> blocks.0.mlp.out" in repr(d)
    torch.testing.assert_close(d(x), d.decode(d.encode(x)) + x @ d.W_skip.T)
    assert d(x.bfloat16()).shape == (3, 5)


@pytest.mark.parametrize("kind", ["layer_norm", "constant_norm"])
def test_normalisation_is_undone(kind):
    """What is done to rows before encoding leaves no trace in a dictionary that reconstructs all it is given."""
    eye, x = torch.eye(D), rows(6)
    d = Dictionary(
        W_enc=torch.cat([eye, -eye]),
        b_enc=torch.zeros(2 * D),
        W_dec=torch.cat([eye, -eye]),
        b_dec=torch.zeros(D),
        card=Card(reads=(Site("blocks.0.resid_post", D),), normalisation=kind),
    )
    torch.testing.assert_close(d(x), x, rtol=1e-3, atol=1e-4)
    torch.testing.assert_close(d.encode(x * 3), d.encode(x), rtol=1e-3, atol=1e-4)  # the scale does not matter
    if kind == "layer_norm":
        torch.testing.assert_close(d.encode(x + 5), d.encode(x), rtol=1e-3, atol=1e-4)


@given(factor=st.floats(0.01, 100.0), name=st.sampled_from(NAMES), centred=st.booleans())
def test_a_folded_factor(factor, name, centred):
    d, x = made(name, centred=centred), rows(4)
    folded = d.folded(factor)
    torch.testing.assert_close(folded.encode(x / factor), d.encode(x), rtol=1e-3, atol=1e-4)
    torch.testing.assert_close(folded(x / factor) * factor, d(x), rtol=1e-3, atol=1e-3)
    known = replace(d, card=replace(d.card, mean_norm=6.0))
    assert known.folded(factor).card.mean_norm == pytest.approx(6.0 / factor)


def test_factors_of_columns_and_of_what_is_written():
    d, x = made(d_out=5, skip=True), rows(4)
    into, out = torch.rand(D) + 0.5, torch.rand(5) + 0.5
    torch.testing.assert_close(d.folded(into, out)(x / into) * out, d(x), rtol=1e-4, atol=1e-4)
    known = replace(d, card=replace(d.card, mean_norm=6.0))
    assert known.folded(into, out).card.mean_norm is None, "columns have grown by different factors"
    with pytest.raises(SpecError, match="must be positive"):
        d.folded(0.0)
    for wrong in (torch.ones(D + 1), torch.ones(0)):
        with pytest.raises(SpecError, match="give one number"):
            d.folded(wrong, out)
    with pytest.raises(SpecError, match="one factor"):
        made(centred=True).folded(2.0, 3.0)
    with pytest.raises(SpecError, match="normalised"):
        made(normalisation="layer_norm").folded(2.0)


@pytest.mark.parametrize("name", ["relu", "jumprelu", "gated"])
@pytest.mark.parametrize("centred", [False, True])
def test_unit_decoder_rows_leave_the_reconstruction(name, centred):
    d, x = made(name, centred=centred), rows(9)
    d.W_dec[3] = 0
    unit = d.with_unit_decoder()
    norms = torch.ones(F)
    norms[3] = 0
    torch.testing.assert_close(unit.W_dec.norm(dim=1), norms)
    torch.testing.assert_close(unit(x), d(x), rtol=1e-4, atol=1e-4)
    scale = torch.where(norms > 0, d.W_dec.norm(dim=1), 1.0)
    torch.testing.assert_close(unit.encode(x), d.encode(x) * scale, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("name", ["topk", "groupmax"])
def test_unit_decoder_rows_would_change_which_are_chosen(name):
    with pytest.raises(SpecError, match="without changing which are active"):
        made(name).with_unit_decoder()


def test_a_crosscoder_is_split_into_its_sites():
    sites = (Site("blocks.0.mlp.in", 3), Site("blocks.1.mlp.in", 5))
    d = replace(made(), card=Card(reads=sites))
    out = d(rows(2, 2))
    parts = d.split(out)
    assert d.kind == "crosscoder" and d.site == "blocks.0.mlp.in+blocks.1.mlp.in"
    assert torch.equal(torch.cat(list(parts.values()), dim=-1), out) and list(parts) == [s.name for s in sites]


def test_rows_of_another_length_warn():
    d = replace(made(), card=replace(made().card, mean_norm=float(rows(50).norm(dim=1).mean())))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert d.check_inputs(rows(7, 3)) == "" and made().check_inputs(rows(5) * 1000) == ""
    for factor in (10.0, 0.1):
        with pytest.warns(UserWarning, match="was trained on"):
            assert "another site" in d.check_inputs(rows(20) * factor)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("skip", [False, True])
def test_saved_and_loaded(name, skip, tmp_path):
    d = made(name, skip=skip, family="x", mean_norm=2.5, training={"steps": 3})
    read = load(d.save(tmp_path / "d"))
    assert read.card == d.card and type(read.activation) is type(d.activation)
    assert {n: t.tolist() for n, t in read.tensors().items()} == {n: t.tolist() for n, t in d.tensors().items()}
    assert torch.equal(read(rows(4)), d(rows(4)))


@pytest.mark.parametrize("name", NAMES)
def test_float_types(name):
    d, x = made(name, centred=True), rows(16)
    for kind in (torch.bfloat16, torch.float16):
        assert d(x.to(kind)).dtype == torch.float32, "rows are computed in the weights' float type"
        torch.testing.assert_close(d.encode(x.to(kind)), d.encode(x.to(kind).float()))
        small = d.to(kind)
        assert {t.dtype for t in small.tensors().values()} == {kind}
        out = small(x)
        assert out.dtype == kind and small.encode_sparse(x).values.dtype == kind
        assert float((out.float() - d(x)).norm() / d(x).norm()) < 0.1
    wide = d.to(torch.float64)
    torch.testing.assert_close(wide(x.double()).float(), d(x), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    ("change", "error", "said"),
    [
        ({"W_dec": torch.zeros(F, D + 1), "b_dec": torch.zeros(D + 1)}, SpecError, r"W_dec has shape \(24, 9\)"),
        ({"W_enc": torch.zeros(F, D - 1)}, SpecError, "W_enc has shape"),
        ({"b_enc": torch.zeros(F + 1)}, REFUSED, "b_enc"),
        ({"b_dec": torch.zeros(1)}, REFUSED, "b_dec"),
        ({"W_skip": torch.zeros(D, D + 1)}, REFUSED, "W_skip"),
        ({"activation": JumpReLU(threshold=torch.zeros(F - 1))}, SpecError, "threshold has shape"),
        ({"b_enc": torch.full((F,), float("nan"))}, NumericalError, "b_enc holds NaN"),
        ({"W_dec": torch.full((F, D), float("inf"))}, NumericalError, "W_dec holds NaN"),
    ],
)
def test_weights_that_do_not_fit_are_named(change, error, said):
    with pytest.raises(error, match=said):
        replace(made(), **change)


def test_cards_that_cannot_be():
    with pytest.raises(SpecError, match="names no site"):
        Card(reads=())
    with pytest.raises(REFUSED, match="layer_norm"):
        made(normalisation="batch_norm")
    with pytest.raises(SpecError, match="cannot be subtracted"):
        made(d_out=5, centred=True)
    with pytest.raises(SpecError, match="there is a skip"):
        made(skip=True, normalisation="layer_norm")


@pytest.mark.parametrize("call", ["encode", "encode_sparse", "__call__", "pre_activations"])
def test_rows_of_the_wrong_width_name_the_site(call):
    with pytest.raises(SpecError, match=r"rows have 9 numbers and this dictionary reads 8: blocks.0.mlp.in \(8\)"):
        getattr(made(), call)(torch.zeros(2, D + 1))


@pytest.mark.parametrize("name", NAMES)
def test_a_row_that_is_not_finite_is_not_reconstructed_as_if_it_were(name):
    x = rows(3)
    x[1] = float("nan")
    assert bool(torch.isnan(made(name)(x)[1]).any()) and bool(torch.isfinite(made(name)(x)[[0, 2]]).all())
    if name in ("relu", "topk", "jumprelu"):
        with pytest.raises(NumericalError):
            made(name).encode_sparse(x)
