"""The `erase` study: what is measured, held against what, and said how."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np

from assay.base.errors import NothingFound
from assay.base.findings import Finding, Findings, Verdict
from assay.base.method import Context, Progress, StepSpec
from assay.base.snippets import snippet
from assay.base.stats import Interval
from assay.base.views import Distribution, View
from assay.controls.verdicts import compare, verdict
from assay.directions.labelled import Labelled
from assay.directions.methods.common import POSITIONS, RATE, mean_tokens
from assay.directions.methods.erase import EraseSpec
from assay.directions.methods.rows import codes, repeated_texts, two_classes

KINDS = {
    "isotropic": "random erasures of the same rank, in any direction",
    "covariance-matched": "random erasures of the same rank, drawn from the covariance of the activations",
}

ENOUGH = 10
"""Groups of a class, below which an interval over groups is called weak: a bootstrap of fewer covers too little."""


def planned(card: Any, spec: EraseSpec, seed: int) -> list[StepSpec]:
    """List the steps of a study from its model's card, without loading weights."""
    data = _read(spec)
    length = mean_tokens(card, data.texts)
    site = spec.site or f"blocks.{card.n_layers // 2}.resid_post"
    return _steps(data, spec, site, seed, length, card.parameters)


def _read(spec: EraseSpec) -> Labelled:
    return two_classes(spec.data, "the study erases what tells two apart")


def _steps(
    data: Labelled, spec: EraseSpec, site: str, seed: int, length: int = 1, parameters: int = 0
) -> list[StepSpec]:
    own = {name: getattr(spec, name) for name in ("kind", "shrinkage", "position", "held_out", "random")}
    inputs = {"data": data.digest, "site": site, "seed": seed, **own}
    rows, runs = len(data), (2 * spec.random + 2) * min(spec.texts, len(data))

    def step(name: str, n: int, more: dict[str, Any]) -> StepSpec:
        seconds = n * length * parameters / RATE
        return StepSpec(name=name, inputs=inputs | more, forwards=n, tokens=n * length, seconds=seconds)

    return [step("erasure", rows, {}), step("cost", rows + runs, {"texts": spec.texts})]


def run(subject: Any, spec: EraseSpec, ctx: Context) -> Findings:
    """Measure, and say what it means."""
    data = _read(spec)
    site = spec.site or f"blocks.{subject.n_blocks // 2}.resid_post"
    measured = _Measured(subject, data, spec, site, ctx.seed)
    first, second = _steps(data, spec, site, ctx.seed)
    left = ctx.step(first, measured.erasure)
    cost = ctx.step(second, measured.cost)
    ctx.artifact("eraser", arrays={name: np.asarray(left[name]) for name in ("read", "write", "mean")})
    python = snippet(subject.reference, "erase", spec, ctx.seed)
    report = _Report(data=data, spec=spec, site=site, left=left, cost=cost, python=python, ctx=ctx)
    return Findings(
        findings=report.findings(), views=report.views(), summary=report.summary(), warnings=report.warnings()
    )


