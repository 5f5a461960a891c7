"""Rows that are already in memory, as a source; stored and streamed activations are `assay.activations`' own."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from assay.base.errors import SpecError
from assay.base.hashing import digest
from assay.base.rng import torch_stream
from assay.dictionaries.dictionary import Site


class Rows:
    """Rows that are already in memory, in an order that is shuffled anew in each epoch.

    Args:
        sites: `[rows, d]` for each site, the same tokens in the same rows.
        batch: Rows a step.
        seed: Of the order.

    Raises:
        SpecError: Sites have different numbers of rows, or fewer than a batch.

    Example:
        >>> rows = Rows({"blocks.0.resid_post": torch.arange(8.0)[:, None]}, batch=4, seed=0)
        >>> both = torch.cat([rows.batch(0)["blocks.0.resid_post"], rows.batch(1)["blocks.0.resid_post"]])
        >>> sorted(both[:, 0].tolist())
        [0.0, 1.0, 2.0, 3.0, 4.0, 5.0, 6.0, 7.0]
    """

    def __init__(self, sites: Mapping[str, Float[Tensor, "_ _"]], *, batch: int, seed: int = 0) -> None:
        counts = {name: len(rows) for name, rows in sites.items()}
        if not counts or len(set(counts.values())) != 1:
            raise SpecError(f"sites have {counts} rows; give each the same tokens", "sites")
        self._n = next(iter(counts.values()))
        if self._n < batch:
            raise SpecError(f"there are {self._n} rows and a batch has {batch}; give a smaller batch", "batch")
        self._sites = {name: rows.detach().to(torch.float32) for name, rows in sites.items()}
        self._batch, self._seed = batch, seed

    @property
    def sites(self) -> tuple[str, ...]:
        """The sites it has."""
        return tuple(self._sites)

    @property
    def batch_size(self) -> int:
        """Rows a step."""
        return self._batch

    @property
    def widths(self) -> Mapping[str, int]:
        """The sites it has, and how wide each is."""
        return {name: rows.shape[1] for name, rows in self._sites.items()}

    def batch(self, step: int) -> dict[str, Tensor]:
        """The rows of a step; what is left of an epoch below a batch is not used."""
        epoch, place = divmod(step, self._n // self._batch)
        order = torch.randperm(self._n, generator=torch_stream(self._seed, "rows", epoch))
        which = order[place * self._batch : (place + 1) * self._batch]
        return {name: rows[which] for name, rows in self._sites.items()}

    def state(self) -> dict[str, Any]:
        """Nothing: a batch depends on its step alone."""
        return {}

    def restore(self, state: Mapping[str, Any]) -> None:
        """Nothing to do."""

    def describe(self) -> dict[str, Any]:
        """How many rows, and their hash."""
        hashes = {name: digest(rows.numpy().tobytes().hex()) for name, rows in self._sites.items()}
        return {"rows": self._n, "batch": self._batch, "seed": self._seed, "sites": hashes}


def side_by_side(batch: Mapping[str, Tensor], sites: tuple[Site, ...]) -> Tensor:
    """The named sites of a batch, one beside the other; a single site is not copied."""
    parts = [batch[site.name] for site in sites]
    return parts[0] if len(parts) == 1 else torch.cat(parts, dim=1)


def mean_length(rows: Tensor) -> float:
    """The mean length of rows."""
    found = float(rows.double().norm(dim=1).mean())
    return found if math.isfinite(found) else 0.0
