"""One shard of a harvest while it is filled: activations, what they are of, and their statistics."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from assay.activations.passes import Block, Pass
from assay.activations.rows import Row
from assay.activations.shards import FORMAT, Shard, write_shard

_WIDE = {"token": torch.int32, "document": torch.int64, "row": torch.int64, "pos": torch.int32}


class Taken:
    """Rows, and what was taken of them."""

    def __init__(self, rows: Iterator[Row]) -> None:
        self._rows = rows
        self.taken: list[Row] = []

    def __iter__(self) -> Iterator[Row]:
        for row in self._rows:
            self.taken.append(row)
            yield row


class Part:
    """One shard while it is filled: buffers of the size that its rows can need.

    Args:
        reader: Runs rows.
        dtype: What activations are stored in.
        room: The largest number of tokens.
        together: How many rows are run together.
    """

    def __init__(self, reader: Pass, dtype: torch.dtype, room: int, together: int) -> None:
        self.reader, self.room, self.together, self.size = reader, room, together, 0
        self.dropped: dict[str, int] = {}
        self._values = {site: torch.empty(room, width, dtype=dtype) for site, width in reader.widths.items()}
        self._tokens: list[dict[str, np.ndarray]] = []

    def fill(self, rows: Taken) -> Iterator[int]:
        """Run rows until they end or there is no room; yield the number of tokens after each batch."""
        for block in self.reader.blocks(iter(rows), self.together):
            self._add(block.head(self.room - self.size))
            yield self.size
            if self.size == self.room:
                return

    def _add(self, block: Block) -> None:
        end = self.size + len(block)
        for site, value in block.values.items():
            self._values[site][self.size : end].copy_(value)
        self._tokens.append(block.tokens())
        self.size = end
        for why, count in block.dropped.items():
            self.dropped[why] = self.dropped.get(why, 0) + count

    def write(self, path: Path, rows: Taken) -> Shard:
        """Write what there is as a shard."""
        tensors: dict[str, Tensor] = {site: value[: self.size] for site, value in self._values.items()}
        means, norms = {}, {}
        for site, value in tensors.items():
            means[f"mean:{site}"], norms[site] = _statistics(value)
        beside = {
            name: torch.from_numpy(np.concatenate([part[name] for part in self._tokens])).to(kind)
            for name, kind in _WIDE.items()
        }
        ids = [row.ids for row in rows.taken]
        beside["ids"] = torch.from_numpy(np.concatenate(ids).astype(np.int32))
        beside["starts"] = torch.from_numpy(np.cumsum([0, *map(len, ids)]))
        beside["rows"] = torch.tensor([row.index for row in rows.taken])
        size, sha = write_shard(path, {**tensors, **means, **beside}, {"format": FORMAT})
        return Shard(
            name=path.name,
            tokens=self.size,
            rows=len(rows.taken),
            first_row=rows.taken[0].index,
            bytes=size,
            sha256=sha,
            dropped=self.dropped,
            norms=norms,
            after=rows.taken[-1].after.to_dict(),
        )


def _statistics(value: Tensor) -> tuple[Tensor, tuple[float, float]]:
    """The mean vector, the mean norm and the mean square norm of a shard's rows, in float64."""
    total = torch.zeros(value.shape[1], dtype=torch.float64)
    norm = square = 0.0
    for start in range(0, len(value), 8192):
        wide = value[start : start + 8192].double()
        squares = wide.square().sum(1)
        total += wide.sum(0)
        norm += float(squares.sqrt().sum())
        square += float(squares.sum())
    return total / len(value), (norm / len(value), square / len(value))
