"""The `steer` study: what is measured, held against what, and said how."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np

from assay.base.findings import Control, Finding, Findings
from assay.base.hashing import digest
from assay.base.method import Context, Progress, StepSpec
from assay.base.snippets import snippet
from assay.base.stats import Interval, Side, bootstrap_interval
from assay.base.views import Bars, Lines, Series, View
from assay.controls.verdicts import compare, verdict
from assay.directions.methods.common import RATE
from assay.directions.methods.rows import text_rows
from assay.directions.methods.steer import SteerSpec

DRAWN = {
    "isotropic": "vectors of the same norm in any direction",
    "covariance-matched": "vectors of the same norm drawn from the covariance of the activations",
    "label-shuffled": "the same fit with the two classes shuffled, at the same norm",
    "semantic": "the same fit on other contrasts, at the same norm",
}


@dataclass(frozen=True, slots=True)
class _Inputs:
    """The texts of a study."""

    pairs: list[dict[str, str]]
    prompts: list[str]
    unrelated: list[str]
    contrasts: dict[str, list[dict[str, str]]]

    @classmethod
    def read(cls, spec: SteerSpec) -> _Inputs:
        """Read every file."""
        contrasts: dict[str, list[dict[str, str]]] = {}
        if spec.contrasts is not None:
            for row in text_rows(spec.contrasts, ("name", "positive", "negative"), ("group",), field="contrasts"):
                contrasts.setdefault(row["name"], []).append(row)
        return cls(
            text_rows(spec.data, ("positive", "negative"), ("group",), field="data"),
            [row["text"] for row in text_rows(spec.prompts, ("text",), field="prompts")],
            [row["text"] for row in text_rows(spec.unrelated, ("text",), field="unrelated")],
            contrasts,
        )

    @property
    def digest(self) -> str:
        """The hash of all texts."""
        return digest([self.pairs, self.prompts, self.unrelated, self.contrasts])


def planned(card: Any, spec: SteerSpec, seed: int) -> list[StepSpec]:
    """List the steps of a study from its model's card, without loading weights."""
    inputs = _Inputs.read(spec)
    site = spec.site or f"blocks.{card.n_layers // 2}.resid_post"
    return _steps(inputs, spec, site, seed, lambda text: len(card.encode(text)), card.parameters)


def _steps(
    inputs: _Inputs, spec: SteerSpec, site: str, seed: int, length: Any = len, parameters: int = 0
) -> list[StepSpec]:
    own = {"texts": inputs.digest, "site": site, "kind": spec.kind}
    fitted = [row[side] for row in inputs.pairs for side in ("positive", "negative")]
    vectors = 1 + 3 * spec.controls + len(inputs.contrasts)
    cells = vectors * sum(dose != 0 for dose in spec.doses)
    tokens = cells * sum(length(text) for text in (*inputs.prompts, *inputs.unrelated)) // 2
    fit = sum(length(text) for text in fitted)
    measured = {name: list(getattr(spec, name)) for name in ("toward", "away", "doses")} | {"controls": spec.controls}
    return [
        StepSpec(name="direction", inputs=own, forwards=len(fitted), tokens=fit, seconds=fit * parameters / RATE),
        StepSpec(
            name="doses",
            inputs={**own, **measured, "seed": seed},
            forwards=cells * (len(inputs.prompts) + len(inputs.unrelated)) // 2,
            tokens=tokens,
            seconds=tokens * parameters / RATE,
        ),
    ]


def run(subject: Any, spec: SteerSpec, ctx: Context) -> Findings:
    """Measure, and say what it means."""
    inputs = _Inputs.read(spec)
    site = spec.site or f"blocks.{subject.n_blocks // 2}.resid_post"
    measured = _Measured(subject, inputs, spec, site, ctx.seed)
    fit, doses = _steps(inputs, spec, site, ctx.seed)
    direction = ctx.step(fit, measured.direction)
    found = ctx.step(doses, measured.doses)
    ctx.artifact("direction", arrays={"vector": np.asarray(direction["vector"])})
    python = snippet(subject.reference, "steer", spec, ctx.seed)
    report = _Report(inputs=inputs, spec=spec, site=site, direction=direction, found=found, python=python, ctx=ctx)
    return Findings(
        findings=report.findings(), views=report.views(), summary=report.summary(), warnings=report.warnings()
    )


