"""Shell completion: the script for a shell, and how to install it."""

from __future__ import annotations

import contextlib
import sys
import tempfile
from pathlib import Path

from rich.console import Console

from assay.cli.commands import build_app

INSTALL = {
    "bash": "assay completion bash > ~/.local/share/bash-completion/completions/assay   (then open a new shell)",
    "zsh": "assay completion zsh > ~/.zfunc/_assay   (with fpath+=~/.zfunc before compinit in ~/.zshrc)",
    "fish": "assay completion fish > ~/.config/fish/completions/assay.fish   (then open a new shell)",
}
"""How to install the script of each shell."""


def completion_script(shell: str) -> str:
    """Return the script that completes `assay` in `shell`.

    Args:
        shell: `bash`, `zsh` or `fish`.
    """
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "script"
        with contextlib.suppress(SystemExit):
            build_app().cli(prog="assay", args=["--tyro-write-completion", shell, str(path)])
        return path.read_text(encoding="utf-8")


def completion(shell: str) -> int:
    """Print the script on standard output, and how to install it on standard error."""
    sys.stdout.write(completion_script(shell))
    Console(stderr=True, highlight=False, soft_wrap=True).print(
        f"To install: mkdir -p the folder, then\n  {INSTALL[shell]}", markup=False
    )
    return 0
