"""What the measurements of the `behaviour` study say."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from assay.base.findings import Control, Finding
from assay.base.method import Context
from assay.base.stats import Side, bootstrap_interval
from assay.base.views import Bars, Distribution, Heatmap, View
from assay.controls.verdicts import compare, verdict
from assay.directions.methods.behaviour import BehaviourSpec
from assay.directions.methods.behaviour_prompts import Prompts

DRAWN = {
    "isotropic": "directions of the same norm, any at all",
    "covariance-matched": "directions of the same norm drawn from the covariance of the activations",
    "label-shuffled": "differences of means between shuffled classes, at the same norm",
}
UNTRAINED = "the same pipeline, choice without filters, on weights redrawn with each matrix's mean and deviation"


@dataclass(frozen=True, slots=True, kw_only=True)
class Report:
    """What the measurements say.

    Args:
        prompts: The prompts.
        on: The reported prompts that have the trigger, as rows.
        off: Those that have not.
        spec: The spec.
        chosen: The direction and the table it was chosen from.
        found: What ablating and adding it and its controls do.
        weights: The edited weights against the ablation.
        untrained: The drop of the score in each untrained model.
        python: What runs the study again.
        ctx: The study's context.
    """

    prompts: Prompts
    on: Sequence[int]
    off: Sequence[int]
    spec: BehaviourSpec
    chosen: Mapping[str, Any]
    found: Mapping[str, Any]
    weights: Mapping[str, Any]
    untrained: Sequence[float]
    python: str
    ctx: Context

    @property
    def where(self) -> str:
        """The chosen direction's place."""
        return f"{self.chosen['site']}, token {self.chosen['position']}"

    @property
    def shares(self) -> dict[str, float]:
        """Every share that was measured: of prompts that show the behaviour, or give the known answer."""
        names = ("shows", "right")
        kept = {key: value for key, value in self.found.items() if any(f" {n}" in f" {key}" for n in names)}
        return {key: float(value) for key, value in kept.items() if np.ndim(value) == 0}

    def _finding(
        self,
        claim: str,
        values: np.ndarray | float,
        unit: str,
        nulls: Mapping[str, np.ndarray],
        tag: str,
        *,
        rows: Sequence[int] = (),
        side: Side = "greater",
        note: str = "",
        n: int = 0,
        said: Mapping[str, str] = DRAWN,
        **detail: Any,
    ) -> Finding:
        estimate = float(np.mean(values))
        controls: tuple[Control, ...] = tuple(
            compare(kind, said[kind], estimate, null, side) for kind, null in nulls.items()
        )
        interval = None
        if np.ndim(values):
            interval = bootstrap_interval(values, seed=self.ctx.seed, groups=[self.prompts.groups[i] for i in rows])
        return Finding(
            claim=claim,
            estimate=estimate,
            unit=unit,
            n=n or len(rows),
            controls=controls,
            interval=interval,
            interval_note="" if interval is not None else note,
            verdict=verdict(estimate, controls, interval, claim_side=side),
            cost=self.ctx.cost(),
            provenance=self.ctx.provenance(self.prompts.digest),
            tags=(tag,),
            detail=detail,
        )

    def _nulls(self, name: str, change: Any = lambda values: values) -> dict[str, np.ndarray]:
        """The mean over prompts for every control, after a change of all values."""
        return {kind: change(np.asarray(self.found[f"{name} {kind}"])).mean(-1) for kind in DRAWN}

    def findings(self) -> tuple[Finding, ...]:
        """Every claim."""
        found = [self.needed(), *self._edited(), self.enough(), self.specific()]
        if "ablated right" in self.found:
            found.append(self.answers())
        return (*found, self.reads(), self.learned())

    def needed(self) -> Finding:
        """Without the direction the behaviour goes."""
        base, after = (np.asarray(self.found[key]) for key in ("base score on", "ablated score"))
        return self._finding(
            f"necessity: with the direction of {self.where} ablated everywhere, "
            f"{self.shares['ablated shows']:.0%} of prompts with the trigger show the behaviour, before "
            f"{self.shares['base shows on']:.0%}",
            base - after,
            "log odds lost",
            self._nulls("ablated score", lambda values: base - values),
            "necessity",
            rows=self.on,
            shares=self.shares,
        )

    def _edited(self) -> Iterator[Finding]:
        """The weights without the direction are the ablation."""
        if self.weights["refused"]:
            return
        yield self._finding(
            f"weights orthogonalised to the direction give the logits of the ablation "
            f"({float(self.weights['shows']):.0%} show the behaviour)",
            float(self.weights["apart"]),
            "logits, the largest difference",
            {"other directions": np.asarray(self.weights["others"])},
            "weights",
            side="less",
            note="the largest of all differences",
            n=len(self.on),
            said={"other directions": "weights orthogonalised to random directions instead"},
        )

    def enough(self) -> Finding:
        """With the direction added the behaviour comes."""
        base, after = (np.asarray(self.found[key]) for key in ("base score off", "added score"))
        return self._finding(
            f"sufficiency: with the direction added at {self.chosen['site']}, {self.shares['added shows']:.0%} of "
            f"prompts without the trigger show the behaviour, before {self.shares['base shows off']:.0%}",
            after - base,
            "log odds gained",
            self._nulls("added score", lambda values: values - base),
            "sufficiency",
            rows=self.off,
        )

    def specific(self) -> Finding:
        """Ablating it matters where the trigger is."""
        on, off = (np.asarray(self.found[f"ablated kl {side}"]) for side in ("on", "off"))
        nulls = {
            kind: np.asarray(self.found[f"ablated kl on {kind}"]).mean(-1)
            - np.asarray(self.found[f"ablated kl off {kind}"]).mean(-1)
            for kind in DRAWN
        }
        ce = np.asarray(self.found["ce"])
        return self._finding(
            f"specificity: ablating it changes prompts with the trigger more than those without (KL {off.mean():.2g}, "
            f"cross-entropy {ce.mean():+.2g} there)",
            on - off.mean(),
            "nats (KL)",
            nulls,
            "specificity",
            rows=self.on,
            kl=float(off.mean()),
            kl_controls={kind: float(np.asarray(self.found[f"ablated kl off {kind}"]).mean()) for kind in DRAWN},
            ce=float(ce.mean()),
        )

    def answers(self) -> Finding:
        """What it says instead is what it knew."""
        right = float(np.mean(self.found["ablated right"]))
        return self._finding(
            f"without it, {right:.0%} of prompts with the trigger get the known answer "
            f"({self.shares['base right on']:.0%} before; without the trigger {self.shares['base right off']:.0%}, "
            f"and {self.shares['ablated right off']:.0%} ablated)",
            np.asarray(self.found["ablated right"]),
            "share right",
            self._nulls("ablated right"),
            "known answer",
            rows=self.on,
        )

    def reads(self) -> Finding:
        """The projection onto it tells where the trigger is."""
        return self._finding(
            f"its projection at {self.where} tells prompts with the trigger from those without, in new groups",
            float(np.asarray(self.found["reads"]).mean()),
            "AUROC, either way round",
            self._nulls("reads"),
            "known trigger",
            note="one order of all prompts",
            n=len(self.on) + len(self.off),
        )

    def learned(self) -> Finding:
        """It is not there in a model that learned nothing."""
        base, after = (np.asarray(self.found[key]) for key in ("base score on", "ablated score"))
        return self._finding(
            "absence: chosen the same way in untrained weights, a direction takes away less",
            base - after,
            "log odds lost",
            {"untrained": np.asarray(self.untrained)},
            "untrained",
            rows=self.on,
            said={"untrained": UNTRAINED},
        )

    def summary(self, found: Sequence[Finding]) -> tuple[str, ...]:
        """Headline lines."""
        holds = [finding.tags[0] for finding in found if finding.verdict == "supported"]
        fails = [f"{finding.tags[0]} ({finding.verdict})" for finding in found if finding.verdict != "supported"]
        survived = sum(not why for why in self.chosen["dropped"])
        return (
            f"Chosen at {self.where}; the filters leave {survived} of {len(self.chosen['dropped'])} candidates.",
            f"Ablated: {self.shares['base shows on']:.0%} to {self.shares['ablated shows']:.0%} show the behaviour; "
            f"added: {self.shares['base shows off']:.0%} to {self.shares['added shows']:.0%}.",
            f"Holds: {', '.join(holds) or 'nothing'}." + (f" Does not: {', '.join(fails)}." if fails else ""),
        )

    def warnings(self) -> tuple[str, ...]:
        """What to know before believing any of it."""
        found = []
        if self.weights["refused"]:
            found.append(f"The weights were not edited: {self.weights['refused']}")
        if self.shares["base shows on"] < 0.9 or self.shares["base shows off"] > 0.1:
            found.append(
                f"The data and the model disagree: {self.shares['base shows on']:.0%} of the prompts with a trigger "
                f"show the behaviour, and {self.shares['base shows off']:.0%} of those without."
            )
        groups = len({self.prompts.groups[i] for i in self.on})
        if groups < 5:
            found.append(f"{groups} held-out groups have the trigger: intervals over groups are rough.")
        return tuple(found)

    def views(self, claims: Sequence[Finding]) -> tuple[View, ...]:
        """The charts."""
        blocks, positions = (sorted(set(self.chosen[name])) for name in ("blocks", "positions"))
        table = dict(
            zip(
                zip(self.chosen["blocks"], self.chosen["positions"], strict=True),
                np.asarray(self.chosen["bypass"]).tolist(),
                strict=True,
            )
        )
        code = self.python
        found: list[View] = [
            Bars(
                id="shares",
                section="The behaviour",
                title="What held-out prompts do",
                labels=["as it is", "ablated", "as it is", "added"],
                groups=["with the trigger", "with the trigger", "without it", "without it"],
                values=[self.shares[k] for k in ("base shows on", "ablated shows", "base shows off", "added shows")],
                unit="share that shows it",
                python=code,
            )
        ]
        for finding in (claim for claim in claims if claim.tags[0] in ("necessity", "sufficiency", "untrained")):
            found.append(
                Distribution(
                    id=finding.tags[0],
                    section="Among its controls",
                    title=finding.tags[0].capitalize(),
                    null={control.name: control.null for control in finding.controls},
                    estimate=finding.estimate,
                    unit=finding.unit,
                    python=code,
                )
            )
        found.append(
            Heatmap(
                id="choice",
                section="How it was chosen",
                title="What is left of the behaviour when a candidate is ablated",
                caption="Mean log odds on the prompts that the choice was made on; late blocks are not tried.",
                rows=[str(block) for block in blocks],
                columns=[str(position) for position in positions],
                values=[[table[block, position] for position in positions] for block in blocks],
                row_title="block",
                column_title="token",
                unit="log odds",
                python=code,
            )
        )
        return tuple(found)
