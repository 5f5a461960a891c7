"""Direct attribution and patching over every decoder family: exact wherever the engine is."""

from __future__ import annotations

from typing import Any

import pytest
import torch

import assay
from assay.circuits import Task, attribute, components, patch_components
from assay.directions import decompose, logit_lens
from assay.subjects.families_decoders import DECODERS
from assay.subjects.tiny import tiny_model

CLEAN, CORRUPT = torch.tensor([[5, 9, 12, 20, 7]]), torch.tensor([[5, 9, 13, 20, 7]])
ANSWER, FOIL = 30, 31


@pytest.fixture(params=[family.model_types[0] for family in DECODERS], scope="module")
def subject(request: Any) -> Any:
    return assay.load(tiny_model(request.param))


@pytest.fixture
def task() -> Task:
    return Task.from_tokens(clean=CLEAN, corrupt=CORRUPT, answer=ANSWER, foil=FOIL)


def test_the_parts_sum_to_the_logit_difference(subject: Any) -> None:
    found = decompose(subject, CLEAN, ANSWER, FOIL)
    assert found.error < 1e-4
    logits = subject.run(CLEAN).logits[0, -1]
    assert found.total == pytest.approx(float(logits[ANSWER] - logits[FOIL]), abs=1e-5)


def test_the_last_row_of_the_lens_is_the_model(subject: Any) -> None:
    logits = subject.run(CLEAN).logits[0]
    found = logit_lens(subject, CLEAN, ANSWER, FOIL).difference[-1]
    torch.testing.assert_close(found, logits[:, ANSWER] - logits[:, FOIL], rtol=1e-4, atol=1e-4)


def test_effects_of_components_are_those_of_one_forward_each(subject: Any, task: Task) -> None:
    parts = components(subject)
    found = patch_components(subject, task, parts, "noising").values
    donor = subject.run(CORRUPT, capture=[part.whole_site for part in parts])
    logits = [subject.run(CLEAN, edits=[assay.Patch(part.site, donor)]).logits[0, -1] for part in parts]
    expected = torch.stack([found[ANSWER] - found[FOIL] for found in logits])
    torch.testing.assert_close(found.cpu(), expected, rtol=1e-4, atol=1e-4)


def test_one_backward_estimates_every_component(subject: Any, task: Task) -> None:
    """The estimate is the gradient times the change: checked against a finite step along the change."""
    parts = components(subject)
    found = attribute(subject, task, parts, "noising").components
    step, part = 1e-2, parts[-1]
    base = subject.run(CLEAN, capture=part.whole_site)
    change = subject.run(CORRUPT, capture=part.whole_site)[part.whole_site] - base[part.whole_site]
    run = [subject.run(CLEAN, edits=[assay.Add(part.whole_site, change, scale=s)]).logits[0, -1] for s in (step, -step)]
    slope = ((run[0] - run[1])[ANSWER] - (run[0] - run[1])[FOIL]) / (2 * step)
    assert float(found[-1]) == pytest.approx(float(slope), rel=5e-2, abs=5e-3)
