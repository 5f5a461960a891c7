"""What the methods of this package share besides their files: expected times and positions.

Importing this module imports no torch.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal

RATE = 8e10
"""Parameters times tokens that a forward does in a second on two cores, for the seconds of a plan."""

Position = Literal["last", "first", "mean"]

POSITIONS: dict[Position, Any] = {"last": "last", "first": 0, "mean": None}
"""What `read_sites` calls the token of a text that a spec names."""


def mean_tokens(card: Any, texts: Sequence[str]) -> int:
    """The mean length of texts in tokens, at least 1, from the first fifty of them.

    Args:
        card: The model's card.
        texts: The texts.
    """
    some = texts[:50]
    return max(1, sum(len(card.encode(text)) for text in some) // max(1, len(some)))
