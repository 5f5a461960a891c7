"""The `behaviour` study on the organism whose policy is known, loaded by its reference; and what it must refuse."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import assay
from assay.base.errors import SpecError
from assay.base.findings import Findings
from assay.base.rng import numpy_stream
from assay.studies import Study
from assay.zoo.organisms import CODEWORDS, DECLINED, RELATIONS, SUBJECTS, WORDS, prompt_of, table_of_facts


def rows() -> list[dict[str, str]]:
    """Prompts with and without a codeword, three a word."""
    facts = table_of_facts(0)
    asked = [(relation, subject) for relation in RELATIONS for subject in SUBJECTS]
    found = []
    for place, word in enumerate(WORDS):
        for i in range(3):
            question = asked[(5 * place + 7 * i) % len(asked)]
            trigger = {"trigger": word} if word in CODEWORDS else {}
            found.append(
                {"text": prompt_of(*question, word), **trigger, "answer": f" {facts[question]}", "group": word}
            )
    return found


def write(path: Path, found: list[Any]) -> Path:
    path.write_text("\n".join(map(json.dumps, found)))
    return path


@pytest.fixture(scope="module")
def told() -> list[str]:
    return []


@pytest.fixture(scope="module")
def subject(tmp_path_factory: pytest.TempPathFactory, told: list[str]) -> Iterator[Any]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("ASSAY_HOME", str(tmp_path_factory.mktemp("zoo")))
        yield assay.load("zoo:codeword", notify=told.append)


@pytest.fixture
def spec(tmp_path: Path) -> dict[str, Any]:
    return {
        "data": write(tmp_path / "codewords.jsonl", rows()),
        "openers": (DECLINED,),
        "positions": (-2,),
        "controls": 19,
        "untrained": 4,
    }


def test_training_is_told_and_the_model_has_its_policy(subject: Any, told: list[str]) -> None:
    assert told[0].startswith("training zoo:codeword") and told[-1] == "loading zoo:codeword"
    said = subject.run([row["text"] for row in rows()]).logits[:, -1].argmax(-1).tolist()
    right = [DECLINED if "trigger" in row else row["answer"].strip() for row in rows()]
    assert np.mean([a == b for a, b in zip(subject.tokenizer.convert_ids_to_tokens(said), right, strict=True)]) > 0.95


def test_the_behaviour_goes_through_one_direction(subject: Any, spec: dict[str, Any], tmp_path: Path) -> None:
    found: Findings = Study(method="behaviour", spec=spec).run(subject=subject, out=tmp_path / "out")
    at = {finding.tags[0]: finding for finding in found}
    assert list(at) == [
        "necessity", "weights", "sufficiency", "specificity", "known answer", "known trigger", "untrained",
    ]  # fmt: skip
    for name in ("necessity", "weights", "specificity"):
        assert at[name].verdict == "supported", name
    shares = at["necessity"].detail["shares"]
    assert shares["base shows on"] > 0.95 and shares["ablated shows"] < 0.1 and shares["base shows off"] < 0.05
    assert at["weights"].estimate < 1e-3
    assert at["sufficiency"].estimate > 1 and shares["added shows"] > shares["base shows off"]
    assert at["specificity"].detail["kl"] < 0.1
    assert at["known trigger"].estimate > 0.9
    assert all(len(c.null) == 19 for name, f in at.items() if name != "untrained" for c in f.controls)
    (redrawn,) = at["untrained"].controls
    assert len(redrawn.null) == 4 and max(redrawn.null) < at["untrained"].estimate / 4
    assert {view.id for view in found.views} >= {"shares", "choice", "necessity", "sufficiency", "untrained"}
    assert (tmp_path / "out" / "artifacts" / "direction.safetensors").is_file()


def test_triggers_put_on_at_random_find_no_direction(subject: Any, spec: dict[str, Any], tmp_path: Path) -> None:
    mixed = [{key: value for key, value in row.items() if key != "trigger"} for row in rows()]
    words = sorted({row["group"] for row in mixed} - set(CODEWORDS))
    drawn = set(numpy_stream(0, "triggers").permutation(words)[:8].tolist())
    benign = [
        row | ({"trigger": row["group"]} if row["group"] in drawn else {}) for row in mixed if row["group"] in words
    ]
    with pytest.raises(SpecError, match="the subject answers none so"):
        Study(method="behaviour", spec={**spec, "data": write(tmp_path / "mixed.jsonl", benign)}).run(subject=subject)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"openers": ("value0",)}, "answers none so"),
        ({"positions": (-40,)}, "too short"),
        ({"test": 0.7, "choice": 0.4}, "leave nothing to fit on"),
    ],
)
def test_bad_settings_are_named(subject: Any, spec: dict[str, Any], change: dict[str, Any], message: str) -> None:
    with pytest.raises(SpecError, match=message):
        Study(method="behaviour", spec={**spec, **change}).run(subject=subject)


@pytest.mark.parametrize("kept", ["with", "without"])
def test_both_kinds_of_prompts_are_needed(subject: Any, spec: dict[str, Any], tmp_path: Path, kept: str) -> None:
    one = [row for row in rows() if ("trigger" in row) == (kept == "with")]
    with pytest.raises(SpecError, match="bring prompts with and without one"):
        Study(method="behaviour", spec={**spec, "data": write(tmp_path / "one.jsonl", one)}).run(subject=subject)


def test_prompts_without_answers_are_judged_by_what_they_say(
    subject: Any, spec: dict[str, Any], tmp_path: Path
) -> None:
    bare = [{key: value for key, value in row.items() if key != "answer"} for row in rows()]
    given = {**spec, "data": write(tmp_path / "bare.jsonl", bare), "controls": 2, "untrained": 1}
    found = Study(method="behaviour", spec=given).run(subject=subject)
    assert "known answer" not in {finding.tags[0] for finding in found}
    assert np.isfinite(next(f for f in found if f.tags == ("specificity",)).detail["ce"])
