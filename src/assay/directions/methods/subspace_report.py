"""The `subspace` study: what the measurements say."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from assay.base.findings import Control, Finding
from assay.base.method import Context
from assay.base.stats import bootstrap_interval
from assay.base.views import Bars, Distribution, Lines, Series, View
from assay.controls.verdicts import compare, verdict
from assay.directions.methods.subspace import SubspaceSpec
from assay.directions.methods.subspace_job import CAUSE, changes

ENOUGH = 10
"""Held-out groups, below which an interval over them is called weak."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Report:
    """What the measurements say.

    Args:
        rows: The rows.
        spec: The spec.
        site: Where.
        fit: The subspace, and the rows it was fitted on.
        scores: What held-out rows were answered.
        refits: The accuracy of subspaces fitted to permuted answers.
        python: The Python of the study.
        ctx: The context.
    """

    rows: Sequence[Mapping[str, str]]
    spec: SubspaceSpec
    site: str
    fit: Mapping[str, Any]
    scores: Mapping[str, Any]
    refits: Sequence[float]
    python: str
    ctx: Context

    @property
    def k(self) -> int:
        """The subspace's dimension."""
        return len(self.fit["basis"])

    @property
    def attributes(self) -> np.ndarray:
        """What each held-out row is about: cause, or an attribute that must stay."""
        held = [self.rows[int(i)] for i in self.fit["test"]]
        return np.asarray([CAUSE if changes(row) else row["attribute"] for row in held])

    @property
    def groups(self) -> np.ndarray:
        """The group of each held-out row."""
        return np.asarray([self.rows[int(i)]["group"] for i in self.fit["test"]])

    def of_cause(self, hits: Any) -> Any:
        """The share of changed answers, of one exchange or of several."""
        return np.asarray(hits)[..., self.attributes == CAUSE].mean(-1)

    def kept(self, hits: Any) -> dict[str, Any]:
        """The share of other attributes that stays, by attribute."""
        names = sorted(set(self.attributes.tolist()) - {CAUSE})
        return {name: np.asarray(hits)[..., self.attributes == name].mean(-1) for name in names}

    def disentangled(self, hits: Any) -> Any:
        """RAVEL's score: the mean of cause and of the mean of isolate."""
        kept = self.kept(hits)
        return (self.of_cause(hits) + sum(kept.values()) / len(kept)) / 2

    def _random(self, of: Any, estimate: float) -> Control:
        said = f"random subspaces of the same dimension ({self.k})"
        return compare("random subspaces", said, estimate, of(self.scores["random"]))

    def _shown(self, of: Any) -> tuple[Control, Control]:
        """What only describes: one number each."""
        pca, whole = (float(of(self.scores[name])) for name in ("pca", "whole"))
        said = "of the rows it was fitted on, as many as there are up to the same dimension"
        return (
            Control(name="principal components", description=f"the principal components {said}", null=(pca,)),
            Control(name="whole site", description="the whole site exchanged", null=(whole,)),
        )

    def cause(self) -> Finding:
        """The exchange gives the source's answer in groups that were not fitted on."""
        hits = np.asarray(self.scores["fitted"])[self.attributes == CAUSE]
        groups = self.groups[self.attributes == CAUSE].tolist()
        estimate = float(hits.mean())
        tests = [
            self._random(self.of_cause, estimate),
            compare(
                "permuted answers",
                "the answers of other held-out rows expected",
                estimate,
                self.scores["permuted"],
            ),
        ]
        if self.refits:
            tests.append(compare("refits", "subspaces fitted to permuted answers", estimate, self.refits))
        interval = bootstrap_interval(hits, seed=self.ctx.seed, groups=groups)
        shown = self._shown(self.of_cause)
        return Finding(
            claim=f"exchanging {self.k} dimensions of {self.site} makes the model answer with the source's value, in "
            f"groups that were not fitted on (the whole site: {shown[1].null[0]:.2f})",
            estimate=estimate,
            unit="interchange accuracy",
            n=len(set(groups)),
            controls=(*tests, *shown),
            interval=interval,
            verdict=verdict(estimate, tests, interval),
            cost=self.ctx.cost(),
            provenance=self.ctx.provenance(list(map(dict, self.rows))),
            tags=("cause",),
            detail={"rows": len(hits), "fitted rows": len(self.fit["train"]), "on fitted rows": self.fit["own"]},
        )

    def ravel(self) -> Finding:
        """The exchange leaves other attributes alone."""
        hits = np.asarray(self.scores["fitted"])
        estimate = float(self.disentangled(hits))
        tests = (self._random(self.disentangled, estimate),)
        kept = {name: float(value) for name, value in self.kept(hits).items()}
        stays = ", ".join(f"{name} {value:.2f}" for name, value in kept.items())
        return Finding(
            claim=f"{self.k} dimensions of {self.site} carry what is exchanged and leave the rest (isolate: {stays})",
            estimate=estimate,
            unit="disentangle: mean of cause and isolate; 0.5 for doing nothing",
            n=len(set(self.groups.tolist())),
            controls=(*tests, *self._shown(self.disentangled)),
            interval_note="a mean of shares; the interval of cause is beside it",
            verdict=verdict(estimate, tests),
            cost=self.ctx.cost(),
            provenance=self.ctx.provenance(list(map(dict, self.rows))),
            tags=("ravel",),
            detail={"cause": float(self.of_cause(hits)), "isolate": kept},
        )

    def illusion(self) -> Finding:
        """The direction that varies most does what the whole site does, and is read."""
        found = self.scores["illusion"]
        groups = self.groups[self.attributes == CAUSE].tolist()
        estimate = float(found["v"])
        interval = bootstrap_interval(found["rises"], seed=self.ctx.seed, groups=groups)
        controls = (compare("random directions", "random directions of the same site", estimate, found["random"]),)
        judged = verdict(estimate, controls, interval)
        if judged == "supported" and found["reasons"]:
            judged = "contradicted"
        parts = f"read part {found['v_row']:.2f}, unread part {found['v_null']:.2f}, " if found["split"] else ""
        return Finding(
            claim=f"patching the subspace's leading direction moves the answer, and is no illusion ({parts}whole site "
            f"{found['full']:.2f}{'; ' + '; '.join(found['reasons']) if found['reasons'] else ''})",
            estimate=estimate,
            unit="rise of the logit of the source's answer over the base's",
            n=len(set(groups)),
            controls=controls,
            interval=interval,
            verdict=judged,
            cost=self.ctx.cost(),
            provenance=self.ctx.provenance(list(map(dict, self.rows))),
            tags=("illusion",),
            detail={
                name: found[name] for name in ("v", "v_row", "v_null", "full", "row_share", "null_share", "reasons")
            },
        )

    def findings(self) -> tuple[Finding, ...]:
        """Every claim that the data allow."""
        middle = (self.ravel(),) if self.kept(self.scores["fitted"]) else ()
        return (self.cause(), *middle, self.illusion())

    def summary(self) -> tuple[str, ...]:
        """Headline lines."""
        return tuple(f"{found.claim}: {found.estimate:.3g} ({found.verdict})." for found in self.findings())

    def warnings(self) -> tuple[str, ...]:
        """What to know before believing any of it."""
        found = []
        used = len(self.fit["train"]) + len(self.fit["test"])
        if used < len(self.rows):
            found.append(
                f"{len(self.rows) - used} of {len(self.rows)} rows are left out: their base is not answered rightly."
            )
        n = len(set(self.groups[self.attributes == CAUSE].tolist()))
        if n < ENOUGH:
            found.append(f"{n} groups are held out, which makes intervals that say little: give more.")
        if not self.kept(self.scores["fitted"]):
            found.append("No row says what must stay, so a subspace that exchanges everything would score as well.")
        whole = float(self.of_cause(self.scores["whole"]))
        if whole < 0.5:
            found.append(f"Exchanging the whole of {self.site} gives {whole:.2f}: the value is not there to be found.")
        return tuple(found)

    def views(self) -> tuple[View, ...]:
        """The charts."""
        cause, illusion = self.cause(), self.scores["illusion"]
        names = {"fitted": "fitted", "pca": "principal components", "whole": "whole site"}
        labels, values, groups = [], [], []
        for name in sorted(set(self.attributes.tolist()), key=lambda name: (name != CAUSE, name)):
            for key, said in names.items():
                labels.append(said)
                values.append(float(np.asarray(self.scores[key])[self.attributes == name].mean()))
                groups.append(name)
        tests = [control for control in cause.controls if control.p is not None]
        parts = ("v", "v_row", "v_null", "full")
        return (
            Bars(
                id="shares",
                section="The subspace",
                title="Held-out rows answered as they should be",
                caption="cause: the source's value is said. Others: the base's own is kept.",
                labels=labels,
                values=values,
                groups=groups,
                unit="share",
                python=self.python,
            ),
            Distribution(
                id="cause",
                section="The subspace",
                title="Interchange accuracy among its controls",
                null={control.name: control.null for control in tests},
                estimate=cause.estimate,
                unit="share",
                python=self.python,
            ),
            Bars(
                id="illusion",
                section="The illusion test",
                title="What the leading direction's parts do",
                caption=""
                if illusion["split"]
                else "All of the residual stream is read later: there is no unread part.",
                labels=["the direction", "its read part", "its unread part", "the whole site"],
                values=[float(illusion[name]) for name in parts],
                unit="logits",
                python=self.python,
            ),
            Lines(
                id="losses",
                section="How it was made",
                title="The loss of each step",
                x=list(range(len(self.fit["losses"]))),
                series=[Series(name="cross-entropy", values=list(self.fit["losses"]))],
                x_title="step",
                y_title="nats",
                python=self.python,
            ),
        )
