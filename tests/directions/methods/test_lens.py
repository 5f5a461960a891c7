"""The `lens` study on a small model: a trained lens is nearer, can be used again, and belongs to one unembedding."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import assay
from assay.base.errors import DamagedFile, SpecError
from assay.base.findings import Findings
from assay.base.rng import numpy_stream
from assay.directions.tuned_lens import TunedLens, lens_divergence
from assay.studies import Study

NAMES = "Mary John Paris France store drink milk capital gave went the to of is and".split()


def texts(n: int, seed: int) -> list[str]:
    rng = numpy_stream(seed, "texts")
    return [" ".join(["When", *rng.choice(NAMES, size=7)]) for _ in range(n)]  # eight tokens each


def write(path: Path, rows: Sequence[str]) -> Path:
    path.write_text("\n".join(json.dumps({"text": text}) for text in rows))
    return path


@pytest.fixture(scope="module")
def subject(tiny_module: Callable[..., Any], tiny_tokenizer: Any) -> Any:
    return assay.load(tiny_module("llama", num_hidden_layers=4), tokenizer=tiny_tokenizer)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("lens")


@pytest.fixture(scope="module")
def spec(folder: Path) -> dict[str, Any]:
    return {
        "data": write(folder / "read.jsonl", texts(16, 1)),
        "train": write(folder / "train.jsonl", texts(96, 2)),
        "tokens": 8,
        "steps": 40,
        "batch": 16,
        "lr": 2e-2,
        "untrained": 19,
    }


@pytest.fixture(scope="module")
def out(folder: Path) -> Path:
    return folder / "out"


@pytest.fixture(scope="module")
def found(subject: Any, spec: dict[str, Any], out: Path, session_home: Path) -> Findings:
    return Study(method="lens", spec=spec).run(subject=subject, out=out)


def test_a_trained_lens_is_nearer_than_the_logit_lens_and_than_other_blocks_maps(found: Findings, out: Path) -> None:
    (nearer,) = found.tagged("nearer")
    assert nearer.verdict == "supported" and nearer.interval.low > 0
    (control,) = nearer.controls
    assert len(set(control.null)) == 19  # 23 orders of 4 maps but their own
    assert nearer.detail["tuned"] == pytest.approx(nearer.detail["logit"] - nearer.estimate)
    assert nearer.estimate == pytest.approx(np.mean(list(nearer.detail["gain"].values())))
    assert {view.id for view in found.views} == {"kl", "probability", "maps", "settles"}
    assert (out / "artifacts" / "readings.parquet").is_file()


def test_the_figures_are_those_of_the_function(subject: Any, spec: dict[str, Any], found: Findings, out: Path) -> None:
    """Every token is read here, so the study and `lens_divergence` measure the same KL, by another sum."""
    lens = TunedLens.load(out / "artifacts" / "tuned-lens.safetensors", subject)
    (nearer,) = found.tagged("nearer")
    for reading in lens_divergence(subject, lens, texts(16, 1)):
        assert nearer.detail["gain"][reading.site] == pytest.approx(
            reading.logit_lens - reading.tuned_lens, rel=1e-3, abs=1e-4
        )


def test_what_is_said_of_a_text_is_held_against_other_texts(found: Findings) -> None:
    for lens in ("logit lens", "tuned lens"):
        (finding,) = (f for f in found.tagged("foretells") if lens in f.tags)
        assert finding.estimate == pytest.approx(finding.detail["others"] - finding.detail["own"])
        assert abs(np.mean(finding.controls[0].null)) < 0.5 * abs(finding.estimate)
    (tuned,) = (f for f in found.tagged("foretells") if "tuned lens" in f.tags)
    assert tuned.verdict == "supported"


def test_an_untrained_model_is_not_said_to_have_learnt(found: Findings) -> None:
    """The tiny model's weights are random themselves: that it foretells its own tokens is nothing learnt."""
    (learnt,) = found.tagged("learnt")
    assert learnt.verdict != "supported" and len(learnt.controls[0].null) == 19