class _Measured:
    """What is measured.

    Args:
        subject: The subject.
        inputs: The texts.
        spec: The spec.
        site: Where.
        seed: The study's seed.
    """

    def __init__(self, subject: Any, inputs: _Inputs, spec: SteerSpec, site: str, seed: int) -> None:
        self.subject, self.inputs, self.spec, self.site, self.seed = subject, inputs, spec, site, seed

    def fit(self, pairs: Sequence[Mapping[str, str]], writes: str) -> Any:
        """A direction at the site."""
        from assay.directions.steering.extract import Contrast, extract

        contrast = Contrast(
            positive=tuple(row["positive"] for row in pairs),
            negative=tuple(row["negative"] for row in pairs),
            writes=writes,
        )
        (direction,) = extract(self.subject, contrast, self.site, self.spec.kind).values()
        return direction

    @cached_property
    def fitted(self) -> Any:
        """The direction under test."""
        return self.fit(self.inputs.pairs, self.spec.data.stem)

    def direction(self, progress: Progress) -> Mapping[str, Any]:
        """The direction, and how alike the pairs are."""
        progress(0, 1, "fitting")
        found = self.fitted
        return {"vector": found.vector.numpy(), "size": found.size, "agreement": found.origin.detail["agreement"]}

    def doses(self, progress: Progress) -> Mapping[str, Any]:
        """Behaviour and guard of the direction and of every control, dose by dose."""
        from assay.directions.data import read_sites
        from assay.directions.steering.dose import Budget, control_vectors, dose_response

        pairs = self.inputs.pairs
        texts = [row[side] for side in ("positive", "negative") for row in pairs]
        (rows,) = read_sites(self.subject, texts, self.site).values()
        labels = np.repeat([1, 0], len(pairs))
        others = {name: self.fit(rows, name) for name, rows in self.inputs.contrasts.items()}
        made = control_vectors(self.fitted, activations=rows, labels=labels, n=self.spec.controls, seed=self.seed)
        found = dose_response(
            self.subject,
            self.fitted,
            self.spec.doses,
            prompts=self.inputs.prompts,
            metric=self.metric(),
            unrelated=self.inputs.unrelated,
            controls=made,
            semantic=others or None,
            budget=Budget(kl=self.spec.kl, ce=self.spec.ce),
            progress=lambda done, total: progress(done, total, "steering"),
        )
        return {
            "doses": list(found.curve.doses),
            "effects": found.curve.behaviour - found.curve.base,
            "base": found.curve.base,
            "kl": found.curve.kl.mean(1),
            "ce": found.curve.ce.mean(1),
            "slope": found.curve.slope,
            "monotonicity": found.curve.monotonicity,
            "backfires": found.curve.backfires,
            "names": list(others),
            **{f"{kind} effects": np.stack([c.effects for c in curves]) for kind, curves in found.controls.items()},
            **{f"{kind} slopes": np.asarray([c.slope for c in curves]) for kind, curves in found.controls.items()},
            **{f"{kind} kl": np.stack([c.kl.mean(1) for c in curves]) for kind, curves in found.controls.items()},
        }

    def metric(self) -> Any:
        """Log odds of the words toward against those away, at each prompt's end."""
        from assay.base.errors import SpecError
        from assay.directions.steering.behaviour import Ends, opener_ids

        toward, away = (opener_ids(self.subject, words) for words in (self.spec.toward, self.spec.away))
        both = set(toward) & set(away)
        if both:
            said = ", ".join(repr(self.subject.tokenizer.decode([token])) for token in sorted(both))
            raise SpecError(
                f"toward and away begin with the same token {said}: nothing could move between them", "away"
            )
        ends = Ends(self.subject.batch(self.inputs.prompts))

        def odds(logits: Any) -> Any:
            last = ends(logits).double()
            return last[:, list(toward)].logsumexp(-1) - last[:, list(away)].logsumexp(-1)

        return odds


