"""Files that are whole or absent: atomic writes, safetensors, Parquet, and the store of finished steps.

Every write goes to a temporary file in the same folder, is flushed to the disk, and then takes its name in one rename.
A reader therefore sees the old file, the new file or none, whatever was killed and whenever; when two processes write
the same name the last one wins. Nothing here is ever pickled.
"""

from __future__ import annotations

import contextlib
import errno
import hashlib
import json
import os
import secrets
import time
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from assay.base.errors import AssayError, DamagedFile, OutputError

_STEP_FORMAT = "assay-step/1"
_TEMPORARY = ".tmp-"
_ORPHAN_SECONDS = 3600.0
"""A temporary file this old belongs to a process that was killed."""


def user_path(path: str | Path, error: Callable[[str], AssayError] = OutputError) -> Path:
    """Return `path` with a leading `~` or `~name` replaced by that user's home folder.

    Args:
        path: A path as a user wrote it.
        error: Makes the error from a message.

    Raises:
        AssayError: There is no such user; it is what `error` made.

    Example:
        >>> user_path("runs/mine").as_posix()
        'runs/mine'
    """
    try:
        return Path(path).expanduser()
    except RuntimeError:
        raise error(f"{str(path)!r} begins with the home folder of a user that this machine does not know") from None


def home() -> Path:
    """Return the folder that holds everything assay keeps: `$ASSAY_HOME`, else `assay` in the user's cache folder.

    The cache folder is `$XDG_CACHE_HOME` where that is set, else `~/.cache`. The folder is not created.

    Raises:
        OutputError: The variable names the home folder of an unknown user.

    Example:
        >>> from unittest import mock
        >>> with mock.patch.dict(os.environ, ASSAY_HOME="/data/assay"):
        ...     home().as_posix()
        '/data/assay'
    """
    if configured := os.environ.get("ASSAY_HOME"):
        return user_path(configured, lambda said: OutputError(f"ASSAY_HOME: {said}"))
    if cache := os.environ.get("XDG_CACHE_HOME"):
        return user_path(cache, lambda said: OutputError(f"XDG_CACHE_HOME: {said}")) / "assay"
    return user_path("~/.cache/assay")


def output_error(path: Path, cause: BaseException) -> OutputError:
    """Turn what the operating system said about `path` into an `OutputError` that says what to do.

    Args:
        path: The file or folder that could not be written.
        cause: The exception that writing it raised.
    """
    number = cause.errno if isinstance(cause, OSError) else None
    text = str(cause)
    if number in {errno.ENOSPC, errno.EDQUOT, errno.EFBIG} or "No space left" in text or "File too large" in text:
        return OutputError(f"no room left to write {str(path)!r} ({text}): free some space or choose another folder")
    if number in {errno.EACCES, errno.EPERM, errno.EROFS}:
        return OutputError(f"not allowed to write {str(path)!r} ({text}): choose a folder you can write to")
    if number in {errno.ENOTDIR, errno.EEXIST, errno.EISDIR}:
        return OutputError(f"cannot write {str(path)!r}: a file or folder of that name is in the way ({text})")
    return OutputError(f"could not write {str(path)!r}: {text}")


@contextlib.contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """Give a temporary path beside `path`; when the block ends well, flush it to the disk and rename it into place.

    If the block, the flush or the rename fails, the temporary file is removed and `path` is as it was.

    Args:
        path: Where the finished file goes; missing parent folders are created.

    Raises:
        OutputError: The file cannot be written there.

    Example:
        >>> import tempfile
        >>> target = Path(tempfile.mkdtemp()) / "new" / "a.txt"
        >>> with replacing(target) as temporary:
        ...     _ = temporary.write_text("whole")
        >>> target.read_text()
        'whole'
    """
    temporary = path.parent / f"{_TEMPORARY}{os.getpid()}-{secrets.token_hex(6)}-{path.name[-40:]}"
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        yield temporary
        _flush(temporary)
        temporary.replace(path)
        _flush(path.parent)
    except OSError as error:
        raise output_error(path, error) from error
    finally:
        with contextlib.suppress(OSError):
            temporary.unlink(missing_ok=True)


def _flush(path: Path) -> None:
    """Make the operating system put a file (or a folder's list of names) on the disk, where it can."""
    if path.is_dir() and os.name == "nt":
        return  # a folder cannot be opened there, and its renames are journalled
    descriptor = os.open(path, os.O_RDONLY if os.name != "nt" else os.O_RDWR)
    try:
        os.fsync(descriptor)
    except OSError as error:
        if error.errno not in {errno.EINVAL, errno.ENOTSUP, errno.EROFS}:  # some file systems cannot flush
            raise
    finally:
        os.close(descriptor)


