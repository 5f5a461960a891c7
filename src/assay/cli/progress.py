"""Progress on standard error: two bars in a terminal that can draw them, plain lines elsewhere."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Iterator

from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.text import Text

from assay.base.method import Plan
from assay.cli.present import second_text
from assay.studies.events import Event, Watcher

_LINE_SECONDS = 5.0
"""A step says where it is this often where there is no terminal."""


@contextlib.contextmanager
def watching(title: str, *, quiet: bool, console: Console | None = None) -> Iterator[Watcher]:
    """Give a watcher that shows a study's progress, and take its bars away at the end.

    Args:
        title: What is running.
        quiet: Show notices only.
        console: Where; standard error by default.
    """
    console = console or Console(stderr=True, highlight=False)
    if quiet:
        yield lambda event: _notice(console, event)
    elif console.is_terminal and not console.is_dumb_terminal:
        with _Bars(title, console) as bars:
            yield bars
    else:
        yield _Lines(title, console)


def _notice(console: Console, event: Event) -> None:
    if event.kind == "notice":
        console.print(f"[yellow]note:[/yellow] {escape(event.message)}", soft_wrap=True)


def _weights(plan: Plan) -> dict[int, float]:
    """Return each step's share of the work still to do: its expected seconds, or 1 where none are given."""
    known = any(planned.step.seconds for planned in plan.remaining)
    return {
        place: 0.0 if planned.cached else (planned.step.seconds if known else 1.0)
        for place, planned in enumerate(plan.steps, start=1)
    }


class _Bars:
    """One bar for the study and one for the step that runs; finished steps stay as lines above them."""

    def __init__(self, title: str, console: Console) -> None:
        self._title, self._console = title, console
        self._bars = Progress(
            TextColumn("{task.description}"),
            BarColumn(),
            TaskProgressColumn(),
            TimeElapsedColumn(),
            TimeRemainingColumn(),
            console=console,
            transient=True,
        )
        self._all = self._bars.add_task(title, total=None)
        self._step = self._bars.add_task("", total=None, visible=False)
        self._shares: dict[int, float] = {}
        self._finished = 0.0

    def __enter__(self) -> _Bars:
        self._bars.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._bars.stop()

    def __call__(self, event: Event) -> None:
        place = f"[{event.index}/{event.count}]"
        if event.kind == "phase":
            self._bars.update(self._all, description=escape(f"{self._title}: {event.message}"), refresh=True)
        elif event.kind == "plan" and event.plan is not None:
            self._shares = _weights(event.plan)
            self._bars.update(self._all, total=sum(self._shares.values()) or None)
        elif event.kind == "start":
            self._bars.update(self._all, description=escape(f"{self._title} {place}"))
            self._bars.reset(self._step, total=None, visible=True, description=escape(event.step))
        elif event.kind == "progress":
            label = f"{event.step}: {event.message}" if event.message else event.step
            self._bars.update(self._step, completed=event.done, total=event.total or None, description=escape(label))
            part = event.done / event.total if event.total else 0.0
            self._bars.update(self._all, completed=self._finished + part * self._shares.get(event.index, 0.0))
        elif event.kind in {"finish", "cached"}:
            self._finished += self._shares.get(event.index, 0.0) if event.kind == "finish" else 0.0
            self._bars.update(self._all, completed=self._finished)
            self._bars.update(self._step, visible=False)
            self._bars.console.print(Text(_finished_line(event), style="dim"))
        else:
            _notice(self._bars.console, event)


class _Lines:
    """A line when a step ends, when one begins that will take a while, and every few seconds in between."""

    def __init__(self, title: str, console: Console) -> None:
        self._title, self._console = title, console
        self._seconds: dict[int, float] = {}
        self._last = 0.0

    def __call__(self, event: Event) -> None:
        place = f"[{event.index}/{event.count}] {event.step}"
        if event.kind == "phase":
            self._say(event.message)
        elif event.kind == "plan" and event.plan is not None:
            self._seconds = {index: planned.step.seconds for index, planned in enumerate(event.plan.steps, start=1)}
        elif event.kind == "start":
            self._last = time.monotonic()
            if self._seconds.get(event.index, _LINE_SECONDS) >= _LINE_SECONDS:
                self._say(f"{place} ...")
        elif event.kind == "progress":
            if time.monotonic() - self._last < _LINE_SECONDS:
                return
            self._last = time.monotonic()
            share = f"{event.done}/{event.total}" if event.total else str(event.done)
            self._say(f"{place}: {share} {event.message}".rstrip())
        elif event.kind in {"finish", "cached"}:
            self._say(_finished_line(event))
        else:
            _notice(self._console, event)

    def _say(self, text: str) -> None:
        self._console.print(f"{self._title}: {text}", markup=False, soft_wrap=True)


def _finished_line(event: Event) -> str:
    how = "from the cache" if event.kind == "cached" else f"done in {second_text(event.seconds)}"
    return f"[{event.index}/{event.count}] {event.step}: {how}"