@dataclass(frozen=True, slots=True, kw_only=True)
class _Report:
    """What the measurements say."""

    inputs: _Inputs
    spec: SteerSpec
    site: str
    direction: Mapping[str, Any]
    found: Mapping[str, Any]
    python: str
    ctx: Context

    @property
    def kinds(self) -> list[str]:
        """The kinds of control that were measured."""
        return [kind for kind in DRAWN if f"{kind} effects" in self.found]

    @property
    def within(self) -> list[bool]:
        """Which doses keep to the budget."""
        kl, ce = np.asarray(self.found["kl"]), np.asarray(self.found["ce"])
        return [bool(value) for value in (kl <= self.spec.kl) & (ce <= self.spec.ce)]

    @property
    def dose(self) -> float:
        """The largest positive dose that keeps to the budget, as do all smaller ones; 0 if none does."""
        best = 0.0
        for dose, fine in zip(self.found["doses"], self.within, strict=True):
            if dose > 0:
                if not fine:
                    break
                best = float(dose)
        return best

    def _finding(
        self,
        claim: str,
        estimate: float,
        unit: str,
        nulls: Mapping[str, Any],
        side: Side,
        interval: Interval | None,
        **more: Any,
    ) -> Finding:
        controls: list[Control] = [compare(kind, DRAWN[kind], estimate, nulls[kind], side) for kind in self.kinds]
        return Finding(
            claim=claim,
            estimate=estimate,
            unit=unit,
            n=len(self.inputs.prompts),
            controls=tuple(controls),
            interval=interval,
            interval_note="" if interval is not None else "a mean over the guard's texts",
            verdict=verdict(estimate, controls, interval, claim_side=side),
            cost=self.ctx.cost(),
            provenance=self.ctx.provenance(self.inputs.digest),
            **more,
        )

    def findings(self) -> tuple[Finding, ...]:
        """Every claim."""
        return (self.moves(), self.responds(), self.spares())

    @property
    def _at(self) -> int:
        """The dose that is reported: the largest within the budget, else the smallest positive one."""
        doses = list(self.found["doses"])
        return doses.index(self.dose or min(d for d in doses if d > 0))

    def moves(self) -> Finding:
        """At the largest dose that the guard allows, more than other directions."""
        at = self._at
        effects = np.asarray(self.found["effects"])[at]
        dose = float(self.found["doses"][at])
        fine = "the largest within the budget" if self.dose else "outside the budget, as every positive dose"
        return self._finding(
            f"adding {dose:g} of the direction at {self.site} ({fine}) moves the next token towards "
            f"{', '.join(map(repr, self.spec.toward[:3]))} more than other directions of its norm do",
            float(effects.mean()),
            "log odds",
            {kind: np.asarray(self.found[f"{kind} effects"])[:, at] for kind in self.kinds},
            "greater",
            bootstrap_interval(effects, seed=self.ctx.seed) if len(effects) > 1 else None,
            tags=("effect",),
            detail={"dose": dose, "within budget": bool(self.dose), "kl": float(np.asarray(self.found["kl"])[at])},
        )

    def responds(self) -> Finding:
        """The more, the more."""
        return self._finding(
            f"the response rises with the dose (Spearman {float(self.found['monotonicity']):.2f}; the other way on "
            f"{float(self.found['backfires']):.0%} of the prompts)",
            float(self.found["slope"]),
            "log odds a unit of dose",
            {kind: np.asarray(self.found[f"{kind} slopes"]) for kind in self.kinds},
            "greater",
            self._slopes(),
            tags=("dose response",),
            detail={"monotonicity": self.found["monotonicity"], "backfires": self.found["backfires"]},
        )

    def _slopes(self) -> Interval | None:
        doses, effects = np.asarray(self.found["doses"]), np.asarray(self.found["effects"])
        centred = doses - doses.mean()
        slopes = centred @ effects / (centred @ centred)
        return bootstrap_interval(slopes, seed=self.ctx.seed) if len(slopes) > 1 else None

    def spares(self) -> Finding:
        """What it costs on unrelated text."""
        at = self._at
        return self._finding(
            f"on unrelated text a dose of {float(self.found['doses'][at]):g} changes the model less than other "
            "directions of its norm do",
            float(np.asarray(self.found["kl"])[at]),
            "nats a token (KL)",
            {kind: np.asarray(self.found[f"{kind} kl"])[:, at] for kind in self.kinds},
            "less",
            None,
            tags=("side effect",),
        )

    def summary(self) -> tuple[str, ...]:
        """Headline lines."""
        moves, responds, _ = self.findings()
        at = self._at
        odds = f"{moves.estimate:+.2f} log odds at a dose of {self.found['doses'][at]:g} ({moves.verdict})"
        costs = (
            f"KL {float(np.asarray(self.found['kl'])[at]):.3f} and CE {float(np.asarray(self.found['ce'])[at]):+.3f}"
        )
        return (
            f"{self.spec.data.stem} at {self.site}: {odds}; it costs {costs} nats a token on unrelated text.",
            f"Dose response: {responds.claim.partition('(')[2].rstrip(')')} ({responds.verdict}).",
        )

    def views(self) -> tuple[View, ...]:
        """The charts."""
        doses = [float(dose) for dose in self.found["doses"]]
        effects = np.asarray(self.found["effects"]).mean(1)
        bands = []
        for kind in self.kinds:
            values = np.asarray(self.found[f"{kind} effects"])
            low, high = np.quantile(values, (0.025, 0.975), axis=0)
            bands.append(Series(name=kind, values=values.mean(0).tolist(), low=low.tolist(), high=high.tolist()))
        guard = ("kl", "KL"), ("ce", "change of cross-entropy")
        found: list[View] = [
            Lines(
                id="response",
                section="Dose and response",
                title="Behaviour by dose",
                caption="Mean change over prompts; each control with the band that holds 95% of its vectors.",
                x=doses,
                series=(Series(name="direction", values=effects.tolist()), *bands),
                x_title="dose, in mean norms of the activations",
                y_title="change of log odds",
                python=self.python,
            ),
            Lines(
                id="guard",
                section="Dose and response",
                title="Unrelated text by dose",
                caption=f"The budget is a KL of {self.spec.kl:g} and a rise of {self.spec.ce:g}.",
                x=doses,
                series=tuple(Series(name=name, values=np.asarray(self.found[key]).tolist()) for key, name in guard),
                x_title="dose, in mean norms of the activations",
                y_title="nats a token",
                python=self.python,
            ),
        ]
        if "semantic" in self.kinds:
            at = self._at
            named = np.asarray(self.found["semantic effects"])[:, at].tolist()
            found.append(
                Bars(
                    id="semantic",
                    section="Dose and response",
                    title=f"Other meanings at a dose of {doses[at]:g}",
                    labels=[self.spec.data.stem, *self.found["names"]],
                    values=[float(effects[at]), *named],
                    unit="change of log odds",
                    python=self.python,
                )
            )
        return tuple(found)

    def warnings(self) -> tuple[str, ...]:
        """What to know before believing any of it."""
        found = []
        if not self.dose:
            found.append(
                f"No positive dose keeps to the budget (KL {self.spec.kl:g}, CE {self.spec.ce:g}): try smaller."
            )
        agreement = float(self.direction["agreement"])
        if agreement < 0.1:
            found.append(f"The pairs hardly agree (mean cosine {agreement:.2f}): on some prompts it will backfire.")
        if "semantic" not in self.kinds:
            found.append("No semantic controls: give contrasts to see what directions of other meanings do.")
        elif len(self.inputs.contrasts) < 19:
            found.append(f"{len(self.inputs.contrasts)} semantic controls describe, and are too few for a test.")
        return tuple(found)
