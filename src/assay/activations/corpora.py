"""Text to read activations of: files, tables and hub data sets, as a stream of documents that starts anywhere.

A corpus is told by its pieces: (document, piece, text). A document longer than `PIECE` characters comes in several,
cut at the end of a line where there is one, so that a file of any size is read in constant memory. The order is that of
the files, sorted by name, and of what is in them.
"""

from __future__ import annotations

import gzip
import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any, Literal, Protocol, cast, get_args, runtime_checkable

from assay.base.artifacts import user_path
from assay.base.errors import DamagedFile, LoadError, MissingExtra, OfflineError, SpecError, nearest
from assay.base.hashing import digest, file_sha256

PIECE = 1 << 16
"""The largest number of characters that are tokenised at once."""

Split = Literal["file", "paragraph", "line"]
"""What is one document of a text file: all of it, what stands between blank lines, or a line."""

Piece = tuple[int, int, Any]
"""Which document, which piece of it, and its text (or its token ids, where a corpus has these)."""

_KINDS = {
    **dict.fromkeys((".txt", ".text", ".md", ".rst", ".tex", ".py", ".html", ".log", ""), "text"),
    **dict.fromkeys((".jsonl", ".ndjson"), "jsonl"),
    ".parquet": "parquet",
}
_PACKED = (".gz", ".dz")  # dictzip is gzip with an index that a reader may ignore


@runtime_checkable
class Corpus(Protocol):
    """Documents in an order of their own."""

    def pieces(self, start: int = 0) -> Iterator[Piece]:
        """Yield (document, piece, text) from document `start` on, every document with at least one piece."""

    def describe(self) -> dict[str, Any]:
        """What it is, as JSON values, with a hash of its contents."""


@dataclass(frozen=True, slots=True)
class Texts:
    """Documents that are at hand: texts, or lists of token ids.

    Args:
        documents: The texts.

    Example:
        >>> [text for _, _, text in Texts(["One.", "Two."]).pieces(start=1)]
        ['Two.']
    """

    documents: Sequence[Any]

    def __post_init__(self) -> None:
        """Refuse what is no list of documents."""
        if isinstance(self.documents, str):
            raise SpecError("a corpus is a list of texts; one text would be taken for its characters", "corpus")
        for number, document in enumerate(self.documents):
            _check_document(document, f"document {number}")

    def pieces(self, start: int = 0) -> Iterator[Piece]:
        """Yield (document, piece, text) from document `start` on."""
        for number in range(start, len(self.documents)):
            yield from _numbered(number, self.documents[number])

    def describe(self) -> dict[str, Any]:
        """What it is, as JSON values."""
        documents = [document if isinstance(document, str) else list(document) for document in self.documents]
        return {"kind": "texts", "documents": len(documents), "hash": digest(documents)}


