"""The registry, the address of a step, and the totals of a plan."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from pydantic import BaseModel

from assay.base import method as registry
from assay.base.errors import SpecError
from assay.base.findings import Findings
from assay.base.method import Plan, PlannedStep, StepSpec, get_method, method, methods


class Spec(BaseModel):
    prompt: str = "a"


def echo(subject: Any, spec: Spec, ctx: Any) -> Findings:
    """Say the prompt again. Twice
    over two lines.

    More about it.
    """
    return Findings(findings=(), summary=(spec.prompt,))


def plain_steps(card: Any, spec: Spec) -> list[StepSpec]:
    return [StepSpec(name="say", inputs={"prompt": spec.prompt, "card": card})]


def seeded_steps(card: Any, spec: Spec, seed: int) -> list[StepSpec]:
    return [StepSpec(name="say", inputs={"seed": seed})]


@pytest.fixture(autouse=True)
def own_registry(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setattr(registry, "_METHODS", {})
    yield


def test_a_registered_function_stays_itself_and_is_found() -> None:
    assert method(name="echo", spec=Spec, version="3")(echo) is echo
    found = get_method("echo")
    assert (found.function, found.spec, found.version) == (echo, Spec, "3")
    assert found.summary == "Say the prompt again. Twice over two lines."


def test_methods_are_sorted() -> None:
    for name in ("b", "c", "a"):
        method(name=name, spec=Spec)(echo)
    assert [entry.name for entry in methods()] == ["a", "b", "c"]


def test_an_unknown_name_offers_the_nearest() -> None:
    method(name="explain", spec=Spec)(echo)
    method(name="probe", spec=Spec)(plain_steps)
    with pytest.raises(
        SpecError, match=r"no method 'explian'; did you mean 'explain'\? \(methods: explain, probe\)"
    ) as e:
        get_method("explian")
    assert e.value.field == "method"


def test_one_name_is_one_function() -> None:
    method(name="echo", spec=Spec)(echo)
    method(name="echo", spec=Spec, version="2")(echo)  # a module that is loaded again
    assert get_method("echo").version == "2"
    with pytest.raises(SpecError, match="two methods are named 'echo'"):
        method(name="echo", spec=Spec)(plain_steps)
    assert get_method("echo").function is echo


def test_steps_are_found_by_name_and_get_the_seed_if_they_ask() -> None:
    def planned(name: str) -> list[StepSpec]:
        entry = registry.Method(name="echo", spec=Spec, version="1", function=echo, steps=name)
        return entry.planned_steps("card", Spec(prompt="p"), 7)

    assert planned("") == []
    assert planned(f"{__name__}:plain_steps")[0].inputs == {"prompt": "p", "card": "card"}
    assert planned(f"{__name__}:seeded_steps")[0].inputs == {"seed": 7}


STEP = StepSpec(name="sweep", inputs={"site": "blocks.0.resid_pre", "positions": [1, 2], "scale": 0.1})


def test_the_key_is_what_determines_the_result() -> None:
    same = StepSpec(
        name="sweep",
        inputs={"scale": np.float64(0.1), "positions": (1, 2), "site": "blocks.0.resid_pre"},
        forwards=9,
        seconds=3.0,
    )
    assert same.key("m", "1", "f") == STEP.key("m", "1", "f")
    keys = {
        STEP.key("m", "1", "f"),
        STEP.key("n", "1", "f"),
        STEP.key("m", "2", "f"),
        STEP.key("m", "1", "g"),
        StepSpec(name="sweeps", inputs=STEP.inputs).key("m", "1", "f"),
        StepSpec(name="sweep", inputs={**STEP.inputs, "scale": 0.2}).key("m", "1", "f"),
        StepSpec(name="sweep", inputs={}).key("m", "1", "f"),
    }
    assert len(keys) == 7


def test_the_key_is_the_same_in_every_process() -> None:
    code = (
        f"from assay.base.method import StepSpec as S; print(S(name='sweep', inputs={STEP.inputs}).key('m', '1', 'f'))"
    )
    for seed in ("0", "1"):
        done = subprocess.run(
            [sys.executable, "-c", code],
            capture_output=True,
            text=True,
            check=True,
            env={**os.environ, "PYTHONHASHSEED": seed},
        )
        assert done.stdout.strip() == STEP.key("m", "1", "f")


def test_inputs_must_have_one_canonical_form() -> None:
    for bad in (float("nan"), Path("a"), {1, 2}):
        with pytest.raises(SpecError):
            StepSpec(name="bad", inputs={"value": bad}).key("m", "1", "f")


def test_a_plan_adds_up() -> None:
    one = StepSpec(name="one", inputs={}, forwards=2, backwards=1, tokens=10, bytes=500, seconds=0.5)
    two = StepSpec(name="two", inputs={}, forwards=3, backwards=0, tokens=20, bytes=300, seconds=1.5)
    plan = Plan(
        steps=(PlannedStep(step=one, key="k1", cached=True), PlannedStep(step=two, key="k2", cached=False)), study="s"
    )
    assert (plan.forwards, plan.backwards, plan.tokens, plan.seconds, plan.cached) == (5, 1, 30, 2.0, 1)
    assert plan.bytes == 500  # memory is a peak, not a sum
    assert [planned.step.name for planned in plan.remaining] == ["two"]
    data = plan.to_dict()
    assert data["total"] == {"steps": 2, "forwards": 5, "backwards": 1, "tokens": 30, "bytes": 500, "seconds": 2.0}
    assert data["remaining"] == {"steps": 1, "forwards": 3, "backwards": 0, "tokens": 20, "bytes": 300, "seconds": 1.5}
    assert [row["cached"] for row in data["steps"]] == [True, False]


def test_a_finished_plan_has_nothing_left() -> None:
    step = StepSpec(name="one", inputs={}, forwards=2, seconds=0.5)
    plan = Plan(steps=(PlannedStep(step=step, key="k", cached=False),), finished=True)
    assert (plan.remaining, plan.cached, plan.forwards) == ((), 1, 2)
    assert plan.to_dict()["remaining"]["forwards"] == 0
    assert plan.to_dict()["steps"][0]["cached"] is True
    assert Plan(steps=()).bytes == 0
