"""What assay keeps between runs: finished steps, finished studies, and the artifacts both refer to by content.

$ASSAY_HOME/
  steps/ab/<step key>.safetensors     one finished step each
  studies/ab/<study key>.json         one finished study each, with its checksum
  blobs/ab/<sha256>.<ending>          artifacts, named by what they contain
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import re
import secrets
import shutil
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from assay.base.artifacts import StepStore, atomic_write_text, home, output_error, write_parquet, write_safetensors
from assay.base.errors import DamagedFile, OutputError
from assay.base.hashing import file_sha256

_RECORD_FORMAT = "assay-study/1"
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,79}")
_ENDINGS = ("safetensors", "parquet")
RESULT_FOLDERS = ("steps", "studies", "blobs")
"""The folders of the cache that hold results: everything in them can be computed again."""
MODEL_FOLDERS = ("models", "hashes")
"""The folders of the cache that hold models and their hashes: everything in them can be fetched again."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ArtifactFile:
    """A file that belongs to a result, kept by its content.

    Attributes:
        name: What the method calls it.
        ending: `safetensors` or `parquet`.
        sha256: The hash of its bytes.
        bytes: Its size.
        keys: The names of its arrays or columns.
    """

    name: str
    ending: str
    sha256: str
    bytes: int
    keys: tuple[str, ...]

    @property
    def file(self) -> str:
        """Where it lies in an output folder."""
        return f"artifacts/{self.name}.{self.ending}"

    def to_dict(self) -> dict[str, Any]:
        """Return the artifact as JSON values."""
        return {
            "file": self.file,
            "format": self.ending,
            "sha256": self.sha256,
            "bytes": self.bytes,
            "keys": list(self.keys),
        }

    @classmethod
    def from_dict(cls, name: str, value: Mapping[str, Any]) -> ArtifactFile:
        """Read what `to_dict` wrote.

        Raises:
            DamagedFile: The value does not describe an artifact.
        """
        try:
            artifact = cls(
                name=name,
                ending=str(value["format"]),
                sha256=str(value["sha256"]),
                bytes=int(value["bytes"]),
                keys=tuple(map(str, value["keys"])),
            )
        except (KeyError, TypeError, ValueError) as error:
            raise DamagedFile(f"artifact {name!r} is not described correctly: {value!r}") from error
        if (
            not _NAME.fullmatch(name)
            or artifact.ending not in _ENDINGS
            or not re.fullmatch("[0-9a-f]{64}", artifact.sha256)
        ):
            raise DamagedFile(f"artifact {name!r} is not described correctly: {value!r}")
        return artifact


