"""Activations of latents as pairs: which latents of which row are active, and how much.

A dictionary of `F` latents activates some tens of them a row, so `[rows, F]` numbers are almost all zeros. A
`SparseLatents` holds the others alone, row after row (CSR): the pairs of row `r` are `offsets[r] : offsets[r + 1]`.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from jaxtyping import Float, Int
from torch import Tensor

from assay.base.errors import SpecError


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class SparseLatents:
    """Active latents of some rows.

    Attributes:
        offsets: Where each row's pairs begin, and the end of the last, int64 `[rows + 1]`.
        latents: The latent of each pair, int32 `[pairs]`, ascending inside a row.
        values: Its activation, `[pairs]`.
        n_latents: How many latents there are.
        shape: The leading dimensions that the rows are: `rows` is their product. One dimension where not given.

    Raises:
        SpecError: The parts do not fit each other.

    Example:
        >>> dense = torch.tensor([[0.0, 2.0, 0.0], [1.0, 0.0, 3.0]])
        >>> sparse = SparseLatents.from_dense(dense)
        >>> sparse.latents.tolist(), sparse.values.tolist(), sparse.counts.tolist()
        ([1, 0, 2], [2.0, 1.0, 3.0], [1, 2])
        >>> torch.equal(sparse.to_dense(), dense)
        True
    """

    offsets: Int[Tensor, " rows_and_one"]
    latents: Int[Tensor, " pairs"]
    values: Float[Tensor, " pairs"]
    n_latents: int
    shape: tuple[int, ...] = (-1,)

    def __post_init__(self) -> None:
        rows = self.offsets.numel() - 1
        if rows < 0 or self.latents.numel() != self.values.numel():
            raise SpecError(
                f"{self.latents.numel()} latents and {self.values.numel()} values with {self.offsets.numel()} offsets: "
                "give a latent and a value for each pair, and an offset for each row and one for the end"
            )
        if self.shape == (-1,):
            object.__setattr__(self, "shape", (rows,))
        elif math.prod(self.shape) != rows:
            raise SpecError(f"shape {self.shape} has {math.prod(self.shape)} rows, and there are offsets for {rows}")

    @property
    def n_rows(self) -> int:
        """How many rows there are, over all leading dimensions."""
        return self.offsets.numel() - 1

    @property
    def counts(self) -> Int[Tensor, " rows"]:
        """How many latents are active in each row: its L0."""
        return self.offsets.diff()

    @property
    def rows(self) -> Int[Tensor, " pairs"]:
        """The row of each pair."""
        return torch.repeat_interleave(torch.arange(self.n_rows, device=self.offsets.device), self.counts)

    def to_dense(self) -> Float[Tensor, "*shape latent"]:
        """The same with its zeros, `[*shape, latent]`."""
        dense = self.values.new_zeros(self.n_rows, self.n_latents)
        dense[self.rows, self.latents.long()] = self.values
        return dense.reshape(*self.shape, self.n_latents)

    @classmethod
    def from_dense(cls, z: Float[Tensor, "*shape latent"]) -> SparseLatents:
        """The pairs of `z` that are not 0."""
        flat = z.reshape(-1, z.shape[-1])
        rows, latents = flat.nonzero(as_tuple=True)
        offsets = torch.zeros(len(flat) + 1, dtype=torch.int64, device=z.device)
        offsets[1:] = torch.bincount(rows, minlength=len(flat)).cumsum(0)
        return cls(
            offsets=offsets,
            latents=latents.to(torch.int32),
            values=flat[rows, latents],
            n_latents=z.shape[-1],
            shape=tuple(z.shape[:-1]),
        )