def test_the_artifact_serves_another_study_and_gives_the_same(
    subject: Any, spec: dict[str, Any], found: Findings, out: Path
) -> None:
    again = {name: value for name, value in spec.items() if name != "train"}
    again |= {"lens": out / "artifacts" / "tuned-lens.safetensors"}
    other = Study(method="lens", spec=again).run(subject=subject)
    assert [f.estimate for f in other] == pytest.approx([f.estimate for f in found])


def test_a_lens_of_another_unembedding_is_refused(
    tiny_module: Callable[..., Any], tiny_tokenizer: Any, spec: dict[str, Any], found: Findings, out: Path
) -> None:
    other = assay.load(tiny_module("llama", num_hidden_layers=4, seed=5), tokenizer=tiny_tokenizer)
    given = {**spec, "train": None, "lens": out / "artifacts" / "tuned-lens.safetensors"}
    with pytest.raises(SpecError, match="trained for the unembedding"):
        Study(method="lens", spec=given).run(subject=other)


def test_a_block_that_writes_nothing_says_what_the_model_says(
    tiny_module: Callable[..., Any], tiny_tokenizer: Any, spec: dict[str, Any]
) -> None:
    """With the last three of four blocks silent, the logit lens after block 0 is the model itself."""
    module = tiny_module("llama", num_hidden_layers=4)
    with torch.no_grad():
        for layer in module.model.layers[1:]:
            layer.self_attn.o_proj.weight.zero_()
            layer.mlp.down_proj.weight.zero_()
    alone = {**spec, "train": None, "block": 0, "untrained": 2}
    found = Study(method="lens", spec=alone).run(subject=assay.load(module, tokenizer=tiny_tokenizer))
    (foretells,) = found.tagged("foretells")
    assert foretells.detail["own"] == pytest.approx(0, abs=1e-5) and foretells.verdict == "supported"
    assert not found.tagged("nearer") and found.tagged("learnt")[0].estimate == 1.0
    (settles,) = (view for view in found.views if view.id == "settles")
    assert {row[2] for row in settles.rows} <= {"before the first block", "after block 0"}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"block": 3}, "block 3 has none after it"),
        ({"tokens": 9}, "has 8 tokens and the last 9 are read"),
        ({"lens": ["some file"]}, "train makes a tuned lens and lens names one"),
        ({"train": None, "lens": "no.safetensors"}, "cannot read .no.safetensors"),
        ({"train": texts(16, 1)}, "16 of the texts"),
        ({"data": ["one text"]}, "two texts or more"),
        ({"data": [*texts(3, 1), texts(3, 1)[0]]}, "each once"),
    ],
)
def test_bad_input_is_named_and_leaves_nothing(
    subject: Any, spec: dict[str, Any], change: dict[str, Any], message: str, tmp_path: Path
) -> None:
    change = {k: write(tmp_path / f"{k}.jsonl", v) if isinstance(v, list) else v for k, v in change.items()}
    with pytest.raises(assay.AssayError, match=message):
        Study(method="lens", spec={**spec, **change}).run(subject=subject, out=tmp_path / "out")
    assert not (tmp_path / "out").exists() or not list((tmp_path / "out").iterdir())


def test_a_file_that_is_no_lens_is_refused(subject: Any, spec: dict[str, Any], tmp_path: Path) -> None:
    given = {**spec, "train": None, "lens": write(tmp_path / "no.safetensors", ["nothing"])}
    with pytest.raises(DamagedFile, match="is no lens"):
        Study(method="lens", spec=given).run(subject=subject)


def test_the_plan_has_a_step_for_each_part(subject: Any, spec: dict[str, Any]) -> None:
    plan = Study(method="lens", spec={**spec, "steps": 7}).plan(subject=subject)
    assert [step.step.name for step in plan.steps] == ["train", "read", "other blocks", "untrained"]
    assert plan.steps[0].step.forwards == 7 * 16 and plan.steps[0].step.bytes > 0
    alone = Study(method="lens", spec={**spec, "train": None}).plan(subject=subject)
    assert [step.step.name for step in alone.steps] == ["read", "untrained"]
