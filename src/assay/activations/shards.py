"""The files of stored activations: safetensors shards with checksums, the manifest that lists them, and the lock.

    folder/manifest.json            what was asked, what there is, and the SHA-256 of each shard
    folder/shard-00000.safetensors  one tensor a site, [tokens, width], beside token ids, rows and positions

A shard is written to a temporary name and renamed when it is whole, and only then listed. What the manifest lists is
therefore whole unless the disk lost it, and what it does not list does not count.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from assay.base.artifacts import atomic_write_json, output_error, replacing
from assay.base.errors import DamagedFile, OutputError
from assay.base.hashing import canonical_json, digest, file_sha256

FORMAT = "assay-activations/1"
MANIFEST = "manifest.json"
_LOCK = ".lock"
_NAMES = {
    torch.bfloat16: "BF16", torch.float32: "F32", torch.float64: "F64", torch.int64: "I64", torch.int32: "I32",
}  # fmt: skip
_NUMPY = {"BF16": np.uint16, "F32": np.float32, "F64": np.float64, "I64": np.int64, "I32": np.int32}
_PIECE = 1 << 24


@dataclass(frozen=True, slots=True, kw_only=True)
class Shard:
    """One file of stored activations.

    Args:
        name: The file's name.
        tokens: How many tokens it has.
        rows: How many rows of the corpus it was made of.
        first_row: The number of the first of them.
        bytes: Its size.
        sha256: The hash of its bytes.
        dropped: How many tokens were left out, by reason.
        norms: For each site, the mean norm and the mean square norm.
        after: The place in the corpus after its last row.
    """

    name: str
    tokens: int
    rows: int
    first_row: int
    bytes: int
    sha256: str
    dropped: Mapping[str, int]
    norms: Mapping[str, tuple[float, float]]
    after: Mapping[str, int]


@dataclass(frozen=True, slots=True, kw_only=True)
class Manifest:
    """What a folder of activations holds.

    Args:
        request: What was asked for: subject, corpus, sites, filter, ... as JSON values.
        widths: The width of each site, in order.
        dtype: `bfloat16` or `float32`.
        thresholds: For each site, the norm above which a token was left out; empty without a filter.
        seen: What the first rows showed: median and largest norms.
        shards: The files.
        complete: Whether the harvest came to its end.
        notes: What a reader should know.
        versions: The versions it was made with.
    """

    request: Mapping[str, Any]
    widths: Mapping[str, int]
    dtype: str
    thresholds: Mapping[str, float] = field(default_factory=dict)
    seen: Mapping[str, Any] = field(default_factory=dict)
    shards: tuple[Shard, ...] = ()
    complete: bool = False
    notes: tuple[str, ...] = ()
    versions: Mapping[str, str] = field(default_factory=dict)

    @property
    def tokens(self) -> int:
        """How many tokens there are."""
        return sum(shard.tokens for shard in self.shards)

    def norms(self) -> dict[str, dict[str, float]]:
        """For each site, the mean norm and the mean square norm over all tokens."""
        found = {}
        for site in self.widths:
            sums = [sum(shard.tokens * shard.norms[site][i] for shard in self.shards) for i in (0, 1)]
            mean, square = (total / max(1, self.tokens) for total in sums)
            found[site] = {"mean_norm": mean, "mean_square_norm": square}
        return found

    def dropped(self) -> dict[str, int]:
        """How many tokens were left out, by reason."""
        found: dict[str, int] = {}
        for shard in self.shards:
            for why, count in shard.dropped.items():
                found[why] = found.get(why, 0) + count
        return found

    def write(self, folder: Path) -> None:
        """Write it, whole or not at all.

        Raises:
            OutputError: The folder cannot be written.
        """
        values = asdict(self) | {"shards": [asdict(shard) for shard in self.shards]}
        summary = {"tokens": self.tokens, "norms": self.norms(), "dropped": self.dropped()}
        values = {"format": FORMAT, **summary, **values}
        atomic_write_json(folder / MANIFEST, {**values, "digest": digest(values)})

    @classmethod
    def read(cls, folder: Path) -> Manifest:
        """Read the manifest of a folder.

        Raises:
            FileNotFoundError: There is none.
            DamagedFile: It cannot be read, or was altered.
        """
        path = folder / MANIFEST
        text = path.read_bytes()
        try:
            values = json.loads(text)
            said = values.pop("digest")
            if values["format"] != FORMAT:
                raise DamagedFile(f"{str(path)!r} has the format {values['format']!r} where {FORMAT!r} is expected")
            if digest(values) != said:
                raise DamagedFile(f"{str(path)!r} was altered: it does not have the digest written with it")
            shards = tuple(
                Shard(**{**shard, "norms": {site: tuple(pair) for site, pair in shard["norms"].items()}})
                for shard in values["shards"]
            )
            for derived in ("format", "tokens", "norms", "dropped"):
                del values[derived]
            return cls(**{**values, "shards": shards, "notes": tuple(values["notes"])})
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise DamagedFile(f"{str(path)!r} is no manifest of activations: {error!r}") from error


def write_shard(path: Path, tensors: Mapping[str, Tensor], metadata: Mapping[str, Any]) -> tuple[int, str]:
    """Write tensors as one safetensors file, whole or not at all, and return its size and SHA-256.

    The bytes depend on the tensors and the metadata alone: the header is canonical, and wide types come first, so that
    every tensor begins at a multiple of its width and can be mapped into memory.

    Raises:
        OutputError: The file cannot be written.
    """
    order = sorted(tensors, key=lambda name: (-tensors[name].element_size(), name))
    header: dict[str, Any] = {"__metadata__": {"assay": canonical_json(metadata)}}
    at = 0
    for name in order:
        tensor = tensors[name]
        end = at + tensor.numel() * tensor.element_size()
        header[name] = {"dtype": _NAMES[tensor.dtype], "shape": list(tensor.shape), "data_offsets": [at, end]}
        at = end
    text = json.dumps(header, separators=(",", ":")).encode("ascii")
    text += b" " * (-(8 + len(text)) % 64)
    sha = hashlib.sha256()
    with replacing(path) as temporary, temporary.open("wb") as file:
        for piece in (len(text).to_bytes(8, "little"), text, *(_bytes(tensors[name]) for name in order)):
            for start in range(0, len(piece), _PIECE):
                sha.update(piece[start : start + _PIECE])
                file.write(piece[start : start + _PIECE])
    return 8 + len(text) + at, sha.hexdigest()


def _bytes(tensor: Tensor) -> Any:
    flat = tensor.detach().cpu().contiguous().reshape(-1)
    return flat.view(torch.uint8).numpy().data if flat.numel() else b""


def map_shard(path: Path) -> dict[str, np.ndarray]:
    """Map the tensors of a shard into memory, read-only; bfloat16 comes as its bits in uint16.

    Raises:
        DamagedFile: The file is absent, truncated or no safetensors file.
    """
    try:
        with path.open("rb") as file:
            length = int.from_bytes(file.read(8), "little")
            if not 2 <= length <= path.stat().st_size - 8:
                raise ValueError(f"its header would have {length} bytes")
            header = json.loads(file.read(length))
        header.pop("__metadata__", None)
        size = path.stat().st_size - 8 - length
        if size != max((entry["data_offsets"][1] for entry in header.values()), default=0):
            raise ValueError(f"it has {size} bytes of data")
        whole = np.memmap(path, mode="r", offset=8 + length, dtype=np.uint8) if size else np.empty(0, np.uint8)
        found = {}
        for name, entry in header.items():
            first, last = entry["data_offsets"]
            found[name] = whole[first:last].view(_NUMPY[entry["dtype"]]).reshape(entry["shape"])
        return found
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise DamagedFile(f"the shard {str(path)!r} cannot be read: {error}") from error


def check_shard(folder: Path, shard: Shard, *, contents: bool) -> None:
    """Hold a shard to its size and, if `contents`, to its checksum.

    Raises:
        DamagedFile: It is not what was written; the message names it.
    """
    path = folder / shard.name
    try:
        size = path.stat().st_size
        found = file_sha256(path) if contents and size == shard.bytes else shard.sha256
    except OSError as error:
        raise DamagedFile(f"the shard {str(path)!r} cannot be read: {error}") from error
    if size != shard.bytes:
        raise DamagedFile(f"the shard {str(path)!r} is damaged: {size:,} bytes where {shard.bytes:,} were written")
    if found != shard.sha256:
        raise DamagedFile(f"the shard {str(path)!r} is damaged: its SHA-256 is not the one in {MANIFEST}")


@contextlib.contextmanager
def locked(folder: Path) -> Iterator[None]:
    """Hold a folder for this process alone; the lock goes with the process, however it ends.

    Raises:
        OutputError: Another process holds it, or the folder cannot be written.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        file = (folder / _LOCK).open("a+b")
    except OSError as error:
        raise output_error(folder, error) from error
    with file:
        try:
            _lock(file.fileno())
        except OSError:
            raise OutputError(
                f"another harvest is writing to {str(folder)!r}: wait for it, or choose another folder"
            ) from None
        yield


def _lock(descriptor: int) -> None:
    if os.name == "nt":
        import msvcrt

        msvcrt.locking(descriptor, msvcrt.LK_NBLCK, 1)  # type: ignore[attr-defined, unused-ignore]
    else:
        import fcntl

        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
