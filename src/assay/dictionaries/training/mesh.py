"""Several processes on one dictionary: a grid of `data x latent` processes, each with its rows and its latents.

A process holds `latents / L` latents with their moments, and sees `batch / D` rows of every batch. Selection is local,
then merged: a row's k largest are among the k largest of each process. What latents write is summed over the processes
of a row of the grid (`[rows, d]` numbers), gradients over those of a column. The numbers are those of one process, but
for the order in which floats are added.

Without torch.distributed there is one process, and every sum is the number itself.
"""

from __future__ import annotations

import os
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from assay.base.errors import SpecError
from assay.dictionaries.latents import SparseLatents


@dataclass(frozen=True, slots=True, kw_only=True)
class Mesh:
    """Where this process is in the grid.

    Attributes:
        data: How many shares of the rows there are.
        latent: How many shares of the latents there are.
        rank: This process's number, rows of the grid first: `rank = data index * latent + latent index`.
        groups: The process groups of this process: along the data, along the latents; empty when there is one process.
    """

    data: int = 1
    latent: int = 1
    rank: int = 0
    groups: tuple[Any, ...] = ()

    @property
    def size(self) -> int:
        """How many processes there are."""
        return self.data * self.latent

    @property
    def data_index(self) -> int:
        """Which share of the rows is this process's."""
        return self.rank // self.latent

    @property
    def latent_index(self) -> int:
        """Which share of the latents is this process's."""
        return self.rank % self.latent

    def share(self, latents: int) -> slice:
        """This process's latents.

        Raises:
            SpecError: They cannot be divided evenly.
        """
        if latents % self.latent:
            raise SpecError(f"{latents} latents cannot be divided among {self.latent} processes", "latents")
        each = latents // self.latent
        return slice(self.latent_index * each, (self.latent_index + 1) * each)

    def rows(self, batch: Tensor) -> Tensor:
        """This process's rows of a batch.

        Raises:
            SpecError: They cannot be divided evenly.
        """
        if self.data == 1:
            return batch
        if len(batch) % self.data:
            raise SpecError(f"a batch of {len(batch)} rows cannot be divided among {self.data} processes", "batch")
        each = len(batch) // self.data
        return batch[self.data_index * each : (self.data_index + 1) * each]

    def over_data(self, value: Tensor) -> Tensor:
        """The sum over the processes that have other rows and the same latents, in place."""
        return self._sum(value, 0) if self.data > 1 else value

    def over_latents(self, value: Tensor) -> Tensor:
        """The sum over the processes that have other latents and the same rows, in place."""
        return self._sum(value, 1) if self.latent > 1 else value

    def over_all(self, value: Tensor) -> Tensor:
        """The sum over all processes, in place."""
        return self.over_latents(self.over_data(value))

    def number(self, value: float) -> float:
        """The sum of a number over all processes."""
        return float(self.over_all(torch.tensor(value, dtype=torch.float64))) if self.size > 1 else value

    def number_over_data(self, value: float) -> float:
        """The sum of a number over the processes that have other rows."""
        return float(self.over_data(torch.tensor(value, dtype=torch.float64))) if self.data > 1 else value

    def wait(self) -> None:
        """Wait until every process is here."""
        self.number(0.0)

    def gathered(self, value: Tensor, *, along: str) -> list[Tensor]:
        """What each process along "latent" (or "all") has, in order; lengths may differ along the first dimension."""
        world = self.latent if along == "latent" else self.size
        if world == 1:
            return [value]
        import torch.distributed as dist

        group = self.groups[1] if along == "latent" else None
        lengths = [torch.zeros(1, dtype=torch.int64) for _ in range(world)]
        dist.all_gather(lengths, torch.tensor([len(value)]), group=group)
        most = max(int(n) for n in lengths)
        padded = torch.zeros((most, *value.shape[1:]), dtype=value.dtype)
        padded[: len(value)] = value
        found = [torch.empty_like(padded) for _ in range(world)]
        dist.all_gather(found, padded, group=group)
        return [part[: int(n)] for part, n in zip(found, lengths, strict=True)]

    def _sum(self, value: Tensor, axis: int) -> Tensor:
        import torch.distributed as dist

        dist.all_reduce(value, group=self.groups[axis])
        return value


