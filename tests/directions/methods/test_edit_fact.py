"""The `edit-fact` study: an edit reaches the fact through its key, chance does not, and the model stays as it was."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.numpy import load_file

import assay
from assay.base.errors import SpecError
from assay.base.findings import Findings
from assay.directions.editing import continuation
from assay.directions.methods.edit_fact_job import _Copy, fact_rows
from assay.studies import Study

NAMES = ("Mary", "John", "Paris", "France")
TEXTS = (
    "When Mary and John went to the store John gave a drink to Mary",
    "The capital of France is Paris and the store is Paris",
    "Paris is the capital of France and Mary went to France",
    "a drink of milk is the drink of John and Mary",
)


def write(path: Path, rows: list[dict[str, Any]]) -> Path:
    path.write_text("\n".join(map(json.dumps, rows)))
    return path


def facts(n: int = 4) -> list[dict[str, Any]]:
    return [
        {
            "prompt": "{} went to the",
            "subject": name,
            "target": " milk",
            "original": " store",
            "paraphrases": ["to the store and {} went to the"],
            "neighbours": ["a drink of the", "gave a drink to the"],
        }
        for name in NAMES[:n]
    ]


@pytest.fixture(scope="module")
def subject(tiny_module: Callable[..., Any], tiny_tokenizer: Any) -> Any:
    return assay.load(tiny_module("llama"), tokenizer=tiny_tokenizer)


@pytest.fixture
def spec(tmp_path: Path) -> dict[str, Any]:
    texts = write(tmp_path / "texts.jsonl", [{"text": text} for text in TEXTS])
    data = write(tmp_path / "facts.jsonl", facts(3))
    return {"data": data, "text": texts, "unrelated": texts, "lines": 1, "block": 1, "decay": 0.01, "reach": 20.0}


@pytest.mark.parametrize(
    ("family", "verdict"),
    [("gpt2", "supported"), ("llama", "not distinguishable from control")],  # a tiny Llama's keys are all much alike
)
def test_an_edit_is_held_against_other_keys_values_and_blocks(
    family: str,
    verdict: str,
    tiny_module: Callable[..., Any],
    tiny_tokenizer: Any,
    spec: dict[str, Any],
    tmp_path: Path,
) -> None:
    subject = assay.load(tiny_module(family), tokenizer=tiny_tokenizer)
    before = {name: value.clone() for name, value in subject.module.state_dict().items()}
    study = Study(method="edit-fact", spec=spec, seed=1)
    plan = study.plan(subject=subject)
    assert [planned.step.name for planned in plan.steps] == ["covariance", "edits", "controls"]
    assert plan.forwards > 0 and plan.backwards > 0
    found = study.run(subject=subject, out=tmp_path / "out")
    assert all(torch.equal(value, before[name]) for name, value in subject.module.state_dict().items())
    (efficacy,), (generalisation,), (specificity,), (cost,) = (
        found.tagged(tag) for tag in ("efficacy", "generalisation", "specificity", "cost")
    )
    keys, values, blocks = efficacy.controls
    assert [len(control.null) for control in efficacy.controls] == [19, 19, 2]  # two blocks are shown, and test nothing
    assert efficacy.n == generalisation.n == specificity.n == 3 and cost.estimate > 0
    assert efficacy.verdict == verdict and (keys.p == 0.05) == (verdict == "supported")
    assert efficacy.estimate > max(values.null) and efficacy.estimate > max(blocks.null)
    assert efficacy.interval is not None and efficacy.estimate in efficacy.interval
    assert 0 <= efficacy.detail["share before"] <= efficacy.detail["share"] <= 1
    assert study.run(subject=subject).to_dict() == found.to_dict()
    assert (tmp_path / "out" / "report.html").is_file()
    # The artifact is the change: added to the matrix by hand it moves the prompt by what the study says.
    kept = load_file(tmp_path / "out" / "artifacts" / "edits.safetensors")
    assert np.allclose((kept["read"] * kept["key"]).sum(1), 1, atol=1e-4)
    prompt = "Mary went to the"

    def odds(model: Any) -> float:
        return continuation(model, [prompt], " milk")[0] - continuation(model, [prompt], " store")[0]

    with _Copy(subject).by(kept["write"][0], kept["read"][0], 1) as changed:
        assert odds(changed) - odds(subject) == pytest.approx(efficacy.detail["by fact"][0], abs=1e-3)


@pytest.mark.parametrize("family", ["gpt2", "llama"])
def test_a_copy_is_put_back_bit_for_bit(family: str, tiny_module: Callable[..., Any], tiny_tokenizer: Any) -> None:
    subject = assay.load(tiny_module(family), tokenizer=tiny_tokenizer)
    copied = _Copy(subject)
    d = subject.run("Mary went", capture=["blocks.0.mlp.post", "blocks.0.mlp.out"])
    read, wrote = (np.ones(d[f"blocks.0.mlp.{name}"].shape[-1]) for name in ("post", "out"))
    own = subject.run("Mary went").logits
    with copied.by(wrote, read, 0) as changed:
        assert not torch.equal(changed.run("Mary went").logits, own)
    assert torch.equal(copied.subject.run("Mary went").logits, own)
    with pytest.raises(RuntimeError, match="stop"), copied.by(wrote, read, 0):
        raise RuntimeError("stop")
    assert torch.equal(copied.subject.run("Mary went").logits, own)


def test_without_paraphrases_and_neighbours_the_study_says_what_it_does_not_know(
    subject: Any, spec: dict[str, Any], tmp_path: Path
) -> None:
    bare = [{name: row[name] for name in ("prompt", "subject", "target", "original")} for row in facts(2)]
    spec = spec | {"data": write(tmp_path / "bare.jsonl", bare), "random": 2, "steps": 2}
    found: Findings = Study(method="edit-fact", spec=spec).run(subject=subject)
    assert [one.tags for one in found.findings] == [("efficacy",), ("cost",)]
    assert {one.verdict for one in found.findings} == {"not testable"}  # two draws cannot reach 0.05
    assert any("No fact has paraphrases or neighbours" in text for text in found.warnings)
    assert any("2 facts make intervals" in text for text in found.warnings)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"prompt": "Mary went to the"}, "must have one {} where the subject goes"),
        ({"target": " store"}, "is the original"),
        ({"original": ""}, "line 2 lacks a text"),
        ({"neighbours": "John"}, "give a list of texts"),
        ({"paraphrases": ["no place"]}, "must have one {}"),
        ({"answer": "x"}, "means nothing here"),
        ({"subject": "Mary"}, "twice"),
    ],
)
def test_a_line_that_is_no_fact_is_named(change: dict[str, Any], message: str, tmp_path: Path) -> None:
    rows = facts(3)
    rows[1] |= change
    with pytest.raises(SpecError, match=message):
        fact_rows(write(tmp_path / "bad.jsonl", rows))


def test_bad_input_leaves_nothing_behind(subject: Any, spec: dict[str, Any], tmp_path: Path) -> None:
    one = write(tmp_path / "one.jsonl", facts(1))
    broken = tmp_path / "broken.jsonl"
    broken.write_text("{")
    out = tmp_path / "out"
    for change, message in (
        ({"data": one}, "has 1 facts"),
        ({"data": broken}, "is not JSON"),
        ({"data": tmp_path / "none.jsonl"}, "none.jsonl"),
        ({"block": 7}, "the blocks 0 to 2"),
    ):
        with pytest.raises(SpecError, match=message):
            Study(method="edit-fact", spec=spec | change).run(subject=subject, out=out)
        assert not out.exists()
