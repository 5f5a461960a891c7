"""Documentation runs: every python block of the README and of docs/, and every example in a docstring.

The blocks of one page share their names and run in order, as a reader would type them. A block that needs more says so:
`<!-- real-model -->` on the line before its fence (or `.slow` in the info string) makes the page run once more, whole,
under the marker of that name. Blocks of another language (`text`, `console`, `json`, ...) are not run.

An example in a docstring finds `subject` there: a GPT-2 of six blocks with random weights, and a tokenizer.
"""

from __future__ import annotations

import ast
import contextlib
import doctest
import importlib
import io
import linecache
import re
from dataclasses import dataclass
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
PAGES = sorted([*ROOT.glob("README.md"), *(ROOT / "docs").rglob("*.md")])
SOURCES = sorted(path for path in (ROOT / "src" / "assay").rglob("*.py") if ">>> " in path.read_text("utf-8"))
FENCE = re.compile(r"^(?P<indent> *)(?P<marks>`{3,}|~{3,})(?P<info>[^`\n]*)$")


@dataclass(frozen=True, slots=True, kw_only=True)
class Block:
    """A fenced block: its language, the marker it needs ("" for none), its first line (from 1) and its text."""

    language: str
    needs: str
    line: int
    text: str


def blocks(text: str) -> list[Block]:
    """The fenced blocks of a markdown page, in order."""
    found: list[Block] = []
    opened: re.Match[str] | None = None
    body: list[str] = []
    before = ""
    start = 0
    for number, line in enumerate(text.splitlines(), 1):
        fence = FENCE.match(line)
        if opened is None:
            if fence:
                opened, body, start = fence, [], number + 1
            elif line.strip():
                before = line.strip()
        elif fence and not fence["info"].strip() and fence["marks"].startswith(opened["marks"]):
            info = re.findall(r"[\w-]+", opened["info"]) or [""]
            needs = "real_model" if before == "<!-- real-model -->" else "slow" if ".slow" in opened["info"] else ""
            found.append(Block(language=info[0], needs=needs, line=start, text="\n".join(body)))
            opened, before = None, ""
        else:
            body.append(line.removeprefix(opened["indent"]))
    if opened is not None:
        raise ValueError(f"the fence opened on line {start - 1} is never closed")
    return found


def python_blocks(page: Path) -> list[Block]:
    return [block for block in blocks(page.read_text("utf-8")) if block.language in ("python", "py")]


def run(page: Path, chosen: list[Block]) -> None:
    """Run blocks in one namespace; a traceback points at the page's own file and line."""
    namespace: dict[str, object] = {"__name__": page.stem}
    for block in chosen:
        tree = ast.increment_lineno(ast.parse(block.text, filename=str(page)), block.line - 1)
        linecache.checkcache(str(page))
        exec(compile(tree, str(page), "exec", dont_inherit=True), namespace)


def cases() -> list[object]:
    """One test a page for its plain blocks, and one for each marker that its other blocks need."""
    found = []
    for page in PAGES:
        name = page.relative_to(ROOT).as_posix()
        needs = {block.needs for block in python_blocks(page)}
        for need in sorted(needs):
            marks = [getattr(pytest.mark, marker) for marker in ("real_model", "slow") if need in (marker, "slow")]
            found.append(pytest.param(page, need, id=f"{name}-{need}" if need else name, marks=marks if need else ()))
    return found


@pytest.mark.parametrize(("page", "need"), cases())
def test_the_blocks_of_a_page_run(page: Path, need: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    granted = {"": {""}, "real_model": {"", "real_model"}, "slow": {"", "real_model", "slow"}}[need]
    run(page, [block for block in python_blocks(page) if block.needs in granted])


@pytest.mark.parametrize("path", SOURCES, ids=lambda path: path.relative_to(ROOT / "src").as_posix())
def test_the_examples_of_a_module_run(path: Path, request: pytest.FixtureRequest, tmp_path: Path) -> None:
    name = ".".join(path.relative_to(ROOT / "src").with_suffix("").parts).removesuffix(".__init__")
    uses_subject = re.search(r">>> .*\bsubject\b", path.read_text("utf-8"))
    given = {"subject": request.getfixturevalue("tiny_subject")} if uses_subject else {}
    found = doctest.DocTestFinder(exclude_empty=True).find(importlib.import_module(name), name, extraglobs=given)
    assert any(test.examples for test in found), f"{name} shows examples that doctest does not find"
    runner = doctest.DocTestRunner(optionflags=doctest.ELLIPSIS | doctest.NORMALIZE_WHITESPACE)
    report = io.StringIO()
    with contextlib.chdir(tmp_path):
        for test in found:
            runner.run(test, out=report.write)
    assert not runner.failures, report.getvalue()


def test_pages_are_read_as_a_reader_would() -> None:
    page = "\n".join(
        [
            "```python",
            "x = 1",
            "```",
            "    ```python title='indented'",
            "    y = x",
            "    ```",
            "<!-- real-model -->",
            "",
            "```python",
            "z = y",
            "```",
            "``` {.python .slow}",
            "w = z",
            "```",
            "````text",
            "```python",
            "nested",
            "```",
            "````",
        ]
    )
    assert [(block.language, block.needs, block.line) for block in blocks(page)] == [
        ("python", "", 2),
        ("python", "", 5),
        ("python", "real_model", 10),
        ("python", "slow", 13),
        ("text", "", 16),
    ]
    assert blocks(page)[1].text == "y = x"


def test_a_fence_left_open_is_refused() -> None:
    with pytest.raises(ValueError, match="line 2"):
        blocks("text\n```python\nx = 1\n")


def test_a_failure_points_into_the_page(tmp_path: Path) -> None:
    page = tmp_path / "page.md"
    page.write_text("# Title\n\n```python\nx = 1\n```\n\nMore.\n\n```python\nassert x == 2\n```\n")
    with pytest.raises(AssertionError) as failure:
        run(page, python_blocks(page))
    assert (str(failure.traceback[-1].path), failure.traceback[-1].lineno + 1) == (str(page), 10)
