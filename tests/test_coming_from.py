"""The page that shows five tasks in three libraries shows the code that benchmarks/coming_from.py runs."""

from __future__ import annotations

import ast
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
PAGE = ROOT / "docs" / "coming-from.md"
TASKS = ROOT / "docs" / "examples" / "coming_from"
SECTIONS = ("setup", "read", "steer", "sweep", "gradients", "ablate")
FENCES = {"transformerlens": "python3", "nnsight": "python3", "assay": "python"}
PART = re.compile(r"^# --8<-- \[start:(\w+)\]\n(.*?)^# --8<-- \[end:\1\]$", re.MULTILINE | re.DOTALL)


def parts(library: str) -> dict[str, str]:
    """The marked parts of one library's file, in order."""
    text = (TASKS / f"tasks_{library}.py").read_text("utf-8")
    return {name: body.strip("\n") for name, body in PART.findall(text)}


@pytest.mark.parametrize("library", FENCES)
def test_the_page_shows_what_is_run(library: str) -> None:
    found = parts(library)
    assert tuple(found) == SECTIONS
    page = PAGE.read_text("utf-8")
    fences = re.findall(rf"^```{FENCES[library]}\n(.*?)\n```$", page, re.MULTILINE | re.DOTALL)
    shown = [body for body in fences if body in found.values()]
    assert shown == list(found.values())


def test_every_other_block_of_the_tasks_is_accounted_for() -> None:
    tasks = PAGE.read_text("utf-8").split("## Five tasks", 1)[1].split("\n## ", 1)[0]
    fences = re.findall(r"^```(\w+)$", tasks, re.MULTILINE)
    assert fences == ["python3", "python3", "python"] * len(SECTIONS)


@pytest.mark.parametrize("library", FENCES)
def test_each_library_hands_over_the_same_numbers(library: str) -> None:
    tree = ast.parse((TASKS / f"tasks_{library}.py").read_text("utf-8"))
    keys = [key.value for node in ast.walk(tree) if isinstance(node, ast.Dict) for key in node.keys if key is not None]  # type: ignore[attr-defined]
    assert keys == ["residual", "pattern", "tokens", "grid", "attribution", "effect"]