def atomic_write_bytes(path: Path, data: bytes) -> None:
    """Write `data` to `path` so that the file is whole or as it was before.

    Raises:
        OutputError: The file cannot be written there.
    """
    with replacing(path) as temporary:
        temporary.write_bytes(data)


def atomic_write_text(path: Path, text: str) -> None:
    """Write `text` as UTF-8 with its own line ends, as `atomic_write_bytes` does."""
    atomic_write_bytes(path, text.encode("utf-8"))


def atomic_write_json(path: Path, value: object, *, indent: int | None = 2) -> None:
    """Write `value` as JSON, as `atomic_write_bytes` does.

    Raises:
        OutputError: The file cannot be written there.
        ValueError: The value holds NaN or an infinity, which JSON cannot say.
    """
    atomic_write_text(path, json.dumps(value, indent=indent, ensure_ascii=False, allow_nan=False) + "\n")


def write_safetensors(path: Path, arrays: Mapping[str, Any], metadata: Mapping[str, str] | None = None) -> None:
    """Write named arrays as one safetensors file, whole or not at all.

    Args:
        path: The file.
        arrays: Numeric or boolean arrays of any shape and memory order, by name.
        metadata: Text kept in the file's header.

    Raises:
        OutputError: The file cannot be written, or an array is not numeric.
    """
    from safetensors import SafetensorError
    from safetensors.numpy import save_file

    # safetensors writes the buffer as it lies in memory, so a transposed view would come back with its values moved.
    plain = {name: _plain_array(name, array) for name, array in arrays.items()}
    with replacing(path) as temporary:
        try:
            save_file(plain, temporary, metadata=dict(metadata) if metadata else None)
        except SafetensorError as error:
            raise output_error(path, error) from error


def _plain_array(name: str, value: Any) -> np.ndarray[Any, Any]:
    array = np.asarray(value)
    if array.dtype.kind not in "biufc":
        raise OutputError(
            f"array {name!r} has dtype {array.dtype}, which safetensors cannot hold; give numbers or booleans, "
            "and put text in a table or in JSON"
        )
    return np.asarray(array, dtype=array.dtype.newbyteorder("="), order="C")


def read_safetensors(path: Path) -> dict[str, np.ndarray[Any, Any]]:
    """Read every array of a safetensors file.

    Raises:
        DamagedFile: The file is truncated or is no safetensors file.
    """
    from safetensors import SafetensorError
    from safetensors.numpy import load

    try:
        return dict(load(path.read_bytes()))
    except (SafetensorError, ValueError, KeyError, TypeError) as error:
        raise DamagedFile(f"{str(path)!r} is not a readable safetensors file: {error}") from error


def write_parquet(path: Path, columns: Mapping[str, Sequence[Any]]) -> None:
    """Write named columns of one length as a Parquet file, whole or not at all.

    Args:
        path: The file.
        columns: Lists or one-dimensional arrays of numbers, text, booleans or None.

    Raises:
        OutputError: The file cannot be written, or the columns differ in length.
    """
    import pyarrow
    from pyarrow import parquet

    lengths = {name: len(column) for name, column in columns.items()}
    if len(set(lengths.values())) > 1:
        raise OutputError(f"the columns of {path.name!r} differ in length: {lengths}")
    with replacing(path) as temporary:
        parquet.write_table(pyarrow.table({name: pyarrow.array(column) for name, column in columns.items()}), temporary)


def read_parquet(path: Path) -> dict[str, list[Any]]:
    """Read a Parquet file as lists by column name.

    Raises:
        DamagedFile: The file is truncated or is no Parquet file.
    """
    import pyarrow
    from pyarrow import parquet

    try:
        table = parquet.ParquetFile(path).read()
    except (pyarrow.ArrowException, OSError) as error:
        if isinstance(error, FileNotFoundError):
            raise
        raise DamagedFile(f"{str(path)!r} is not a readable Parquet file: {error}") from error
    return dict(table.to_pydict())


