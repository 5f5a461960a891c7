"""A virtual environment for each peer, made once and kept."""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).parent.parent.parent


@dataclass(frozen=True, slots=True, kw_only=True)
class Peer:
    """A library to compare with: its name in tables, what pip is asked for, and the distribution's name."""

    name: str
    requirement: str
    distribution: str


PEERS = {
    "transformerlens": Peer(
        name="TransformerLens", requirement="transformer-lens>=4,<5", distribution="transformer-lens"
    ),
    "nnsight": Peer(name="nnsight", requirement="nnsight>=0.8,<0.9", distribution="nnsight"),
}
"""Engines, of runs and sweeps."""

DICTIONARY_PEERS = {
    "sae-lens": Peer(name="SAELens", requirement="sae-lens==6.54.0", distribution="sae-lens"),
    "dictionary-learning": Peer(
        name="dictionary_learning", requirement="dictionary-learning==0.1.0", distribution="dictionary-learning"
    ),
    "eai-sparsify": Peer(name="sparsify", requirement="eai-sparsify==1.3.3", distribution="eai-sparsify"),
    "circuit-tracer": Peer(name="circuit-tracer", requirement="circuit-tracer==0.5.0", distribution="circuit-tracer"),
}
"""Trainers and readers of dictionaries; a file format is checked against the version named here."""


class NotInstalled(Exception):
    """pip could not make a peer's environment."""


def torch_requirement() -> str:
    """The torch that constraints.txt names: asked for first and exactly, so that a local CPU build of it is taken."""
    found = re.search(r"^torch==\S+", (ROOT / "constraints.txt").read_text("utf-8"), re.MULTILINE)
    if found is None:
        raise SystemExit("constraints.txt names no torch")
    return found[0]


def environment(key: str, folder: Path, *, fresh: bool = False) -> Path:
    """The python of a peer's own environment, made with plain pip where it is not there yet.

    Args:
        key: A key of `PEERS` or of `DICTIONARY_PEERS`.
        folder: Where environments are kept, one folder each.
        fresh: Make it again.

    Raises:
        NotInstalled: With the last lines of what pip said.
    """
    peer, venv = (PEERS | DICTIONARY_PEERS)[key], folder / key
    python = venv / ("Scripts/python.exe" if sys.platform == "win32" else "bin/python")
    ready = venv / ".ready"
    wanted = f"{torch_requirement()}\n{peer.requirement}\n"
    if not fresh and ready.is_file() and ready.read_text("utf-8") == wanted:
        return python
    shutil.rmtree(venv, ignore_errors=True)
    folder.mkdir(parents=True, exist_ok=True)
    try:
        _run([sys.executable, "-m", "venv", str(venv)])
        pip = [str(python), "-m", "pip"]
    except NotInstalled:  # a python without ensurepip (Debian's, say): the pip that runs this installs from outside
        shutil.rmtree(venv, ignore_errors=True)
        _run([sys.executable, "-m", "venv", "--without-pip", str(venv)])
        pip = [sys.executable, "-m", "pip", "--python", str(python)]
    for requirement in (torch_requirement(), peer.requirement):
        _run([*pip, "install", "--quiet", "--disable-pip-version-check", requirement])
    # A torchvision built for another torch breaks transformers; nothing here needs one.
    _run([*pip, "uninstall", "--quiet", "--yes", "torchvision", "torchaudio"])
    ready.write_text(wanted, encoding="utf-8")
    return python


def _run(command: list[str]) -> None:
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        lines = [line for line in (done.stderr + done.stdout).splitlines() if line.strip()]
        errors = [line for line in lines if "error" in line.lower()] or lines
        raise NotInstalled(" / ".join(errors[-2:])[:500] or f"{' '.join(command[:4])} failed")
