"""The `behaviour` study: what is measured, held against what, and said how."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import cached_property
from typing import Any

import numpy as np

from assay.base.errors import NumericalError, SpecError, UnsupportedArchitecture
from assay.base.findings import Findings
from assay.base.method import Context, Progress, StepSpec
from assay.base.snippets import snippet
from assay.directions.methods.behaviour import BehaviourSpec
from assay.directions.methods.behaviour_prompts import Prompts
from assay.directions.methods.behaviour_report import DRAWN, Report
from assay.directions.methods.common import RATE, mean_tokens

WEIGHTS = 19


def planned(card: Any, spec: BehaviourSpec, seed: int) -> list[StepSpec]:
    """List the steps of a study from its model's card, without loading weights."""
    prompts = Prompts.read(spec)
    return _steps(prompts, spec, seed, card.n_layers, mean_tokens(card, prompts.texts), card.parameters)


def _steps(
    prompts: Prompts, spec: BehaviourSpec, seed: int, blocks: int, length: int = 1, parameters: int = 0
) -> list[StepSpec]:
    own = {"prompts": prompts.digest, "seed": seed}
    own |= {name: getattr(spec, name) for name in ("openers", "positions", "last", "kl", "test", "choice")}
    own = {name: list(value) if isinstance(value, tuple) else value for name, value in own.items()}
    n = len(prompts.texts)
    candidates, drawn = blocks * len(spec.positions), 1 + len(DRAWN) * spec.controls

    def step(name: str, forwards: float, **more: Any) -> StepSpec:
        tokens = int(forwards) * length
        seconds = tokens * parameters / RATE
        return StepSpec(name=name, inputs=own | more, forwards=int(forwards), tokens=tokens, seconds=seconds)

    choice = 2 * n * spec.choice * candidates + n
    return [
        step("choice", choice),
        step("ablated and added", 2.5 * n * spec.test * drawn, controls=spec.controls),
        step("weights", n * spec.test * (WEIGHTS + 2)),
        *(step(f"untrained {i + 1}", choice, number=i) for i in range(spec.untrained)),
    ]


def run(subject: Any, spec: BehaviourSpec, ctx: Context) -> Findings:
    """Measure, and say what it means."""
    prompts = Prompts.read(spec)
    measured = _Measured(subject, prompts, spec, ctx.seed)
    first, second, third, *rest = _steps(prompts, spec, ctx.seed, subject.n_blocks)
    chosen = ctx.step(first, measured.choice)
    found = ctx.step(second, lambda progress: measured.effects(chosen, progress))
    weights = ctx.step(third, lambda progress: measured.weights(chosen, progress))
    untrained = [ctx.step(step, measured.untrained(i)) for i, step in enumerate(rest)]
    ctx.artifact("direction", arrays={"vector": np.asarray(chosen["vector"])})
    report = Report(
        prompts=prompts,
        on=measured.on,
        off=measured.off,
        spec=spec,
        chosen=chosen,
        found=found,
        weights=weights,
        untrained=[float(row["drop"]) for row in untrained],
        python=snippet(subject.reference, "behaviour", spec, ctx.seed),
        ctx=ctx,
    )
    claims = report.findings()
    return Findings(
        findings=claims, views=report.views(claims), summary=report.summary(claims), warnings=report.warnings()
    )


