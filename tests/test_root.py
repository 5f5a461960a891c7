"""The root package is small, sorted and light: `import assay` is cheap until a subject is loaded."""

from __future__ import annotations

import importlib.metadata
import pkgutil
import subprocess
import sys
from pathlib import Path

import pytest

import assay

HEAVY = {"torch", "transformers", "scipy", "pyarrow", "pandas"}
#: What must be importable without torch: it plans, answers from the cache and prints help.
LIGHT = ("assay.base", "assay.studies", "assay.cli", "assay.explain.spec", "assay.explain.method")


def loaded_after(code: str) -> set[str]:
    """Top-level names in `sys.modules` of a fresh interpreter after it ran `code`."""
    report = "import sys; print(*sorted({name.partition('.')[0] for name in sys.modules}))"
    done = subprocess.run([sys.executable, "-c", f"{code}\n{report}"], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return set(done.stdout.split())


def modules_under(name: str) -> list[str]:
    """The module, and all modules below it when it is a package."""
    path = Path(assay.__file__).parent.joinpath(*name.split(".")[1:])
    found = pkgutil.walk_packages([str(path)], prefix=f"{name}.") if path.is_dir() else ()
    return [name, *(module.name for module in found if not module.name.endswith("__main__"))]


def test_the_list_of_names_is_short_sorted_and_true() -> None:
    assert assay.__all__ == sorted(assay.__all__)
    assert len(assay.__all__) == len(set(assay.__all__)) <= 25
    missing = [name for name in assay.__all__ if not hasattr(assay, name)]
    assert not missing
    assert set(assay.__all__) <= set(dir(assay))


def test_an_unknown_name_is_an_attribute_error() -> None:
    with pytest.raises(AttributeError, match="no_such_name"):
        assay.no_such_name  # noqa: B018


def test_import_is_light() -> None:
    assert not loaded_after("import assay") & HEAVY


def test_the_version_is_the_installed_one() -> None:
    assert assay.__version__ == importlib.metadata.version("assay")


@pytest.mark.parametrize("name", LIGHT)
def test_planning_and_answering_need_no_torch(name: str) -> None:
    code = "\n".join(f"import {module}" for module in modules_under(name))
    assert not loaded_after(code) & {"torch", "transformers"}
