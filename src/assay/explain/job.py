"""The `explain` job: run the steps, then turn what they measured into findings and charts."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from assay.activations.subject import Subject
from assay.base.errors import NumericalError, SpecError, UnsupportedArchitecture
from assay.base.findings import Findings
from assay.base.method import Context, StepSpec
from assay.base.method import Progress as StepProgress
from assay.circuits import Component, Task, components
from assay.controls.sets import count_matched_sets, matched_sets
from assay.controls.weights import WeightNull
from assay.explain import measure
from assay.explain.charts import charts
from assay.explain.claims import claims, headlines
from assay.explain.inputs import Question, read_inputs
from assay.explain.results import Results
from assay.explain.spec import ExplainSpec
from assay.explain.steps import DIRECTIONS, GRIDS, KINDS, SETS_A_STEP, Shape, Steps, curve_sizes
from assay.subjects.families import family_of
from assay.subjects.parts import Parts
from assay.subjects.words import ModelText


def run(subject: Subject, spec: ExplainSpec, ctx: Context) -> Findings:
    """Run the job; see `assay.explain.method.explain`."""
    parts_of = _parts(subject, spec)
    if subject.n_blocks == 0:
        raise UnsupportedArchitecture(f"{subject.name} has no blocks to explain")
    if subject.n_blocks * (parts_of.n_heads + 1) < 3:
        raise UnsupportedArchitecture(f"{subject.name} has one head and one MLP: there is nothing to choose from")
    text = ModelText(subject)
    inputs = read_inputs(text, spec)
    shape = Shape(
        n_layers=subject.n_blocks,
        n_heads=parts_of.n_heads,
        d_model=parts_of.d_model,
        parameters=sum(p.numel() for p in subject.module.parameters()),
    )
    steps = Steps(shape, inputs, spec, ctx.seed)
    question = inputs.question
    answer, foil = measure.likeliest(subject, question.clean, question.answer, question.foil)
    results = Results(
        inputs=inputs,
        answer=answer,
        foil=foil,
        parts=components(subject),
        tokens=[text.decode(t) for t in question.clean],
        corrupt_tokens=None if question.corrupt is None else [text.decode(t) for t in question.corrupt],
        words=(text.decode(answer), text.decode(foil)),
    )
    task = task_of(subject, question, answer, foil, spec, ctx.seed)
    _measure_model(subject, task, results, steps, ctx)
    _measure_random_sets(subject, task, results, steps, ctx)
    _measure_untrained(subject, question, results, steps, ctx)
    if inputs.variations:
        step = steps.variations()
        results.values["variations"] = ctx.step(step, lambda p: _variations(subject, results, spec, ctx.seed, p))
    _artifacts(results, ctx)
    findings = claims(results, steps, ctx)
    return Findings(
        findings=tuple(findings),
        views=tuple(charts(results, steps, subject.reference, text.decode)),
        summary=tuple(headlines(results, findings)),
        warnings=tuple(_warnings(results, spec)),
    )


def _parts(subject: Subject, spec: ExplainSpec) -> Parts:
    """The subject's parts; where its map was refused because its logits are NaN, that is said instead."""
    if subject.architecture is None and family_of(str(getattr(subject.config, "model_type", ""))) is not None:
        measure.finite_logits(subject.run(spec.prompt).logits[:, -1], "clean")
    return subject.parts


def task_of(subject: Subject, question: Question, answer: int, foil: int, spec: ExplainSpec, seed: int) -> Task:
    """The task a question asks for: two prompts, or one prompt and noise."""
    if question.corrupt is not None:
        return Task.from_tokens(question.clean, question.corrupt, answer, foil)
    return Task.from_noise(
        subject, question.clean, question.noised, answer, foil, sigmas=spec.sigmas, draws=spec.draws, seed=seed
    )


