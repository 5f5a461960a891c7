"""The `probe` study: what is measured, held against what, and said how."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np

from assay.base.findings import Control, Finding, Findings
from assay.base.method import Context, Progress, StepSpec
from assay.base.snippets import snippet
from assay.base.stats import Interval
from assay.base.views import Bars, Distribution, Lines, Series, View
from assay.controls.multiplicity import familywise_p, max_null
from assay.controls.verdicts import compare, verdict
from assay.directions.labelled import Labelled
from assay.directions.methods.common import POSITIONS, RATE, mean_tokens
from assay.directions.methods.probe import ProbeSpec
from assay.directions.methods.rows import classes, codes, in_groups, repeated_texts, two_classes

KINDS = ("gaussian", "spectrum")
LEAST_DRAWS = 19
"""The draws of a null without which no p can be 0.05."""


def planned(card: Any, spec: ProbeSpec, seed: int) -> list[StepSpec]:
    """List the steps of a study from its model's card, without loading weights."""
    data = _read(spec)
    length = mean_tokens(card, data.texts)
    seconds = card.parameters * len(data) * length / RATE
    return list(_Steps(data, spec, seed, length, seconds).all())


def run(subject: Any, spec: ProbeSpec, ctx: Context) -> Findings:
    """Measure, and say what it means."""
    data = _read(spec)
    steps = _Steps(data, spec, ctx.seed)
    found = _Measured(subject, data, spec, ctx.seed)
    sites = ctx.step(steps.sites(), found.sites)
    texts = ctx.step(steps.texts(), found.texts)
    tasks = ctx.step(steps.tasks(), found.tasks)
    untrained = {
        kind: [ctx.step(steps.untrained(kind, i), found.untrained(kind, i)) for i in range(spec.untrained)]
        for kind in KINDS
    }
    ctx.artifact("probe", arrays={"weight": np.asarray(sites["weight"]), "bias": np.asarray(sites["bias"])})
    rows = {name: np.asarray(sites[name]).tolist() for name in ("test", "readout")}
    ctx.artifact("held_out", table={**rows, "label": [data.labels[i] for i in rows["test"]]})
    python = snippet(subject.reference, "probe", spec, ctx.seed)
    report = _Report(
        data=data, spec=spec, sites=sites, texts=texts, tasks=tasks, untrained=untrained, python=python, ctx=ctx
    )
    return Findings(
        findings=report.findings(), views=report.views(), summary=report.summary(), warnings=report.warnings()
    )


def _read(spec: ProbeSpec) -> Labelled:
    return in_groups(two_classes(spec.data, "a probe tells two classes apart"), spec.data)


@dataclass(frozen=True, slots=True)
class _Steps:
    """The steps of one study."""

    data: Labelled
    spec: ProbeSpec
    seed: int
    length: int = 1
    seconds: float = 0.0

    def _step(self, name: str, *fields: str, forwards: bool = True, **more: Any) -> StepSpec:
        values = {field: getattr(self.spec, field) for field in ("sites", "kind", "position", "test", *fields)}
        n = len(self.data) if forwards else 0
        return StepSpec(
            name=name,
            inputs={"data": self.data.digest, "seed": self.seed, **values, **more},
            forwards=n,
            tokens=n * self.length,
            seconds=self.seconds if forwards else 1.0,
        )

    def sites(self) -> StepSpec:
        """The probe at every site, and on permuted labels."""
        return self._step("sites", "permutations")

    def texts(self) -> StepSpec:
        """What tells the classes apart without the model."""
        return self._step("without the model", forwards=False)

    def tasks(self) -> StepSpec:
        """Random labels of words."""
        return self._step("control tasks", "tasks", forwards=False)

    def untrained(self, kind: str, number: int) -> StepSpec:
        """The same on untrained weights."""
        return self._step(f"untrained {kind} {number + 1}", untrained=[kind, number])

    def all(self) -> list[StepSpec]:
        """Every step, in order."""
        untrained = [self.untrained(kind, i) for kind in KINDS for i in range(self.spec.untrained)]
        return [self.sites(), self.texts(), self.tasks(), *untrained]


