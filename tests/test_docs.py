"""Documentation runs: every python block of the README and of docs/, and every example in a docstring.

The blocks of one page share their names and run in order, as a reader would type them. A block that needs more says so:
`<!-- real-model -->` on the line before its fence (or `.slow` in the info string) makes the page run once more, whole,
under the marker of that name. A block with a title, `python title="name.py"`, is written to the file of that name
beside the page instead, for later blocks to import. Blocks of another language (`text`, `console`, `json`, ...) are
not run.

An example in a docstring finds `subject` there: a GPT-2 of six blocks with random weights, and a tokenizer.
"""

from __future__ import annotations

import ast
import contextlib
import dataclasses
import doctest
import importlib
import io
import itertools
import json
import linecache
import re
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch

import assay
from assay.activations.verification import model_types, record
from assay.base.method import _METHODS
from assay.base.sites import BLOCK_POINTS, GLOBAL_POINTS, parse_site
from assay.cli.commands import Common
from assay.explain.inputs import read_inputs
from assay.explain.spec import ExplainSpec
from assay.studies import load_methods
from assay.subjects.tiny import tiny_model
from assay.subjects.words import ModelText

ROOT = Path(__file__).parent.parent
PAGES = sorted([*ROOT.glob("README.md"), *(ROOT / "docs").rglob("*.md")])
SOURCES = sorted(path for path in (ROOT / "src" / "assay").rglob("*.py") if ">>> " in path.read_text("utf-8"))
FENCE = re.compile(r"^(?P<indent> *)(?P<marks>`{3,}|~{3,})(?P<info>[^`\n]*)$")


@dataclass(frozen=True, slots=True, kw_only=True)
class Block:
    """A fenced block: its language, the marker it needs and its title ("" for none), its first line, and its text."""

    language: str
    needs: str
    title: str
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
            named = re.search(r"""title=["']([^"']+)["']""", opened["info"])
            title = named[1] if named else ""
            found.append(Block(language=info[0], needs=needs, title=title, line=start, text="\n".join(body)))
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
        if block.title.endswith(".py"):
            Path(block.title).write_text(block.text, encoding="utf-8")
            continue
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
    monkeypatch.syspath_prepend(tmp_path)
    load_methods()
    monkeypatch.setattr("assay.base.method._METHODS", dict(_METHODS))  # a page's methods are forgotten after it
    granted = {"": {""}, "real_model": {"", "real_model"}, "slow": {"", "real_model", "slow"}}[need]
    chosen = [block for block in python_blocks(page) if block.needs in granted]
    for block in chosen:
        if block.title.endswith(".py"):  # and so are its modules: undone is what was absent before
            monkeypatch.setitem(sys.modules, Path(block.title).stem, None)
            del sys.modules[Path(block.title).stem]
    run(page, chosen)


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


def table_rows(page: str, under: str) -> list[list[str]]:
    """The cells of the first table of a page below a line, without its head."""
    lines = iter((ROOT / page).read_text("utf-8").split(under, maxsplit=1)[1].splitlines())
    below = itertools.dropwhile(lambda line: not line.startswith("|"), lines)
    table = list(itertools.takewhile(lambda line: line.startswith("|"), below))
    return [[cell.strip() for cell in re.split(r"(?<!\\)\|", line)[1:-1]] for line in table[2:]]


@pytest.mark.parametrize("family", ["gpt2", "llama", "mixtral", "mamba"])
def test_the_table_of_sites_is_the_grammar(family: str) -> None:
    rows = table_rows("docs/sites.md", "<!-- checked by tests/test_docs.py -->")
    assert sorted(row[0].strip("`") for row in rows) == sorted([*GLOBAL_POINTS, *BLOCK_POINTS])
    subject = assay.load(tiny_model(family))
    run = subject.run(torch.tensor([[5, 9, 12], [7, 3, 8]]), capture=subject.sites())
    for site, dims, _, theirs in rows:
        name, prefix = site.strip("`"), "" if site.strip("`") in GLOBAL_POINTS else "blocks.1."
        if theirs:
            assert str(parse_site(prefix + theirs.strip("`"))) == prefix + name
        if prefix + name in subject.sites():
            assert ", ".join(run[prefix + name].dims) == dims, name


def test_the_table_of_sites_is_the_grammar_of_two_stacks() -> None:
    rows = {row[0].strip("`"): row[1] for row in table_rows("docs/sites.md", "<!-- checked by tests/test_docs.py -->")}
    subject = assay.load(tiny_model("t5"))
    inputs = {"input_ids": torch.tensor([[5, 9, 12]]), "decoder_input_ids": torch.tensor([[1, 7]])}
    run = subject.run(inputs, capture=subject.sites())
    for name in subject.sites():
        point = re.sub(r"^(encoder|decoder)\.(blocks\.\d\.)?", "", name)
        assert ", ".join(run[name].dims) == rows[point], name


def test_the_record_of_families_is_that_of_the_declarations() -> None:
    rows = record()["types"]
    assert [row["model_type"] for row in rows] == model_types()
    assert {row["status"] for row in rows} == {"verified"}
    page = (ROOT / "docs" / "families.md").read_text("utf-8")
    assert all(f"`{model_type}`" in page for model_type in model_types())


def test_every_option_of_the_command_line_has_its_row() -> None:
    text = (ROOT / "docs" / "cli.md").read_text("utf-8")
    shared = [field.name for field in dataclasses.fields(Common)]
    options = [f"--{name.replace('_', '-')}" for name in [*ExplainSpec.model_fields, *shared] if name != "prompt"]
    assert [option for option in options if f"| `{option}" not in text] == []
    assert all(str(field.default) in text for field in ExplainSpec.model_fields.values() if field.annotation is int)


def test_the_tree_of_the_readme_is_the_repository() -> None:
    page = blocks((ROOT / "README.md").read_text("utf-8"))
    tree = next(block.text for block in page if "src/assay/base/" in block.text)
    named = {line.split()[0] for line in tree.splitlines()}
    assert {path for path in named if not (ROOT / path).is_dir()} == set()
    packages = {f"src/assay/{path.parent.name}/" for path in (ROOT / "src" / "assay").glob("*/__init__.py")}
    assert packages - named == set()


@pytest.mark.real_model
def test_the_example_variations_fit_the_real_model(real_subject: Any) -> None:
    file = ROOT / "docs" / "examples" / "ioi-variations.jsonl"
    first = json.loads(file.read_text("utf-8").splitlines()[0])
    spec = ExplainSpec(prompt=first["clean"], corrupt=first["corrupt"], vary=file)
    assert len(read_inputs(ModelText(real_subject), spec).variations) >= 16


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
    assert [block.title for block in blocks(page)] == ["", "indented", "", "", ""]


def test_a_fence_left_open_is_refused() -> None:
    with pytest.raises(ValueError, match="line 2"):
        blocks("text\n```python\nx = 1\n")


def test_a_failure_points_into_the_page(tmp_path: Path) -> None:
    page = tmp_path / "page.md"
    page.write_text("# Title\n\n```python\nx = 1\n```\n\nMore.\n\n```python\nassert x == 2\n```\n")
    with pytest.raises(AssertionError) as failure:
        run(page, python_blocks(page))
    assert (str(failure.traceback[-1].path), failure.traceback[-1].lineno + 1) == (str(page), 10)
