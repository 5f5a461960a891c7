"""A saved result is checked: controls drawn again, and refused where it is no longer the same study."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest

from assay.base.errors import SpecError
from assay.cli.main import main
from assay.studies import Study, recheck

pytestmark = pytest.mark.usefixtures("home", "method")
PROMPT = "When Mary and John went to the store"
Log = Callable[[], list[str]]


@pytest.fixture
def result(model_folder: Path, tmp_path: Path) -> Path:
    study = Study(method="tally", model=str(model_folder), spec={"prompt": PROMPT, "draws": 50})
    study.run(out=tmp_path / "out")
    return tmp_path / "out"


def test_controls_are_drawn_again_and_nothing_else_is(result: Path, log: Log) -> None:
    before = log()
    (pair,) = recheck(result)
    assert log()[len(before) :] == ["draws"]
    assert pair.again.estimate == pair.saved.estimate
    assert pair.again.controls[0].null != pair.saved.controls[0].null
    assert pair.again.provenance.seed == 1 and pair.holds
    assert recheck(result / "findings.jsonl", seed=0)[0].again.controls[0].null == pair.saved.controls[0].null


def test_the_command_says_whether_verdicts_hold(result: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["check", str(result), "--quiet"]) == 0
    assert "1 of 1 verdicts are the same" in capsys.readouterr().out
    line = json.loads((result / "findings.jsonl").read_text())
    line["verdict"] = "contradicted"
    (result / "findings.jsonl").write_text(json.dumps(line))
    assert main(["check", str(result), "--quiet", "--json"]) == 1
    (pair,) = json.loads(capsys.readouterr().out)
    assert pair["holds"] is False and pair["saved"]["verdict"] == "contradicted"


def test_data_that_changed_is_refused(model_folder: Path, tmp_path: Path) -> None:
    weights = tmp_path / "weights.json"
    weights.write_text(json.dumps([1.0] * 8))
    Study(method="tally", model=str(model_folder), spec={"prompt": PROMPT, "weights": weights}).run(out=tmp_path / "o")
    recheck(tmp_path / "o")
    weights.write_text(json.dumps([2.0] * 8))
    with pytest.raises(SpecError, match=r"has changed since: weights"):
        recheck(tmp_path / "o")
    weights.unlink()
    with pytest.raises(SpecError, match=r"^weights: there is no .* check it from that folder"):
        recheck(tmp_path / "o")


def test_other_weights_are_refused(result: Path) -> None:
    about = json.loads((result / "study.json").read_text())
    about["fingerprint"] = "0" * 64
    (result / "study.json").write_text(json.dumps(about))
    with pytest.raises(SpecError, match="is of weights 000000000000"):
        recheck(result)


@pytest.mark.parametrize("damage", ["absent", "empty", "not json", "no findings"])
def test_what_is_no_result_is_refused(result: Path, damage: str) -> None:
    if damage == "absent":
        result = result / "nothing"
    elif damage == "empty":
        (result / "study.json").write_text("{}")
    elif damage == "not json":
        (result / "findings.jsonl").write_text("{")
    else:
        (result / "findings.jsonl").unlink()
    with pytest.raises(SpecError, match="is no result that can be checked"):
        recheck(result)
