"""A live stream of activations, mixed in a preallocated reservoir.

Each step reads `batch` slots drawn without replacement and writes fresh tokens over them. Nothing is concatenated,
permuted or moved, so a step costs the same at any size; a token stays for `size / batch` steps on average, with a
geometric spread, so neighbours in the text leave far apart. Slots are the image of 0..batch-1 under a permutation keyed
by (seed, step): what is drawn depends on nothing else.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from assay.activations.corpora import Corpus
from assay.activations.order import Permutation
from assay.activations.passes import Block, Filter, Pass, share_of
from assay.activations.rows import Cursor, TokenRows
from assay.base.errors import SpecError
from assay.base.hashing import digest, plain
from assay.subjects.model import Model


class Reservoir:
    """Slots for activations at one or many sites, read and overwritten in place.

    Args:
        size: How many slots there are.
        widths: The width of each site.
        seed: The seed of the draws.
        dtype: What the slots hold; batches are float32 either way.
        device: Where the slots are, and the batches.

    Raises:
        SpecError: `size` is not positive.

    Example:
        >>> reservoir = Reservoir(4, {"x": 1}, seed=0)
        >>> reservoir.put(0, {"x": torch.arange(4.0)[:, None]})
        >>> left = [reservoir.swap(step, {"x": torch.full((2, 1), 10.0 + step)})["x"] for step in range(3)]
        >>> sorted(torch.cat([*left, reservoir.slots["x"]]).flatten().tolist())
        [0.0, 1.0, 2.0, 3.0, 10.0, 10.0, 11.0, 11.0, 12.0, 12.0]
    """

    def __init__(
        self,
        size: int,
        widths: Mapping[str, int],
        *,
        seed: int = 0,
        dtype: torch.dtype = torch.float32,
        device: str | torch.device = "cpu",
    ) -> None:
        if size < 1:
            raise SpecError(f"size={size}: a reservoir has at least one slot", "size")
        self.size, self.seed = size, seed
        self.device = torch.device(device)
        self.slots: dict[str, Tensor] = {
            site: torch.empty(size, width, dtype=dtype, device=self.device) for site, width in widths.items()
        }

    def put(self, start: int, values: Mapping[str, Tensor]) -> None:
        """Fill slots from `start` on, before the first step."""
        for site, slots in self.slots.items():
            slots[start : start + len(values[site])].copy_(values[site])

    def drawn(self, step: int, count: int) -> Tensor:
        """The slots of a step, all different, `[count]`.

        Raises:
            SpecError: There are fewer slots.
        """
        if count > self.size:
            raise SpecError(f"a batch of {count} from a reservoir of {self.size}: make it larger", "size")
        return torch.from_numpy(Permutation(self.size, self.seed, "reservoir", step)(np.arange(count)))

    def swap(self, step: int, fresh: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Read the slots of a step, float32, and write fresh rows over them, as many."""
        index = self.drawn(step, len(next(iter(fresh.values())))).to(self.device)
        out = {}
        for site, slots in self.slots.items():
            out[site] = slots.index_select(0, index).float()
            slots.index_copy_(0, index, fresh[site].to(slots))
        return out


