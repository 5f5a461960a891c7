"""Stored activations, read in an order that is a function of the seed and the step alone."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Mapping, Sequence
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor

from assay.activations.order import CHUNK, WINDOW, Order
from assay.activations.shards import MANIFEST, Manifest, Shard, check_shard, map_shard
from assay.base.artifacts import user_path
from assay.base.errors import AssayError, DamagedFile, SpecError, nearest
from assay.base.hashing import digest
from assay.base.sites import parse_site

TOKEN_FIELDS = ("token", "document", "row", "pos")
"""What is kept of each token beside its activations."""


class Store:
    """A folder of activations that `harvest` wrote, by one process or by several.

    Opened by `Store.open`. The files are mapped into memory, not read: what a batch costs is its own rows.

    Attributes:
        folder: The folder.
        parts: The folder and manifest of each process that wrote.
        n: How many tokens there are.
        sites: The sites, in order.
        widths: The width of each.
    """

    def __init__(self, folder: Path, parts: Sequence[tuple[Path, Manifest]]) -> None:
        self.folder, self.parts = folder, tuple(parts)
        self.widths: dict[str, int] = dict(parts[0][1].widths)
        self.sites: tuple[str, ...] = tuple(self.widths)
        self.dtype: str = parts[0][1].dtype
        self._shards = [(place, shard) for place, manifest in parts for shard in manifest.shards]
        self._ends = np.cumsum([0, *(shard.tokens for _, shard in self._shards)])
        self._maps: dict[int, dict[str, np.ndarray]] = {}
        self.n = int(self._ends[-1])

    @classmethod
    def open(cls, folder: str | Path, *, verify: bool = True) -> Store:
        """Open a folder of activations.

        Args:
            folder: What `harvest` was given as `out`.
            verify: Hold every shard to its checksum, which reads it once; False holds it to its size alone.

        Raises:
            SpecError: There are no activations there, or a process has not finished its part.
            DamagedFile: The manifest or a shard is damaged; the message names it.
        """
        place = user_path(folder, lambda said: SpecError(said, "folder"))
        parts = [(part, Manifest.read(part)) for part in _parts(place)]
        for part, manifest in parts:
            if not manifest.complete:
                raise SpecError(
                    f"the harvest in {str(part)!r} has not finished ({manifest.tokens:,} tokens so far): run the same "
                    "call again, and it goes on from there",
                    "folder",
                )
            if _shared(manifest) != _shared(parts[0][1]):
                raise SpecError(f"{str(parts[0][0])!r} and {str(part)!r} are of different harvests", "folder")
        store = cls(place, parts)
        for part, shard in store._shards:
            check_shard(part, shard, contents=verify)
        return store

    def verify(self) -> None:
        """Hold every shard to its checksum.

        Raises:
            DamagedFile: One is damaged; the message names it.
        """
        for part, shard in self._shards:
            check_shard(part, shard, contents=True)

    @property
    def notes(self) -> tuple[str, ...]:
        """What a reader should know."""
        return tuple(dict.fromkeys(note for _, manifest in self.parts for note in manifest.notes))

    @property
    def norms(self) -> dict[str, dict[str, float]]:
        """For each site, `mean_norm` (the mean of |x|) and `mean_square_norm` (the mean of |x|^2)."""
        merged = Manifest(request={}, widths=self.widths, dtype=self.dtype, shards=tuple(s for _, s in self._shards))
        return merged.norms()

    def describe(self) -> dict[str, Any]:
        """Where the activations come from, as JSON values for a result's provenance."""
        request = {k: v for k, v in self.parts[0][1].request.items() if k not in ("rank", "world")}
        hashes = [shard.sha256 for _, shard in self._shards]
        return {"kind": "store", "tokens": self.n, "dtype": self.dtype, "shards": digest(hashes), "harvest": request}

    def mean(self, site: str) -> Float[np.ndarray, " d"]:
        """The mean vector of a site, `[d]`, float64."""
        name = self._site(site)
        total = np.zeros(self.widths[name])
        for number, (_, shard) in enumerate(self._shards):
            total += self._map(number)[f"mean:{name}"] * shard.tokens
        return np.asarray(total / max(1, self.n))

    def blocks(self, site: str, size: int = 4096) -> Iterator[Float[Tensor, "rows d"]]:
        """Yield a site's rows in their stored order, float32, a block at a time.

        `assay.base.moments.moments(store.blocks(site))` are its mean and covariance.
        """
        name = self._site(site)
        for number, (_, shard) in enumerate(self._shards):
            rows = self._map(number)[name]
            for start in range(0, shard.tokens, size):
                yield _float(np.array(rows[start : start + size]))

    def rows(self, index: Int[np.ndarray, " k"], sites: Sequence[str] | None = None) -> dict[str, Tensor]:
        """Some rows by their numbers, in the order given: for each site `[k, d]`, float32.

        Raises:
            SpecError: A number is outside 0..n-1, or a site is not here.
        """
        if index.size and not (0 <= index.min() and index.max() < self.n):
            raise SpecError(f"rows {index.min()} to {index.max()} of a store of {self.n:,}", "index")
        names = self._sites(sites)
        places = list(self._places(index))
        found = {}
        for name in names:
            bits = np.empty((len(index), self.widths[name]), np.uint16 if self.dtype == "bfloat16" else np.float32)
            for number, at, rows in places:
                if at is None:
                    np.take(self._map(number)[name], rows, axis=0, out=bits, mode="clip")
                else:
                    bits[at] = np.take(self._map(number)[name], rows, axis=0, mode="clip")
            found[name] = _float(bits)
        return found

    def tokens(self, index: Int[np.ndarray, " k"]) -> dict[str, Int[np.ndarray, " k"]]:
        """What rows are of: token id, document, row of the corpus, and position in that row."""
        found = {name: np.empty(len(index), np.int64) for name in TOKEN_FIELDS}
        for number, at, rows in self._places(index):
            for name, values in found.items():
                values[slice(None) if at is None else at] = self._map(number)[name][rows]
        return found

    def context(self, index: int) -> Int[np.ndarray, " n"]:
        """The token ids of the whole row of the corpus that a stored token is from, filtered tokens included."""
        number, _, rows = next(self._places(np.array([index])))
        maps = self._map(number)
        place = int(np.searchsorted(maps["rows"], maps["row"][rows[0]]))
        first, last = maps["starts"][place : place + 2]
        return np.array(maps["ids"][first:last], np.int64)

    def contexts(self) -> Iterator[Int[np.ndarray, " n"]]:
        """Yield the token ids of every row of the corpus that was run, in their stored order; see `context`."""
        for number in range(len(self._shards)):
            maps = self._map(number)
            for first, last in itertools.pairwise(maps["starts"].tolist()):
                yield np.array(maps["ids"][first:last], np.int64)

    def batch(
        self, step: int, batch_size: int, seed: int = 0, *, sites: Sequence[str] | None = None
    ) -> dict[str, Tensor]:
        """The batch of a step: for each site `[batch, d]` in float32, the same tokens in the same rows.

        Batches follow each other through epochs, each in an order of its own; one may span two epochs.

        Args:
            step: From 0.
            batch_size: How many rows.
            seed: The seed of the order.
            sites: Which sites; all when None.
        """
        return self.source(batch_size, seed, sites=sites).batch(step)

    def source(
        self,
        batch_size: int,
        seed: int = 0,
        *,
        sites: Sequence[str] | None = None,
        rank: int = 0,
        world: int = 1,
        chunk: int = CHUNK,
        window: int = WINDOW,
        n: int | None = None,
    ) -> Stored:
        """The store as a `Source` of batches.

        Args:
            batch_size: How many rows a step takes, over all processes.
            seed: The seed of the order.
            sites: Which sites; all when None.
            rank: Of `world` processes that train together, the one that this is: it gets rows `rank`, `rank + world`,
                ... of the batch that one process alone would get.
            world: How many processes there are.
            chunk: See `assay.activations.order`.
            window: See there; `chunk * window` rows are mixed with each other.
            n: Only the first rows, so that the others are held out; all when None.
        """
        if batch_size < 1 or not 0 <= rank < world:
            raise SpecError(f"batch_size={batch_size}, rank={rank} of {world}: at least 1 row, and a rank below world")
        if n is not None and not 1 <= n <= self.n:
            raise SpecError(f"n={n}, and there are {self.n:,} rows: from 1 to that", "n")
        order = Order(self.n if n is None else n, seed, chunk=chunk, window=window)
        return Stored(self, self._sites(sites), batch_size, order, rank, world)

    def __len__(self) -> int:
        """How many tokens there are."""
        return self.n

    def __repr__(self) -> str:
        """One line: how many tokens of which sites."""
        sites = ", ".join(self.sites[:3]) + (", ..." if len(self.sites) > 3 else "")
        return f"<Store {self.n:,} tokens, {self.dtype}, {len(self.sites)} sites: {sites}>"

    def _places(self, index: np.ndarray) -> Iterator[tuple[int, np.ndarray | None, np.ndarray]]:
        """For each shard that rows are in: its number, where they go (None for all, in order), and its own rows."""
        numbers = np.searchsorted(self._ends, index, side="right") - 1
        first = int(numbers[0]) if len(numbers) else 0
        if (numbers == first).all():
            if len(index):
                yield first, None, index - self._ends[first]
            return
        for number in np.unique(numbers):
            at = np.flatnonzero(numbers == number)
            yield int(number), at, index[at] - self._ends[number]

    def _map(self, number: int) -> dict[str, np.ndarray]:
        if number not in self._maps:
            place, shard = self._shards[number]
            self._maps[number] = found = map_shard(place / shard.name)
            for name in self.sites:
                if name not in found or found[name].shape != (shard.tokens, self.widths[name]):
                    raise DamagedFile(f"the shard {str(place / shard.name)!r} does not hold what {MANIFEST} says")
        return self._maps[number]

    def _sites(self, names: Sequence[str] | None) -> tuple[str, ...]:
        if names is None:
            return self.sites
        return tuple(dict.fromkeys(self._site(name) for name in ([names] if isinstance(names, str) else names)))

    def _site(self, name: str) -> str:
        if name in self.widths:
            return name
        canonical = _canonical(name)
        if canonical not in self.widths:
            raise SpecError(f"no activations of {name!r}{nearest(name, self.widths)} in {str(self.folder)!r}", "sites")
        return canonical


