"""The `local` study on a small model: 1 where attention writes nothing, the floor where texts are unrelated."""

from __future__ import annotations

import itertools
import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import assay
from assay.base.errors import SpecError
from assay.base.findings import Findings
from assay.directions.methods.common import mean_tokens
from assay.studies import Study
from assay.studies.target import LoadedCard

FIRST, LAST = ("Mary went to", "John gave the", "When Mary and", "Paris is the"), "store drink milk capital".split()
TEXTS = [f"{first} {word} of {last}" for first, word, last in itertools.product(FIRST, LAST[:2], LAST)]


def write(path: Path, texts: Sequence[str]) -> Path:
    path.write_text("\n".join(json.dumps({"text": text}) for text in texts))
    return path


@pytest.fixture(scope="module")
def subject(tiny_module: Callable[..., Any], tiny_tokenizer: Any) -> Any:
    return assay.load(tiny_module("llama"), tokenizer=tiny_tokenizer)


@pytest.fixture
def spec(tmp_path: Path) -> dict[str, Any]:
    return {"data": write(tmp_path / "texts.jsonl", TEXTS), "ks": (1, 2, 4), "k": 2, "draws": 99}


def test_every_site_has_its_cosine_floor_and_control(subject: Any, spec: dict[str, Any], tmp_path: Path) -> None:
    found: Findings = Study(method="local", spec=spec).run(subject=subject, out=tmp_path / "out")
    sites = found.tagged("local")
    assert [finding.tags[1] for finding in sites] == [f"blocks.{i}.resid_post" for i in range(3)]
    for finding in sites:
        assert finding.estimate == pytest.approx(finding.detail["cosine"] - finding.detail["floor"])
        assert finding.estimate in finding.interval and finding.n == len(TEXTS)
        (control,) = finding.controls
        assert len(control.null) == 99 and abs(np.mean(control.null)) < 0.5 * finding.estimate
        assert finding.verdict == "supported" and finding.detail["family"] == 3
    (fall,) = found.tagged("fall")
    assert fall.estimate == pytest.approx(sites[0].detail["cosine"] - sites[-1].detail["cosine"])
    assert {view.id for view in found.views} == {"cosine", "above"}
    assert (tmp_path / "out" / "artifacts" / "local.safetensors").is_file()


def test_where_attention_writes_nothing_all_is_local(
    tiny_module: Callable[..., Any], tiny_tokenizer: Any, spec: dict[str, Any]
) -> None:
    module = tiny_module("llama")
    with torch.no_grad():
        for layer in module.model.layers:
            layer.self_attn.o_proj.weight.zero_()
    found = Study(method="local", spec={**spec, "k": 1}).run(subject=assay.load(module, tokenizer=tiny_tokenizer))
    assert all(finding.detail["cosine"] == pytest.approx(1, abs=1e-5) for finding in found.tagged("local"))
    (fall,) = found.tagged("fall")  # all sites alike: nothing falls
    assert fall.estimate == pytest.approx(0, abs=1e-5) and fall.verdict == "not distinguishable from control"


def test_texts_that_end_alike_have_nothing_local_in_their_last_token(
    subject: Any, spec: dict[str, Any], tmp_path: Path
) -> None:
    alike = write(tmp_path / "alike.jsonl", [f"{text} Paris" for text in TEXTS])
    found = Study(method="local", spec={**spec, "data": alike, "k": 1}).run(subject=subject)
    assert all(abs(finding.estimate) < 1e-5 for finding in found.tagged("local"))
    assert all(finding.verdict == "not distinguishable from control" for finding in found.tagged("local"))
    assert any("end in the same token" in warning for warning in found.warnings)


def test_another_seed_draws_other_pairs_and_the_same_cosines(subject: Any, spec: dict[str, Any]) -> None:
    one, other = (Study(method="local", spec=spec, seed=seed).run(subject=subject).tagged("local") for seed in (0, 1))
    assert one[0].estimate == other[0].estimate and one[0].controls[0].null != other[0].controls[0].null


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"k": 3}, "k is 3, which is none of ks"),
        ({"ks": (0, 2)}, "whole numbers of 1 or more"),
        ({"ks": (2, 40)}, "the shortest document has 6 tokens, k goes up to 40"),
        ({"sites": "blocks.9.resid_post"}, r"blocks\.9\.resid_post"),
        ({"texts": 3, "data": ["a b c", "a b c", "d e f"]}, "2 different texts"),
        ({"data": [*TEXTS, TEXTS[0]]}, "a text twice"),
        ({"data": []}, "has no rows"),
    ],
)
def test_bad_input_is_named_and_leaves_nothing(
    subject: Any, spec: dict[str, Any], change: dict[str, Any], message: str, tmp_path: Path
) -> None:
    if "data" in change:
        change = {**change, "data": write(tmp_path / "bad.jsonl", change["data"])}
    with pytest.raises(assay.AssayError, match=message):
        Study(method="local", spec={**spec, **change}).run(subject=subject, out=tmp_path / "out")
    assert not (tmp_path / "out").exists() or not list((tmp_path / "out").iterdir())


def test_the_plan_counts_the_tokens_that_are_read(subject: Any, spec: dict[str, Any]) -> None:
    plan = Study(method="local", spec=spec).plan(subject=subject)
    (step,) = plan.steps
    n, length = len(TEXTS), mean_tokens(LoadedCard(subject), TEXTS)
    assert step.step.forwards == 4 * n and step.step.tokens == n * (length + 2 + 3 + 5)
    with pytest.raises(SpecError, match="none of ks"):
        Study(method="local", spec={**spec, "k": 7}).plan(subject=subject)
