"""Bad specifications in the user's words: each problem with its field, what was given, and what would be valid."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from pydantic import BaseModel, ValidationError

from assay.base.errors import SpecError, nearest

_SHOWN = 60


def spec_error(error: ValidationError, model: type[BaseModel], *, where: str) -> SpecError:
    """Turn a pydantic validation error into a `SpecError` with one line for each problem.

    Args:
        error: What pydantic raised.
        model: The class that was being validated, whose field names are the valid ones.
        where: What was being read, for the first line: `"explain"`.
    """
    problems = [_problem(dict(item), model) for item in error.errors(include_url=False)]
    lines = [f"{field}: {text}" if field else text for field, text in problems]
    first = problems[0][0] if problems else ""
    message = f"{where}: {lines[0]}" if len(lines) == 1 else "\n  ".join([f"{where}: {len(lines)} problems", *lines])
    return SpecError(message, field=first or None)


def _problem(item: dict[str, Any], model: type[BaseModel]) -> tuple[str, str]:
    location = tuple(part for part in item.get("loc", ()))
    field = _path(location)
    given = item.get("input")
    kind, context = str(item.get("type", "")), dict(item.get("ctx") or {})
    if kind == "extra_forbidden":
        valid = _field_names(model, location[:-1])
        return field, f"there is no such field{nearest(str(location[-1]), valid)} (fields: {', '.join(sorted(valid))})"
    if kind == "missing":
        return field, "is required and was not given"
    if kind in {"literal_error", "enum"}:
        expected = str(context.get("expected", ""))
        choices = [choice.strip().strip("'") for choice in expected.replace(" or ", ", ").split(",")]
        return field, f"{_quote(given)} is not one of {expected}{nearest(str(given), choices)}"
    if kind in {"value_error", "assertion_error"}:
        return field, str(context.get("error", item.get("msg", "")))
    message = str(item.get("msg", "is not valid"))
    return field, f"{message[:1].lower()}{message[1:]}, but {_quote(given)} was given"


def _path(location: Iterable[Any]) -> str:
    path = ""
    for part in location:
        path += f"[{part}]" if isinstance(part, int) else f".{part}" if path else str(part)
    return path


def _field_names(model: type[BaseModel], location: tuple[Any, ...]) -> list[str]:
    """Return the field names at a place inside a model, following nested models as far as they are plain fields."""
    current = model
    for part in location:
        field = current.model_fields.get(str(part))
        if field is None or not (isinstance(field.annotation, type) and issubclass(field.annotation, BaseModel)):
            continue
        current = field.annotation
    return list(current.model_fields)


def _quote(value: object) -> str:
    text = repr(value)
    return text if len(text) <= _SHOWN else f"{text[: _SHOWN - 1]}…"
