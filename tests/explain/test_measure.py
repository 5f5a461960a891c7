"""What each step measures, and the readings that claims are made of."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch

from assay import circuits
from assay.base.errors import NumericalError
from assay.explain import measure
from assay.explain.claims import arrives, settled

PROMPT = (5, 17, 40, 9, 77, 30, 21)


@pytest.fixture(scope="module")
def noise(subject: Any) -> circuits.Task:
    return circuits.Task.from_noise(subject, PROMPT, [1, 2], 12, 99, draws=3)


def test_the_baseline_is_averaged_over_draws(subject: Any, noise: circuits.Task) -> None:
    found = measure.baseline(subject, noise)
    logits = noise.run(subject, "corrupt").logits[:, -1]
    assert found["corrupt_difference"] == pytest.approx(float((logits[:, 12] - logits[:, 99]).mean()), abs=1e-5)
    probabilities = logits.softmax(-1).mean(0)
    assert found["corrupt_pair"] == pytest.approx(probabilities[[12, 99]].tolist(), abs=1e-6)
    assert found["corrupt_top"] == probabilities.topk(10).indices.tolist()
    assert found["clean_probability"] == pytest.approx(
        subject.run(torch.tensor([PROMPT])).logits[0, -1].softmax(-1).topk(10).values.tolist(), abs=1e-6
    )


def test_scale_and_spread_are_standard_deviations_over_random_pairs(subject: Any, noise: circuits.Task) -> None:
    found = measure.baseline(subject, noise)
    clean, corrupt = (noise.run(subject, side).logits[:, -1].mean(0).double() for side in ("clean", "corrupt"))
    for name, values in (("scale", clean), ("spread", clean - corrupt)):
        pairs = (values[:, None] - values[None]).flatten()
        assert found[name] == pytest.approx(float(pairs.pow(2).mean().sqrt()), rel=0.01)  # 128 tokens: n or n - 1


def test_random_pairs_are_always_the_same_ones() -> None:
    change = torch.randn(50, generator=torch.Generator().manual_seed(0))
    one, same = measure.random_pairs(change), measure.random_pairs(change)
    assert np.array_equal(one, same)
    assert one.shape == (measure.PAIRS,)
    assert np.allclose(measure.random_pairs(2 * change), 2 * one)
    assert len(np.unique(one)) > 400


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), float("-inf")])
def test_logits_that_are_not_finite_are_counted(bad: float) -> None:
    logits = torch.zeros(2, 5)
    logits[1, 3] = bad
    with pytest.raises(NumericalError, match=r"1 of 10 next-token logits of the corrupt prompt are NaN or infinite"):
        measure.finite_logits(logits, "corrupt")
    half = torch.ones(3, dtype=torch.bfloat16)
    assert measure.finite_logits(half, "clean").dtype == torch.float32


def test_answer_and_foil_are_the_likeliest_others(subject: Any) -> None:
    with torch.no_grad():
        first, second, third = subject.module(torch.tensor([PROMPT])).logits[0, -1].topk(3).indices.tolist()
    for given, expected in [
        ((None, None), (first, second)),
        ((second, None), (second, first)),
        ((first, None), (first, second)),
        ((None, first), (second, first)),
        ((None, third), (first, third)),
        ((7, 9), (7, 9)),
    ]:
        assert measure.likeliest(subject, PROMPT, *given) == expected


@pytest.mark.parametrize(
    ("curve", "block"),
    [
        ([0.0, 0.0, 5.0, 4.0], 2),
        ([0.0, 3.0, 1.0, 4.0], 3),  # it fell below half again
        ([4.0, 4.0, 4.0, 4.0], 0),
        ([0.0, 0.0, 0.0, 4.0], 3),
        ([1.0, -3.0, 0.0, -4.0], 3),  # a model that prefers the foil settles below
        ([1.0, -3.0, -2.0, -4.0], 1),
    ],
)
def test_a_curve_settles_where_it_stays_beyond_half_its_end(curve: list[float], block: int) -> None:
    assert settled(np.array(curve)) == block


@pytest.mark.parametrize(
    ("curve", "block"),
    [([0.0, 0.2, 0.6, 0.9], 2), ([0.0, 0.9, 0.4, 0.5], 3), ([0.5, 1.0], 0), ([0.0, 0.1], 2), ([0.0, np.nan], 2)],
)
def test_a_preference_arrives_where_it_stays_above_one_half(curve: list[float], block: int) -> None:
    assert arrives(np.array(curve)) == block


def test_shares_of_nothing_are_an_error(subject: Any) -> None:
    """Equal unembedding rows: the logit difference is zero whatever is ablated."""
    same = circuits.Task.from_tokens(PROMPT, [*PROMPT[:-2], 1, PROMPT[-1]], 12, 12)
    parts = circuits.components(subject)
    with pytest.raises(NumericalError, match="there is no preference"):
        measure.sets(subject, same, parts, [parts[:2]], lambda done, total: None)
