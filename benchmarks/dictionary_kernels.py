"""One training step of a dictionary by phases, in matrix products: selection, decoding, gradients and Adam.

    python benchmarks/dictionary_kernels.py [--path compiled] [--rows 2048] [--latents 4608 18432] [--repeats 15]

The unit, one "gemm", is one float32 product [2048 x 576] x [576 x F] into a buffer that is already there, timed between
the steps of the same loop. One thread, thread CPU time, the least of all repeats of each phase and of the whole step
(which is its own measure, not the sum). k = 32 latents a row. The data are sums of 32 of 2F random features and noise;
the weights are random, tied and of unit norm, as they are before training.

    TopK        the 32 largest of a row                           targets: 1.9 gemms at F = 4608, 1.4 at 18432
    BatchTopK   the 32 x rows largest of the batch                         2.2                    1.6
    above       all above a threshold that 64 a row pass                   3                      2.5
                (JumpReLU with its window, L1's active set, a gate)

`encode` is the product inside `select`, timed alone over the same tiles.
"""

from __future__ import annotations

import argparse
import platform
import time
from collections import defaultdict
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from assay.dictionaries.kernels.backend import Backend, backend
from assay.dictionaries.kernels.compiled import LATENTS, ROWS
from assay.dictionaries.kernels.values import AdamStep, Moments
from assay.dictionaries.latents import SparseLatents

WIDTH, ACTIVE = 576, 32
TARGETS = {"TopK": (1.9, 1.4), "BatchTopK": (2.2, 1.6), "above": (3.0, 2.5)}


@dataclass(slots=True)
class Problem:
    """A batch, weights with their moments, and what a step writes to."""

    x: Tensor
    W_dec: Tensor
    W_enc: Tensor
    b_enc: Tensor
    b_dec: Tensor
    moments: Moments
    threshold: Tensor
    product: Tensor
    step: int = 0


def problem(rows: int, latents: int, seed: int = 0) -> Problem:
    """The data and weights that the module's docstring describes."""
    generator = torch.Generator().manual_seed(seed)
    features = torch.nn.functional.normalize(torch.randn(2 * latents, WIDTH, generator=generator), dim=1)
    chosen = torch.randint(2 * latents, (rows, ACTIVE), generator=generator)
    strength = torch.rand(rows, ACTIVE, 1, generator=generator)
    x = (features[chosen] * strength).sum(dim=1) + 0.05 * torch.randn(rows, WIDTH, generator=generator)
    W_dec = torch.nn.functional.normalize(torch.randn(latents, WIDTH, generator=generator), dim=1)
    W_enc = W_dec.clone()
    product = torch.mm(x, W_enc.T)
    threshold = product.flatten().kthvalue(product.numel() - 2 * ACTIVE * rows).values
    return Problem(
        x=x,
        W_dec=W_dec,
        W_enc=W_enc,
        b_enc=torch.zeros(latents),
        b_dec=torch.zeros(WIDTH),
        moments=Moments.zeros(W_dec, W_enc),
        threshold=threshold.repeat(latents),
        product=product,
    )


def select(path: Backend, kind: str, p: Problem) -> SparseLatents:
    """The pairs of one kind of dictionary."""
    if kind == "TopK":
        return path.select_rows(p.x, p.W_enc, p.b_enc, ACTIVE)
    if kind == "BatchTopK":
        return path.select_batch(p.x, p.W_enc, p.b_enc, ACTIVE * len(p.x))[0]
    return path.select_above(p.x, p.W_enc, p.b_enc, p.threshold)


def encode(p: Problem) -> None:
    """The product alone, tile by tile into one buffer, as the compiled selection does it."""
    for row in range(0, len(p.x), ROWS):
        for latent in range(0, len(p.W_enc), LATENTS):
            x, W = p.x[row : row + ROWS], p.W_enc[latent : latent + LATENTS]
            torch.mm(x, W.T, out=p.product.view(-1)[: len(x) * len(W)].view(len(x), len(W)))


def step(path: Backend, kind: str, p: Problem, timed: Callable[[str], None]) -> None:
    """Reconstruction loss, everything updated: W_dec, W_enc, b_enc, b_dec. `timed` ends a phase."""
    pairs = select(path, kind, p)
    timed("select")
    R, slopes, _squares = path.residual(pairs, p.W_dec, p.b_dec, p.x, 2.0 / len(p.x))
    timed("decode, residual, slopes")
    grouped = path.by_latent(pairs.rows.to(torch.int32), pairs.latents, pairs.values, slopes, len(p.W_dec))
    timed("sort")
    p.step += 1
    adam = AdamStep(lr=1e-4, step=p.step)
    path.update(grouped, R, p.x, p.W_dec, p.W_enc, p.b_enc, p.moments, adam, unit_norm=True)
    timed("update")
    p.b_dec -= 1e-4 * R.sum(dim=0)
    timed("decoder bias")


def measure(path: Backend, kind: str, p: Problem, repeats: int) -> dict[str, float]:
    """The least CPU seconds of each phase."""
    best: dict[str, float] = defaultdict(lambda: float("inf"))
    for _ in range(repeats):
        start = last = time.thread_time()
        torch.mm(p.x, p.W_enc.T, out=p.product)
        best["gemm"] = min(best["gemm"], time.thread_time() - start)
        start = time.thread_time()
        encode(p)
        best["encode"] = min(best["encode"], time.thread_time() - start)
        start = last = time.thread_time()

        def timed(phase: str) -> None:
            nonlocal last
            now = time.thread_time()
            best[phase] = min(best[phase], now - last)
            last = now

        step(path, kind, p, timed)
        best["whole step"] = min(best["whole step"], time.thread_time() - start)
    return best


def main() -> None:
    """Print one table a number of latents."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--path", choices=["plain", "compiled"], default="compiled")
    parser.add_argument("--rows", type=int, default=2048)
    parser.add_argument("--latents", type=int, nargs="+", default=[4608, 18432])
    parser.add_argument("--kinds", nargs="+", choices=list(TARGETS), default=list(TARGETS))
    parser.add_argument("--repeats", type=int, default=15)
    options = parser.parse_args()
    torch.set_num_threads(1)
    path = backend("cpu", options.path)
    print(f"{platform.processor() or platform.machine()}, torch {torch.__version__}, one thread, path {path.name!r}")
    for latents in options.latents:
        for kind in options.kinds:
            p = problem(options.rows, latents)
            select(path, kind, p)  # buffers
            best = measure(path, kind, p, options.repeats)
            gemm = best["gemm"]
            phases = ", ".join(f"{name} {seconds / gemm:.3f}" for name, seconds in best.items() if name != "gemm")
            target = dict(zip((4608, 18432), TARGETS[kind], strict=True)).get(latents)
            print(f"F={latents} {kind:<9} gemm {1e3 * gemm:.1f} ms; in gemms: {phases}; target {target}", flush=True)


if __name__ == "__main__":
    main()
