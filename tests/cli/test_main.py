"""The command line: from arguments to findings, and from errors to one message."""

from __future__ import annotations

import json
import os
import pty
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from study_fixtures import HERE, RUN

from assay.base.version import __version__
from assay.cli.main import main
from assay.studies import Study

pytestmark = pytest.mark.usefixtures("home", "method")
PROMPT = "When Mary and John went to the store"
Capture = pytest.CaptureFixture[str]
Log = Callable[[], list[str]]


@pytest.fixture
def arguments(model_folder: Path, capsys: Capture) -> list[str]:
    capsys.readouterr()  # what building the model said
    return ["tally", PROMPT, "--model", str(model_folder)]


def test_version(capsys: Capture) -> None:
    assert main(["--version"]) == 0
    assert capsys.readouterr().out == f"assay {__version__}\n"


def test_help_lists_the_commands_and_is_what_no_arguments_give(capsys: Capture) -> None:
    assert main(["--help"]) == 0
    shown = capsys.readouterr().out
    for word in ("explain", "tally", "plan", "doctor", "methods", "cache", "completion"):
        assert word in shown
    assert main([]) == 0
    assert capsys.readouterr().out == shown


def test_a_methods_help_is_its_spec(capsys: Capture) -> None:
    for command in (["tally"], ["plan", "tally"]):
        assert main([*command, "--help"]) == 0
        shown = " ".join(capsys.readouterr().out.replace("│", " ").split())
        assert "PROMPT The text whose tokens are measured. (required)" in shown
        assert "--draws N How many random sets of tokens to compare with. (default: 19)" in shown
        assert "--measure {norm,spread}" in shown
        assert "--fold, --no-fold" in shown
        assert "--weights FILE A JSON list with one weight a token. (optional)" in shown
        for option in ("--model REF", "--out FOLDER", "--seed N", "--no-cache", "--quiet", "--json"):
            assert option in shown


LIGHT = """
import sys
from assay.cli.main import main
code = main(sys.argv[1:])
heavy = {"torch", "transformers", "pyarrow", "pandas"} & set(sys.modules)
sys.exit(code or (f"imported {heavy}" if heavy else 0))
"""


@pytest.mark.parametrize("arguments", [["--help"], ["explain", "--help"], ["methods", "explain"], ["cache"]])
def test_asking_for_help_imports_no_torch(arguments: list[str]) -> None:
    done = subprocess.run([sys.executable, "-c", LIGHT, *arguments], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr) == (0, "")
    assert len(done.stdout) > 50


def test_a_run_prints_findings_with_controls_and_says_where_the_files_are(
    arguments: list[str], tmp_path: Path, capsys: Capture
) -> None:
    out = tmp_path / "runs" / "a"
    assert main([*arguments, "--out", str(out)]) == 0
    printed, progress = capsys.readouterr()
    finding = Study(method="tally", model=arguments[-1], spec={"prompt": PROMPT}).run().findings[0]
    words = " ".join(printed.replace("│", " ").split())
    assert words.startswith(f"The mean norm is {finding.estimate:.3f}.")
    assert finding.verdict.split()[0] in words
    assert f"{finding.estimate:.3g} norm" in words
    assert f"p = {finding.controls[0].p:.3g}" in words
    assert "warning: 19 draws cannot give a p below 0.05" in printed
    for name in ("report.html", "findings.jsonl", "study.json", "artifacts"):
        assert str(out / name) in printed
        assert (out / name).exists()
    assert "20 forwards, 2 backwards" in printed
    assert "\x1b" not in printed + progress  # no colour where there is no terminal
    assert "tally: [1/2] measure: done in" in progress


def test_the_second_time_it_answers_from_the_cache(arguments: list[str], capsys: Capture, log: Log) -> None:
    assert main([*arguments, "--quiet"]) == 0
    assert capsys.readouterr().err == ""
    assert main(arguments) == 0
    assert "answered from the cache" in capsys.readouterr().out
    assert log() == ["measure", "draws"]
    assert main([*arguments, "--no-cache"]) == 0
    assert log() == ["measure", "draws"] * 2


