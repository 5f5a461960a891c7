"""The context a running method is given: steps from the cache or computed and kept, progress, artifacts, costs."""

from __future__ import annotations

import importlib.metadata
import platform
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from assay.base.artifacts import step_value
from assay.base.errors import Cancelled, DamagedFile, OutputError
from assay.base.findings import Cost, Provenance
from assay.base.hashing import digest
from assay.base.method import Method, Plan, Progress, StepSpec
from assay.base.version import __version__
from assay.studies.events import Event, Watcher
from assay.studies.measure import Meter
from assay.studies.store import ArtifactFile, Store

if TYPE_CHECKING:
    import numpy as np

_META = "__assay__"
_QUIET_SECONDS = 0.05
_PACKAGES = ("torch", "transformers", "numpy")


@dataclass(frozen=True, slots=True, kw_only=True)
class StepRecord:
    """What became of one step of a run.

    Attributes:
        name: The step's name.
        key: Its content address.
        cached: It was answered from the cache.
        cost: What it cost when it was computed.
    """

    name: str
    key: str
    cached: bool
    cost: Cost


@dataclass(slots=True)
class _Kept:
    """What a step adds to the result besides its value."""

    warnings: list[str] = field(default_factory=list)
    artifacts: dict[str, ArtifactFile] = field(default_factory=dict)


