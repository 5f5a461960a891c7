"""What a format is, and what every reader needs: checked tensors, checked configuration, and no code from a file."""

from __future__ import annotations

import contextlib
import errno
import json
import math
import os
import secrets
import shutil
from collections.abc import Callable, Collection, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from assay.base.artifacts import atomic_write_json, output_error, replacing, write_safetensors
from assay.base.errors import DamagedFile, SpecError, nearest


@dataclass(frozen=True, slots=True, kw_only=True)
class Format:
    """A file format of dictionaries.

    Attributes:
        name: What `load(format=)` and `save(format=)` call it.
        about: A sentence: whose it is, which files, which version.
        recognises: Whether a path is in it; looks at names and at headers, and raises nothing.
        read: `read(path, **options)` gives the dictionary.
        write: `write(dictionary, path, **options)` gives the path; None where it is not written here.
    """

    name: str
    about: str
    recognises: Callable[[Path], bool]
    read: Callable[..., Any]
    write: Callable[..., Path] | None = None


def read_json(path: Path) -> dict[str, Any]:
    """Read a JSON object.

    Raises:
        DamagedFile: It is none.
    """
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise DamagedFile(f"{str(path)!r} is not readable JSON: {error}") from error
    if not isinstance(value, dict):
        raise DamagedFile(f"{str(path)!r} holds {type(value).__name__} and should hold an object")
    return value


def read_tensors(path: Path) -> dict[str, Tensor]:
    """Read every tensor of a safetensors file.

    Raises:
        DamagedFile: The file is truncated or is no safetensors file.
    """
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    try:
        return dict(load_file(path))
    except (SafetensorError, OSError, ValueError, KeyError) as error:
        raise DamagedFile(f"{str(path)!r} is not a readable safetensors file: {error}") from error


def read_pickle(path: Path) -> Any:
    """Read a `.pt` file's tensors and plain containers; nothing in it is executed.

    Raises:
        DamagedFile: It holds anything else, or is truncated.
    """
    try:
        return torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # torch raises UnpicklingError, RuntimeError, EOFError and others here
        said = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise DamagedFile(
            f"{str(path)!r} is not a file of plain tensors ({said}); files that would run code are not read"
        ) from error


def take(
    tensors: Mapping[str, Tensor], needed: Collection[str], optional: Collection[str] = (), *, where: Path
) -> dict[str, Tensor]:
    """Return the named tensors in fp32, and refuse a file with others.

    Args:
        tensors: What the file holds.
        needed: Names it must have.
        optional: Names it may have.
        where: The file, for errors.

    Raises:
        SpecError: A name is missing or means nothing; it is quoted.
    """
    for name in needed:
        if name not in tensors:
            held = ", ".join(sorted(tensors)) or "nothing"
            raise SpecError(f"{str(where)!r} has no tensor {name!r}{nearest(name, tensors)} (it holds: {held})", name)
    known = {*needed, *optional}
    for name in tensors:
        if name not in known:
            raise SpecError(
                f"{str(where)!r} has a tensor {name!r} that means nothing here{nearest(name, known)} "
                f"(known: {', '.join(sorted(known))}); a dictionary read without it could be another one",
                name,
            )
    return {
        name: tensor.to(torch.float32).contiguous() if tensor.is_floating_point() else tensor
        for name, tensor in tensors.items()
    }


def check_keys(
    config: Mapping[str, Any],
    needed: Collection[str],
    optional: Collection[str] = (),
    *,
    where: Path,
    ignore: Collection[str] = (),
) -> None:
    """Refuse a configuration that lacks a name or has one that means nothing.

    Args:
        config: What the file says.
        needed: Names it must have.
        optional: Names it may have.
        where: The file, for errors.
        ignore: More names to pass over, as the user says.

    Raises:
        SpecError: A name is missing or means nothing; it is quoted.
    """
    for name in needed:
        if name not in config:
            held = ", ".join(sorted(config)) or "nothing"
            raise SpecError(f"{str(where)!r} does not say {name!r}{nearest(name, config)} (it says: {held})", name)
    known = {*needed, *optional, *ignore}
    for name in config:
        if name not in known:
            raise SpecError(
                f"{str(where)!r} says {name!r}, which means nothing here{nearest(name, known)}: a dictionary read "
                f"without it could be another one. Where it changes nothing, load(..., ignore=[{name!r}])",
                name,
            )


_WORDS = {int: "a whole number", float: "a number", str: "a text", dict: "an object"}


def value(config: Mapping[str, Any], name: str, kind: type, *, where: Path, default: Any = None) -> Any:
    """What a configuration says by a name, if it is of its kind; the default where it says nothing or null.

    Args:
        config: What the file says.
        name: The name.
        kind: int, float (which takes ints too), str or dict.
        where: The file, for errors.
        default: What stands for nothing; None where there must be something.

    Raises:
        SpecError: It is of another kind, or is missing; the name is quoted.

    Example:
        >>> value({"k": 32}, "k", int, where=Path("cfg.json"))
        32
    """
    found = config.get(name)
    if found is None and default is not None:
        return default
    fits = isinstance(found, (int, float) if kind is float else kind) and not isinstance(found, bool)
    if not fits or (isinstance(found, float) and not math.isfinite(found)):
        raise SpecError(f"{str(where)!r} has {name} = {found!r}; it must be {_WORDS[kind]}", name)
    return found