def test_the_command_line_and_python_are_one_study(
    arguments: list[str], tmp_path: Path, capsys: Capture, log: Log
) -> None:
    weights = tmp_path / "weights.json"
    options = ["--draws", "21", "--measure", "spread", "--fold", "--seed", "4", "--json", "--weights", str(weights)]
    study = Study(
        method="tally",
        model=arguments[-1],
        spec={"prompt": "Mary", "draws": 21, "measure": "spread", "fold": True, "weights": weights},
        seed=4,
    )
    weights.write_text(json.dumps([1.0] * len(study_tokens(study, weights))))
    findings = study.run()
    assert log() == ["measure", "draws"]
    assert main(["tally", "Mary", *arguments[2:], *options]) == 0
    result = json.loads(capsys.readouterr().out)
    assert result["cached"] is True
    assert log() == ["measure", "draws"]
    assert result["findings"] == [finding.to_dict() for finding in findings]
    assert result["study"] == study.plan().study


def study_tokens(study: Study, weights: Path) -> list[int]:
    weights.write_text("[]")
    return list(study.plan().steps[0].step.inputs["tokens"])


def test_json_is_one_document_with_everything(arguments: list[str], capsys: Capture, tmp_path: Path) -> None:
    assert main([*arguments, "--json", "--out", str(tmp_path / "o")]) == 0
    result = json.loads(capsys.readouterr().out)
    assert result["cached"] is False
    assert result["cost"]["forwards"] == 20
    there = {path.relative_to(tmp_path / "o").as_posix() for path in (tmp_path / "o").rglob("*") if path.is_file()}
    assert set(result["files"]) == there
    assert len(there) == 5
    assert result["artifacts"]["null"]["keys"] == ["null"]


def test_plan_prints_costs_and_runs_nothing(arguments: list[str], capsys: Capture, log: Log) -> None:
    assert main(["plan", *arguments]) == 0
    rows = {line.split()[0]: line.split() for line in capsys.readouterr().out.splitlines() if line.strip()}
    assert rows["measure"][1:3] == ["1", "0"]
    assert rows["draws"][1:3] == ["19", "2"]
    assert rows["draws"][-1] == "no"
    assert rows["all"][2:4] == ["20", "2"]
    assert log() == []
    main([*arguments, "--seed", "1"])
    capsys.readouterr()
    assert main(["plan", *arguments, "--json"]) == 0
    plan = json.loads(capsys.readouterr().out)
    assert [(step["name"], step["cached"]) for step in plan["steps"]] == [("measure", True), ("draws", False)]
    assert (plan["total"]["forwards"], plan["remaining"]["forwards"], plan["finished"]) == (20, 19, False)
    assert log() == ["measure", "draws"]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (["--draws", "0"], "error: tally: draws: input should be greater than or equal to 1, but 0 was given"),
        (["--seed", "-1"], "error: study: seed: input should be greater than or equal to 0, but -1 was given"),
        (["--model", "no/such/model"], "no/such/model"),
        (["--weights", "absent.json"], "error: weights: cannot read 'absent.json': No such file or directory"),
    ],
)
def test_an_error_is_one_message_and_exit_code_2(
    arguments: list[str], change: list[str], message: str, capsys: Capture, tmp_path: Path
) -> None:
    assert main([*arguments, "--out", str(tmp_path / "out"), *change]) == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert message in err
    assert "Traceback" not in err
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["taly"], "taly"),
        (["tally", "a"], "--model"),
        (["tally", "a", "--model", "m", "--drows", "3"], "--draws"),
        (["tally", "a", "--model", "m", "--measure", "length"], "'norm', 'spread'"),
        (["completion", "tcsh"], "'bash', 'zsh', 'fish'"),
    ],
)
def test_a_wrong_command_line_is_explained(arguments: list[str], message: str, capsys: Capture) -> None:
    assert main(arguments) == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert message in " ".join(err.replace("│", " ").split())