class Stored:
    """Batches of a store; made by `Store.source`. It keeps no place: any step can be asked for at any time."""

    def __init__(
        self, store: Store, sites: tuple[str, ...], batch_size: int, order: Order, rank: int, world: int
    ) -> None:
        self.store, self.order = store, order
        self._sites, self._batch_size, self._rank, self._world = sites, batch_size, rank, world

    @property
    def sites(self) -> tuple[str, ...]:
        """The sites, in order."""
        return self._sites

    @property
    def widths(self) -> Mapping[str, int]:
        """The width of each site."""
        return {site: self.store.widths[site] for site in self._sites}

    @property
    def batch_size(self) -> int:
        """How many rows a batch of this process has."""
        return len(range(self._rank, self._batch_size, self._world))

    def index(self, step: int) -> Int[np.ndarray, " batch"]:
        """The numbers of the rows of a step's batch."""
        if step < 0:
            raise SpecError(f"step {step}: steps count from 0", "step")
        return self.order.rows(step * self._batch_size, self._batch_size)[self._rank :: self._world]

    def batch(self, step: int) -> dict[str, Tensor]:
        """The batch of a step: for each site `[batch, d]` in float32, a tensor of the caller's own."""
        return self.store.rows(self.index(step), self._sites)

    def state(self) -> dict[str, Any]:
        """What it is of; there is no place to keep."""
        return {"source": digest(self.describe())}

    def restore(self, state: Mapping[str, Any]) -> None:
        """Check that this is the source of a state.

        Raises:
            SpecError: It is not: other activations, another seed or batch size.
        """
        if state.get("source") != digest(self.describe()):
            raise SpecError(
                "the state is of another source: other activations, sites, seed, batch size or number of processes",
                "state",
            )

    def describe(self) -> dict[str, Any]:
        """Where the activations come from, as JSON values."""
        order = {"rows": self.order.n, "seed": self.order.seed, "chunk": self.order.chunk, "window": self.order.window}
        batch = {"batch_size": self._batch_size, "rank": self._rank, "world": self._world}
        return {**self.store.describe(), "sites": list(self._sites), **batch, "order": {"name": "assay/1", **order}}