class _Measured:
    """What is measured.

    Args:
        subject: The subject.
        prompts: The prompts.
        spec: The spec.
        seed: The study's seed.
    """

    def __init__(self, subject: Any, prompts: Prompts, spec: BehaviourSpec, seed: int) -> None:
        from assay.directions.steering.behaviour import opener_ids

        self.subject, self.prompts, self.spec, self.seed = subject, prompts, spec, seed
        self.openers = opener_ids(subject, spec.openers)
        self.fit, self.dev, self.test = prompts.parts(spec, seed)
        self.on, self.off = (prompts.of(self.test, shows) for shows in (True, False))

    def select(self, subject: Any, filters: Any, *, only_clear: bool, progress: Any = None) -> Any:
        """The selection, on one subject."""
        from assay.directions.steering.select import select_direction

        said = self.prompts
        sets = [said.said(said.of(part, shows)) for part in (self.fit, self.dev) for shows in (True, False)]
        return select_direction(
            subject,
            sets[0],
            sets[1],
            validation=(sets[2], sets[3]),
            openers=self.openers,
            positions=self.spec.positions,
            filters=filters,
            only_clear=only_clear,
            writes=f"{self.spec.data.stem}",
            progress=progress,
        )

    def choice(self, progress: Progress) -> Mapping[str, Any]:
        """The direction, and the table that it was chosen from."""
        from assay.directions.steering.select import Filters

        found = self.select(
            self.subject,
            Filters(last=self.spec.last, kl=self.spec.kl),
            only_clear=True,
            progress=lambda done, total: progress(done, total, "trying candidates"),
        )
        rows = found.candidates
        return {
            "vector": found.direction.vector.numpy(),
            "size": found.direction.size,
            "site": found.direction.site,
            "block": found.chosen.block,
            "position": found.chosen.position,
            "origin": found.direction.origin.to_dict(),
            "base": list(found.base),
            "blocks": [row.block for row in rows],
            "positions": [row.position for row in rows],
            "bypass": np.asarray([row.bypass for row in rows]),
            "induce": np.asarray([row.induce for row in rows]),
            "kl": np.asarray([row.kl for row in rows]),
            "dropped": [row.dropped for row in rows],
        }

    @cached_property
    def batches(self) -> tuple[Any, Any]:
        """The held-out prompts with the trigger, and without."""
        on, off = (self.subject.batch(self.prompts.said(rows)) for rows in (self.on, self.off))
        return on, off

    def arms(self, chosen: Mapping[str, Any]) -> dict[str, np.ndarray]:
        """The direction and every control, `[n, d]`, all of one norm."""
        from assay.controls.directions import (
            covariance_matched_directions,
            isotropic_directions,
            shuffled_difference_directions,
        )
        from assay.directions.data import read_sites

        vector = np.asarray(chosen["vector"], dtype=np.float64)
        texts = self.prompts.said(self.fit.tolist())
        held = read_sites(self.subject, texts, str(chosen["site"]), positions=int(chosen["position"]))
        (rows,) = held.values()
        labels = np.asarray(self.prompts.shows, dtype=int)[self.fit]
        n, seed = self.spec.controls, self.seed
        return {
            "": vector[None],
            "isotropic": isotropic_directions(vector, n, seed),
            "covariance-matched": covariance_matched_directions(vector, rows, n, seed),
            "label-shuffled": shuffled_difference_directions(vector, rows, labels, n, seed),
        }

    def effects(self, chosen: Mapping[str, Any], progress: Progress) -> Mapping[str, Any]:
        """What ablating and adding do to held-out prompts, and what the direction reads, for every direction."""
        import torch

        from assay.activations.edits import Add
        from assay.directions.steering.behaviour import Ends, divergence, opener_score
        from assay.directions.steering.weights import ablate_everywhere

        arms = self.arms(chosen)
        rows = [torch.tensor(row).float() for part in arms.values() for row in part]
        ablations = [ablate_everywhere(self.subject, row) for row in rows]
        site = str(chosen["site"])
        additions = [[Add(site, row)] for row in rows]
        on, off = self.batches
        ends = {"on": Ends(on), "off": Ends(off)}
        before = {"on": ends["on"](self.subject.run(on).logits), "off": ends["off"](self.subject.run(off).logits)}
        answers = {"on": self.answer_ids(self.on), "off": self.answer_ids(self.off)}

        def swept(name: str, side: str, cells: Any, metric: Callable[[Any, Any], Any]) -> np.ndarray:
            batch = on if side == "on" else off
            values = self.subject.sweep(
                batch,
                cells,
                lambda logits: metric(ends[side](logits), side),
                reduce=None,
                progress=lambda done, total: progress(done, total, name),
            )
            return np.asarray(values.cpu().numpy())

        def score_and_kl(last: Any, side: str) -> Any:  # two numbers of one sweep, as one complex number
            return torch.complex(opener_score(last, self.openers), divergence(before[side].expand_as(last), last))

        def right(last: Any, side: str) -> Any:
            return (last.argmax(-1).cpu() == answers[side]).double()

        gone = {side: swept("ablating", side, ablations, score_and_kl) for side in ("on", "off")}
        table = {
            "ablated score": gone["on"].real,
            "ablated kl on": gone["on"].imag,
            "ablated kl off": gone["off"].imag,
            "added score": swept("adding", "off", additions, score_and_kl).real,
        }
        if answers["on"] is not None:
            table["ablated right"] = swept("ablating", "on", ablations, right)
        found = self.plain(before, answers) | self.one(ablations[0], additions[0], before, answers, ends)
        table["reads"] = self.reads(chosen, np.concatenate(list(arms.values())))
        start = 0
        for kind, part in arms.items():
            for name, values in table.items():
                taken = values[start : start + len(part)]
                found[f"{name} {kind}".strip()] = taken if kind else taken[0]
            start += len(part)
        return found

    def answer_ids(self, rows: Sequence[int]) -> Any:
        """The first token of each known answer; None where not every prompt has one."""
        from assay.directions.steering.behaviour import answer_ids

        if not all(self.prompts.answers[i] for i in self.on + self.off):
            return None
        return answer_ids(self.subject, self.prompts.said(rows), [self.prompts.answers[i] for i in rows])

    def plain(self, before: Mapping[str, Any], answers: Mapping[str, Any]) -> dict[str, Any]:
        """Scores, and shares that show the behaviour or give the answer, without edits."""
        from assay.directions.steering.behaviour import opener_score

        found: dict[str, Any] = {}
        for side, last in before.items():
            found[f"base score {side}"] = opener_score(last, self.openers).cpu().numpy()
            found[f"base shows {side}"] = self.shows(last)
            if answers[side] is not None:
                found[f"base right {side}"] = float((last.argmax(-1).cpu() == answers[side]).double().mean())
        return found

    def shows(self, last: Any) -> float:
        """The share whose likeliest next token opens the behaviour."""
        import torch

        return float(torch.isin(last.argmax(-1).cpu(), torch.tensor(self.openers)).double().mean())

    def one(
        self,
        ablation: Any,
        addition: Any,
        before: Mapping[str, Any],
        answers: Mapping[str, Any],
        ends: Mapping[str, Any],
    ) -> dict[str, Any]:
        """Shares with the direction ablated and added, and the change of cross-entropy without the trigger."""
        import torch

        on, off = self.batches
        with torch.no_grad():
            gone = {
                side: ends[side](self.subject.run(b, edits=ablation).logits) for side, b in (("on", on), ("off", off))
            }
            added = ends["off"](self.subject.run(off, edits=addition).logits)
        target = before["off"].argmax(-1) if answers["off"] is None else answers["off"].to(before["off"].device)
        ce = [-last.double().log_softmax(-1).gather(1, target[:, None])[:, 0] for last in (gone["off"], before["off"])]
        found: dict[str, Any] = {
            "ablated shows": self.shows(gone["on"]),
            "ablated shows off": self.shows(gone["off"]),
            "added shows": self.shows(added),
            "ce": (ce[0] - ce[1]).cpu().numpy(),
        }
        if answers["off"] is not None:
            found["ablated right off"] = float((gone["off"].argmax(-1).cpu() == answers["off"]).double().mean())
        return found

    def reads(self, chosen: Mapping[str, Any], directions: np.ndarray) -> np.ndarray:
        """How far the AUROC of projections for the trigger is from 1/2, on held-out prompts: `[directions, 1]`."""
        from assay.directions.data import read_sites
        from assay.directions.probes.scores import many_auroc

        texts = self.prompts.said([*self.on, *self.off])
        (rows,) = read_sites(self.subject, texts, str(chosen["site"]), positions=int(chosen["position"])).values()
        up = np.repeat([True, False], [len(self.on), len(self.off)])
        along = rows.astype(np.float64) @ directions.T
        found = many_auroc(along, np.broadcast_to(up[:, None], along.shape))
        return np.asarray(np.maximum(found, 1 - found)[:, None])  # a random direction may point either way

    def weights(self, chosen: Mapping[str, Any], progress: Progress) -> Mapping[str, Any]:
        """How far the logits of the edited weights are from those of the ablation: the direction's, and others'."""
        import torch

        from assay.controls.directions import isotropic_directions
        from assay.directions.steering.weights import ablate_everywhere, orthogonalised

        vector = torch.tensor(np.asarray(chosen["vector"])).float()
        others = torch.as_tensor(isotropic_directions(vector, WEIGHTS, self.seed + 1))
        batch = self.batches[0]
        with torch.no_grad():
            hooks = self.subject.run(batch, edits=ablate_everywhere(self.subject, vector)).logits
            apart, shows = [], 0.0
            for i, row in enumerate([vector, *others]):
                try:
                    edited = orthogonalised(self.subject, row).run(batch).logits
                except UnsupportedArchitecture as error:
                    return {"refused": str(error)}
                apart.append(float((edited - hooks).abs().max()))
                if not i:
                    from assay.directions.steering.behaviour import Ends

                    shows = self.shows(Ends(batch)(edited))
                progress(i + 1, WEIGHTS + 1, "editing weights")
        return {"apart": apart[0], "others": np.asarray(apart[1:]), "shows": shows, "refused": ""}

    def untrained(self, number: int) -> Callable[[Progress], Mapping[str, Any]]:
        """The same pipeline on untrained weights: the drop of the score on held-out prompts.

        Of the filters only that on late blocks is kept: what no filter leaves out is the most that can be found.
        """

        def compute(progress: Progress) -> Mapping[str, Any]:
            from assay.activations.subject import Subject
            from assay.directions.steering.behaviour import Ends, opener_score
            from assay.directions.steering.select import Filters
            from assay.directions.steering.weights import ablate_everywhere

            subject = self.subject
            module = self._null.draw(self.seed, number)
            other = Subject(module, subject.tokenizer, architecture=subject.architecture, name=f"untrained {number}")
            progress(0, 1, "choosing on untrained weights")
            try:
                found = self.select(other, Filters(last=self.spec.last, kl=np.inf, induce=-np.inf), only_clear=False)
            except (SpecError, NumericalError):  # no candidate is finite: nothing is found, and nothing lost
                return {"drop": 0.0}
            batch = other.batch(self.prompts.said(self.on))
            ends = Ends(batch)
            edits = ablate_everywhere(other, found.direction)
            before, after = (ends(other.run(batch, edits=given).logits) for given in ((), edits))
            drop = opener_score(before, self.openers) - opener_score(after, self.openers)
            return {"drop": float(drop.mean())}

        return compute

    @cached_property
    def _null(self) -> Any:
        from assay.controls.weights import WeightNull

        return WeightNull(self.subject.module, "gaussian")
