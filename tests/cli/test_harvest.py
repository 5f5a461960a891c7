"""`assay harvest`: a plan, then a folder that `Store` opens; and one message where it cannot be done."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from assay.activations import Store
from assay.base.errors import SpecError
from assay.cli.main import main

Capture = pytest.CaptureFixture[str]
SMALL = ["--context", "16", "--rows", "4"]


@pytest.fixture
def lines(tmp_path: Path) -> Path:
    texts = ["When Mary and John went to the store John gave a drink to Mary", "Paris is the capital of France"] * 20
    path = tmp_path / "texts.jsonl"
    path.write_text("".join(json.dumps({"body": text}) + "\n" for text in texts))
    return path


@pytest.fixture
def arguments(model_folder: Path, lines: Path, tmp_path: Path, capsys: Capture) -> list[str]:
    capsys.readouterr()  # what building the model said
    return ["harvest", str(model_folder), str(lines), "--field", "body", "--out", str(tmp_path / "out"), *SMALL]


def test_a_harvest_is_planned_made_and_opened(arguments: list[str], tmp_path: Path, capsys: Capture) -> None:
    sites = ["--sites", "blocks.1.resid_post", "blocks.*.attn.z", "--tokens", "200"]
    assert main([*arguments, *sites]) == 0
    shown = capsys.readouterr()
    assert "blocks.1.resid_post (32), blocks.0.attn.z (32)" in shown.err and "KiB on the disk" in shown.err
    assert "200 tokens of 4 sites in" in shown.out and "blocks.2.attn.z: width 32, mean norm" in shown.out
    store = Store.open(tmp_path / "out")
    assert store.n == 200 and store.dtype == "bfloat16"
    assert main([*arguments, *sites, "--json", "--quiet"]) == 0  # again: it is there
    shown = capsys.readouterr()
    assert json.loads(shown.out)["tokens"] == 200 and shown.err == ""


def test_a_plan_writes_nothing(arguments: list[str], tmp_path: Path, capsys: Capture) -> None:
    assert main([*arguments, "--sites", "blocks.0.resid_post", "--tokens", "160", "--plan"]) == 0
    shown = " ".join(capsys.readouterr().out.split())
    assert "10 rows through 33% of the blocks" in shown and "free)" in shown
    assert main([*arguments, "--sites", "blocks.0.resid_post", "--plan", "--json", "-q"]) == 0
    plan = json.loads(capsys.readouterr().out)
    assert plan["forwards"] is None and plan["sites"] == {"blocks.0.resid_post": 32}
    assert not (tmp_path / "out").exists()


def test_options_reach_the_harvest(arguments: list[str], tmp_path: Path) -> None:
    options = ["--dtype", "float32", "--layout", "document", "--bos", "row", "--skip-bos", "--separator", "none"]
    assert main([*arguments, "-q", "--sites", "embed", *options]) == 0
    store = Store.open(tmp_path / "out")
    tokens = store.tokens(np.arange(store.n))
    assert store.dtype == "float32" and 1 not in tokens["token"]
    assert sorted(set(tokens["document"].tolist())) == list(range(40))
    assert store.context(0)[0] == 1  # which was read, and not stored


@pytest.mark.parametrize(
    ("changed", "said"),
    [
        (["--sites", "blocks.0.resid_pots"], "did you mean 'blocks.0.resid_post'"),
        (["--sites", "embed", "--field", "text"], "has no field 'text' (it has 'body')"),
        (["--sites", "embed", "--tokens", "0"], "tokens=0: at least 1"),
        (["--sites", "embed", "--separator", "dot"], "separator='dot'"),
        (["--sites", "embed", "--context", "99"], "the model's context is 64"),
    ],
)
def test_what_cannot_be_done_is_said_once(
    changed: list[str], said: str, arguments: list[str], tmp_path: Path, capsys: Capture
) -> None:
    assert main([*arguments, "-q", *changed]) == 2
    shown = capsys.readouterr()
    assert shown.out == "" and shown.err.startswith("error: ") and said in shown.err.replace("\n", " ")
    assert not (tmp_path / "out").exists()


def test_a_short_corpus_is_noted(arguments: list[str], capsys: Capture) -> None:
    assert main([*arguments, "--sites", "embed", "--tokens", "9999"]) == 0
    shown = capsys.readouterr().out
    assert "note: the corpus gave" in shown and "where 9,999 were asked for" in shown


def test_a_full_disk_is_told(arguments: list[str], lines: Path, small_disk: Path, capsys: Capture) -> None:
    lines.write_text(lines.read_text() * 12)
    given = [*arguments, "-q", "--sites", "logits", "blocks.*.resid_post", "--out", str(small_disk / "out")]
    assert main([*given, "--tokens", "9000"]) == 2
    assert "no room for this harvest: it takes" in capsys.readouterr().err.replace("\n", " ")
    assert not (small_disk / "out").exists()
    assert main([*given, "--shard-mib", "1"]) == 2  # how large it gets is not known before
    assert "no room left to write" in capsys.readouterr().err.replace("\n", " ")
    assert [path.name for path in (small_disk / "out").glob(".tmp-*")] == []
    with pytest.raises(SpecError, match=r"has not finished|holds no activations"):
        Store.open(small_disk / "out")


def test_its_help_imports_no_torch() -> None:
    code = """
import sys
from assay.cli.main import main
code = main(["harvest", "--help"])
sys.exit(code or (1 if "torch" in sys.modules else 0))
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False, env=os.environ)
    assert (done.returncode, done.stderr) == (0, "")
    for option in ("MODEL", "CORPUS", "--sites", "--tokens", "--max-norm", "--plan"):
        assert option in done.stdout