class _Measured:
    """What is measured; activations are read once, and only if something needs them.

    Args:
        subject: The subject.
        data: The labelled texts.
        spec: The spec.
        seed: The study's seed.
    """

    def __init__(self, subject: Any, data: Labelled, spec: ProbeSpec, seed: int) -> None:
        self.subject, self.data, self.spec, self.seed = subject, data, spec, seed
        self.y = codes(data)
        self._told: Progress | None = None
        self._null: tuple[str, Any] = ("", None)

    @cached_property
    def split(self) -> Any:
        """Groups to fit on and groups to test on."""
        from assay.directions.probes.splits import grouped_split

        return grouped_split(self.data.groups, self.y, test=self.spec.test, seed=self.seed)

    @cached_property
    def rows(self) -> dict[str, np.ndarray]:
        """Activations of the subject, by site."""
        return self.read(self.subject, self._told)

    def read(self, subject: Any, progress: Progress | None) -> dict[str, np.ndarray]:
        """Activations of a model, by site."""
        from assay.directions.data import read_sites

        position = POSITIONS[self.spec.position]
        return read_sites(subject, self.data.texts, self.spec.sites, positions=position, progress=progress)

    def choose(self, rows: Mapping[str, np.ndarray], train: np.ndarray) -> str:
        """The site whose probe does best on groups that are held out inside the training rows."""
        from assay.directions.probes.permutations import permuted_probes
        from assay.directions.probes.splits import Split, grouped_split

        if len(rows) == 1:
            return next(iter(rows))
        inner = grouped_split([self.data.groups[i] for i in train], self.y[train], test=0.3, seed=self.seed)
        split = Split(train=train[inner.train], test=train[inner.test])
        found = permuted_probes(self.spec.kind, rows, self.y, self.data.groups, split=split, n=1, seed=self.seed)
        return found.best

    def sites(self, progress: Progress) -> Mapping[str, Any]:
        """The probe at every site and on permuted labels; the probe that is reported, and what it reads."""
        from assay.directions.probes.linear import fit_linear
        from assay.directions.probes.permutations import permuted_probes
        from assay.directions.probes.scores import evaluate

        self._told = progress
        rows, split = self.rows, self.split
        site = self.choose(rows, split.train)
        found = permuted_probes(
            self.spec.kind,
            rows,
            self.y,
            self.data.groups,
            split=split,
            n=self.spec.permutations,
            seed=self.seed,
            progress=lambda done, total: progress(done, total, "permuting labels"),
        )
        probe = fit_linear(self.spec.kind, rows[site][split.train], self.y[split.train])
        readout = probe(rows[site][split.test])
        groups = [self.data.groups[i] for i in split.test]
        score = evaluate(readout, self.y[split.test], groups, metrics=("auroc",), seed=self.seed)["auroc"]
        return {
            "names": list(found.sites),
            "values": found.values,
            "null": found.null,
            "scheme": found.scheme,
            "site": site,
            "value": score.value,
            "interval": score.interval.to_dict(),
            "groups": len(set(groups)),
            "weight": probe.weight,
            "bias": np.asarray(probe.bias),
            "test": split.test,
            "readout": readout,
        }

    def texts(self, progress: Progress) -> Mapping[str, Any]:
        """The probe against what needs no model, and against the token embedding."""
        from assay.directions.probes.baselines import beats, linear_arm, text_baselines

        self._told = progress
        rows = self.rows
        tokens = [len(self.subject.tokenizer(text)["input_ids"]) for text in self.data.texts]
        embedded = None
        if self.subject.parts.has("embed"):
            other = _Measured(self.subject, self.data, self.spec.model_copy(update={"sites": "embed"}), self.seed)
            embedded = other.read(self.subject, None)["embed"]

        def probe(train: np.ndarray, y: np.ndarray, groups: np.ndarray) -> np.ndarray:
            site = self.choose(rows, train)
            return linear_arm(rows[site], self.spec.kind)(train, y, groups)

        test = self.spec.test
        found = beats(
            probe,
            text_baselines(self.data.texts, embedding=embedded, tokens=tokens),
            self.y,
            self.data.groups,
            shares=((1 - test) * 5 / 7, (1 - test) * 2 / 7, test),
            seed=self.seed,
        )
        return {
            "probe": found.probe,
            "baseline": found.baseline,
            "best": found.best,
            "gain": found.gain,
            "interval": found.interval.to_dict(),
            "test": dict(found.test),
        }

    def tasks(self, progress: Progress) -> Mapping[str, Any]:
        """Selectivity at the site that was chosen, on words that were seen and on words that were not."""
        from assay.controls.tasks import selectivity
        from assay.directions.probes.linear import fit_linear

        self._told = progress
        site = self.choose(self.rows, self.split.train)

        def fit(X: np.ndarray, y: np.ndarray, other: np.ndarray) -> np.ndarray:
            return (fit_linear(self.spec.kind, X, y)(other) > 0).astype(int)

        found = selectivity(
            fit,
            self.rows[site],
            self.y,
            self.data.groups,
            self.data.templates or None,
            n=self.spec.tasks,
            seed=self.seed,
        )
        return {
            score.split: {
                "task": score.task,
                "controls": list(score.controls),
                "interval": score.interval.to_dict(),  # type: ignore[union-attr]  # there is one for accuracy
                "types": score.types,
            }
            for score in (found.memorisation, found.generalisation)
        }

    def untrained(self, kind: str, number: int) -> Callable[[Progress], Mapping[str, Any]]:
        """The same pipeline on untrained weights: the AUROC at the site that it then chooses."""

        def compute(progress: Progress) -> Mapping[str, Any]:
            from assay.activations.subject import Subject
            from assay.directions.probes.permutations import permuted_probes

            subject = self.subject
            module = self._nulls(kind).draw(self.seed, number)
            other = Subject(module, subject.tokenizer, architecture=subject.architecture, name=f"{kind} {number}")
            rows = self.read(other, progress)
            site = self.choose(rows, self.split.train)
            one = {site: rows[site]}
            found = permuted_probes(
                self.spec.kind, one, self.y, self.data.groups, split=self.split, n=1, seed=self.seed
            )
            return {"site": site, "value": float(found.values[0])}

        return compute

    def _nulls(self, kind: str) -> Any:
        """The untrained weights of one kind, in one copy of the module for all draws."""
        from assay.controls.weights import WeightNull

        if self._null[0] != kind:
            self._null = (kind, WeightNull(self.subject.module, kind))  # type: ignore[arg-type]
        return self._null[1]


