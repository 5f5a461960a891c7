"""The prompts of the `behaviour` study. Importing this module imports no torch."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from assay.base.errors import SpecError
from assay.base.hashing import digest
from assay.directions.methods.behaviour import BehaviourSpec
from assay.directions.methods.rows import text_rows


@dataclass(frozen=True, slots=True)
class Prompts:
    """The prompts of a study, and how they are divided.

    Args:
        texts: One a row.
        shows: Whether each has a trigger.
        answers: What each is answered when it has none; empty where that is not known.
        groups: What each is about: groups stay whole.
    """

    texts: tuple[str, ...]
    shows: tuple[bool, ...]
    answers: tuple[str, ...]
    groups: tuple[str, ...]

    @classmethod
    def read(cls, spec: BehaviourSpec) -> Prompts:
        """Read the file.

        Raises:
            SpecError: It cannot be read, or all prompts or none have a trigger.
        """
        rows = text_rows(spec.data, ("text",), ("trigger", "answer", "group"), field="data")
        shows = tuple(bool(row.get("trigger")) for row in rows)
        if all(shows) or not any(shows):
            raise SpecError(
                f"data: of {len(rows)} prompts {sum(shows)} have a trigger; bring prompts with and without one", "data"
            )
        return cls(
            tuple(row["text"] for row in rows),
            shows,
            tuple(row.get("answer", "") for row in rows),
            tuple(row.get("group", f"row {i}") for i, row in enumerate(rows)),
        )

    @property
    def digest(self) -> str:
        """The hash of everything."""
        return digest([self.texts, self.shows, self.answers, self.groups])

    def parts(self, spec: BehaviourSpec, seed: int) -> tuple[np.ndarray, ...]:
        """Rows to fit on, to choose on and to report, no group in two of them."""
        from assay.directions.probes.splits import grouped_parts

        shares = (1 - spec.test - spec.choice, spec.choice, spec.test)
        if min(shares) <= 0:
            raise SpecError(f"test={spec.test:g} and choice={spec.choice:g} leave nothing to fit on", "test")
        return grouped_parts(self.groups, np.asarray(self.shows, dtype=int), shares, seed=seed)

    def of(self, part: Sequence[int] | np.ndarray, shows: bool) -> list[int]:
        """The rows of a part that have the trigger, or that have not."""
        return [int(i) for i in part if self.shows[int(i)] == shows]

    def said(self, rows: Sequence[int]) -> list[str]:
        """The texts of rows."""
        return [self.texts[i] for i in rows]
