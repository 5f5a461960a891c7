"""Running a study: answer from the cache, or run what is missing, then fill the output folder."""

from __future__ import annotations

import dataclasses
import datetime
import json
import os
import threading
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from assay.base.artifacts import user_path
from assay.base.errors import AssayError, OutputError
from assay.base.findings import Cost, Findings
from assay.base.method import Leaves, Method, Plan, PlannedStep
from assay.studies.cards import method_card
from assay.studies.context import StepRecord, StudyContext, versions
from assay.studies.events import Event, Watcher, ignore
from assay.studies.output import check_writable, write_folder
from assay.studies.registry import find_method
from assay.studies.store import ArtifactFile, Store
from assay.studies.target import Target

if TYPE_CHECKING:
    from assay.studies.study import Study


@dataclass(frozen=True, slots=True, kw_only=True)
class Outcome:
    """What running a study gave, and how.

    Attributes:
        findings: The result.
        key: The study's key.
        cached: The whole study was answered from the cache.
        steps: Every step of the run that computed it, with its cost.
        seconds: Wall seconds of this call.
        out: The output folder, if one was asked for.
        files: The files in it, as relative names.
    """

    findings: Findings
    key: str
    cached: bool
    steps: tuple[StepRecord, ...]
    seconds: float
    out: Path | None = None
    files: tuple[str, ...] = ()

    @property
    def cost(self) -> Cost:
        """What the result cost when it was computed."""
        return sum((step.cost for step in self.steps), Cost())


def plan_study(study: Study, subject: Any = None, watcher: Watcher = ignore) -> Plan:
    """Return what running the study would do; see `Study.plan`."""
    method = find_method(study.method)
    target = Target(study.model, subject, watcher)
    key = study.key(target.fingerprint)
    store = Store(lambda _: None)
    finished = _standing(study) and store.study(key) is not None
    return _plan(study, method, target, key, store, finished=finished, reuse=True)


def execute(
    study: Study,
    *,
    subject: Any = None,
    out: str | Path | None = None,
    watcher: Watcher = ignore,
    cache: bool = True,
    cancel: threading.Event | None = None,
) -> Outcome:
    """Run the study and return its findings with how they came about; see `Study.run`."""
    begun = time.perf_counter()
    if out is not None and not str(out).strip():
        raise OutputError("the output folder's name is empty: name a folder, such as runs/mine")
    folder = None if out is None else Path(os.path.abspath(user_path(out)))  # noqa: PTH100 (resolves ".." in a new path)
    if folder is not None:
        check_writable(folder, what="the output folder")

    def notice(text: str) -> None:
        watcher(Event(kind="notice", message=text))

    store = Store(notice)
    target = Target(study.model, subject, watcher)
    key = study.key(target.fingerprint)
    result = _kept(key, store) if cache and _standing(study) else None
    cached = result is not None
    if result is None:
        result = _compute(study, target, key, store, watcher, cancel or threading.Event(), reuse=cache)
    record, findings = result
    files = () if folder is None else _fill(folder, study, record, findings, store)
    watcher(Event(kind="done", message="from the cache" if cached else ""))
    return Outcome(
        findings=findings,
        key=key,
        cached=cached,
        steps=_steps(record),
        seconds=time.perf_counter() - begun,
        out=folder,
        files=files,
    )


def _standing(study: Study) -> bool:
    """Whether what the study leaves outside the cache is where it was asked to be."""
    return not isinstance(study.spec, Leaves) or all(user_path(path).exists() for path in study.spec.leaves())


def _kept(key: str, store: Store) -> tuple[dict[str, Any], Findings] | None:
    record = store.study(key)
    if record is None:
        return None
    try:
        _steps(record)
        return record, Findings.from_dict(record["findings"])
    except (AssayError, KeyError, TypeError, ValueError) as error:
        store.discard_study(key, f"the record of study {key} cannot be read: {error!r}")
        return None


def _plan(study: Study, method: Method, target: Target, key: str, store: Store, *, finished: bool, reuse: bool) -> Plan:
    planned = []
    for step in method.planned_steps(target.card, study.spec, study.seed):
        step_key = step.key(method.name, method.version, target.fingerprint)
        planned.append(PlannedStep(step=step, key=step_key, cached=finished or (reuse and store.steps.has(step_key))))
    return Plan(steps=tuple(planned), study=key, finished=finished)


