"""A latent's share per head."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from assay.base.errors import SpecError
from assay.dictionaries import Card, Dictionary, ReLU, Site
from assay.dictionaries.heads import head_shares


def made(*sites: tuple[str, int], seed: int = 0, latents: int = 7) -> Dictionary:
    stream = torch.Generator().manual_seed(seed)
    width = sum(size for _, size in sites)
    named = tuple(Site(name, size) for name, size in sites)
    return Dictionary(
        W_enc=torch.randn(latents, width, generator=stream),
        b_enc=torch.zeros(latents),
        W_dec=torch.randn(latents, width, generator=stream),
        b_dec=torch.zeros(width),
        activation=ReLU(),
        card=Card(reads=named, writes=named),
    )


@given(heads=st.integers(1, 5), size=st.integers(1, 4), seed=st.integers(0, 20))
def test_shares_add_up_and_are_those_of_a_head_alone(heads, size, seed):
    dictionary = made(("blocks.0.attn.z", heads * size), seed=seed)
    found = head_shares(dictionary, heads)
    for shares, weights in ((found.encoder, dictionary.W_enc), (found.decoder, dictionary.W_dec)):
        assert shares.shape == (7, heads)
        np.testing.assert_allclose(shares.sum(1), 1)
        for head in range(heads):
            alone = weights[:, head * size : (head + 1) * size].norm(dim=1) / weights.norm(dim=1)
            np.testing.assert_allclose(np.sqrt(shares[:, head]), alone.numpy(), rtol=1e-5)


def test_a_latent_of_zeros_has_no_head():
    dictionary = made(("blocks.0.attn.z", 4))
    dictionary.W_dec[2] = 0
    assert head_shares(dictionary, 2).decoder[2].tolist() == [0, 0]


def test_a_crosscoder_is_asked_site_by_site():
    dictionary = made(("blocks.0.attn.z", 4), ("blocks.1.attn.z", 6))
    found = head_shares(dictionary, 3, "blocks.1.attn.z").decoder
    alone = dictionary.W_dec[:, 4:].reshape(7, 3, 2).square().sum(2)
    np.testing.assert_allclose(found, (alone / alone.sum(1, keepdim=True)).numpy(), rtol=1e-5)
    with pytest.raises(SpecError, match="several sites"):
        head_shares(dictionary, 2)


@pytest.mark.parametrize(
    ("heads", "site", "said"), [(3, None, "not divided"), (0, None, "not divided"), (2, "x", "no site 'x'")]
)
def test_what_does_not_fit_is_refused(heads, site, said):
    with pytest.raises(SpecError, match=said):
        head_shares(made(("blocks.0.attn.z", 4)), heads, site)
