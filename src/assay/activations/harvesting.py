"""Harvest: a corpus streamed through a subject, and its activations at many sites written to sharded files.

Every shard is made of a fixed run of rows of the corpus, in fixed batches. What is in it therefore depends on the
request alone, not on when the process was killed: an interrupted harvest goes on after its last whole shard, and the
folder is, byte for byte, the one that an uninterrupted harvest writes (on one machine, with the same threads).
"""

from __future__ import annotations

import importlib.metadata
import os
import platform
import shutil
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from itertools import chain, islice
from pathlib import Path
from typing import Any, Literal, get_args

import numpy as np
import torch

from assay.activations.corpora import Corpus
from assay.activations.filling import Part, Taken
from assay.activations.passes import Filter, Pass, share_of
from assay.activations.rows import Cursor, TokenRows
from assay.activations.shards import Manifest, check_shard, locked
from assay.activations.store import Store
from assay.base.artifacts import user_path
from assay.base.errors import OutputError, SpecError
from assay.base.hashing import plain
from assay.base.method import Progress
from assay.base.version import __version__
from assay.subjects.model import Model

Dtype = Literal["bfloat16", "float32"]
SHARD_BYTES = 1 << 28
_BESIDE = 28
"""Bytes a token has beside its activations: its id, document, row and position, and its place in `ids`."""


@dataclass(frozen=True, slots=True, kw_only=True)
class HarvestPlan:
    """What a harvest would do, from one batch of it.

    Args:
        sites: The width of each site.
        tokens: How many tokens would be stored by this process; None for as many as the corpus has.
        forwards: How many rows would be pushed through the model; None where that is not known.
        share: The share of the model's blocks that each forward computes.
        bytes: What it would take on the disk; None where that is not known.
        free: What the disk has left.
        shard_rows: How many rows of the corpus make a shard.
        seconds: Expected time.
        tokens_per_second: Stored tokens a second in that batch.
        seen: What the batch showed of each site: median and largest norms.
        done: How many tokens an interrupted harvest has stored already.
        notes: What a reader should know.
    """

    sites: Mapping[str, int]
    tokens: int | None
    forwards: int | None
    share: float
    bytes: int | None
    free: int
    shard_rows: int
    seconds: float | None
    tokens_per_second: float
    seen: Mapping[str, Any]
    done: int = 0
    notes: tuple[str, ...] = ()

    def to_dict(self) -> dict[str, Any]:
        """The plan as JSON values."""
        return dict(asdict(self))


