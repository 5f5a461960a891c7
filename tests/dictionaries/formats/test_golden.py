"""Files that the peers' own packages wrote, read here: the same latents, the same reconstructions, the right sites."""

from __future__ import annotations

import pytest
import torch
from dictionary_files import Golden, golden, named

from assay.dictionaries import CrossLayer, formats, load

SITES = {
    "sae-lens/standard_none_centred": ("blocks.3.resid_post", "blocks.3.resid_post"),
    "sae-lens/jumprelu": ("blocks.2.mlp.out", "blocks.2.mlp.out"),
    "sae-lens/gated": ("blocks.0.attn.out", "blocks.0.attn.out"),
    "sae-lens/hook_z": ("blocks.1.attn.z", "blocks.1.attn.z"),
    "sae-lens/transcoder": ("blocks.1.resid_mid", "blocks.1.mlp.out"),
    "sae-lens/v3_standard": ("blocks.8.resid_pre", "blocks.8.resid_pre"),
    "sae-lens/gemma_scope_att": ("blocks.3.attn.z", "blocks.3.attn.z"),
    "sae-lens/gemma_scope_res": ("blocks.12.resid_post", "blocks.12.resid_post"),
    "sae-lens/gemma_scope_transcoder": ("blocks.4.ln2.hook_normalized", "blocks.4.mlp.out"),
    "sae-lens/gemma_scope_2_res": ("blocks.7.resid_post", "blocks.7.resid_post"),
    "sae-lens/gemma_scope_2_transcoder": ("blocks.7.mlp.in", "blocks.7.mlp.out"),
    "sae-lens/goodfire": ("blocks.19.resid_post", "blocks.19.resid_post"),
    "sae-lens/qwen_scope": ("blocks.5.resid_post", "blocks.5.resid_post"),
    "sae-lens/llama_scope": ("blocks.9.resid_post", "blocks.9.resid_post"),
    "dictionary-learning/AutoEncoder": ("blocks.4.resid_post", "blocks.4.resid_post"),
    "eai-sparsify/groupmax": ("blocks.2.resid_post", "blocks.2.resid_post"),
    "eai-sparsify/topk_multi": ("blocks.5.mlp.out", "blocks.5.mlp.out"),
    "eai-sparsify/transcoder": ("blocks.1.mlp.in", "blocks.1.mlp.out"),
    "circuit-tracer/relu": ("blocks.2.resid_mid", "blocks.2.mlp.out"),
    "openai/v1_relu": ("blocks.2.mlp.out", "blocks.2.mlp.out"),
    "openai/v5_topk": ("blocks.8.resid_post", "blocks.8.resid_post"),
}


def close(found: torch.Tensor, theirs: torch.Tensor) -> bool:
    """Within 1e-5, or 1e-5 of the largest number where that is above 1."""
    return float((found - theirs).abs().max()) <= 1e-5 * max(1.0, float(theirs.abs().max()))


def test_every_format_but_our_own_has_a_file_that_someone_else_wrote() -> None:
    loaded = [load(case.where) for case in golden()]
    cards = [d.layers[0].card if isinstance(d, CrossLayer) else d.card for d in loaded]
    assert {card.source["format"] for card in cards} == set(formats.names()) - {"assay"}


@pytest.mark.parametrize("case", golden(), ids=str)
def test_a_peers_file_computes_what_the_peer_computes(case: Golden) -> None:
    dictionary, held = load(case.where), case.held
    assert close(dictionary.encode(held["x"]), held["z"])
    assert close(dictionary(held["x"]), held["y"])
    assert held["z"].count_nonzero() > 0


@pytest.mark.parametrize("name", SITES)
def test_sites_get_our_names(name: str) -> None:
    card = load(named(name).where).card
    assert (card.reads[0].name, card.writes[0].name) == SITES[name]


def test_a_cross_layer_transcoder_names_a_site_a_layer() -> None:
    clt = load(named("circuit-tracer/clt_jump_relu").where)
    assert isinstance(clt, CrossLayer)
    assert clt.site == "blocks.0.resid_mid+blocks.1.resid_mid+blocks.2.resid_mid"
    assert [site.name for site in clt.layers[1].card.writes] == ["blocks.1.mlp.out", "blocks.2.mlp.out"]


def test_training_files_and_inference_files_of_one_dictionary_agree() -> None:
    for name in ("batchtopk", "matryoshka", "jumprelu_trained", "topk_trained"):
        trained, saved = (load(named(f"sae-lens/{name}_{kind}").where) for kind in ("training", "inference"))
        x = named(f"sae-lens/{name}_training").held["x"]
        assert close(trained.encode(x), saved.encode(x)), name
        assert trained.card.family == saved.card.family


def test_what_the_peers_wrote_can_be_kept_in_our_own_format(tmp_path) -> None:
    for number, case in enumerate(golden()):
        read = load(case.where)
        again = load(read.save(tmp_path / str(number)))
        assert torch.equal(again(case.held["x"]), read(case.held["x"])), case.name
