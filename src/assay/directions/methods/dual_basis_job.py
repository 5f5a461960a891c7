"""The `dual-basis` study: what is measured, held against what, and said how."""

from __future__ import annotations

from collections.abc import Mapping
from functools import cached_property
from typing import Any

import numpy as np

from assay.base.errors import SpecError
from assay.base.findings import Findings
from assay.base.method import Context, Progress, StepSpec
from assay.base.rng import numpy_stream
from assay.base.snippets import snippet
from assay.directions.methods.common import RATE
from assay.directions.methods.dual_basis import DualBasisSpec
from assay.directions.methods.dual_basis_report import DRAWN, FORMS, PLACES, Inputs, Report


def _sites(spec: DualBasisSpec, blocks: int) -> tuple[str, str]:
    """Where is written and where is read downstream."""
    site = spec.site or f"blocks.{blocks // 2}.resid_post"
    return site, spec.later or f"blocks.{max(3 * blocks // 4, min(blocks // 2 + 1, blocks - 1))}.resid_post"


def planned(card: Any, spec: DualBasisSpec, seed: int) -> list[StepSpec]:
    """List the steps of a study from its model's card, without loading weights."""
    sites = _sites(spec, card.n_layers)
    return _steps(Inputs.read(spec), spec, sites, seed, lambda text: len(card.encode(text)), card.parameters)


def _steps(
    inputs: Inputs, spec: DualBasisSpec, sites: tuple[str, str], seed: int, length: Any = len, parameters: int = 0
) -> list[StepSpec]:
    own = {"texts": inputs.digest, "sites": list(sites), "seed": seed}
    own |= {name: getattr(spec, name) for name in ("kind", "test", "amount", "ridge")}
    k = len(inputs.data.names)
    cells = len(FORMS) * k * (1 + len(DRAWN) * spec.controls)
    read = sum(length(text) for text in inputs.data.texts)
    guard = len(FORMS) * k * sum(length(text) for text in inputs.unrelated)

    def step(name: str, forwards: int, tokens: int, more: dict[str, Any]) -> StepSpec:
        seconds = tokens * parameters / RATE
        return StepSpec(name=name, inputs=own | more, forwards=forwards, tokens=tokens, seconds=seconds)

    return [
        step("probes", len(inputs.data), read, {}),
        step("movements", cells * spec.texts, cells * spec.texts, {"controls": spec.controls, "texts": spec.texts}),
        step("guard", len(FORMS) * k * len(inputs.unrelated), guard, {}),
    ]


def run(subject: Any, spec: DualBasisSpec, ctx: Context) -> Findings:
    """Measure, and say what it means."""
    inputs = Inputs.read(spec)
    sites = _sites(spec, subject.n_blocks)
    measured = _Measured(subject, inputs, spec, sites, ctx.seed)
    first, second, third = _steps(inputs, spec, sites, ctx.seed)
    fitted = ctx.step(first, measured.probes)
    moved = ctx.step(second, lambda progress: measured.movements(fitted, progress))
    guard = ctx.step(third, lambda progress: measured.guard(fitted, progress))
    ctx.artifact("vectors", arrays={form: np.asarray(fitted[form]) for form in FORMS})
    ctx.artifact("probes", arrays={place: np.asarray(fitted[f"{place} weight"]) for place in PLACES})
    python = snippet(subject.reference, "dual-basis", spec, ctx.seed)
    report = Report(
        inputs=inputs, spec=spec, sites=sites, fitted=fitted, moved=moved, guard=guard, python=python, ctx=ctx
    )
    return Findings(
        findings=report.findings(), views=report.views(), summary=report.summary(), warnings=report.warnings()
    )