class Harvest:
    """A harvest that is about to be made: checked, planned, and then run; see `harvest` for the options.

    Making it runs one row whole and one batch up to the last site. Nothing is written before `run`.

    Attributes:
        out: The folder of this process.
        plan: What `run` will do.
    """

    def __init__(
        self,
        subject: Model,
        corpus: Corpus,
        sites: str | Sequence[str],
        *,
        out: str | Path,
        tokens: int | None = None,
        dtype: str = "bfloat16",
        context: int = 128,
        layout: str = "pack",
        bos: str = "auto",
        separator: str | int = "auto",
        min_length: int = 2,
        max_norm: float | None = None,
        skip_bos: bool = False,
        skip_first: int = 0,
        rows: int = 16,
        shard_bytes: int = SHARD_BYTES,
        rank: int | None = None,
        world: int | None = None,
    ) -> None:
        if dtype not in get_args(Dtype):
            raise SpecError(f"dtype={dtype!r}: 'bfloat16' or 'float32'", "dtype")
        for name, value, least in (("tokens", tokens, 1), ("rows", rows, 1), ("shard_bytes", shard_bytes, 1)):
            if value is not None and value < least:
                raise SpecError(f"{name}={value}: at least {least}", name)
        self.rank, self.world = _processes(rank, world)
        if tokens is not None and tokens < self.world:
            raise SpecError(f"tokens={tokens} for {self.world} processes: at least one each", "tokens")
        self.subject, self.dtype, self.together = subject, dtype, rows
        share, left = (None, 0) if tokens is None else divmod(tokens, self.world)
        self.tokens = None if share is None else share + (self.rank < left)
        self.given = TokenRows(
            corpus, subject.tokenizer, context=context, layout=layout, bos=bos, separator=separator,
            min_length=min_length,
        )  # fmt: skip
        self.reader = Pass(subject, sites, Filter(max_norm=max_norm, skip_bos=skip_bos, skip_first=skip_first))
        base = user_path(out, lambda said: SpecError(said, "out"))
        self.out = base if self.world == 1 else base / f"rank-{self.rank}-of-{self.world}"
        self._look()
        per_row = context * sum(self.reader.widths.values()) * self._dtype.itemsize
        self.shard_rows = max(rows, shard_bytes // per_row // rows * rows)
        self.request = self._request(tokens)
        self.found = self._found()
        self.plan = self._plan()

    @property
    def _dtype(self) -> torch.dtype:
        return torch.bfloat16 if self.dtype == "bfloat16" else torch.float32

    def run(self, progress: Progress | None = None) -> Store:
        """Make it, or what is left of it.

        Args:
            progress: Told of tokens done and in all (0 where that is not known); stops the harvest by raising.

        Returns:
            The store; with several processes, this one's part of it.

        Raises:
            OutputError: The disk is too small, or another harvest is writing to the folder.
            DamagedFile: A shard that was written before is damaged.
            NumericalError: An activation is not finite. Whole shards stay.
            Cancelled: `progress` said so. Whole shards stay.
        """
        there = self.found.complete
        if not there:
            self._check_room()
            with locked(self.out):
                self.found = self._found()  # as it is now that nobody else writes
                self._sweep()
                for shard in self.found.shards:
                    check_shard(self.out, shard, contents=True)
                self._write(progress)
        return Store.open(self.out, verify=there)

    def _look(self) -> None:
        """Run the first rows: widths, thresholds, cost."""
        first = list(islice(self.given.rows(), self.together))
        if not first:
            raise SpecError(f"the corpus has no row of at least {self.given.min_length} tokens", "corpus")
        self.reader.probe(first[0])
        self.seen = self.reader.calibrate(first)
        if self.reader.filter.max_norm is not None and not self.seen["kept"]:
            raise SpecError(f"max_norm={self.reader.filter.max_norm} leaves out every token of the first rows")

    def _request(self, tokens: int | None) -> dict[str, Any]:
        """All that the result depends on, as JSON values."""
        what = {
            "model": self.subject.name,
            "fingerprint": self.subject.fingerprint,
            "rows": self.given.describe(),
            "sites": list(self.reader.sites),
            "dtype": self.dtype,
            "tokens": tokens,
            "filter": asdict(self.reader.filter),
            "rows_together": self.together,
            "shard_rows": self.shard_rows,
            "rank": self.rank,
            "world": self.world,
        }
        return dict(plain(what))

    def _found(self) -> Manifest:
        """What the folder has of this harvest: a manifest without shards where it has nothing.

        Raises:
            SpecError: The folder has another harvest.
        """
        try:
            found = Manifest.read(self.out)
        except FileNotFoundError:
            return Manifest(
                request=self.request, widths=self.reader.widths, dtype=self.dtype, thresholds=self.reader.thresholds,
                seen=self.seen["sites"], notes=self._notes(), versions=_versions(),
            )  # fmt: skip
        except NotADirectoryError:
            raise OutputError(f"cannot write {str(self.out)!r}: a file of that name is in the way") from None
        differ = [name for name, value in self.request.items() if name != "model" and found.request.get(name) != value]
        if differ:
            said = "; ".join(
                f"{name}: {_short(found.request.get(name))}, now {_short(self.request[name])}" for name in differ
            )
            raise SpecError(f"{str(self.out)!r} holds another harvest ({said}): choose another folder", "out")
        self.reader.thresholds = dict(found.thresholds)
        return found

    def _notes(self) -> tuple[str, ...]:
        high = {site: values for site, values in self.seen["sites"].items() if values["share_above_10_medians"] > 0}
        if not high or self.reader.filter.max_norm is not None:
            return ()
        site, values = max(high.items(), key=lambda item: item[1]["largest_norm"] / (item[1]["median_norm"] or 1.0))
        return (
            f"{values['share_above_10_medians']:.2%} of the first tokens at {site!r} are more than 10 times as long as "
            f"the median (up to {values['largest_norm'] / (values['median_norm'] or 1.0):.0f} times); max_norm=10 "
            "leaves such tokens out",
        )

    def _plan(self) -> HarvestPlan:
        widths, seen = self.reader.widths, self.seen
        kept = max(seen["kept"], 1) / max(seen["tokens"], 1)
        rate = seen["kept"] / max(seen["seconds"], 1e-9)
        per_token = sum(widths.values()) * self._dtype.itemsize + _BESIDE
        left = None if self.tokens is None else max(0, self.tokens - self.found.tokens)
        if self.found.complete:
            left = 0
        mean_length = seen["tokens"] / self.together
        return HarvestPlan(
            sites=dict(widths),
            tokens=self.tokens,
            forwards=None if left is None else int(np.ceil(left / max(1.0, mean_length * kept))),
            share=self.reader.share,
            bytes=None if left is None else left * per_token,
            free=_free(self.out),
            shard_rows=self.shard_rows,
            seconds=None if left is None else left / rate,
            tokens_per_second=rate,
            seen=seen["sites"],
            done=self.found.tokens,
            notes=self._notes(),
        )

    def _check_room(self) -> None:
        needed = self.plan.bytes
        if needed is not None and needed > self.plan.free:
            raise OutputError(
                f"no room for this harvest: it takes {needed:,} bytes and the disk of {str(self.out)!r} has "
                f"{self.plan.free:,}: ask for fewer tokens or sites, dtype='bfloat16', or another folder"
            )

    def _sweep(self) -> None:
        """Remove temporary files that killed processes left: nobody else writes here."""
        for leftover in self.out.glob(".tmp-*"):
            leftover.unlink(missing_ok=True)

    def _write(self, progress: Progress | None) -> None:
        found = self.found
        cursor = Cursor(**found.shards[-1].after) if found.shards else None
        rows = share_of(self.given, cursor, self.rank, self.world)
        while (self.tokens is None or found.tokens < self.tokens) and (mine := list(islice(rows, 1))):
            most = self.shard_rows * self.given.context
            room = most if self.tokens is None else min(most, self.tokens - found.tokens)
            part = Part(self.reader, self._dtype, room, self.together)
            some = Taken(chain(mine, islice(rows, self.shard_rows - 1)))
            for size in part.fill(some):
                if progress is not None:
                    progress(found.tokens + size, self.tokens or 0, "tokens")
            if part.size:
                name = f"shard-{len(found.shards):05d}.safetensors"
                shard = part.write(self.out / name, some)
                found = replace(found, shards=(*found.shards, shard))
                found.write(self.out)
        self._finish(found)

    def _finish(self, found: Manifest) -> None:
        if not found.tokens:
            raise SpecError(
                "nothing was stored: every token was left out by the filter, or the corpus has no row for this process",
                "corpus",
            )
        notes = found.notes
        if self.tokens is not None and found.tokens < self.tokens:
            said = f"the corpus gave {found.tokens:,} tokens where {self.tokens:,} were asked for"
            notes = (*notes, said)
            warnings.warn(said, stacklevel=4)
        self.found = replace(found, complete=True, notes=notes)
        self.found.write(self.out)


def harvest(
    subject: Model,
    corpus: Corpus,
    sites: str | Sequence[str],
    *,
    out: str | Path,
    tokens: int | None = None,
    dtype: str = "bfloat16",
    context: int = 128,
    layout: str = "pack",
    bos: str = "auto",
    separator: str | int = "auto",
    min_length: int = 2,
    max_norm: float | None = None,
    skip_bos: bool = False,
    skip_first: int = 0,
    rows: int = 16,
    shard_bytes: int = SHARD_BYTES,
    rank: int | None = None,
    world: int | None = None,
    progress: Progress | None = None,
) -> Store:
    """Stream a corpus through a subject and store the activations of some sites.

    One forward serves all sites, and ends at the last of them. The same call again goes on where it was interrupted,
    or gives what is there. Padding is never stored.

    Args:
        subject: The subject.
        corpus: What `open_corpus` or `Texts` gave.
        sites: Site names and patterns; any site with a row for each token. Heads are laid side by side.
        out: The folder to write.
        tokens: How many tokens to store, over all processes; the whole corpus when None. A corpus with fewer gives what
            it has, with a warning.
        dtype: "bfloat16" or "float32".
        context: The largest number of tokens in a row; see `TokenRows`, as for the next four.
        layout: "pack", "split" or "document".
        bos: "auto", "row", "document" or "none".
        separator: "auto", "eos", "none" or a token id.
        min_length: Shorter rows are left out.
        max_norm: Leave out tokens whose norm at any of the sites is more than this many times the site's median in the
            first `rows` rows; 10 is usual. The thresholds are in the manifest.
        skip_bos: Leave out BOS tokens.
        skip_first: Leave out this many tokens at the beginning of each row.
        rows: How many rows are run together.
        shard_bytes: About how large a file gets; as much memory is held.
        rank: Of `world` processes, the one that this is: it takes the rows whose number is `rank` modulo `world`, and
            writes `out/rank-R-of-N`. From the environment (`RANK`, as torchrun sets it) when None.
        world: How many processes there are; from `WORLD_SIZE` when None.
        progress: Told of tokens done and in all.

    Returns:
        The store; with several processes, this one's part (`Store.open(out)` opens all of them once they are done).

    Raises:
        UnknownSite: A name is no site of this subject.
        SpecError: An option is not as said, the corpus is empty, or the folder holds another harvest.
        OutputError: The disk is too small, or another harvest is writing to the folder.
        DamagedFile: A shard from before is damaged; the message names it.
        NumericalError: An activation is not finite.

    Example:
        >>> from assay.activations.corpora import Texts
        >>> corpus = Texts(["When Mary and John went to the store, John gave a drink to Mary."] * 4)
        >>> store = harvest(subject, corpus, ["blocks.1.resid_post", "blocks.*.attn.z"], out="activations", context=16)
        >>> store.widths["blocks.1.attn.z"], len(store.sites), store.batch(0, batch_size=8)["blocks.0.attn.z"].shape
        (32, 7, torch.Size([8, 32]))
    """
    made = Harvest(
        subject, corpus, sites, out=out, tokens=tokens, dtype=dtype, context=context, layout=layout, bos=bos,
        separator=separator, min_length=min_length, max_norm=max_norm, skip_bos=skip_bos, skip_first=skip_first,
        rows=rows, shard_bytes=shard_bytes, rank=rank, world=world,
    )  # fmt: skip
    return made.run(progress)


def _processes(rank: int | None, world: int | None) -> tuple[int, int]:
    """Which process this is, of how many."""
    try:
        found = int(os.environ.get("RANK", "0")) if rank is None else rank
        count = int(os.environ.get("WORLD_SIZE", "1")) if world is None else world
    except ValueError:
        raise SpecError(
            f"RANK={os.environ.get('RANK')!r}, WORLD_SIZE={os.environ.get('WORLD_SIZE')!r}: whole numbers are needed"
        ) from None
    if not 0 <= found < count:
        raise SpecError(f"rank {found} of {count} processes: from 0 to {count - 1}", "rank")
    return found, count


def _free(folder: Path) -> int:
    while not folder.exists() and folder != folder.parent:
        folder = folder.parent
    return shutil.disk_usage(folder).free


def _short(value: Any) -> str:
    text = str(value.get("hash", value)) if isinstance(value, Mapping) else str(value)
    return text if len(text) <= 60 else f"{text[:57]}..."


def _versions() -> dict[str, str]:
    found = {"python": platform.python_version(), "assay": __version__}
    for package in ("torch", "transformers", "tokenizers", "numpy"):
        try:
            found[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            continue
    return found
