"""Forwards that end at the last site that is read, and give its tokens as rows: `[tokens, width]`, padding left out."""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import islice
from typing import Any

import numpy as np
import torch
from jaxtyping import Int
from torch import Tensor

from assay.activations.apply import Window
from assay.activations.context import Request, RunState
from assay.activations.forward import call, forward, plan_requests
from assay.activations.hooks import running
from assay.activations.rows import Cursor, Row, TokenRows
from assay.activations.serving import watch
from assay.base.errors import NumericalError, SpecError
from assay.subjects.model import Model
from assay.subjects.tokens import Batch, from_ids
from assay.subjects.upkeep import compiled


class _Reached(Exception):
    """Every site has been read; the rest of the forward is of no use."""


@dataclass(slots=True)
class _Reading(RunState):
    """A run that ends when it has kept all that was asked for."""

    def keep(self, request: Request, value: Tensor, raw: Tensor) -> None:
        """Keep a captured value; stop at the last."""
        RunState.keep(self, request, value, raw)
        if len(self.captured) == sum(len(each.captures) for each in self.requests.values()):
            raise _Reached


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Block:
    """The tokens of some rows of a corpus, and their activations.

    Args:
        values: For each site `[tokens, width]`, in the model's own type, where the model is.
        rows: The rows they are of.
        row: Which of these rows each token is in, from 0.
        pos: Its position there.
        dropped: How many tokens were left out, by reason.
    """

    values: Mapping[str, Tensor]
    rows: Sequence[Row]
    row: Int[np.ndarray, " tokens"]
    pos: Int[np.ndarray, " tokens"]
    dropped: Mapping[str, int]

    def __len__(self) -> int:
        """How many tokens it has."""
        return len(self.row)

    def tokens(self) -> dict[str, Int[np.ndarray, " tokens"]]:
        """Token id, document, row of the corpus, and position of each token."""
        starts = np.cumsum([0, *(len(row.ids) for row in self.rows)])
        at = starts[self.row] + self.pos
        return {
            "token": np.concatenate([row.ids for row in self.rows])[at].astype(np.int64),
            "document": np.concatenate([row.documents for row in self.rows])[at],
            "row": np.array([row.index for row in self.rows], np.int64)[self.row],
            "pos": self.pos.astype(np.int64),
        }

    def head(self, count: int) -> Block:
        """Its first tokens."""
        values = {site: value[:count] for site, value in self.values.items()}
        return Block(values=values, rows=self.rows, row=self.row[:count], pos=self.pos[:count], dropped=self.dropped)


@dataclass(frozen=True, slots=True, kw_only=True)
class Filter:
    """Which tokens are left out.

    Args:
        max_norm: A token whose norm at any site is more than this many times the site's median is left out: the sinks
            on which models park attention, which are a hundred times longer than all else and would rule a fit.
        skip_bos: Leave out BOS tokens.
        skip_first: Leave out this many tokens at the beginning of each row.

    Raises:
        SpecError: A number is not as said.
    """

    max_norm: float | None = None
    skip_bos: bool = False
    skip_first: int = 0

    def __post_init__(self) -> None:
        """Check the numbers."""
        if self.max_norm is not None and not self.max_norm > 1:
            raise SpecError(f"max_norm={self.max_norm!r}: more than 1 (times the median); 10 is usual", "max_norm")
        if self.skip_first < 0:
            raise SpecError(f"skip_first={self.skip_first}: at least 0", "skip_first")


