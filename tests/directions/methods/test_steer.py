"""The `steer` study on the codeword organism, whose behaviour is known: the direction that declines declines."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import assay
from assay.base.errors import SpecError
from assay.base.findings import Findings
from assay.base.rng import numpy_stream
from assay.studies import Study
from assay.zoo import codeword
from assay.zoo.organisms import ANSWERS, DECLINED


def write(path: Path, rows: Sequence[dict[str, str]]) -> Path:
    path.write_text("\n".join(map(json.dumps, rows)))
    return path


@pytest.fixture(scope="module")
def organism() -> Any:
    return codeword()


@pytest.fixture(scope="module")
def subject(organism: Any) -> Any:
    return assay.load(organism.module, tokenizer=organism.tokenizer)


@pytest.fixture
def spec(organism: Any, tmp_path: Path) -> dict[str, Any]:
    declined, answered = (organism.prompts(declined=d, n=96, seed=1) for d in (True, False))
    pairs = [{"positive": a, "negative": b} for a, b in zip(declined[:60], answered[:60], strict=True)]
    return {
        "data": write(tmp_path / "declines.jsonl", pairs),
        "prompts": write(tmp_path / "prompts.jsonl", [{"text": text} for text in answered[60:80]]),
        "unrelated": write(tmp_path / "unrelated.jsonl", [{"text": text} for text in answered[80:]]),
        "toward": (DECLINED,),
        "away": ANSWERS,
        "site": "blocks.2.resid_post",
        "doses": (-0.5, 0.5, 1.0, 2.0),
        "kl": 100.0,
        "ce": 100.0,
    }


def test_the_direction_that_declines_declines(subject: Any, spec: dict[str, Any], tmp_path: Path) -> None:
    found: Findings = Study(method="steer", spec=spec).run(subject=subject, out=tmp_path / "out")
    (effect,), (response,) = found.tagged("effect"), found.tagged("dose response")
    assert effect.detail["dose"] == 2.0 and effect.estimate > 5
    assert effect.verdict == response.verdict == "supported"
    assert {control.name for control in effect.controls} == {"isotropic", "covariance-matched", "label-shuffled"}
    assert (tmp_path / "out" / "artifacts" / "direction.safetensors").is_file()


def test_pairs_of_shuffled_labels_steer_no_more_than_their_controls(
    subject: Any, spec: dict[str, Any], tmp_path: Path
) -> None:
    rows = [json.loads(line) for line in Path(spec["data"]).read_text().splitlines()]
    flips = numpy_stream(0, "flips").permutation(np.arange(len(rows)) % 2)
    mixed = [
        {"positive": row["negative"], "negative": row["positive"]} if flip else row
        for row, flip in zip(rows, flips, strict=True)
    ]
    found = Study(method="steer", spec={**spec, "data": write(tmp_path / "mixed.jsonl", mixed)}).run(subject=subject)
    (effect,) = found.tagged("effect")
    assert effect.verdict != "supported"
    assert any("hardly agree" in warning for warning in found.warnings)


def test_the_budget_is_kept_and_semantic_controls_are_named(
    subject: Any, organism: Any, spec: dict[str, Any], tmp_path: Path
) -> None:
    texts = organism.prompts(declined=False, n=20, seed=2)
    other = [{"name": "other", "positive": a, "negative": b} for a, b in zip(texts[:10], texts[10:], strict=True)]
    given = {**spec, "kl": 1e-12, "contrasts": write(tmp_path / "other.jsonl", other), "controls": 2}
    found = Study(method="steer", spec=given).run(subject=subject)
    (effect,) = found.tagged("effect")
    assert effect.detail["within budget"] is False and effect.detail["dose"] == 0.5
    assert "semantic" in {control.name for control in effect.controls}
    assert any("No positive dose" in warning for warning in found.warnings)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"away": (DECLINED,)}, "begin with the same token"),
        ({"doses": (-0.2, 0.0)}, r"doses: none of \[-0.2, 0.0\] is above 0, .* give one"),
        ({"site": "blocks.9.resid_post"}, "blocks.9.resid_post"),
        ({"data": '{"positive": "what"}'}, "line 1 lacks a text"),
        ({"prompts": '{"txt": "what"}'}, "line 1 lacks a text"),
        ({"unrelated": "{"}, "line 1 is not JSON"),
        ({"unrelated": ""}, "has no rows"),
    ],
)
def test_bad_input_is_named(
    subject: Any, spec: dict[str, Any], tmp_path: Path, change: dict[str, Any], message: str
) -> None:
    for name, value in change.items():
        if name in ("data", "prompts", "unrelated"):
            (tmp_path / "bad.jsonl").write_text(value)
            change = {name: tmp_path / "bad.jsonl"}
    with pytest.raises(Exception, match=message) as caught:
        Study(method="steer", spec={**spec, **change}).run(subject=subject)
    assert isinstance(caught.value, SpecError | assay.base.errors.AssayError)
