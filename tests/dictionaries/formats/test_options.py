"""What files do not say is asked for, what they say by convention becomes a field, and what is given is used."""

from __future__ import annotations

import json
import math
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from dictionary_files import activations, change, cross_layer, made, named
from safetensors.torch import load_file

from assay.base.errors import DamagedFile, SpecError
from assay.dictionaries import Gated, JumpReLU, ReLU, TopK, load
from assay.dictionaries.formats.format import save_pickle


@pytest.fixture(autouse=True)
def seeded() -> None:
    torch.manual_seed(0)


def test_a_factor_of_the_input_is_folded_or_asked_for(tmp_path: Path) -> None:
    spoilt = named("sae-lens/factor_centred").copied(tmp_path)
    read = load(spoilt.where)
    assert read.card.mean_norm == pytest.approx(math.sqrt(8) / 0.4)
    (spoilt.folder / "activation_scaler.json").unlink()
    with pytest.raises(SpecError, match="scaling_factor=") as error:
        load(spoilt.where)
    assert error.value.field == "scaling_factor"
    assert torch.equal(load(spoilt.where, scaling_factor=0.4).W_enc, read.W_enc)


def test_whitening_that_is_not_there_is_asked_for(tmp_path: Path) -> None:
    spoilt = named("sae-lens/whitened_centred").copied(tmp_path)
    (spoilt.folder / "activation_whitening.safetensors").unlink()
    with pytest.raises(SpecError, match="activation_whitening"):
        load(spoilt.where)


def test_conventions_become_fields() -> None:
    said = {
        name: load(named(f"sae-lens/standard_{name}").where).card
        for name in ("none_centred", "none_uncentred", "layer_norm_centred", "constant_norm_rescale_uncentred")
    }
    assert {name: (card.centred, card.normalisation) for name, card in said.items()} == {
        "none_centred": (True, "none"),
        "none_uncentred": (False, "none"),
        "layer_norm_centred": (True, "layer_norm"),
        "constant_norm_rescale_uncentred": (False, "constant_norm"),
    }
    assert load(named("sae-lens/batchtopk_training").where).card.family == "batchtopk"
    assert load(named("sae-lens/matryoshka_inference").where).card.family == "matryoshka"
    assert load(named("openai/v5_topk").where).card.normalisation == "layer_norm"
    assert not load(named("eai-sparsify/transcoder").where).card.centred


def test_a_site_that_is_given_stands_instead_of_the_files(tmp_path: Path) -> None:
    read = load(named("sae-lens/jumprelu").where, site="blocks.9.resid_pre")
    assert (read.site, read.kind) == ("blocks.9.resid_pre", "sae")
    card = load(named("circuit-tracer/relu").where, site="blocks.5.norm2", writes="blocks.5.mlp.out").card
    assert (card.reads[0].name, card.writes[0].name) == ("blocks.5.norm2", "blocks.5.mlp.out")


def test_files_that_do_not_say_their_site_ask_for_it(tmp_path: Path) -> None:
    made(JumpReLU(threshold=torch.rand(16))).save(tmp_path / "a" / "params.npz", "gemma-scope")
    made(ReLU()).save(tmp_path / "b.pt", "openai")
    made(ReLU()).save(tmp_path / "c.pt", "goodfire")
    made(TopK(k=2)).save(tmp_path / "d.pt", "qwen-scope")
    for path in (tmp_path / "a", tmp_path / "b.pt", tmp_path / "c.pt", tmp_path / "d.pt"):
        with pytest.raises(SpecError, match="site=") as error:
            load(path)
        assert error.value.field == "site"
    assert load(tmp_path / "a", site="blocks.2.resid_post").site == "blocks.2.resid_post"
    with pytest.raises(SpecError, match="give k="):
        load(tmp_path / "d.pt", site="blocks.2.resid_post")
    assert load(tmp_path / "d.pt", site="blocks.2.resid_post", k=2).activation == TopK(k=2)


def test_embeddings_are_scaled_as_gemma_scales_them(tmp_path: Path) -> None:
    raw = made(JumpReLU(threshold=torch.rand(16)), reads="embed")
    x = torch.randn(5, 8)
    again = load(raw.save(tmp_path / "gemma-scope-2b-pt-res" / "embedding" / "width_4k", "gemma-scope"))
    assert (again.site, again.card.model) == ("embed", "google/gemma-2-2b")
    torch.testing.assert_close(again(x), raw(x))
    unscaled = load(tmp_path / "gemma-scope-2b-pt-res" / "embedding" / "width_4k", site="blocks.0.resid_pre")
    torch.testing.assert_close(unscaled(x / math.sqrt(8)) * math.sqrt(8), raw(x))


