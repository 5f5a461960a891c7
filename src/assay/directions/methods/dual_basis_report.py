"""What the measurements of the `dual-basis` study say."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from assay.base.findings import Finding
from assay.base.hashing import digest
from assay.base.method import Context
from assay.base.stats import Interval, Side, bootstrap_interval
from assay.base.views import Bars, Heatmap, Table, View
from assay.controls.verdicts import compare, verdict
from assay.directions.methods.concepts import Concepts
from assay.directions.methods.dual_basis import DualBasisSpec
from assay.directions.methods.rows import text_rows

FORMS = ("probe", "dual", "on-distribution dual")
DRAWN = {
    "isotropic": "vectors of the same norms in any direction, run through the same measurement",
    "covariance-matched": "vectors of the same norms drawn from the covariance of the activations at the site",
}
PLACES = ("site", "later")
UNIT = "class gaps"
Moved = np.ndarray
"""`[text, readout, concept written]`, in gaps between class means."""


@dataclass(frozen=True, slots=True)
class Inputs:
    """The texts of a study."""

    data: Concepts
    unrelated: list[str]

    @classmethod
    def read(cls, spec: DualBasisSpec) -> Inputs:
        """Read both files."""
        unrelated = [row["text"] for row in text_rows(spec.unrelated, ("text",), field="unrelated")]
        return cls(Concepts.read(spec.data), unrelated)

    @property
    def digest(self) -> str:
        """The hash of all texts."""
        return digest([self.data.digest, self.unrelated])


def diagonal(moved: Moved) -> np.ndarray:
    """The mean over texts of how far the targets' own readouts move; the mean over concepts."""
    return np.asarray(np.einsum("...kk->...k", moved).mean(-1))


def others(moved: Moved) -> np.ndarray:
    """The mean size of the entries off the diagonal of matrices `[..., readout, written]`."""
    k = moved.shape[-1]
    return np.asarray(np.abs(moved)[..., ~np.eye(k, dtype=bool)].mean(-1))


def worst(moved: Moved) -> np.ndarray:
    """The largest entry off the diagonal."""
    k = moved.shape[-1]
    return np.asarray(np.abs(moved)[..., ~np.eye(k, dtype=bool)].max(-1))