@dataclass(frozen=True, slots=True, kw_only=True)
class Files:
    """Documents in files of one kind; made by `open_corpus`.

    Args:
        kind: What the files are.
        paths: The files, in the order they are read.
        field: The field of a JSON line, or the column of a table.
        split: What is a document of a text file.
        encoding: How text files and JSON lines are written.
    """

    kind: Literal["text", "jsonl", "parquet"]
    paths: tuple[Path, ...]
    field: str = "text"
    split: Split = "file"
    encoding: str = "utf-8"

    def pieces(self, start: int = 0) -> Iterator[Piece]:
        """Yield (document, piece, text) from document `start` on; what comes before is skipped without parsing it.

        Raises:
            SpecError: A line is no JSON, a field or a column is absent or holds no text, or a file is not encoded so.
            DamagedFile: A compressed file or a table cannot be read.
        """
        readers = {"text": self._text, "jsonl": self._lines_of_json, "parquet": self._table}
        number = 0
        for path in self.paths:
            try:
                for document in readers[self.kind](path, max(0, start - number)):
                    if document is not None:
                        at = None
                        for at, text in enumerate(document):
                            yield number, at, text
                        if at is None:
                            yield number, 0, ""
                    number += 1
            except UnicodeDecodeError as error:
                raise SpecError(
                    f"{str(path)!r} is not written in {self.encoding} (byte {error.start} of a block read from it: "
                    f"{error.reason}): say encoding=",
                    "encoding",
                ) from None
            except (EOFError, gzip.BadGzipFile) as error:
                raise DamagedFile(f"{str(path)!r} cannot be unpacked: {error}") from error

    def describe(self) -> dict[str, Any]:
        """What it is, as JSON values; the hash is of the bytes of the files and of how they are read."""
        files = [[path.name, _file_hash(path, *_stamp(path))] for path in self.paths]
        how = {"kind": self.kind, "encoding": self.encoding}
        how |= {"split": self.split} if self.kind == "text" else {"field": self.field}
        names = [path.name for path in self.paths]
        return {**how, "files": names[:20], "n_files": len(names), "hash": digest({**how, "files": files})}

    def _open(self, path: Path) -> Any:
        if path.suffix in _PACKED:
            return gzip.open(path, "rt", encoding=self.encoding)
        return path.open(encoding=self.encoding)

    def _text(self, path: Path, skip: int) -> Iterator[Iterator[str] | None]:
        """The documents of a text file; None for those that are skipped."""
        if self.split == "file":
            yield None if skip else self._whole(path)
            return
        with self._open(path) as file:
            for number, text in enumerate(_paragraphs(file) if self.split == "paragraph" else _lines(file)):
                yield None if number < skip else _cut(text)

    def _whole(self, path: Path) -> Iterator[str]:
        with self._open(path) as file:
            held = ""
            while more := file.read(PIECE - len(held)):
                held += more
                if len(held) == PIECE:
                    end = _cut_at(held)
                    yield held[:end]
                    held = held[end:]
            if held:
                yield held

    def _lines_of_json(self, path: Path, skip: int) -> Iterator[Iterator[Any] | None]:
        with self._open(path) as file:
            number = 0
            for at, line in enumerate(file, 1):
                if not line.strip():
                    continue
                yield None if number < skip else _pieces(self._field_of(line, f"{path.name}, line {at}"))
                number += 1

    def _field_of(self, line: str, where: str) -> Any:
        try:
            found = json.loads(line)
        except ValueError as error:
            raise SpecError(f"{where} is no JSON: {error}", "corpus") from None
        if not isinstance(found, Mapping):
            raise SpecError(f"{where} is a JSON {type(found).__name__}; an object with {self.field!r} is needed")
        if self.field not in found:
            names = ", ".join(map(repr, list(found)[:8]))
            raise SpecError(
                f"{where} has no field {self.field!r}{nearest(self.field, found)} (it has {names})", "field"
            )
        value = "" if found[self.field] is None else found[self.field]
        _check_document(value, f"{where}: field {self.field!r}")
        return value

    def _table(self, path: Path, skip: int) -> Iterator[Iterator[Any] | None]:
        import pyarrow
        from pyarrow import parquet

        try:
            with parquet.ParquetFile(path) as file:
                names = file.schema_arrow.names
                if self.field not in names:
                    raise SpecError(
                        f"{path.name} has no column {self.field!r}{nearest(self.field, names)} "
                        f"(it has {', '.join(map(repr, names[:8]))})",
                        "field",
                    )
                for group in range(file.num_row_groups):
                    rows = file.metadata.row_group(group).num_rows
                    if skip >= rows:
                        yield from (None for _ in range(rows))
                    else:
                        yield from self._group(file, group, skip, path.name)
                    skip = max(0, skip - rows)
        except (pyarrow.ArrowException, OSError) as error:
            raise DamagedFile(f"{str(path)!r} is not a readable Parquet file: {error}") from error

    def _group(self, file: Any, group: int, skip: int, name: str) -> Iterator[Iterator[Any] | None]:
        number = 0
        for batch in file.iter_batches(batch_size=256, row_groups=[group], columns=[self.field]):
            for value in batch.column(0).to_pylist():
                value = "" if value is None else value
                _check_document(value, f"{name}: column {self.field!r}")
                yield None if number < skip else _pieces(value)
                number += 1


