"""Is it a feature of the model, or of the data it was found in? The verdict over seven steps.

A dictionary trained on a model's activations has latents that describe the *data*, whether the model uses them or not:
also on a model with random weights. A latent is a feature of the model when the model's behaviour depends on it:

| step | claim | numbers it takes |
|---|---|---|
| decodes | it can be read off the activations | a score and its null |
| necessity | mean-ablating it, the dictionary's error kept, lowers the predicted logit | the drop on each prompt |
| sufficiency | adding it where it is off raises the predicted logit | the rise on each prompt |
| specificity | it moves the output more where it is on than on matched contexts where it is off | KLs, pairwise |
| dose | more of it does more | the effect at five doses or more |
| random directions | its effect beats that of 200 covariance-matched directions of its norm | effect and null |
| matched latents | and of 50 latents of equal rate | effect and null |
| re-initialised | it is not there in the model with random weights | a score and its null |
| other data | it comes back with another data set (decoder cosine > .7) | the best cosine |

The steps' p-values are adjusted together (Benjamini-Hochberg), then

    MODEL      necessity, sufficiency, specificity, dose and both nulls pass, and it is absent in the random model
    DATASET    it decodes, and neither necessity nor sufficiency passes although both could have
    UNDECIDED  anything else

"Other data" is reported beside the verdict and does not enter it. Each step takes plain numbers, so anything that can
be ablated and added (a latent, a direction, a head) can be judged.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Hashable, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal, get_args

import numpy as np
from jaxtyping import Float

from assay.base.errors import NumericalError, SpecError
from assay.base.rng import numpy_stream
from assay.base.stats import Numbers, Side, benjamini_hochberg, permutation_p, sign_flip_test

FeatureVerdict = Literal["model feature", "data-set feature", "undecided"]
"""What a feature is of."""

StepName = Literal[
    "decodes",
    "necessity",
    "sufficiency",
    "specificity",
    "dose",
    "random directions",
    "matched latents",
    "re-initialised",
    "other data",
]
"""The steps."""

CAUSAL: tuple[StepName, ...] = (
    "necessity",
    "sufficiency",
    "specificity",
    "dose",
    "random directions",
    "matched latents",
)
LEAST: dict[StepName, int] = {"random directions": 200, "matched latents": 50}
"""How many draws a null needs before it counts."""

DOSES = 5
RECURS = 0.7


@dataclass(frozen=True, slots=True, kw_only=True)
class Step:
    """One step of the verdict.

    Args:
        name: Which.
        value: Its estimate.
        p: Its p-value; None where it has none.
        least_p: The smallest p-value it could have had.
        n: Prompts, pairs, doses or draws that p comes from.
        adjusted: p adjusted together with the other steps; None before the verdict.
        passed: Whether it passed; None where it could not be tested.
        percentile: The place of the value in its null, where it has one.
        note: What else there is to know.
    """

    name: StepName
    value: float
    p: float | None = None
    least_p: float = 0.0
    n: int = 0
    adjusted: float | None = None
    passed: bool | None = None
    percentile: float | None = None
    note: str = ""

    def to_dict(self) -> dict[str, Any]:
        """The step as JSON values."""
        names = ("name", "value", "p", "least_p", "n", "adjusted", "passed", "percentile", "note")
        return {name: getattr(self, name) for name in names}


@dataclass(frozen=True, slots=True, kw_only=True)
class FeatureReport:
    """The verdict, with the numbers of each step.

    Args:
        verdict: "model feature", "data-set feature" or "undecided".
        steps: All steps, those that were not taken too.
        alpha: The false discovery rate across the steps.
        reason: Why it is this verdict.
    """

    verdict: FeatureVerdict
    steps: tuple[Step, ...]
    alpha: float
    reason: str

    def __getitem__(self, name: str) -> Step:
        """A step by its name."""
        for step in self.steps:
            if step.name == name:
                return step
        raise SpecError(f"{name!r} is no step; valid: {', '.join(get_args(StepName))}", "name")

    def to_dict(self) -> dict[str, Any]:
        """The report as JSON values."""
        steps = [step.to_dict() for step in self.steps]
        return {"verdict": self.verdict, "reason": self.reason, "alpha": self.alpha, "steps": steps}

    def __str__(self) -> str:
        marks = {True: "pass", False: "fail", None: "not tested"}
        lines = [f"{self.verdict}: {self.reason}"]
        for step in self.steps:
            p = "" if step.p is None else f", p = {step.p:.3g}"
            p += "" if step.adjusted is None else f" (adjusted {step.adjusted:.3g})"
            value = "" if math.isnan(step.value) else f", {step.value:.3g}"
            lines.append(f"  {step.name}: {marks[step.passed]}{value}{p}" + (f"; {step.note}" if step.note else ""))
        return "\n".join(lines)


def effect_step(
    name: Literal["necessity", "sufficiency"],
    effects: Numbers,
    groups: Sequence[Hashable] | None = None,
    *,
    n: int = 9999,
    seed: int = 0,
) -> Step:
    """Return the step of an effect on each prompt, positive when it is as claimed; p by flipping signs.

    Args:
        name: Which step.
        effects: The drop of the predicted logit when the feature is mean-ablated, or its rise when it is added.
        groups: The template or entity of each prompt; flipped whole.
        n: Number of sign patterns.
        seed: Seed of the stream.

    Raises:
        SpecError: No effects, or the lengths differ.
        NumericalError: An effect is not finite.

    Example:
        >>> step = effect_step("necessity", [0.4, 0.6, 0.5, 0.3, 0.7, 0.2])
        >>> round(step.value, 2), step.p
        (0.45, 0.015625)
    """
    return _flipped(name, effects, groups, n, seed, "")


def specificity_step(
    on: Numbers, off: Numbers, groups: Sequence[Hashable] | None = None, *, n: int = 9999, seed: int = 0
) -> Step:
    """Return the step that compares what the same edit does where the feature is on and where it is off.

    Args:
        on: The KL of the output, edited against not, in contexts where the feature is on.
        off: The same in the matched contexts where it is off, pair by pair.
        groups: The group of each pair.
        n: Number of sign patterns.
        seed: Seed of the stream.

    Raises:
        SpecError: The lengths differ.
        NumericalError: A number is not finite.
    """
    first, second = _numbers(on, "on"), _numbers(off, "off")
    if first.shape != second.shape:
        raise SpecError(f"{first.size} contexts on and {second.size} off; matched contexts come in pairs", "off")
    note = f"KL {first.mean():.3g} where on, {second.mean():.3g} where off" if first.size else ""
    return _flipped("specificity", first - second, groups, n, seed, note)


def dose_step(
    doses: Numbers,
    effects: Numbers,
    groups: Sequence[Hashable] | None = None,
    *,
    n: int = 9999,
    seed: int = 0,
) -> Step:
    """Return the step of a monotone dose response: the mean Spearman correlation of dose and effect over prompts.

    p by permuting the effects among the doses, in the same way for all prompts of a group; all orders are listed where
    they are no more than `n`.

    Args:
        doses: The doses, five or more, `[doses]`.
        effects: The effect of each, `[prompts, doses]`, or `[doses]` for a single curve.
        groups: The group of each prompt.
        n: Number of random orders.
        seed: Seed of the stream.

    Raises:
        SpecError: There are fewer than five doses, some are equal, or the shapes differ.
        NumericalError: A number is not finite.

    Source: Page 1963, "Ordered hypotheses for multiple treatments" (the same test on ranks).

    Example:
        >>> step = dose_step([0.5, 1, 2, 4, 8], [0.1, 0.3, 0.2, 0.9, 1.4])
        >>> round(step.value, 6), round(step.p * 120)
        (0.9, 5)
    """
    from scipy.stats import rankdata

    amounts, table = _numbers(doses, "doses"), np.atleast_2d(_array(effects, "effects"))
    if amounts.size < DOSES or np.unique(amounts).size != amounts.size:
        raise SpecError(f"doses are {amounts.tolist()}; a dose response needs {DOSES} different doses or more", "doses")
    if table.ndim != 2 or table.shape[1] != amounts.size:
        raise SpecError(
            f"effects has the shape {table.shape} for {amounts.size} doses; it must be [prompts, doses]", "effects"
        )
    ranks = rankdata(table, axis=1)
    ranks -= ranks.mean(axis=1, keepdims=True)
    size = np.linalg.norm(ranks, axis=1, keepdims=True)
    ranks = np.divide(ranks, size, out=np.zeros_like(ranks), where=size > 0)  # a flat curve has no correlation: 0
    target = rankdata(amounts) - (amounts.size + 1) / 2
    target /= np.linalg.norm(target)
    sums = _by_group(ranks, groups) / len(ranks)
    value = float(sums.sum(axis=0) @ target)
    orders = math.factorial(amounts.size)
    if orders ** min(len(sums), 64) <= n + 1:
        null = np.einsum("ngd,gd->n", _products(target, len(sums)), sums)
    else:
        rng = numpy_stream(seed, "feature", "dose")
        drawn = rng.permuted(np.broadcast_to(target, (n, len(sums), amounts.size)), axis=2)
        null = np.einsum("ngd,gd->n", drawn, sums)
    return Step(
        name="dose",
        value=value,
        p=permutation_p(value, null),
        least_p=1 / (len(null) + 1),
        n=len(table),
        note=f"{amounts.size} doses",
    )


def null_step(
    name: Literal["decodes", "random directions", "matched latents", "re-initialised"],
    value: float,
    null: Numbers,
    side: Side = "greater",
) -> Step:
    """Return the step that holds a value against draws from its null.

    Args:
        name: Which step. "decodes": a probe's score and its score on permuted labels. "random directions" and "matched
            latents": the effect, and the effect of each of them. "re-initialised": a score on the trained model, and
            the same pipeline's on models with random weights.
        value: The value.
        null: The draws; "random directions" count from 200 on, "matched latents" from 50.
        side: The direction of the claim.

    Raises:
        SpecError: There are no draws.
        NumericalError: A number is not finite.

    Example:
        >>> step = null_step("random directions", 2.0, np.linspace(-1, 1, 200))
        >>> step.percentile, round(step.p, 4)
        (100.0, 0.005)
    """
    if name not in ("decodes", "random directions", "matched latents", "re-initialised"):
        raise SpecError(f"{name!r} is no step with a null; see null_step for those that have one", "name")
    draws, point = _numbers(null, "null"), float(_array([value], "value")[0])
    p = permutation_p(point, draws, side)
    below = float(np.mean(draws < point) + 0.5 * np.mean(draws == point))
    least = (2 if side == "two" else 1) / (draws.size + 1)
    note, needed = "", LEAST.get(name, 1)
    if draws.size < needed:
        note, least = f"{draws.size} draws are too few, {needed} are needed", 1.0
    return Step(name=name, value=point, p=p, least_p=least, n=draws.size, percentile=100 * below, note=note)


def recurrence_step(cosine: float, null: Numbers | None = None) -> Step:
    """Return the step of what comes back with another data set: the best cosine to its latents, which must be above .7.

    Args:
        cosine: The largest cosine between the feature's direction and the other dictionary's decoder rows.
        null: The same for random directions of the feature's covariance, if a p-value is wanted beside.

    Raises:
        SpecError: The cosine lies outside [-1, 1].
    """
    value = float(_array([cosine], "cosine")[0])
    if abs(value) > 1 + 1e-6:
        raise SpecError(f"cosine is {value}; it lies between -1 and 1", "cosine")
    step = Step(name="other data", value=value, passed=value > RECURS, note="passes above 0.7; beside the verdict")
    if null is None:
        return step
    draws = _numbers(null, "null")
    below = 100 * float(np.mean(draws < value) + 0.5 * np.mean(draws == value))
    p = permutation_p(value, draws)
    return replace(step, p=p, least_p=1 / (draws.size + 1), n=draws.size, percentile=below)


def feature_verdict(steps: Sequence[Step], alpha: float = 0.05) -> FeatureReport:
    """Return whether something is a feature of the model or of the data, from the steps that were taken.

    Args:
        steps: The steps, in any order. A step that is missing was not taken, and no verdict that needs it is given.
        alpha: The false discovery rate across the steps.

    Raises:
        SpecError: A step is given twice, or alpha is no rate.

    Source: the steps are ours; the claim that random models have such latents too: Heap et al. 2025, "Sparse
    autoencoders can interpret randomly initialized transformers".

    Example:
        >>> rng = np.random.default_rng(0)
        >>> nothing = rng.normal(size=40)
        >>> report = feature_verdict(
        ...     [
        ...         null_step("decodes", 0.95, 0.5 + 0.05 * rng.normal(size=199)),
        ...         effect_step("necessity", nothing - nothing.mean()),
        ...         effect_step("sufficiency", nothing - nothing.mean()),
        ...     ]
        ... )
        >>> report.verdict
        'data-set feature'
    """
    if not 0 < alpha < 1:
        raise SpecError(f"alpha is {alpha!r}; a rate lies between 0 and 1, such as 0.05", "alpha")
    names = [step.name for step in steps]
    twice = [name for name in names if names.count(name) > 1]
    if twice:
        raise SpecError(f"the step {twice[0]!r} is given {names.count(twice[0])} times", "steps")
    given = {step.name: step for step in steps}
    tested = [s for s in steps if s.name != "other data" and s.p is not None and s.least_p <= alpha]
    adjusted = benjamini_hochberg([step.p for step in tested]) if tested else np.zeros(0)
    for step, q in zip(tested, adjusted, strict=True):
        given[step.name] = replace(step, adjusted=float(q), passed=bool(q <= alpha and step.value > _floor(step.name)))
    for step in steps:
        if step.name != "other data" and given[step.name].adjusted is None:
            given[step.name] = replace(step, passed=None, note=step.note or f"too few draws for p <= {alpha}")
    every = tuple(given.get(name, Step(name=name, value=math.nan, note="not taken")) for name in get_args(StepName))
    verdict, reason = _decide({step.name: step.passed for step in every})
    return FeatureReport(verdict=verdict, steps=every, alpha=alpha, reason=reason)


def _floor(name: str) -> float:
    """An effect in the wrong direction passes nothing; a score has no sign."""
    return 0.0 if name in ("necessity", "sufficiency", "specificity", "dose") else -math.inf


def _decide(passed: dict[StepName, bool | None]) -> tuple[FeatureVerdict, str]:
    wanted: tuple[StepName, ...] = (*CAUSAL, "re-initialised")
    if all(passed[name] for name in wanted):
        return "model feature", "every causal step passes, and the model with random weights has no such feature"
    if passed["decodes"] and passed["necessity"] is False and passed["sufficiency"] is False:
        return "data-set feature", "it can be read, and the model's output depends neither on removing nor on adding it"
    failed = [name for name in wanted if passed[name] is False]
    missing = [name for name in wanted if passed[name] is None]
    parts = [f"{', '.join(names)} {what}" for names, what in ((failed, "failed"), (missing, "not tested")) if names]
    return "undecided", "; ".join(parts)


def _flipped(name: StepName, effects: Numbers, groups: Sequence[Hashable] | None, n: int, seed: int, note: str) -> Step:
    values = _numbers(effects, "effects")
    test = sign_flip_test(values, n=n, seed=seed, groups=groups)
    units = values.size if groups is None else len(set(groups))
    return Step(name=name, value=test.value, p=test.p, least_p=1 / (len(test.null) + 1), n=units, note=note)


def _by_group(ranks: Float[np.ndarray, "prompts doses"], groups: Sequence[Hashable] | None) -> np.ndarray:
    if groups is None:
        return ranks
    if len(groups) != len(ranks):
        raise SpecError(f"groups has {len(groups)} labels for {len(ranks)} prompts; it needs one a prompt", "groups")
    number = {group: i for i, group in enumerate(dict.fromkeys(groups))}
    sums = np.zeros((len(number), ranks.shape[1]))
    np.add.at(sums, [number[group] for group in groups], ranks)
    return sums


def _products(target: np.ndarray, times: int) -> np.ndarray:
    """Every order of the doses for each of several units, but the one in which all are in order."""
    every = itertools.product(itertools.permutations(target), repeat=times)
    return np.array(list(every))[1:]


def _numbers(values: Numbers, what: str) -> np.ndarray:
    found = _array(values, what).ravel()
    if not found.size:
        raise SpecError(f"{what} is empty; a step needs numbers", what)
    return found


def _array(values: Numbers, what: str) -> np.ndarray:
    found = np.array(values, dtype=np.float64)
    if not np.isfinite(found).all():
        raise NumericalError(f"{what}: {int(np.sum(~np.isfinite(found)))} of {found.size} numbers are NaN or infinite")
    return found
