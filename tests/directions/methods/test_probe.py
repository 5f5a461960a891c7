"""The `probe` study: it supports what is there, refuses what is not, and says what it was given."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from assay.base.errors import SpecError
from assay.base.findings import Findings
from assay.studies import Study

NAMES = ("Mary", "John", "Paris", "France", "store", "drink", "milk", "capital", "When", "gave", "went", "the")
FRAMES = ("{} gave a drink", "the store {} went to", "capital of {} and milk", "{} is the store")


def write(path: Path, label: Callable[[str, int], int]) -> Path:
    """Each name in each frame, labelled by name and frame."""
    rows = [
        {"text": frame.format(name), "label": label(name, at), "group": name, "template": frame}
        for name in NAMES
        for at, frame in enumerate(FRAMES)
    ]
    path.write_text("\n".join(map(json.dumps, rows)))
    return path


def study(data: Path, **spec: Any) -> Study:
    settings = {"sites": "blocks.*.resid_post", "permutations": 99, "untrained": 1, "tasks": 5}
    return Study(method="probe", spec={"data": data, **settings, **spec})


@pytest.fixture
def subject(make_subject: Callable[..., Any]) -> Any:
    return make_subject("llama")


@pytest.fixture
def frames(subject: Any, tmp_path: Path) -> Findings:
    """The label is the frame, which every group has: it is in the last tokens of the text."""
    return study(write(tmp_path / "frames.jsonl", lambda name, at: at % 2)).run(subject=subject, out=tmp_path / "out")


def test_what_the_text_says_is_read_and_the_untrained_model_says_so_too(frames: Findings, tmp_path: Path) -> None:
    (reads,) = frames.tagged("probe")
    assert reads.estimate == 1.0
    permuted, best, untrained = reads.controls
    assert permuted.p == 0.01 and best.p is not None and best.p <= 0.02
    assert len(untrained.null) == 2 and min(untrained.null) > 0.9  # a random network keeps its input
    (beats,) = frames.tagged("baselines")
    assert beats.verdict == "not distinguishable from control" and beats.estimate < 0.1
    assert (tmp_path / "out" / "report.html").stat().st_size > 10_000
    assert (tmp_path / "out" / "artifacts" / "probe.safetensors").is_file()


def test_labels_of_words_are_not_found_on_new_words(subject: Any, tmp_path: Path) -> None:
    data = write(tmp_path / "names.jsonl", lambda name, at: NAMES.index(name) % 2)
    found = study(data, permutations=199).run(subject=subject)
    (reads,) = found.tagged("probe")
    assert reads.controls[0].p is not None and reads.controls[0].p > 0.05
    assert reads.verdict == "not distinguishable from control"
    (memory,), (general,) = found.tagged("memorisation"), found.tagged("generalisation")
    assert memory.verdict == general.verdict == "not distinguishable from control" or memory.verdict == "not testable"


def test_the_plan_names_every_step_and_the_run_answers_them(subject: Any, tmp_path: Path) -> None:
    one = study(write(tmp_path / "frames.jsonl", lambda name, at: at % 2), sites="blocks.1.resid_post")
    plan = one.plan(subject=subject)
    assert [planned.step.name for planned in plan.steps] == [
        "sites",
        "without the model",
        "control tasks",
        "untrained gaussian 1",
        "untrained spectrum 1",
    ]
    assert plan.forwards == 3 * len(NAMES) * len(FRAMES)
    first = one.run(subject=subject)
    assert one.plan(subject=subject).finished
    assert one.run(subject=subject).to_dict() == first.to_dict()


def test_bad_data_is_refused(subject: Any, tmp_path: Path) -> None:
    one_class = write(tmp_path / "one.jsonl", lambda name, at: 1)
    with pytest.raises(SpecError, match="has 1 labels"):
        study(one_class).run(subject=subject)
    few = tmp_path / "few.jsonl"
    few.write_text('{"text": "Mary", "label": 1, "group": "a"}\n{"text": "John", "label": 0, "group": "a"}')
    with pytest.raises(SpecError, match="groups are too few"):
        study(few).run(subject=subject)
    with pytest.raises(SpecError, match="cannot read"):
        study(tmp_path / "absent.jsonl").run(subject=subject)
