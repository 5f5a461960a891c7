"""One comparison in one process: a library's work against the bare forward of the model that it wraps.

    python worker.py --library assay --work run --folder MODEL --out result.json

Run by benchmarks/engine.py with the python of the library's own environment. The bare forward is transformers' own, of
a second copy of the model in the same process, so that what a library does to its copy does not touch it.
"""

from __future__ import annotations

import argparse
import importlib
import importlib.metadata
import json
import sys
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parent))

import torch
from measure import interleaved, peak_bytes, reset_peak, summary
from torch import Tensor, nn

ROWS, WIDTH = 8, 128
PROMPT, NEW, STEERED = 16, 64, 15
SWEEP_WIDTH = 32
SMALL = (range(0, 30, 3), range(0, 32, 4))
LARGE = (range(30), range(32))
SITES = ("resid_pre", "resid_mid", "resid_post", "q", "k", "v", "z", "mlp_out")


def load_bare(folder: str) -> nn.Module:
    """The model as transformers loads it: float32, its default attention (SDPA)."""
    from transformers import AutoModelForCausalLM
    from transformers.utils import logging

    logging.disable_progress_bar()
    return AutoModelForCausalLM.from_pretrained(folder, local_files_only=True).eval()


def token_ids(rows: int, width: int, seed: int = 0) -> Tensor:
    """Random tokens, the same in every library."""
    return torch.randint(100, 40_000, (rows, width), generator=torch.Generator().manual_seed(seed))


def direction(width: int) -> Tensor:
    """A random vector to steer with."""
    return torch.randn(width, generator=torch.Generator().manual_seed(1))


def bare_forward(module: nn.Module, ids: Tensor) -> Callable[[], Tensor]:
    """One plain forward without a cache, all logits kept."""

    @torch.no_grad()
    def forward() -> Tensor:
        return module(ids, use_cache=False).logits

    return forward


def run_work(library: Any, options: argparse.Namespace) -> dict[str, Any]:
    """A run of 8 x 128 tokens that captures nothing, one site, all sites, or all sites and patterns."""
    ids = token_ids(ROWS, WIDTH)
    bare = bare_forward(load_bare(options.folder), ids)
    model = library.load(options.folder, patterns=options.work == "patterns")
    work = library.run(model, ids, options.work)
    logits, tensors = work()
    found = {"difference": float((logits - bare()).abs().max()), "tensors": len(tensors)}
    expected = {"plain": 0, "one": 1, "all": 240, "patterns": 270}[options.work]
    if len(tensors) != expected:
        raise RuntimeError(f"{len(tensors)} tensors were captured, {expected} were asked for")
    del logits, tensors
    return found | interleaved(bare, work, n=options.n, seconds=options.seconds)


def generate_work(library: Any, options: argparse.Namespace) -> dict[str, Any]:
    """Generate 64 tokens after 16, one vector added at one block at every token, against the module's own generate."""
    ids, vector = token_ids(1, PROMPT), direction(576)
    module = load_bare(options.folder)
    settings = {"max_new_tokens": NEW, "min_new_tokens": NEW, "do_sample": False, "pad_token_id": 0}
    mask = torch.ones_like(ids)

    def bare() -> Tensor:
        with torch.no_grad():
            return module.generate(ids, attention_mask=mask, **settings)

    def hook(_: nn.Module, __: Any, output: Tensor) -> Tensor:
        return output + vector

    handle = module.model.layers[STEERED].register_forward_hook(hook)
    expected = bare()
    handle.remove()
    work = library.generate(library.load(options.folder), ids, vector, STEERED, NEW)
    found = work()
    same = int((found[0] == expected[0]).long().cumprod(0).sum()) - PROMPT
    result = interleaved(bare, work, n=options.n, seconds=options.seconds)
    return {"same_tokens": same, "new_tokens": found.shape[1] - PROMPT, **result}


def sweep_work(library: Any, options: argparse.Namespace) -> dict[str, Any]:
    """Patch the residual stream, one block and one position at a time; recording the source and the base counts.

    The unit is patched forwards a second over bare forwards a second (one row, all logits).
    """
    clean, corrupt = token_ids(1, SWEEP_WIDTH, 2), token_ids(1, SWEEP_WIDTH, 3)
    blocks, positions = SMALL if options.work == "sweep-small" else LARGE
    module = load_bare(options.folder)
    bare = bare_forward(module, corrupt)
    best = [int(i) for i in bare_forward(module, clean)()[0, -1].topk(2).indices]

    def metric(logits: Tensor) -> Tensor:
        return logits[:, -1, best[0]] - logits[:, -1, best[1]]

    model = library.load(options.folder)
    work, how = library.sweep(model, clean, corrupt, metric, blocks, positions)
    found = work()
    wrong = check_cells(module, clean, corrupt, metric, blocks, positions, found)
    result = interleaved(bare, work, n=options.n, seconds=options.seconds, chunk=8)
    cells = len(blocks) * len(positions)
    speeds = [cells / ratio for ratio in result["ratios"]]
    return {**result, **summary(speeds), "cells": cells, "difference": wrong, "how": how}


