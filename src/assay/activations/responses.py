"""What an edit must change, and what it must leave alone: proofs that need no formula of the model.

Queries and keys leave no sum to check after a rotation, a norm or a bias. But a query changes the scores of its own row
and nothing else, and a key those of its own column, whatever the model does between. Every trial is a row of one
forward; the first row is left as it is.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from assay.activations.edits import Add, Edit, Scale, Set
from assay.activations.forward import forward
from assay.activations.identities import Check, Identities, Row, failed
from assay.activations.values import Run
from assay.subjects.model import Model
from assay.subjects.tokens import Batch


@dataclass(frozen=True, slots=True)
class Trial:
    """Edits, one a row, and what they show.

    Args:
        edits: What is done, each to be given its row.
        verdict: From the run and the rows of the edits to the identities that these prove.
    """

    edits: tuple[Edit, ...]
    verdict: Callable[[Run, Sequence[int]], Iterator[Check]]


@dataclass(slots=True)
class Responses:
    """The trials of the last block of a stack.

    Args:
        model: The model.
        known: The stack's identities, on a run without edits.
        batch: What to run, one row.
    """

    model: Model
    known: Identities
    batch: Batch

    @property
    def block(self) -> int:
        """The block that is tried: the last, whose edits reach nothing but what is looked at."""
        return len(self.known.parts.blocks) - 1

    def at(self, point: str) -> str:
        """The name of a point of the block."""
        return f"{self.known.at(self.block)}.{point}"

    def checks(self) -> Iterator[Check]:
        """Run every trial at once and judge it."""
        trials = list(self.trials())
        edits: list[Any] = [edit for trial in trials for edit in trial.edits]
        placed = [replace(edit, rows=row) for row, edit in enumerate(edits, 1)]
        parts = self.known.parts
        ends = (".out", ".scores", ".post")
        seen = [name for name in parts.points(self.block) if "." not in name or name.endswith(ends)]
        run = forward(
            self.model, self.batch.repeat(1 + len(edits)), capture=[self.at(name) for name in seen], edits=placed
        )
        first = 1
        for trial in trials:
            yield from trial.verdict(run, range(first, first + len(trial.edits)))
            first += len(trial.edits)

    def trials(self) -> Iterator[Trial]:
        """What this block can be tried on."""
        parts = self.known.parts
        yield self.stream()
        for kind in ("attn", "cross_attn"):
            if parts.has(f"{kind}.scores", self.block):
                yield self.query(kind)
                yield self.key(kind)
        if parts.has("mlp.weights", self.block):
            yield self.experts()
        if parts.stack.ssm is not None:
            yield self.state_space()

    # The stream

    def stream(self) -> Trial:
        """What is added to the stream inside the block leaves it, whole: not only what reads it sees it."""
        known, i = self.known, self.block
        point = "resid_mid" if known.parts.has("resid_mid", i) else "resid_pre"
        site, before = self.at(point), known.get(i, point)
        shift = before.float().std() * torch.ones(known.parts.d_model, device=before.device)

        def verdict(run: Run, rows: Sequence[int]) -> Iterator[Check]:
            edited = Row(run, rows[0])
            expected = run[site][:1] + shift.to(before.dtype)
            yield known.check(f"adding to {site} changes it by what was added", edited[site], expected)
            for check in self.after(point, edited):
                yield replace(check, identity=f"{check.identity} ({site} edited)")

        return Trial((Add(site, shift),), verdict)

    def after(self, point: str, edited: Row) -> Iterator[Check]:
        """The identities of the block that lie after an edit in it."""
        known, i = self.known, self.block
        if point == "resid_pre":
            yield list(known.adds_up(i, edited))[-1]
            return
        stream = edited[self.at(point)]
        for layer, norm in (("cross_attn", "norm_cross"), ("mlp", "norm2")):
            if known.parts.has(f"{layer}.out", i):
                stream = stream + edited[self.at(f"{layer}.out")]
                stream = known.normed(i, norm, stream) if known.parts.post_norm else stream
        yield known.check(f"{known.at(i)}: what was added leaves", stream, edited[self.at("resid_post")])

    # Attention

    def query(self, kind: str) -> Trial:
        """A query's own row of scores changes, and no other."""
        heads, position = self.known.parts.n_heads, self.known.get(self.block, f"{kind}.q").shape[1] // 2
        site = self.at(f"{kind}.q")

        def verdict(run: Run, rows: Sequence[int]) -> Iterator[Check]:
            what = f"{site} at one position and head changes the scores of that query and head alone"
            mine = torch.zeros_like(run[self.at(f"{kind}.scores")][0], dtype=torch.bool)
            mine[slice(None) if self.normed_together(kind) else heads - 1, position] = True
            yield self.only(what, run[self.at(f"{kind}.scores")], rows[0], mine)

        return Trial((Scale(site, -1.0, positions=position, heads=heads - 1),), verdict)

    def key(self, kind: str) -> Trial:
        """A key's own column of scores changes, and no other; in a cross-attention it is one of the other stack."""
        parts, point = self.known.parts, f"{kind}.k"
        heads, n_keys = parts.heads(point), self.known.get(self.block, point).shape[1]
        position = n_keys // 2 if kind == "attn" else n_keys - 1
        site = self.at(point)

        def verdict(run: Run, rows: Sequence[int]) -> Iterator[Check]:
            what = f"{site} at one position and head changes the scores of that key and head alone"
            mine = torch.zeros_like(run[self.at(f"{kind}.scores")][0], dtype=torch.bool)
            group = slice(None) if self.normed_together(kind) else slice((heads - 1) * (parts.n_heads // heads), None)
            mine[group, :, position] = True
            yield self.only(what, run[self.at(f"{kind}.scores")], rows[0], mine)

        return Trial((Scale(site, -1.0, positions=position, heads=heads - 1),), verdict)

    def normed_together(self, kind: str) -> bool:
        """Whether a norm goes over all heads at once (OLMo 2), so that one changes the others."""
        parts = self.known.parts
        layer = parts.stack.attn if kind == "attn" else parts.stack.cross
        assert layer is not None
        width = self.known.get(self.block, f"{kind}.k").shape[-1]
        weights = (weight for weight in parts.of(self.block, layer.path).parameters() if weight.ndim == 1)
        names = (name for name, _ in parts.of(self.block, layer.path).named_children() if "norm" in name)
        return any(names) and any(weight.numel() > width for weight in weights)

    def only(self, what: str, scores: Tensor, row: int, mine: Tensor) -> Check:
        """A check that scores of a row changed where they should, and there alone."""
        if scores.shape[1:] != mine.shape:
            return failed(what, f"the scores are shaped {tuple(scores.shape[1:])}")
        same = scores[row] == scores[0]  # closed ones are infinite in both
        change = torch.where(same, 0.0, scores[row].float() - scores[0].float()).abs()
        inside, outside = float(change[mine].max()), float(change[~mine].max() if bool((~mine).any()) else 0.0)
        open_to = scores[0] > -2e3  # a mask is far below, in half precision too
        size = float(scores[0][open_to].float().abs().max()) if bool(open_to.any()) else 0.0
        floor = 0.02 * self.known.loose * size
        error = outside / inside if inside > floor else float("inf")
        return Check(identity=what, error=error if error == error else float("inf"), tolerance=self.known.loose)

    # Experts and state spaces

    def experts(self) -> Trial:
        """What the experts write is their weights' sum: twice the weights add as much again as none take away."""
        site, mlp = self.at("mlp.weights"), self.known.parts.stack.mlp
        assert mlp is not None
        linear = self.known.parts.find(self.known.parts.blocks[self.block], mlp.post) is None

        def verdict(run: Run, rows: Sequence[int]) -> Iterator[Check]:
            out = run[self.at("mlp.out")]
            more, less = out[rows[0]] - out[0], out[0] - out[rows[1]]
            if not bool(less.any()):
                yield failed(f"{site} changes mlp.out", "nothing changed")
            elif linear:
                yield self.known.check(f"mlp.out follows {site}", more, less)

        return Trial((Scale(site, 2.0), Scale(site, 0.0)), verdict)

    def state_space(self) -> Trial:
        """A closed gate lets nothing out; `C` reads the state where it is, `B` writes what is read later."""
        ssm, parts = self.known.parts.stack.ssm, self.known.parts
        assert ssm is not None
        reach = 1 if ssm.kind == "mamba" else int(getattr(parts.config, "conv_kernel", 4))
        edits: list[Edit] = [Set(self.at("ssm.gate"), 0.0)]
        edits += [Scale(self.at(f"ssm.{name}"), -1.0, positions=0) for name in "CB"]

        def verdict(run: Run, rows: Sequence[int]) -> Iterator[Check]:
            post = run[self.at("ssm.post")]
            shut = post[rows[0]]
            what = f"{self.at('ssm.post')} is nothing where ssm.gate is closed"
            yield self.known.check(what, 1 + shut, torch.ones_like(shut))
            read, wrote = ((post[row] - post[0]).abs().amax(-1) for row in rows[1:])
            what = f"{self.at('ssm.C')} changes what is read there, and ssm.B what is read later"
            if len(read) > reach:
                error = float(read[reach:].max() / read[:reach].max())
                error = error if bool(wrote[reach:].any()) and error == error else float("inf")
                yield Check(identity=what, error=error, tolerance=self.known.loose)

        return Trial(tuple(edits), verdict)
