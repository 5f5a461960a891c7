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
        SpecError: There are no texts, or a site has no tokens.
        NumericalError: An activation is not finite.
    """
    if not texts:
        raise SpecError("there are no texts to read", "texts")
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
            columns = run.batch.of(site.stack).columns(slice(None) if positions is None else positions) or []
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


def mean_norms(found: Mapping[str, Float[np.ndarray, "rows d"]]) -> dict[str, float]:
    """The mean norm at each site: what doses of a direction are measured in."""
    return {name: float(np.linalg.norm(values.astype(np.float64), axis=1).mean()) for name, values in found.items()}
