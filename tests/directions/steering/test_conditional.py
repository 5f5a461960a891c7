"""Conditional steering: each prompt decides for itself, once, and on the side of the threshold that it says."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from assay import Add, Subject
from assay.base.errors import InvalidEdit, SpecError
from assay.directions import Direction
from assay.directions.steering.conditional import Condition, _threshold, fit_condition, steer_if

SITE = "blocks.1.resid_post"
PROMPTS = ["When Mary went to the store", "the capital of France is", "When a drink"]
OPTIONS: dict[str, Any] = {"max_new_tokens": 4, "eos_token_id": None}


def condition(subject: Subject, when: Any = "above", between: tuple[int, int] = (0, 1)) -> Condition:
    """A condition whose threshold lies between the similarities of two of the prompts, in their order."""
    direction = Direction(site=SITE, vector=torch.randn(32, generator=torch.Generator().manual_seed(2)))
    similarity = Condition(direction=direction, threshold=0.0).similarity(subject, PROMPTS).sort().values
    return Condition(direction=direction, threshold=float(similarity[list(between)].mean()), when=when)


def test_a_similarity_is_the_cosine_of_the_prompts_mean(gpt2: Subject) -> None:
    made = condition(gpt2)
    for k, text in enumerate(PROMPTS):
        mean = gpt2.run(text, capture=SITE)[SITE][0].mean(0)
        hand = torch.cosine_similarity(mean, made.direction.vector, dim=0)
        assert float(made.similarity(gpt2, PROMPTS)[k]) == pytest.approx(float(hand), abs=1e-4)


@pytest.mark.parametrize(("when", "count"), [("above", 2), ("below", 1)])
def test_each_prompt_is_steered_or_not_by_its_own_similarity(gpt2: Subject, when: Any, count: int) -> None:
    made = condition(gpt2, when)
    edit = Add("blocks.2.resid_pre", torch.full((32,), 3.0) * torch.arange(32).sin(), scale=5.0)
    found = steer_if(gpt2, PROMPTS, made, [edit], **OPTIONS)
    similarity = found.similarity
    assert found.fired == tuple(
        (similarity > made.threshold if when == "above" else similarity < made.threshold).tolist()
    )
    assert sum(found.fired) == count
    always = gpt2.generate(PROMPTS, edits=[edit], apply_to="all", **OPTIONS)
    never = gpt2.generate(PROMPTS, **OPTIONS)
    assert (always.logits - never.logits).abs().amax((1, 2)).min() > 0.1
    for row, fired in enumerate(found.fired):
        expected = always if fired else never
        assert torch.equal(found.run.generated[row], expected.generated[row])
        assert torch.allclose(found.run.logits[row], expected.logits[row], atol=1e-4)


def test_where_none_meets_it_nothing_is_done(gpt2: Subject) -> None:
    made = Condition(direction=condition(gpt2).direction, threshold=1.0)
    found = steer_if(gpt2, PROMPTS, made, [Add("blocks.2.resid_pre", 5.0)], **OPTIONS)
    assert found.fired == (False,) * 3
    assert torch.equal(found.run.logits, gpt2.generate(PROMPTS, **OPTIONS).logits)
    seen = steer_if(gpt2, PROMPTS, made, [Add("blocks.2.resid_pre", 5.0)], apply_to="new", capture=SITE, **OPTIONS)
    assert seen.run[SITE].shape[0] == 3


def test_the_decision_holds_for_what_follows(gpt2: Subject) -> None:
    """Steering that turns the stream against the condition goes on all the same."""
    made = condition(gpt2)
    against = Add(SITE, -50.0 * made.direction.unit)
    found = steer_if(gpt2, PROMPTS, made, [against], apply_to="new", capture=SITE, **OPTIONS)
    row = found.fired.index(True)
    along = found.run[SITE][row] @ made.direction.unit
    assert (along < -20).all()


@given(values=st.lists(st.floats(-1, 1), min_size=1, max_size=6), threshold=st.floats(-1, 1))
def test_above_and_below_never_fire_together(values: list[float], threshold: float) -> None:
    direction = Direction(site=SITE, vector=torch.ones(2))
    similarity = torch.tensor(values, dtype=torch.float64)
    above = Condition(direction=direction, threshold=threshold).fires(similarity)
    below = Condition(direction=direction, threshold=threshold, when="below").fires(similarity)
    assert above == tuple(value > threshold for value in values)
    assert below == tuple(value < threshold for value in values)


def test_a_condition_is_fitted_and_its_threshold_chosen_elsewhere(gpt2: Subject) -> None:
    meets = ["When Mary went", "When John went", "When Mary and John went", "When the store went"]
    others = ["the capital of France is", "the milk of Paris is", "the store of France is", "the drink of Paris is"]
    made = fit_condition(gpt2, meets[:2], others[:2], SITE, validation=(meets[2:], others[2:]))
    assert made.fires(made.similarity(gpt2, meets[2:] + others[2:])) == (True, True, False, False)
    assert made.direction.origin.detail["balanced accuracy"] == 1.0
    with pytest.raises(SpecError, match="others to choose by"):
        fit_condition(gpt2, meets, others, SITE, validation=(meets, others))


def test_the_threshold_is_in_the_widest_gap_of_the_best_accuracy() -> None:
    cut, accuracy = _threshold(np.array([0.5, 0.9]), np.array([-0.3, 0.1]))
    assert (cut, accuracy) == (pytest.approx(0.3), 1.0)
    cut, accuracy = _threshold(np.array([0.5, 0.9, -0.5]), np.array([-0.3, 0.1, 0.0]))
    assert (cut, accuracy) == (pytest.approx(0.3), pytest.approx(5 / 6))


def test_bad_conditions_are_refused(gpt2: Subject) -> None:
    direction = Direction(site=SITE, vector=torch.ones(32))
    with pytest.raises(SpecError, match="a cosine lies between -1 and 1"):
        Condition(direction=direction, threshold=3.0)
    with pytest.raises(InvalidEdit, match="leave rows= out"):
        steer_if(gpt2, PROMPTS, condition(gpt2), [Add(SITE, 1.0, rows=0)], **OPTIONS)
