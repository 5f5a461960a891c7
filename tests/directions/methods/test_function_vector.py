"""The `function-vector` study: a model that has learned nothing has no vector, and the study says so."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from assay.base.errors import SpecError
from assay.studies import Study

WORDS = "When Mary John went to the store gave a drink and milk capital of France is Paris".split()


def write(path: Path, n: int) -> Path:
    rows = [{"input": word, "output": WORDS[(i + 5) % len(WORDS)]} for i, word in enumerate(dict.fromkeys(WORDS))]
    path.write_text("\n".join(map(json.dumps, rows[:n])))
    return path


@pytest.fixture
def subject(make_subject: Callable[..., Any]) -> Any:
    return make_subject("llama", max_position_embeddings=512)


def test_an_untrained_model_has_none(subject: Any, tmp_path: Path) -> None:
    spec = {"data": write(tmp_path / "pairs.jsonl", 17), "heads": 2, "shots": 3, "prompts": 4, "every": 1, "random": 39}
    study = Study(method="function-vector", spec=spec)
    assert [planned.step.name for planned in study.plan(subject=subject).steps] == ["heads", "choice", "scores"]
    found = study.run(subject=subject, out=tmp_path / "out")
    (works,) = found.tagged("function vector")
    assert works.verdict != "supported" and works.n == 5
    assert len(works.detail["heads"]) == 2 and {len(control.null) for control in works.controls} == {39}
    assert study.run(subject=subject).to_dict() == found.to_dict()
    assert (tmp_path / "out" / "report.html").is_file()


def test_bad_input_is_named(subject: Any, tmp_path: Path) -> None:
    with pytest.raises(SpecError, match="has 14 items; 15 or more"):
        Study(method="function-vector", spec={"data": write(tmp_path / "few.jsonl", 14)}).run(subject=subject)
    (tmp_path / "bad.jsonl").write_text('{"input": "hot"}')
    with pytest.raises(SpecError, match="line 1 lacks a text"):
        Study(method="function-vector", spec={"data": tmp_path / "bad.jsonl"}).run(subject=subject)
    twice = tmp_path / "twice.jsonl"
    twice.write_text('{"input": "hot", "output": "cold"}\n' * 20)
    with pytest.raises(SpecError, match="no question twice"):
        Study(method="function-vector", spec={"data": twice}).run(subject=subject)
