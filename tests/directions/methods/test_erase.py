"""The `erase` study on the codeword organism: what decides is found, taken away, and missed."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

import assay
from assay.base.errors import SpecError
from assay.studies import Study
from assay.zoo import codeword


@pytest.fixture(scope="module")
def organism() -> Any:
    return codeword()


@pytest.fixture(scope="module")
def subject(organism: Any) -> Any:
    return assay.load(organism.module, tokenizer=organism.tokenizer)


@pytest.fixture
def data(organism: Any, tmp_path: Path) -> Path:
    rows = [
        {"text": text, "label": int(declined), "group": text.split()[-3]}
        for declined in (True, False)
        for text in organism.prompts(declined=declined, n=300)
    ]
    path = tmp_path / "declined.jsonl"
    path.write_text("\n".join(map(json.dumps, rows)))
    return path


def test_what_decides_is_taken_away_and_missed(subject: Any, data: Path, tmp_path: Path) -> None:
    spec = {"data": data, "site": "blocks.2.resid_post", "random": 19, "texts": 16, "held_out": 0.5}
    study = Study(method="erase", spec=spec, seed=2)
    assert [planned.step.name for planned in study.plan(subject=subject).steps] == ["erasure", "cost"]
    found = study.run(subject=subject, out=tmp_path / "out")
    (gone,), (missed,) = found.tagged("erased"), found.tagged("amnesic")
    assert gone.detail["before"] > 0.95 and gone.detail["rank"] == 1
    assert gone.detail["own"] == 0.5  # a probe of the eraser's own rows is constant, whatever is left in others
    assert min(gone.controls[0].null) > 0.9 > gone.estimate and gone.controls[0].p == 0.05
    assert gone.verdict == "contradicted"  # much is taken away, but 12 words are too few to find all that others hold
    assert found.warnings == (
        "The probe of new rows is read on 2 groups of a class, which makes an interval that says little: give more "
        "groups, or a larger held_out.",
    )
    assert missed.estimate > max(missed.controls[0].null)
    assert study.run(subject=subject).to_dict() == found.to_dict()
    assert (tmp_path / "out" / "artifacts" / "eraser.safetensors").is_file()


def test_what_chance_would_give_on_other_words_is_supported(subject: Any, data: Path) -> None:
    """The same with other words held out: which they are decides, and the interval over six of them is wide."""
    spec = {"data": data, "site": "blocks.2.resid_post", "random": 19, "texts": 2, "held_out": 0.5}
    (gone,) = Study(method="erase", spec=spec, seed=3).run(subject=subject).tagged("erased")
    assert gone.verdict == "supported" and 0.5 in gone.interval and gone.interval.high < gone.detail["before"]


def test_one_word_of_a_class_tests_nothing(subject: Any, data: Path) -> None:
    spec = {"data": data, "site": "blocks.2.resid_post", "random": 19, "texts": 2}
    found = Study(method="erase", spec=spec).run(subject=subject)
    (gone,) = found.tagged("erased")
    assert gone.verdict == "not testable" and gone.interval is None and "cannot be resampled" in gone.interval_note
    assert "no interval over groups" in found.warnings[0]


def test_bad_input_is_named(subject: Any, data: Path, tmp_path: Path) -> None:
    few = tmp_path / "few.jsonl"
    few.write_text("\n".join(data.read_text().splitlines()[:20]))
    with pytest.raises(SpecError, match="has 1 labels"):
        Study(method="erase", spec={"data": few}).run(subject=subject)
    with pytest.raises(SpecError, match="640 rows or more, or shrinkage"):
        Study(method="erase", spec={"data": data, "shrinkage": False}).run(subject=subject)
