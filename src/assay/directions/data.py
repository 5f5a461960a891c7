"""What a subject holds at its sites while it reads texts."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from jaxtyping import Float

from assay.activations.edits import Positions
from assay.activations.subject import Subject
from assay.base.errors import NumericalError, SpecError
from assay.subjects.tokens import Batch


def read_sites(
    subject: Subject,
    texts: Sequence[str],
    sites: str | Sequence[str],
    *,
    positions: Positions = "last",
    batch: int = 32,
    progress: Callable[[int, int], object] | None = None,
) -> dict[str, Float[np.ndarray, "rows d"]]:
    """What a subject holds at sites while it reads each text, at one of its tokens (or the mean over several).

    Args:
        subject: The subject.
        texts: One a row.
        sites: Site names and patterns; heads are laid side by side.
        positions: Which tokens, by a rule that holds for every text; several are averaged.
        batch: How many texts go through the model at once; changes nothing else.
        progress: Told how many texts are done, of how many.

    Returns:
        By site, in the order of the texts, float32.

    Raises:
        SpecError: There are no texts, a site has no tokens, or a text has none of the positions.
        NumericalError: An activation is not finite.
    """
    several(texts)
    if batch < 1:
        raise SpecError(f"batch is {batch}; at least one text goes through at once", "batch")
    wanted = {str(site): site for site in subject.expand(sites)}
    order = sorted(range(len(texts)), key=lambda i: len(texts[i]))  # alike in length, so that little is padding
    found: dict[str, list[Any]] = {name: [None] * len(texts) for name in wanted}
    for start in range(0, len(order), batch):
        rows = order[start : start + batch]
        with torch.no_grad():
            run = subject.run([texts[i] for i in rows], capture=list(wanted))
        for name, site in wanted.items():
            held = run[name]
            dims: tuple[str, ...] = held.dims  # type: ignore[attr-defined]
            if dims[:2] != ("batch", "pos"):
                raise SpecError(f"{name} has the dimensions {dims}; a text is read at its tokens", "sites")
            columns = columns_of(run.batch.of(site.stack), positions, [texts[i] for i in rows])
            for row, (i, picked) in enumerate(zip(rows, columns, strict=True)):
                found[name][i] = held[row, picked].float().reshape(len(picked), -1).mean(0).cpu().numpy()
        if progress is not None:
            progress(min(start + batch, len(order)), len(order))
    stacked = {name: np.stack(values) for name, values in found.items()}
    for name, values in stacked.items():
        if not np.isfinite(values).all():
            bad = np.flatnonzero(~np.isfinite(values).all(axis=1))
            raise NumericalError(f"{name} is not finite in {len(bad)} of {len(texts)} texts, row {bad[0]} first")
    return stacked


def several(texts: Any, name: str = "texts") -> None:
    """See that texts are a list of one or more: a single text would be taken for a list of letters.

    Raises:
        SpecError: They are none.
    """
    if isinstance(texts, str) or not len(texts):
        said = "is one text" if len(texts) else "holds no texts"
        raise SpecError(f"{name} {said}; give a list of one or more", name)


def columns_of(batch: Batch, positions: Positions, texts: Sequence[Any] = ()) -> list[list[int]]:
    """The columns of each prompt that positions select, one or more; all tokens when None.

    Args:
        batch: The prompts as tokens.
        positions: Which tokens.
        texts: The prompts, to name the one at fault.

    Raises:
        SpecError: Positions mean nothing, or a prompt has none of them.
    """
    try:
        columns = batch.columns(slice(None) if positions is None else positions)
    except IndexError as error:
        raise SpecError(str(error), "positions") from error
    assert columns is not None
    empty = [row for row, picked in enumerate(columns) if not picked]
    if empty:
        said = f" ({texts[empty[0]]!r})" if len(texts) > empty[0] else ""
        raise SpecError(
            f"positions={positions!r} select no token of prompt {empty[0]}{said}, which has {batch.lengths[empty[0]]}",
            "positions",
        )
    return columns


def mean_norms(found: Mapping[str, Float[np.ndarray, "rows d"]]) -> dict[str, float]:
    """The mean norm at each site: what doses of a direction are measured in."""
    return {name: float(np.linalg.norm(values.astype(np.float64), axis=1).mean()) for name, values in found.items()}
