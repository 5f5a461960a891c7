"""Cross-layer transcoders, against a loop over layers as the paper writes them."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from assay.base.errors import SpecError
from assay.dictionaries import Card, CrossLayer, Dictionary, JumpReLU, ReLU, Site, TopK, load

LAYERS, D, OUT, F = 3, 4, 5, 6
WRITES = tuple(Site(f"blocks.{m}.mlp.out", OUT) for m in range(LAYERS))


def layer(index: int, skip: bool = False, **change) -> Dictionary:
    stream = torch.Generator().manual_seed(index)
    width = OUT * (LAYERS - index)
    bias = torch.zeros(width)
    bias[:OUT] = torch.randn(OUT, generator=stream)
    parts = {
        "W_enc": torch.randn(F, D, generator=stream),
        "b_enc": torch.randn(F, generator=stream),
        "W_dec": torch.randn(F, width, generator=stream),
        "b_dec": bias,
        "activation": (ReLU(), TopK(k=2), JumpReLU(threshold=torch.full((F,), 0.3)))[index],
        "card": Card(reads=(Site(f"blocks.{index}.mlp.in", D),), writes=WRITES[index:]),
        "W_skip": torch.randn(width, D, generator=stream) if skip else None,
    }
    return Dictionary(**(parts | change))


def made(skip: bool = False) -> CrossLayer:
    return CrossLayer(layers=tuple(layer(i, skip) for i in range(LAYERS)))


@pytest.mark.parametrize("skip", [False, True])
@pytest.mark.parametrize("shape", [(), (7,), (2, 3)])
def test_each_layer_writes_to_its_own_and_every_later_one(shape, skip):
    clt = made(skip)
    x = torch.randn(*shape, LAYERS, D, generator=torch.Generator().manual_seed(9))
    wanted = torch.zeros(*shape, LAYERS, OUT)
    encoded = []
    for source, own in enumerate(clt.layers):
        z = own.activation(x[..., source, :] @ own.W_enc.T + own.b_enc)
        encoded.append(z)
        wanted[..., source, :] += own.b_dec[:OUT]
        for target in range(source, LAYERS):
            block = slice((target - source) * OUT, (target - source + 1) * OUT)
            wanted[..., target, :] += z @ own.W_dec[:, block]
            if skip:
                wanted[..., target, :] += x[..., source, :] @ own.W_skip[block].T
    torch.testing.assert_close(clt.encode(x), torch.cat(encoded, dim=-1))
    torch.testing.assert_close(clt(x), wanted, rtol=1e-5, atol=1e-5)
    assert clt.n_latents == LAYERS * F and clt.site == "blocks.0.mlp.in+blocks.1.mlp.in+blocks.2.mlp.in"


def test_what_each_latent_writes():
    clt = made()
    one = torch.zeros(clt.n_latents)
    for latent in (0, F + 2, 2 * F + 5):
        z = one.clone()
        z[latent] = 2.0
        torch.testing.assert_close((clt.decode(z) - clt.decode(one)).flatten(), 2 * clt.decoder[latent])


def test_rows_of_another_float_type_do_not_narrow_the_sum():
    x = torch.randn(4, LAYERS, D, generator=torch.Generator().manual_seed(3)).bfloat16()
    for clt in (made(), made(skip=True)):
        assert clt(x).dtype == torch.float32
        torch.testing.assert_close(clt(x), clt(x.float()))
        assert clt.decode(clt.encode(x).bfloat16()).dtype == torch.float32


@pytest.mark.parametrize("skip", [False, True])
def test_saved_and_loaded(skip, tmp_path):
    clt = made(skip)
    read = load(clt.save(tmp_path / "clt"))
    x = torch.randn(4, LAYERS, D)
    assert isinstance(read, CrossLayer) and torch.equal(read(x), clt(x))


def test_layers_that_do_not_fit_are_refused():
    with pytest.raises(SpecError, match="no layers"):
        CrossLayer(layers=())
    with pytest.raises(SpecError, match="the first of 2 layers writes 3 sites"):
        CrossLayer(layers=(layer(0), layer(1)))
    with pytest.raises(SpecError, match="layer 1 writes"):
        CrossLayer(layers=(layer(0), layer(2), layer(1)))
    wrong = replace(layer(1), b_dec=torch.ones(OUT * 2))
    with pytest.raises(SpecError, match="a decoder bias for a later layer"):
        CrossLayer(layers=(layer(0), wrong, layer(2)))
    normalised = replace(layer(1), card=replace(layer(1).card, normalisation="layer_norm"))
    with pytest.raises(SpecError, match="layer 1 normalises its rows"):
        CrossLayer(layers=(layer(0), normalised, layer(2)))
    with pytest.raises(SpecError, match=r"must be \[layer, d\] = \(3, 4\)"):
        made()(torch.zeros(2, LAYERS + 1, D))