def test_modules_of_other_libraries_go_through_saelens(tmp_path: Path) -> None:
    dictionary = made(ReLU(), reads="module:model.layers.3.mlp.out")
    where = dictionary.save(tmp_path / "it", "saelens")
    metadata = json.loads((where / "cfg.json").read_text())["metadata"]
    assert (metadata["hook_name"], metadata["model_class_name"]) == ("model.layers.3.mlp", "AutoModelForCausalLM")
    assert load(where).site == "module:model.layers.3.mlp.out"
    with pytest.raises(SpecError, match="hook_name="):
        made(ReLU(), reads="blocks.3.norm1").save(tmp_path / "other", "saelens")
    named_by_hand = made(ReLU(), reads="blocks.3.norm1")
    named_by_hand.save(tmp_path / "other", "saelens", hook_name="blocks.3.ln1.hook_normalized")
    assert load(tmp_path / "other").site == "blocks.3.ln1.hook_normalized"


def test_a_gemma_scope_2_transcoder_that_saelens_saved_reads_after_the_norm(tmp_path: Path) -> None:
    spoilt = named("sae-lens/jumprelu_transcoder").copied(tmp_path)
    config = spoilt.folder / "cfg.json"
    held = json.loads(config.read_text())
    held["metadata"]["hook_name"] = "blocks.7.hook_mlp_in"
    config.write_text(json.dumps(held))
    assert load(spoilt.where).site == "blocks.7.resid_mid"
    held["metadata"]["hf_hook_name"] = "model.layers.7.pre_feedforward_layernorm.output"
    config.write_text(json.dumps(held))
    assert load(spoilt.where).site == "blocks.7.mlp.in"


def test_a_head_goes_through_saelens(tmp_path: Path) -> None:
    where = made(ReLU(), reads="blocks.3.attn.z.5").save(tmp_path / "it", "saelens")
    config = json.loads((where / "cfg.json").read_text())
    assert (config["metadata"]["hook_head_index"], config["reshape_activations"]) == (5, "none")
    assert load(where).site == "blocks.3.attn.z.5"


def test_what_a_saelens_file_said_of_its_training_is_kept(tmp_path: Path) -> None:
    read = load(named("sae-lens/batchtopk_inference").where)
    trained = replace(read, card=replace(read.card, training={"tokens": 10}))
    metadata = json.loads((trained.save(tmp_path / "it", "saelens") / "cfg.json").read_text())["metadata"]
    assert metadata["training_architecture_details"]["topk_threshold_lr"] == 0.01
    assert metadata["training"] == {"tokens": 10}
    assert load(tmp_path / "it").card.family == "batchtopk"


def test_the_file_of_weights_names_its_folder() -> None:
    for name, file in (("sae-lens/topk", "sae_weights.safetensors"), ("eai-sparsify/topk", "sae.safetensors")):
        case = named(name)
        assert torch.equal(load(case.where / file).W_enc, load(case.where).W_enc)


def test_sparsify_folders_are_named_like_the_module(tmp_path: Path) -> None:
    dictionary = made(TopK(k=2))
    assert dictionary.save(tmp_path / "run", "sparsify") == tmp_path / "run" / "layers.3"
    assert dictionary.save(tmp_path / "h.3", "sparsify", architecture="gpt2") == tmp_path / "h.3"
    assert dictionary.save(tmp_path, "sparsify", hookpoint="h.3.ln_2") == tmp_path / "h.3.ln_2"
    with pytest.raises(SpecError, match="site="):
        load(tmp_path / "h.3.ln_2")
    assert load(tmp_path / "h.3.ln_2", site="blocks.3.norm2").site == "blocks.3.norm2"


def test_sparsify_files_that_contradict_themselves_are_refused(tmp_path: Path) -> None:
    spoilt = named("eai-sparsify/skip").copied(tmp_path)
    change(spoilt.weights, lambda held: {name: value for name, value in held.items() if name != "W_skip"})
    with pytest.raises(SpecError, match="W_skip"):
        load(spoilt.where)


