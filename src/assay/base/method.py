"""The registry of methods, and the values a method and a study exchange: steps, plans, progress and the context.

A method is a function `fn(subject, spec, ctx) -> Findings` with a pydantic spec. Registering it is all it takes to give
it a command, a plan, a cache and a page; every door is generated from what is registered here.
"""

from __future__ import annotations

import importlib
import inspect
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol, TypeVar, runtime_checkable

from assay.base.errors import SpecError, nearest
from assay.base.hashing import digest

if TYPE_CHECKING:
    import numpy as np
    from pydantic import BaseModel

    from assay.base.findings import Cost, Findings, Provenance

_Function = TypeVar("_Function", bound=Callable[..., "Findings"])


@runtime_checkable
class Progress(Protocol):
    """Tells whoever watches how far a step has come, and stops the step when the user asked for that."""

    def __call__(self, done: int, total: int, message: str = "") -> None:
        """Report `done` of `total` units of work.

        Raises:
            Cancelled: The user asked for the run to stop.
        """


@dataclass(frozen=True, slots=True, kw_only=True)
class StepSpec:
    """One step of a method: what goes in, and what it is expected to cost.

    Everything that changes the step's result must be in `inputs`: the key, and with it the cache, is made of nothing
    else (besides the method, its version and the model's fingerprint). A step that draws random numbers lists its seed
    there.

    Attributes:
        name: What the step is called in plans and progress bars.
        inputs: JSON values that determine the result.
        forwards: Rows pushed through the model, in whole-forward equivalents.
        backwards: Rows pushed back.
        tokens: Token positions processed.
        bytes: Memory the step holds at its peak beyond the model, in bytes.
        seconds: Expected wall time in seconds.
    """

    name: str
    inputs: Mapping[str, Any]
    forwards: int = 0
    backwards: int = 0
    tokens: int = 0
    bytes: int = 0
    seconds: float = 0.0

    def key(self, method: str, version: str, fingerprint: str) -> str:
        """Return the content address of the step's result.

        Args:
            method: The name of the method the step belongs to.
            version: That method's version.
            fingerprint: The model's fingerprint.

        Example:
            >>> step = StepSpec(name="lens", inputs={"prompt": "a"})
            >>> step.key("explain", "1", "f0") == StepSpec(name="lens", inputs={"prompt": "b"}).key(
            ...     "explain", "1", "f0"
            ... )
            False
        """
        return digest(
            {
                "kind": "step",
                "method": method,
                "version": version,
                "fingerprint": fingerprint,
                "step": self.name,
                "inputs": self.inputs,
            }
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class PlannedStep:
    """A step of a plan: its content address, and whether its result is already in the cache."""

    step: StepSpec
    key: str
    cached: bool


@dataclass(frozen=True, slots=True, kw_only=True)
class Plan:
    """What a study would do, known before anything runs.

    Attributes:
        steps: In the order they run.
        study: The study's key.
        finished: The whole study answers from the cache; nothing would run.
    """

    steps: tuple[PlannedStep, ...]
    study: str = ""
    finished: bool = False

    @property
    def remaining(self) -> tuple[PlannedStep, ...]:
        """The steps that would really run."""
        return () if self.finished else tuple(planned for planned in self.steps if not planned.cached)

    @property
    def cached(self) -> int:
        """The number of steps that answer from the cache."""
        return len(self.steps) - len(self.remaining)

    @property
    def forwards(self) -> int:
        """Forwards of all steps, cached or not."""
        return sum(planned.step.forwards for planned in self.steps)

    @property
    def backwards(self) -> int:
        """Backwards of all steps, cached or not."""
        return sum(planned.step.backwards for planned in self.steps)

    @property
    def tokens(self) -> int:
        """Token positions of all steps, cached or not."""
        return sum(planned.step.tokens for planned in self.steps)

    @property
    def bytes(self) -> int:
        """The largest memory any one step holds, in bytes."""
        return max((planned.step.bytes for planned in self.steps), default=0)

    @property
    def seconds(self) -> float:
        """Expected seconds of all steps, cached or not; `remaining` says which would run."""
        return sum(planned.step.seconds for planned in self.steps)

    def to_dict(self) -> dict[str, Any]:
        """Return the plan as JSON values, with totals over all steps and over those that would run."""

        def totals(steps: Sequence[PlannedStep]) -> dict[str, Any]:
            return {
                "steps": len(steps),
                "forwards": sum(planned.step.forwards for planned in steps),
                "backwards": sum(planned.step.backwards for planned in steps),
                "tokens": sum(planned.step.tokens for planned in steps),
                "bytes": max((planned.step.bytes for planned in steps), default=0),
                "seconds": sum(planned.step.seconds for planned in steps),
            }

        rows = [
            {
                "name": planned.step.name,
                "key": planned.key,
                "cached": planned.cached or self.finished,
                "forwards": planned.step.forwards,
                "backwards": planned.step.backwards,
                "tokens": planned.step.tokens,
                "bytes": planned.step.bytes,
                "seconds": planned.step.seconds,
            }
            for planned in self.steps
        ]
        return {
            "study": self.study,
            "finished": self.finished,
            "steps": rows,
            "total": totals(self.steps),
            "remaining": totals(self.remaining),
        }


@runtime_checkable
class Context(Protocol):
    """What a running method is given besides its subject and spec."""

    @property
    def seed(self) -> int:
        """The study's seed, from which every random stream is drawn."""

    @property
    def key(self) -> str:
        """The study's key: the hash of method, version, model, spec and seed."""

    def step(self, step: StepSpec, compute: Callable[[Progress], Mapping[str, Any]]) -> Mapping[str, Any]:
        """Return the step's result: from the cache where it is there, else from `compute`, which is then kept.

        Arrays come back as arrays and everything else as JSON gives it back (tuples as lists), cached or not.

        Args:
            step: The step; its inputs are its address in the cache.
            compute: Takes a `Progress` and returns named numpy arrays and JSON values.

        Raises:
            Cancelled: The user asked for the run to stop.
            OutputError: The cache cannot be written.
        """

    def warn(self, text: str) -> None:
        """Add a warning to the result; one raised inside a step is kept with it and given again from the cache."""

    def artifact(
        self,
        name: str,
        *,
        arrays: Mapping[str, np.ndarray[Any, Any]] | None = None,
        table: Mapping[str, Sequence[Any]] | None = None,
    ) -> None:
        """Add a file to the result: safetensors for named arrays, Parquet for a table's columns.

        Args:
            name: File name without ending: letters, digits, `.`, `_` and `-`.
            arrays: Named arrays.
            table: Columns of one length; exactly one of `arrays` and `table` is given.
        """

    def cost(self, *steps: str) -> Cost:
        """Return what the named steps of this run cost when they were computed; all steps so far when none is named."""

    def provenance(self, data: object = None) -> Provenance:
        """Return where the result comes from: model, weights, tokenizer, data, spec, seed and versions.

        Args:
            data: The JSON values a finding was computed from; the spec where nothing is given.
        """


@runtime_checkable
class Leaves(Protocol):
    """A spec of a method that leaves files where the user asked, besides its result: a trained dictionary, say.

    A study whose files are gone is not finished, whatever the cache holds: running it makes them again.
    """

    def leaves(self) -> Sequence[Path]:
        """The files and folders that a finished study leaves."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Method:
    """A registered method.

    Attributes:
        name: What it is called in every door.
        spec: The pydantic class of its specification.
        version: Goes into every key: raise it when the same spec would give another result.
        function: `function(subject, spec, ctx) -> Findings`.
        steps: `"module:function"` of `function(card, spec) -> list[StepSpec]` (a third parameter named `seed` is
            passed if there is one), or an empty string.
    """

    name: str
    spec: type[BaseModel]
    version: str
    function: Callable[..., Findings]
    steps: str = ""

    @property
    def summary(self) -> str:
        """The first paragraph of the function's docstring, as one line."""
        return " ".join((self.function.__doc__ or "").strip().split("\n\n", maxsplit=1)[0].split())

    def planned_steps(self, card: object, spec: BaseModel, seed: int) -> list[StepSpec]:
        """Return the steps the method would take, without loading the model.

        Args:
            card: What is known of the model without its weights.
            spec: The method's specification.
            seed: The study's seed.
        """
        if not self.steps:
            return []
        module, _, attribute = self.steps.partition(":")
        function = getattr(importlib.import_module(module), attribute)
        takes_seed = "seed" in inspect.signature(function).parameters
        return list(function(card, spec, seed=seed) if takes_seed else function(card, spec))


_METHODS: dict[str, Method] = {}


def method(
    *, name: str, spec: type[BaseModel], version: str = "1", steps: str = ""
) -> Callable[[_Function], _Function]:
    """Register the decorated function as the method `name`; the function itself is returned unchanged.

    Args:
        name: Lower-case words joined by hyphens; it becomes the command's name.
        spec: The pydantic class of its specification; field descriptions become the help texts.
        version: Raise it when the same spec would give another result.
        steps: `"module:function"` that lists the steps, see `Method.steps`.

    Raises:
        SpecError: Another function has that name.
    """

    def register(function: _Function) -> _Function:
        entry = Method(name=name, spec=spec, version=version, function=function, steps=steps)
        present = _METHODS.get(name)
        if present is not None and _origin(present.function) != _origin(function):
            raise SpecError(f"two methods are named {name!r}: {_origin(present.function)} and {_origin(function)}")
        _METHODS[name] = entry
        return function

    return register


def _origin(function: Callable[..., Any]) -> str:
    return f"{function.__module__}.{getattr(function, '__qualname__', function)}"


def get_method(name: str) -> Method:
    """Return the registered method of that name.

    Raises:
        SpecError: There is none; the message offers the nearest names and lists them all.
    """
    if name in _METHODS:
        return _METHODS[name]
    known = ", ".join(sorted(_METHODS)) or "none"
    raise SpecError(f"no method {name!r}{nearest(name, _METHODS)} (methods: {known})", field="method")


def methods() -> tuple[Method, ...]:
    """Return every registered method, sorted by name."""
    return tuple(_METHODS[name] for name in sorted(_METHODS))
