"""Loading: a saved model, a GGUF file and a module of the user's own are the model they were, or refused."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn
from transformers.models.llama import modeling_llama

import assay
from assay.base.errors import DamagedFile, LoadError, UnsupportedArchitecture
from assay.subjects.sources import resolve

IDS = torch.tensor([[5, 17, 40, 9, 77, 30, 21]])


@pytest.fixture(autouse=True)
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, assay_home: Path) -> Path:
    """A home of this test's own."""
    monkeypatch.setenv("ASSAY_HOME", str(tmp_path / "home"))
    return tmp_path / "home"


@pytest.fixture
def save(tmp_path: Path, tiny_module: Callable[..., Any], tiny_tokenizer: Any) -> Callable[..., tuple[Path, Any]]:
    """Save a tiny model as transformers does: the folder and the module."""

    def make(family: str = "llama", dtype: torch.dtype = torch.float32, **config: Any) -> tuple[Path, Any]:
        module = tiny_module(family, **config).to(dtype)
        module.save_pretrained(tmp_path / "saved")
        tiny_tokenizer.save_pretrained(tmp_path / "saved")
        return tmp_path / "saved", module

    return make


@torch.no_grad()
def logits(module: Any) -> torch.Tensor:
    return module(IDS).logits


# Folders


def test_a_saved_model_is_the_model(save: Callable[..., Any], family: str, tiny_tokenizer: Any) -> None:
    folder, module = save(family)
    subject = assay.load(str(folder))
    assert torch.equal(logits(subject.module), logits(module))
    assert torch.equal(subject.run(IDS).logits, logits(module))
    assert subject.tokenizer("When Mary went")["input_ids"] == tiny_tokenizer("When Mary went")["input_ids"]
    assert not subject.module.training
    assert subject.n_blocks == 3
    assert subject.name == str(folder)


def test_tied_weights_are_not_missing(save: Callable[..., Any]) -> None:
    folder, module = save("llama", tie_word_embeddings=True)
    assert "lm_head.weight" not in load_file(folder / "model.safetensors")
    assert torch.equal(logits(assay.load(str(folder)).module), logits(module))


def test_the_precision_is_the_files(save: Callable[..., Any]) -> None:
    folder, module = save(dtype=torch.bfloat16)
    subject = assay.load(str(folder))
    assert {parameter.dtype for parameter in subject.module.parameters()} == {torch.bfloat16}
    for name, weight in subject.module.named_parameters():
        assert torch.equal(weight, module.get_parameter(name)), name
    assert torch.equal(subject.run(IDS).logits, logits(subject.module))
    assert subject.n_blocks == 3


def test_a_folder_without_a_tokenizer_takes_ids(save: Callable[..., Any]) -> None:
    folder, module = save()
    for path in folder.glob("tokenizer*"):
        path.unlink()
    subject = assay.load(str(folder))
    assert subject.tokenizer is None
    assert torch.equal(subject.run(IDS).logits, logits(module))


def test_a_given_tokenizer_comes_first(save: Callable[..., Any], tiny_tokenizer: Any) -> None:
    folder, _ = save()
    assert assay.load(str(folder), tokenizer=tiny_tokenizer).tokenizer is tiny_tokenizer


def test_what_is_slow_is_said(save: Callable[..., Any]) -> None:
    folder, _ = save()
    said: list[str] = []
    assay.load(str(folder), notify=said.append)
    assert said == [f"loading {folder}"]


def rewrite(change: Callable[[dict[str, torch.Tensor]], Any]) -> Callable[[Path], None]:
    """Damage to the weights themselves."""

    def damage(folder: Path) -> None:
        weights = load_file(folder / "model.safetensors")
        change(weights)
        save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})

    return damage


def cut(folder: Path) -> None:
    data = (folder / "model.safetensors").read_bytes()
    (folder / "model.safetensors").write_bytes(data[: len(data) // 2])


def rename_type(folder: Path) -> None:
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"model_type": "nonesuch"}))


def junk_pickle(folder: Path) -> None:
    (folder / "model.safetensors").unlink()
    (folder / "pytorch_model.bin").write_bytes(b"junk" * 50)


UP = "model.layers.1.mlp.up_proj.weight"


