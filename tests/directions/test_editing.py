"""ROME changes one matrix of a copy by the least that makes it say the new object; the user's module stays as it is."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch

import assay
from assay.base.errors import SpecError
from assay.directions.editing import Fact, Rewritten, continuation, facts, key_covariance, rome

TEXTS = [
    "When Mary and John went to the store John gave a drink to Mary",
    "The capital of France is Paris and the store is Paris",
    "John gave milk and a drink to the capital",
    "Paris is the capital of France and Mary went to France",
    "a drink of milk is the drink of John and Mary",
]
FACT = Fact(
    prompt="{} is the capital of",
    subject="Paris",
    target=" Mary",
    original=" France",
    paraphrases=("the capital of {} is", "went to the store and {} is the capital of"),
    neighbours=("John is the capital of", "Mary went to the"),
)
PREFIXES = ("", "the store and ", "John gave a drink and ")


@pytest.fixture(scope="module", params=["gpt2", "llama"])
def edited(request: Any, tiny_module: Any, tiny_tokenizer: Any) -> tuple[Any, dict[str, Any], Rewritten]:
    """A family's subject, its weights before, and the edit; Llama's MLP is gated."""
    subject = assay.load(tiny_module(request.param), tokenizer=tiny_tokenizer)
    before = {name: value.clone() for name, value in subject.module.state_dict().items()}
    c = key_covariance(subject, TEXTS, 1)
    return subject, before, rome(subject, FACT, 1, c, prefixes=PREFIXES, steps=40, decay=0.01, reach=20.0)


def test_the_users_module_is_untouched(edited: Any) -> None:
    subject, before, _ = edited
    after = subject.module.state_dict()
    assert all(torch.equal(after[name], before[name]) for name in before)
    assert all(parameter.grad is None and parameter.requires_grad for parameter in subject.module.parameters())


def test_one_matrix_of_the_copy_changed_by_rank_one(edited: Any) -> None:
    subject, before, found = edited
    after = found.subject.module.state_dict()
    changed = [name for name in before if not torch.equal(after[name], before[name])]
    path = subject.point(subject.site("blocks.1.mlp.post")).path
    assert changed == [f"{path}.weight"]
    delta = after[changed[0]] - before[changed[0]]
    sizes = torch.linalg.svdvals(delta.double())
    assert float(sizes[1] / sizes[0]) < 1e-4
    oriented = delta.T if type(subject.module.get_submodule(path)).__name__ == "Conv1D" else delta
    assert torch.allclose(oriented, found.change, atol=1e-5)


def test_the_key_now_gives_the_value_and_the_model_says_the_target(edited: Any) -> None:
    subject, _, found = edited
    module = found.subject.module.get_submodule(subject.point(subject.site("blocks.1.mlp.post")).path)
    with torch.no_grad():
        assert torch.allclose(module(found.key[None])[0], found.value, atol=1e-3)
    before, after = found.score.efficacy
    assert after.target[0] > before.target[0]
    assert found.losses[-1] < found.losses[0]
    numbers = found.score.numbers()
    assert numbers["efficacy"] == float(after.target[0] > after.original[0])
    assert 0 <= numbers["generalisation"] <= 1 and 0 <= numbers["specificity"] <= 1 and numbers["drift"] >= 0
    assert len(found.score.generalisation[0].target) == len(found.score.specificity[1].original) == 2


@pytest.mark.parametrize("family", ["gpt2", "llama"])
def test_with_one_prompt_the_edit_says_what_the_search_found(
    family: str, tiny_module: Any, tiny_tokenizer: Any
) -> None:
    """k* is then the prompt's own key: the edited model answers as the old one does with v* put in place."""
    subject = assay.load(tiny_module(family), tokenizer=tiny_tokenizer)
    c = key_covariance(subject, TEXTS, 1)
    found = rome(subject, FACT, 1, c, prefixes=("",), steps=15, decay=0.0, kl=0.0, reach=50.0)
    prompt = FACT.asked(FACT.prompt)
    n = subject.batch([FACT.subject]).lengths[0]
    held = subject.run(prompt, edits=[assay.Set("blocks.1.mlp.out", found.value, positions=n - 1)])
    target = subject.batch(["When" + FACT.target]).ids[0, -1]
    patched = float(held.logits[0, -1].log_softmax(-1)[target])
    # The copy also changes at the prompt's other tokens, in proportion to how alike their keys are.
    one = found.subject.run(prompt, capture="blocks.1.mlp.out")["blocks.1.mlp.out"][0, n - 1]
    assert torch.allclose(one, found.value, atol=1e-3)
    assert patched > found.score.efficacy[0].target[0] + 0.1