@dataclass(frozen=True, slots=True, kw_only=True)
class Hub:
    """A data set of the hub, streamed by the package `datasets`; made by `open_corpus("hub:...")`.

    Args:
        name: `user/name`, or what else `datasets.load_dataset` takes.
        config: The configuration of the data set, where it has several.
        part: Which part of it: `train`, `validation`, ...
        field: The column.
        revision: A commit of the data set; say one, and a harvest can be told from one of another day.
        options: More for `datasets.load_dataset` (`data_files`, ...).
    """

    name: str
    config: str | None = None
    part: str = "train"
    field: str = "text"
    revision: str | None = None
    options: Mapping[str, Any] | None = None

    def pieces(self, start: int = 0) -> Iterator[Piece]:
        """Yield (document, piece, text) from document `start` on.

        Raises:
            MissingExtra: The package `datasets` is not installed.
            OfflineError: The hub could not be reached.
            LoadError: It has no such data set.
            SpecError: There is no such column.
        """
        rows = self._load()
        try:
            for number, row in enumerate(rows.skip(start) if start else rows, start):
                if self.field not in row:
                    names = ", ".join(map(repr, list(row)[:8]))
                    why = f"{nearest(self.field, row)} (it has {names})"
                    raise SpecError(f"{self.name} has no column {self.field!r}{why}", "field")
                value = "" if row[self.field] is None else row[self.field]
                _check_document(value, f"{self.name}: column {self.field!r}")
                yield from _numbered(number, value)
        except OSError as error:
            raise OfflineError(f"reading {self.name!r} from the hub broke off: {error}") from error

    def describe(self) -> dict[str, Any]:
        """What it is, as JSON values; a data set of the hub is told by its name and revision, not by its bytes."""
        how: dict[str, Any] = {
            "kind": "hub",
            "name": self.name,
            "config": self.config,
            "part": self.part,
            "field": self.field,
        }
        how |= {"revision": self.revision, "options": dict(self.options or {})}
        return {**how, "hash": digest(how)}

    def _load(self) -> Any:
        try:
            import datasets  # type: ignore[import-not-found, unused-ignore]
        except ImportError:
            raise MissingExtra("datasets", "hub") from None
        try:
            return datasets.load_dataset(
                self.name,
                self.config,
                split=self.part,
                streaming=True,
                revision=self.revision,
                **dict(self.options or {}),
            )
        except ConnectionError as error:
            raise OfflineError(f"the hub could not be asked for the data set {self.name!r}: {error}") from error
        except (OSError, ValueError) as error:
            raise LoadError(f"the data set {self.name!r} could not be loaded: {error}") from error


def open_corpus(
    x: str | Path | Sequence[str | Path],
    *,
    field: str = "text",
    split: str = "file",
    encoding: str = "utf-8",
    kind: str | None = None,
    part: str = "train",
) -> Corpus:
    r"""Open a corpus by its name.

    Args:
        x: A file, a folder, a pattern (`data/*.jsonl`), several files, or `hub:user/name` (`hub:user/name:config`).
            Text files, JSON lines and Parquet are known by their endings; `.gz` and `.dz` (dictzip) are unpacked.
        field: The field of a JSON line, or the column of a table, that holds the text (or token ids).
        split: What is one document of a text file: "file", "paragraph" (between blank lines) or "line".
        encoding: How text files are written.
        kind: "text", "jsonl" or "parquet", for files whose ending does not say.
        part: With `hub:`: which part of the data set.

    Raises:
        SpecError: There is no such file, the files are of several kinds, or an option is unknown.

    Example:
        >>> from pathlib import Path
        >>> _ = Path("two.jsonl").write_text('{"text": "One."}\n{"text": "Two."}\n')
        >>> [text for _, _, text in open_corpus("two.jsonl").pieces()]
        ['One.', 'Two.']
    """
    if split not in get_args(Split):
        raise SpecError(
            f"split={split!r}{nearest(str(split), get_args(Split))}: 'file', 'paragraph' or 'line'", "split"
        )
    if kind is not None and kind not in ("text", "jsonl", "parquet"):
        raise SpecError(f"kind={kind!r}: 'text', 'jsonl' or 'parquet'", "kind")
    if isinstance(x, str) and x.startswith("hub:"):
        name, _, config = x.removeprefix("hub:").partition(":")
        return Hub(name=name, config=config or None, part=part, field=field)
    paths = _found([x] if isinstance(x, str | Path) else list(x), named=kind is not None)
    try:
        "".encode(encoding)
    except LookupError:
        raise SpecError(f"encoding={encoding!r} is none that Python knows", "encoding") from None
    kinds = {path: kind or _kind(path) for path in paths}
    if len(set(kinds.values())) > 1:
        some = {found: path.name for path, found in kinds.items()}
        raise SpecError(f"a corpus has files of one kind; these are {some}: give a pattern, 'data/*.jsonl'", "corpus")
    found = cast(Literal["text", "jsonl", "parquet"], kinds[paths[0]])
    return Files(kind=found, paths=tuple(paths), field=field, split=cast(Split, split), encoding=encoding)


