"""A study: one method, one model, one spec, one seed, as data. Its hash is its place in the cache."""

from __future__ import annotations

import json
import threading
from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pydantic import BaseModel, ConfigDict, Field, SerializeAsAny, ValidationError, model_validator

from assay.base.artifacts import user_path
from assay.base.errors import SpecError
from assay.base.hashing import digest, file_sha256
from assay.base.method import Method, Plan
from assay.studies.events import Watcher, ignore
from assay.studies.problems import spec_error
from assay.studies.registry import find_method

if TYPE_CHECKING:
    from assay.base.findings import Findings


class Study(BaseModel):
    """One method applied to one model: everything that determines its findings, and nothing else.

    The spec may be given as a mapping or as the method's own pydantic class; it is checked when the study is made.

    Raises:
        SpecError: The method is unknown, or a field is missing, unknown or not valid. The message names the field.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    method: str = Field(description="The method's name.")
    model: str = Field(default="", description="Hub id, folder, .gguf file, wheel:<package> or zoo:<name>.")
    spec: SerializeAsAny[BaseModel] = Field(description="The method's specification.")
    seed: int = Field(default=0, ge=0, description="Where every random stream begins.")

    def __init__(self, **data: Any) -> None:
        try:
            super().__init__(**data)
        except ValidationError as error:
            raise spec_error(error, type(self), where="study") from error

    @model_validator(mode="before")
    @classmethod
    def _typed_spec(cls, data: Any) -> Any:
        if not isinstance(data, Mapping) or not isinstance(data.get("method"), str):
            return data
        method = find_method(data["method"])
        return {**data, "spec": _typed(method, data.get("spec", {}))}

    @classmethod
    def read(cls, path: str | Path) -> Study:
        """Read a study from a JSON file: `{"method": ..., "model": ..., "spec": {...}, "seed": 0}`.

        A file that the spec names is looked for beside the study's own file, unless its path is absolute. The
        `study.json` of a result's folder is read too: its files are named as they were given, so they are looked for
        from the folder in which that study ran.

        Raises:
            SpecError: The file cannot be read, is not JSON, or holds no valid study.
        """
        file = user_path(path, partial(SpecError, field="path"))
        try:
            data = json.loads(file.read_text(encoding="utf-8"))
        except (OSError, ValueError) as error:
            raise SpecError(f"{str(path)!r} is no study that can be read: {error}", field="path") from error
        if not isinstance(data, dict):
            raise SpecError(f"{str(path)!r} holds a {type(data).__name__}; a study is a JSON object", field="path")
        if isinstance(data.get("study"), dict) and "key" in data:  # what a run wrote beside its report
            return cls(**data["study"])
        study = cls(**data)
        here = {
            name: file.parent / getattr(study.spec, name)
            for name in files_of(study.spec)
            if getattr(study.spec, name) is not None
        }
        return study.model_copy(update={"spec": study.spec.model_copy(update=here)})

    def identity(self) -> dict[str, Any]:
        """Return the spec as JSON values with every file replaced by the hash of its contents.

        A field is a file when its `json_schema_extra` holds `"file": True`. A folder is one when that holds
        `"file": [patterns]`: it is known by the files in it that match, such as a manifest with the hashes of all.

        Raises:
            SpecError: A file cannot be read.
        """
        identity = self.spec.model_dump(mode="json")
        for name in files_of(self.spec):
            path = getattr(self.spec, name)
            if path is None:
                continue
            if str(path) == ".":  # what an empty text becomes as a path
                raise SpecError(f"{name}: is empty, and a file is needed", field=name)
            try:
                identity[name] = _content(user_path(path, partial(SpecError, field=name)), patterns(self.spec, name))
            except OSError as error:
                reason = error.strerror or str(error)
                raise SpecError(f"{name}: cannot read {str(path)!r}: {reason}", field=name) from error
        return identity

    def key(self, fingerprint: str) -> str:
        """Return the hash of method, method version, model fingerprint, spec and seed.

        Args:
            fingerprint: The model's fingerprint.
        """
        return digest(
            {
                "kind": "study",
                "method": self.method,
                "version": find_method(self.method).version,
                "fingerprint": fingerprint,
                "spec": self.identity(),
                "seed": self.seed,
            }
        )

    def plan(self, subject: Any = None, progress: Watcher | None = None) -> Plan:
        """Return what running the study would do and cost, and what of it is in the cache; runs nothing.

        Args:
            subject: A loaded subject, when `model` names none.
            progress: Is told when a model has to be fetched or converted first.

        Raises:
            LoadError: The model cannot be found.
            SpecError: The spec does not fit the model.
        """
        from assay.studies.run import plan_study

        return plan_study(self, subject, progress or ignore)

    def run(
        self,
        subject: Any = None,
        out: str | Path | None = None,
        progress: Watcher | None = None,
        *,
        cache: bool = True,
        cancel: threading.Event | None = None,
    ) -> Findings:
        """Return the study's findings: from the cache when it was finished before, else by running what is missing.

        Args:
            subject: A loaded subject; by default the model is loaded when something has to be computed.
            out: A folder to fill with `report.html`, `findings.jsonl`, `study.json` and `artifacts/`.
            progress: Receives every `Event`.
            cache: Whether kept results may answer; new ones are kept either way.
            cancel: Set it from another thread to stop the run at the next opportunity.

        Raises:
            Cancelled: `cancel` was set; finished steps are kept.
            LoadError: The model cannot be loaded.
            OutputError: The output folder or the cache cannot be written.
            SpecError: The spec does not fit the model.
        """
        from assay.studies.run import execute

        return execute(self, subject=subject, out=out, watcher=progress or ignore, cache=cache, cancel=cancel).findings


def patterns(spec: BaseModel, name: str) -> list[str]:
    """What tells one folder of this field from another: patterns of files in it; none where the field is a file."""
    extra = type(spec).model_fields[name].json_schema_extra
    told = extra.get("file") if isinstance(extra, dict) else None
    return [str(each) for each in told] if isinstance(told, list) else []


def _content(path: Path, inside: list[str]) -> dict[str, Any]:
    if not inside:
        return {"sha256": file_sha256(path)}
    files = sorted({file for pattern in inside for file in path.glob(pattern)})
    return {"files": {file.relative_to(path).as_posix(): file_sha256(file) for file in files}}


def files_of(spec: BaseModel) -> list[str]:
    """The fields of a spec that name files or folders of them: those whose `json_schema_extra` holds `"file"`."""
    fields = type(spec).model_fields.items()
    return [name for name, field in fields if isinstance(e := field.json_schema_extra, dict) and e.get("file")]


def _typed(method: Method, given: Any) -> BaseModel:
    if isinstance(given, method.spec):
        return given
    if isinstance(given, BaseModel):
        raise SpecError(
            f"{method.name} takes a {method.spec.__name__}, but a {type(given).__name__} was given", field="spec"
        )
    if not isinstance(given, Mapping):
        raise SpecError(
            f"spec: a mapping or a {method.spec.__name__} is needed, but {type(given).__name__} was given", field="spec"
        )
    try:
        return method.spec.model_validate(dict(given))
    except ValidationError as error:
        raise spec_error(error, method.spec, where=method.name) from error
