"""The `probe` study: it supports what is there, refuses what is not, and says what it was given."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from assay.base.errors import SpecError
from assay.base.findings import Findings
from assay.base.rng import numpy_stream
from assay.directions.labelled import Labelled
from assay.directions.methods.probe import ProbeSpec
from assay.directions.methods.probe_job import KINDS, _Measured
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


def test_a_claim_names_only_what_was_tested(subject: Any, frames: Findings, tmp_path: Path) -> None:
    """Two draws of untrained weights cannot give p = 0.05: they count for nothing, and the claim is silent on them."""
    (reads,) = frames.tagged("probe")
    assert reads.verdict == "supported" and "untrained" not in reads.claim
    assert any("2 draws of untrained weights" in said and "10 or more of each" in said for said in frames.warnings)
    data = write(tmp_path / "again.jsonl", lambda name, at: at % 2)
    found = study(data, untrained=10, permutations=19, sites="blocks.0.resid_post").run(subject=subject)
    (tested,) = found.tagged("probe")
    assert "better than on the same architecture untrained" in tested.claim
    assert tested.verdict == "not distinguishable from control"
    assert not any("too few for a test" in said for said in found.warnings)


@pytest.fixture(scope="module")
def made() -> tuple[_Measured, dict[str, np.ndarray]]:
    """Made activations at three sites: one tells the classes apart well, one badly, one not at all."""
    groups = tuple(f"g{i // 4}" for i in range(160))
    y = np.arange(160) // 4 % 2
    data = Labelled(texts=tuple(map(str, range(160))), labels=tuple(y.tolist()), groups=groups)
    spec = ProbeSpec(data=Path("made.jsonl"), permutations=19)
    rng = numpy_stream(0, "made")
    rows = {f"site {gap:g}": rng.standard_normal((160, 6)) + gap * y[:, None] for gap in (0.0, 1.0, 0.3)}
    measured = _Measured(None, data, spec, 0)  # the model is asked for activations, and for nothing else
    return measured, rows


@settings(max_examples=15)
@given(seed=st.integers(0, 10**6), scale=st.floats(0.01, 100.0))
def test_the_choice_of_site_never_looks_at_the_test_rows(
    made: tuple[_Measured, dict[str, np.ndarray]], seed: int, scale: float
) -> None:
    """Whatever the test rows are, and though another site tells them apart perfectly."""
    measured, rows = made
    train, test = measured.split.train, measured.split.test
    assert measured.choose(rows, train) == "site 1"
    changed = {name: values.copy() for name, values in rows.items()}
    for name, values in changed.items():
        values[test] = scale * numpy_stream(seed, "test rows", name).standard_normal((len(test), 6))
    changed["site 0.3"][test] += 1000.0 * scale * measured.y[test, None]
    assert measured.choose(changed, train) == "site 1"
    other = _Measured(None, measured.data, measured.spec, 0)
    other.rows = changed  # what it would have read
    found = other.sites(lambda done, total, message="": None)
    assert found["site"] == "site 1"
    values = dict(zip(found["names"], found["values"], strict=True))
    assert values["site 0.3"] == 1.0 > values["site 1"] == found["value"]


def test_untrained_weights_are_redrawn_kind_by_kind(subject: Any, tmp_path: Path) -> None:
    """A draw is the same whether or not one of another kind came before it."""
    path = write(tmp_path / "frames.jsonl", lambda name, at: at % 2)
    spec, quiet = ProbeSpec(data=path), lambda done, total, message="": None
    data = Labelled.read(path)
    both = _Measured(subject, data, spec, 0)
    values = [both.untrained(kind, 0)(quiet)["value"] for kind in (*KINDS, KINDS[0])]
    alone = _Measured(subject, data, spec, 0).untrained(KINDS[1], 0)(quiet)["value"]
    assert values[0] == values[2] and values[1] == alone


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