def check_shapes(tensors: Mapping[str, Tensor], wanted: Mapping[str, str], *, where: Path) -> dict[str, int]:
    """Check shapes against names of dimensions, and return what each dimension is.

    Args:
        tensors: What the file holds.
        wanted: Dimensions by tensor, such as `{"encoder.weight": "latents d"}`; a tensor that is absent is passed over.
        where: The file, for errors.

    Raises:
        SpecError: A tensor has another number of dimensions, or two tensors disagree; both are quoted.

    Example:
        >>> check_shapes({"w": torch.zeros(3, 2)}, {"w": "latents d"}, where=Path("x"))
        {'latents': 3, 'd': 2}
    """
    found: dict[str, int] = {}
    first: dict[str, str] = {}
    for name, dims in wanted.items():
        if name not in tensors:
            continue
        shape, names = tuple(tensors[name].shape), dims.split()
        said = f"{name!r} of {str(where)!r} has shape {shape} and should be [{', '.join(names)}]"
        if len(shape) != len(names):
            raise SpecError(said, name)
        for dim, size in zip(names, shape, strict=True):
            if found.setdefault(dim, size) != size:
                raise SpecError(f"{said}, with {dim} = {found[dim]} as {first[dim]!r} has it", name)
            first.setdefault(dim, name)
    return found


_LAST = {".json", ".yaml"}
"""Files that say what is in others: they are replaced after those."""


@contextlib.contextmanager
def staged(path: Path) -> Iterator[Path]:
    """Give an empty folder beside `path`; when the block ends well, its files are moved to the folder `path`.

    Where the block fails, the folder is removed and `path` is as it was.

    Raises:
        OutputError: It cannot be written there.
    """
    stage = path.parent / f".tmp-{os.getpid()}-{secrets.token_hex(6)}"
    try:
        stage.mkdir(parents=True)
        yield stage
        if path.is_dir():
            moved = sorted((p for p in stage.rglob("*") if p.is_file()), key=lambda p: (p.suffix in _LAST, p))
            targets = [path / file.relative_to(stage) for file in moved]
            for target in targets:  # whatever can be refused is refused before the first file is replaced
                if target.is_dir():
                    raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR), str(target))
                target.parent.mkdir(parents=True, exist_ok=True)
            for file, target in zip(moved, targets, strict=True):
                file.replace(target)
        else:
            stage.rename(path)
    except OSError as error:
        raise output_error(path, error) from error
    finally:
        shutil.rmtree(stage, ignore_errors=True)


def write_folder(path: Path, tensors: Mapping[str, Mapping[str, Tensor]], documents: Mapping[str, Any]) -> Path:
    """Write safetensors and JSON files into a folder, all of them or none.

    Args:
        path: The folder; made where it is not there.
        tensors: Tensors by name, by file.
        documents: JSON values, by file.
    """
    with staged(path) as stage:
        for name, held in tensors.items():
            write_safetensors(stage / name, {key: plain(tensor).numpy() for key, tensor in held.items()})
        for name, document in documents.items():
            atomic_write_json(stage / name, document)
    return path


def plain(tensor: Tensor) -> Tensor:
    """A contiguous copy on the CPU, fp32 where it holds floats."""
    held = tensor.detach().cpu()
    return (held.float() if held.is_floating_point() else held).contiguous().clone()


def write_pickle(path: Path, value: Any) -> Path:
    """Write plain tensors and containers as a `.pt` file, whole or not at all."""
    with replacing(path) as temporary:
        save_pickle(value, temporary)
    return path


def save_pickle(value: Any, path: Path) -> None:
    """`torch.save`, whose errors say what to do.

    Raises:
        OutputError: The file cannot be written.
    """
    try:
        with path.open("wb") as file:  # given a path, torch refuses names that have no ending
            torch.save(value, file)
    except (OSError, RuntimeError) as error:  # torch's own writer does not raise OSError
        raise output_error(path, error) from error


def pickle_keys(path: Path) -> frozenset[str]:
    """The names in a `.pt` file that holds a plain mapping; none where it holds anything else or cannot be read."""
    if not path.is_file() or path.suffix not in {".pt", ".pth", ".bin"}:
        return frozenset()
    held = None
    for mapped in (True, False):  # files from before torch 1.6 cannot be mapped into memory
        with contextlib.suppress(Exception):  # whatever is wrong with it, reading it will say
            held = held or torch.load(path, map_location="cpu", weights_only=True, mmap=mapped)
    return frozenset(str(name) for name in held) if isinstance(held, Mapping) else frozenset()


def tensor_keys(path: Path) -> frozenset[str]:
    """The names in the header of a safetensors file; none where it is no such file."""
    from safetensors import safe_open

    if not path.is_file() or path.suffix != ".safetensors":
        return frozenset()
    try:
        with safe_open(path, framework="pt") as file:
            return frozenset(file.keys())
    except Exception:  # whatever is wrong with it, reading it will say
        return frozenset()
