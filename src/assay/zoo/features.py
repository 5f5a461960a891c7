"""Rows that are sums of known features, more of them than dimensions: what a dictionary should find is known.

    x = sum_f a_f v_f + noise        a_f = 0 with probability 1 - p_f, else uniform on [0.5, 1.5]

with `n` random unit vectors `v` in `d < n` dimensions, made less alike by a few rounds of repulsion, and probabilities
`p_f` that fall with `f` as `1 / (f + shift)` and give `active` features a row on average.

Source: Elhage et al. 2022, "Toy Models of Superposition"; Sharkey et al. 2022 for recovery by mean maximal cosine.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from assay.base.errors import SpecError
from assay.base.rng import torch_stream

SITE = "blocks.0.resid_post"
"""What the rows' site is called, so that they can stand where a model's would."""


class Features:
    """A source of such rows; the rows of a step depend on the seed and the step alone.

    Args:
        n: Features.
        d: Dimensions.
        active: Mean number of active features a row.
        batch: Rows a step.
        noise: Standard deviation of what is added to each number.
        skew: 0 for features that are all as frequent, 1 for frequencies that fall as `1 / rank`.
        seed: Of features and rows.

    Raises:
        SpecError: More features would be active than there are, or one nearly always.

    Example:
        >>> features = Features(n=32, d=16, active=3, batch=4)
        >>> rows = features.batch(0)[SITE]
        >>> rows.shape, round(features.recovered(features.directions), 3)
        (torch.Size([4, 16]), 1.0)
    """

    def __init__(
        self,
        *,
        n: int = 256,
        d: int = 64,
        active: float = 4.0,
        batch: int = 1024,
        noise: float = 0.01,
        skew: float = 0.5,
        seed: int = 0,
    ) -> None:
        if not 0 < active < n:
            raise SpecError(f"{active} features a row of {n} is not possible; give a number between", "active")
        self._batch, self._noise, self._seed = batch, noise, seed
        self._asked = {"n": n, "d": d, "active": active, "batch": batch, "noise": noise, "skew": skew, "seed": seed}
        rank = torch.arange(n) + n / 8
        shares = rank.double().pow(-skew)
        self.frequencies = (shares / shares.sum() * active).float()
        if float(self.frequencies[0]) > 0.9:
            raise SpecError(
                f"with {active} of {n} features a row and skew {skew:g}, the most frequent would be in "
                "more than nine rows in ten; give a smaller active or skew",
                "active",
            )
        self.directions = _spread_out(n, d, seed)

    @property
    def sites(self) -> tuple[str, ...]:
        """The one site."""
        return (SITE,)

    @property
    def batch_size(self) -> int:
        """Rows a step."""
        return self._batch

    @property
    def widths(self) -> Mapping[str, int]:
        """The one site."""
        return {SITE: self.directions.shape[1]}

    def rows(self, step: int) -> tuple[Float[Tensor, "rows d"], Float[Tensor, "rows n"]]:
        """The rows of a step, and how active each feature is in them."""
        stream = torch_stream(self._seed, "rows", step)
        shape = (self._batch, len(self.directions))
        there = torch.rand(shape, generator=stream) < self.frequencies
        active = there * (0.5 + torch.rand(shape, generator=stream))
        noise = self._noise * torch.randn(self._batch, self.directions.shape[1], generator=stream)
        return active @ self.directions + noise, active

    def batch(self, step: int) -> dict[str, Tensor]:
        """The rows of a step, by site."""
        return {SITE: self.rows(step)[0]}

    def state(self) -> dict[str, Any]:
        """Nothing: a batch depends on its step alone."""
        return {}

    def restore(self, state: Mapping[str, Any]) -> None:
        """Nothing to do."""

    def describe(self) -> dict[str, Any]:
        """How they are made."""
        return {"kind": "known features", **self._asked}

    def recovered(self, decoder: Float[Tensor, "latent d"]) -> float:
        """The mean over features of the largest cosine with a decoder row, 1 where all were found."""
        rows = torch.nn.functional.normalize(decoder.float(), dim=1)
        return float((self.directions @ rows.T).max(dim=1).values.mean())


def _spread_out(n: int, d: int, seed: int, rounds: int = 100) -> Tensor:
    """Unit vectors that point away from each other: gradient steps on the sum of their fourth-power cosines."""
    found = torch.nn.functional.normalize(torch.randn(n, d, generator=torch_stream(seed, "features")), dim=1)
    for _ in range(rounds):
        cosines = found @ found.T
        cosines.fill_diagonal_(0)
        found = torch.nn.functional.normalize(found - 0.1 * cosines.pow(3) @ found, dim=1)
    return found