class Live:
    """Batches of activations from a subject while it reads a corpus: a `Source` without files.

    Filled at the first batch. At the end of the corpus it begins again.

    Args:
        subject: The subject.
        corpus: What `open_corpus` or `Texts` gave.
        sites: Site names and patterns.
        batch_size: How many rows a batch has.
        seed: The seed of the draws.
        size: How many tokens the reservoir holds; at least `batch_size`, and 32 times that mixes well.
        dtype: What it holds them in.
        device: Where it holds them, and where batches are: "cpu", "cuda", ...
        context: See `TokenRows`, as for the next four.
        layout: "pack", "split" or "document".
        bos: "auto", "row", "document" or "none".
        separator: "auto", "eos", "none" or a token id.
        min_length: Shorter rows are left out.
        max_norm: See `harvest`, as for the next two.
        skip_bos: Leave out BOS tokens.
        skip_first: Leave out this many tokens at the beginning of each row.
        rows: How many rows are run together.
        rank: Of `world` processes that train together, the one that this is: it reads rows `rank` modulo `world`.
        world: How many there are.

    Raises:
        UnknownSite: A name is no site of this subject.
        SpecError: An option is not as said, or the corpus is empty.

    Example:
        >>> from assay.activations.corpora import Texts
        >>> corpus = Texts(["When Mary and John went to the store"] * 8)
        >>> live = Live(subject, corpus, "blocks.1.resid_post", batch_size=4, size=16, context=8)
        >>> live.batch(0)["blocks.1.resid_post"].shape
        torch.Size([4, 32])
    """

    def __init__(
        self,
        subject: Model,
        corpus: Corpus,
        sites: str | Sequence[str],
        *,
        batch_size: int,
        seed: int = 0,
        size: int = 1 << 16,
        dtype: str = "float32",
        device: str | torch.device = "cpu",
        context: int = 128,
        layout: str = "pack",
        bos: str = "auto",
        separator: str | int = "auto",
        min_length: int = 2,
        max_norm: float | None = None,
        skip_bos: bool = False,
        skip_first: int = 0,
        rows: int = 16,
        rank: int = 0,
        world: int = 1,
    ) -> None:
        if dtype not in ("bfloat16", "float32"):
            raise SpecError(f"dtype={dtype!r}: 'bfloat16' or 'float32'", "dtype")
        if not 1 <= batch_size <= size or rows < 1 or not 0 <= rank < world:
            raise SpecError(
                f"batch_size={batch_size}, size={size}, rows={rows}, rank={rank} of {world}: a batch has from 1 row to "
                "as many as the reservoir, and rank is below world",
                "batch_size",
            )
        self._given = TokenRows(
            corpus, subject.tokenizer, context=context, layout=layout, bos=bos, separator=separator,
            min_length=min_length,
        )  # fmt: skip
        self._reader = Pass(subject, sites, Filter(max_norm=max_norm, skip_bos=skip_bos, skip_first=skip_first))
        first = [row for _, row in zip(range(rows), self._given.rows(), strict=False)]
        if not first:
            raise SpecError(f"the corpus has no row of at least {min_length} tokens", "corpus")
        self._reader.probe(first[0])
        self._reader.calibrate(first)
        self._subject, self._together, self._batch_size = subject, rows, batch_size
        self._rank, self._world = rank, world
        kind = torch.bfloat16 if dtype == "bfloat16" else torch.float32
        self.reservoir = Reservoir(size, self._reader.widths, seed=seed, dtype=kind, device=device)
        self.step = 0
        self._what = self._described()
        self._begin(Cursor(), epoch=0, pending=None)
        self._filled = False
        self._last: dict[str, Tensor] | None = None

    @property
    def sites(self) -> tuple[str, ...]:
        """The sites, in order."""
        return self._reader.sites

    @property
    def widths(self) -> Mapping[str, int]:
        """The width of each site."""
        return dict(self._reader.widths)

    @property
    def batch_size(self) -> int:
        """How many rows a batch has."""
        return self._batch_size

    @property
    def epoch(self) -> int:
        """How often the corpus has been read to its end."""
        return self._epoch

    def batch(self, step: int) -> dict[str, Tensor]:
        """The next batch, or the last one again: for each site `[batch, d]` in float32, a tensor of the caller's own.

        Raises:
            SpecError: `step` is neither: a stream goes forward only, and `restore` takes it elsewhere.
            NumericalError: An activation is not finite.
        """
        if self._last is not None and step == self.step - 1:
            return {site: value.clone() for site, value in self._last.items()}
        if step != self.step:
            raise SpecError(f"a live stream is at step {self.step}, and step {step} was asked for: restore a state")
        if not self._filled:
            self._fill()
        out = self.reservoir.swap(step, self._take(self._batch_size))
        self.step += 1
        self._last = {site: value.clone() for site, value in out.items()}
        return out

    def state(self) -> dict[str, Any]:
        """All that a later process needs to give the batches that would have come: a copy of slots and place."""
        if not self._filled:
            self._fill()
        tensors = {f"slots.{site}": value.clone() for site, value in self.reservoir.slots.items()}
        tensors |= {f"pending.{site}": value.clone() for site, value in self._pending.items()}
        place = {"step": self.step, "epoch": self._epoch, "cursor": self._cursor.to_dict()}
        return {"source": digest(self._what), **place, **tensors}

    def restore(self, state: Mapping[str, Any]) -> None:
        """Go on from a state, with the batches that would have come.

        Raises:
            SpecError: The state is of another source.
        """
        if state.get("source") != digest(self._what):
            raise SpecError(
                "the state is of another source: other model, corpus, sites, seed, sizes or filter", "state"
            )
        for site, slots in self.reservoir.slots.items():
            slots.copy_(state[f"slots.{site}"])
        self.step, self._filled, self._last = int(state["step"]), True, None
        pending = {site: state[f"pending.{site}"].to(self.reservoir.device, copy=True) for site in self.sites}
        self._begin(Cursor(**state["cursor"]), epoch=int(state["epoch"]), pending=pending)

    def describe(self) -> dict[str, Any]:
        """Where the activations come from, as JSON values."""
        return dict(self._what)

    def _described(self) -> dict[str, Any]:
        reader, reservoir = self._reader, self.reservoir
        kind = str(next(iter(reservoir.slots.values())).dtype).removeprefix("torch.")
        what = {
            "kind": "live",
            "model": self._subject.name,
            "fingerprint": self._subject.fingerprint,
            "rows": self._given.describe(),
            "sites": list(reader.sites),
            "filter": {"max_norm": reader.filter.max_norm, "skip_bos": reader.filter.skip_bos,
                       "skip_first": reader.filter.skip_first},
            "thresholds": dict(reader.thresholds),
            "batch_size": self._batch_size,
            "rows_together": self._together,
            "rank": self._rank,
            "world": self._world,
            "reservoir": {"size": reservoir.size, "seed": reservoir.seed, "dtype": kind},
        }  # fmt: skip
        return dict(plain(what))

    def _begin(self, cursor: Cursor, *, epoch: int, pending: dict[str, Tensor] | None) -> None:
        """Take up the corpus at a place."""
        self._cursor, self._epoch = cursor, epoch
        kind = {site: (0, width) for site, width in self._reader.widths.items()}
        self._pending = pending or {
            site: torch.empty(shape, device=self.reservoir.device) for site, shape in kind.items()
        }
        self._rows = share_of(self._given, cursor, self._rank, self._world)

    def _fill(self) -> None:
        at = 0
        while at < self.reservoir.size:
            values = self._take(min(self.reservoir.size - at, 4096))
            self.reservoir.put(at, values)
            at += len(next(iter(values.values())))
        self._filled = True

    def _take(self, count: int) -> dict[str, Tensor]:
        """The next tokens of the stream, `count` of them."""
        parts: dict[str, list[Tensor]] = {site: [] for site in self.sites}
        while count:
            if not self._left:
                self._more()
            take = min(count, self._left)
            for site, values in self._pending.items():
                parts[site].append(values[:take])
                self._pending[site] = values[take:]
            count -= take
        return {site: part[0] if len(part) == 1 else torch.cat(part) for site, part in parts.items()}

    @property
    def _left(self) -> int:
        return len(next(iter(self._pending.values())))

    def _more(self) -> None:
        """Run the next rows; at the end of the corpus, the first again."""
        given, before = 0, self._epoch
        while not given:
            block = self._next()
            if block is None:
                if self._epoch > before + 1:
                    raise SpecError(
                        "every token of the corpus is left out by the filter, or is another rank's", "corpus"
                    )
                self._begin(Cursor(), epoch=self._epoch + 1, pending=None)
                continue
            given = len(block)
            self._pending = {site: value.to(self.reservoir.device).float() for site, value in block.values.items()}

    def _next(self) -> Block | None:
        some = [row for _, row in zip(range(self._together), self._rows, strict=False)]
        if not some:
            return None
        self._cursor = some[-1].after
        return self._reader.read(some)
