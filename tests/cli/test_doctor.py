"""`assay doctor` reads what is needed from the installed distribution, and says what mends what is missing."""

from __future__ import annotations

import importlib.metadata
import json
from pathlib import Path

import numpy as np
import pytest
import torch

from assay.cli.doctor import doctor, facts, packages
from assay.cli.main import main

NAME = "assay-probe"
CORE = ["numpy>=1.0", "rich (>=10)"]
EXTRAS = [
    "No.Such_Package>=2; extra == 'web'",
    'no-such-package>=2; python_version >= "3.0" and extra == "all"',
    "pydantic[email]<1 ; extra == 'old'",
    "numpy>=1.0; extra == 'web'",
    "assay-probe[web,old]; extra == 'all'",
]


@pytest.fixture
def install(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> object:
    """Put a distribution with these requirements on the path."""

    def put(requirements: list[str]) -> None:
        folder = tmp_path / "assay_probe-1.0.dist-info"
        folder.mkdir()
        lines = ["Metadata-Version: 2.1", f"Name: {NAME}", "Version: 1.0"]
        lines += [f"Requires-Dist: {requirement}" for requirement in requirements]
        (folder / "METADATA").write_text("\n".join(lines) + "\n")
        monkeypatch.syspath_prepend(str(tmp_path))

    return put


def test_packages_come_from_the_distribution(install) -> None:
    install(CORE + EXTRAS)
    found = {package.name: package for package in packages(NAME) or ()}
    assert set(found) == {"numpy", "rich", "no-such-package", "pydantic"}
    assert (found["numpy"].core, found["numpy"].installed, found["numpy"].state) == (True, np.__version__, "ok")
    assert (found["rich"].wanted, found["rich"].state) == (">=10", "ok")
    missing = found["no-such-package"]
    assert (missing.core, missing.installed, missing.extras) == (False, None, ("all", "web"))
    assert missing.state == 'missing: pip install "assay[all]"'
    old = found["pydantic"]
    assert not old.fits
    assert old.state == f'{importlib.metadata.version("pydantic")} does not fit <1: pip install "assay[old]"'


def test_an_uninstalled_distribution_is_unknown() -> None:
    assert packages("assay-that-is-not-installed") is None
    assert facts("assay-that-is-not-installed")["installed"] is False


@pytest.mark.parametrize(
    ("requirements", "code"), [(CORE + EXTRAS, 0), ([*CORE, "no-such-package"], 1), ([*CORE, "numpy>=99"], 1)]
)
def test_the_exit_code_is_about_the_core(install, requirements: list[str], code: int, capsys) -> None:
    install(requirements)
    assert doctor(as_json=False, distribution=NAME) == code
    assert "no-such-package" in capsys.readouterr().out or "numpy>=99" in requirements


def test_the_report_is_true(capsys, home: Path, tmp_path: Path) -> None:
    (home / "models").mkdir(parents=True)
    (home / "models" / "weights").write_bytes(b"w" * 2048)
    assert main(["doctor", "--json"]) == 0
    report = json.loads(capsys.readouterr().out)
    assert report["torch"]["version"] == torch.__version__
    assert report["torch"]["threads"] == torch.get_num_threads()
    assert (report["cache"]["folder"], report["cache"]["bytes"]) == (str(home), 2048)
    assert report["cache"]["writable"] is True
    assert main(["doctor"]) == 0
    shown = capsys.readouterr().out
    assert torch.__version__ in shown
    assert "2.0 KiB used" in shown


def test_everything_the_project_asks_for_is_listed() -> None:
    listed = packages()
    if listed is None:
        pytest.skip("assay runs from its source: there is no distribution to read")
    named = {package.name for package in listed}
    assert {"torch", "transformers", "tyro", "rich", "pydantic", "safetensors", "pyarrow"} <= named
    assert {package.name: package.extras for package in listed}["gguf"] == ("gguf",)