class Store:
    """The cache of steps, studies and artifacts.

    Args:
        warn: What is told about a damaged entry, which is removed and counts as absent.
        root: The folder; `assay.base.artifacts.home()` by default.
    """

    def __init__(self, warn: Callable[[str], None], root: Path | None = None) -> None:
        self.root = home() if root is None else root
        self.steps = StepStore(self.root / "steps", warn)
        self._warn = warn

    def study_path(self, key: str) -> Path:
        """Return the file that holds, or would hold, the record of a finished study."""
        return self.root / "studies" / key[:2] / f"{key}.json"

    def blob_path(self, artifact: ArtifactFile) -> Path:
        """Return the file with the artifact's content."""
        return self.root / "blobs" / artifact.sha256[:2] / f"{artifact.sha256}.{artifact.ending}"

    def study(self, key: str) -> dict[str, Any] | None:
        """Return the record of a finished study; None when there is none, or it or one of its artifacts is damaged."""
        path = self.study_path(key)
        try:
            record = _read_record(path)
            for name, value in record["artifacts"].items():
                self.verify(ArtifactFile.from_dict(name, value))
            return record
        except (FileNotFoundError, NotADirectoryError) as error:
            if error.filename is not None and Path(error.filename) == path:
                return None
            problem = str(error)
        except (DamagedFile, OSError) as error:
            problem = str(error)
        self.discard_study(key, problem)
        return None

    def discard_study(self, key: str, problem: str) -> None:
        """Remove the record of a study because of `problem`, and say so."""
        self._warn(f"discarded a damaged result in the cache, which will be computed again: {problem}")
        with contextlib.suppress(OSError):
            self.study_path(key).unlink()

    def keep_study(self, key: str, record: Mapping[str, Any]) -> None:
        """Keep the record of a finished study.

        Raises:
            OutputError: The cache cannot be written.
        """
        text = _record_text(record)
        checksum = hashlib.sha256(text.encode("utf-8")).hexdigest()
        atomic_write_text(
            self.study_path(key), f'{{"format": "{_RECORD_FORMAT}", "sha256": "{checksum}", "record": {text}}}\n'
        )

    def keep_artifact(
        self,
        name: str,
        *,
        arrays: Mapping[str, Any] | None = None,
        table: Mapping[str, Sequence[Any]] | None = None,
    ) -> ArtifactFile:
        """Write an artifact into the cache under the hash of its content.

        Args:
            name: File name without ending.
            arrays: Named arrays, or
            table: columns of one length.

        Raises:
            OutputError: The name is no plain file name, not exactly one kind of content is given, or writing fails.
        """
        if not _NAME.fullmatch(name):
            raise OutputError(
                f"artifact name {name!r}: use letters, digits, '.', '_' and '-', beginning with a letter or digit"
            )
        if (arrays is None) == (table is None):
            raise OutputError(f"artifact {name!r}: give exactly one of arrays= and table=")
        temporary = self.root / "blobs" / f".tmp-{os.getpid()}-{secrets.token_hex(6)}"
        try:
            if arrays is not None:
                write_safetensors(temporary, arrays)
            else:
                write_parquet(temporary, table or {})
            artifact = ArtifactFile(
                name=name,
                ending="safetensors" if arrays is not None else "parquet",
                sha256=file_sha256(temporary),
                bytes=temporary.stat().st_size,
                keys=tuple(map(str, arrays if arrays is not None else table or {})),
            )
            path = self.blob_path(artifact)
            path.parent.mkdir(parents=True, exist_ok=True)
            temporary.replace(path)
        except OSError as error:
            raise output_error(temporary.parent, error) from error
        finally:
            with contextlib.suppress(OSError):
                temporary.unlink(missing_ok=True)
        return artifact

    def verify(self, artifact: ArtifactFile) -> None:
        """Check that the artifact's content is there and has its hash; a damaged one is removed.

        Raises:
            DamagedFile: It is absent or altered.
        """
        path = self.blob_path(artifact)
        if not path.is_file():
            raise DamagedFile(f"the artifact {artifact.name!r} is missing from the cache ({str(path)!r})")
        if path.stat().st_size != artifact.bytes or file_sha256(path) != artifact.sha256:
            with contextlib.suppress(OSError):
                path.unlink()
            raise DamagedFile(f"the artifact {artifact.name!r} was damaged in the cache ({str(path)!r})")


def _record_text(record: Mapping[str, Any]) -> str:
    try:
        return json.dumps(record, separators=(",", ":"), allow_nan=False)
    except (TypeError, ValueError) as error:
        raise OutputError(f"the result cannot be kept as JSON: {error}") from error


def _read_record(path: Path) -> dict[str, Any]:
    text = path.read_text(encoding="utf-8", errors="replace")
    try:
        whole = json.loads(text)
        record = whole["record"]
        checksum = hashlib.sha256(_record_text(record).encode("utf-8")).hexdigest()
        intact = (whole["format"], whole["sha256"]) == (_RECORD_FORMAT, checksum) and isinstance(
            record["artifacts"], dict
        )
    except (ValueError, KeyError, TypeError) as error:
        raise DamagedFile(f"{str(path)!r} is no readable record of a study: {error}") from error
    if not intact:
        raise DamagedFile(f"{str(path)!r} does not have the format or the checksum written with it")
    return dict(record)


@dataclass(frozen=True, slots=True, kw_only=True)
class FolderSize:
    """How much one folder of the cache holds."""

    name: str
    files: int
    bytes: int


def cache_sizes(root: Path | None = None) -> tuple[FolderSize, ...]:
    """Return what each folder of the cache holds, sorted by name; empty when there is no cache yet."""
    folder = home() if root is None else root
    if not folder.is_dir():
        return ()
    sizes = []
    for child in sorted(folder.iterdir()):
        files = [child] if child.is_file() else [path for path in child.rglob("*") if path.is_file()]
        sizes.append(FolderSize(name=child.name, files=len(files), bytes=sum(_size(path) for path in files)))
    return tuple(sizes)


def _size(path: Path) -> int:
    try:
        return path.lstat().st_size
    except OSError:
        return 0  # removed while we looked


def clear_cache(*, models: bool = False, root: Path | None = None) -> int:
    """Remove kept results, and unpacked models if asked to; return the number of bytes freed.

    Only folders that assay made by name are removed, whatever else the folder may hold.

    Raises:
        OutputError: A folder cannot be removed.
    """
    folder = home() if root is None else root
    freed = 0
    for entry in cache_sizes(folder):
        path = folder / entry.name
        if entry.name not in RESULT_FOLDERS + (MODEL_FOLDERS if models else ()) or path.is_symlink():
            continue
        try:
            shutil.rmtree(path)
        except OSError as error:
            raise output_error(path, error) from error
        freed += entry.bytes
    return freed