@pytest.mark.parametrize(
    ("damage", "error", "message"),
    [
        (rewrite(lambda w: w.pop(UP)), DamagedFile, rf"1 of the weights of .* not in the files.*: {UP}"),
        (rewrite(lambda w: [w.pop(k) for k in list(w)[4:10]]), DamagedFile, r"6 of the weights of .*, \.\.\.$"),
        (rewrite(lambda w: w.update({UP: torch.zeros(3, 32)})), DamagedFile, rf"have another shape.*: {UP}"),
        (cut, DamagedFile, r"the weights of .* could not be read: SafetensorError"),
        (lambda f: (f / "model.safetensors").write_bytes(b"x" * 99), DamagedFile, "weights of .* could not be read"),
        (lambda f: (f / "config.json").write_text("[1]"), DamagedFile, "a JSON object is needed"),
        (lambda f: (f / "config.json").write_text("{}"), UnsupportedArchitecture, "as a language model.*model_type"),
        (rename_type, UnsupportedArchitecture, "as a language model.*nonesuch"),
        (lambda f: junk_pickle(f), DamagedFile, "the weights of .* could not be read"),
        (lambda f: (f / "tokenizer.json").write_text('{"x"'), DamagedFile, "the tokenizer of .* could not be read"),
    ],
)  # fmt: skip
def test_a_damaged_folder_is_refused(
    save: Callable[..., Any], damage: Callable[[Path], Any], error: type[LoadError], message: str
) -> None:
    """A weight that is not there is no reason for transformers to make one up."""
    folder, _ = save()
    damage(folder)
    with pytest.raises(error, match=message) as caught:
        assay.load(str(folder))
    assert str(folder) in str(caught.value)


def test_a_layer_that_the_configuration_leaves_out_is_refused(save: Callable[..., Any]) -> None:
    folder, _ = save()
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"num_hidden_layers": 2}))
    with pytest.raises(DamagedFile, match=r"have no place in the model .*: model\.layers\.2\."):
        assay.load(str(folder))


def test_buffers_of_older_checkpoints_do_no_harm(save: Callable[..., Any]) -> None:
    folder, module = save()
    old = ("model.layers.0.self_attn.rotary_emb.inv_freq", "model.layers.0.attn.masked_bias", "h.0.attn.bias")
    rewrite(lambda weights: weights.update({name: torch.zeros(3) for name in old}))(folder)
    assert torch.equal(logits(assay.load(str(folder)).module), logits(module))


# GGUF files


def write_gguf(path: Path, module: Any, tokenizer: Any, *, without: str = "") -> Path:
    """Write a Llama as llama.cpp keeps it: its names, and the rows of q and k in its rotary order."""
    gguf = pytest.importorskip("gguf")
    pytest.importorskip("accelerate")
    config = module.config
    writer = gguf.GGUFWriter(str(path), "llama")
    writer.add_block_count(config.num_hidden_layers)
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_rope_dimension_count(config.head_dim)
    writer.add_rope_freq_base(config.rope_parameters["rope_theta"])
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_vocab_size(config.vocab_size)
    words = sorted(tokenizer.get_vocab(), key=tokenizer.get_vocab().get)
    words += [f"<unused{i}>" for i in range(config.vocab_size - len(words))]
    merges = json.loads(tokenizer.backend_tokenizer.to_str())["model"]["merges"]
    writer.add_tokenizer_model("gpt2")
    writer.add_token_list(words)
    writer.add_token_merges([" ".join(pair) for pair in merges])
    writer.add_token_types([3 if word.startswith("<") else 1 for word in words])
    for name, token in (("bos", 1), ("eos", 2), ("unk", 3), ("pad", 0)):
        getattr(writer, f"add_{name}_token_id")(token)
    for name, weight in module.state_dict().items():
        if name != without:
            writer.add_tensor(_gguf_name(name), _gguf_rows(name, weight.numpy(), config))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


GGUF_NAMES = {
    "model.embed_tokens": "token_embd",
    "model.norm": "output_norm",
    "lm_head": "output",
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
    "input_layernorm": "attn_norm",
    "post_attention_layernorm": "ffn_norm",
}


def _gguf_name(name: str) -> str:
    stem = name.removesuffix(".weight")
    if not stem.startswith("model.layers."):
        return f"{GGUF_NAMES[stem]}.weight"
    block, _, part = stem.removeprefix("model.layers.").partition(".")
    return f"blk.{block}.{GGUF_NAMES[part]}.weight"


