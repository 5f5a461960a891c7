"""The output folder: checked before anything runs, and filled only when everything that goes into it exists."""

from __future__ import annotations

import contextlib
import json
import os
import re
import secrets
import shutil
import time
from collections.abc import Iterable, Mapping
from pathlib import Path

from assay.base.artifacts import output_error
from assay.base.errors import OutputError

_STAGE = ".assay-stage-"
_ORPHAN_SECONDS = 3600.0
LEAST_FREE = 1 << 20
"""Bytes that must be free before a run starts; a report needs a few hundred kilobytes."""


def check_writable(path: Path, *, what: str) -> None:
    """Make sure that files can be created in `path`, and leave nothing behind.

    Missing parents are created for the trial and removed again.

    Args:
        path: The folder, which need not exist.
        what: What the folder is to the user, for the message: `"the output folder"`.

    Raises:
        OutputError: It is a file, cannot be written, or its disk is full.
    """
    made: list[Path] = []
    try:
        for folder in [*reversed(path.parents), path]:
            if not folder.exists():
                folder.mkdir(exist_ok=True)
                made.append(folder)
            elif not folder.is_dir():
                raise OutputError(f"{what} {str(path)!r} cannot be used: {str(folder)!r} is a file, not a folder")
        trial = path / f".assay-trial-{secrets.token_hex(6)}"
        try:
            trial.write_bytes(b"assay")
        finally:
            with contextlib.suppress(OSError):
                trial.unlink(missing_ok=True)
        free = shutil.disk_usage(path).free
        if free < LEAST_FREE:
            raise OutputError(f"{what} {str(path)!r} has {free} bytes of free disk; at least {LEAST_FREE} are needed")
    except OSError as error:
        raise output_error(path, error) from error
    finally:
        for folder in reversed(made):
            with contextlib.suppress(OSError):
                folder.rmdir()


def write_folder(path: Path, files: Mapping[str, bytes | Path]) -> None:
    """Write `files` into the folder `path`: all of them are complete on its disk before the first takes its place.

    They are staged in a temporary folder on the same disk. A folder that does not exist yet appears whole, in one
    rename; in one that exists each file is replaced in one rename, in the order given, and artifacts that an earlier
    result listed and this one does not have are removed. Files that assay did not write are not touched.

    Args:
        path: The output folder.
        files: Relative names with `/`, to contents or to a file to copy.

    Raises:
        OutputError: Something could not be written; the folder is then as it was before.
    """
    exists = path.is_dir()
    stage = (path if exists else path.parent) / f"{_STAGE}{path.name[:40]}-{os.getpid()}-{secrets.token_hex(6)}"
    try:
        stage.parent.mkdir(parents=True, exist_ok=True)
        _sweep(stage.parent, path.name)
        stage.mkdir()
        for name, content in files.items():
            _fill(stage / name, content)
        if not exists and _became(stage, path):
            return
        stale = _listed_artifacts(path) - set(files)
        _check_replaceable(path, files)
        for name in files:
            (path / name).parent.mkdir(parents=True, exist_ok=True)
            (stage / name).replace(path / name)
        for name in stale:
            (path / name).unlink(missing_ok=True)
    except OSError as error:
        raise output_error(path, error) from error
    finally:
        shutil.rmtree(stage, ignore_errors=True)


def _fill(target: Path, content: bytes | Path) -> None:
    target.parent.mkdir(parents=True, exist_ok=True)
    with target.open("wb") as file:
        if isinstance(content, bytes):
            file.write(content)
        else:
            with content.open("rb") as source:
                shutil.copyfileobj(source, file, 1 << 20)
        file.flush()
        os.fsync(file.fileno())


def _became(stage: Path, path: Path) -> bool:
    """Rename the stage to the output folder; False when another process made that folder first."""
    try:
        stage.rename(path)
    except OSError:
        if path.is_dir():
            return False
        raise
    return True


def _listed_artifacts(path: Path) -> set[str]:
    """Return the artifact files that the result now in the folder says it has, as names inside `artifacts/`."""
    try:
        listed = json.loads((path / "study.json").read_text(encoding="utf-8"))["artifacts"]
        return {f"artifacts/{Path(str(entry['file'])).name}" for entry in listed.values()}
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return set()


def _check_replaceable(path: Path, files: Iterable[str]) -> None:
    """Refuse, before anything is replaced, a folder where a file has to go and a file where a folder has to."""
    for name in files:
        target = path / name
        if target.is_dir():
            raise OutputError(f"{str(target)!r} is a folder, and a file has to go there; choose another output folder")
        if target.parent.exists() and not target.parent.is_dir():
            raise OutputError(
                f"{str(target.parent)!r} is a file, and a folder has to go there; choose another output folder"
            )


def _sweep(folder: Path, name: str) -> None:
    """Remove the staging folders of this output folder whose processes were killed more than an hour ago."""
    ours = re.compile(re.escape(f"{_STAGE}{name[:40]}") + r"-\d+-[0-9a-f]{12}")
    for leftover in folder.iterdir():
        with contextlib.suppress(OSError):
            old = time.time() - leftover.stat().st_mtime > _ORPHAN_SECONDS
            if old and ours.fullmatch(leftover.name) and leftover.is_dir() and not leftover.is_symlink():
                shutil.rmtree(leftover, ignore_errors=True)
