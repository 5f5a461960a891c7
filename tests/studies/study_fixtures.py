"""A real method, a real tiny model in a folder, and a clean home for the tests of studies and of the command line."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import tally

from assay.base import method as registry

HERE = Path(__file__).parent
ENTRY = registry._METHODS.pop(tally.tally.__name__)  # registered for the tests that ask for it, not for every test
RUN = """
import signal, sys, tally
from assay.cli.main import main
signal.signal(signal.SIGINT, signal.default_int_handler)  # a background job of a shell starts with Ctrl-C ignored
sys.exit(main(sys.argv[1:]))
"""


@pytest.fixture
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, assay_home: Path) -> Path:
    """A cache of this test's own."""
    folder = tmp_path / "home"
    monkeypatch.setenv("ASSAY_HOME", str(folder))
    return folder


@pytest.fixture
def method(monkeypatch: pytest.MonkeyPatch) -> registry.Method:
    """The method `tally`, registered while the test runs."""
    monkeypatch.setitem(registry._METHODS, ENTRY.name, ENTRY)
    return ENTRY


@pytest.fixture
def log(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[], list[str]]:
    """What was computed so far: the names of the steps, over all processes."""
    path = tmp_path / "computed.log"
    monkeypatch.setenv("TALLY_LOG", str(path))
    return lambda: path.read_text().split() if path.exists() else []


@pytest.fixture(scope="session")
def model_folder(tmp_path_factory: pytest.TempPathFactory, tiny_module: Any, tiny_tokenizer: Any) -> Path:
    """A tiny Llama as transformers saves it."""
    folder = tmp_path_factory.mktemp("tiny-llama")
    tiny_module("llama").save_pretrained(folder)
    tiny_tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture
def start(home: Path) -> Callable[..., subprocess.Popen[str]]:
    """Start the command line with `tally` in a process of its own."""

    def begin(*arguments: object, **environment: str) -> subprocess.Popen[str]:
        path = os.pathsep.join([str(HERE), *filter(None, [os.environ.get("PYTHONPATH")])])
        return subprocess.Popen(
            [sys.executable, "-c", RUN, *map(str, arguments)],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            env={**os.environ, "PYTHONPATH": path, "OMP_NUM_THREADS": "1", **environment},
        )

    return begin


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A real file system of 2 MiB."""
    folder = tmp_path / "disk"
    folder.mkdir()
    done = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=2m", "tmpfs", folder], capture_output=True, check=False)
    if done.returncode:
        pytest.skip(f"a small disk cannot be mounted here: {done.stderr.decode().strip()}")
    yield folder
    subprocess.run(["umount", folder], check=True)
