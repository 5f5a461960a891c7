"""What cannot be explained, and models too small for the usual sizes: each is said, and nothing is half-written."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import CTRLConfig, CTRLLMHeadModel

import assay
from assay import Study
from assay.base.errors import NumericalError, SpecError, UnsupportedArchitecture

CLEAN = "When Mary and John went to the store, John gave a drink to"
CORRUPT = "When Mary and John went to the store, Mary gave a drink to"
ASKED = {"prompt": CLEAN, "answer": " Mary", "foil": " John", "corrupt": CORRUPT}


@pytest.fixture
def damaged(tiny_module: Callable[..., Any], tiny_tokenizer: Any) -> Callable[[str], Any]:
    """A Llama for which one word is NaN."""

    def make(word: str) -> Any:
        module = tiny_module("llama")
        with torch.no_grad():
            module.model.embed_tokens.weight[tiny_tokenizer(word)["input_ids"]] = float("nan")
        return assay.load(module, tokenizer=tiny_tokenizer)

    return make


@pytest.mark.parametrize(("word", "side"), [(" John", "clean"), (" Mary", "corrupt")])
@pytest.mark.parametrize("words", [{"answer": " a", "foil": " the"}, {}])
def test_logits_that_are_nan_name_the_prompt_and_leave_nothing(
    damaged: Any, word: str, side: str, words: dict[str, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("ASSAY_HOME", str(tmp_path / "home"))
    study = Study(method="explain", spec={"prompt": "When John went", "corrupt": "When Mary went"} | words)
    with pytest.raises(NumericalError, match=rf"128 of 128 next-token logits of the {side} prompt are NaN or infinite"):
        study.run(subject=damaged(word), out=tmp_path / "out")
    assert not [path for path in (tmp_path / "out").rglob("*") if path.is_file()]
    assert not [path for path in (tmp_path / "home").rglob("*") if path.is_file()]


@pytest.mark.parametrize("weight", ["model.norm.weight", "model.layers.0.mlp.down_proj.weight"])
def test_a_model_that_is_nan_all_over_is_not_blamed_on_its_architecture(
    tiny_module: Callable[..., Any], tiny_tokenizer: Any, weight: str
) -> None:
    """Its map fails every check at loading; what the user is told is what is wrong."""
    module = tiny_module("llama")
    with torch.no_grad():
        module.get_parameter(weight).fill_(float("nan"))
    with pytest.raises(NumericalError, match="128 of 128 next-token logits of the clean prompt are NaN or infinite"):
        Study(method="explain", spec={"prompt": CLEAN}).run(subject=assay.load(module, tokenizer=tiny_tokenizer))


@pytest.mark.parametrize("kind", ["any module", "a language model"])
def test_a_model_of_unknown_architecture_is_told_so(tiny_tokenizer: Any, kind: str) -> None:
    module: torch.nn.Module = torch.nn.Embedding(128, 128)
    if kind == "a language model":
        module = CTRLLMHeadModel(CTRLConfig(vocab_size=128, n_embd=16, dff=16, n_layer=2, n_head=2)).eval()
    subject = assay.load(module, tokenizer=tiny_tokenizer)
    with pytest.raises(UnsupportedArchitecture, match="no architecture map knows it"):
        Study(method="explain", spec={"prompt": CLEAN}).run(subject=subject)


def test_a_corruption_that_changes_nothing_is_an_error(tiny_module: Callable[..., Any], tiny_tokenizer: Any) -> None:
    """Attention that writes nothing: what came before the last token cannot matter."""
    module = tiny_module("llama")
    with torch.no_grad():
        for block in module.model.layers:
            block.self_attn.o_proj.weight.zero_()
    study = Study(method="explain", spec=ASKED)
    with pytest.raises(SpecError, match="the same logit difference between ' Mary' and ' John'") as caught:
        study.run(subject=assay.load(module, tokenizer=tiny_tokenizer))
    assert caught.value.field == "corrupt"


def test_words_the_model_cannot_tell_apart_are_an_error(tiny_module: Callable[..., Any], tiny_tokenizer: Any) -> None:
    module, (mary, john) = tiny_module("llama"), tiny_tokenizer(" Mary John")["input_ids"]
    with torch.no_grad():
        module.lm_head.weight[mary] = module.lm_head.weight[john]
    with pytest.raises(SpecError, match="there is nothing to explain"):
        Study(method="explain", spec=ASKED).run(subject=assay.load(module, tokenizer=tiny_tokenizer))


def test_a_corruption_that_helps_is_warned_of(
    run_job: Callable[..., Any], tiny_module: Callable[..., Any], tiny_tokenizer: Any
) -> None:
    """The prompts turned round: effects are measured, and the reader is told what their shares are worth."""
    small = assay.load(tiny_module("llama", num_hidden_layers=1), tokenizer=tiny_tokenizer)
    found = run_job(small, prompt="When Mary went to", corrupt="When John went to", top=1, random_sets=2).findings
    assert any("does not lower the logit difference (it changes by +0" in text for text in found.warnings)
    assert next(f for f in found if "baseline" in f.tags).verdict != "supported"


def test_the_default_sizes_fit_a_small_model(
    run_job: Callable[..., Any], tiny_module: Any, tiny_tokenizer: Any
) -> None:
    """Five components: no set of twenty, and no hundred others like it; what there is, is used, and said."""
    small = assay.load(tiny_module("llama", num_hidden_layers=1), tokenizer=tiny_tokenizer)
    done = run_job(small, prompt="When John went", corrupt="When Mary went", top=20, random_sets=100)
    assert len(done.finding("sets", "sufficiency").detail["components"]) == 2
    (control,) = done.finding("sets", "sufficiency").controls
    assert 3 <= len(control.null) <= 5
    assert done.finding("sets", "sufficiency").verdict == "not testable"
    assert any(f"held against {len(control.null)} random sets" in text for text in done.findings.warnings)


def test_a_set_that_has_no_other_like_it_is_not_tested(
    run_job: Callable[..., Any], tiny_module: Callable[..., Any], tiny_tokenizer: Any
) -> None:
    """One block of two heads that write nothing and one MLP: the MLP is the top component, and there is no other."""
    module = tiny_module("llama", num_hidden_layers=1, num_attention_heads=2, num_key_value_heads=2, seed=1)
    with torch.no_grad():
        module.model.layers[0].self_attn.o_proj.weight.mul_(1e-3)
    done = run_job(assay.load(module, tokenizer=tiny_tokenizer), prompt=" John", corrupt=" Mary")
    assert done.finding("sets", "sufficiency").detail["components"] == ["MLP0"]
    assert done.finding("sets", "necessity").controls[0].null == ()
    assert done.finding("sets", "necessity").verdict == "not testable"
    assert any("held against 0 random sets" in text for text in done.findings.warnings)


def test_one_head_and_one_mlp_are_no_circuit(tiny_module: Callable[..., Any], tiny_tokenizer: Any) -> None:
    module = tiny_module("llama", num_hidden_layers=1, num_attention_heads=1, num_key_value_heads=1)
    with pytest.raises(UnsupportedArchitecture, match="nothing to choose from"):
        Study(method="explain", spec=ASKED).run(subject=assay.load(module, tokenizer=tiny_tokenizer))


@pytest.mark.parametrize("family", ["gpt_neox", "gemma2"])
def test_other_families_go_through(
    run_job: Callable[..., Any], tiny_module: Callable[..., Any], tiny_tokenizer: Any, family: str
) -> None:
    subject = assay.load(tiny_module(family, num_hidden_layers=1), tokenizer=tiny_tokenizer)
    done = run_job(subject, prompt="When John went", corrupt="When Mary went", top=1, random_sets=2)
    assert len(done.findings) == 10
    sums = done.view("direct-sums")
    assert sum(sums.values) == pytest.approx(done.finding("baseline").detail["clean"], rel=1e-3)
    assert ("soft-cap" in sums.labels) == (family == "gemma2")
