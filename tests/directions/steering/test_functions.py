"""Function and task vectors: the prompts, the means, the effects and the sums are what single runs say."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from assay import Set, Subject
from assay.base.errors import SpecError, UnsupportedArchitecture
from assay.directions.steering.functions import (
    InContextTask,
    Questions,
    function_vector,
    indirect_effects,
    mean_heads,
    patch_in,
    score,
    score_arms,
    task_vectors,
)

WORDS = ("Mary", "John", "store", "drink", "milk", "Paris")
TASK = InContextTask(
    items=tuple(zip(WORDS, ("John", "Mary", "milk", "store", "drink", "France"), strict=True)),
    question="When {} is",
    between=", ",
)


def test_examples_come_before_the_question_and_never_hold_it() -> None:
    made = TASK.prompts((0, 5), shots=3, pool=(0, 1, 2, 3), seed=4)
    assert made.answers == (" John", " France")
    for text, item in zip(made.texts, (0, 5), strict=True):
        *examples, question = text.split(", ")
        assert question == f"When {WORDS[item]} is"
        assert len(examples) == 3
        assert not any(f"When {WORDS[item]} " in example for example in examples)
        assert not any(WORDS[4] in example.split()[1] for example in examples)  # not in the pool
        assert all(example in {f"When {q} is {a}" for q, a in TASK.items} for example in examples)
    assert made == TASK.prompts((0, 5), shots=3, pool=(0, 1, 2, 3), seed=4)
    assert TASK.prompts((0,)).texts == ("When Mary is",)


@settings(max_examples=20)
@given(seed=st.integers(0, 100), shots=st.integers(2, 5))
def test_shuffled_examples_keep_questions_and_answers_and_no_pair(seed: int, shots: int) -> None:
    true = TASK.prompts((0,), shots=shots, seed=seed).texts[0].split(", ")[:-1]
    false = TASK.prompts((0,), shots=shots, seed=seed, shuffled=True).texts[0].split(", ")[:-1]
    assert [line.split()[1] for line in true] == [line.split()[1] for line in false]
    assert sorted(line.split()[3] for line in true) == sorted(line.split()[3] for line in false)
    assert all(a != b for a, b in zip(true, false, strict=True))


def test_items_are_split_without_overlap() -> None:
    shown, asked = TASK.split(held_out=0.4, seed=2)
    assert sorted([*shown, *asked]) == list(range(6))
    assert len(asked) == 2


@pytest.mark.parametrize("family", ["gpt2", "llama"])
def test_means_and_indirect_effects_are_those_of_single_runs(make_subject: Callable[..., Subject], family: str) -> None:
    subject = make_subject(family)
    prompts = TASK.prompts((0, 3, 5), shots=2, seed=1)
    means = mean_heads(subject, prompts, batch=2)
    hand = [subject.run(text, capture="blocks.1.attn.z")["blocks.1.attn.z"][0, -1] for text in prompts.texts]
    assert torch.allclose(means[1], torch.stack(hand).mean(0), atol=1e-5)
    shuffled = TASK.prompts((1, 2), shots=3, seed=1, shuffled=True)
    effects = indirect_effects(subject, means, shuffled)
    assert effects.shape == (3, 4)
    for block, head in ((0, 1), (2, 3)):
        change = []
        for text, answer in zip(shuffled.texts, shuffled.answers, strict=True):
            token = subject.tokenizer(answer)["input_ids"][0]
            edit = Set(f"blocks.{block}.attn.z.{head}", means[block, head], positions="last")
            runs = subject.run(text), subject.run(text, edits=[edit])
            before, after = (float(run.logits[0, -1].softmax(-1)[token]) for run in runs)
            change.append(after - before)
        assert float(effects[block, head]) == pytest.approx(sum(change) / 2, rel=1e-2, abs=1e-6)
    one = Questions(texts=shuffled.texts[:1], answers=shuffled.answers[:1])  # one prompt: cells are the rows
    both = torch.stack([indirect_effects(subject, means, one), indirect_effects(subject, means, Questions(
        texts=shuffled.texts[1:], answers=shuffled.answers[1:]))])  # fmt: skip
    assert torch.allclose(both.mean(0), effects, atol=1e-5)


@pytest.mark.parametrize("family", ["gpt2", "llama", "gpt_neox"])
def test_a_function_vector_is_what_the_top_heads_write_on_average(
    make_subject: Callable[..., Subject], family: str
) -> None:
    subject = make_subject(family)
    prompts = TASK.prompts((0, 3), shots=2)
    means = mean_heads(subject, prompts)
    effects = torch.zeros(3, 4)
    effects[0, 2], effects[2, 1], effects[1, 1] = 0.5, 0.3, -0.9
    found = function_vector(subject, means, effects, n_heads=2)
    sites = ["blocks.0.attn.result", "blocks.2.attn.result"]
    hand = torch.zeros(32)
    for text in prompts.texts:
        run = subject.run(text, capture=sites)
        hand += (run[sites[0]][0, -1, 2] + run[sites[1]][0, -1, 1]) / 2
    assert torch.allclose(found.vector, hand, atol=1e-5)
    assert found.site == "blocks.1.resid_post"
    assert found.origin.detail["heads"] == [[0, 2], [2, 1]]


def test_a_model_with_a_norm_on_its_heads_has_no_function_vector(make_subject: Callable[..., Subject]) -> None:
    with pytest.raises(UnsupportedArchitecture, match="use a task vector"):
        function_vector(make_subject("gemma2"), torch.zeros(3, 4, 8), torch.zeros(3, 4), n_heads=1)


def test_a_task_vector_of_one_prompt_put_in_after_the_last_block_gives_that_prompts_answer(gpt2: Subject) -> None:
    few, zero = TASK.prompts((2,), shots=3), TASK.prompts((2,))
    vectors = task_vectors(gpt2, few)
    assert list(vectors) == [f"blocks.{b}.resid_post" for b in range(3)]
    patched = gpt2.run(list(zero.texts), edits=[patch_in(vectors["blocks.2.resid_post"])]).logits[0, -1]
    assert torch.allclose(patched, gpt2.run(list(few.texts)).logits[0, -1], atol=1e-4)
    earlier = gpt2.run(list(zero.texts), edits=[patch_in(vectors["blocks.0.resid_post"])]).logits[0, -1]
    assert (earlier - patched).abs().max() > 1e-2


def test_scores_are_the_models_own_answers(gpt2: Subject) -> None:
    prompts = TASK.prompts(range(6), shots=2)
    found = score(gpt2, prompts, batch=4)
    for k, (text, answer) in enumerate(zip(prompts.texts, prompts.answers, strict=True)):
        last = gpt2.run(text).logits[0, -1]
        token = gpt2.tokenizer(answer)["input_ids"][0]
        assert found.answers[k] == token
        assert found.correct[k] == (int(last.argmax()) == token)
        assert found.probability[k] == pytest.approx(float(last.softmax(-1)[token]), rel=1e-4)
    assert found.accuracy == sum(found.correct) / 6


def test_an_edit_that_writes_the_answers_is_right_in_every_arm(gpt2: Subject) -> None:
    """All items here have one answer, and the edit after the last block says it."""
    task = InContextTask(items=tuple((word, "France") for word in WORDS), question="When {} is", between=", ")
    token = gpt2.tokenizer(" France")["input_ids"][0]
    row = gpt2.module.lm_head.weight[token].detach()
    edit = Set("final_norm", 50 * row, positions="last")
    arms = score_arms(gpt2, task, [edit], asked=(0, 1), pool=(2, 3, 4, 5), shots=2)
    assert set(arms) == {"zero-shot", "shuffled", "few-shot", "zero-shot edited", "shuffled edited"}
    assert arms["zero-shot edited"].accuracy == arms["shuffled edited"].accuracy == 1.0
    assert arms["zero-shot"].accuracy < 1.0


@pytest.mark.parametrize(
    ("call", "says"),
    [
        (lambda: InContextTask(items=()), "a task needs items"),
        (lambda: InContextTask(items=(("a", "b"), ("a", "c"))), "no question twice"),
        (lambda: InContextTask(items=(("a", "b"),), question="Q:"), "no place for the question"),
        (lambda: TASK.prompts((0,), shots=6), "6 examples cannot be drawn from 5 items"),
        (lambda: TASK.prompts((0,), shots=1, shuffled=True), "shuffling needs two"),
        (lambda: Questions(texts=("a",), answers=()), "give one each"),
    ],
)
def test_bad_tasks_are_refused(call: Any, says: str) -> None:
    with pytest.raises(SpecError, match=says):
        call()


def test_means_of_another_model_and_too_many_heads_are_refused(gpt2: Subject) -> None:
    with pytest.raises(SpecError, match="has 3 x 4 heads"):
        indirect_effects(gpt2, torch.zeros(2, 4, 8), TASK.prompts((0,)))
    with pytest.raises(SpecError, match="has 12 heads"):
        function_vector(gpt2, torch.zeros(3, 4, 8), torch.zeros(3, 4), n_heads=13)
