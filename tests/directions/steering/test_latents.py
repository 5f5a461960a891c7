"""Steering by latents: clamps keep the error, and a task vector is rewritten in the latents that do its work."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from assay import Set, Subject
from assay.base.errors import NumericalError, SpecError
from assay.base.protocols import Dictionary
from assay.directions import Direction
from assay.directions.steering.functions import InContextTask, Questions, task_vectors
from assay.directions.steering.latents import (
    _Loss,
    clamp_latents,
    clean_task_vector,
    dense,
    max_activations,
    steer_latent,
)

SITE = "blocks.1.resid_post"
TEXTS = ["When Mary went to the store", "the capital of France is", "When a drink"]


@pytest.fixture
def dictionary(make_dictionary: Callable[..., Any]) -> Any:
    made = make_dictionary(SITE)
    assert isinstance(made, Dictionary)
    return made


def test_a_clamp_moves_by_the_latents_own_change_and_keeps_the_error(gpt2: Subject, dictionary: Any) -> None:
    plain = gpt2.run(TEXTS[0], capture=SITE)[SITE]
    z = dictionary.encode(plain)
    j = int(z[0, -1].argmax())
    clamped = gpt2.run(TEXTS[0], capture=SITE, edits=[clamp_latents(dictionary, {j: 3.0, 5: 0.0})])[SITE]
    hand = plain + (3.0 - z[..., j, None]) * dictionary.decoder[j] + (0.0 - z[..., 5, None]) * dictionary.decoder[5]
    assert torch.allclose(clamped, hand, atol=1e-4)
    error = plain - dictionary.decode(z)
    z[..., j], z[..., 5] = 3.0, 0.0
    assert error.norm() > 1
    assert torch.allclose(clamped, dictionary.decode(z) + error, atol=1e-4)


@settings(max_examples=10)
@given(j=st.integers(0, 47))
def test_a_latent_clamped_to_what_it_is_changes_nothing_bit_for_bit(
    tiny_subject: Subject, make_dictionary: Callable[..., Any], j: int
) -> None:
    dictionary = make_dictionary(SITE)
    run = tiny_subject.run("When Mary went", capture=SITE)
    own = float(dictionary.encode(run[SITE][:, -1:])[0, 0, j])  # as the edit sees it: rounding depends on the shape
    edit = clamp_latents(dictionary, {j: own}, positions="last")
    assert torch.equal(tiny_subject.run("When Mary went", edits=[edit]).logits, run.logits)


def test_a_dose_of_one_adds_the_largest_activation(gpt2: Subject, dictionary: Any) -> None:
    best = max_activations(gpt2, dictionary, TEXTS, batch=2)
    hand = torch.cat([dictionary.encode(gpt2.run(text, capture=SITE)[SITE])[0, 1:] for text in TEXTS]).amax(0)
    assert torch.allclose(best, hand, atol=1e-4)
    j = int(best.argmax())
    plain = gpt2.run(TEXTS[0], capture=SITE)[SITE]
    steered = gpt2.run(TEXTS[0], capture=SITE, edits=[steer_latent(dictionary, j, float(best[j]), 2.0, positions=[3])])[
        SITE
    ]
    assert torch.allclose((steered - plain)[0, 3], 2 * best[j] * dictionary.decoder[j], atol=1e-4)
    assert not (steered - plain)[0, [0, 1, 2, 4]].any()


def test_sparse_answers_of_a_dictionary_are_read() -> None:
    z = torch.tensor([[0.0, 2.0], [1.0, 0.0]])
    assert torch.equal(dense(z.to_sparse()), z)
    assert torch.equal(dense(z), z)


def test_bad_latents_are_refused(gpt2: Subject, dictionary: Any) -> None:
    with pytest.raises(SpecError, match="has latents 0 to 47; 48 is not one of them"):
        clamp_latents(dictionary, {48: 1.0})
    with pytest.raises(SpecError, match="none was given"):
        clamp_latents(dictionary, {})
    with pytest.raises(NumericalError, match="it does not fire on that data"):
        steer_latent(dictionary, 3, 0.0)
    with pytest.raises(SpecError, match="no text with two tokens"):
        max_activations(gpt2, dictionary, ["When"])


def test_the_gradient_by_coefficients_is_the_slope_of_the_loss(gpt2: Subject, dictionary: Any) -> None:
    prompts = Questions(texts=("When Mary is", "the store"), answers=(" John", " milk"))
    loss = _Loss(gpt2, dictionary, prompts)
    c = torch.rand(48, generator=torch.Generator().manual_seed(1))
    value, gradient = loss(c)
    assert value == pytest.approx(loss.at(dictionary.decode(c[None])[0]), rel=1e-5)
    for j in (0, 17, 40):
        step = torch.zeros(48)
        step[j] = 0.05
        slope = (loss(c + step)[0] - loss(c - step)[0]) / 0.1
        assert float(gradient[j]) == pytest.approx(slope, rel=0.02, abs=2e-3)


def test_a_task_vector_is_cleaned_to_the_latents_that_do_its_work(
    gpt2: Subject, make_dictionary: Callable[..., Any]
) -> None:
    """Planted: one latent writes the answer's own row after the last block, the others only add to the vector."""
    site = "blocks.2.resid_post"
    token = gpt2.tokenizer(" France")["input_ids"][0]
    answer = gpt2.module.lm_head.weight[token].detach() * gpt2.module.transformer.ln_f.weight.detach()
    answer = (answer - answer.mean()) / (answer - answer.mean()).norm()
    rows = torch.linalg.qr(torch.cat([answer[None], torch.randn(31, 32, generator=torch.Generator().manual_seed(3))]).T)
    basis = rows[0].T * torch.sign(torch.diagonal(rows[1]))[:, None]
    made = make_dictionary(site)
    dictionary = type(made)(
        site=site, encoder=basis.T.contiguous(), decoder=basis, offset=torch.zeros(32), threshold=torch.zeros(32)
    )
    vector = 4.0 * basis[0] + basis[1:20].sum(0)
    prompts = Questions(texts=("When Mary is", "the store"), answers=(" France", " France"))
    found = clean_task_vector(
        gpt2, dictionary, Direction(site=site, vector=vector), prompts, penalty=2.0, steps=80, rate=0.04
    )
    assert found.latents[0] == 20
    assert found.latents[1] < 10
    assert max(found.coefficients, key=lambda j: found.coefficients[j]) == 0
    assert found.loss[2] < found.loss[0]
    assert torch.allclose(found.direction.vector, sum(c * basis[j] for j, c in found.coefficients.items()), atol=1e-4)
    edit = Set(site, found.direction.vector, positions="last")
    run = gpt2.run(list(prompts.texts), edits=[edit])
    own = -run.batch.last(run.logits).log_softmax(-1)[:, token].mean()
    assert found.loss[2] == pytest.approx(float(own), rel=1e-4)


def test_cleaning_needs_a_dictionary_of_the_vectors_site(gpt2: Subject, dictionary: Any) -> None:
    task = InContextTask(items=(("Mary", "John"), ("milk", "store")), question="When {} is", between=", ")
    prompts = task.prompts((0,))
    vector = task_vectors(gpt2, task.prompts((0, 1), shots=1), "blocks.2.resid_post")["blocks.2.resid_post"]
    with pytest.raises(SpecError, match=r"the vector lies at blocks\.2\.resid_post, the dictionary reads"):
        clean_task_vector(gpt2, dictionary, vector, prompts)
    nothing = type(dictionary)(
        site="blocks.2.resid_post",
        encoder=dictionary.encoder,
        decoder=dictionary.decoder,
        offset=dictionary.offset,
        threshold=torch.full((48,), -1e6),
    )
    with pytest.raises(NumericalError, match="encodes the vector as nothing"):
        clean_task_vector(gpt2, nothing, vector, prompts)
