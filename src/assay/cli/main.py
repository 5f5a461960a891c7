"""The command `assay`: reads the arguments, runs the command, and turns errors into one message and an exit code.

Exit codes: 0 done, 1 a core package is missing (`doctor`), the output could not be printed or a bug, 2 the user's
input or the machine prevented it, 130 stopped with Ctrl-C.
"""

from __future__ import annotations

import contextlib
import errno
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:  # what takes time to import is imported where Ctrl-C is caught
    from assay.cli.commands import Command

EXIT_UNPRINTED = 1
EXIT_USER = 2
EXIT_STOPPED = 130

_UNPRINTED = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EIO, errno.EBADF}
"""What the system says of a standard output that takes no more; every other file that fails is an `OutputError`."""

_DESCRIPTION = """Find out what a neural network has learned, and whether to believe it.

Every command for a method takes the same options for the model, the output folder and the cache; "assay plan" before it
shows what it would cost. "assay --version" prints the version."""


def _busy() -> bool:
    """Whether other work keeps this machine busy.

    Threads that wait for each other are quicker when they spin (`assay explain` on two quiet cores: 159 s, against
    203 s when they sleep), but beside other work spinning more than doubles the time of a run.
    """
    try:
        return os.getloadavg()[0] > 0.75 * (os.cpu_count() or 1)
    except (AttributeError, OSError):  # a system that keeps no such figure
        return False


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line and return its exit code.

    Args:
        arguments: What follows `assay`; the arguments of the process by default.
    """
    if _busy():  # said before torch is imported, which reads it once
        os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    given = list(sys.argv[1:] if arguments is None else arguments)
    if sys.stderr is None:
        sys.stderr = Path(os.devnull).open("w", encoding="utf-8")  # for as long as the process lives
    if sys.stdout is None:
        sys.stderr.write("error: standard output is closed, and the result could not be printed\n")
        return EXIT_UNPRINTED
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="replace")  # a terminal that cannot show a token must not end the run
    try:
        code = _run(given)
        sys.stdout.flush()
    except BrokenPipeError:  # the reader of our output went away, as `head` does
        _print_nowhere()
        return 0
    except OSError as error:
        if error.errno not in _UNPRINTED:
            raise
        _print_nowhere()
        sys.stderr.write(f"error: the result could not be printed: {error.strerror}\n")
        return EXIT_UNPRINTED
    return code


def _print_nowhere() -> None:
    """Send what is still to be printed where it cannot fail, so that the process can end."""
    with contextlib.suppress(OSError):
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def _run(given: list[str]) -> int:
    if given in (["--version"], ["-V"]):
        from assay.base.version import __version__

        sys.stdout.write(f"assay {__version__}\n")
        return 0
    command: Command | None = None
    try:
        from assay.cli.commands import Command, build_app

        parsed = build_app().cli(prog="assay", description=_DESCRIPTION, args=given or ["--help"])
        if not isinstance(parsed, Command):
            raise TypeError(f"a command line became {type(parsed).__name__}")
        command = parsed
        return command.run()
    except KeyboardInterrupt:
        return _stopped(command)
    except SystemExit as stop:  # raised by the argument parser, which has said why
        return stop.code if isinstance(stop.code, int) else 0 if stop.code is None else EXIT_USER
    except Exception as error:
        return _failed(error, command, given)


def _stopped(command: Command | None) -> int:
    kept = "" if command is None else command.stopped()
    sys.stderr.write(f"\nStopped. {kept}".rstrip() + "\n")
    return EXIT_STOPPED


def _failed(error: Exception, command: Command | None, given: Sequence[str]) -> int:
    """Say what went wrong in one message; what is no error of assay's own is raised again."""
    from assay.base.errors import AssayError, Cancelled

    if isinstance(error, Cancelled):
        return _stopped(command)
    if not isinstance(error, AssayError):
        raise error
    from rich.console import Console
    from rich.markup import escape
    from rich.traceback import Traceback

    console = Console(stderr=True, highlight=False, soft_wrap=True)
    if _wants_traceback(given):
        console.print(Traceback.from_exception(type(error), error, error.__traceback__, show_locals=False))
    console.print(f"[bold red]error:[/bold red] {escape(str(error))}")
    return EXIT_USER


def _wants_traceback(arguments: Sequence[str]) -> bool:
    return "--traceback" in arguments or os.environ.get("ASSAY_DEBUG", "") not in {"", "0"}
