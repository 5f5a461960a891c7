"""Imports only go down the floors, siblings never meet, and modules and functions stay short."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

SRC = Path(__file__).parent.parent / "src"
MODULES = sorted((SRC / "assay").rglob("*.py"))

FLOORS = (
    ("base",),
    ("subjects", "zoo"),
    ("activations",),
    ("controls",),
    ("circuits", "dictionaries", "directions"),
    ("explain",),
    ("evals", "redteam", "guard"),
    ("studies",),
    ("cli", "web", "mcp"),
)
FLOOR = {package: floor for floor, packages in enumerate(FLOORS) for package in packages}
ROOF = len(FLOORS)  # assay/__init__.py and assay/__main__.py see everything; nothing sees them

MAX_MODULE, MAX_FUNCTION = 500, 60
LONGER: frozenset[str] = frozenset()  # "assay.x.y" or "assay.x.y:function": a reason beside each; kept empty


def dotted(path: Path) -> str:
    """`src/assay/base/stats.py` is `assay.base.stats`; a package is its folder."""
    parts = path.relative_to(SRC).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def package_of(module: str) -> str:
    """The package that decides a module's floor: `base` for `assay.base.stats`, empty for the roof."""
    parts = module.split(".")
    return parts[1] if len(parts) > 1 and (SRC / "assay" / parts[1]).is_dir() else ""


def imports(path: Path) -> Iterator[tuple[int, str]]:
    """Each assay module that a file names in an import, at any depth, under any condition: (line, module)."""
    package = dotted(path) if path.name == "__init__.py" else dotted(path).rpartition(".")[0]
    for node in ast.walk(ast.parse(path.read_text("utf-8"))):
        found: list[str] = []
        if isinstance(node, ast.Import):
            found = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            base = package.rsplit(".", node.level - 1)[0] if node.level else ""
            source = ".".join(part for part in (base, node.module) if part)
            found = [f"{source}.{alias.name}" for alias in node.names] if source == "assay" else [source]
        elif isinstance(node, ast.Call) and ast.unparse(node.func).rpartition(".")[2] in (
            "import_module",
            "__import__",
        ):
            found = [argument.value for argument in node.args if isinstance(argument, ast.Constant)]
        yield from ((node.lineno, name) for name in found if name.split(".")[0] == "assay")


def complaint(importer: str, imported: str) -> str | None:
    """Why `importer` (a package) may not import from `imported` (a package), or None."""
    here, there = FLOOR.get(importer, ROOF), FLOOR.get(imported, ROOF)
    if importer == imported or here > there:
        return None
    if there == ROOF:
        return "nothing imports the root package: it stands on top"
    return "siblings on a floor never import each other" if here == there else f"floor {there} is above floor {here}"


@pytest.mark.parametrize("path", MODULES, ids=dotted)
def test_imports_go_down(path: Path) -> None:
    importer = package_of(dotted(path))
    assert not importer or importer in FLOOR, f"assay.{importer} has no floor yet: give it one in {__file__}"
    wrong = [
        f"{path.relative_to(SRC.parent)}:{line} imports {name}: {reason}"
        for line, name in imports(path)
        if (reason := complaint(importer, package_of(name)))
    ]
    assert not wrong, "\n".join(wrong)


@pytest.mark.parametrize("path", MODULES, ids=dotted)
def test_modules_and_functions_are_short(path: Path) -> None:
    text = path.read_text("utf-8")
    name = dotted(path)
    functions = [node for node in ast.walk(ast.parse(text)) if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)]
    lengths = [(name, len(text.splitlines()), MAX_MODULE)]
    lengths += [(f"{name}:{node.name}", lines_of(node), MAX_FUNCTION) for node in functions]
    long = [f"{what}: {n} lines, {most} at most" for what, n, most in lengths if n > most and what not in LONGER]
    assert not long, "\n".join(long)


def lines_of(function: ast.FunctionDef | ast.AsyncFunctionDef) -> int:
    """Lines from `def` to the end, its docstring not counted: explaining well costs nothing."""
    first = function.body[0]
    documented = ast.get_docstring(function, clean=False) is not None
    return _span(function) - (_span(first) if documented else 0)


def _span(node: ast.stmt) -> int:
    return (node.end_lineno or node.lineno) - node.lineno + 1


@pytest.mark.parametrize(
    ("importer", "imported", "allowed"),
    [
        ("circuits", "activations", True),
        ("circuits", "circuits", True),
        ("", "cli", True),
        ("base", "subjects", False),
        ("circuits", "directions", False),
        ("subjects", "zoo", False),
        ("cli", "", False),
    ],
)
def test_the_rule_itself(importer: str, imported: str, allowed: bool) -> None:
    assert (complaint(importer, imported) is None) == allowed


def test_hidden_imports_are_seen(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(f"{__name__}.SRC", tmp_path)
    path = tmp_path / "assay" / "base" / "x.py"
    path.parent.mkdir(parents=True)
    path.write_text(
        "from typing import TYPE_CHECKING\n"
        "if TYPE_CHECKING:\n    from assay.cli import main\n"
        "def f():\n    from assay import circuits\n    from ..explain import job\n    import_module('assay.studies')\n"
        "import assay.base.y, torch\n"
    )
    assert [name for _, name in sorted(imports(path))] == [
        "assay.cli",
        "assay.circuits",
        "assay.explain",
        "assay.studies",
        "assay.base.y",
    ]


def test_docstrings_do_not_count() -> None:
    source = 'def f():\n    """One.\n\n    Two.\n    """\n    return (\n        1\n    )\n'
    function = ast.parse(source).body[0]
    assert isinstance(function, ast.FunctionDef)
    assert lines_of(function) == 4
