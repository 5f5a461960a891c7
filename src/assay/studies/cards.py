"""The card of a method, made from its docstring and its spec: what it computes, when it lies, its control, settings."""

from __future__ import annotations

import inspect
import re
import types
import typing
from dataclasses import dataclass
from typing import Any

from pydantic import BaseModel
from pydantic.fields import FieldInfo

from assay.base.method import Method

HEADINGS = ("What it computes", "Controls", "When it misleads", "Source", "Measured here")
"""The headings of a card. In the docstring each begins a paragraph: `**Controls.** The same pipeline with ...`."""

_HEADING = re.compile(r"\*\*([^*]+?)\.?\*\*\s*(.*)", re.DOTALL)
_ARGUMENTS = re.compile(r"(Args|Returns|Raises|Example):\n")


@dataclass(frozen=True, slots=True, kw_only=True)
class Setting:
    """One field of a method's spec, as a reader sees it."""

    name: str
    type: str
    default: str
    required: bool
    description: str


@dataclass(frozen=True, slots=True, kw_only=True)
class MethodCard:
    """A method described under fixed headings.

    Attributes:
        name: Its name.
        version: Its version.
        summary: Its first sentence.
        sections: Pairs of heading and text, in the order of `HEADINGS`; others follow.
        settings: The fields of its spec.
    """

    name: str
    version: str
    summary: str
    sections: tuple[tuple[str, str], ...]
    settings: tuple[Setting, ...]


def method_card(method: Method) -> MethodCard:
    """Return the card of a registered method.

    Paragraphs that stand before the first heading belong to "What it computes".
    """
    parts: dict[str, list[str]] = {}
    current = HEADINGS[0]
    for paragraph in (inspect.getdoc(method.function) or "").split("\n\n")[1:]:
        if _ARGUMENTS.match(paragraph):
            break
        heading = _HEADING.match(paragraph)
        current, text = heading.groups() if heading else (current, paragraph)
        parts.setdefault(current, []).append(" ".join(text.split()))
    order = [*HEADINGS, *(heading for heading in parts if heading not in HEADINGS)]
    return MethodCard(
        name=method.name,
        version=method.version,
        summary=method.summary,
        sections=tuple((heading, "\n\n".join(parts[heading])) for heading in order if heading in parts),
        settings=tuple(_setting(name, field) for name, field in method.spec.model_fields.items()),
    )


def _setting(name: str, field: FieldInfo) -> Setting:
    default = field.get_default(call_default_factory=True, validated_data={}) if not field.is_required() else None
    return Setting(
        name=name,
        type=type_name(field.annotation),
        default="" if field.is_required() else repr(default),
        required=field.is_required(),
        description=field.description or "",
    )


def type_name(annotation: Any) -> str:
    """Return a type as a reader writes it: `text`, `whole number`, `one of 'a', 'b'`, with None left out.

    Example:
        >>> type_name(str | None)
        'text'
    """
    origin, arguments = typing.get_origin(annotation), typing.get_args(annotation)
    if origin is typing.Literal:
        return "one of " + ", ".join(map(repr, arguments))
    if origin in {typing.Union, types.UnionType}:
        return " or ".join(type_name(argument) for argument in arguments if argument is not type(None))
    if origin is typing.Annotated:
        return type_name(arguments[0])
    if origin in {list, tuple, set, frozenset} and arguments:
        return f"list of {type_name(arguments[0])}"
    names = {"str": "text", "int": "whole number", "float": "number", "bool": "yes or no", "Path": "file"}
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return annotation.__name__
    plain = getattr(annotation, "__name__", str(annotation))
    return names.get(plain, plain)