def test_an_unusable_output_folder_is_said_before_anything_runs(
    arguments: list[str], tmp_path: Path, capsys: Capture, log: Log
) -> None:
    (tmp_path / "file").write_text("mine")
    assert main([*arguments, "--out", str(tmp_path / "file")]) == 2
    assert "is a file, not a folder" in capsys.readouterr().err
    assert log() == []


@pytest.mark.parametrize("how", ["option", "environment"])
def test_a_traceback_is_there_for_who_asks(
    arguments: list[str], how: str, capsys: Capture, monkeypatch: pytest.MonkeyPatch
) -> None:
    if how == "environment":
        monkeypatch.setenv("ASSAY_DEBUG", "1")
    assert main([*arguments, "--draws", "0", *(["--traceback"] if how == "option" else [])]) == 2
    err = capsys.readouterr().err
    assert "Traceback" in err
    assert "error: tally: draws:" in err


def test_square_brackets_in_messages_are_no_markup(arguments: list[str], capsys: Capture) -> None:
    assert main([*arguments[:2], "--model", "/no/[bold]such[/bold]/model"]) == 2
    assert "/no/[bold]such[/bold]/model" in capsys.readouterr().err


def test_methods_and_cards(capsys: Capture) -> None:
    assert main(["methods"]) == 0
    listed = capsys.readouterr().out
    assert "explain" in listed
    assert "tally" in listed
    assert main(["methods", "tally"]) == 0
    card = capsys.readouterr().out
    for heading in ("What it computes", "Controls", "When it misleads", "Source", "Settings"):
        assert heading in card
    assert "Frequent tokens have shorter embeddings" in card
    assert main(["methods", "taly"]) == 2
    assert "did you mean 'tally'?" in capsys.readouterr().err


def test_the_cache_is_shown_and_cleared(arguments: list[str], capsys: Capture, home: Path, log: Log) -> None:
    assert main(["cache"]) == 0
    assert "empty" in capsys.readouterr().out
    main([*arguments, "--quiet"])
    capsys.readouterr()
    assert main(["cache"]) == 0
    shown = capsys.readouterr().out
    assert str(home) in shown
    assert "steps" in shown
    assert main(["cache", "clear"]) == 0
    assert "removed" in capsys.readouterr().out
    assert not (home / "steps").exists()
    main([*arguments, "--quiet"])
    assert log() == ["measure", "draws"] * 2


@pytest.mark.parametrize("shell", ["bash", "zsh", "fish"])
def test_completion_prints_a_script_and_how_to_install_it(shell: str, capsys: Capture, tmp_path: Path) -> None:
    assert main(["completion", shell]) == 0
    script, hint = capsys.readouterr()
    assert f"assay completion {shell} >" in hint
    assert "--draws" in script
    if shutil.which(shell):
        (tmp_path / "script").write_text(script)
        subprocess.run([shell, "-n", str(tmp_path / "script")], check=True)


@pytest.mark.skipif(not shutil.which("bash"), reason="no bash")
@pytest.mark.parametrize(
    ("words", "expected"),
    [
        (["ta"], {"tally"}),
        (["plan", "tal"], {"tally"}),
        (["tally", "--mea"], {"--measure"}),
        (["tally", "--measure", ""], {"norm", "spread"}),
    ],
)
def test_bash_completes(words: list[str], expected: set[str], capsys: Capture, tmp_path: Path) -> None:
    main(["completion", "bash"])
    script = tmp_path / "assay.bash"
    script.write_text(capsys.readouterr().out)
    line = " ".join(f"'{word}'" for word in ["assay", *words])
    code = f"source {script}; f=$(complete -p assay | sed 's/.*-F \\([^ ]*\\) .*/\\1/'); COMP_WORDS=({line}); "
    code += f"COMP_CWORD={len(words)}; $f; printf '%s\\n' \"${{COMPREPLY[@]}}\""
    done = subprocess.run(["bash", "-c", code], capture_output=True, text=True, check=True)
    assert expected <= set(done.stdout.split()), done.stderr