class _Measured:
    """What is measured.

    Args:
        subject: The subject.
        inputs: The texts.
        spec: The spec.
        sites: Where is written, and where is read again.
        seed: The study's seed.
    """

    def __init__(self, subject: Any, inputs: Inputs, spec: DualBasisSpec, sites: tuple[str, str], seed: int) -> None:
        self.subject, self.inputs, self.spec, self.seed = subject, inputs, spec, seed
        self.sites = tuple(str(site) for name in sites for site in subject.expand(name))
        if len(self.sites) != 2 or self.sites[0] == self.sites[1]:
            raise SpecError(
                f"{', '.join(sites)}: one site to write at and another to read at later are needed", "later"
            )
        self._told: Progress | None = None

    @cached_property
    def split(self) -> Any:
        """Groups to fit on and groups to read."""
        from assay.directions.probes.splits import grouped_split

        data = self.inputs.data
        found = grouped_split(data.groups, data.y[:, 0], test=self.spec.test, seed=self.seed)
        for name, column in zip(data.names, data.y.T, strict=True):
            for rows in (found.train, found.test):
                if len(set(column[rows].tolist())) < 2:
                    raise SpecError(
                        f"data: after the split one side has {name!r} in one class only: bring more groups", "data"
                    )
        return found

    @cached_property
    def rows(self) -> dict[str, np.ndarray]:
        """Activations at the last token, at both sites."""
        from assay.directions.data import read_sites

        return read_sites(self.subject, self.inputs.data.texts, self.sites, progress=self._told)

    def probes(self, progress: Progress) -> Mapping[str, Any]:
        """A probe for each concept at both sites, how well each reads new groups, and the vectors."""
        import torch

        from assay.directions.basis import condition, dual, on_distribution_dual
        from assay.directions.probes.linear import fit_linear
        from assay.directions.probes.scores import auroc

        self._told = lambda done, total, message="": progress(done, total, message or "reading")
        data, split = self.inputs.data, self.split
        found: dict[str, Any] = {"test": split.test}
        for place, site in zip(PLACES, self.sites, strict=True):
            X = self.rows[site]
            probes = [fit_linear(self.spec.kind, X[split.train], y[split.train]) for y in data.y.T]
            read = np.stack([probe(X[split.test]) for probe in probes], axis=1)
            held = data.y[split.test].astype(bool)
            pairs = list(zip(read.T, held.T, strict=True))
            found[f"{place} weight"] = np.stack([probe.weight for probe in probes])
            found[f"{place} gap"] = np.asarray([values[up].mean() - values[~up].mean() for values, up in pairs])
            found[f"{place} auroc"] = np.asarray([auroc(values, up) for values, up in pairs])
            weak = [name for name, gap in zip(data.names, found[f"{place} gap"], strict=True) if not gap > 0]
            if weak:
                raise SpecError(
                    f"the probe of {weak[0]!r} at {site} does not read new groups at all: leave it out, bring more "
                    "groups, or choose another site",
                    place,
                )
        X = self.rows[self.sites[0]][split.train]
        W = found["site weight"]
        lengths = np.linalg.norm(W, axis=1, keepdims=True)
        unit = torch.tensor(W / lengths)
        vectors = {
            "probe": unit,
            "dual": dual(unit, ridge=self.spec.ridge),
            "on-distribution dual": on_distribution_dual(unit, torch.tensor(X), ridge=self.spec.ridge),
        }
        for form, rows in vectors.items():  # each moves its own readout by `amount` gaps
            own = np.einsum("kd,kd->k", W, rows.numpy())
            found[form] = rows.numpy() * (self.spec.amount * found["site gap"] / own)[:, None]
        found["condition"] = condition(unit)
        found["size"] = float(np.linalg.norm(X.astype(np.float64), axis=1).mean())
        return found

    def draws(self, kind: str, vectors: np.ndarray, X: np.ndarray) -> np.ndarray:
        """`[draw, concept, d]`: random vectors of the norms of these."""
        from assay.controls.directions import covariance_matched_directions, isotropic_directions

        n, k = self.spec.controls, len(vectors)
        one = np.eye(1, vectors.shape[1])[0]  # of norm 1
        if kind == "isotropic":
            drawn = isotropic_directions(one, n * k, self.seed)
        else:
            drawn = covariance_matched_directions(one, X, n * k, self.seed)
        return np.asarray(drawn.reshape(n, k, -1) * np.linalg.norm(vectors, axis=1)[:, None])

    def movements(self, fitted: Mapping[str, Any], progress: Progress) -> Mapping[str, Any]:
        """How far every readout moves at both sites, for every vector and control, measured in the model."""
        import torch

        from assay.activations.edits import Add
        from assay.directions.movements import movements
        from assay.directions.vectors import Probe

        data, k = self.inputs.data, len(self.inputs.data.names)
        order = numpy_stream(self.seed, "dual basis", "texts").permutation(np.asarray(fitted["test"]))
        chosen = np.sort(order[: self.spec.texts])
        probes = [
            Probe(site=site, weight=torch.tensor(weight / gap).float(), reads=name)
            for place, site in zip(PLACES, self.sites, strict=True)
            for weight, gap, name in zip(
                np.asarray(fitted[f"{place} weight"]), np.asarray(fitted[f"{place} gap"]), data.names, strict=True
            )
        ]
        X = self.rows[self.sites[0]][self.split.train]
        arms = [(form, "") for form in FORMS] + [(form, kind) for form in FORMS for kind in DRAWN]
        written = {form: np.asarray(fitted[form]) for form in FORMS}
        stacks = [self.draws(kind, written[form], X) if kind else written[form][None] for form, kind in arms]
        edits = [
            Add(self.sites[0], torch.tensor(vector).float(), positions="last")
            for stack in stacks
            for vectors in stack
            for vector in vectors
        ]
        texts = [data.texts[i] for i in chosen]
        told = movements(
            self.subject, texts, edits, probes, progress=lambda done, total: progress(done, total, "writing")
        )
        table = told.reshape(-1, k, len(texts), len(PLACES), k).transpose(
            0, 3, 2, 4, 1
        )  # set, place, text, read, written
        found: dict[str, Any] = {"rows": chosen}
        start = 0
        for (form, kind), stack in zip(arms, stacks, strict=True):
            part = table[start : start + len(stack)]
            start += len(stack)
            for at, place in enumerate(PLACES):
                value = part[:, at].mean(1) if kind else part[0, at]  # controls: the mean over texts is enough
                found[f"{place} {form} {kind}".strip()] = value
        return found

    def guard(self, fitted: Mapping[str, Any], progress: Progress) -> Mapping[str, Any]:
        """The KL of the next token on unrelated text, every token written to: `[form][concept, text]`."""
        import torch

        from assay.activations.edits import Add
        from assay.directions.steering.behaviour import divergence

        texts, k = self.inputs.unrelated, len(self.inputs.data.names)
        found = {form: np.zeros((k, len(texts))) for form in FORMS}
        with torch.no_grad():
            for t, text in enumerate(texts):
                base = self.subject.run(text).logits[0]
                for form in FORMS:
                    for i, vector in enumerate(np.asarray(fitted[form])):
                        edit = Add(self.sites[0], torch.tensor(vector).float())
                        found[form][i, t] = float(
                            divergence(base, self.subject.run(text, edits=[edit]).logits[0]).mean()
                        )
                progress(t + 1, len(texts), "unrelated text")
        return found
