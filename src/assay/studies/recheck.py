"""Checking a saved result: the same study with its random streams begun elsewhere, finding by finding.

What depends on no random stream answers from the cache; every control is drawn anew. A finding that holds keeps its
verdict.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from assay.base.artifacts import user_path
from assay.base.errors import SpecError
from assay.base.findings import Finding
from assay.base.hashing import digest
from assay.studies.events import Watcher, ignore
from assay.studies.run import execute
from assay.studies.study import Study, files_of
from assay.studies.target import Target


@dataclass(frozen=True, slots=True, kw_only=True)
class Rechecked:
    """A saved finding beside the same finding with its controls drawn again.

    Attributes:
        saved: The finding as it was saved.
        again: The finding of the new run.
    """

    saved: Finding
    again: Finding

    @property
    def holds(self) -> bool:
        """Whether the verdict is the same."""
        return self.saved.verdict == self.again.verdict

    def to_dict(self) -> dict[str, Any]:
        """The pair as JSON values."""
        return {"holds": self.holds, "saved": self.saved.to_dict(), "again": self.again.to_dict()}


def recheck(
    path: str | Path, *, seed: int | None = None, model: str = "", subject: Any = None, progress: Watcher = ignore
) -> tuple[Rechecked, ...]:
    """Draw the controls of a saved result again.

    Args:
        path: A result's folder, or the `findings.jsonl` in one (its `study.json` lies beside it).
        seed: Where the random streams begin; by default one past the saved run's.
        model: How to load the model, when it now lies elsewhere; it must have the same weights.
        subject: The loaded subject, for a study of a module that was handed over.
        progress: Receives every `Event`.

    Returns:
        One pair a finding, in the order of the saved ones.

    Raises:
        SpecError: There is no such result, a file that it was computed from has gone or changed, the weights are
            others, or this version of the method makes other findings.
    """
    about, saved = _read(user_path(path))
    study = Study(**{**about["study"], **({"model": model} if model else {})})
    if not study.model and subject is None:
        raise SpecError("the result is of a module that was handed over; call recheck with subject=", "model")
    _same_data(study, saved)
    target = Target(study.model, subject, progress)
    if target.fingerprint != about["fingerprint"]:
        raise SpecError(
            f"the result is of weights {about['fingerprint'][:12]}, and {target.name} has {target.fingerprint[:12]}; "
            "name the model that it is of",
            "model",
        )
    fresh = study.model_copy(update={"seed": study.seed + 1 if seed is None else seed})
    again = list(execute(fresh, subject=subject, watcher=progress).findings)
    if [(f.tags, f.unit) for f in again] != [(f.tags, f.unit) for f in saved]:
        raise SpecError(
            f"the result has {len(saved)} findings and this version of {study.method} makes {len(again)} others; "
            "run the study again instead",
            "method",
        )
    return tuple(Rechecked(saved=old, again=new) for old, new in zip(saved, again, strict=True))


def _read(path: Path) -> tuple[Mapping[str, Any], list[Finding]]:
    folder = path if path.is_dir() else path.parent
    findings = folder / "findings.jsonl" if path.is_dir() else path
    try:
        about = json.loads((folder / "study.json").read_text(encoding="utf-8"))
        lines = findings.read_text(encoding="utf-8").splitlines()
        rows = [json.loads(line) for line in lines if line.strip()]
        if not isinstance(about, dict) or not isinstance(about["study"], dict) or not about["fingerprint"]:
            raise ValueError("study.json says nothing of a study")
    except (OSError, ValueError, KeyError) as error:
        raise SpecError(
            f"{str(path)!r} is no result that can be checked ({error}): name a folder that --out wrote, with "
            "study.json and findings.jsonl in it",
            "path",
        ) from error
    return about, [Finding.from_dict(row) for row in rows]


def _same_data(study: Study, saved: list[Finding]) -> None:
    """Refuse a study whose files are not what they were when its findings were made."""
    named = [(name, path) for name in files_of(study.spec) if (path := getattr(study.spec, name))]
    for name, path in named:
        if not Path(path).exists():
            raise SpecError(
                f"{name}: there is no {str(path)!r} here: a result names its files as they lay from the folder where "
                "the study was run; check it from that folder",
                name,
            )
    recorded = {finding.provenance.spec_hash for finding in saved if finding.provenance.spec_hash}
    if recorded and digest(study.identity()) not in recorded:
        given = ", ".join(f"{name} ({path})" for name, path in named)
        raise SpecError(f"what the result was computed from has changed since: {given or 'its spec'}", "path")
