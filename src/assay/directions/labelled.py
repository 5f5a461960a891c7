"""Labelled texts, read from JSON lines. Importing this module imports no torch."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from jaxtyping import Shaped

from assay.base.artifacts import user_path
from assay.base.errors import SpecError
from assay.base.hashing import digest


@dataclass(frozen=True, slots=True, kw_only=True)
class Labelled:
    """Texts with a label each, and what must not be split between fitting and testing.

    Args:
        texts: One a row.
        labels: One a row, of any kind that compares equal to itself.
        groups: What each row is about (a word, an entity): groups stay whole in every split.
        templates: The frame that each row puts it in, for control tasks that ask what is memorised; may be empty.

    Raises:
        SpecError: The lengths differ, or there are no rows.

    Example:
        >>> data = Labelled(texts=("a fine day", "a bad day"), labels=(1, 0), groups=("fine", "bad"))
        >>> data.y.tolist(), len(data.digest)
        ([1, 0], 32)
    """

    texts: tuple[str, ...]
    labels: tuple[int | str, ...]
    groups: tuple[str, ...]
    templates: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        sizes = {"texts": len(self.texts), "labels": len(self.labels), "groups": len(self.groups)}
        if self.templates:
            sizes["templates"] = len(self.templates)
        if len(set(sizes.values())) > 1 or not self.texts:
            raise SpecError(f"labelled texts need one of each a row, and at least one row; got {sizes}", "data")

    def __len__(self) -> int:
        return len(self.texts)

    @property
    def y(self) -> Shaped[np.ndarray, " rows"]:
        """The labels as an array."""
        return np.asarray(self.labels)

    @property
    def digest(self) -> str:
        """The hash of everything."""
        return digest([self.texts, self.labels, self.groups, self.templates])

    @property
    def repeated(self) -> int:
        """How many texts stand in more than one group, so that a split by group may have them on both sides."""
        groups: dict[str, set[str]] = {}
        for text, group in zip(self.texts, self.groups, strict=True):
            groups.setdefault(text, set()).add(group)
        return sum(len(found) > 1 for found in groups.values())

    def rows(self, keep: Sequence[int]) -> Labelled:
        """Some of the rows."""
        return Labelled(
            texts=tuple(self.texts[i] for i in keep),
            labels=tuple(self.labels[i] for i in keep),
            groups=tuple(self.groups[i] for i in keep),
            templates=tuple(self.templates[i] for i in keep) if self.templates else (),
        )

    @classmethod
    def read(cls, path: str | Path) -> Labelled:
        """Read JSON lines with `text`, `label`, and perhaps `group` and `template`.

        A row without a group is a group of its own; templates count when every row has one.

        Raises:
            SpecError: The file cannot be read, a line is no such object (file and line are named), or a label is
                neither text nor a whole number.
        """
        file = user_path(path)
        try:
            lines = file.read_text(encoding="utf-8-sig").split("\n")  # a text may hold other line separators
        except (OSError, UnicodeDecodeError) as error:
            raise SpecError(f"{file} cannot be read: {error}", "data") from error
        rows = [_row(line, f"{file}, line {number}", number) for number, line in enumerate(lines, 1) if line.strip()]
        if not rows:
            raise SpecError(f"{file} has no rows; give JSON lines with text, label and group", "data")
        texts, labels, groups, templates = zip(*rows, strict=True)
        return cls(texts=texts, labels=labels, groups=groups, templates=() if "" in templates else templates)


def _row(line: str, where: str, number: int) -> tuple[str, int | str, str, str]:
    wanted = 'give {"text": ..., "label": ..., "group": ...}'
    try:
        row = json.loads(line)
    except ValueError as error:
        raise SpecError(f"{where} is not JSON ({error}); {wanted}", "data") from error
    if not isinstance(row, dict) or not isinstance(row.get("text"), str) or not row["text"]:
        raise SpecError(f"{where} has no text; {wanted}", "data")
    unknown = sorted(set(row) - {"text", "label", "group", "template"})
    if unknown:
        raise SpecError(f"{where} has {', '.join(unknown)}, which means nothing here; {wanted}", "data")
    label = row.get("label")
    if not isinstance(label, int | str):
        raise SpecError(f"{where} has the label {label!r}; a label is text, a whole number, true or false", "data")
    return (
        row["text"],
        int(label) if isinstance(label, bool) else label,
        f"row {number}" if row.get("group") is None else str(row["group"]),
        "" if row.get("template") is None else str(row["template"]),
    )
