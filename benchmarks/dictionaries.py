"""Training steps of dictionaries in matrix products, beside SAELens, dictionary_learning and sparsify.

    python benchmarks/dictionaries.py [--latents 4608 18432] [--families topk batchtopk jumprelu l1] [--repeats 6]
                                      [--libraries assay sae-lens ...] [--venvs FOLDER]

The unit, one "gemm", is one float32 product [2048 x 576] x [576 x F], timed between the steps of the same loop. One
thread, thread CPU time, the least of the repeats; k = 32. Each peer runs in an environment of its own, made by pip the
first time, with the step its own trainer takes (optimiser, clipping, dead-latent counting). assay's step is everything
its trainer does: scaling, selection, decoding, gradients, Adam, unit decoder rows, counters and curves. Families
without a k (jumprelu, l1) begin with thresholds or biases at which 32 latents a row are active in assay; peers begin
as they begin, and their cost does not depend on it.

Rows are sums of 32 of 2F random directions and noise. The reservoir has its own script, benchmarks/reservoir.py.
"""

from __future__ import annotations

import argparse
import json
import platform
import subprocess
import sys
import tempfile
from datetime import date
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent / "peers"))

import numpy as np
import torch
from environments import NotInstalled, environment

from assay.base.artifacts import home

WORKER = Path(__file__).parent / "peers" / "dictionary_worker.py"
LIBRARIES = ("assay", "sae-lens", "dictionary-learning", "eai-sparsify")
TARGETS = {
    4608: {"topk": 1.9, "batchtopk": 2.2, "jumprelu": 3.0, "l1": 3.0},
    18432: {"topk": 1.4, "batchtopk": 1.6, "jumprelu": 2.5, "l1": 2.5},
}
ROWS, WIDTH, ACTIVE = 2048, 576, 32


def data(latents: int, folder: Path) -> Path:
    """Four batches of rows, in a file."""
    stream = torch.Generator().manual_seed(latents)
    directions = torch.nn.functional.normalize(torch.randn(2 * latents, WIDTH, generator=stream), dim=1)
    parts = []
    for _ in range(4):
        which = torch.randint(2 * latents, (ROWS, ACTIVE), generator=stream)
        size = torch.rand(ROWS, ACTIVE, 1, generator=stream)
        parts.append((directions[which] * size).sum(1) + 0.05 * torch.randn(ROWS, WIDTH, generator=stream))
    path = folder / f"rows-{latents}.npy"
    rows = torch.cat(parts)
    np.save(path, (rows * WIDTH**0.5 / rows.norm(dim=1).mean()).numpy())
    return path


def measured(python: Path, library: str, family: str, latents: int, rows: Path, repeats: int) -> dict[str, float] | str:
    """What a library's worker says, or why it says nothing."""
    asked = {"library": library, "family": family, "latents": latents, "rows": str(rows), "k": ACTIVE}
    command = [str(python), str(WORKER), "time", json.dumps(asked | {"repeats": repeats})]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode == 3:
        return "-"
    if done.returncode:
        lines = done.stderr.strip().splitlines()
        return f"failed: {lines[-1][:80] if lines else done.returncode}"
    found: dict[str, float] = json.loads(done.stdout.strip().splitlines()[-1])
    return found


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--latents", type=int, nargs="+", default=[4608, 18432])
    parser.add_argument("--families", nargs="+", default=list(TARGETS[4608]), choices=list(TARGETS[4608]))
    parser.add_argument("--libraries", nargs="+", default=list(LIBRARIES), choices=list(LIBRARIES))
    parser.add_argument("--repeats", type=int, default=6)
    parser.add_argument("--venvs", type=Path, default=home() / "peers")
    options = parser.parse_args()
    pythons: dict[str, Path | str] = {}
    for library in options.libraries:
        try:
            pythons[library] = Path(sys.executable) if library == "assay" else environment(library, options.venvs)
        except NotInstalled as error:
            pythons[library] = f"not installed: {error}"
    print(f"{date.today()}, {platform.machine()}, one thread, torch {torch.__version__}; gemms a step (tokens/s)\n")
    print("| family | F | target | " + " | ".join(pythons) + " |")
    print("|---|---|---|" + "---|" * len(pythons))
    with tempfile.TemporaryDirectory() as folder:
        for latents in options.latents:
            rows = data(latents, Path(folder))
            for family in options.families:
                cells = []
                for library, python in pythons.items():
                    if isinstance(python, str):
                        cells.append(python)
                        continue
                    found = measured(python, library, family, latents, rows, options.repeats)
                    if isinstance(found, str):
                        cells.append(found)
                    else:
                        cells.append(f"{found['gemms']:.2f} ({found['tokens_per_second']:,.0f})")
                target = TARGETS.get(latents, {}).get(family, "-")
                print(f"| {family} | {latents} | {target} | " + " | ".join(cells) + " |", flush=True)


if __name__ == "__main__":
    main()
