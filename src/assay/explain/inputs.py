"""From a spec to token ids, with errors that name the field and say what would be valid. No torch."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from assay.base.artifacts import user_path
from assay.base.errors import SpecError, TokenError
from assay.explain.spec import ExplainSpec
from assay.subjects.words import Tokenizer, single_token

_FUNCTION_WORDS = frozenset(
    "a an and are as at be been but by can could did do does for from had has have he her his i if in into is "
    "it its me my of "
    "on or our she so than that the their them then there they this to was we were what when where which who "
    "will with would "
    "you your".split()
)
VARY_FIELDS = ("clean", "corrupt", "answer", "foil")


@dataclass(frozen=True, slots=True, kw_only=True)
class Question:
    """One prompt as token ids.

    Args:
        clean: The prompt.
        corrupt: The corrupt prompt, or None when the embeddings are noised instead.
        noised: The positions that are noised then.
        answer: The answer's token, or None for the likeliest.
        foil: The foil's token, or None for the likeliest other.
    """

    clean: tuple[int, ...]
    corrupt: tuple[int, ...] | None
    noised: tuple[int, ...]
    answer: int | None
    foil: int | None

    def to_dict(self) -> dict[str, Any]:
        """The question as JSON values, for cache keys."""
        return {name: getattr(self, name) for name in self.__slots__}


@dataclass(frozen=True, slots=True, kw_only=True)
class Inputs:
    """A spec with its texts tokenised.

    Args:
        question: The prompt in question.
        variations: The prompts of `vary`.
    """

    question: Question
    variations: tuple[Question, ...] = ()


def read_inputs(text: Tokenizer, spec: ExplainSpec) -> Inputs:
    """Tokenise everything a spec names.

    Args:
        text: The model's tokenizer.
        spec: The spec.

    Returns:
        Token ids; clean and corrupt of one length.

    Raises:
        SpecError: If a prompt is empty or too long, clean and corrupt differ in length or not at all, or `vary` is
            malformed.
        TokenError: If the answer or the foil is not one token.
    """
    fields = {"clean": spec.prompt, "corrupt": spec.corrupt, "answer": spec.answer, "foil": spec.foil}
    names = {"clean": "prompt", "corrupt": "corrupt", "answer": "answer", "foil": "foil"}
    question = _question(text, fields, names, spec.first_token)
    variations = () if spec.vary is None else _variations(text, spec, spec.vary)
    return Inputs(question=question, variations=variations)


def _question(text: Tokenizer, fields: Mapping[str, Any], names: Mapping[str, str], first: bool) -> Question:
    clean = _prompt(text, str(fields["clean"]), names["clean"])
    corrupt = None if fields.get("corrupt") is None else _prompt(text, str(fields["corrupt"]), names["corrupt"])
    if corrupt is not None:
        _check_pair(text, clean, corrupt, names["corrupt"])
    answer, foil = (
        None if fields.get(name) is None else single_token(text, str(fields[name]), field=names[name], first=first)
        for name in ("answer", "foil")
    )
    if answer is not None and answer == foil:
        raise TokenError(f"answer and foil are the same token, {text.decode(answer)!r}", names["foil"])
    noised = () if corrupt is not None else content_positions([text.decode(t) for t in clean])
    if corrupt is None and not noised:
        raise SpecError("the prompt has no content words to noise: give a corrupt prompt", names["corrupt"])
    return Question(
        clean=tuple(clean), corrupt=None if corrupt is None else tuple(corrupt), noised=noised, answer=answer, foil=foil
    )


def _prompt(text: Tokenizer, prompt: str, field: str) -> list[int]:
    if not prompt.strip():
        raise SpecError(f"{field} is empty", field)
    ids = text.encode(prompt)
    if not ids:
        raise SpecError(f"{field} {prompt!r} has no tokens", field)
    if text.context is not None and len(ids) > text.context:
        raise SpecError(f"{field} has {len(ids)} tokens, and the model's context is {text.context}", field)
    return ids


def _check_pair(text: Tokenizer, clean: Sequence[int], corrupt: Sequence[int], field: str) -> None:
    if len(clean) == len(corrupt):
        if list(clean) == list(corrupt):
            raise SpecError("clean and corrupt are the same prompt: nothing would differ", field)
        return
    parts = next(
        (i for i, (a, b) in enumerate(zip(clean, corrupt, strict=False)) if a != b), min(len(clean), len(corrupt))
    )

    def around(ids: Sequence[int]) -> str:
        shown = [repr(text.decode(t)) for t in ids[parts : parts + 4]]
        return " ".join(shown) + (" ..." if len(ids) > parts + 4 else "") if shown else "(the end)"

    raise SpecError(
        f"clean has {len(clean)} tokens and corrupt {len(corrupt)}, and they must align. They part at token {parts}: "
        f"clean goes on {around(clean)}, corrupt {around(corrupt)}",
        field,
    )


def content_positions(tokens: Sequence[str]) -> tuple[int, ...]:
    """The positions of content words: letters or digits, no function word, not special, and not the last token.

    Example:
        >>> content_positions(["The", " Eiffel", " Tower", " is", " in"])
        (1, 2)
    """
    found = []
    for i, token in enumerate(tokens[:-1]):
        word = token.strip().lower()
        special = re.fullmatch(r"<[^<>\s]*>", token.strip()) is not None
        if re.search(r"\w", word) and not special and word not in _FUNCTION_WORDS:
            found.append(i)
    return tuple(found)


def _variations(text: Tokenizer, spec: ExplainSpec, path: Path) -> tuple[Question, ...]:
    try:
        file = user_path(path, partial(SpecError, field="vary"))
        lines = file.read_text(encoding="utf-8-sig").split("\n")  # JSON strings may hold U+2028
    except (OSError, UnicodeDecodeError) as error:
        reason = getattr(error, "strerror", None) or str(error)
        raise SpecError(f"the file {str(path)!r} cannot be read: {reason}", "vary") from None
    questions = []
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        try:
            questions.append(
                _question(text, _row(line, spec.corrupt is not None), {n: n for n in VARY_FIELDS}, spec.first_token)
            )
        except SpecError as error:
            where = f", {error.field}" if error.field else ""
            raise type(error)(f"{path}, line {number}{where}: {error}", "vary") from None
    if not questions:
        raise SpecError(f"the file {str(path)!r} has no lines", "vary")
    return tuple(questions)


def _row(line: str, with_corrupt: bool) -> dict[str, Any]:
    try:
        row = json.loads(line)
    except (ValueError, RecursionError) as error:
        raise SpecError(f"not JSON ({error})") from None
    if not isinstance(row, dict):
        raise SpecError(f"a JSON object is needed, not {type(row).__name__}")
    wanted = VARY_FIELDS if with_corrupt or row.get("corrupt") is not None else ("clean", "answer", "foil")
    missing = [name for name in wanted if not isinstance(row.get(name), str)]
    unknown = sorted(set(row) - set(VARY_FIELDS))
    if missing or unknown:
        faults = [f"no text for {', '.join(missing)}"] * bool(missing) + [f"unknown {', '.join(unknown)}"] * bool(
            unknown
        )
        raise SpecError(f"{' and '.join(faults)}; a line has {', '.join(wanted)}")
    return row
