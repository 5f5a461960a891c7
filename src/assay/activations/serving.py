"""Limits on what runs may take: seconds, bytes, and a way to stop them. For servers, and for anyone in a hurry.

    with assay.limits(seconds=10, max_bytes=200_000_000, cancel=event):
        subject.run(prompt, capture="blocks.*.resid_post")

Limits belong to the thread (or asyncio task) that set them and hold for all that it does inside: runs, generation,
streams, sweeps, and methods built on them. They are looked at before each block of the model, at each site that is
read or edited, and between tokens and groups of a sweep. A run that is stopped leaves no hook behind.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, field, replace
from typing import Any

from torch import Tensor

from assay.activations.current import CURRENT
from assay.base.errors import Cancelled, SpecError

_LIMITS: ContextVar[Limits | None] = ContextVar("assay_limits", default=None)


@dataclass(frozen=True, slots=True, kw_only=True)
class Limits:
    """What holds for the runs of this thread or task; see `limits`.

    Args:
        deadline: The moment of `time.monotonic` after which no run goes on.
        seconds: How long that was when it was set, for the message.
        max_bytes: The largest number of bytes that one run may keep.
        cancelled: Each says whether runs should stop.
    """

    deadline: float | None = None
    seconds: float | None = None
    max_bytes: int | None = None
    cancelled: tuple[Callable[[], bool], ...] = ()

    def check(self) -> None:
        """Stop a run that should not go on.

        Raises:
            Cancelled: If it was cancelled or its time is up.
        """
        if any(stop() for stop in self.cancelled):
            raise Cancelled("the run was cancelled")
        if self.deadline is not None and time.monotonic() > self.deadline:
            raise Cancelled(f"the run took longer than its limit of {self.seconds:g} s")


@contextmanager
def limits(
    *, seconds: int | float | None = None, max_bytes: int | None = None, cancel: Callable[[], bool] | Any = None
) -> Iterator[Limits]:
    """Limit all runs made inside, in this thread or asyncio task.

    Limits inside limits: both hold.

    Args:
        seconds: The time from now after which runs stop.
        max_bytes: The largest number of bytes that one run may keep: captured tensors, gradients and logits. It is
            refused before the model runs where shapes tell, and otherwise at the capture that is too much.
        cancel: A function that says whether to stop, or an event (`threading.Event`); it is asked often, so it
            should be quick.

    Raises:
        SpecError: If a limit is not a positive number, or `cancel` is neither.
        Cancelled: From the run that is stopped.

    Example:
        >>> with limits(max_bytes=1000):  # holds for what subject does inside
        ...     run = subject.run("When Mary and John", capture="blocks.*.resid_post")
        Traceback (most recent call last):
        ...
        assay.base.errors.SpecError: this run would keep 5,120 bytes of captures and logits, and the limit is 1,000: ...
    """
    for name, value in (("seconds", seconds), ("max_bytes", max_bytes)):
        number = isinstance(value, int | float) and not isinstance(value, bool)
        if value is not None and not (number and value > 0 and math.isfinite(value)):
            raise SpecError(f"{name}={value!r}: a positive number", name)
    stop = getattr(cancel, "is_set", cancel)
    if stop is not None and not callable(stop):
        raise SpecError(f"cancel={cancel!r}: a function or an event is needed", "cancel")
    outer = _LIMITS.get() or Limits()
    deadline = math.inf if seconds is None else time.monotonic() + seconds
    later = outer.deadline is not None and outer.deadline <= deadline
    sizes = [size for size in (outer.max_bytes, max_bytes) if size is not None]
    inner = Limits(
        deadline=outer.deadline if later else (None if seconds is None else deadline),
        seconds=outer.seconds if later else (None if seconds is None else float(seconds)),
        max_bytes=int(min(sizes)) if sizes else None,
        cancelled=(*outer.cancelled, *(() if stop is None else (stop,))),
    )
    token = _LIMITS.set(inner)
    try:
        yield inner
    finally:
        _LIMITS.reset(token)


@contextmanager
def any_size() -> Iterator[None]:
    """Lift the limit on bytes for a look at one token; the others stay."""
    found = _LIMITS.get()
    token = _LIMITS.set(None if found is None else replace(found, max_bytes=None))
    try:
        yield
    finally:
        _LIMITS.reset(token)


@dataclass(slots=True)
class Guard:
    """Holds one run to the limits that were set where it began.

    Args:
        limits: The limits.
        kept: The bytes kept so far, each storage once.
    """

    limits: Limits
    kept: int = 0
    _seen: dict[int, Any] = field(default_factory=dict)

    def check(self) -> None:
        """Stop a run that should not go on."""
        self.limits.check()

    def keep(self, name: str, tensor: Tensor) -> None:
        """Count what is kept: the whole storage that a tensor is a view of, once.

        Raises:
            SpecError: If it is more than the run may keep.
        """
        if self.limits.max_bytes is None:
            return
        storage = tensor.untyped_storage()
        if storage.data_ptr() in self._seen:
            return
        self._seen[storage.data_ptr()] = storage  # kept alive, so no other tensor gets its address
        self.kept += storage.nbytes()
        if self.kept > self.limits.max_bytes:
            raise SpecError(
                f"with {name!r} this run keeps {self.kept:,} bytes, and the limit is {self.limits.max_bytes:,}: "
                f"capture fewer sites, fewer prompts or shorter ones",
                "capture",
            )

    def forget(self) -> None:
        """Start counting again: what was kept is not kept any more."""
        self.kept = 0
        self._seen.clear()

    def plan(self, size: int | None) -> None:
        """Refuse a run that is known to keep too much.

        Raises:
            SpecError: If `size` is more than it may keep.
        """
        if size is not None and self.limits.max_bytes is not None and size > self.limits.max_bytes:
            raise SpecError(
                f"this run would keep {size:,} bytes of captures and logits, and the limit is "
                f"{self.limits.max_bytes:,}: capture fewer sites, fewer prompts or shorter ones",
                "capture",
            )


def guard() -> Guard | None:
    """A guard for a run that begins now, or None where nothing is limited."""
    found = _LIMITS.get()
    return None if found is None else Guard(found)


def watch(state: Any, model: Any) -> list[Any]:
    """Hook a model's blocks (or the innermost modules of one without) so that a guarded run is looked at before each.

    Args:
        state: The run, with its guard (`state.limited`).
        model: The subject.

    Returns:
        The handles of the hooks; none for a run without limits.
    """
    found: Guard | None = state.limited
    if found is None:
        return []

    def hook(*_: Any) -> None:
        if CURRENT.get() is state:
            found.check()

    modules = [block for parts in model.stacks.values() for block in parts.blocks] if model.architecture else []
    modules = modules or [module for module in model.module.modules() if not any(module.children())]
    return [module.register_forward_pre_hook(hook) for module in modules]