class _Measured:
    """What is measured; activations are read once, and only if something needs them.

    Args:
        subject: The subject.
        data: The labelled texts.
        spec: The spec.
        site: Where.
        seed: The study's seed.
    """

    def __init__(self, subject: Any, data: Labelled, spec: EraseSpec, site: str, seed: int) -> None:
        self.subject, self.data, self.spec, self.site, self.seed = subject, data, spec, site, seed
        self._told: Progress | None = None

    @cached_property
    def rows(self) -> np.ndarray:
        """Activations at the site."""
        from assay.directions.data import read_sites

        position = POSITIONS[self.spec.position]
        (rows,) = read_sites(self.subject, self.data.texts, self.site, positions=position, progress=self._told).values()
        return rows

    def fit(self, X: np.ndarray, y: np.ndarray) -> Any:
        """The eraser of rows and labels."""
        from assay.directions.erasure import leace, mean_projection
        from assay.directions.vectors import Origin

        origin = Origin(method=self.spec.kind, subject=self.subject.fingerprint, data=self.data.digest)
        if self.spec.kind == "leace":
            return leace(X, y, site=self.site, shrinkage=self.spec.shrinkage, origin=origin)
        return mean_projection(X, y, site=self.site, origin=origin)

    @cached_property
    def score(self) -> Any:
        """The erasure, scored on groups that were held out."""
        from assay.directions.erasure import score_erasure

        return score_erasure(
            self.fit, self.rows, self.data.y, self.data.groups, held_out=self.spec.held_out, seed=self.seed
        )

    def others(self, kind: Any) -> Any:
        """Random erasures of the same rank."""
        from assay.directions.erasure import random_erasers

        train = self.rows[list(self.score.train)]
        return random_erasers(self.score.eraser, self.spec.random, kind, train, seed=self.seed)

    def erasure(self, progress: Progress) -> Mapping[str, Any]:
        """What probes of new rows find: before, after, and after random erasures.

        The probe is fitted on half of the held-out groups and read on the other half. One fitted on the eraser's own
        rows would find nothing whatever is left: there the classes have the same mean by construction.
        """
        from assay.directions.probes.linear import fit_linear
        from assay.directions.probes.scores import auroc, auroc_null_sd, evaluate
        from assay.directions.probes.splits import grouped_split

        self._told = progress
        score = self.score
        y = codes(self.data)
        held = np.asarray(score.test)
        half = grouped_split([self.data.groups[i] for i in held], y[held], test=0.5, seed=self.seed)
        fit, read = held[half.train], held[half.test]
        groups = [self.data.groups[i] for i in read]

        def readout(rows: np.ndarray) -> np.ndarray:
            try:
                return fit_linear("ridge", rows[fit], y[fit])(rows[read])
            except NothingFound:
                return np.zeros(len(read))

        found: dict[str, Any] = {}
        for kind in KINDS:
            values = []
            for done, other in enumerate(self.others(kind), 1):
                values.append(auroc(readout(other(self.rows)), y[read]))
                progress(done, self.spec.random, f"{kind} erasures")
            found[f"{kind} after"] = np.asarray(values)
        eraser = score.eraser
        left = readout(eraser(self.rows))
        least = min(len({self.data.groups[i] for i in read[y[read] == k]}) for k in (0, 1))
        interval = None
        if least > 1:  # of one group of a class, half the resamples have none
            interval = evaluate(left, y[read], groups, metrics=("auroc",), seed=self.seed)["auroc"].interval.to_dict()
        return {
            **found,
            "before": auroc(readout(self.rows), y[read]),
            "after": auroc(left, y[read]),
            "interval": interval,
            "band": auroc_null_sd(int(y[read].sum()), int((1 - y[read]).sum())),
            "own": score.after[0].auc,
            "moved": score.moved,
            "rank": eraser.rank,
            "groups": len(set(groups)),
            "least": least,
            "read": eraser.read,
            "write": eraser.write,
            "mean": eraser.mean,
        }

    def cost(self, progress: Progress) -> Mapping[str, Any]:
        """What the model loses, and what it loses under random erasures."""
        from assay.directions.erasure import amnesic

        self._told = progress
        arms = {kind: self.others(kind) for kind in KINDS}
        progress(0, 1, "running the model without it")
        texts = self.data.texts[:: max(1, len(self.data) // self.spec.texts)][: self.spec.texts]
        found = amnesic(self.subject, texts, self.score.eraser, arms, seed=self.seed)
        return {
            "kl": found.kl,
            "loss": found.loss,
            "texts": len(texts),
            **{f"{kind} kl": arm.kl for kind, arm in found.arms.items()},
        }


@dataclass(frozen=True, slots=True, kw_only=True)
class _Report:
    """What the measurements say."""

    data: Labelled
    spec: EraseSpec
    site: str
    left: Mapping[str, Any]
    cost: Mapping[str, Any]
    python: str
    ctx: Context

    def findings(self) -> tuple[Finding, Finding]:
        """Every claim."""
        return self.gone(), self.missed()

    @property
    def least(self) -> int:
        """How many groups the class with fewer of them has among those that the probe is read on."""
        return int(self.left["least"])

    def gone(self) -> Finding:
        """Little enough is left for a linear probe of new rows."""
        after, found = float(self.left["after"]), self.left["interval"]
        interval = None if found is None else Interval.from_dict(found)
        controls = tuple(
            compare(kind, said, after, np.asarray(self.left[f"{kind} after"]), "less") for kind, said in KINDS.items()
        )
        chance = abs(after - 0.5) <= 1.96 * float(self.left["band"]) or (interval is not None and 0.5 in interval)
        judged: Verdict = verdict(after, controls, claim_side="less")
        if self.least < 2:
            judged = "not testable"
        elif judged == "supported" and not chance:
            judged = "contradicted"
        elif judged == "supported" and interval is not None and interval.high >= float(self.left["before"]):
            judged = "not distinguishable from control"
        return Finding(
            claim=f"after {self.spec.kind} at {self.site} a linear probe of new rows finds {self.spec.data.stem} no "
            f"better than chance (before: {float(self.left['before']):.3f})",
            estimate=after,
            unit="AUROC",
            n=int(self.left["groups"]),
            controls=controls,
            interval=interval,
            interval_note="" if interval is not None else "one group of a class cannot be resampled",
            verdict=judged,
            cost=self.ctx.cost(),
            provenance=self.ctx.provenance(self.data.digest),
            tags=("erased",),
            detail={key: self.left[key] for key in ("before", "own", "moved", "rank")},
        )

    def missed(self) -> Finding:
        """The model says other things without it, more than without something else."""
        kl = float(self.cost["kl"])
        controls = tuple(compare(kind, said, kl, np.asarray(self.cost[f"{kind} kl"])) for kind, said in KINDS.items())
        return Finding(
            claim=f"the model's next tokens change more without {self.spec.data.stem} at {self.site} than without as "
            "many other dimensions",
            estimate=kl,
            unit="nats a token (KL)",
            n=int(self.cost["texts"]),
            controls=controls,
            interval_note="a mean over the tokens of the texts",
            verdict=verdict(kl, controls),
            cost=self.ctx.cost(),
            provenance=self.ctx.provenance(self.data.digest),
            tags=("amnesic",),
            detail={"loss": self.cost["loss"]},
        )

    def summary(self) -> tuple[str, ...]:
        """Headline lines."""
        gone, missed = self.findings()
        return (
            f"{self.spec.data.stem} at {self.site}: AUROC {float(self.left['before']):.3f} before, {gone.estimate:.3f} "
            f"after {self.spec.kind}, by a probe of new rows ({gone.verdict}).",
            f"Without it the model's next tokens differ by {missed.estimate:.3f} nats (KL; {missed.verdict}), and its "
            f"loss by {float(self.cost['loss']):+.3f}.",
        )

    def warnings(self) -> tuple[str, ...]:
        """What to know before believing any of it."""
        found = repeated_texts(self.data)
        if self.least >= ENOUGH:
            return found
        few = "no interval over groups" if self.least < 2 else "an interval that says little"
        return (
            *found,
            f"The probe of new rows is read on {self.least} group{'s' if self.least != 1 else ''} of a class, which "
            f"makes {few}: give more groups, or a larger held_out.",
        )

    def views(self) -> tuple[View, ...]:
        """The charts."""
        return (
            Distribution(
                id="left",
                section="What is left",
                title="AUROC after erasure, and after random erasures",
                caption=f"Held-out groups; {float(self.left['before']):.3f} without erasure.",
                null={kind: np.asarray(self.left[f"{kind} after"]).tolist() for kind in KINDS},
                estimate=float(self.left["after"]),
                unit="AUROC",
                python=self.python,
            ),
            Distribution(
                id="cost",
                section="What it costs",
                title="Change of the model's next tokens, and under random erasures",
                null={kind: np.asarray(self.cost[f"{kind} kl"]).tolist() for kind in KINDS},
                estimate=float(self.cost["kl"]),
                unit="nats a token (KL)",
                python=self.python,
            ),
        )
