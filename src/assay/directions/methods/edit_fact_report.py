"""The `edit-fact` study: what the measurements say."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from assay.base.findings import Finding
from assay.base.method import Context
from assay.base.stats import Interval, Side, bootstrap_interval
from assay.base.views import Bars, Cell, Distribution, Table, View
from assay.controls.verdicts import compare, verdict
from assay.directions.methods.edit_fact import EditFactSpec
from assay.directions.methods.edit_fact_job import ARMS

ENOUGH = 10
"""Facts, below which an interval over them is called weak."""

UNIT = "rise of the log odds of the new object (nats)"

_OfRises = Callable[[int, Sequence[float], float], float | None]
"""From a fact's number, the rises of its prompts and its cost on unrelated text; None where it is not asked."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Report:
    """What the measurements say.

    Args:
        rows: The facts.
        spec: The spec.
        block: Whose MLP.
        edits: What the edits moved.
        controls: What their controls moved.
        python: The Python of the study.
        ctx: The context.
    """

    rows: Sequence[Mapping[str, Any]]
    spec: EditFactSpec
    block: int
    edits: Mapping[str, Any]
    controls: Mapping[str, Any]
    python: str
    ctx: Context

    def parts(self, which: int, rises: Sequence[float]) -> tuple[float, Sequence[float], Sequence[float]]:
        """The rises of a fact's prompts: the prompt's own, those of paraphrases, those of neighbours."""
        split = 1 + len(self.rows[which].get("paraphrases", ()))
        return rises[0], rises[1:split], rises[split:]

    def prompt(self, which: int, rises: Sequence[float], _: float) -> float | None:
        """Efficacy."""
        return self.parts(which, rises)[0]

    def paraphrases(self, which: int, rises: Sequence[float], _: float) -> float | None:
        """Generalisation."""
        found = self.parts(which, rises)[1]
        return float(np.mean(found)) if found else None

    def apart(self, which: int, rises: Sequence[float], _: float) -> float | None:
        """Specificity: how much more the fact moves than its neighbours."""
        own, __, others = self.parts(which, rises)
        return own - float(np.mean(others)) if others else None

    def cost(self, _: int, __: Sequence[float], cost: float) -> float | None:
        """What unrelated text loses."""
        return cost

    def each(self, what: _OfRises) -> list[float]:
        """A number a fact, of those that are asked."""
        found = [what(i, self.edits["rises"][i], self.edits["costs"][i]) for i in range(len(self.rows))]
        return [value for value in found if value is not None]

    def null(self, arm: str, what: _OfRises) -> list[float]:
        """The mean over facts, a draw."""
        rises, costs = self.controls[f"{arm} rises"], self.controls[f"{arm} costs"]
        found = []
        for draw in range(len(rises[0])):
            values = [what(i, rises[i][draw], costs[i][draw]) for i in range(len(self.rows))]
            found.append(float(np.mean([value for value in values if value is not None])))
        return found

    def share(self, kind: str, after: int = 1) -> list[float]:
        """The share of prompts of a kind where the new object is likelier, a fact."""
        found = []
        for score in self.edits["scores"]:
            new, true = (score[kind][after][name] for name in ("target", "original"))
            if new:
                found.append(float(np.mean(np.asarray(new) > np.asarray(true))))
        return found

    def _finding(self, what: _OfRises, claim: str, tag: str, side: Side = "greater", unit: str = UNIT) -> Finding:
        values = np.asarray(self.each(what))
        estimate = float(values.mean())
        controls = tuple(compare(arm, said, estimate, self.null(arm, what), side) for arm, said in ARMS.items())
        interval = bootstrap_interval(values, seed=self.ctx.seed) if len(values) > 1 else None
        return Finding(
            claim=claim,
            estimate=estimate,
            unit=unit,
            n=len(values),
            controls=controls,
            interval=interval,
            interval_note="" if interval is not None else "one fact cannot be resampled",
            verdict=verdict(estimate, controls, interval if side == "greater" else None, claim_side=side),
            cost=self.ctx.cost(),
            provenance=self.ctx.provenance({"facts": list(self.rows)}),
            tags=(tag,),
            detail={"block": self.block, "by fact": values.tolist(), **self.shares(tag)},
        )

    def shares(self, tag: str) -> dict[str, Any]:
        """The shares of success, before and after, with an interval over facts."""
        if tag not in ("efficacy", "generalisation", "specificity"):
            return {}
        before, after = self.share(tag, 0), self.share(tag, 1)
        if tag == "specificity":  # what must not be rewritten
            before, after = [1 - share for share in before], [1 - share for share in after]
        interval = bootstrap_interval(after, seed=self.ctx.seed).to_dict() if len(after) > 1 else None
        return {"share": float(np.mean(after)), "share before": float(np.mean(before)), "share interval": interval}

    @property
    def where(self) -> str:
        """The claim's beginning."""
        return f"a rank-one change of the MLP of block {self.block}, through the subject's key,"

    def findings(self) -> tuple[Finding, ...]:
        """Every claim that the data allow."""
        before, after = (float(np.mean(self.share("efficacy", i))) for i in (0, 1))
        found = [
            self._finding(
                self.prompt,
                f"{self.where} makes the model say another object: {after:.0%} of facts, {before:.0%} before",
                "efficacy",
            )
        ]
        if self.each(self.paraphrases):
            before, after = (float(np.mean(self.share("generalisation", i))) for i in (0, 1))
            claim = f"{self.where} does so in other words: {after:.0%} of paraphrases, {before:.0%} before"
            found.append(self._finding(self.paraphrases, claim, "generalisation"))
        if self.each(self.apart):
            before, after = (1 - float(np.mean(self.share("specificity", i))) for i in (0, 1))
            claim = (
                f"{self.where} moves the fact more than its neighbours: {after:.0%} of them keep the true object, "
                f"{before:.0%} before"
            )
            found.append(self._finding(self.apart, claim, "specificity"))
        claim = f"{self.where} changes the next tokens of unrelated text less than as large a change elsewhere"
        found.append(self._finding(self.cost, claim, "cost", "less", "nats a token (KL)"))
        return tuple(found)

    def summary(self) -> tuple[str, ...]:
        """Headline lines."""
        return tuple(
            f"{found.claim}: {found.estimate:.3g} {found.unit} ({found.verdict})." for found in self.findings()
        )

    def warnings(self) -> tuple[str, ...]:
        """What to know before believing any of it."""
        found = []
        known = [score["efficacy"][0] for score in self.edits["scores"]]
        already = [
            row["subject"]
            for row, answers in zip(self.rows, known, strict=True)
            if answers["target"][0] > answers["original"][0]
        ]
        if already:
            found.append(
                f"The model prefers the new object before the edit for {', '.join(already)}: that fact is not one that "
                "it knows; leave it out."
            )
        if len(self.rows) < ENOUGH:
            found.append(f"{len(self.rows)} facts make intervals that say little: give {ENOUGH} or more.")
        missing = [name for name in ("paraphrases", "neighbours") if not any(row.get(name) for row in self.rows)]
        if missing:
            found.append(f"No fact has {' or '.join(missing)}, so the edits are not judged on them.")
        return tuple(found)

    def views(self) -> tuple[View, ...]:
        """The charts."""
        found = self.findings()
        distributions = [
            Distribution(
                id=finding.tags[0],
                section="Against chance",
                title={
                    "efficacy": "The fact itself",
                    "generalisation": "Its paraphrases",
                    "specificity": "The fact, less its neighbours",
                    "cost": "Unrelated text",
                }[finding.tags[0]],
                caption="The mean over facts, among the same of its controls.",
                null={control.name: control.null for control in finding.controls},
                estimate=finding.estimate,
                unit=finding.unit,
                python=self.python,
            )
            for finding in found
        ]
        return (self._shares(found), self._table(), *distributions)

    def _shares(self, found: Sequence[Finding]) -> Bars:
        shown = [finding for finding in found if "share" in finding.detail]
        bounds = [finding.detail["share interval"] for finding in shown]
        intervals = [None if bound is None else Interval.from_dict(bound) for bound in bounds]
        return Bars(
            id="shares",
            section="The edits",
            title="Shares of success",
            caption="The new object is likelier than the true one; for specificity, the neighbours' true one stays so.",
            labels=[finding.tags[0] for finding in shown],
            values=[finding.detail["share"] for finding in shown],
            low=[None if interval is None else interval.low for interval in intervals],
            high=[None if interval is None else interval.high for interval in intervals],
            unit="share",
            python=self.python,
        )

    def _table(self) -> Table:
        rows: list[list[Cell]] = []
        for i, row in enumerate(self.rows):
            rises, cost = self.edits["rises"][i], self.edits["costs"][i]
            own, others, neighbours = self.parts(i, rises)
            means = [float(np.mean(part)) if len(part) else None for part in (others, neighbours)]
            rows.append([row["subject"], row["original"], row["target"], own, *means, cost])
        return Table(
            id="facts",
            section="The edits",
            title="Each fact",
            caption="The rise of the log odds of the new object over the true one, and KL on unrelated text, in nats.",
            columns=["subject", "true", "new", "prompt", "paraphrases", "neighbours", "unrelated text"],
            rows=rows,
            python=self.python,
        )
