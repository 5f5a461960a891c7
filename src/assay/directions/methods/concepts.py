"""Texts labelled with several concepts at once, read for a study. Importing this module imports no torch."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Int

from assay.base.artifacts import user_path
from assay.base.errors import SpecError
from assay.base.hashing import digest

WANTED = 'give {"text": ..., "labels": {"past": 1, "plural": 0}, "group": ...}'


@dataclass(frozen=True, slots=True, kw_only=True)
class Concepts:
    """Texts, and for each of several concepts whether it holds.

    Args:
        texts: One a row.
        names: The concepts.
        labels: 1 where a concept holds, `[rows][concepts]`.
        groups: What each row is about: groups stay whole in every split.
    """

    texts: tuple[str, ...]
    names: tuple[str, ...]
    labels: tuple[tuple[int, ...], ...]
    groups: tuple[str, ...]

    def __len__(self) -> int:
        return len(self.texts)

    @property
    def y(self) -> Int[np.ndarray, "rows concepts"]:
        """The labels as an array."""
        return np.asarray(self.labels)

    @property
    def digest(self) -> str:
        """The hash of everything."""
        return digest([self.texts, self.names, self.labels, self.groups])

    @classmethod
    def read(cls, path: str | Path) -> Concepts:
        """Read JSON lines with `text`, `labels` (0 or 1 by name) and perhaps `group`; else a row is its own group.

        Raises:
            SpecError: The file cannot be read, a line is no such object (file and line are named), rows have different
                concepts, there are fewer than two of them, or one is the same in every row.
        """
        file = user_path(path)
        try:
            lines = file.read_text(encoding="utf-8").splitlines()
        except (OSError, UnicodeDecodeError) as error:
            raise SpecError(f"data: {file} cannot be read: {error}", "data") from error
        rows = [
            _row(line, f"data: {file}, line {number}", number) for number, line in enumerate(lines, 1) if line.strip()
        ]
        if not rows:
            raise SpecError(f"data: {file} has no rows; {WANTED}", "data")
        names = tuple(rows[0][1])
        for text, labels, _ in rows:
            if set(labels) != set(names):
                raise SpecError(
                    f"data: {text!r:.60} has {sorted(labels)}, other rows {sorted(names)}; {WANTED}", "data"
                )
        if len(names) < 2:
            raise SpecError(f"data: {file} labels {len(names)} concept; readouts are kept apart from two on", "data")
        found = cls(
            texts=tuple(row[0] for row in rows),
            names=names,
            labels=tuple(tuple(row[1][name] for name in names) for row in rows),
            groups=tuple(row[2] for row in rows),
        )
        for name, column in zip(names, found.y.T, strict=True):
            if len(set(column.tolist())) < 2:
                raise SpecError(f"data: {name!r} is {column[0]} in every row of {file}; a probe needs both", "data")
        return found


def _row(line: str, where: str, number: int) -> tuple[str, dict[str, int], str]:
    try:
        row: Any = json.loads(line)
    except ValueError as error:
        raise SpecError(f"{where} is not JSON ({error}); {WANTED}", "data") from error
    if not isinstance(row, dict) or not isinstance(row.get("text"), str) or not row["text"]:
        raise SpecError(f"{where} has no text; {WANTED}", "data")
    unknown = sorted(set(row) - {"text", "labels", "group"})
    if unknown:
        raise SpecError(f"{where} has {', '.join(unknown)}, which means nothing here; {WANTED}", "data")
    labels = row.get("labels")
    if not isinstance(labels, dict) or not labels or not all(value in (0, 1) for value in labels.values()):
        raise SpecError(f"{where} has the labels {labels!r:.60}; {WANTED}", "data")
    return row["text"], {name: int(value) for name, value in labels.items()}, str(row.get("group", f"row {number}"))
