"""The plan: the steps of a study, known from the model's card alone."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from assay import Study
from assay.base.errors import SpecError
from assay.circuits import Task, patch_grid
from assay.explain.inputs import read_inputs
from assay.explain.spec import ExplainSpec
from assay.explain.steps import Shape, Steps, curve_sizes, planned
from assay.studies.run import execute
from assay.subjects.card import Card
from assay.subjects.words import ModelText

ASKED = {
    "prompt": "When Mary and John went to the store, John gave a drink to",
    "answer": " Mary",
    "foil": " John",
    "corrupt": "When Mary and John went to the store, Mary gave a drink to",
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory, subject: Any) -> Path:
    path = tmp_path_factory.mktemp("tiny-llama")
    subject.module.save_pretrained(path)
    subject.tokenizer.save_pretrained(path)
    return path


def keys(steps: list[Any]) -> list[str]:
    return [step.key("explain", "1", "f") for step in steps]


def steps_of(subject: Any, **spec: Any) -> list[Any]:
    """The steps as the job makes them, from the loaded subject."""
    asked = ExplainSpec(**ASKED | spec)
    shape = Shape(n_layers=3, n_heads=4, d_model=32, parameters=sum(p.numel() for p in subject.module.parameters()))
    return list(Steps(shape, read_inputs(ModelText(subject), asked), asked, 0).all())


@pytest.mark.parametrize("spec", [{}, {"corrupt": None, "answer": None}, {"random_sets": 26, "untrained": 2, "top": 3}])
def test_the_card_plans_what_the_loaded_model_runs(folder: Path, subject: Any, spec: dict[str, Any]) -> None:
    from_card = planned(Card(folder), ExplainSpec(**ASKED | spec), 0)
    assert [step.name for step in from_card] == [step.name for step in steps_of(subject, **spec)]
    assert keys(from_card) == keys(steps_of(subject, **spec))
    assert len(set(keys(from_card))) == len(from_card)


@pytest.mark.parametrize(
    ("change", "touched"),
    [
        ({"top": 5}, {"sufficiency", "random"}),
        ({"random_sets": 40}, {"random"}),
        ({"untrained": 3}, {"untrained"}),
        ({"sigmas": 2.0}, set()),  # no noise where there is a corrupt prompt
        ({"draws": 7}, set()),
        ({"foil": " the"}, None),
        ({"corrupt": None}, None),
    ],
)
def test_a_change_moves_the_steps_that_it_touches_and_no_other(
    subject: Any, change: dict[str, Any], touched: set[str] | None
) -> None:
    """None stands for every step."""
    small = {"untrained": 2, "random_sets": 30, "top": 4}
    before, after = steps_of(subject, **small), steps_of(subject, **small | change)
    known = set(keys(before))
    new = {step.name.split()[0] for step, key in zip(after, keys(after), strict=True) if key not in known}
    assert new == ({step.name.split()[0] for step in after} if touched is None else touched)


def test_more_untrained_draws_keep_the_first_ones(subject: Any) -> None:
    few, many = (keys(steps_of(subject, untrained=n)) for n in (2, 3))
    assert set(few) < set(many)
    assert len(many) - len(few) == 2  # one of each kind


@pytest.mark.parametrize("change", [{"sigmas": 2.0}, {"draws": 7}])
def test_the_noise_moves_every_step_where_there_is_no_corrupt_prompt(subject: Any, change: dict[str, Any]) -> None:
    before, after = (set(keys(steps_of(subject, corrupt=None, **extra))) for extra in ({}, change))
    assert not before & after


def test_costs_grow_with_the_work(subject: Any) -> None:
    def total(**spec: Any) -> int:
        return sum(step.forwards for step in steps_of(subject, **spec))

    plain = total(untrained=1)
    assert total(untrained=2) > plain
    assert total(untrained=1, random_sets=200) - plain >= 2 * 100
    assert total(untrained=1, corrupt=None, draws=5) > 4 * plain
    steps = steps_of(subject)
    assert all(step.seconds > 0 and step.bytes > 0 and step.tokens > 0 and step.forwards > 0 for step in steps)
    assert [step.name for step in steps if step.backwards] == ["fast attribution"]


@pytest.mark.parametrize(
    ("n", "sizes"),
    [(1, [1]), (2, [1, 2]), (3, [1, 2, 3]), (15, [1, 2, 3, 5, 8, 13, 15]), (21, [1, 2, 3, 5, 8, 13, 21])],
)
def test_the_curve_goes_from_one_component_to_all(n: int, sizes: list[int]) -> None:
    assert curve_sizes(n) == sizes


def test_a_plan_needs_no_torch(folder: Path, tmp_path: Path) -> None:
    code = (
        "import sys\nfrom assay import Study\n"
        f"plan = Study(method='explain', model={str(folder)!r}, spec={ASKED!r}).plan()\n"
        "assert len(plan.steps) == 37, len(plan.steps)\n"
        "assert 'torch' not in sys.modules and 'transformers' not in sys.modules\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


def test_a_plan_finds_bad_input_before_anything_runs(folder: Path, subject: Any) -> None:
    study = Study(method="explain", model=str(folder), spec=ASKED | {"answer": " Maryland"})
    with pytest.raises(SpecError, match="--first-token") as from_card:
        study.plan()
    with pytest.raises(SpecError) as from_model:
        read_inputs(ModelText(subject), study.spec)
    assert str(from_card.value) == str(from_model.value)


def test_a_model_in_a_folder_is_explained_as_planned(
    folder: Path, subject: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("ASSAY_HOME", str(tmp_path))
    asked = {"prompt": "When John went", "corrupt": "When Mary went", "answer": " Mary", "foil": " John"}
    spec = asked | {"random_sets": 2, "untrained": 1, "top": 4}
    study = Study(method="explain", model=str(folder), spec=spec)
    plan, outcome = study.plan(), execute(study)
    assert [planned.key for planned in plan.steps] == [step.key for step in outcome.steps]
    found = {finding.tags[-1]: finding.detail for finding in outcome.findings}
    clean, corrupt, (answer,), (foil,) = (subject.tokenizer(text)["input_ids"] for text in asked.values())
    task = Task.from_tokens(clean=clean, corrupt=corrupt, answer=answer, foil=foil)
    logits = subject.run(torch.tensor([clean, corrupt])).logits[:, -1]
    expected = (logits[:, answer] - logits[:, foil]).tolist()
    assert [found["baseline"]["clean"], found["baseline"]["corrupt"]] == pytest.approx(expected, abs=1e-5)
    last = patch_grid(subject, task, "resid_pre", "denoising").normalised[:, -1].tolist()
    assert last[0] < 0.5 < min(last[1:])  # the name is read in the first block here
    assert found["residual"]["block"] == 1
    assert f"assay.load({str(folder)!r})" in outcome.findings.views[0].python