def _found(given: Sequence[str | Path], *, named: bool) -> list[Path]:
    """The files that names, folders and patterns stand for, those of one folder sorted."""
    paths: list[Path] = []
    for one in given:
        path = user_path(one, lambda said: SpecError(said, "corpus"))
        if path.is_dir():
            inside = sorted(file for file in path.rglob("*") if file.is_file() and not file.name.startswith("."))
            files = [file for file in inside if named or (_kind(file, known=True) and file.suffix)]
        elif any(sign in path.name for sign in "*?[") and not path.exists():
            files = sorted(file for file in path.parent.glob(path.name) if file.is_file())
        else:
            files = [path] if path.is_file() else []
        if not files:
            beside = [] if path.exists() or not path.parent.is_dir() else [p.name for p in path.parent.iterdir()]
            near = nearest(path.name, beside) if beside else ""
            raise SpecError(f"no text to read at {str(one)!r}{near}", "corpus")
        paths += files
    if not paths:
        raise SpecError("a corpus needs at least one file", "corpus")
    return paths


def _kind(path: Path, *, known: bool = False) -> str:
    suffixes = [suffix for suffix in path.suffixes if suffix not in _PACKED]
    found = _KINDS.get(suffixes[-1].lower() if suffixes else "")
    if found is None and not known:
        ends = ", ".join(ending for ending in _KINDS if ending)
        raise SpecError(f"{path.name!r} ends in none of {ends}: say kind='text', 'jsonl' or 'parquet'", "kind")
    return found or ""


def _stamp(path: Path) -> tuple[int, int]:
    stat = path.stat()
    return stat.st_size, stat.st_mtime_ns


@lru_cache(maxsize=4096)  # a file is asked for its hash by the plan and by the run
def _file_hash(path: Path, size: int, changed: int) -> str:
    return file_sha256(path)


def _check_document(value: Any, where: str) -> None:
    if isinstance(value, str):
        return
    ids = isinstance(value, Sequence) or hasattr(value, "tolist")
    if not ids or not all(isinstance(i, int) and not isinstance(i, bool) for i in list(value)[:8]):
        raise SpecError(f"{where} is {value!r:.60}; a text or a list of token ids is needed", "corpus")


def _numbered(number: int, document: Any) -> Iterator[Piece]:
    for at, piece in enumerate(_pieces(document)):
        yield number, at, piece


def _pieces(document: Any) -> Iterator[Any]:
    return _cut(document) if isinstance(document, str) else iter([list(document)])


def _cut(text: str) -> Iterator[str]:
    """A text in pieces of at most `PIECE` characters; the empty text is one piece."""
    if not text:
        yield ""
    while text:
        end = _cut_at(text[:PIECE]) if len(text) > PIECE else len(text)
        yield text[:end]
        text = text[end:]


def _cut_at(text: str) -> int:
    """Where to cut: after the last line end, else before the last space (which tokenizers keep with its word)."""
    return text.rfind("\n") + 1 or max(text.rfind(" "), 0) or len(text)


def _lines(file: Iterable[str]) -> Iterator[str]:
    return (line.rstrip("\n") for line in file if line.strip())


def _paragraphs(file: Iterable[str]) -> Iterator[str]:
    held: list[str] = []
    for line in file:
        if line.strip():
            held.append(line)
        elif held:
            yield "".join(held).rstrip("\n")
            held = []
    if held:
        yield "".join(held).rstrip("\n")