def _measure_model(subject: Subject, task: Task, results: Results, steps: Steps, ctx: Context) -> None:
    values, parts = results.values, results.parts
    values["baseline"] = ctx.step(steps.baseline(), lambda p: measure.baseline(subject, task))
    if results.gap == 0:
        raise SpecError(
            f"clean and corrupt give the same logit difference between {results.words[0]!r} and {results.words[1]!r}: "
            "what differs between the prompts does not matter here, and there is nothing to explain",
            "corrupt",
        )
    values["lens"] = ctx.step(steps.lens(), lambda p: measure.lens(subject, task))
    values["direct"] = ctx.step(steps.decomposition(), lambda p: measure.decomposition(subject, task))
    for direction in DIRECTIONS:
        for point in GRIDS:
            values[f"{point} {direction}"] = _grid(subject, task, steps.grid(point, direction), point, direction, ctx)
        values[f"components {direction}"] = _components(subject, task, results, steps, direction, ctx)
    values["attribution"] = ctx.step(steps.attribution(), lambda p: measure.attribution(subject, task, parts))
    helping = -results.effect("components noising")
    ranked = [parts[i] for i in np.argsort(-helping, kind="stable")]
    results.top = ranked[: steps.top]
    prefixes = [ranked[:k] for k in curve_sizes(len(parts))]
    values["curve"] = ctx.step(steps.curve(), lambda p: measure.sets(subject, task, parts, [*prefixes, results.top], p))


def _grid(subject: Subject, task: Task, step: StepSpec, point: str, direction: str, ctx: Context) -> Any:
    return ctx.step(step, lambda p: measure.grid(subject, task, point, direction, p))


def _components(subject: Subject, task: Task, results: Results, steps: Steps, direction: str, ctx: Context) -> Any:
    return ctx.step(
        steps.components(direction),
        lambda p: measure.component_effects(subject, task, results.parts, direction, p),
    )


def _measure_random_sets(subject: Subject, task: Task, results: Results, steps: Steps, ctx: Context) -> None:
    there_are = count_matched_sets(results.top, results.parts, strata=_kind) - 1
    n = min(steps.spec.random_sets, there_are)
    sets = matched_sets(results.top, results.parts, strata=_kind, n=n, seed=ctx.seed) if n else ()
    found: dict[str, list[Any]] = {"kept": [np.empty(0)], "lost": [np.empty(0)]}
    for chunk in range(math.ceil(n / SETS_A_STEP)):
        members = sets[chunk * SETS_A_STEP : (chunk + 1) * SETS_A_STEP]

        def compute(progress: StepProgress, members: Sequence[Any] = members) -> Mapping[str, Any]:
            return measure.sets(subject, task, results.parts, members, progress)

        values = ctx.step(steps.random_sets(chunk), compute)
        for name, kept in found.items():
            kept.append(np.asarray(values[name]))
    results.random = {name: np.concatenate(kept) for name, kept in found.items()}


def _kind(part: Component) -> str:
    return part.kind


def _measure_untrained(subject: Subject, question: Question, results: Results, steps: Steps, ctx: Context) -> None:
    """Every draw rewrites one copy of the weights, made only if a draw is not in the cache."""
    for kind in KINDS:
        null: list[WeightNull] = []

        def compute(progress: StepProgress, kind: Any = kind, null: list[WeightNull] = null, number: int = 0) -> Any:
            progress(0, 1, "redrawing weights")
            if not null:
                null.append(WeightNull(subject.module, kind))
            module = null[0].draw(ctx.seed, number)
            other = Subject(module, subject.tokenizer, architecture=subject.architecture, name=f"{kind} {number}")
            task = task_of(other, question, results.answer, results.foil, steps.spec, ctx.seed)
            return measure.untrained(other, task, results.parts, GRIDS if number == 0 else (), progress)

        results.untrained[kind] = [
            ctx.step(steps.untrained(kind, i), lambda p, i=i, compute=compute: compute(p, number=i))  # type: ignore[misc]
            for i in range(steps.spec.untrained)
        ]