@dataclass(frozen=True, slots=True, kw_only=True)
class Report:
    """What the measurements say.

    Args:
        inputs: The texts.
        spec: The spec.
        sites: Where is written, and where is read again.
        fitted: Probes at both sites, and the vectors.
        moved: Movements of readouts, by place, form and control.
        guard: KL on unrelated text, by form.
        python: What runs the study again.
        ctx: The study's context.
    """

    inputs: Inputs
    spec: DualBasisSpec
    sites: tuple[str, str]
    fitted: Mapping[str, Any]
    moved: Mapping[str, Any]
    guard: Mapping[str, Any]
    python: str
    ctx: Context

    def _moved(self, place: str, form: str) -> Moved:
        return np.asarray(self.moved[f"{place} {form}"])

    def _null(self, place: str, form: str, kind: str) -> Moved:
        """`[draw, readout, concept written]`."""
        return np.asarray(self.moved[f"{place} {form} {kind}"])

    @property
    def _where(self) -> dict[str, str]:
        return dict(zip(PLACES, self.sites, strict=True))

    @property
    def _groups(self) -> list[str]:
        return [self.inputs.data.groups[i] for i in np.asarray(self.moved["rows"])]

    def leak(self, place: str, form: str) -> float:
        """How far the others move for each unit that the target moves."""
        moved = self._moved(place, form).mean(0)
        return float(others(moved) / abs(diagonal(moved)))

    def _finding(
        self,
        claim: str,
        estimate: float,
        nulls: Mapping[str, np.ndarray],
        side: Side,
        interval: Interval | None,
        tags: tuple[str, ...],
        **detail: Any,
    ) -> Finding:
        controls = tuple(compare(kind, DRAWN[kind], estimate, null, side) for kind, null in nulls.items())
        return Finding(
            claim=claim,
            estimate=estimate,
            unit=UNIT,
            n=len(self._groups),
            controls=controls,
            interval=interval,
            interval_note=""
            if interval is not None
            else "a linear readout where it is written: every text moves alike",
            verdict=verdict(estimate, controls, interval if side == "greater" else None, claim_side=side),
            cost=self.ctx.cost(),
            provenance=self.ctx.provenance(self.inputs.digest),
            tags=tags,
            detail=detail,
        )

    def _measure(self, place: str, form: str, statistic: Any, claim: str, side: Side, name: str) -> Finding:
        """One statistic of one form's matrix, against the same of random vectors."""
        moved = self._moved(place, form)
        estimate = float(statistic(moved.mean(0)))
        interval = None
        if place == "later":
            interval = bootstrap_interval(
                moved, lambda rows: float(statistic(rows.mean(0))), seed=self.ctx.seed, groups=self._groups
            )
        nulls = {kind: statistic(self._null(place, form, kind)) for kind in DRAWN}
        detail = {"matrix": moved.mean(0).tolist(), "leak": self.leak(place, form)}
        if place == "site":
            detail["spread over texts"] = float(np.ptp(moved, axis=0).max())
        return self._finding(claim, estimate, nulls, side, interval, (place, form, name), **detail)

    def findings(self) -> tuple[Finding, ...]:
        """Every claim."""
        return (*self._at_site(), *self._downstream(), self.quieter())

    def _at_site(self) -> Iterator[Finding]:
        site = self._where["site"]
        yield self._measure(
            "site", "probe", others,
            f"at {site}, adding a probe's own vector moves the other listed readouts, more than other vectors of its "
            "norm do", "greater", "others",
        )  # fmt: skip
        for form in FORMS[1:]:
            yield self._measure(
                "site", form, worst,
                f"at {site}, adding the {form} moves no other listed readout (the largest movement)", "less", "others",
            )  # fmt: skip

    def _downstream(self) -> Iterator[Finding]:
        later = self._where["later"]
        for form in FORMS:
            what = "a probe's own vector" if form == "probe" else f"the {form}"
            yield self._measure(
                "later", form, diagonal, f"at {later}, downstream, {what} still moves its target", "greater", "target"
            )
            more: Side = "greater" if form == "probe" else "less"
            than = "more" if form == "probe" else "less"
            yield self._measure(
                "later", form, others,
                f"at {later}, downstream, {what} moves the other listed readouts {than} than other vectors of its norm "
                "do", more, "others",
            )  # fmt: skip

    def quieter(self) -> Finding:
        """Downstream, the dual moves the others less than the probe's own vector does."""
        both = np.stack([self._moved("later", form) for form in FORMS[:2]], axis=1)

        def statistic(rows: np.ndarray) -> float:
            probe, dual = rows.mean(0)
            return float(others(probe) - others(dual))

        nulls = {
            kind: others(self._null("later", "probe", kind)) - others(self._null("later", "dual", kind))
            for kind in DRAWN
        }
        return self._finding(
            f"at {self._where['later']}, downstream, the dual moves the other listed readouts less than the probe's "
            "own vector does (the difference)",
            statistic(both),
            nulls,
            "greater",
            bootstrap_interval(both, statistic, seed=self.ctx.seed, groups=self._groups),
            ("later", "dual against probe"),
            leak={form: self.leak("later", form) for form in FORMS},
        )

    def kl(self, form: str) -> float:
        """What a form costs on unrelated text."""
        return float(np.asarray(self.guard[form]).mean())

    def summary(self) -> tuple[str, ...]:
        """Headline lines."""
        names = ", ".join(self.inputs.data.names)
        leaks = {place: "; ".join(f"{form} {self.leak(place, form):.2g}" for form in FORMS) for place in PLACES}
        costs = "; ".join(f"{form} {self.kl(form):.2g}" for form in FORMS)
        return (
            f"{names}: condition number {float(self.fitted['condition']):.2f} at {self.sites[0]}.",
            f"Movement of the other readouts for each unit of the target: at {self.sites[0]} {leaks['site']}; "
            f"at {self.sites[1]} {leaks['later']}.",
            f"KL on unrelated text, nats a token: {costs}.",
        )

    def warnings(self) -> tuple[str, ...]:
        """What to know before believing any of it."""
        found = []
        for place, site in self._where.items():
            scores = np.asarray(self.fitted[f"{place} auroc"])
            weak = [
                f"{name} ({score:.2f})"
                for name, score in zip(self.inputs.data.names, scores, strict=True)
                if score < 0.7
            ]
            if weak:
                found.append(
                    f"At {site} the probes hardly read {', '.join(weak)} on new groups (AUROC): so do movements."
                )
        if self.spec.ridge:
            found.append(f"With a ridge of {self.spec.ridge:g} the duals are not exact: readouts are not kept still.")
        if len(set(self._groups)) < 5:
            found.append(f"{len(set(self._groups))} held-out groups make rough intervals: bring more.")
        return tuple(found)

    def views(self) -> tuple[View, ...]:
        """The charts."""
        names, code = self.inputs.data.names, self.python
        found: list[View] = [
            Heatmap(
                id=f"{place}-{form.replace(' ', '-')}",
                section=f"What moves at {self._where[place]}",
                title=f"Written by the {form}",
                caption="Mean over held-out texts.",
                rows=[f"reads {name}" for name in names],
                columns=[f"writes {name}" for name in names],
                values=self._moved(place, form).mean(0).tolist(),
                unit=UNIT,
                python=code,
            )
            for place in PLACES
            for form in FORMS
        ]
        sizes = {form: np.linalg.norm(np.asarray(self.fitted[form]), axis=1) for form in FORMS}
        found.append(
            Bars(
                id="guard",
                section="What it costs",
                title="KL of the next token on unrelated text",
                labels=[name for _ in FORMS for name in names],
                groups=[form for form in FORMS for _ in names],
                values=[float(value) for form in FORMS for value in np.asarray(self.guard[form]).mean(1)],
                unit="nats a token",
                python=code,
            )
        )
        found.append(
            Table(
                id="probes",
                section="The probes",
                title="What is read and written",
                caption="AUROC on held-out groups; norms in mean norms of the activations at the site.",
                columns=["concept", *(f"AUROC at {site}" for site in self.sites), *(f"norm, {form}" for form in FORMS)],
                rows=[
                    [
                        name,
                        *(float(np.asarray(self.fitted[f"{place} auroc"])[i]) for place in PLACES),
                        *(float(sizes[form][i] / float(self.fitted["size"])) for form in FORMS),
                    ]
                    for i, name in enumerate(names)
                ],
                python=code,
            )
        )
        return tuple(found)