def _gguf_rows(name: str, weight: np.ndarray[Any, Any], config: Any) -> np.ndarray[Any, Any]:
    if not name.endswith(("q_proj.weight", "k_proj.weight")):
        return weight
    heads = config.num_attention_heads if name.endswith("q_proj.weight") else config.num_key_value_heads
    return weight.reshape(heads, 2, -1, weight.shape[1]).swapaxes(1, 2).reshape(weight.shape)


@pytest.fixture(scope="module")
def gguf_file(tmp_path_factory: pytest.TempPathFactory, tiny_module: Callable[..., Any], tiny_tokenizer: Any) -> Path:
    return write_gguf(tmp_path_factory.mktemp("gguf") / "tiny.gguf", tiny_module("llama"), tiny_tokenizer)


def converted(home: Path) -> list[str]:
    """What conversions left in the home."""
    models = home / "models"
    return sorted(path.name for path in models.iterdir()) if models.is_dir() else []


def test_a_gguf_file_is_the_model_that_was_written(
    gguf_file: Path, tiny_module: Callable[..., Any], tiny_tokenizer: Any, home: Path
) -> None:
    said: list[str] = []
    subject = assay.load(str(gguf_file), notify=said.append)
    assert torch.allclose(subject.run(IDS).logits, logits(tiny_module("llama")), atol=1e-6)
    text = "When Mary and John went to the store, John"
    assert subject.tokenizer(text)["input_ids"] == tiny_tokenizer(text)["input_ids"]
    assert [line.split()[0] for line in said] == ["converting", "loading"]
    source = resolve(str(gguf_file))
    assert converted(home) == [source.folder.name]
    assert subject.fingerprint == source.fingerprint
    assert (source.card().n_layers, source.card().n_heads) == (3, 4)
    said.clear()
    again = assay.load(str(gguf_file), notify=said.append)
    assert said == [f"loading {gguf_file}"]
    assert torch.equal(again.run(IDS).logits, subject.run(IDS).logits)


def test_a_damaged_conversion_is_made_again(gguf_file: Path, tiny_module: Callable[..., Any], home: Path) -> None:
    assay.load(str(gguf_file))
    cut(resolve(str(gguf_file)).folder)
    said: list[str] = []
    subject = assay.load(str(gguf_file), notify=said.append)
    assert "the converted copy is damaged and is made again" in said[1]
    assert torch.allclose(subject.run(IDS).logits, logits(tiny_module("llama")), atol=1e-6)


@pytest.mark.parametrize("share", [0.001, 0.02, 0.3, 0.9, 0.9999])
def test_a_gguf_file_that_was_cut_off_is_refused_and_leaves_nothing(
    gguf_file: Path, tmp_path: Path, home: Path, share: float
) -> None:
    data = gguf_file.read_bytes()
    path = tmp_path / "cut.gguf"
    path.write_bytes(data[: int(share * len(data))])
    with pytest.raises(DamagedFile, match=r"cut\.gguf could not be read"):
        assay.load(str(path))
    assert converted(home) == []


def test_a_gguf_file_that_lacks_a_weight_is_refused_and_leaves_nothing(
    tmp_path: Path, tiny_module: Callable[..., Any], tiny_tokenizer: Any, home: Path
) -> None:
    path = write_gguf(tmp_path / "lacking.gguf", tiny_module("llama"), tiny_tokenizer, without=UP)
    with pytest.raises(DamagedFile, match=rf"1 of the weights of 'lacking.gguf' are not in the files.*: {UP}"):
        assay.load(str(path))
    assert converted(home) == []


def test_a_cache_that_cannot_be_written_is_an_error(gguf_file: Path, home: Path) -> None:
    home.mkdir()
    (home / "models").write_text("in the way")
    with pytest.raises(LoadError, match="could not be kept"):
        assay.load(str(gguf_file))


def test_a_conversion_that_cannot_be_kept_leaves_nothing(gguf_file: Path, home: Path) -> None:
    """Its place is taken by something that is not a model."""
    place = resolve(str(gguf_file)).folder
    place.mkdir(parents=True)
    (place / "notes.txt").write_text("mine")
    with pytest.raises(LoadError, match="could not be kept"):
        assay.load(str(gguf_file))
    assert converted(home) == [place.name]
    assert [path.name for path in place.iterdir()] == ["notes.txt"]


# Modules of the user's own


def test_a_module_stays_the_users_own(tiny_module: Callable[..., Any], tiny_tokenizer: Any) -> None:
    module = tiny_module("llama")
    subject = assay.load(module, tokenizer=tiny_tokenizer)
    assert subject.module is module
    assert subject.tokenizer is tiny_tokenizer
    assert torch.equal(subject.run("When Mary went").logits, subject.run(subject.tokens("When Mary went").ids).logits)


