"""Dose and response: each value is what one run says, nothing happens at zero, and controls get the same doses."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from assay import Add, Subject
from assay.base.errors import NumericalError, SpecError
from assay.base.stats import permutation_p
from assay.directions import Direction
from assay.directions.steering.behaviour import Ends, divergence
from assay.directions.steering.dose import Budget, Curve, SideEffect, control_vectors, dose_response

SITE = "blocks.1.resid_post"
PROMPTS = ["When Mary went", "When John and Mary", "the capital"]
UNRELATED = ["When a drink went to the store", "the milk of Paris"]
DOSES = (-1.0, 0.0, 0.5, 1.0, 2.0)


def direction(seed: int = 0, size: float = 4.0) -> Direction:
    vector = torch.randn(32, generator=torch.Generator().manual_seed(seed))
    return Direction(site=SITE, vector=3 * vector, size=size)


def measure(subject: Subject, prompts: Any, token: int = 9) -> Any:
    ends = Ends(subject.batch(prompts))
    return lambda logits: ends(logits).double().log_softmax(-1)[:, token]


def respond(subject: Subject, **more: Any) -> Any:
    given = {"prompts": PROMPTS, "metric": measure(subject, PROMPTS), "unrelated": UNRELATED} | more
    return dose_response(subject, given.pop("direction", direction()), given.pop("doses", DOSES), **given)


def test_every_value_is_what_one_run_says(gpt2: Subject) -> None:
    side = SideEffect(prompts=PROMPTS[:2], metric=measure(gpt2, PROMPTS[:2], token=20))
    drawn = control_vectors(direction(), n=2, seed=1)
    found = respond(gpt2, controls=drawn, sides={"other token": side})
    assert found.curve.doses == DOSES
    arms = [(found.curve, direction().unit), *zip(found.controls["isotropic"], drawn["isotropic"], strict=True)]
    for curve, unit in arms:
        for k, dose in enumerate(DOSES):
            edits = [Add(SITE, unit, scale=dose * 4.0)]
            for row, text in enumerate(PROMPTS):
                hand = gpt2.run(text, edits=edits).logits[0, -1].double().log_softmax(-1)
                assert curve.behaviour[k, row] == pytest.approx(float(hand[9]), abs=1e-4)
                if row < 2:
                    before = gpt2.run(text).logits[0, -1].double().log_softmax(-1)[20]
                    assert curve.sides["other token"][k, row] == pytest.approx(float(hand[20] - before), abs=1e-4)
            for row, text in enumerate(UNRELATED):
                base, steered = gpt2.run(text), gpt2.run(text, edits=edits)
                kl = divergence(base.logits[0], steered.logits[0]).mean()
                ids = base.tokens[0, 1:]
                ce = [torch.nn.functional.cross_entropy(run.logits[0, :-1], ids) for run in (base, steered)]
                assert curve.kl[k, row] == pytest.approx(float(kl), abs=1e-4)
                assert curve.ce[k, row] == pytest.approx(float(ce[1] - ce[0]), abs=1e-4)


def test_at_dose_zero_nothing_changes(gpt2: Subject) -> None:
    found = respond(gpt2, sides={"s": SideEffect(prompts=PROMPTS, metric=measure(gpt2, PROMPTS))})
    at = DOSES.index(0.0)
    assert np.array_equal(found.curve.behaviour[at], found.curve.base)
    assert not found.curve.kl[at].any() and not found.curve.ce[at].any() and not found.curve.sides["s"][at].any()


@settings(max_examples=10)
@given(seed=st.integers(0, 2**16), site=st.sampled_from(["blocks.0.resid_pre", SITE, "blocks.3.mlp.out", "embed"]))
def test_a_dose_of_zero_changes_nothing_bit_for_bit(tiny_subject: Subject, seed: int, site: str) -> None:
    vector = torch.randn(32, generator=torch.Generator().manual_seed(seed))
    edit = Direction(site=site, vector=vector, size=7.0).add(0.0)
    plain = tiny_subject.run(PROMPTS)
    assert torch.equal(tiny_subject.run(PROMPTS, edits=[edit]).logits, plain.logits)


def test_one_prompt_and_one_text_are_measured_like_many(gpt2: Subject) -> None:
    one = respond(gpt2, prompts=PROMPTS[:1], metric=measure(gpt2, PROMPTS[:1]), unrelated=UNRELATED[:1])
    many = respond(gpt2)
    np.testing.assert_allclose(one.curve.behaviour[:, 0], many.curve.behaviour[:, 0], atol=1e-4)
    np.testing.assert_allclose(one.curve.kl[:, 0], many.curve.kl[:, 0], atol=1e-4)
    np.testing.assert_allclose(one.curve.ce[:, 0], many.curve.ce[:, 0], atol=1e-4)


def test_controls_have_the_directions_norm_and_named_kinds(gpt2: Subject) -> None:
    rng = np.random.default_rng(0)
    x, y = rng.normal(size=(20, 32)), np.arange(20) % 2
    made = control_vectors(direction(), activations=x, labels=y, semantic={"a": direction(1), "b": direction(2)}, n=3)
    assert list(made) == ["isotropic", "covariance-matched", "label-shuffled", "semantic"]
    for rows in made.values():
        assert torch.allclose(rows.norm(dim=1), torch.ones(len(rows)), atol=1e-5)
    scaled = {kind: 7.0 * rows for kind, rows in made.items()}
    semantic = {"a": direction(1), "b": direction(2)}
    found = respond(gpt2, controls={"isotropic": scaled["isotropic"]}, semantic=semantic)
    assert {kind: len(curves) for kind, curves in found.controls.items()} == {"isotropic": 3, "semantic": 2}
    assert found.names["semantic"] == ("a", "b")
    other = respond(gpt2, direction=direction(1))
    np.testing.assert_allclose(found.controls["semantic"][0].behaviour, other.curve.behaviour, atol=1e-4)


def test_a_direction_that_writes_the_answer_beats_its_controls_and_rises(gpt2: Subject) -> None:
    """After the last block, the answer's own row through the norm's gain."""
    row = gpt2.module.lm_head.weight[9].detach() * gpt2.module.transformer.ln_f.weight.detach()
    true = Direction(site="blocks.2.resid_post", vector=row - row.mean(), size=6.0)
    drawn = control_vectors(true, n=19)
    found = respond(gpt2, direction=true, controls=drawn, doses=(0.0, 0.25, 0.5, 1.0))
    assert found.curve.monotonicity == pytest.approx(1.0)
    assert found.p("isotropic", side="greater") == found.p("isotropic", 1.0, side="greater") == 1 / 20
    assert found.percentile("isotropic", 1.0) == 100.0
    assert found.curve.backfires == 0.0
    assert found.curve.interval(1.0).low > 0
    null = found.null("isotropic", 0.5)
    assert found.p("isotropic", 0.5) == permutation_p(float(found.curve.effects[2]), null, "two")


def curve(kl: list[float], doses: tuple[float, ...], **more: Any) -> Curve:
    n = len(doses)
    behaviour = np.array(more.pop("behaviour", [[float(i), 2.0 * i] for i in range(n)]))
    ce = np.array(more.pop("ce", [0.0] * n))[:, None]
    base = np.zeros(behaviour.shape[1])
    sides = {name: np.array(values)[:, None] for name, values in more.items()}
    return Curve(doses=doses, behaviour=behaviour, base=base, kl=np.array(kl)[:, None], ce=ce, sides=sides)


@pytest.mark.parametrize(
    ("kl", "sign", "largest"),
    [
        ([0.3, 0.0, 0.01, 0.05, 0.2], 1, 2.0),
        ([0.3, 0.0, 0.01, 0.2, 0.05], 1, 1.0),  # a larger dose that happens to be cheap does not count
        ([0.05, 0.0, 0.01, 0.2, 0.05], -1, -1.0),
        ([0.3, 0.0, 0.2, 0.2, 0.05], 1, 0.0),
    ],
)
def test_the_largest_dose_is_the_last_before_the_budget_is_spent(kl: list[float], sign: int, largest: float) -> None:
    assert curve(kl, (-1.0, 0.0, 1.0, 2.0, 3.0)).largest_dose(Budget(kl=0.1), sign=sign) == largest


def test_a_budget_counts_cross_entropy_and_side_effects() -> None:
    made = curve([0.0] * 3, (0.0, 1.0, 2.0), ce=[0.0, 0.01, 0.2], sound=[0.0, -0.5, 0.0])
    assert made.within(Budget()) == (True, True, False)
    assert made.within(Budget(ce=1.0, sides={"sound": 0.1})) == (True, False, True)
    with pytest.raises(SpecError, match="the budget names 'taste'; measured: sound"):
        made.within(Budget(sides={"taste": 0.1}))


def test_monotonicity_slopes_and_backfires() -> None:
    made = curve([0.0] * 3, (0.0, 1.0, 2.0), behaviour=[[0.0, 0.0, 0.0], [1.0, 4.0, -1.0], [8.0, 5.0, -2.0]])
    assert made.monotonicity == pytest.approx(1.0)
    np.testing.assert_allclose(made.slopes, [4.0, 2.5, -1.0])
    assert made.backfires == pytest.approx(1 / 3)
    assert np.isnan(curve([0.0] * 2, (0.0, 1.0), behaviour=[[1.0], [1.0]]).monotonicity)


@pytest.mark.parametrize(
    ("more", "error", "says"),
    [
        ({"doses": (1.0,)}, SpecError, "a curve needs two or more"),
        ({"doses": (1.0, float("nan"))}, SpecError, "all finite"),
        ({"direction": Direction(site=SITE, vector=torch.ones(32))}, SpecError, "does not know the typical norm"),
        ({"direction": Direction(site=SITE, vector=torch.ones(31), size=1.0)}, SpecError, "has 31 numbers"),
        ({"unrelated": ["When"]}, SpecError, "has one token"),
        ({"controls": {"mine": torch.zeros(1, 32)}}, NumericalError, "'mine' is zero"),
        (
            {"semantic": {"x": Direction(site="embed", vector=torch.ones(32))}},
            SpecError,
            r"'x' lies at embed, not at blocks\.1",
        ),
        ({"metric": lambda logits: logits[:, -1, 0] * float("nan")}, NumericalError, "the behaviour is not finite"),
    ],
)
def test_bad_input_is_told_what_to_do(gpt2: Subject, more: Any, error: type[Exception], says: str) -> None:
    with pytest.raises(error, match=says):
        respond(gpt2, **more)


def test_shuffled_labels_need_activations() -> None:
    with pytest.raises(SpecError, match="need the activations"):
        control_vectors(direction(), labels=np.arange(4) % 2)
    found = curve([0.0, 0.0], (0.0, 1.0))
    from assay.directions.steering.dose import DoseResponse

    with pytest.raises(SpecError, match="there are no controls 'isotropic'; there are: none"):
        DoseResponse(curve=found, controls={}).p("isotropic")