@dataclass(frozen=True, slots=True, kw_only=True)
class _Report:
    """What the measurements say."""

    data: Labelled
    spec: ProbeSpec
    sites: Mapping[str, Any]
    texts: Mapping[str, Any]
    tasks: Mapping[str, Any]
    untrained: Mapping[str, Sequence[Mapping[str, Any]]]
    python: str
    ctx: Context

    @property
    def classes(self) -> tuple[str, str]:
        """The labels, the negative one first."""
        low, high = classes(self.data)
        return str(low), str(high)

    @property
    def draws(self) -> list[float]:
        """The AUROC on every draw of untrained weights."""
        return [float(draw["value"]) for kind in KINDS for draw in self.untrained[kind]]

    @property
    def untrained_tested(self) -> bool:
        """Whether the untrained weights are draws enough for a test; where they are not, `verdict` leaves them out."""
        return len(self.draws) >= LEAST_DRAWS

    def _finding(self, claim: str, estimate: float, unit: str, controls: Sequence[Control], **more: Any) -> Finding:
        interval: Interval = more.pop("interval")
        judged = more.pop("verdict", None) or verdict(estimate, controls, more.pop("beyond", interval))
        return Finding(
            claim=claim,
            estimate=estimate,
            unit=unit,
            controls=tuple(controls),
            interval=interval,
            verdict=judged,
            cost=self.ctx.cost(),
            provenance=self.ctx.provenance(self.data.digest),
            **more,
        )

    def findings(self) -> tuple[Finding, ...]:
        """Every claim."""
        return (self.reads(), self.beats(), *(self.selective(kind) for kind in ("memorisation", "generalisation")))

    def reads(self) -> Finding:
        """The classes can be told apart, and an untrained model cannot."""
        names, null = list(self.sites["names"]), np.asarray(self.sites["null"])
        site, value = self.sites["site"], float(self.sites["value"])
        draws = self.draws
        controls = [
            compare(
                "permuted labels",
                f"the probe at this site on labels permuted ({self.sites['scheme']}), fitted and tested again",
                value,
                null[:, names.index(site)],
            ),
            compare(
                "best site of permuted labels",
                f"the best of {len(names)} sites for each permutation: what choosing alone gives",
                value,
                max_null(null),
            ),
            compare(
                "untrained weights",
                "the same texts, split and choice of site on the same architecture with Gaussian and with "
                "spectrum-matched weights",
                value,
                draws,
            ),
        ]
        better = ", better than on the same architecture untrained" if self.untrained_tested else ""
        interval = Interval.from_dict(self.sites["interval"])
        shifted = dataclasses.replace(interval, low=interval.low - 0.5, high=interval.high - 0.5)
        return self._finding(
            f"a {self.spec.kind} probe at {site} tells {self.classes[1]} from {self.classes[0]} on groups it has not "
            f"seen{better}",
            value,
            "AUROC",
            controls,
            interval=interval,
            beyond=shifted,
            n=int(self.sites["groups"]),
            tags=("probe",),
            detail={"site": site, "family": len(names), "untrained": draws},
        )

    def beats(self) -> Finding:
        """The probe does better than what needs no model."""
        gain, interval = float(self.texts["gain"]), Interval.from_dict(self.texts["interval"])
        said = "supported" if interval.low > 0 else "contradicted" if interval.high < 0 else None
        return self._finding(
            f"the probe does better than {self.texts['best']}, the best of what needs no more than the text or its "
            "token embedding",
            gain,
            "difference of AUROC",
            (),
            control_waived="the baseline is the control; the difference is paired on the same held-out rows",
            verdict=said or "not distinguishable from control",
            interval=interval,
            n=int(self.sites["groups"]),
            tags=("baselines",),
            detail={"arms": self.texts["test"]},
        )

    def selective(self, kind: str) -> Finding:
        """The probe learns the labels better than random labels of the same words."""
        score = self.tasks[kind]
        null = np.asarray(score["controls"])
        gain = float(score["task"]) - float(null.mean())
        control = compare(
            "control tasks",
            "each group has a random label, with the base rates of the labels; fitted and tested the same",
            gain,
            null - null.mean(),
        )
        where = "groups it has seen, in rows it has not" if kind == "memorisation" else "groups it has not seen"
        return self._finding(
            f"on {where}, the probe is right more often ({float(score['task']):.0%}) than one that was given random "
            f"labels of the groups ({float(null.mean()):.0%})",
            gain,
            "difference of accuracy (selectivity)",
            [control],
            interval=Interval.from_dict(score["interval"]),
            n=int(score["types"]),
            tags=("selectivity", kind),
        )

    def summary(self) -> tuple[str, ...]:
        """Headline lines."""
        reads, beats, *selective = self.findings()
        memory, general = (found.estimate for found in selective)
        best, alone = self.texts["best"], float(self.texts["baseline"])
        return (
            f"{self.classes[1]} against {self.classes[0]}: AUROC {reads.estimate:.3f} at {self.sites['site']} on "
            f"held-out groups ({reads.verdict}); untrained weights reach {max(reads.detail['untrained']):.3f}.",
            f"{best} alone: AUROC {alone:.3f}; the probe gains {beats.estimate:+.3f} ({beats.verdict}).",
            f"Selectivity: {memory:+.2f} on groups it has seen, {general:+.2f} on new ones.",
        )

    def views(self) -> tuple[View, ...]:
        """The charts."""
        names, null = list(self.sites["names"]), np.asarray(self.sites["null"])
        best = max_null(null)
        reads = self.reads()
        arms = dict(sorted(self.texts["test"].items(), key=lambda item: -item[1]))
        return (
            Lines(
                id="sites",
                section="Sites",
                title="Held-out AUROC by site",
                caption=f"The dashed band is 95% of the best of {len(names)} sites under permuted labels.",
                x=names,
                series=(
                    Series(name="probe", values=np.asarray(self.sites["values"]).tolist()),
                    Series(
                        name="permuted labels, best site",
                        values=[float(best.mean())] * len(names),
                        low=[float(np.quantile(best, 0.025))] * len(names),
                        high=[float(np.quantile(best, 0.975))] * len(names),
                    ),
                ),
                x_title="site",
                y_title="AUROC",
                zero=False,
                python=self.python,
            ),
            Distribution(
                id="controls",
                section="Controls",
                title="The probe among its controls",
                null={control.name: control.null for control in reads.controls},
                estimate=reads.estimate,
                unit="AUROC",
                python=self.python,
            ),
            Bars(
                id="baselines",
                section="Controls",
                title="What tells the classes apart",
                caption="Held-out AUROC on one split; only the probe and, for its site, the embedding see the model.",
                labels=list(arms),
                values=list(arms.values()),
                unit="AUROC",
                python=self.python,
            ),
        )

    def warnings(self) -> tuple[str, ...]:
        """What to know before believing any of it."""
        found = []
        if not self.untrained_tested:
            found.append(
                f"{len(self.draws)} draws of untrained weights describe, and are too few for a test: nothing here says "
                "that a model without training would do worse. Give "
                f"{-(-LEAST_DRAWS // len(KINDS))} or more of each kind."
            )
        if not self.data.templates:
            found.append("The rows have no template: memorisation holds out rows of a group at random.")
        found += repeated_texts(self.data)
        family = familywise_p(np.asarray(self.sites["values"]), np.asarray(self.sites["null"]))
        found.append(
            f"{int((family <= 0.05).sum())} of {len(family)} sites beat permuted labels, all of them allowed for."
        )
        return tuple(found)
