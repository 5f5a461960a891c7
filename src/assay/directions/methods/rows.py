"""JSON lines with named text fields, read for a study; importing this module imports no torch."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

from assay.base.artifacts import user_path
from assay.base.errors import SpecError


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
        lines = file.read_text(encoding="utf-8").splitlines()
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