def test_an_unset_threshold_is_refused_and_topk_offered(tmp_path: Path) -> None:
    spoilt = named("dictionary-learning/BatchTopKSAE").copied(tmp_path)
    change(spoilt.weights, lambda held: held | {"threshold": torch.tensor(-1.0)})
    with pytest.raises(SpecError, match="none was estimated"):
        load(spoilt.where)
    assert load(spoilt.where, dict_class="AutoEncoderTopK").activation == TopK(k=4)


def test_topk_can_be_read_by_its_threshold() -> None:
    case = named("dictionary-learning/AutoEncoderTopK")
    assert isinstance(load(case.where, use_threshold=True).activation, JumpReLU)


def test_without_a_configuration_keys_say_the_class_or_it_is_asked_for(tmp_path: Path) -> None:
    for name in ("AutoEncoder", "GatedAutoEncoder", "MatryoshkaBatchTopKSAE", "JumpReluAutoEncoder", "BatchTopKSAE"):
        spoilt = named(f"dictionary-learning/{name}").copied(tmp_path)
        (spoilt.folder / "config.json").unlink()
        if name == "BatchTopKSAE":
            with pytest.raises(SpecError, match="AutoEncoderTopK or BatchTopKSAE"):
                load(spoilt.where, site="blocks.4.resid_post")
            continue
        read = load(spoilt.where / "ae.pt", site="blocks.4.resid_post")
        assert read.card.source["class"] == name


def test_dictionary_learnings_checkpoints_have_their_configuration_above(tmp_path: Path) -> None:
    spoilt = named("dictionary-learning/AutoEncoderTopK").copied(tmp_path)
    (spoilt.folder / "checkpoints").mkdir()
    (spoilt.folder / "ae.pt").rename(spoilt.folder / "checkpoints" / "ae_100.pt")
    assert load(spoilt.folder / "checkpoints" / "ae_100.pt").card.family == "topk"


def test_a_submodule_that_does_not_say_what_it_is_asks_for_the_site(tmp_path: Path) -> None:
    spoilt = named("dictionary-learning/AutoEncoder").copied(tmp_path)
    config = spoilt.folder / "config.json"
    held = json.loads(config.read_text())
    for name, site in (
        (None, None),
        ("mlp_out_layer_3", "blocks.3.mlp.out"),
        ("attn_out_layer_2", "blocks.2.attn.out"),
    ):
        held["trainer"]["submodule_name"] = name
        config.write_text(json.dumps(held))
        if site is None:
            with pytest.raises(SpecError, match="site="):
                load(spoilt.where)
        else:
            assert load(spoilt.where).site == site
    held["buffer"]["io"] = "in_and_out"
    config.write_text(json.dumps(held))
    with pytest.raises(SpecError, match="writes="):
        load(spoilt.where)


def test_crosscoders_of_others_are_refused_by_name(tmp_path: Path) -> None:
    spoilt = named("dictionary-learning/AutoEncoder").copied(tmp_path)
    config = spoilt.folder / "config.json"
    config.write_text(config.read_text().replace('"AutoEncoder"', '"CrossCoder"'))
    with pytest.raises(SpecError, match="CrossCoder"):
        load(spoilt.where)


def test_a_folder_of_transcoders_asks_for_the_layer(tmp_path: Path) -> None:
    activation = activations()["jumprelu"]
    for index in (0, 1):
        one = made(activation, transcodes=True, reads=f"blocks.{index}.mlp.in", writes=f"blocks.{index}.mlp.out")
        one.save(tmp_path / "set", "circuit-tracer")
    assert sorted(p.name for p in (tmp_path / "set").iterdir()) == [
        "config.yaml",
        "layer_0.safetensors",
        "layer_1.safetensors",
    ]
    with pytest.raises(SpecError, match="layer="):
        load(tmp_path / "set")
    assert load(tmp_path / "set", layer=1).site == "blocks.1.mlp.in"
    with pytest.raises(SpecError, match="no layer 7"):
        load(tmp_path / "set", layer=7)
    with pytest.raises(SpecError, match="other hooks"):
        made(activation, transcodes=True, reads="blocks.3.resid_mid").save(tmp_path / "set", "circuit-tracer")
    with pytest.raises(SpecError, match="one layer"):
        made(activation, transcodes=True, reads="blocks.2.mlp.in").save(tmp_path / "set", "circuit-tracer")


