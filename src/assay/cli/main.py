"""The command `assay`: reads the arguments, runs the command, and turns errors into one message and an exit code.

Exit codes: 0 done, 1 a core package is missing (`doctor`) or a bug, 2 the user's input or the machine prevented it,
130 stopped with Ctrl-C.
"""

from __future__ import annotations

import contextlib
import os
import sys
from collections.abc import Sequence

from rich.console import Console
from rich.markup import escape
from rich.traceback import Traceback

from assay.base.errors import AssayError, Cancelled
from assay.base.version import __version__
from assay.cli.commands import Command, build_app

EXIT_USER = 2
EXIT_STOPPED = 130

_DESCRIPTION = """Find out what a neural network has learned, and whether to believe it.

Every command for a method takes the same options for the model, the output folder and the cache; "assay plan" before it
shows what it would cost. "assay --version" prints the version."""


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line and return its exit code.

    Args:
        arguments: What follows `assay`; the arguments of the process by default.
    """
    given = list(sys.argv[1:] if arguments is None else arguments)
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="replace")  # a terminal that cannot show a token must not end the run
    try:
        code = _run(given)
        sys.stdout.flush()
    except BrokenPipeError:  # the reader of our output went away, as `head` does
        with contextlib.suppress(OSError):
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    return code


def _run(given: list[str]) -> int:
    if given in (["--version"], ["-V"]):
        sys.stdout.write(f"assay {__version__}\n")
        return 0
    console = Console(stderr=True, highlight=False, soft_wrap=True)
    command: Command | None = None
    try:
        command = build_app().cli(prog="assay", description=_DESCRIPTION, args=given or ["--help"])
        if not isinstance(command, Command):
            raise TypeError(f"a command line became {type(command).__name__}")
        return command.run()
    except (KeyboardInterrupt, Cancelled):
        kept = "" if command is None else command.stopped()
        console.print(f"\n[bold]Stopped.[/bold] {escape(kept)}".rstrip())
        return EXIT_STOPPED
    except AssayError as error:
        if _wants_traceback(given):
            console.print(Traceback(show_locals=False))
        console.print(f"[bold red]error:[/bold red] {escape(str(error))}")
        return EXIT_USER
    except SystemExit as stop:  # raised by the argument parser, which has said why
        return stop.code if isinstance(stop.code, int) else 0 if stop.code is None else EXIT_USER


def _wants_traceback(arguments: Sequence[str]) -> bool:
    return "--traceback" in arguments or os.environ.get("ASSAY_DEBUG", "") not in {"", "0"}
