"""Canonical JSON and the hashes made of it: the identity of a spec, a step, a study and a file.

Two values that mean the same give the same text, in every process and on every machine: keys are sorted, there is no
white space, floats are written in their shortest exact form, and what JSON cannot hold (NaN, infinities, arbitrary
objects) is refused instead of being turned into a string.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Callable, Mapping
from enum import Enum
from pathlib import Path
from typing import Any

import numpy as np

from assay.base.errors import SpecError

DIGEST_LENGTH = 32
"""Number of hexadecimal characters in a `digest`: 128 bits."""

_CHUNK = 1 << 20


def plain(value: Any, where: str = "value") -> Any:
    """Return `value` as JSON holds it: dict, list, str, int, float, bool or None, all the way down.

    Mappings, tuples, lists, enumeration members, numpy scalars, values with a `to_dict` and pydantic models are
    converted.

    Args:
        value: What to convert.
        where: The name of the value in error messages.

    Raises:
        SpecError: A float is not finite, a key is not a string, or a type has no JSON form. The message says where.

    Example:
        >>> plain({"k": (1, np.float64(0.5))})
        {'k': [1, 0.5]}
    """
    if isinstance(value, np.generic):
        value = value.item()
    if isinstance(value, Enum):
        value = value.value
    if value is None or isinstance(value, bool):
        return value
    if isinstance(value, int | str):
        return int(value) if isinstance(value, int) else str(value)
    if isinstance(value, float):
        if not math.isfinite(value):
            raise SpecError(f"{where} is {value!r}; JSON holds finite numbers only (use None for a missing one)", where)
        return float(value)
    if isinstance(value, Mapping):
        for key in value:
            if not isinstance(key, str):
                raise SpecError(f"{where} has the key {key!r} of type {type(key).__name__}; keys must be str", where)
        return {str(key): plain(item, f"{where}.{key}") for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [plain(item, f"{where}[{i}]") for i, item in enumerate(value)]
    return plain(_as_data(value, where), where)


def _as_data(value: Any, where: str) -> Any:
    if not isinstance(value, type):
        if hasattr(value, "model_dump"):
            # Twice: the JSON dump knows how each type is written, the Python dump shows numbers JSON would lose.
            _refuse_lossy(value.model_dump(), where)
            return value.model_dump(mode="json")
        if hasattr(value, "to_dict"):
            return value.to_dict()
    valid = "dict, list, tuple, str, int, float, bool, None, numpy scalar, enum, pydantic model"
    raise SpecError(f"{where} has type {type(value).__name__}, which has no canonical form; valid: {valid}", where)


def _refuse_lossy(value: Any, where: str) -> None:
    """Raise `SpecError` for what pydantic's JSON dump loses: NaN becomes null, a set gets the order of its hashes."""
    if isinstance(value, float) and not math.isfinite(value):
        raise SpecError(f"{where} is {value!r}; only finite numbers have a canonical form", where)
    if isinstance(value, set | frozenset):
        raise SpecError(f"{where} is a {type(value).__name__}, which has no order; use a sorted tuple", where)
    if isinstance(value, Mapping):
        for key, item in value.items():
            _refuse_lossy(item, f"{where}.{key}")
    elif isinstance(value, list | tuple):
        for i, item in enumerate(value):
            _refuse_lossy(item, f"{where}[{i}]")


def canonical_json(value: Any) -> str:
    """Return the one JSON text that stands for `value`: sorted keys, no spaces, exact floats, ASCII.

    An int and the float equal to it stay different (`1` and `1.0`): a typed spec decides which of them a field holds.

    Raises:
        SpecError: `value` holds something without a canonical form (see `plain`).

    Example:
        >>> canonical_json({"b": 0.1, "a": (1, None)})
        '{"a":[1,null],"b":0.1}'
    """
    return json.dumps(plain(value), sort_keys=True, separators=(",", ":"), allow_nan=False, ensure_ascii=True)


def digest(value: Any) -> str:
    """Return the first 32 hexadecimal characters of the SHA-256 of `canonical_json(value)`.

    Example:
        >>> digest({"a": 1, "b": 2}) == digest({"b": 2, "a": 1})
        True
    """
    return hashlib.sha256(canonical_json(value).encode("ascii")).hexdigest()[:DIGEST_LENGTH]


def file_sha256(path: str | Path, progress: Callable[[int, int], object] | None = None) -> str:
    """Return the SHA-256 of a file's bytes as 64 hexadecimal characters, reading it in pieces.

    Args:
        path: The file.
        progress: Called as `progress(bytes_done, bytes_total)` after each MiB.

    Raises:
        OSError: The file cannot be read.
    """
    path = Path(path)
    sha = hashlib.sha256()
    total, done = path.stat().st_size, 0
    with path.open("rb") as file:
        while chunk := file.read(_CHUNK):
            sha.update(chunk)
            done += len(chunk)
            if progress is not None:
                progress(done, total)
    return sha.hexdigest()
