"""Which run this thread (or task) is in the middle of."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any

CURRENT: ContextVar[Any] = ContextVar("assay_run", default=None)
"""The current `RunState`, or None; hooks of every other run stay silent."""


@contextmanager
def no_run() -> Iterator[None]:
    """Leave the current run while code of the user's is called: what that code does with the module is its own."""
    token = CURRENT.set(None)
    try:
        yield
    finally:
        CURRENT.reset(token)
