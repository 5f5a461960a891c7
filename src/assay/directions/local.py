"""The local-processing test: how much of a token's activation is already there when only the last k tokens are read.

    cosine(h_l(full) - mean_l, h_l([BOS] + last k tokens) - mean_l)

with the same final token, by layer and k, beside the floor: the same statistic between different documents. The raw
cosine is not shown: late layers share a large common part, so that it is high even for unrelated tokens. A high value
says that the rest of the context changes little there; it does not say which computation is local.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor

from assay.activations.subject import Subject
from assay.base.errors import NumericalError, SpecError
from assay.base.rng import numpy_stream
from assay.base.stats import Interval, bootstrap_interval
from assay.directions.data import several

KS = (1, 2, 5, 10, 20)


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Locality:
    """Centred cosines by site and number of tokens kept.

    Args:
        sites: The sites.
        ks: How many tokens were kept.
        cosine: Truncated against full context of the same document, averaged over documents, `[sites, ks]`.
        floor: The same between each document and another one, `[sites, ks]`.
        by_document: The cosines of each document, `[sites, ks, documents]`.
        floor_by_document: The mean of each document with all others, `[sites, ks, documents]`.
        null: The mean cosine when each document is paired with another one at random, `[draws, sites, ks]`.
        n: Documents.
    """

    sites: tuple[str, ...]
    ks: tuple[int, ...]
    cosine: Float[np.ndarray, "sites ks"]
    floor: Float[np.ndarray, "sites ks"]
    by_document: Float[np.ndarray, "sites ks documents"]
    floor_by_document: Float[np.ndarray, "sites ks documents"]
    null: Float[np.ndarray, "draws sites ks"]
    n: int

    def interval(self, site: str, k: int, *, seed: int = 0) -> Interval:
        """The bootstrap interval over documents of one cell.

        Raises:
            SpecError: The site or k was not measured.
        """
        if site not in self.sites or k not in self.ks:
            raise SpecError(f"{site} with k = {k} was not measured; sites {self.sites}, k {self.ks}", "site")
        return bootstrap_interval(self.by_document[self.sites.index(site), self.ks.index(k)], seed=seed)


def local_processing(
    subject: Subject,
    texts: Sequence[str] | Tensor,
    *,
    ks: Sequence[int] = KS,
    sites: str | Sequence[str] = "blocks.*.resid_post",
    bos: int | None = None,
    batch: int = 16,
    draws: int = 99,
    seed: int = 0,
    progress: Callable[[int, int], object] | None = None,
) -> Locality:
    """Read each document's last token with its whole context and with the last k tokens alone.

    Args:
        subject: The subject.
        texts: Documents, or token ids `[rows, pos]`, none shorter than the largest k; three or more that differ.
        ks: How many tokens to keep, the last one included.
        sites: Where to look; `[batch, pos, features]`.
        bos: The token set before the kept ones; the tokenizer's own where it has one. Without one, none is: the first
            kept token is then read as a first token is, which changes it in models that use it as a sink.
        batch: Documents that go through the model at once.
        draws: How many times documents are paired with others at random, none with itself.
        seed: Seed of the pairs.
        progress: Told how many runs of documents are done, of how many.

    Raises:
        SpecError: Texts are no list, there are fewer than three documents, one is too short, or k is not a whole number
            of 1 or more.
        NumericalError: All documents have the same activation at a site.

    Example:
        >>> ids = torch.randint(3, 100, (4, 12), generator=torch.Generator().manual_seed(0))
        >>> found = local_processing(subject, ids, ks=(1, 12), bos=None)
        >>> found.cosine.shape, bool((found.cosine[:, 1] > 0.999).all())
        ((6, 2), True)
    """
    several(texts)
    rows = _ids(subject, texts)
    kept = tuple(sorted({int(k) for k in ks}))
    shortest = min(len(row) for row in rows)
    if not kept or kept[0] < 1:
        raise SpecError(f"ks is {tuple(ks)}; give whole numbers of 1 or more", "ks")
    if len(rows) < 3:
        raise SpecError(f"{len(rows)} documents have no floor; give three or more", "texts")
    if shortest < kept[-1]:
        raise SpecError(f"the shortest document has {shortest} tokens, k goes up to {kept[-1]}", "texts")
    start = bos if bos is not None else getattr(subject.tokenizer, "bos_token_id", None)
    names = tuple(str(site) for site in subject.expand(sites))
    total = len(rows) * (len(kept) + 1)

    def told(done: int) -> None:
        if progress is not None:
            progress(done, total)

    full = _last(subject, rows, names, batch)
    told(len(rows))
    cosine = np.zeros((len(names), len(kept), len(rows)))
    floor = np.zeros_like(cosine)
    null, partners = np.zeros((draws, len(names), len(kept))), _partners(len(rows), draws, seed)
    for j, k in enumerate(kept):
        cut = [_shortened(row, k, start) for row in rows]
        short = _last(subject, cut, names, batch)
        for i, name in enumerate(names):
            mean = full[name].mean(axis=0)
            a, b = _units(full[name] - mean, name), _units(short[name] - mean, name)
            table = a @ b.T
            cosine[i, j] = np.diagonal(table)
            # Every document against every other, so that the floor has no luck of the draw in it.
            floor[i, j] = (table.sum(axis=1) - np.diagonal(table)) / (len(rows) - 1)
            null[:, i, j] = table[np.arange(len(rows)), partners].mean(axis=1)
        told(len(rows) * (j + 2))
    return Locality(
        sites=names,
        ks=kept,
        cosine=cosine.mean(axis=2),
        floor=floor.mean(axis=2),
        by_document=cosine,
        floor_by_document=floor,
        null=null,
        n=len(rows),
    )


def _partners(n: int, draws: int, seed: int) -> Int[np.ndarray, "draws documents"]:
    """Another document for each: the next one round a ring in random order."""
    rng = numpy_stream(seed, "local processing", "pairs")
    found = np.zeros((draws, n), dtype=np.int64)
    for row in found:
        ring = rng.permutation(n)
        row[ring] = np.roll(ring, 1)
    return found


def _ids(subject: Subject, texts: Any) -> list[list[int]]:
    if isinstance(texts, Tensor):
        return [list(row) for row in texts.tolist()]
    found = []
    for text in texts:
        batch = subject.batch([text])
        first, length = batch.starts[0], batch.lengths[0]
        found.append(batch.ids[0, first : first + length].tolist())
    return found


def _shortened(row: list[int], k: int, start: int | None) -> list[int]:
    """The last k tokens behind the start token; a document that has no more is itself."""
    if k >= len(row):
        return row
    if start is None or (k == len(row) - 1 and row[0] == start):
        return row[-k:] if start is None else row
    return [start, *row[-k:]]


@torch.no_grad()
def _last(
    subject: Subject, rows: Sequence[Sequence[int]], names: Sequence[str], batch: int
) -> dict[str, Float[np.ndarray, "rows d"]]:
    """What sites hold at the last token of each row; rows of one length go through the model together."""
    found: dict[str, list[Any]] = {name: [None] * len(rows) for name in names}
    order = sorted(range(len(rows)), key=lambda i: len(rows[i]))
    at = 0
    while at < len(order):
        length = len(rows[order[at]])
        group = [i for i in order[at : at + batch] if len(rows[i]) == length]
        run = subject.run(torch.tensor([rows[i] for i in group]), capture=list(names))
        for name in names:
            held = run[name]
            if held.ndim != 3:
                raise SpecError(f"{name} has {held.ndim} dimensions; give sites of [batch, pos, features]", "sites")
            for i, values in zip(group, held[:, -1].double().cpu().numpy(), strict=True):
                found[name][i] = values
        at += len(group)
    return {name: np.stack(values) for name, values in found.items()}


def _units(rows: Float[np.ndarray, "rows d"], name: str) -> Float[np.ndarray, "rows d"]:
    sizes = np.linalg.norm(rows, axis=1, keepdims=True)
    if not (np.isfinite(sizes).all() and sizes.all()):
        raise NumericalError(f"{name} is the same for all documents, or not finite: there is no cosine; vary the texts")
    return np.asarray(rows / sizes)
