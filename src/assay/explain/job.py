"""The `explain` job: run the steps, then turn what they measured into findings and charts."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from assay.activations.subject import Subject
from assay.base.errors import UnsupportedArchitecture
from assay.base.findings import Findings
from assay.base.method import Context, StepSpec
from assay.base.method import Progress as StepProgress
from assay.circuits import Contrast, components
from assay.controls.sets import matched_sets
from assay.controls.weights import WeightNull
from assay.explain import measure
from assay.explain.charts import charts
from assay.explain.claims import claims, headlines
from assay.explain.inputs import Question, read_inputs
from assay.explain.results import Results
from assay.explain.spec import ExplainSpec
from assay.explain.steps import DIRECTIONS, GRIDS, KINDS, SETS_A_STEP, Shape, Steps, curve_sizes
from assay.subjects.words import ModelText


def run(subject: Subject, spec: ExplainSpec, ctx: Context) -> Findings:
    """Run the job; see `assay.explain.method.explain`."""
    parts_of = subject.parts
    if subject.n_blocks == 0:
        raise UnsupportedArchitecture(f"{subject.name} has no blocks to explain")
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
    contrast = contrast_of(subject, question, answer, foil, spec, ctx.seed)
    _measure_model(subject, contrast, results, steps, ctx)
    _measure_random_sets(subject, contrast, results, steps, ctx)
    _measure_untrained(subject, question, results, steps, ctx)
    if inputs.variations:
        step = steps.variations()
        results.values["variations"] = ctx.step(step, lambda p: _variations(subject, results, spec, ctx.seed, p))
    _artifacts(results, ctx)
    findings = claims(results, steps, ctx)
    return Findings(
        findings=tuple(findings),
        views=tuple(charts(results, steps, subject.name, text.decode)),
        summary=tuple(headlines(results, findings)),
        warnings=tuple(_warnings(results, spec)),
    )


def contrast_of(subject: Subject, question: Question, answer: int, foil: int, spec: ExplainSpec, seed: int) -> Contrast:
    """The contrast a question asks for: two prompts, or one prompt and noise."""
    if question.corrupt is not None:
        return Contrast.of_tokens(question.clean, question.corrupt, answer, foil)
    return Contrast.of_noise(
        subject, question.clean, question.noised, answer, foil, sigmas=spec.sigmas, draws=spec.draws, seed=seed
    )


def _measure_model(subject: Subject, contrast: Contrast, results: Results, steps: Steps, ctx: Context) -> None:
    values, parts = results.values, results.parts
    values["baseline"] = ctx.step(steps.baseline(), lambda p: measure.baseline(subject, contrast))
    values["lens"] = ctx.step(steps.lens(), lambda p: measure.lens(subject, contrast))
    values["direct"] = ctx.step(steps.decomposition(), lambda p: measure.decomposition(subject, contrast))
    for direction in DIRECTIONS:
        for point in GRIDS:
            values[f"{point} {direction}"] = _grid(
                subject, contrast, steps.grid(point, direction), point, direction, ctx
            )
        values[f"components {direction}"] = _components(subject, contrast, results, steps, direction, ctx)
    values["attribution"] = ctx.step(steps.attribution(), lambda p: measure.attribution(subject, contrast, parts))
    helping = -results.effect("components noising")
    ranked = [parts[i] for i in np.argsort(-helping, kind="stable")]
    results.top = ranked[: steps.top]
    prefixes = [ranked[:k] for k in curve_sizes(len(parts))]
    values["curve"] = ctx.step(
        steps.curve(), lambda p: measure.sets(subject, contrast, parts, [*prefixes, results.top], p)
    )


def _grid(subject: Subject, contrast: Contrast, step: StepSpec, point: str, direction: str, ctx: Context) -> Any:
    return ctx.step(step, lambda p: measure.grid(subject, contrast, point, direction, p))


def _components(
    subject: Subject, contrast: Contrast, results: Results, steps: Steps, direction: str, ctx: Context
) -> Any:
    return ctx.step(
        steps.components(direction),
        lambda p: measure.component_effects(subject, contrast, results.parts, direction, p),
    )


def _measure_random_sets(subject: Subject, contrast: Contrast, results: Results, steps: Steps, ctx: Context) -> None:
    sets = matched_sets(
        results.top, results.parts, strata=lambda part: part.kind, n=steps.spec.random_sets, seed=ctx.seed
    )
    found: dict[str, list[Any]] = {"kept": [], "lost": []}
    for chunk in range(steps.n_chunks):
        members = sets[chunk * SETS_A_STEP : (chunk + 1) * SETS_A_STEP]

        def compute(progress: StepProgress, members: Sequence[Any] = members) -> Mapping[str, Any]:
            return measure.sets(subject, contrast, results.parts, members, progress)

        values = ctx.step(steps.random_sets(chunk), compute)
        for name, kept in found.items():
            kept.append(np.asarray(values[name]))
    results.random = {name: np.concatenate(kept) for name, kept in found.items()}


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
            contrast = contrast_of(other, question, results.answer, results.foil, steps.spec, ctx.seed)
            return measure.untrained(other, contrast, results.parts, GRIDS if number == 0 else (), progress)

        results.untrained[kind] = [
            ctx.step(steps.untrained(kind, i), lambda p, i=i, compute=compute: compute(p, number=i))  # type: ignore[misc]
            for i in range(steps.spec.untrained)
        ]


def _variations(
    subject: Subject, results: Results, spec: ExplainSpec, seed: int, progress: StepProgress
) -> Mapping[str, Any]:
    """The effect on other prompts, and what the top components of the main prompt keep and lose there."""
    found: dict[str, list[float]] = {"clean": [], "corrupt": [], "kept": [], "lost": []}
    for i, question in enumerate(results.inputs.variations):
        answer, foil = measure.likeliest(subject, question.clean, question.answer, question.foil)
        contrast = contrast_of(subject, question, answer, foil, spec, seed)
        base = measure.baseline(subject, contrast)
        found["clean"].append(base["clean_difference"])
        found["corrupt"].append(base["corrupt_difference"])
        values = measure.sets(subject, contrast, results.parts, [results.top], lambda done, total: None)
        found["kept"].append(float(values["kept"][0]))
        found["lost"].append(float(values["lost"][0]))
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
    baseline = results.values["baseline"]
    gap = float(baseline["clean_difference"]) - float(baseline["corrupt_difference"])
    if gap <= 0:
        found.append(
            f"The corruption does not lower the logit difference (it changes by {-gap:+.3g}): normalised "
            f"effects are not "
            "meaningful here. Choose a corrupt prompt for which the foil would be right."
        )
    if len(results.inputs.variations) == 0:
        found.append("One prompt was studied: nothing here says that it holds for others. Give --vary FILE.")
    elif len(results.inputs.variations) < 16:
        found.append(
            f"Only {len(results.inputs.variations)} variations were given; 16 or more make the intervals useful."
        )
    return found