def mesh(latent: int = 1) -> Mesh:
    """This process's place in a grid of all processes that torchrun started, `latent` of them along the latents.

    Raises:
        SpecError: The number of processes is no multiple of `latent`.
    """
    world = int(os.environ.get("WORLD_SIZE", "1"))
    if latent < 1 or world % latent:
        raise SpecError(
            f"{world} processes cannot be arranged with {latent} along the latents: start a multiple of {latent} with "
            "torchrun --nproc-per-node",
            "latent",
        )
    if world == 1:
        return Mesh()
    import torch.distributed as dist

    if not dist.is_initialized():
        dist.init_process_group("nccl" if torch.cuda.is_available() else "gloo")
    rank, data = dist.get_rank(), world // latent
    along_data = [dist.new_group([d * latent + j for d in range(data)]) for j in range(latent)]
    along_latents = [dist.new_group([d * latent + j for j in range(latent)]) for d in range(data)]
    groups = (along_data[rank % latent], along_latents[rank // latent])
    return Mesh(data=data, latent=latent, rank=rank, groups=groups)


class Merged:
    """Kernels over a grid: the same calls, with selection merged and what is written summed over the latents."""

    def __init__(self, kernels: Any, grid: Mesh) -> None:
        self._own, self._mesh = kernels, grid

    def __getattr__(self, name: str) -> Any:
        return getattr(self._own, name)

    def select_rows(self, x: Tensor, W: Tensor, b: Tensor, k: int) -> SparseLatents:
        """The k largest of each row over all shares of the latents; of equal ones the lower share's."""
        own: SparseLatents = self._own.select_rows(x, W, b, min(k, len(W)))
        if self._mesh.latent == 1:
            return own
        place = torch.arange(len(own.values)) - own.offsets[:-1].repeat_interleave(own.counts)
        table = torch.zeros(own.n_rows, k)
        table[own.rows, place] = own.values
        everyone = torch.cat(self._mesh.gathered(table.T.contiguous(), along="latent")).T
        order = torch.sort(everyone, dim=1, descending=True, stable=True).indices[:, :k]
        mine = (order >= self._mesh.latent_index * k) & (order < (self._mesh.latent_index + 1) * k)
        kept = torch.zeros(own.n_rows, k + 1, dtype=torch.bool)
        kept.scatter_(1, torch.where(mine, order - self._mesh.latent_index * k, k), True)
        return _filtered(own, kept[own.rows, place])

    def select_batch(self, x: Tensor, W: Tensor, b: Tensor, total: int) -> tuple[SparseLatents, float]:
        """The `total` largest over all rows and latents of all processes."""
        own, bound = self._own.select_batch(x, W, b, min(total, len(x) * len(W)))
        if self._mesh.size == 1:
            return own, bound
        everyone = torch.cat(self._mesh.gathered(own.values, along="all"))
        if len(everyone) <= total:
            return own, float(everyone.min()) if len(everyone) else 0.0
        bound = float(everyone.topk(total).values[-1])
        return _filtered(own, own.values >= bound), bound

    def decode(self, pairs: SparseLatents, W_dec: Tensor, bias: Tensor) -> Tensor:
        """What all shares of the latents write."""
        if self._mesh.latent == 1:
            return torch.as_tensor(self._own.decode(pairs, W_dec, bias))
        return self._mesh.over_latents(self._own.decode(pairs, W_dec, torch.zeros_like(bias))).add_(bias)

    def residual(
        self, pairs: SparseLatents, W_dec: Tensor, bias: Tensor, target: Tensor, scale: float
    ) -> tuple[Tensor, Tensor, Tensor]:
        """`decode`, its error and the pairs' slopes."""
        if self._mesh.latent == 1:
            R, dz, squares = self._own.residual(pairs, W_dec, bias, target, scale)
            return R, dz, squares
        error = self.decode(pairs, W_dec, bias).sub_(target)
        squares = error.square().sum(1)
        R = error.mul_(scale)
        return R, self._own.slopes(pairs, R, W_dec), squares


def _filtered(pairs: SparseLatents, keep: Tensor) -> SparseLatents:
    offsets = torch.zeros_like(pairs.offsets)
    offsets[1:] = torch.bincount(pairs.rows[keep], minlength=pairs.n_rows).cumsum(0)
    return SparseLatents(
        offsets=offsets, latents=pairs.latents[keep], values=pairs.values[keep], n_latents=pairs.n_latents
    )