class StudyContext:
    """The context of one run of one study; see `assay.base.method.Context` for what a method may ask of it.

    Args:
        method: The method being run.
        key: The study's key.
        fingerprint: The model's fingerprint.
        model: How the user referred to the model.
        tokenizer_hash: The hash of its tokenizer, if it has one.
        spec: The identity of the spec, as JSON values.
        seed: The study's seed.
        plan: The planned steps.
        store: The cache.
        watcher: What is told of events.
        cancel: Set when the user asks for the run to stop.
        reuse: Whether kept steps may answer; when False everything is computed again (and kept).
    """

    def __init__(
        self,
        *,
        method: Method,
        key: str,
        fingerprint: str,
        model: str,
        tokenizer_hash: str,
        spec: Mapping[str, Any],
        seed: int,
        plan: Plan,
        store: Store,
        watcher: Watcher,
        cancel: threading.Event,
        reuse: bool,
    ) -> None:
        self.records: list[StepRecord] = []
        self._method = method
        self._key = key
        self._fingerprint = fingerprint
        self._model = model
        self._tokenizer_hash = tokenizer_hash
        self._spec = spec
        self._seed = seed
        self._plan = plan
        self._store = store
        self._watcher = watcher
        self._cancel = cancel
        self._reuse = reuse
        self._study = _Kept()
        self._open: list[_Kept] = []
        self._seen: set[str] = set()

    @property
    def seed(self) -> int:
        """The study's seed, from which every random stream is drawn."""
        return self._seed

    @property
    def key(self) -> str:
        """The study's key."""
        return self._key

    @property
    def warnings(self) -> tuple[str, ...]:
        """The warnings raised so far, each once, in order."""
        return tuple(dict.fromkeys(self._study.warnings))

    @property
    def artifacts(self) -> Mapping[str, ArtifactFile]:
        """The artifacts registered so far, by name."""
        return dict(self._study.artifacts)

    def step(self, step: StepSpec, compute: Callable[[Progress], Mapping[str, Any]]) -> Mapping[str, Any]:
        """Return the step's result: from the cache where it is there, else from `compute`, which is then kept."""
        self._check_cancelled()
        key = step.key(self._method.name, self._method.version, self._fingerprint)
        index = self._index(key)
        if (self._reuse or key in self._seen) and (kept := self._kept(step, key, index)) is not None:
            return kept
        self._tell(step, index, kind="start")
        self._open.append(_Kept())
        try:
            with Meter() as meter:
                value = compute(_StepProgress(self, step, index))
            value = self._checked(step, value)
            added = self._open[-1]
        finally:
            self._open.pop()
        cost = Cost(
            forwards=step.forwards, backwards=step.backwards, seconds=meter.seconds, peak_bytes=meter.peak_bytes
        )
        meta = {
            "step": step.name,
            "cost": _cost_dict(cost),
            "warnings": added.warnings,
            "artifacts": {name: artifact.to_dict() for name, artifact in added.artifacts.items()},
        }
        self._store.steps.put(key, {**value, _META: meta})
        self._add(added)
        self._record(StepRecord(name=step.name, key=key, cached=False, cost=cost))
        self._tell(step, index, kind="finish", seconds=cost.seconds)
        return value

    def warn(self, text: str) -> None:
        """Add a warning to the result; inside a step it is kept with the step."""
        (self._open[-1] if self._open else self._study).warnings.append(text)

    def artifact(
        self,
        name: str,
        *,
        arrays: Mapping[str, np.ndarray[Any, Any]] | None = None,
        table: Mapping[str, Sequence[Any]] | None = None,
    ) -> None:
        """Add a file to the result; inside a step it is kept with the step."""
        artifact = self._store.keep_artifact(name, arrays=arrays, table=table)
        (self._open[-1] if self._open else self._study).artifacts[name] = artifact

    def cost(self, *steps: str) -> Cost:
        """Return what the named steps of this run cost when they were computed; all steps so far when none is named."""
        total = Cost(forwards=0, backwards=0, seconds=0.0, peak_bytes=0)
        for record in self.records:
            if not steps or record.name in steps:
                total = total + record.cost
        return total

    def provenance(self, data: object = None) -> Provenance:
        """Return where the result comes from."""
        return Provenance(
            model=self._model,
            weights_hash=self._fingerprint,
            tokenizer_hash=self._tokenizer_hash,
            data_hash=digest(self._spec if data is None else data),
            spec_hash=digest(self._spec),
            seed=self._seed,
            versions=versions(),
        )

    def tell(self, event: Event) -> None:
        """Pass an event to whoever watches.

        Raises:
            Cancelled: The user asked for the run to stop.
        """
        self._watcher(event)
        self._check_cancelled()

    def _check_cancelled(self) -> None:
        if self._cancel.is_set():
            raise Cancelled("stopped as you asked; finished steps are kept, and the same study resumes from them")

    def _index(self, key: str) -> int:
        for place, planned in enumerate(self._plan.steps, start=1):
            if planned.key == key:
                return place
        return len(self._plan.steps) + 1

    def _tell(self, step: StepSpec, index: int, **what: Any) -> None:
        self._watcher(Event(step=step.name, index=index, count=max(len(self._plan.steps), index), **what))

    def _checked(self, step: StepSpec, value: object) -> dict[str, Any]:
        if not isinstance(value, Mapping) or not all(isinstance(name, str) for name in value):
            raise OutputError(f"step {step.name!r} returned {type(value).__name__}; a mapping from names is needed")
        if _META in value:
            raise OutputError(f"step {step.name!r} returned the name {_META!r}, which assay keeps for itself")
        return step_value(value)

    def _kept(self, step: StepSpec, key: str, index: int) -> dict[str, Any] | None:
        """Return the step's result from the cache, with what it added to the study; None when it must be computed."""
        value = self._store.steps.get(key)
        if value is None:
            return None
        meta = value.pop(_META)
        added = _Kept(warnings=list(meta["warnings"]))
        try:
            for name, described in meta["artifacts"].items():
                added.artifacts[name] = ArtifactFile.from_dict(name, described)
                self._store.verify(added.artifacts[name])
        except DamagedFile as error:
            self._watcher(Event(kind="notice", message=f"step {step.name!r} will be computed again: {error}"))
            return None
        if key not in self._seen:  # a step that is asked for twice in one run counts once
            self._add(added)
            cost = Cost(**meta["cost"])
            self._record(StepRecord(name=step.name, key=key, cached=True, cost=cost))
            self._tell(step, index, kind="cached", seconds=cost.seconds)
        return value

    def _record(self, record: StepRecord) -> None:
        self._seen.add(record.key)
        self.records.append(record)

    def _add(self, added: _Kept) -> None:
        target = self._open[-1] if self._open else self._study
        target.warnings.extend(added.warnings)
        target.artifacts.update(added.artifacts)


class _StepProgress:
    """The progress of one step: passes on at most one report every 50 ms, and every last one."""

    def __init__(self, context: StudyContext, step: StepSpec, index: int) -> None:
        self._context, self._step, self._index = context, step, index
        self._last = 0.0

    def __call__(self, done: int, total: int, message: str = "") -> None:
        self._context._check_cancelled()
        now = time.monotonic()
        if done < total and now - self._last < _QUIET_SECONDS:
            return
        self._last = now
        self._context._tell(self._step, self._index, kind="progress", done=done, total=total, message=message)


def _cost_dict(cost: Cost) -> dict[str, Any]:
    return {
        "forwards": cost.forwards,
        "backwards": cost.backwards,
        "seconds": cost.seconds,
        "peak_bytes": cost.peak_bytes,
    }


def versions() -> dict[str, str]:
    """Return the versions of Python, assay and the packages that results depend on, without importing them."""
    found = {"python": platform.python_version(), "assay": __version__}
    for package in _PACKAGES:
        try:
            found[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            continue
    return found
