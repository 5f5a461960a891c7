"""Whatever stops a study, and whenever, finished steps are kept and the same study goes on from them.

These run the real command line in processes of their own; what was computed is counted through a file.
"""

from __future__ import annotations

import json
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest
from study_fixtures import HERE

from assay.studies import Study

pytestmark = [
    pytest.mark.usefixtures("home", "method"),
    pytest.mark.skipif(sys.platform == "win32", reason="POSIX signals"),
]
PROMPT = "When Mary and John went to the store"
Log = Callable[[], list[str]]
Start = Callable[..., "subprocess.Popen[str]"]


@pytest.fixture
def arguments(model_folder: Path, tmp_path: Path) -> list[object]:
    return ["tally", PROMPT, "--model", model_folder, "--out", tmp_path / "out"]


def wait_until_held(process: subprocess.Popen[str], tmp_path: Path) -> None:
    """Wait until the process is in the middle of the step it was told to hold."""
    deadline = time.monotonic() + 120
    while not (tmp_path / "computed.log.held").exists():
        assert process.poll() is None, process.communicate()
        assert time.monotonic() < deadline, "the step was never reached"
        time.sleep(0.02)


def finish(process: subprocess.Popen[str]) -> tuple[int, str, str]:
    out, err = process.communicate(timeout=120)
    return process.returncode, out, err


def test_killed_in_a_step_it_loses_only_that_step(
    start: Start, arguments: list[object], tmp_path: Path, log: Log
) -> None:
    killed = start(*arguments, TALLY_HOLD="draws")
    wait_until_held(killed, tmp_path)
    killed.send_signal(signal.SIGKILL)
    finish(killed)
    assert killed.returncode == -signal.SIGKILL
    assert log() == ["measure", "draws"]
    assert not (tmp_path / "out").exists()

    code, _, err = finish(start(*arguments))
    assert code == 0, err
    assert log() == ["measure", "draws", "draws"]  # the finished step was not computed again
    assert "[1/2] measure: from the cache" in err
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == [
        "artifacts",
        "findings.jsonl",
        "report.html",
        "study.json",
    ]
    assert [path.name for path in tmp_path.iterdir() if path.name.startswith(".assay")] == []


def test_interrupted_it_says_what_is_kept_and_exits_130(
    start: Start, arguments: list[object], tmp_path: Path, log: Log
) -> None:
    stopped = start(*arguments, TALLY_HOLD="draws")
    wait_until_held(stopped, tmp_path)
    stopped.send_signal(signal.SIGINT)
    code, out, err = finish(stopped)
    assert code == 130
    assert "Stopped. Finished steps are kept; the same command resumes from them." in err
    assert "Traceback" not in err
    assert out == ""
    assert not (tmp_path / "out").exists()
    assert log() == ["measure", "draws"]
    plan = Study(method="tally", model=str(arguments[3]), spec={"prompt": PROMPT}).plan()
    assert [(planned.step.name, planned.cached) for planned in plan.steps] == [("measure", True), ("draws", False)]


def test_two_processes_at_once_do_no_harm(start: Start, arguments: list[object], tmp_path: Path, log: Log) -> None:
    both = [start(*arguments, "--json"), start(*arguments, "--json")]
    results = [finish(process) for process in both]
    assert [code for code, _, _ in results] == [0, 0], results
    first, second = (json.loads(out) for _, out, _ in results)
    assert first["study"] == second["study"]
    assert [finding["estimate"] for finding in first["findings"]] == [f["estimate"] for f in second["findings"]]
    assert json.loads((tmp_path / "out" / "study.json").read_text())["key"] == first["study"]

    computed = log()
    code, out, err = finish(start(*arguments, "--json"))
    assert (code, json.loads(out)["cached"]) == (0, True), err
    assert log() == computed


NO_TORCH = """
import sys, tally
from assay.cli.main import main
code = main(sys.argv[1:])
heavy = {"torch", "transformers", "pyarrow"} & set(sys.modules)
sys.exit(code or (f"imported {heavy}" if heavy else 0))
"""


def test_the_answer_from_the_cache_needs_no_torch(model_folder: Path, tmp_path: Path, log: Log) -> None:
    """The study was run from Python; the command line has the same hash, so it answers, and fills the folder."""
    findings = Study(method="tally", model=str(model_folder), spec={"prompt": PROMPT}).run()
    assert log() == ["measure", "draws"]
    arguments = ["tally", PROMPT, "--model", str(model_folder), "--out", str(tmp_path / "out"), "--quiet"]
    done = subprocess.run(
        [sys.executable, "-c", NO_TORCH, *arguments], capture_output=True, text=True, cwd=HERE, timeout=120, check=False
    )
    assert (done.returncode, done.stderr) == (0, "")
    assert "answered from the cache" in done.stdout
    assert (tmp_path / "out" / "report.html").stat().st_size > 1000
    lines = (tmp_path / "out" / "findings.jsonl").read_text().splitlines()
    assert [json.loads(line) for line in lines] == [finding.to_dict() for finding in findings]
    assert log() == ["measure", "draws"]
