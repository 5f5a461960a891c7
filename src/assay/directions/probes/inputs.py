"""What every probe asks of its rows and labels, checked in one place."""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from typing import Any

import numpy as np
from jaxtyping import Bool, Float, Int

from assay.base.errors import NumericalError, SpecError
from assay.base.stats import group_rows
from assay.controls.labels import label_array

Labels = Sequence[Any] | np.ndarray
"""One label a row, of any kind that compares equal to itself."""

Groups = Sequence[Hashable] | np.ndarray
"""What each row is about (a word, a template, an entity), one a row."""


def matrix(X: Any, name: str = "X") -> Float[np.ndarray, "rows d"]:
    """Return rows as float64.

    Raises:
        SpecError: They are no table, or the table is empty.
        NumericalError: A row is not finite.
    """
    given = X.detach().to("cpu").double().numpy() if hasattr(X, "detach") else X  # a tensor, in any precision
    try:
        data = np.asarray(given, dtype=np.float64)
    except (TypeError, ValueError) as error:
        raise SpecError(f"{name} must be a table of numbers [rows, d]: {error}", name) from error
    if data.ndim != 2 or not data.size:
        raise SpecError(f"{name} has the shape {data.shape}; a probe needs a table [rows, d]", name)
    bad = np.flatnonzero(~np.isfinite(data).all(axis=1))
    if bad.size:
        raise NumericalError(
            f"{name} is NaN or infinite in {bad.size} of {len(data)} rows, row {bad[0]} first: leave those rows out"
        )
    return data


def positives(y: Labels, rows: int | None = None) -> Bool[np.ndarray, " rows"]:
    """Return which rows have the larger of the two labels: 1 of 0 and 1, True of False, "b" of "a".

    Raises:
        SpecError: There is one class or more than two, a label is missing, or the number of labels is not that of the
            rows.
    """
    labels = label_array(y)
    if labels.ndim != 1 or (rows is not None and labels.size != rows):
        raise SpecError(f"y has the shape {labels.shape}; it needs one label a row ({rows} rows)", "y")
    classes = np.unique(labels)
    if classes.size == 1:
        raise SpecError(f"all {labels.size} rows have the label {classes[0].item()!r}; a probe needs two classes", "y")
    if classes.size != 2:
        raise SpecError(f"y has {classes.size} labels; a probe reads two classes: compare one with the rest", "y")
    return np.asarray(labels == classes[1])


def group_ids(groups: Groups, rows: int) -> Int[np.ndarray, " rows"]:
    """Return groups as numbers, in order of first appearance.

    Raises:
        SpecError: There is not one a row, or one is NaN.
    """
    if len(groups) != rows:
        raise SpecError(f"groups has {len(groups)} entries for {rows} rows; it needs one a row", "groups")
    ids = np.empty(rows, dtype=int)
    for i, members in enumerate(group_rows(groups).values()):  # type: ignore[arg-type]
        ids[members] = i
    return ids


def standard(X: Float[np.ndarray, "rows d"]) -> tuple[Float[np.ndarray, " d"], Float[np.ndarray, " d"]]:
    """Return mean and standard deviation of each column; the deviation of a constant one is given as 1."""
    mean, sd = X.mean(axis=0), X.std(axis=0)
    return mean, np.where(sd > 1e-12 * np.maximum(1.0, np.abs(mean)), sd, 1.0)
