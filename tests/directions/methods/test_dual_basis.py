"""The `dual-basis` study on a small model: what is exact is exact, and bad input is named."""

from __future__ import annotations

import itertools
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import assay
from assay.base.errors import NumericalError, SpecError
from assay.base.findings import Findings
from assay.directions.methods.concepts import Concepts
from assay.studies import Study

LAST = ("store", "drink", "milk", "capital", "France", "Paris", "Mary went", "John gave")


def clauses() -> list[dict[str, Any]]:
    """Three concepts, each a choice between two words; groups are what follows them."""
    return [
        {
            "text": f"{('When', 'is')[asked]} {('Mary', 'John')[john]} {('went', 'gave')[gave]} the {last}",
            "labels": {"asked": asked, "john": john, "gave": gave},
            "group": last,
        }
        for last in LAST
        for asked, john, gave in itertools.product((0, 1), repeat=3)
    ]


def write(path: Path, rows: list[Any]) -> Path:
    path.write_text("\n".join(row if isinstance(row, str) else json.dumps(row) for row in rows))
    return path


@pytest.fixture(scope="module")
def subject(tiny_module: Callable[..., Any], tiny_tokenizer: Any) -> Any:
    return assay.load(tiny_module("llama"), tokenizer=tiny_tokenizer)


@pytest.fixture
def spec(tmp_path: Path) -> dict[str, Any]:
    return {
        "data": write(tmp_path / "clauses.jsonl", clauses()),
        "unrelated": write(tmp_path / "unrelated.jsonl", [{"text": "the capital of France is Paris"}]),
        "site": "blocks.1.resid_post",
        "later": "blocks.2.resid_post",
        "kind": "lda",
        "controls": 19,
        "texts": 8,
    }


def test_at_the_site_the_dual_moves_its_target_and_nothing_else(
    subject: Any, spec: dict[str, Any], tmp_path: Path
) -> None:
    found: Findings = Study(method="dual-basis", spec=spec).run(subject=subject, out=tmp_path / "out")
    at = {finding.tags: finding for finding in found}
    for form in ("dual", "on-distribution dual"):
        still = at["site", form, "others"]
        np.testing.assert_allclose(still.detail["matrix"], np.eye(3), atol=1e-4)
        assert still.verdict == "supported" and still.estimate < 1e-4
    moved = np.asarray(at["site", "probe", "others"].detail["matrix"])
    np.testing.assert_allclose(np.diag(moved), 1.0, atol=1e-4)
    assert at["site", "probe", "others"].estimate == pytest.approx(np.abs(moved[~np.eye(3, dtype=bool)]).mean())
    assert at["site", "probe", "others"].estimate > 1e-2
    downstream = {tags for tags in at if tags[0] == "later"}
    assert len(downstream) == 7 and all(at[tags].interval is not None for tags in downstream)
    assert all({c.name for c in f.controls} == {"isotropic", "covariance-matched"} for f in found)
    assert all(len(control.null) == 19 for finding in found for control in finding.controls)
    assert {view.id for view in found.views} >= {"site-probe", "later-dual", "guard", "probes"}
    assert "condition number" in found.summary[0]
    assert (tmp_path / "out" / "artifacts" / "vectors.safetensors").is_file()


def test_other_numbers_of_controls_draw_others(subject: Any, spec: dict[str, Any]) -> None:
    few = Study(method="dual-basis", spec={**spec, "controls": 2}).run(subject=subject)
    assert all(len(control.null) == 2 for finding in few for control in finding.controls)
    assert {finding.verdict for finding in few} == {"not testable"}


def test_probes_that_say_the_same_are_refused_unless_ridged(subject: Any, spec: dict[str, Any], tmp_path: Path) -> None:
    rows = [{**row, "labels": {**row["labels"], "twin": row["labels"]["john"]}} for row in clauses()]
    twins = {**spec, "data": write(tmp_path / "twins.jsonl", rows), "controls": 2}
    with pytest.raises(NumericalError, match=r"condition number .* limit 30"):
        Study(method="dual-basis", spec=twins).run(subject=subject)
    found = Study(method="dual-basis", spec={**twins, "ridge": 0.1}).run(subject=subject)
    still = next(f for f in found if f.tags == ("site", "dual", "others"))
    assert still.estimate == pytest.approx(1.0, abs=1e-3)  # a twin moves as far as its twin
    assert any("ridge" in warning for warning in found.warnings)


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ("{", "line 65 is not JSON"),
        ({"text": "what", "labels": {"john": 1, "asked": 0, "gave": 2}}, "line 65 has the labels"),
        ({"text": "what", "labels": {"john": 1}}, "other rows"),
        ({"labels": {"john": 1}}, "line 65 has no text"),
        ({"text": "what", "labels": {"john": 1}, "label": 1}, "label, which means nothing"),
    ],
)
def test_bad_rows_are_named(tmp_path: Path, row: Any, message: str) -> None:
    with pytest.raises(SpecError, match=message):
        Concepts.read(write(tmp_path / "bad.jsonl", [*clauses(), row]))


def test_concepts_need_two_and_both_classes(tmp_path: Path) -> None:
    one = [{"text": "a", "labels": {"past": i}} for i in (0, 1)]
    with pytest.raises(SpecError, match="from two on"):
        Concepts.read(write(tmp_path / "one.jsonl", one))
    same = [{"text": "a", "labels": {"past": i, "plural": 1}} for i in (0, 1)]
    with pytest.raises(SpecError, match="'plural' is 1 in every row"):
        Concepts.read(write(tmp_path / "same.jsonl", same))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"later": "blocks.1.resid_post"}, "another to read at later"),
        ({"site": "blocks.7.resid_post"}, "blocks.7.resid_post"),
    ],
)
def test_bad_sites_are_named(subject: Any, spec: dict[str, Any], change: dict[str, Any], message: str) -> None:
    with pytest.raises(assay.AssayError, match=message):
        Study(method="dual-basis", spec={**spec, **change}).run(subject=subject)


def test_too_few_groups_are_refused(subject: Any, spec: dict[str, Any], tmp_path: Path) -> None:
    rows = [{**row, "group": "all"} for row in clauses()]
    with pytest.raises(SpecError, match="groups"):
        Study(method="dual-basis", spec={**spec, "data": write(tmp_path / "one.jsonl", rows)}).run(subject=subject)
