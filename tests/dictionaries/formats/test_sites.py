"""Names of sites, both ways, and what is moved between a norm's two outputs."""

from __future__ import annotations

import pytest
import torch

import assay
from assay.base.errors import SpecError
from assay.base.sites import parse_site
from assay.dictionaries import Card, Dictionary, JumpReLU, Site
from assay.dictionaries.formats.sites import after_gain, centred, from_hook, from_module, to_hook, to_module
from assay.subjects.tiny import tiny_model

BOTH_WAYS = [
    "embed", "pos_embed", "blocks.0.resid_pre", "blocks.1.resid_mid", "blocks.12.resid_post", "blocks.3.attn.out",
    "blocks.3.mlp.out", "blocks.3.mlp.in", "blocks.3.mlp.post", "blocks.3.attn.z", "blocks.3.attn.q", "blocks.3.attn.v",
    "blocks.2.ln2.hook_normalized", "blocks.2.mlp.hook_pre",
]  # fmt: skip


@pytest.mark.parametrize("site", BOTH_WAYS)
def test_hooks_both_ways(site: str) -> None:
    hook, head = to_hook(site)
    assert head is None
    assert from_hook(hook) == site


def test_a_head_is_kept_apart() -> None:
    assert to_hook("blocks.3.attn.q.5") == ("blocks.3.attn.hook_q", 5)


@pytest.mark.parametrize(
    ("module", "site"),
    [
        ("layers.12", "blocks.12.resid_post"),
        ("model.layers.3.mlp", "blocks.3.mlp.out"),
        ("transformer.h.3.attn", "blocks.3.attn.out"),
        ("gpt_neox.layers.3.attention", "blocks.3.attn.out"),
        ("embed_tokens", "embed"),
        ("wte", "embed"),
    ],
)
def test_modules_get_their_site(module: str, site: str) -> None:
    assert from_module(module) == site


def test_what_a_transcoder_of_a_module_reads() -> None:
    assert from_module("layers.3.mlp", reads=True) == "blocks.3.mlp.in"
    assert from_module("layers.3", reads=True) == "blocks.3.resid_pre"


def test_a_gemmas_mlp_leaves_before_a_norm() -> None:
    assert from_module("layers.3.mlp", "google/gemma-2-2b") == "module:model.layers.3.mlp.out"
    assert from_module("layers.3", "google/gemma-2-2b") == "blocks.3.resid_post"


@pytest.mark.parametrize("architecture", ["llama", "gpt2", "gpt_neox"])
def test_modules_of_sites_are_those_of_the_model(architecture: str) -> None:
    module = tiny_model(architecture)
    inside = dict(module.base_model.named_modules())
    for site in ("blocks.1.resid_post", "blocks.1.mlp.out", "blocks.1.attn.out"):
        name = to_module(site, architecture)
        assert name in inside
        assert from_module(name) == site


def test_what_has_no_name_is_asked_for() -> None:
    with pytest.raises(SpecError, match="hook_name"):
        to_hook("blocks.3.norm1")
    with pytest.raises(SpecError, match="hookpoint"):
        to_module("blocks.3.resid_pre")
    with pytest.raises(SpecError, match="site="):
        from_hook("blocks.3.hook_nothing")
    with pytest.raises(SpecError, match="module:"):
        from_module("layers.3.post_attention_layernorm")
    with pytest.raises(SpecError, match="architecture"):
        to_module("blocks.3.mlp.out", "mamba")


def test_every_name_is_a_site_or_kept_for_a_reason() -> None:
    for site in BOTH_WAYS:
        if "hook_" not in site:
            assert str(parse_site(site)) == site


@pytest.mark.parametrize("family", ["gpt2", "llama"])
def test_a_dictionary_of_a_norm_before_its_gain_reads_the_site_after_it(family: str) -> None:
    subject = assay.load(tiny_model(family))
    norm = subject.norm("blocks.1.norm2")
    run = subject.run(torch.tensor([[5, 9, 12, 3]]), capture=["blocks.1.norm2"])
    after = torch.as_tensor(run["blocks.1.norm2"])[0]
    before = (after - norm.bias) / norm.gain
    width = after.shape[-1]
    generator = torch.Generator().manual_seed(0)
    made = Dictionary(
        W_enc=torch.randn(9, width, generator=generator),
        b_enc=torch.randn(9, generator=generator),
        W_dec=torch.randn(9, width, generator=generator),
        b_dec=torch.randn(width, generator=generator),
        W_skip=torch.randn(width, width, generator=generator),
        activation=JumpReLU(threshold=torch.rand(9, generator=generator)),
        card=Card(
            reads=(Site("blocks.1.ln2.hook_normalized", width),), writes=(Site("blocks.1.mlp.out", width),), family="x"
        ),
    )
    moved = after_gain(made, norm.gain, norm.bias)
    assert moved.site == "blocks.1.norm2"
    torch.testing.assert_close(moved(after), made(before), atol=1e-4, rtol=1e-4)
    with pytest.raises(SpecError, match="before its gain"):
        after_gain(moved, norm.gain)
    with pytest.raises(SpecError, match="none zero"):
        after_gain(made, norm.gain * 0)


def test_the_bias_moves_into_the_encoder_and_back() -> None:
    made = Dictionary(
        W_enc=torch.randn(6, 3),
        b_enc=torch.randn(6),
        W_dec=torch.randn(6, 3),
        b_dec=torch.randn(3),
        card=Card(reads=(Site("blocks.0.resid_post", 3),), centred=True),
    )
    flat, x = centred(made, False), torch.randn(7, 3)
    assert not flat.card.centred
    torch.testing.assert_close(flat(x), made(x))
    torch.testing.assert_close(centred(flat, True)(x), made(x))