class Pass:
    """Runs rows of tokens through a subject and reads its sites.

    Args:
        model: The subject.
        sites: Site names and patterns; heads are laid side by side (`attn.z` has the width of all heads together).
        filter: Which tokens are left out.
        stop: End the forward at the last site.

    Raises:
        UnknownSite: A name is no site of this model.
        SpecError: No site was named.
    """

    def __init__(self, model: Model, sites: str | Sequence[str], filter: Filter | None = None, *, stop: bool = True):
        self.model, self.filter = model, filter or Filter()
        self.sites: tuple[str, ...] = tuple(str(site) for site in model.expand(sites))
        if not self.sites:
            raise SpecError("no site was named; 'blocks.*.resid_post' would be all blocks", "sites")
        offloaded = any(hasattr(module, "_hf_hook") for module in model.module.modules())
        # Left halfway, offloaded weights would stay where they were put, and a compiled graph has no halfway.
        self.stop = stop and not offloaded and compiled(model.module) is None
        self.thresholds: dict[str, float] = {}
        self.widths: dict[str, int] = {}
        sides = model.sides if model.architecture is not None else ()
        self._side = "right" if "right" in sides else next(iter(sides), "")

    @property
    def share(self) -> float:
        """The share of the blocks that a forward computes."""
        if not self.stop or self.model.architecture is None:
            return 1.0
        blocks = [self.model.site(name).block for name in self.sites]
        late = any(self.model.site(name).point in ("logits", "final_norm") for name in self.sites)
        known = [block for block in blocks if block is not None]
        if late or len(self.model.stacks) > 1 or any(":" in name for name in self.sites):
            return 1.0
        return (max(known) + 1) / self.model.n_blocks if known else 0.0

    def probe(self, row: Row) -> None:
        """Run one row whole, and learn the widths of the sites: what does not work is known before anything is kept.

        Raises:
            SpecError: A site has no row for each token (scores, pooled outputs).
            SiteNotFired: A module is not called in a forward.
        """
        batch = self._batch([row])
        run = forward(self.model, batch, capture=list(self.sites))
        for site in self.sites:
            self.widths[site] = self._flat(site, run.captured.tensors[site], batch).shape[-1]

    def blocks(self, rows: Iterator[Row], size: int) -> Iterator[Block]:
        """Run rows, `size` together.

        Raises:
            NumericalError: An activation is not finite.
        """
        while some := list(islice(rows, size)):
            yield self.read(some)

    def read(self, rows: Sequence[Row], *, filtered: bool = True) -> Block:
        """Run some rows, and read the tokens that are not left out.

        Args:
            rows: The rows.
            filtered: Leave tokens out by their norm.

        Raises:
            NumericalError: An activation is not finite.
        """
        lengths = [len(row.ids) for row in rows]
        together = len(set(lengths)) == 1 or bool(self._side)
        groups = [list(range(len(rows)))] if together else [[i] for i in range(len(rows))]
        parts = [self._run([rows[i] for i in group]) for group in groups]
        values = {site: torch.cat([part[site] for part in parts]) if len(parts) > 1 else parts[0][site]
                  for site in self.sites}  # fmt: skip
        row = np.repeat(np.arange(len(rows)), lengths)
        pos = np.concatenate([np.arange(length) for length in lengths])
        norms = {site: value.float().norm(dim=-1) for site, value in values.items()}
        for site, norm in norms.items():
            if not bool(torch.isfinite(norm).all()):
                bad = int(torch.nonzero(~torch.isfinite(norm))[0])
                raise NumericalError(
                    f"activations at {site!r} are not finite, first at row {rows[row[bad]].index}, position {pos[bad]}"
                )
        keep, dropped = self._kept(rows, row, pos, norms if filtered else {})
        if not keep.all():
            index = torch.from_numpy(np.flatnonzero(keep))
            values = {site: value[index.to(value.device)] for site, value in values.items()}
        return Block(values=values, rows=rows, row=row[keep], pos=pos[keep], dropped=dropped)

    def calibrate(self, rows: Sequence[Row]) -> dict[str, Any]:
        """Set the thresholds of the norm filter from some rows, and say what they show.

        Returns:
            For each site the median and the largest norm, the share of tokens above ten times the median, and what a
            batch costs.
        """
        start = time.perf_counter()
        block = self.read(rows, filtered=False)
        seconds = time.perf_counter() - start
        norms = {site: value.float().norm(dim=-1).double().cpu().numpy() for site, value in block.values.items()}
        medians = {site: float(np.median(norm)) if len(norm) else 0.0 for site, norm in norms.items()}
        if self.filter.max_norm is not None:
            self.thresholds = {site: self.filter.max_norm * median for site, median in medians.items()}
        shown = {
            site: {
                "median_norm": medians[site],
                "largest_norm": float(norm.max(initial=0.0)),
                "share_above_10_medians": float((norm > 10 * medians[site]).mean()) if len(norm) else 0.0,
            }
            for site, norm in norms.items()
        }
        passed = [norm <= self.thresholds.get(site, np.inf) for site, norm in norms.items()]
        kept = int(np.logical_and.reduce(passed).sum()) if len(block) else 0
        given = sum(len(row.ids) for row in rows)
        return {"sites": shown, "tokens": given, "kept": kept, "seconds": seconds}

    def _kept(
        self, rows: Sequence[Row], row: np.ndarray, pos: np.ndarray, norms: Mapping[str, Tensor]
    ) -> tuple[np.ndarray, dict[str, int]]:
        """Which tokens stay, and how many go for which reason (the first that holds)."""
        keep, dropped = np.ones(len(row), bool), {}

        def drop(why: str, bad: np.ndarray) -> None:
            nonlocal keep
            dropped[why] = int((keep & bad).sum())
            keep = keep & ~bad

        if self.filter.skip_bos:
            bos = getattr(self.model.tokenizer, "bos_token_id", None)
            drop("bos", np.concatenate([each.ids for each in rows]) == (-1 if bos is None else bos))
        if self.filter.skip_first:
            drop("first", pos < self.filter.skip_first)
        if self.thresholds and norms:
            high = torch.zeros(len(row), dtype=torch.bool)
            for site, norm in norms.items():
                high |= (norm.double() > self.thresholds[site]).cpu()
            drop("norm", high.numpy())
        return keep, dropped

    def _run(self, rows: Sequence[Row]) -> dict[str, Tensor]:
        batch = self._batch(rows)
        captured = self._forward(batch)
        mask = batch.mask.bool() if batch.padded else None
        out = {}
        for site in self.sites:
            flat = self._flat(site, captured[site], batch)
            out[site] = flat.flatten(0, 1) if mask is None else flat[mask.to(flat.device)]
        return out

    def _forward(self, batch: Batch) -> Mapping[str, Tensor]:
        """One forward, ended at the last site."""
        if not self.stop:
            return forward(self.model, batch, capture=list(self.sites)).captured.tensors
        self.model.require_eval()
        state = _Reading(plan_requests(self.model, list(self.sites), ()), Window(batch))
        with torch.no_grad(), running(state):
            handles = watch(state, self.model)
            try:
                call(self.model, batch)
            except _Reached:
                pass
            finally:
                for handle in handles:
                    handle.remove()
        state.check_fired()
        if state.overwritten() - self.model.overwritten:  # the module wrote over what it had shown: have it copied
            return forward(self.model, batch, capture=list(self.sites)).captured.tensors
        return state.captured

    def _batch(self, rows: Sequence[Row]) -> Batch:
        width = max(len(row.ids) for row in rows)
        ids = torch.zeros(len(rows), width, dtype=torch.long)
        mask = torch.zeros(len(rows), width, dtype=torch.long)
        for i, row in enumerate(rows):
            at = width - len(row.ids) if self._side == "left" else 0
            ids[i, at : at + len(row.ids)] = torch.from_numpy(row.ids.astype(np.int64))
            mask[i, at : at + len(row.ids)] = 1
        batch = self.model.tokens(ids.to(self.model.device), mask=None if bool(mask.all()) else mask)
        return batch if batch.inputs is None or not batch.stacks else from_stacks(batch)

    def _flat(self, site: str, value: Tensor, batch: Batch) -> Tensor:
        """What was read at a site as `[batch, pos, width]`."""
        dims: tuple[str, ...] = getattr(value, "dims", ())
        size = (batch.size, batch.width)
        stack = self.model.site(site).stack
        if value.ndim == 2 and value.shape[0] == batch.size * batch.width:  # a module called with rows and positions
            value = value.view(*size, -1)  # in one dimension
        if value.ndim < 3 or tuple(value.shape[:2]) != size or "key" in dims or not value.is_floating_point():
            shape = ", ".join(f"{n} {d}" for n, d in zip(value.shape, dims or ("",) * value.ndim, strict=False))
            why = f" (it is of the {stack}, which has other positions)" if stack and "key" not in dims else ""
            raise SpecError(
                f"{site!r} has no row for each token: it is [{shape}] where [{size[0]} batch, {size[1]} pos, features] "
                f"is needed{why}",
                "sites",
            )
        return value.flatten(2)


def from_stacks(batch: Batch) -> Batch:
    """A batch of an encoder-decoder with the rows and positions of the stack that was given tokens.

    The decoder is given its start token alone, so that its batch has one position; activations are read of the encoder.
    """
    first = next(iter(batch.stacks.values()))
    if first.ids.shape == batch.ids.shape:
        return batch
    own = from_ids(first.ids, first.mask if first.padded else None)
    return Batch(ids=own.ids, starts=own.starts, lengths=own.lengths, inputs=batch.inputs, stacks=batch.stacks)


def share_of(rows: TokenRows, at: Cursor | None, rank: int, world: int) -> Iterator[Row]:
    """The rows of one process of several: those whose number is `rank` modulo `world`."""
    return (row for row in rows.rows(at) if row.index % world == rank)
