"""Checkpoints: written whole, the last two kept, a damaged one noticed and the one before it used.

A checkpoint is a folder `step_<n>` with `state.safetensors` and, written after it, `state.json`, which holds the
SHA-256 of the first and what the run was asked. A folder without its JSON was interrupted and is not looked at.
"""

from __future__ import annotations

import shutil
import warnings
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from assay.base.artifacts import atomic_write_json, read_safetensors, write_safetensors
from assay.base.errors import DamagedFile, SpecError
from assay.base.hashing import file_sha256
from assay.base.version import __version__
from assay.dictionaries.formats.format import read_json

_SCHEMA = "assay-training/1"
_KEPT = 2
_SOURCE = "source/"


@dataclass(frozen=True, slots=True, kw_only=True)
class Checkpoint:
    """What a run is, between two steps, as it lies on the disk.

    Attributes:
        step: Steps done.
        arrays: Everything of the state.
        asked: What the run was asked: settings and data, as JSON values.
        source: Where the data stood: tensors and JSON values, by name.
    """

    step: int
    arrays: dict[str, np.ndarray]
    asked: Mapping[str, Any]
    source: Mapping[str, Any]


def write(folder: Path, checkpoint: Checkpoint) -> Path:
    """Write a checkpoint, then remove all but the last two.

    Raises:
        OutputError: It cannot be written there.
    """
    place = folder / _name(checkpoint.step)
    tensors = {name: value for name, value in checkpoint.source.items() if isinstance(value, Tensor)}
    of_source = {f"{_SOURCE}{name}": tensor.cpu().numpy() for name, tensor in tensors.items()}
    write_safetensors(place / "state.safetensors", checkpoint.arrays | of_source)
    document = {
        "schema": _SCHEMA,
        "assay": __version__,
        "step": checkpoint.step,
        "asked": dict(checkpoint.asked),
        "source": {name: value for name, value in checkpoint.source.items() if name not in tensors},
        "sha256": file_sha256(place / "state.safetensors"),
    }
    atomic_write_json(place / "state.json", document)
    for old in _whole(folder)[:-_KEPT]:
        (old / "state.json").unlink(missing_ok=True)  # first the name that makes it a checkpoint
        shutil.rmtree(old, ignore_errors=True)
    return place


def latest(folder: Path, asked: Mapping[str, Any], at: int | None = None) -> Checkpoint | None:
    """The newest whole checkpoint of a run, or None where there is none.

    Args:
        folder: Where they are.
        asked: What the run that would go on was asked.
        at: The step it must be of, where processes must agree.

    Warns:
        UserWarning: A newer one is damaged and was passed over.

    Raises:
        SpecError: It belongs to a run that was asked something else; what differs is named.
        DamagedFile: There are checkpoints, and every one is damaged.
    """
    found = [place for place in _whole(folder) if at is None or place.name == _name(at)]
    said = ""
    for place in reversed(found):
        try:
            checkpoint = _read(place)
        except DamagedFile as error:
            said = str(error)
            warnings.warn(f"{error}; the checkpoint before it is used", stacklevel=2)
            continue
        _same(checkpoint.asked, asked, place)
        return checkpoint
    if found:
        raise DamagedFile(f"every checkpoint in {str(folder)!r} is damaged ({said}); remove the folder to start again")
    return None


def _name(step: int) -> str:
    return f"step_{step:010d}"


def _whole(folder: Path) -> list[Path]:
    return sorted(place for place in folder.glob("step_*") if (place / "state.json").is_file())


def _read(place: Path) -> Checkpoint:
    document = read_json(place / "state.json")
    if document.get("schema") != _SCHEMA:
        raise DamagedFile(f"{str(place)!r} has schema {document.get('schema')!r} and should have {_SCHEMA!r}")
    weights = place / "state.safetensors"
    if not weights.is_file() or file_sha256(weights) != document["sha256"]:
        raise DamagedFile(f"{str(weights)!r} is missing or does not have the hash it was written with")
    arrays = read_safetensors(weights)
    of_source = {name: arrays.pop(name) for name in list(arrays) if name.startswith(_SOURCE)}
    tensors = {name.removeprefix(_SOURCE): torch.from_numpy(array) for name, array in of_source.items()}
    return Checkpoint(
        step=document["step"], arrays=arrays, asked=document["asked"], source=document["source"] | tensors
    )


def _same(before: Mapping[str, Any], now: Mapping[str, Any], place: Path) -> None:
    for name in sorted({*before, *now}):
        differ = list(_differences(before.get(name), now.get(name), name))
        if differ:
            said = "; ".join(f"{what} {old!r:.60}, now {new!r:.60}" for what, old, new in differ[:4])
            raise SpecError(
                f"{str(place.parent)!r} holds a run with other {name} ({said}): give another folder, or ask for the "
                "same",
                name,
            )


def _differences(before: Any, now: Any, name: str) -> Iterator[tuple[str, Any, Any]]:
    """What differs, at the depth where it does."""
    if isinstance(before, Mapping) and isinstance(now, Mapping):
        for key in sorted({*before, *now}):
            yield from _differences(before.get(key), now.get(key), key)
    elif before != now:
        yield name, before, now
