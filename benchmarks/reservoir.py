"""How fast activations reach a trainer, from a reservoir and from stored shards, at several sizes.

    python benchmarks/reservoir.py [--threads 1] [--seconds 3] [--sizes 65536 262144 1048576]

Rows of width 576 in batches of 2048, in CPU seconds, one process; the sizes take turns, so that other work on the
machine falls on all of them. Fresh activations cost nothing here: they are given in blocks of 2048 tokens that are
already in memory, so what is timed is the buffer alone. Beside it runs a mixing buffer of the other design, written
here after what SAELens' does: each block is concatenated to what is held, and when the buffer is full it is permuted
and half of it is served. Its cost at a size is that of one whole cycle, with the
concatenations timed at eight fill levels between half full and full. The store is read from the page cache.
"""

from __future__ import annotations

import argparse
import os
import platform
import tempfile
import time
from collections.abc import Callable
from datetime import date
from pathlib import Path

import torch
from torch import Tensor

from assay.activations import Reservoir, Store
from assay.activations.shards import Manifest, Shard, write_shard
from assay.activations.store import Stored

WIDTH, BATCH = 576, 2048
SITE = "blocks.15.resid_post"


def rates(steps: list[Callable[[int], object]], seconds: float) -> list[float]:
    """Rows a CPU second of each step that gives a batch, by turns; the best of five stretches each."""
    best, number = [0.0] * len(steps), [1] * len(steps)
    for step in steps:
        step(0)
    for _ in range(5):
        for i, step in enumerate(steps):
            start, first = time.process_time(), number[i]
            while time.process_time() - start < seconds / 5:
                step(number[i])
                number[i] += 1
            best[i] = max(best[i], (number[i] - first) * BATCH / (time.process_time() - start))
    return best


def swap_reservoirs(sizes: list[int], seconds: float, dtype: torch.dtype) -> list[float]:
    """Rows a second of assay's reservoir at each size."""
    fresh = {SITE: torch.randn(BATCH, WIDTH)}
    reservoirs = [Reservoir(size, {SITE: WIDTH}, dtype=dtype) for size in sizes]
    for reservoir in reservoirs:
        for start in range(0, reservoir.size, BATCH):
            reservoir.put(start, {SITE: fresh[SITE][: reservoir.size - start]})
    return rates([lambda step, r=r: r.swap(step, fresh) for r in reservoirs], seconds)  # type: ignore[misc]


def mixing_buffer(size: int) -> float:
    """Rows a second of a buffer that concatenates and permutes, over one cycle of half its size."""
    fresh, half = torch.randn(BATCH, WIDTH), size // 2
    levels, cats = [half + i * half // 8 for i in range(8)], []
    for level in levels:
        held = torch.zeros(level, WIDTH)
        start = time.process_time()
        held = torch.cat([held, fresh])
        cats.append(time.process_time() - start)
    held = torch.zeros(size, WIDTH)
    start = time.process_time()
    held = held[torch.randperm(size)]
    for at in range(0, half, BATCH):
        held[at : at + BATCH].clone()
    shuffle = time.process_time() - start
    return half / (shuffle + half // BATCH * sum(cats) / len(cats))


def stored(size: int, folder: Path) -> Stored:
    """A store of bfloat16 shards, every page of which has been read once."""
    shards, rows = [], 1 << 17
    for number, start in enumerate(range(0, size, rows)):
        count = min(rows, size - start)
        name = f"shard-{number:05d}.safetensors"
        values: dict[str, Tensor] = {SITE: torch.randn(count, WIDTH).bfloat16()}
        length, sha = write_shard(folder / name, values, {})
        norms = {SITE: (1.0, 1.0)}
        one = Shard(
            name=name, tokens=count, rows=0, first_row=0, bytes=length, sha256=sha, dropped={}, norms=norms, after={}
        )
        shards.append(one)
    Manifest(request={}, widths={SITE: WIDTH}, dtype="bfloat16", shards=tuple(shards), complete=True).write(folder)
    source = Store.open(folder).source(BATCH, seed=0)
    for step in range(size // BATCH):
        source.batch(step)
    return source


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--seconds", type=float, default=3.0)
    parser.add_argument("--sizes", type=int, nargs="+", default=[1 << 16, 1 << 18, 1 << 20])
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    print(f"{date.today()}, {platform.machine()}, {os.cpu_count()} cores, {options.threads} thread(s), ", end="")
    print(f"torch {torch.__version__}; rows of {WIDTH} a CPU second, batches of {BATCH}\n")
    print("| rows held | reservoir fp32 | reservoir bf16 | store bf16 | concatenate and permute | ratio fp32 |")
    print("|---|---|---|---|---|---|")
    with tempfile.TemporaryDirectory() as folder:
        sources = []
        for size in options.sizes:
            place = Path(folder) / str(size)
            place.mkdir()
            sources.append(stored(size, place))
        stores = rates([source.batch for source in sources], options.seconds)
    wide = swap_reservoirs(options.sizes, options.seconds, torch.float32)
    narrow = swap_reservoirs(options.sizes, options.seconds, torch.bfloat16)
    for size, first, second, third in zip(options.sizes, wide, narrow, stores, strict=True):
        other = mixing_buffer(size)
        print(f"| {size:,} | {first:,.0f} | {second:,.0f} | {third:,.0f} | {other:,.0f} | {first / other:.1f} |")


if __name__ == "__main__":
    main()