def _parts(folder: Path) -> list[Path]:
    """The folders of the processes that wrote, all of them."""
    if (folder / MANIFEST).is_file():
        return [folder]
    ranks = sorted(path for path in folder.glob("rank-*-of-*") if (path / MANIFEST).is_file())
    if not ranks:
        raise SpecError(f"{str(folder)!r} holds no activations (no {MANIFEST})", "folder")
    world = ranks[0].name.rpartition("-")[2]
    names = {f"rank-{rank}-of-{world}" for rank in range(int(world))}
    if {path.name for path in ranks} != names:
        missing = (
            ", ".join(sorted(names - {path.name for path in ranks})) or f"one count of processes, not {len(ranks)}"
        )
        raise SpecError(f"{str(folder)!r} lacks what some processes write: {missing}", "folder")
    return sorted(ranks, key=lambda path: int(path.name.split("-")[1]))


def _shared(manifest: Manifest) -> dict[str, Any]:
    return {**manifest.request, "rank": 0, "tokens": 0}


def _float(bits: np.ndarray) -> Tensor:
    """Rows as float32, from bfloat16 bits or as they are."""
    tensor = torch.from_numpy(bits)
    return tensor.view(torch.bfloat16).float() if bits.dtype == np.uint16 else tensor


@lru_cache(maxsize=1024)
def _canonical(name: str) -> str:
    try:
        return str(parse_site(name))
    except AssayError:
        return name


__all__ = ["TOKEN_FIELDS", "Shard", "Store", "Stored"]
