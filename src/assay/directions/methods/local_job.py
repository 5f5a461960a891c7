"""The `local` study: what is measured, held against what, and said how."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from assay.base.errors import SpecError
from assay.base.findings import Control, Finding, Findings, Verdict
from assay.base.hashing import digest
from assay.base.method import Context, Progress, StepSpec
from assay.base.rng import numpy_stream
from assay.base.snippets import snippet
from assay.base.stats import Interval, bootstrap_interval, permutation_p
from assay.base.views import Heatmap, Lines, Series, View
from assay.controls.multiplicity import max_null
from assay.controls.verdicts import compare, verdict
from assay.directions.methods.common import RATE, mean_tokens
from assay.directions.methods.local import LocalSpec
from assay.directions.methods.rows import text_rows

LEVEL = 0.05
FEW = 10
"""Texts below which an interval over them is called weak."""


def planned(card: Any, spec: LocalSpec, seed: int) -> list[StepSpec]:
    """List the steps of a study from its model's card, without loading weights."""
    texts = _read(spec)
    return [_step(texts, spec, seed, mean_tokens(card, texts), card.parameters)]


def _read(spec: LocalSpec) -> list[str]:
    if spec.k not in spec.ks:
        raise SpecError(f"k is {spec.k}, which is none of ks ({', '.join(map(str, spec.ks))}): add it there", "k")
    texts = [row["text"] for row in text_rows(spec.data, ("text",), field="data")][: spec.texts]
    if len(set(texts)) < 3:
        raise SpecError(f"{spec.data} has {len(set(texts))} different texts; the floor needs three or more", "data")
    if len(set(texts)) < len(texts):
        raise SpecError(
            f"{spec.data} has a text twice: one would be the other's unrelated text; give each once", "data"
        )
    return texts


def _step(texts: list[str], spec: LocalSpec, seed: int, length: int = 1, parameters: int = 0) -> StepSpec:
    own = {name: getattr(spec, name) for name in ("sites", "ks", "draws")}
    tokens = len(texts) * (length + sum(min(k + 1, length) for k in set(spec.ks)))
    return StepSpec(
        name="local",
        inputs={"texts": digest(texts), "seed": seed, **own},
        forwards=len(texts) * (1 + len(set(spec.ks))),
        tokens=tokens,
        seconds=tokens * parameters / RATE,
    )


def run(subject: Any, spec: LocalSpec, ctx: Context) -> Findings:
    """Measure, and say what it means."""
    texts = _read(spec)

    def measure(progress: Progress) -> Mapping[str, Any]:
        from assay.directions.local import local_processing

        found = local_processing(
            subject,
            texts,
            ks=spec.ks,
            sites=spec.sites,
            draws=spec.draws,
            seed=ctx.seed,
            progress=lambda done, total: progress(done, total, "reading"),
        )
        return {
            "sites": list(found.sites),
            "ks": list(found.ks),
            "cosine": found.by_document,
            "floor": found.floor_by_document,
            "null": found.null,
        }

    found = ctx.step(_step(texts, spec, ctx.seed), measure)
    ctx.artifact("local", arrays={name: np.asarray(found[name]) for name in ("cosine", "floor", "null")})
    report = _Report(
        name=spec.data,
        digest=digest(texts),
        spec=spec,
        sites=[str(site) for site in found["sites"]],
        ks=[int(k) for k in found["ks"]],
        cosine=np.asarray(found["cosine"]),
        floor=np.asarray(found["floor"]),
        null=np.asarray(found["null"]),
        python=snippet(subject.reference, "local", spec, ctx.seed),
        ctx=ctx,
    )
    return Findings(
        findings=report.findings(), views=report.views(), summary=report.summary(), warnings=report.warnings()
    )


