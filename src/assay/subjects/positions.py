"""Positions by what a prompt says: a text that some of its tokens spell, or a span of its characters.

Both are plain data. They are looked up in each prompt by itself, so one edit finds " John" wherever each row has it.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from assay.base.errors import SpecError, nearest

_REPLACEMENT = "\ufffd"
_CONTEXT = 8
"""Tokens before one that are decoded with it: enough for any character or merge that spans several."""


@dataclass(frozen=True, slots=True)
class At:
    """The tokens of each prompt that spell a text, whole: `At(" John")`.

    A text that is several tokens selects all of them, or the one that `tokens` says. A text that lies inside a larger
    token is not found: the leading space of `" John"` counts.

    Args:
        text: What the tokens spell.
        occurrence: Which occurrence, where there are several: an int (0 is the first, -1 the last), "last" or "all".
            Without it a prompt that has the text more than once is refused.
        tokens: Of a text that is several tokens: "all" of them, the "first" or the "last".

    Raises:
        SpecError: If the text is empty or an argument is none of these.

    Example:
        >>> At(" John", occurrence="last")
        At(text=' John', occurrence='last', tokens='all')
    """

    text: str
    occurrence: int | Literal["last", "all"] | None = None
    tokens: Literal["all", "first", "last"] = "all"

    def __post_init__(self) -> None:
        """Refuse what selects nothing anywhere."""
        if not isinstance(self.text, str) or not self.text:
            raise SpecError(f"At({self.text!r}): the text of at least one token is needed", "positions")
        whole = isinstance(self.occurrence, int) and not isinstance(self.occurrence, bool)
        if not (whole or self.occurrence in (None, "last", "all")):
            raise SpecError(f"At({self.text!r}): occurrence={self.occurrence!r}: an int, 'last' or 'all'", "positions")
        if self.tokens not in ("all", "first", "last"):
            raise SpecError(f"At({self.text!r}): tokens={self.tokens!r}: 'all', 'first' or 'last'", "positions")


@dataclass(frozen=True, slots=True)
class Span:
    """The tokens of each prompt that have characters `start` to `stop` (not included) of its text.

    A space before a word belongs to the word's token and does not select it. Prompts must have been given as texts.

    Args:
        start: The first character, 0 for the text's first.
        stop: One past the last.

    Raises:
        SpecError: If the span is empty or negative.

    Example:
        >>> Span(5, 12)
        Span(start=5, stop=12)
    """

    start: int
    stop: int

    def __post_init__(self) -> None:
        """Refuse an empty span."""
        ends = (self.start, self.stop)
        if any(isinstance(end, bool) or not isinstance(end, int) for end in ends) or not 0 <= self.start < self.stop:
            raise SpecError(
                f"Span({self.start!r}, {self.stop!r}): whole numbers with 0 <= start < stop are needed", "positions"
            )


@dataclass(frozen=True, slots=True, kw_only=True)
class Reading:
    """A prompt as its tokens spell it.

    Args:
        text: The prompt.
        regions: The characters of each token, as half-open ranges; a space before a word is its token's. Tokens that
            share a character (parts of one emoji, say) share a region; a token without characters has an empty one.
    """

    text: str
    regions: tuple[tuple[int, int], ...]

    @property
    def tokens(self) -> list[str]:
        """The text of each token."""
        return [self.text[start:stop] for start, stop in self.regions]

    def find(self, at: At) -> list[int]:
        """The positions of a text.

        Raises:
            IndexError: If it is not there, or is there more often than was said.
        """
        found = [span for span in map(self._covering, _occurrences(self.text, at.text)) if span]
        if not found:
            raise IndexError(self._absent(at.text))
        if at.occurrence is None and len(found) > 1:
            places = ", ".join(str(span[0]) for span in found)
            raise IndexError(
                f"{at.text!r} occurs {len(found)} times (at positions {places}): say occurrence=0, 1, ..., 'last' or "
                f"'all'"
            )
        if at.occurrence != "all":
            which = {None: 0, "last": -1}.get(at.occurrence, at.occurrence)  # type: ignore[arg-type]
            if not -len(found) <= which < len(found):  # type: ignore[operator]
                raise IndexError(f"{at.text!r} occurs {len(found)} times, and occurrence={at.occurrence} was asked for")
            found = [found[which]]  # type: ignore[index]
        part = {"all": slice(None), "first": slice(0, 1), "last": slice(-1, None)}[at.tokens]
        return sorted({position for span in found for position in span[part]})

    def inside(self, span: Span) -> list[int]:
        """The positions of the tokens with characters in a span.

        Raises:
            IndexError: If the span reaches past the text, or no token has a character there.
        """
        if span.stop > len(self.text):
            raise IndexError(f"characters {span.start} to {span.stop} of a text of {len(self.text)}: {self.text!r:.80}")
        positions = []
        for position, (start, stop) in enumerate(self.regions):
            blank = len(self.text[start:stop]) - len(self.text[start:stop].lstrip())
            first = start if blank == stop - start else start + blank
            if max(first, span.start) < min(stop, span.stop):
                positions.append(position)
        if not positions:
            raise IndexError(
                f"no token has characters {span.start} to {span.stop}, {self.text[span.start : span.stop]!r}"
            )
        return positions

    def _covering(self, span: tuple[int, int]) -> list[int]:
        """The tokens that spell a range of characters exactly, or none."""
        touched = [i for i, (start, stop) in enumerate(self.regions) if max(start, span[0]) < min(stop, span[1])]
        exact = touched and (self.regions[touched[0]][0], self.regions[touched[-1]][1]) == span
        return touched if exact else []

    def _absent(self, text: str) -> str:
        inside = next((token for token in self.tokens if text in token and token != text), None)
        hint = f"; it lies inside the token {inside!r}" if inside else nearest(text, dict.fromkeys(self.tokens))
        shown = self.tokens if len(self.tokens) <= 24 else [*self.tokens[:12], "...", *self.tokens[-11:]]
        return f"no tokens spell {text!r}{hint} (the prompt's tokens: {' '.join(map(repr, shown))})"


def read_text(tokenizer: Any, text: str, ids: Sequence[int]) -> Reading | None:
    """Read a prompt by the offsets of its tokenizer; None where the tokenizer has none, or gives other tokens.

    Args:
        tokenizer: A transformers tokenizer.
        text: The prompt.
        ids: Its tokens.
    """
    if not getattr(tokenizer, "is_fast", False):
        return None
    for special in (True, False):
        encoded = tokenizer(text, add_special_tokens=special, return_offsets_mapping=True)
        if list(encoded["input_ids"]) == list(ids):
            pieces = [str(tokenizer.decode([i])) for i in ids]
            return Reading(text=text, regions=_with_spaces(text, encoded["offset_mapping"], pieces))
    return None


def read_ids(tokenizer: Any, ids: Sequence[int]) -> Reading:
    """Read token ids by decoding each after the ones before it.

    Args:
        tokenizer: A transformers tokenizer.
        ids: The tokens.
    """

    def decode(part: Sequence[int]) -> str:
        return str(tokenizer.decode(list(part), skip_special_tokens=False, clean_up_tokenization_spaces=False))

    text, regions, waiting = "", [], 0
    for i in range(len(ids)):
        first = max(0, i - _CONTEXT)
        whole, before = decode(ids[first : i + 1]), decode(ids[first:i]) if i > first else ""
        added = whole[len(before.rstrip(_REPLACEMENT)) :]
        waiting += 1
        if added.endswith(_REPLACEMENT) and i + 1 < len(ids) and waiting < _CONTEXT:
            continue  # part of a character: it belongs to the token that completes it as well
        regions += [(len(text), len(text) + len(added))] * waiting
        text, waiting = text + added, 0
    return Reading(text=text, regions=tuple(regions))


def _with_spaces(text: str, offsets: Sequence[Sequence[int]], pieces: Sequence[str]) -> tuple[tuple[int, int], ...]:
    """Give each space to its token, whether or not the tokenizer's offsets do."""
    regions, end = [], 0
    for (start, stop), piece in zip(offsets, pieces, strict=True):
        if start == stop:  # a special token that was added, or white space whose offsets were trimmed away
            width = len(piece) if piece.isspace() and text.startswith(piece, end) else 0
            regions.append((end, end + width))
            end += width
            continue
        regions.append((end if end <= start and not text[end:start].strip() else start, stop))
        end = max(end, stop)
    return tuple(regions)


def _occurrences(text: str, part: str) -> list[tuple[int, int]]:
    found, at = [], text.find(part)
    while at >= 0:
        found.append((at, at + len(part)))
        at = text.find(part, at + 1)
    return found


def select(positions: At | Span, read: Callable[[], Reading], row: int) -> list[int]:
    """The positions that a selector means in one prompt.

    Args:
        positions: The selector.
        read: The prompt's reading.
        row: Its row, for the message.

    Raises:
        IndexError: If the prompt has no such tokens.
    """
    reading = read()
    try:
        return reading.find(positions) if isinstance(positions, At) else reading.inside(positions)
    except IndexError as error:
        raise IndexError(f"row {row}: {error}") from None