@pytest.mark.skipif(sys.platform == "win32", reason="no pseudo-terminal")
def test_in_a_terminal_there_are_bars_and_colour(arguments: list[str], home: Path) -> None:
    path = os.pathsep.join([str(HERE), *filter(None, [os.environ.get("PYTHONPATH")])])
    environment = {**os.environ, "PYTHONPATH": path, "TERM": "xterm-256color", "COLUMNS": "100"}
    environment.pop("NO_COLOR", None)
    ours, theirs = pty.openpty()
    process = subprocess.Popen(
        [sys.executable, "-c", RUN, *arguments], stdout=theirs, stderr=theirs, stdin=theirs, env=environment
    )
    os.close(theirs)
    shown = b""
    try:
        while chunk := os.read(ours, 65536):
            shown += chunk
    except OSError:  # the other end was closed
        pass
    os.close(ours)
    assert process.wait(timeout=60) == 0
    text = shown.decode()
    assert "[1/2] measure: done in" in text
    assert "━" in text  # a bar
    assert "\x1b[33m" in text or "\x1b[1;32m" in text  # the verdict's colour
    assert text.rstrip().endswith("in all")


@pytest.mark.parametrize("arguments", [["--help"], ["methods"], ["--version"]])
def test_a_reader_that_went_away_is_no_error(arguments: list[str]) -> None:
    ours, theirs = os.pipe()
    os.close(ours)
    process = subprocess.Popen([sys.executable, "-m", "assay.cli", *arguments], stdout=theirs, stderr=subprocess.PIPE)
    os.close(theirs)
    _, err = process.communicate(timeout=60)
    assert (process.returncode, err) == (0, b"")


ENTRY = [sys.executable, "-m", "assay.cli"]


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="no /dev/full")
@pytest.mark.parametrize("arguments", [["--version"], ["methods"], ["completion", "bash"]])
def test_output_that_cannot_be_printed_is_said(arguments: list[str]) -> None:
    with Path("/dev/full").open("w") as full:
        done = subprocess.run([*ENTRY, *arguments], stdout=full, stderr=subprocess.PIPE, text=True, check=False)
    assert done.returncode == 1
    assert done.stderr == "error: the result could not be printed: No space left on device\n"


@pytest.mark.skipif(sys.platform == "win32", reason="a POSIX shell")
def test_a_closed_standard_output_is_said() -> None:
    command = ["sh", "-c", '"$@" >&-', "sh", *ENTRY, "methods"]
    done = subprocess.run(command, stderr=subprocess.PIPE, text=True, check=False)
    assert (done.returncode, "standard output is closed" in done.stderr) == (1, True)
    assert "Traceback" not in done.stderr


def test_ctrl_c_while_importing_leaves_no_traceback() -> None:
    interrupted = """
import sys
from assay.cli.main import main
class Interrupt:
    def find_spec(self, name, *_):
        if name.startswith("assay.cli."):
            raise KeyboardInterrupt
sys.meta_path.insert(0, Interrupt())
sys.exit(main(["methods"]))
"""
    done = subprocess.run([sys.executable, "-c", interrupted], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr) == (130, "\nStopped.\n")


def test_an_empty_output_folder_is_refused(arguments: list[str], capsys: Capture, log: Log) -> None:
    assert main([*arguments, "--out", ""]) == 2
    assert "the output folder's name is empty" in capsys.readouterr().err
    assert main([*arguments, "--weights", ""]) == 2
    assert "weights: is empty" in capsys.readouterr().err
    assert log() == []


def test_a_study_in_a_file_runs_and_plans(
    home: Path, method: None, model_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "study.json"
    file.write_text(json.dumps({"method": "tally", "model": str(model_folder), "spec": {"prompt": "When Mary"}}))
    assert main(["run", str(file), "--plan", "--json", "--quiet"]) == 0
    assert json.loads(capsys.readouterr().out)["finished"] is False
    assert main(["run", str(file), "--quiet", "--out", str(tmp_path / "out")]) == 0
    assert (tmp_path / "out" / "study.json").is_file()
    assert main(["run", str(tmp_path / "absent.json"), "--quiet"]) == 2
    assert "is no study" in capsys.readouterr().err