@dataclass(frozen=True, slots=True, kw_only=True)
class _Report:
    """What the measurements say.

    Args:
        name: The file.
        digest: The hash of the texts.
        spec: The spec.
        sites: Where was looked.
        ks: How many tokens were kept.
        cosine: `[sites, ks, texts]`.
        floor: The mean with all other texts, `[sites, ks, texts]`.
        null: The mean over random pairs, `[draws, sites, ks]`.
        python: What runs the study again.
        ctx: The study's context.
    """

    name: Path
    digest: str
    spec: LocalSpec
    sites: list[str]
    ks: list[int]
    cosine: np.ndarray
    floor: np.ndarray
    null: np.ndarray
    python: str
    ctx: Context

    @property
    def above(self) -> np.ndarray:
        """What each text has above its floor, `[sites, ks, texts]`."""
        return np.asarray(self.cosine - self.floor)

    @property
    def at(self) -> int:
        """The place of the k that the findings speak of."""
        return self.ks.index(self.spec.k)

    @property
    def tokens(self) -> str:
        """That k, in words."""
        return "the last token alone" if self.spec.k == 1 else f"the last {self.spec.k} tokens alone"

    def findings(self) -> tuple[Finding, ...]:
        """Every claim: one a site, and the fall with depth."""
        found = tuple(self._site(i) for i in range(len(self.sites)))
        return (*found, self._fall()) if len(self.sites) > 1 else found

    def _site(self, i: int) -> Finding:
        values = self.above[i, self.at]
        estimate = float(values.mean())
        draws = self.null[:, :, self.at] - self.floor[:, self.at].mean(axis=-1)
        null = max_null(draws)
        said = "texts paired with unrelated ones at random; of each draw the largest over the sites"
        control = compare("unrelated texts", said, estimate, null)
        interval = bootstrap_interval(values, seed=self.ctx.seed)
        judged = verdict(estimate, (control,), interval)
        if judged == "contradicted" and permutation_p(estimate, max_null(draws, "less"), "less") > LEVEL:
            judged = "not distinguishable from control"  # below the largest of many sites is not below the floor
        alone = {"last token alone": float(self.cosine[i, 0].mean())} if self.ks[0] == 1 else {}
        return self._finding(
            f"at {self.sites[i]}, {self.tokens} give more of the last token's activation than unrelated texts do",
            estimate,
            control,
            interval,
            ("local", self.sites[i]),
            judged,
            cosine=float(self.cosine[i, self.at].mean()),
            floor=float(self.floor[i, self.at].mean()),
            k=self.spec.k,
            family=len(self.sites),
            **alone,
        )

    def _fall(self) -> Finding:
        values = self.cosine[:, self.at]  # [sites, texts]
        fall = values[0] - values[-1]
        rng = numpy_stream(self.ctx.seed, "local", "sites")
        n = values.shape[1]
        null = []
        for _ in range(self.spec.draws):
            order = rng.permuted(np.tile(np.arange(len(self.sites)), (n, 1)), axis=1)
            null.append((values[order[:, 0], np.arange(n)] - values[order[:, -1], np.arange(n)]).mean())
        control = compare("sites exchanged", "the sites put in a random order within each text", fall.mean(), null)
        interval = bootstrap_interval(fall, seed=self.ctx.seed)
        return self._finding(
            f"what {self.tokens} give falls from {self.sites[0]} to {self.sites[-1]}",
            float(fall.mean()),
            control,
            interval,
            ("fall",),
            verdict(float(fall.mean()), (control,), interval),
            k=self.spec.k,
        )

    def _finding(
        self,
        claim: str,
        estimate: float,
        control: Control,
        interval: Interval,
        tags: tuple[str, ...],
        judged: Verdict,
        **detail: Any,
    ) -> Finding:
        return Finding(
            claim=claim,
            estimate=estimate,
            unit="centred cosine" if "fall" in tags else "centred cosine above the floor",
            n=self.cosine.shape[-1],
            controls=(control,),
            interval=interval,
            verdict=judged,
            cost=self.ctx.cost(),
            provenance=self.ctx.provenance(self.digest),
            tags=tags,
            detail=detail,
        )

    def summary(self) -> tuple[str, ...]:
        """Headline lines."""
        cosine, floor = self.cosine[:, self.at].mean(-1), self.floor[:, self.at].mean(-1)
        ends = [0, len(self.sites) // 2, len(self.sites) - 1] if len(self.sites) > 2 else range(len(self.sites))
        said = "; ".join(f"{self.sites[i]} {cosine[i]:.2f} (floor {floor[i]:+.2f})" for i in ends)
        local = sum(finding.verdict == "supported" for finding in self.findings()[: len(self.sites)])
        return (
            f"Centred cosine of {self.tokens} with the whole context: {said}.",
            f"Above unrelated texts at {local} of {len(self.sites)} sites, {self.cosine.shape[-1]} texts.",
        )

    def warnings(self) -> tuple[str, ...]:
        """What to know before believing any of it."""
        n = self.cosine.shape[-1]
        few = (f"{n} texts make rough intervals and a rough centre: give more.",) if n < FEW else ()
        first = self.above[:, 0].mean() if self.ks[0] == 1 else 1.0
        same = ("One token kept is no nearer than unrelated texts: do all texts end in the same token?",)
        return few + (same if first < 1e-6 else ())

    def views(self) -> tuple[View, ...]:
        """The charts."""

        def line(j: int) -> Series:
            values = self.cosine[:, j]
            found = [bootstrap_interval(row, seed=self.ctx.seed) for row in values]
            low, high = [interval.low for interval in found], [interval.high for interval in found]
            return Series(name=f"last {self.ks[j]}", values=values.mean(-1).tolist(), low=low, high=high)

        floor = Series(name="unrelated texts", values=self.floor[:, self.at].mean(-1).tolist())
        return (
            Lines(
                id="cosine",
                section="By depth",
                title="How much is there with the last tokens alone",
                caption=f"Centred cosine with the whole context; bands over texts. Unrelated texts at {self.spec.k}.",
                x=self.sites,
                series=[*(line(j) for j in range(len(self.ks))), floor],
                x_title="site",
                y_title="centred cosine",
                python=self.python,
            ),
            Heatmap(
                id="above",
                section="By depth",
                title="Above the floor",
                rows=self.sites,
                columns=[str(k) for k in self.ks],
                values=self.above.mean(-1).tolist(),
                column_title="tokens kept",
                unit="centred cosine above the floor",
                python=self.python,
            ),
        )