def check_cells(
    module: nn.Module,
    clean: Tensor,
    corrupt: Tensor,
    metric: Callable[[Tensor], Tensor],
    blocks: range,
    positions: range,
    found: Tensor,
) -> float:
    """The largest difference, over eight cells, to one forward each with a plain hook."""
    donor: dict[int, Tensor] = {}
    cells = [(i, p) for i in blocks for p in positions]
    chosen = cells[:: max(1, len(cells) // 8)]

    def run(ids: Tensor, block: int, hook: Any) -> Tensor:
        handle = module.model.layers[block].register_forward_pre_hook(hook)
        try:
            return bare_forward(module, ids)()
        finally:
            handle.remove()

    worst = 0.0
    for block, position in chosen:

        def keep(_: nn.Module, args: tuple[Tensor, ...], block: int = block) -> None:
            donor[block] = args[0]

        def patch(
            _: nn.Module, args: tuple[Tensor, ...], block: int = block, position: int = position
        ) -> tuple[Tensor, ...]:
            new = args[0].clone()
            new[:, position] = donor[block][:, position]
            return (new, *args[1:])

        run(clean, block, keep)
        expected = float(metric(run(corrupt, block, patch)))
        mine = float(found.reshape(len(blocks), len(positions))[blocks.index(block), positions.index(position)])
        worst = max(worst, abs(mine - expected))
    return worst


def memory_work(library: Any, options: argparse.Namespace) -> dict[str, Any]:
    """Peak resident memory of this process while it captures one site of 8 x 128 tokens, its model loaded before.

    Without a library: of a process that has the model and its tokenizer (44 MB of this one's memory), as a user of
    transformers and every library here has.
    """
    ids = token_ids(ROWS, WIDTH)
    tokenizer = None
    if library is None:
        from transformers import AutoTokenizer

        tokenizer = AutoTokenizer.from_pretrained(options.folder, local_files_only=True)
        work: Callable[[], object] = bare_forward(load_bare(options.folder), ids)
    else:
        work = library.run(library.load(options.folder), ids, "one")
    reset = reset_peak()
    kept = work()
    peak = peak_bytes()
    del kept, tokenizer
    return {"peak_bytes": peak, "reset": reset}


def growth_work(library: Any, options: argparse.Namespace) -> dict[str, Any]:
    """What a cell costs assay, in bare forwards of its own prompts, as blocks, positions and prompts grow."""
    module = load_bare(options.folder)
    model = library.load(options.folder)
    rows = []
    cases = [(b, 8, 1, 32) for b in (5, 10, 20, 30)] + [(30, p, 1, 32) for p in (1, 2, 4, 16, 32)]
    cases += [(10, 8, prompts, 32) for prompts in (2, 4, 8)] + [(10, 8, 1, width) for width in (64, 128)]
    for n_blocks, n_positions, prompts, width in cases:
        clean, corrupt = token_ids(prompts, width, 2), token_ids(prompts, width, 3)
        blocks, positions = range(0, 30, 30 // n_blocks), range(0, width, width // n_positions)

        def metric(logits: Tensor) -> Tensor:
            return logits[:, -1, 5] - logits[:, -1, 9]

        work, _ = library.sweep(model, clean, corrupt, metric, blocks, positions)
        found = interleaved(bare_forward(module, corrupt), work, n=3, seconds=options.seconds / 4, chunk=4)
        cells = len(blocks) * len(positions)
        speed = summary([cells / ratio for ratio in found["ratios"]])
        shape = {"blocks": len(blocks), "positions": len(positions), "prompts": prompts, "width": width}
        rows.append({**shape, "cells": cells, "bare_s": found["bare_s"], "work_s": found["work_s"], **speed})
    return {"rows": rows}


WORKS: dict[str, Callable[[Any, argparse.Namespace], dict[str, Any]]] = {
    "plain": run_work,
    "one": run_work,
    "all": run_work,
    "patterns": run_work,
    "generate": generate_work,
    "sweep-small": sweep_work,
    "sweep-large": sweep_work,
    "memory": memory_work,
    "growth": growth_work,
}


def versions(distributions: list[str]) -> dict[str, str]:
    """The installed versions of some distributions."""
    found = {}
    for name in distributions:
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            found[name] = "not installed"
    return found


def main() -> None:
    """Do one work and write what was found, or the error."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--library", required=True, choices=("assay", "transformerlens", "nnsight", "bare"))
    parser.add_argument("--work", required=True, choices=WORKS)
    parser.add_argument("--folder", required=True)
    parser.add_argument("--n", type=int, default=9)
    parser.add_argument("--seconds", type=float, default=90.0)
    parser.add_argument("--out", required=True, type=Path)
    options = parser.parse_args()
    torch.set_num_threads(1)
    try:
        library = None if options.library == "bare" else importlib.import_module(f"library_{options.library}")
        found = WORKS[options.work](library, options)
        names = ["torch", "transformers", *(library.DISTRIBUTIONS if library is not None else [])]
        found["versions"] = versions(names)
    except BaseException as error:
        traceback.print_exc()
        found = {"error": f"{type(error).__name__}: {str(error).strip().splitlines()[0] if str(error) else ''}"[:300]}
    options.out.write_text(json.dumps(found), encoding="utf-8")


if __name__ == "__main__":
    main()
