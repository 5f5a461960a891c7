"""The rows of token ids that stored activations were read from, as a corpus: to run them again without their text."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from assay.activations.corpora import Piece
from assay.activations.store import Store


@dataclass(frozen=True, slots=True, eq=False)
class Contexts:
    """Every row of the corpus that a store has tokens of, whole, one document each.

    BOS tokens and separators are among the ids: harvest them with `layout="document", bos="none", separator="none"` and
    the `context` that the store was made with.

    Args:
        store: The activations.

    Example:
        >>> store = Store.open("acts")  # doctest: +SKIP
        >>> ids = next(Contexts(store).pieces())[2]  # doctest: +SKIP
    """

    store: Store

    def pieces(self, start: int = 0) -> Iterator[Piece]:
        """Yield (document, piece, token ids) from row `start` on, in the order in which they were stored."""
        number = 0
        for ids in self.store.contexts():
            if number >= start:
                yield number, 0, ids.tolist()
            number += 1

    def describe(self) -> dict[str, Any]:
        """What it is, as JSON values."""
        return {"kind": "contexts", "shards": self.store.describe()["shards"]}
