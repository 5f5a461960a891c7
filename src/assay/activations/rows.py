"""Rows of tokens made of a corpus: packed or cut to a context length, in an order that can be taken up at any row."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from typing import Any, Literal, get_args

import numpy as np
from jaxtyping import Int

from assay.activations.corpora import Corpus
from assay.base.errors import SpecError, nearest
from assay.base.hashing import canonical_json, digest

Layout = Literal["pack", "split", "document"]
"""How documents become rows: one after the other; each in rows of its own; or the beginning of each, one row."""

Start = Literal["auto", "row", "document", "none"]
"""Where the BOS token goes: before each row, before each document, or nowhere; "auto" as the tokenizer does it."""

_TOGETHER = 1 << 18
"""How many characters the tokenizer is given at once."""


@dataclass(frozen=True, slots=True)
class Cursor:
    """A place between two rows, from which the rows go on.

    Args:
        row: The number of the next row.
        document: The document that its first token is from (or the one after the last that was used).
        piece: The piece of that document.
        token: How many tokens of that piece were used.
    """

    row: int = 0
    document: int = 0
    piece: int = 0
    token: int = 0

    def to_dict(self) -> dict[str, int]:
        """Itself as JSON values."""
        return asdict(self)


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Row:
    """One row of tokens.

    Args:
        index: Its number, from 0.
        ids: The tokens.
        documents: The document that each token is from; -1 for a BOS token that was put before the row.
        after: Where the next row begins.
    """

    index: int
    ids: Int[np.ndarray, " n"]
    documents: Int[np.ndarray, " n"]
    after: Cursor


class TokenRows:
    """The rows of a corpus, tokenised as they are asked for.

    Args:
        corpus: The text.
        tokenizer: A transformers tokenizer; None for a corpus of token ids.
        context: The largest number of tokens in a row.
        layout: "pack" lays documents end to end and cuts every `context` tokens; "split" begins a new row with each
            document; "document" keeps the first `context` tokens of each document, one row a document.
        bos: Where the BOS token goes: before each "row", before each "document", "none"; "auto" is "row" where the
            tokenizer puts one before a text, else "none".
        separator: What ends a document: "eos", "none" or a token id; "auto" is the tokenizer's EOS token where
            documents are packed and there is one.
        min_length: Rows with fewer tokens are left out (the last one of a corpus, short documents).

    Raises:
        SpecError: An option is not as said, or a token is asked for that the tokenizer does not have.

    Example:
        >>> from assay.activations.corpora import Texts
        >>> rows = TokenRows(Texts([[5, 6, 7], [8, 9]]), None, context=4, separator=2)
        >>> [row.ids.tolist() for row in rows]
        [[5, 6, 7, 2], [8, 9, 2]]
    """

    def __init__(
        self,
        corpus: Corpus,
        tokenizer: Any = None,
        *,
        context: int = 128,
        layout: str = "pack",
        bos: str = "auto",
        separator: str | int = "auto",
        min_length: int = 2,
    ) -> None:
        if not isinstance(corpus, Corpus):
            raise SpecError(
                f"a corpus is made by open_corpus(...) or Texts([...]); this is a {type(corpus).__name__}", "corpus"
            )
        for name, value, valid in (("layout", layout, get_args(Layout)), ("bos", bos, get_args(Start))):
            if value not in valid:
                said = " or ".join(map(repr, valid))
                raise SpecError(f"{name}={value!r}{nearest(str(value), valid)}: {said}", name)
        if context < 2 or not 1 <= min_length <= context:
            raise SpecError(
                f"context={context}, min_length={min_length}: rows have at least 2 tokens, and no more than context",
                "context" if context < 2 else "min_length",
            )
        self.corpus, self.tokenizer = corpus, tokenizer
        self.context, self.layout, self.min_length = context, layout, min_length
        added = None if tokenizer is None else _own_bos(tokenizer)
        self.bos = ("none" if added is None else "row") if bos == "auto" else bos
        self.bos_id = None if self.bos == "none" else _special(tokenizer, "bos")
        self.separator_id = self._separator(separator)
        self._lead = int(self.bos == "row")

    def __iter__(self) -> Iterator[Row]:
        """All rows, from the first."""
        return self.rows()

    def rows(self, at: Cursor | int | None = None) -> Iterator[Row]:
        """The rows from a place on.

        Args:
            at: The `after` of the row before, from which this is quick; or a row's number, for which all that comes
                before is tokenised again.
        """
        if isinstance(at, int):
            return (row for row in self.rows() if row.index >= at)
        return self._rows(at or Cursor())

    def describe(self) -> dict[str, Any]:
        """What makes these rows, as JSON values; `hash` stands for all of it."""
        how = {
            "corpus": self.corpus.describe(),
            "tokenizer": tokenizer_hash(self.tokenizer),
            "context": self.context,
            "layout": self.layout,
            "bos": self.bos,
            "bos_id": self.bos_id,
            "separator_id": self.separator_id,
            "min_length": self.min_length,
        }
        return {**how, "hash": digest(how)}

    def _separator(self, given: str | int) -> int | None:
        if isinstance(given, int) and not isinstance(given, bool):
            return given
        if given not in ("auto", "eos", "none"):
            raise SpecError(f"separator={given!r}: 'auto', 'eos', 'none' or a token id", "separator")
        if given == "eos":
            return _special(self.tokenizer, "eos")
        wanted = given == "auto" and self.layout == "pack" and self.tokenizer is not None
        found = getattr(self.tokenizer, "eos_token_id", None) if wanted else None
        return None if found is None else int(found)

    def _rows(self, at: Cursor) -> Iterator[Row]:
        """Fill one row after the other from the stream of tokens."""
        context, lead = self.context, self._lead
        ids, documents = np.empty(context, np.int32), np.empty(context, np.int64)
        if lead and self.bos_id is not None:
            ids[0], documents[0] = self.bos_id, -1
        fill, index, current, full = lead, at.row, at.document, -1

        def made(after: Cursor) -> Row:
            return Row(index=index, ids=ids[:fill].copy(), documents=documents[:fill].copy(), after=after)

        for document, piece, tokens in self._stream(at):
            if document == full:
                continue
            if document != current:
                if self.layout != "pack" and fill > lead:
                    if fill >= self.min_length:
                        yield made(Cursor(index + 1, document))
                        index += 1
                    fill = lead
                current = document
            used = at.token if (document, piece) == (at.document, at.piece) else 0
            while used < len(tokens):
                take = min(context - fill, len(tokens) - used)
                ids[fill : fill + take] = tokens[used : used + take]
                documents[fill : fill + take] = document
                fill, used = fill + take, used + take
                if fill == context and self.layout == "document":
                    full, used = document, len(tokens)  # what is left of it begins no row
                if fill == context:
                    yield made(
                        Cursor(index + 1, document + 1)
                        if full == document
                        else Cursor(index + 1, document, piece, used)
                    )
                    index, fill = index + 1, lead
        if fill > lead and fill >= self.min_length:
            yield made(Cursor(index + 1, current + 1))

    def _stream(self, at: Cursor) -> Iterator[tuple[int, int, list[int]]]:
        """(document, piece, tokens) from a piece on, with what goes before and after a document; empty ones are not."""
        before = [self.bos_id] if self.bos == "document" and self.bos_id is not None else []
        after = [] if self.separator_id is None else [self.separator_id]
        for document, piece, tokens, last in self._tokenised(at):
            if not tokens and piece == 0 and last:
                continue
            yield document, piece, [*(before if piece == 0 else []), *tokens, *(after if last else [])]

    def _tokenised(self, at: Cursor) -> Iterator[tuple[int, int, list[int], bool]]:
        """The tokens of each piece, many pieces given to the tokenizer together."""
        held: list[tuple[int, int, Any, bool]] = []
        size, skipped = 0, -1
        for document, piece, text, last in _with_last(self.corpus.pieces(at.document)):
            if document == at.document and piece < at.piece:
                continue
            if self.layout == "document" and document == skipped:
                continue
            held.append((document, piece, text, last))
            size += len(text)
            if self.layout == "document" and piece >= self.context:  # of each piece at least a token: it is full
                skipped = document
            if size >= _TOGETHER or len(held) >= 256:
                yield from self._tokens(held)
                held, size = [], 0
        yield from self._tokens(held)

    def _tokens(self, held: list[tuple[int, int, Any, bool]]) -> Iterator[tuple[int, int, list[int], bool]]:
        texts = [text for _, _, text, _ in held if isinstance(text, str)]
        if texts and self.tokenizer is None:
            raise SpecError("this subject has no tokenizer to read a text with: load it with tokenizer=", "corpus")
        found = iter(self._encode(texts) if texts else [])
        for document, piece, text, last in held:
            yield document, piece, next(found) if isinstance(text, str) else list(text), last

    def _encode(self, texts: list[str]) -> list[list[int]]:
        try:
            ids: list[list[int]] = self.tokenizer(texts, add_special_tokens=False, verbose=False)["input_ids"]
        except (UnicodeEncodeError, TypeError):  # half a character, which JSON can hold and no tokenizer reads
            whole = [text.encode("utf-8", "replace").decode("utf-8") for text in texts]
            ids = self.tokenizer(whole, add_special_tokens=False, verbose=False)["input_ids"]
        return ids


def _with_last(pieces: Iterator[Any]) -> Iterator[tuple[int, int, Any, bool]]:
    """Each piece with whether its document ends with it."""
    held = None
    for piece in pieces:
        if held is not None:
            yield *held, piece[0] != held[0]
        held = piece
    if held is not None:
        yield *held, True


def _own_bos(tokenizer: Any) -> int | None:
    """The BOS token that a tokenizer puts before a text, if it does."""
    found = getattr(tokenizer, "bos_token_id", None)
    ids = tokenizer("a", add_special_tokens=True)["input_ids"]
    return None if found is None or not ids or ids[0] != found else int(found)


def _special(tokenizer: Any, name: str) -> int:
    found = getattr(tokenizer, f"{name}_token_id", None)
    if found is None:
        why = "there is no tokenizer" if tokenizer is None else "this tokenizer has none"
        raise SpecError(f"{name.upper()} token: {why}", "bos" if name == "bos" else "separator")
    return int(found)


def tokenizer_hash(tokenizer: Any) -> str:
    """A hash of what a tokenizer does; "" where there is none."""
    if tokenizer is None:
        return ""
    backend = getattr(tokenizer, "backend_tokenizer", None)
    text = canonical_json(tokenizer.get_vocab()) if backend is None else backend.to_str()
    return hashlib.sha256(text.encode("utf-8")).hexdigest()