class StepStore:
    """The results of finished steps, one checksummed safetensors file a step.

    A value is a mapping from names to numpy arrays or JSON values. It is checked against its own SHA-256 whenever it is
    read: an entry that is truncated or altered is removed with a warning, and counts as absent.

    Args:
        root: The folder of the store; created when the first entry is written.
        warn: What is told about a damaged entry; `warnings.warn` by default.

    Example:
        >>> import tempfile
        >>> store = StepStore(Path(tempfile.mkdtemp()))
        >>> store.put("ab12", {"effect": np.arange(3.0), "tokens": ["a", "b"]})
        >>> store.get("ab12")["tokens"], store.get("absent")
        (['a', 'b'], None)
    """

    def __init__(self, root: Path, warn: Callable[[str], None] | None = None) -> None:
        self.root = root
        self._warn = warn if warn is not None else _default_warning

    def path(self, key: str) -> Path:
        """Return the file that holds, or would hold, the entry of `key`."""
        return self.root / key[:2] / f"{key}.safetensors"

    def has(self, key: str) -> bool:
        """Tell whether there is an undamaged entry for `key`."""
        return self.get(key) is not None

    def get(self, key: str) -> dict[str, Any] | None:
        """Return the entry of `key`, or None when there is none or it was damaged (and has now been removed)."""
        path = self.path(key)
        try:
            return _read_step(path)
        except FileNotFoundError:
            return None
        except (DamagedFile, OSError) as error:
            self._warn(f"discarded a damaged cache entry, which will be computed again: {error}")
            with contextlib.suppress(OSError):
                path.unlink()
            return None

    def put(self, key: str, value: Mapping[str, Any]) -> None:
        """Keep `value` under `key`; a concurrent writer of the same key does no harm, the last one wins.

        Raises:
            OutputError: The store cannot be written, or a value is neither an array nor JSON.
        """
        arrays, text = _split(value)
        checksum = _step_checksum(text, arrays)
        write_safetensors(self.path(key), arrays, {"format": _STEP_FORMAT, "json": text, "sha256": checksum})

    def sweep(self) -> None:
        """Remove the temporary files that killed processes left behind more than an hour ago."""
        for leftover in self.root.glob(f"*/{_TEMPORARY}*"):
            with contextlib.suppress(OSError):
                if time.time() - leftover.stat().st_mtime > _ORPHAN_SECONDS:
                    leftover.unlink()


def _default_warning(text: str) -> None:
    warnings.warn(text, stacklevel=3)


def step_value(value: Mapping[str, Any]) -> dict[str, Any]:
    """Return `value` as a `StepStore` would give it back, so that a fresh result and a cached one are alike.

    Arrays become C-ordered arrays, numpy scalars arrays without dimensions, and everything else what JSON makes of it.

    Raises:
        OutputError: A value is neither an array nor JSON.

    Example:
        >>> step_value({"pair": (1, 2), "size": np.float32(2.0)})
        {'pair': [1, 2], 'size': array(2., dtype=float32)}
    """
    arrays, text = _split(value)
    return {**json.loads(text), **arrays}


def _split(value: Mapping[str, Any]) -> tuple[dict[str, np.ndarray[Any, Any]], str]:
    """Divide a step's value into its arrays and the JSON text of the rest (NaN is kept, as arrays keep it)."""
    arrays: dict[str, np.ndarray[Any, Any]] = {}
    plain: dict[str, Any] = {}
    for name, item in value.items():
        if isinstance(item, np.ndarray | np.generic) and not isinstance(item, np.str_):
            arrays[name] = _plain_array(name, item)
            continue
        try:
            plain[name] = json.loads(json.dumps(item, default=_numpy_to_json))
        except (TypeError, ValueError) as error:
            raise OutputError(
                f"a step returned {name!r} of type {type(item).__name__}, which cannot be kept ({error}); "
                "return numpy arrays and plain JSON values (text, numbers, booleans, None, lists, dictionaries)"
            ) from error
    return arrays, json.dumps(plain, sort_keys=True)


def _numpy_to_json(value: object) -> object:
    if isinstance(value, np.ndarray | np.generic):
        return value.tolist()
    raise TypeError(f"a value of type {type(value).__name__} is not JSON")


def _step_checksum(text: str, arrays: Mapping[str, np.ndarray[Any, Any]]) -> str:
    checksum = hashlib.sha256(text.encode("utf-8"))
    for name in sorted(arrays):
        array = arrays[name]
        checksum.update(json.dumps([name, array.dtype.name, list(array.shape)]).encode("utf-8"))
        checksum.update(array.reshape(-1).view(np.uint8).data if array.size else b"")
    return checksum.hexdigest()


def _read_step(path: Path) -> dict[str, Any]:
    from safetensors import SafetensorError, safe_open

    arrays: dict[str, np.ndarray[Any, Any]] = {}
    if not path.is_file():
        raise FileNotFoundError(path)
    try:
        with safe_open(path, framework="numpy") as file:
            metadata = file.metadata() or {}
            for name in file.keys():
                arrays[name] = file.get_tensor(name)
    except (SafetensorError, ValueError, KeyError, TypeError, UnicodeDecodeError) as error:
        raise DamagedFile(f"{str(path)!r}: {error}") from error
    if metadata.get("format") != _STEP_FORMAT:
        raise DamagedFile(f"{str(path)!r}: format {metadata.get('format')!r} where {_STEP_FORMAT!r} is expected")
    text = metadata.get("json", "")
    if _step_checksum(text, arrays) != metadata.get("sha256"):
        raise DamagedFile(f"{str(path)!r}: its contents do not have the checksum written with them")
    return {**json.loads(text), **arrays}