def _variations(
    subject: Subject, results: Results, spec: ExplainSpec, seed: int, progress: StepProgress
) -> Mapping[str, Any]:
    """The effect on other prompts, and what the top components of the main prompt keep and lose there."""
    found: dict[str, list[float]] = {"clean": [], "corrupt": [], "kept": [], "lost": [], "span": []}
    for i, question in enumerate(results.inputs.variations):
        answer, foil = measure.likeliest(subject, question.clean, question.answer, question.foil)
        task = task_of(subject, question, answer, foil, spec, seed)
        base = measure.baseline(subject, task)
        found["clean"].append(base["clean_difference"])
        found["corrupt"].append(base["corrupt_difference"])
        try:
            values = measure.sets(subject, task, results.parts, [results.top], lambda done, total: None)
        except NumericalError as error:
            raise NumericalError(f"variation {i + 1}: {error}") from None
        found["kept"].append(float(values["kept"][0]))
        found["lost"].append(float(values["lost"][0]))
        found["span"].append(float(values["clean"]) - float(values["none"]))
        progress(i + 1, len(results.inputs.variations))
    return {name: np.asarray(values) for name, values in found.items()}


def _artifacts(results: Results, ctx: Context) -> None:
    patched = {key: np.asarray(value["values"]) for key, value in results.values.items() if " " in key}
    ctx.artifact("patching", arrays={key.replace(" ", "_"): value for key, value in patched.items()})
    lens = results.values["lens"]
    ctx.artifact("lens", arrays={key: np.asarray(lens[key]) for key in ("clean_difference", "corrupt_difference")})
    attribution = results.values["attribution"]
    table: dict[str, list[Any]] = {
        "component": [part.name for part in results.parts],
        "kind": [part.kind for part in results.parts],
        "block": [part.block for part in results.parts],
        "head": [part.head for part in results.parts],
        "site": [part.site for part in results.parts],
        "top": [part in results.top for part in results.parts],
    }
    direct = dict(zip(results.values["direct"]["names"], np.asarray(results.values["direct"]["parts"]), strict=True))
    table["direct_attribution"] = [float(direct[part.name]) for part in results.parts]
    for direction in DIRECTIONS:
        table[f"exact_{direction}"] = [float(v) for v in results.effect(f"components {direction}")]
        table[f"attribution_{direction}"] = [float(v) for v in np.asarray(attribution[direction])]
    ctx.artifact("components", table=table)


def _warnings(results: Results, spec: ExplainSpec) -> list[str]:
    found = []
    if results.inputs.question.corrupt is None:
        noised = ", ".join(repr(results.tokens[i]) for i in results.inputs.question.noised)
        found.append(
            f"No corrupt prompt was given: the embeddings of {noised} were noised ({spec.sigmas:g} sigma, "
            f"{spec.draws} draws), "
            "and every effect is an average over the draws."
        )
    if results.inputs.question.answer is None:
        found.append(f"No answer was given: the likeliest token, {results.words[0]!r}, was used.")
    if results.inputs.question.foil is None:
        found.append(f"No foil was given: the runner-up, {results.words[1]!r}, was used.")
    if results.gap <= 0:
        found.append(
            f"The corruption does not lower the logit difference (it changes by {-results.gap:+.3g}): normalised "
            f"effects are not "
            "meaningful here. Choose a corrupt prompt for which the foil would be right."
        )
    if len(results.random["kept"]) < spec.random_sets:
        found.append(
            f"The top components are held against {len(results.random['kept'])} random sets: no more have as many "
            "heads and as many MLPs."
        )
    if len(results.inputs.variations) == 0:
        found.append("One prompt was studied: nothing here says that it holds for others. Give --vary FILE.")
    elif len(results.inputs.variations) < 16:
        found.append(
            f"Only {len(results.inputs.variations)} variations were given; 16 or more make the intervals useful."
        )
    return found
