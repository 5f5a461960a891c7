"""Text and tokens of a model, by its loaded tokenizer or by its card alone. No torch."""

from __future__ import annotations

from typing import Any, Protocol, runtime_checkable

from assay.base.errors import SpecError, TokenError


@runtime_checkable
class Tokenizer(Protocol):
    """What reading text for a model needs: its tokenizer and the size of its context."""

    @property
    def context(self) -> int | None:
        """The longest prompt, in tokens, if it is known."""

    def encode(self, text: str, *, special: bool = True) -> list[int]:
        """Token ids of a text."""

    def decode(self, token: int) -> str:
        """The text of one token."""


class ModelText:
    """The `Tokenizer` of a loaded subject."""

    def __init__(self, subject: Any) -> None:
        if subject.tokenizer is None:
            raise SpecError("text is needed, and this subject has no tokenizer: load it with tokenizer=", "model")
        self._tokenizer = subject.tokenizer
        limit = getattr(subject.config, "max_position_embeddings", None)
        self.context: int | None = limit if isinstance(limit, int) else None

    def encode(self, text: str, *, special: bool = True) -> list[int]:
        """Token ids of a text."""
        ids: list[int] = self._tokenizer(text, add_special_tokens=special)["input_ids"]
        return ids

    def decode(self, token: int) -> str:
        """The text of one token."""
        return str(self._tokenizer.decode([int(token)]))


class CardText:
    """The `Tokenizer` of a model's card, without torch."""

    def __init__(self, card: Any) -> None:
        self._card = card
        limit = card.config.get("max_position_embeddings") or card.config.get("n_positions")
        self.context: int | None = limit if isinstance(limit, int) else None

    def encode(self, text: str, *, special: bool = True) -> list[int]:
        """Token ids of a text."""
        ids: list[int] = self._card.encode(text, special=special)
        return ids

    def decode(self, token: int) -> str:
        """The text of one token."""
        return str(self._card.tokenizer.decode([int(token)], skip_special_tokens=False))


def single_token(text: Tokenizer, word: str, *, field: str, first: bool = False) -> int:
    """The id of a text that is one token.

    Args:
        text: The model's tokenizer.
        word: For instance `" Mary"`, with its leading space.
        field: The name of the argument, for the message.
        first: Take the first token of a longer text instead of refusing.

    Returns:
        The token's id.

    Raises:
        TokenError: If the text is empty, or more than one token and `first` is not set; the message shows the tokens.
    """
    ids = text.encode(word, special=False)
    if not ids:
        raise TokenError(f"{field} {word!r} has no tokens", field)
    if len(ids) > 1 and not first:
        pieces = " + ".join(repr(text.decode(i)) for i in ids)
        raise TokenError(
            f"{field} {word!r} is {len(ids)} tokens ({pieces}), and one is needed: try another spelling (a "
            f"leading space "
            "often matters), or --first-token to compare the first tokens",
            field,
        )
    return ids[0]