def test_a_cross_layer_transcoder_without_a_layer_is_refused(tmp_path: Path) -> None:
    spoilt = named("circuit-tracer/clt_relu").copied(tmp_path)
    (spoilt.folder / "W_dec_1.safetensors").unlink()
    with pytest.raises(DamagedFile, match="layer 1"):
        load(spoilt.where)


def test_weights_for_earlier_layers_are_named(tmp_path: Path) -> None:
    where = cross_layer().save(tmp_path / "it", "gemma-scope-2")
    file = where / "params_layer_2.safetensors"
    assert load_file(file)["w_dec"].shape == (6, 3, 4)
    change(file, lambda held: held | {"w_dec": torch.ones_like(held["w_dec"])})
    with pytest.warns(UserWarning, match="before its own"):
        load(where)


def test_llama_scopes_factors_are_folded(tmp_path: Path) -> None:
    spoilt = named("sae-lens/llama_scope").copied(tmp_path)
    config = next(spoilt.folder.rglob("hyperparams.json"))
    held = json.loads(config.read_text())
    before = load(spoilt.where)
    assert before.card.mean_norm == 2.0
    config.write_text(json.dumps(held | {"hook_point_out": "blocks.9.hook_mlp_out"} | {
        "dataset_average_activation_norm": {"in": 2.0, "out": 1.0}
    }))  # fmt: skip
    after = load(spoilt.where)
    x = torch.randn(6, 8)
    factor = math.sqrt(8) / 2.0
    raw = load_file(spoilt.weights)
    h = (x * factor) @ raw["encoder.weight"].T + raw["encoder.bias"]
    written = torch.where(h * 0.5 / factor > 0.4, h, 0) @ raw["decoder.weight"].T + raw["decoder.bias"]
    torch.testing.assert_close(after(x), written / (2 * factor))
    for name, value in (("norm_activation", "batch-wise"), ("act_fn", "tanh"), ("use_glu_encoder", True)):
        config.write_text(json.dumps(held | {name: value}))
        with pytest.raises(SpecError) as error:
            load(spoilt.where)
        assert error.value.field == name


def test_gates_survive_the_other_parametrisation(tmp_path: Path) -> None:
    activation = activations()["gated"]
    assert isinstance(activation, Gated)
    dictionary = made(activation, centred=True)
    for format in ("saelens", "dictionary-learning"):
        again = load(dictionary.save(tmp_path / format, format))
        assert torch.equal(again.activation.log_gain, activation.log_gain)
        torch.testing.assert_close(again.activation.offset, activation.offset)


def test_a_negative_threshold_before_or_after_a_relu_is_zero(tmp_path: Path) -> None:
    """dictionary_learning trains thresholds without a bound, and its ReLU makes a negative one the same as 0."""
    generator = torch.Generator().manual_seed(0)
    W_enc, W_dec = torch.randn(8, 16, generator=generator), torch.randn(16, 8, generator=generator)
    threshold = torch.linspace(-0.5, 0.5, 16)
    state = {"W_enc": W_enc, "W_dec": W_dec, "b_enc": torch.zeros(16), "b_dec": torch.zeros(8), "threshold": threshold}
    torch.save(state, tmp_path / "ae.pt")
    config = {"trainer": {"dict_class": "JumpReluAutoEncoder", "activation_dim": 8, "dict_size": 16}}
    (tmp_path / "config.json").write_text(json.dumps(config))
    x = torch.randn(32, 8, generator=generator)
    h = x @ W_enc
    wanted = torch.relu(h * (h > threshold))
    torch.testing.assert_close(load(tmp_path, site="blocks.0.resid_post").encode(x), wanted)


@pytest.mark.parametrize("name", ["plain", "with.pt", "of.many.points"])
def test_a_pickle_may_have_any_name(tmp_path: Path, name: str) -> None:
    dictionary = made(ReLU())
    save_pickle({"W": dictionary.W_enc}, tmp_path / name)
    assert torch.equal(torch.load(tmp_path / name, weights_only=True)["W"], dictionary.W_enc)
    again = load(dictionary.save(tmp_path / f"{name}-saved", "goodfire"), format="goodfire", site="blocks.0.resid_post")
    torch.testing.assert_close(again.W_dec, dictionary.W_dec)
