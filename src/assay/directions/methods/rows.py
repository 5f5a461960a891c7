"""JSON lines read for a study: named texts, and texts of two classes. Importing this module imports no torch."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from jaxtyping import Int

from assay.base.artifacts import user_path
from assay.base.errors import SpecError
from assay.directions.labelled import Labelled


def text_rows(path: Path, needed: Sequence[str], optional: Sequence[str] = (), *, field: str) -> list[dict[str, str]]:
    """Read JSON lines whose values are texts.

    Args:
        path: The file.
        needed: The names that every line has, none of them empty.
        optional: Names that a line may have.
        field: The spec's field, for errors.

    Raises:
        SpecError: The file cannot be read, has no rows, or a line is no such object; file and line are named.
    """
    file = user_path(path)
    wanted = "give {" + ", ".join(f'"{name}": ...' for name in needed) + "}"
    try:
        lines = file.read_text(encoding="utf-8-sig").split("\n")  # a text may hold other line separators
    except (OSError, UnicodeDecodeError) as error:
        raise SpecError(f"{field}: {file} cannot be read: {error}", field) from error
    found = []
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        where = f"{field}: {file}, line {number}"
        try:
            row = json.loads(line)
        except ValueError as error:
            raise SpecError(f"{where} is not JSON ({error}); {wanted}", field) from error
        if not isinstance(row, dict) or not all(isinstance(row.get(name), str) and row[name] for name in needed):
            raise SpecError(f"{where} lacks a text; {wanted}", field)
        unknown = sorted(set(row) - {*needed, *optional})
        if unknown:
            raise SpecError(f"{where} has {', '.join(unknown)}, which means nothing here; {wanted}", field)
        found.append({name: str(value) for name, value in row.items()})
    if not found:
        raise SpecError(f"{field}: {file} has no rows; {wanted}", field)
    return found


def two_classes(path: Path, need: str) -> Labelled:
    """Read labelled texts of two classes.

    Args:
        path: The file.
        need: Why there are two, for the error.

    Raises:
        SpecError: The file cannot be read, or has one label, or more than two.
    """
    data = Labelled.read(path)
    found = classes(data)
    if len(found) != 2:
        raise SpecError(f"{path} has {len(found)} labels ({found[:5]}); {need}", "data")
    return data


def in_groups(data: Labelled, path: Path) -> Labelled:
    """See that some rows share a group.

    Raises:
        SpecError: Each row is a group of its own.
    """
    if len(set(data.groups)) < len(data):
        return data
    raise SpecError(
        f"each of the {len(data)} rows of {path} is a group of its own, and whether a probe remembers words cannot be "
        "told apart from whether it reads them: give rows that share a word, an entity or a topic one group",
        "data",
    )


def repeated_texts(data: Labelled) -> tuple[str, ...]:
    """A warning where a text stands in several groups."""
    n = data.repeated
    if not n:
        return ()
    return (
        f"{n} text{'s stand' if n > 1 else ' stands'} in more than one group: with a copy on each side of the split, "
        "held-out rows are not new. Give copies one group.",
    )


def classes(data: Labelled) -> list[int | str]:
    """The labels, each once, in the order of their texts; of two, the second is the positive one."""
    return sorted(set(data.labels), key=str)


def codes(data: Labelled) -> Int[np.ndarray, " rows"]:
    """The place of each row's label among the classes: 0 or 1."""
    found = classes(data)
    return np.asarray([found.index(label) for label in data.labels])
