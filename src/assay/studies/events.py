"""What a running study tells whoever watches it: plain values, the same for a terminal, a web page and an agent."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

from assay.base.method import Plan

EventKind = Literal["phase", "plan", "start", "progress", "finish", "cached", "notice", "done"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Event:
    """One thing that happened.

    Attributes:
        kind: `phase` (work outside the steps: loading), `plan` (known before anything runs), `start`, `progress`,
            `finish` and `cached` (of the step `step`), `notice` (the cache was damaged, and the like), `done`.
        step: The step's name.
        index: The step's place in the plan, from 1; 0 for work outside the steps.
        count: The number of steps planned.
        done: Units of work finished, of `total`.
        total: Units of work; 0 when unknown.
        message: Text for the reader.
        seconds: What the step took; for `cached`, what it took when it was computed.
        plan: With `plan`.
    """

    kind: EventKind
    step: str = ""
    index: int = 0
    count: int = 0
    done: int = 0
    total: int = 0
    message: str = ""
    seconds: float = 0.0
    plan: Plan | None = None


Watcher = Callable[[Event], None]
"""Receives events on the thread that runs the study; may raise `Cancelled` to stop it."""


def ignore(event: Event) -> None:
    """Watch nothing."""