def test_no_other_matrix_that_gives_the_value_moves_typical_outputs_less(edited: Any) -> None:
    subject, _, found = edited
    c = key_covariance(subject, TEXTS, 1)
    c = c + 1e-2 * float(torch.diagonal(c).mean()) * torch.eye(len(c), dtype=torch.float64)
    change, key = found.change.double(), found.key.double()

    def moved(delta: torch.Tensor) -> float:
        return float(torch.trace(delta @ c @ delta.T))

    generator = torch.Generator().manual_seed(0)
    for _ in range(10):
        other = torch.randn(change.shape, generator=generator, dtype=torch.float64)
        other = other - torch.outer(other @ key, key) / (key @ key)  # leaves W' k* where it is
        assert moved(change) < moved(change + 0.1 * other)
    euclidean = torch.outer(change @ key, key) / (key @ key)
    assert moved(change) <= moved(euclidean) * (1 + 1e-6)


def test_the_covariance_is_that_of_all_tokens(edited: Any) -> None:
    subject, _, _ = edited
    site = "blocks.1.mlp.post"
    keys = torch.cat([subject.run(text, capture=site)[site][0] for text in TEXTS]).double()
    assert torch.allclose(key_covariance(subject, TEXTS, 1, batch=2), keys.T @ keys / len(keys), atol=1e-5)


def test_a_continuation_is_the_sum_of_its_tokens(tiny_subject: Any) -> None:
    text = "France is Paris"  # three tokens after "capital of"
    found = continuation(tiny_subject, ["When Mary", "The capital of"], " went to")
    for prompt, value in zip(["When Mary", "The capital of"], found, strict=True):
        run = tiny_subject.run(prompt + " went to")
        logs = run.logits[0].log_softmax(-1)
        by_hand = sum(float(logs[-3 + i, run.tokens[0, -2 + i]]) for i in range(2))
        assert value == pytest.approx(by_hand, abs=1e-4)
    with pytest.raises(SpecError, match="adds no token"):
        continuation(tiny_subject, [text], "")


def test_what_cannot_be_edited_is_refused(tiny_module: Any, tiny_tokenizer: Any) -> None:
    gemma = assay.load(tiny_module("gemma2"), tokenizer=tiny_tokenizer)
    with pytest.raises(SpecError, match="norms or scales"):
        rome(gemma, FACT, 1, torch.eye(64).double())
    subject = assay.load(tiny_module("llama"), tokenizer=tiny_tokenizer)
    with pytest.raises(SpecError, match="has 64 dimensions"):
        rome(subject, FACT, 1, torch.eye(3).double(), prefixes=("",), steps=1)
    with pytest.raises(SpecError, match="needs a tokenizer"):
        rome(assay.load(tiny_module("llama")), FACT, 1, torch.eye(64).double())
    with pytest.raises(SpecError, match="give a list"):
        key_covariance(subject, [], 1)
    with pytest.raises(SpecError, match=r"one \{\}"):
        Fact(prompt="no place", subject="Paris", target=" a", original=" b")
    with pytest.raises(SpecError, match="fact 0"):
        facts([{"prompt": "{} is", "subjet": "Paris"}])
    made = facts([{"prompt": "{} is", "subject": "Paris", "target": " a", "original": " b", "neighbours": ["x"]}])
    assert made[0].neighbours == ("x",)


def test_a_fact_without_paraphrases_has_no_share(tiny_module: Any, tiny_tokenizer: Any) -> None:
    subject = assay.load(tiny_module("llama"), tokenizer=tiny_tokenizer)
    bare = Fact(prompt="{} is the", subject="Paris", target=" store", original=" drink")
    found = rome(subject, bare, 0, torch.eye(64).double(), prefixes=("",), steps=2)
    assert math.isnan(found.score.numbers()["generalisation"]) and math.isnan(found.score.drift)