def _compute(
    study: Study, target: Target, key: str, store: Store, watcher: Watcher, cancel: threading.Event, *, reuse: bool
) -> tuple[dict[str, Any], Findings]:
    check_writable(store.root, what="the cache folder (set ASSAY_HOME to choose another)")
    store.steps.sweep()
    method = find_method(study.method)
    plan = _plan(study, method, target, key, store, finished=False, reuse=reuse)
    watcher(Event(kind="plan", plan=plan, count=len(plan.steps)))
    subject = target.subject
    context = StudyContext(
        method=method,
        key=key,
        fingerprint=target.fingerprint,
        model=target.name,
        tokenizer_hash=target.tokenizer_hash,
        spec=study.identity(),
        seed=study.seed,
        plan=plan,
        store=store,
        watcher=watcher,
        cancel=cancel,
        reuse=reuse,
    )
    findings = method.function(subject, study.spec, context)
    if not isinstance(findings, Findings):
        raise TypeError(f"method {method.name!r} returned {type(findings).__name__}, not Findings")
    artifacts = {name: artifact.to_dict() for name, artifact in context.artifacts.items()}
    findings = dataclasses.replace(
        findings,
        artifacts={**findings.artifacts, **artifacts},
        warnings=tuple(dict.fromkeys([*findings.warnings, *context.warnings])),
    )
    record = {
        "key": key,
        "study": study.model_dump(mode="json"),
        "method_version": method.version,
        "fingerprint": target.fingerprint,
        "versions": versions(),
        "created": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "steps": [_step_dict(step) for step in context.records],
        "artifacts": artifacts,
        "findings": findings.to_dict(),
    }
    store.keep_study(key, record)
    return record, Findings.from_dict(json.loads(json.dumps(record["findings"])))


def _step_dict(step: StepRecord) -> dict[str, Any]:
    return {"name": step.name, "key": step.key, "cost": dataclasses.asdict(step.cost)}


def _steps(record: Mapping[str, Any]) -> tuple[StepRecord, ...]:
    return tuple(
        StepRecord(name=step["name"], key=step["key"], cached=True, cost=Cost(**step["cost"]))
        for step in record["steps"]
    )


def _fill(folder: Path, study: Study, record: Mapping[str, Any], findings: Findings, store: Store) -> tuple[str, ...]:
    """Write the output folder: artifacts first and `study.json`, which says that the rest is there, last."""
    files: dict[str, bytes | Path] = {}
    for name, described in record["artifacts"].items():
        artifact = ArtifactFile.from_dict(name, described)
        files[artifact.file] = store.blob_path(artifact)
    lines = [json.dumps(finding.to_dict(), ensure_ascii=False, allow_nan=False) for finding in findings]
    files["findings.jsonl"] = "".join(f"{line}\n" for line in lines).encode("utf-8")
    files["report.html"] = _report(study, record, findings).encode("utf-8")
    about = {name: value for name, value in record.items() if name != "findings"}
    about |= {"summary": list(findings.summary), "warnings": list(findings.warnings)}
    files["study.json"] = (json.dumps(about, indent=2, ensure_ascii=False, allow_nan=False) + "\n").encode("utf-8")
    write_folder(folder, files)
    return tuple(files)


def _report(study: Study, record: Mapping[str, Any], findings: Findings) -> str:
    from assay.studies.report import render

    cost: Cost = sum((step.cost for step in _steps(record)), Cost())
    title = getattr(study.spec, "title", None)
    limits = dict(method_card(find_method(study.method)).sections).get("When it misleads", "")
    return render(
        findings,
        title=str(title() if callable(title) else title or find_method(study.method).summary),
        subtitle=f"{study.model or 'a loaded subject'} · {study.method} · seed {study.seed}",
        spec=dict(record["study"]["spec"]),
        provenance={
            "study": record["key"],
            "method": f"{study.method} (version {record['method_version']})",
            "model": study.model,
            "weights": record["fingerprint"],
            "seed": study.seed,
            "computed": record["created"],
            "forwards": cost.forwards,
            "backwards": cost.backwards,
            "seconds": round(cost.seconds, 1),
            "peak_bytes": cost.peak_bytes,
            "versions": record["versions"],
        },
        limits=tuple(paragraph for paragraph in limits.split("\n\n") if paragraph),
    )