def test_training_mode_is_refused_with_advice(tiny_module: Callable[..., Any]) -> None:
    module = tiny_module("gpt2").train()
    with pytest.raises(UnsupportedArchitecture, match=r"in training mode.*call \.eval\(\) on it first"):
        assay.load(module)
    assert module.training  # refused, not changed
    assert assay.load(module.eval()).n_blocks == 3


def test_the_fingerprint_follows_the_weights(save: Callable[..., Any]) -> None:
    """An edit of the weights in place makes another model, wherever it was loaded from."""
    folder, module = save()
    subject = assay.load(str(folder))
    assert subject.fingerprint == resolve(str(folder)).fingerprint
    own = assay.load(module)
    before = {subject.fingerprint, own.fingerprint}
    for edited in (subject, own):
        with torch.no_grad():
            edited.module.lm_head.weight[3] += 1
    after = {subject.fingerprint, own.fingerprint}
    assert not after & before


class Echo(nn.Module):
    """A module of no family."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(128, 8)
        self.out = nn.Linear(8, 128)

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        return self.out(self.embed(ids))


def test_a_module_of_no_family_has_its_modules_as_sites() -> None:
    module = Echo()
    subject = assay.load(module)
    run = subject.run(IDS, capture=["module:embed.out", "module:out.in"])
    with torch.no_grad():
        embedded = module.embed(IDS)
        assert torch.equal(run["module:embed.out"], embedded)
        assert torch.equal(run["module:out.in"], embedded)
        assert torch.equal(run.logits, module(IDS))
        edited = subject.run(IDS, edits=[assay.Scale("module:embed.out", 2.0)])
        assert torch.equal(edited.logits, module.out(2 * embedded))
    for site in ("blocks.0.resid_post", "embed", "blocks.*.attn.z"):
        with pytest.raises(UnsupportedArchitecture, match="Echo has no standard sites: no architecture map knows it"):
            subject.run(IDS, capture=site)
    assert subject.n_blocks == 0


class Extra(modeling_llama.LlamaDecoderLayer):
    """A Llama block that writes something the map does not know of."""

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        return super().forward(*args, **kwargs) + 0.01


def test_a_map_that_fails_is_refused_by_the_identity_and_modules_still_work(tiny_module: Callable[..., Any]) -> None:
    module = tiny_module("llama")
    module.model.layers[1].__class__ = Extra
    subject = assay.load(module)
    message = r"the self-check failed: blocks\.1: what enters plus its layers' outputs leaves; off by"
    for site in ("blocks.0.resid_post", "blocks.*.mlp.out", "final_norm"):
        with pytest.raises(UnsupportedArchitecture, match=message):
            subject.run(IDS, capture=site)
    run = subject.run(IDS, capture=["module:model.layers.1.mlp.out", "module:model.layers.1.out"])
    assert torch.equal(run.logits, logits(module))
    seen: list[torch.Tensor] = []
    handle = module.model.layers[1].mlp.register_forward_hook(lambda m, args, out: seen.append(out))
    module(IDS)
    handle.remove()
    assert torch.equal(run["module:model.layers.1.mlp.out"], seen[0])
    assert run["module:model.layers.1.out"].shape == (1, 7, 32)


def test_a_missing_part_is_named(tiny_module: Callable[..., Any]) -> None:
    module = tiny_module("llama")
    module.model.layers[2].mlp = nn.Identity()
    subject = assay.load(module)
    with pytest.raises(
        UnsupportedArchitecture, match=r"expects .mlp\.up_proj. in LlamaDecoderLayer, which is not there"
    ):
        subject.run(IDS, capture="embed")
    assert torch.equal(subject.run(IDS).logits, logits(module))


def test_a_copy_of_the_home_is_the_home(gguf_file: Path, home: Path, tmp_path: Path, monkeypatch: Any) -> None:
    """A converted model can be carried to a machine without the packages that convert."""
    first = assay.load(str(gguf_file)).run(IDS).logits
    shutil.copytree(home, tmp_path / "other")
    monkeypatch.setenv("ASSAY_HOME", str(tmp_path / "other"))
    said: list[str] = []
    assert torch.equal(assay.load(str(gguf_file), notify=said.append).run(IDS).logits, first)
    assert said == [f"loading {gguf_file}"]
