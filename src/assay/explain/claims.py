"""The findings of `explain`: each claim with its estimate, its controls and its verdict."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from assay.base.findings import Control, Finding
from assay.base.labels import token_label
from assay.base.method import Context
from assay.base.stats import Interval, Side, bootstrap_interval, correlation_interval, pearson
from assay.controls.labels import permutation_test
from assay.controls.prompts import prompt_effect
from assay.controls.verdicts import compare, verdict
from assay.explain.results import Results
from assay.explain.steps import KINDS, Steps

ONE_PROMPT = "one prompt, measured exactly; variations of it (--vary) would give an interval"
_UNTRAINED = (
    "the same pipeline on the same architecture with untrained weights: half the draws Gaussian with each "
    "matrix's mean and sd, "
    "half spectrum-matched (singular values kept, singular vectors random)"
)


class Claims:
    """Builds findings from results.

    Args:
        results: What was measured.
        steps: The steps, for their names.
        ctx: The context, for cost and provenance.
    """

    def __init__(self, results: Results, steps: Steps, ctx: Context) -> None:
        self.results, self.steps, self.ctx = results, steps, ctx
        self.answer, self.foil = (token_label(word) for word in results.words)
        base = results.values["baseline"]
        self.clean, self.corrupt = float(base["clean_difference"]), float(base["corrupt_difference"])
        self.untrained_steps = [steps.untrained(kind, i).name for kind in KINDS for i in range(steps.spec.untrained)]

    def untrained(self, statistic: Any) -> list[float]:
        """A statistic of every untrained draw."""
        return [float(statistic(draw)) for kind in KINDS for draw in self.results.untrained[kind]]

    def finding(
        self,
        claim: str,
        estimate: float,
        unit: str,
        controls: Sequence[Control],
        used: Sequence[str],
        *,
        side: Side = "greater",
        interval: Interval | None = None,
        n: int = 1,
        tags: tuple[str, ...] = (),
        detail: dict[str, Any] | None = None,
    ) -> Finding:
        """One finding, with its verdict, cost and provenance."""
        return Finding(
            claim=claim,
            estimate=estimate,
            unit=unit,
            interval=interval,
            interval_note="" if interval is not None else ONE_PROMPT,
            n=n,
            controls=tuple(controls),
            verdict=verdict(estimate, controls, interval, claim_side=side),
            cost=self.ctx.cost(*used),
            provenance=self.ctx.provenance(self.steps.question),
            tags=tags,
            detail=detail or {},
        )

    def preference(self) -> Finding:
        """What differs between the prompts moves this pair of tokens, and not just any pair."""
        base = self.results.values["baseline"]
        gap, spread = self.clean - self.corrupt, float(base["spread"])
        estimate = self.results.preference(base)
        null = self.untrained(lambda draw: self.results.preference(draw["difference"]))
        return self.finding(
            f"what the corruption removes makes the model prefer {self.answer} to {self.foil}: {gap:.2f} logits, "
            f"{estimate:.1f} standard deviations of what it moves random pairs of tokens",
            estimate,
            "standard deviations of the change over random token pairs",
            [
                compare(
                    "random token pairs",
                    "the same change for random pairs of tokens",
                    estimate,
                    np.asarray(base["pairs"]) / spread,
                ),
                compare("untrained weights", _UNTRAINED, estimate, null),
            ],
            [self.steps.baseline().name, *self.untrained_steps],
            tags=("baseline",),
            detail={"clean": self.clean, "corrupt": self.corrupt, "logits": gap},
        )

    def lens(self) -> Finding:
        """The lens sees the preference only late."""
        curve = np.asarray(self.results.values["lens"]["clean_difference"])[:, -1]

        def depth(values: Any) -> float:
            return settled(np.asarray(values)) / (len(curve) - 1)

        estimate = depth(curve)
        null = self.untrained(lambda draw: depth(draw["lens"]))
        block = settled(curve)
        return self.finding(
            f"the logit lens reads the preference at the last position only from block {block} of {len(curve) - 1} on",
            estimate,
            "share of the depth before the lens stays above half its final value",
            [compare("untrained weights", _UNTRAINED, estimate, null)],
            [self.steps.lens().name, *self.untrained_steps],
            tags=("lens",),
            detail={"block": block},
        )

    def direct(self) -> Finding:
        """The largest direct contribution."""
        names, parts = self.results.values["direct"]["names"], np.asarray(self.results.values["direct"]["parts"])
        best = int(np.argmax(parts))
        estimate = float(parts[best]) / float(self.results.values["baseline"]["scale"])
        null = self.untrained(lambda draw: np.max(np.asarray(draw["direct"])) / draw["difference"]["scale"])
        return self.finding(
            f"{names[best]} writes the most for {self.answer} over {self.foil} directly to the logits: "
            f"{parts[best]:.2f}",
            estimate,
            "standard deviations of the logit difference over random token pairs",
            [compare("untrained weights, largest part", _UNTRAINED, estimate, null)],
            [self.steps.decomposition().name, *self.untrained_steps],
            tags=("direct attribution",),
            detail={
                "part": names[best],
                "logits": float(parts[best]),
                "sum_relative_error": float(self.results.values["direct"]["error"]),
            },
        )

    def strongest(self, kind: str) -> Finding:
        """The head (or MLP) whose corruption hurts the most, against the most that chance finds."""
        members = [i for i, part in enumerate(self.results.parts) if part.kind == kind]
        hurt = -self.results.effect("components noising")[members]
        best = int(np.argmax(hurt))
        part = self.results.parts[members[best]]
        estimate = self.results.largest(kind=kind)
        null = self.untrained(lambda draw: self.results.largest(draw, kind))
        word = "head" if kind == "head" else "MLP"
        return self.finding(
            f"of all {word}s, {part.name} matters most: with it corrupted the preference drops by "
            f"{hurt[best]:.2f} logits",
            estimate,
            "standard deviations of the change over random token pairs (exact, noising)",
            [compare(f"untrained weights, largest {word}", _UNTRAINED, estimate, null)],
            [self.steps.components("noising").name, *self.untrained_steps],
            tags=("patching", word.lower()),
            detail={
                "component": part.name,
                "site": part.site,
                "logits": float(hurt[best]),
                "denoising": float(self.results.effect("components denoising")[members][best]),
            },
        )

    def arrival(self) -> Finding:
        """When the deciding information reaches the last position."""
        grid = self.results.normalised("resid_pre denoising")
        n = grid.shape[0]
        block = arrives(grid[:, -1])
        estimate = block / n
        source = int(np.argmax(grid[0]))
        stays = int(np.sum(grid[:, source] >= 0.5)) if source < grid.shape[1] - 1 else 0
        return self.finding(
            f"the preference reaches the last position at block {block} of {n}; until block {stays} the stream at "
            f"{token_label(self.results.tokens[source])} (position {source}) carries it",
            estimate,
            "share of the depth before the last position's stream restores half of the preference",
            [
                compare(
                    "untrained weights",
                    _UNTRAINED,
                    estimate,
                    self.untrained(lambda d: arrives(np.asarray(d["arrival"])) / n),
                )
            ],
            [self.steps.grid("resid_pre", "denoising").name, *self.untrained_steps],
            tags=("patching", "residual"),
            detail={"block": block, "position": source, "token": self.results.tokens[source], "stays_until": stays},
        )

    def agreement(self, direction: str) -> Finding:
        """How far the fast estimate can be trusted in place of the exact effect."""
        exact = self.results.effect(f"components {direction}")
        fast = np.asarray(self.results.values["attribution"][direction], dtype=np.float64)
        estimate = pearson(fast, exact)
        test = permutation_test(lambda x, y: pearson(x, y), fast, exact.astype(np.float64), n=999, seed=self.ctx.seed)
        worst = np.argsort(-np.abs(fast - exact))[:5]
        return self.finding(
            f"attribution patching ranks components as exact patching does ({direction})",
            estimate,
            "Pearson correlation over heads and MLPs",
            [compare("shuffled components", "exact effects assigned to components at random", estimate, test.null)],
            [self.steps.attribution().name, self.steps.components(direction).name],
            interval=correlation_interval(fast, exact, seed=self.ctx.seed),
            n=len(exact),
            tags=("attribution", direction),
            detail={
                "worst": [
                    {"component": self.results.parts[i].name, "fast": float(fast[i]), "exact": float(exact[i])}
                    for i in worst
                ]
            },
        )

    def set_effect(self, which: str) -> Finding:
        """Sufficiency or necessity of the top components against random sets."""
        k = len(self.results.top)
        estimate = float(np.asarray(self.results.values["curve"][which])[-1])
        heads = sum(part.kind == "head" for part in self.results.top)
        make = f"{heads} head{'s' * (heads != 1)} and {k - heads} MLP{'s' * (k - heads != 1)}"
        null = self.results.random[which]
        claim = {
            "kept": f"the top {k} components ({make}) are enough: with all others corrupted they keep the preference",
            "lost": f"the top {k} components ({make}) are needed: with only them corrupted the preference is lost",
        }[which]
        used = [self.steps.curve().name, *(self.steps.random_sets(c).name for c in range(self.steps.n_chunks))]
        controls = [compare("random sets", f"random sets of {make}", estimate, null)]
        return self.finding(
            claim,
            estimate,
            "share of the preference " + ("kept" if which == "kept" else "lost"),
            controls,
            used,
            tags=("sets", "sufficiency" if which == "kept" else "necessity"),
            detail={"components": [part.name for part in self.results.top]},
        )

    def variations(self) -> list[Finding]:
        """The effect, and the top components, on other prompts."""
        found = self.results.values["variations"]
        gap = np.asarray(found["clean"]) - np.asarray(found["corrupt"])
        effect = prompt_effect(gap, seed=self.ctx.seed)
        used = [self.steps.variations().name]
        findings = [
            self.finding(
                "over the variations, what the corruption removes makes the model prefer the answer",
                effect.estimate,
                "logits (clean minus corrupt logit difference), mean",
                [effect.control],
                used,
                interval=effect.interval,
                n=effect.n,
                tags=("variations",),
            )
        ]
        for which in ("kept", "lost"):
            findings.append(self._held_out(which))
        return findings

    def _held_out(self, which: str) -> Finding:
        """What the main prompt's top components keep or lose over the variations, as a ratio of sums."""
        found = self.results.values["variations"]
        span = np.asarray(found["span"])
        part = np.asarray(found[which]) * span
        estimate = float(part.sum() / span.sum())
        swapped = prompt_effect(part, seed=self.ctx.seed).control
        null = np.asarray(swapped.null) / float(span.mean())
        interval = None
        if len(span) > 1:
            pairs = np.stack([part, span], axis=1)
            interval = bootstrap_interval(
                pairs, lambda rows: float(rows[:, 0].sum() / rows[:, 1].sum()), seed=self.ctx.seed
            )
        return self.finding(
            f"the top components of the main prompt are {'enough' if which == 'kept' else 'needed'} for the "
            "variations, which did not choose them",
            estimate,
            f"share of the preference {which}, over all variations",
            [compare(swapped.name, swapped.description, estimate, null)],
            [self.steps.variations().name],
            interval=interval,
            n=len(span),
            tags=("variations", "sets"),
        )


def settled(curve: np.ndarray[Any, Any]) -> int:
    """The first block after which a curve stays at or above half its final value (0 is the embedding)."""
    final = float(curve[-1])
    above = curve >= final / 2 if final > 0 else curve <= final / 2
    below = np.flatnonzero(~above)
    return int(below[-1]) + 1 if below.size else 0


def arrives(curve: np.ndarray[Any, Any]) -> int:
    """The first block at whose input a curve reaches one half for good (the number of blocks if it never does)."""
    short = np.flatnonzero(~(curve >= 0.5))
    return int(short[-1]) + 1 if short.size else 0


def _percent(share: float) -> str:
    return f"{share + 0.0 if abs(share) >= 0.005 else 0.0:.0%}"


def claims(results: Results, steps: Steps, ctx: Context) -> list[Finding]:
    """Every finding of a study, in the order of the report."""
    make = Claims(results, steps, ctx)
    found = [make.preference(), make.lens(), make.direct(), make.arrival()]
    found += [make.strongest("head"), make.strongest("mlp")]
    found += [make.agreement("noising"), make.agreement("denoising")]
    found += [make.set_effect("kept"), make.set_effect("lost")]
    if "variations" in results.values:
        found += make.variations()
    return found


def headlines(results: Results, findings: Sequence[Finding]) -> list[str]:
    """The lines at the top of the report."""
    base = results.values["baseline"]
    answer, foil = (token_label(word) for word in results.words)
    probability = float(base["clean_pair"][0])
    noise = results.inputs.question.corrupt is None
    lines = [
        f"The model gives {answer} {probability:.1%} and prefers it to {foil} by "
        f"{float(base['clean_difference']):.2f} logits; "
        f"{'under noise' if noise else 'on the corrupt prompt'} by {float(base['corrupt_difference']):.2f}."
    ]
    hurt = -results.effect("components noising")
    heads = [i for i in np.argsort(-hurt) if results.parts[i].kind == "head"][:3]
    mlps = [i for i in np.argsort(-hurt) if results.parts[i].kind == "mlp"][:3]

    def names(chosen: Sequence[Any]) -> str:
        return ", ".join(f"{results.parts[i].name} ({hurt[i]:.1f})" for i in chosen)

    lines.append(f"Corrupting one component costs the most logits at heads {names(heads)} and {names(mlps)}.")
    kept = float(np.asarray(results.values["curve"]["kept"])[-1])
    lost = float(np.asarray(results.values["curve"]["lost"])[-1])
    typical = {name: _percent(np.median(null)) if null.size else "unknown" for name, null in results.random.items()}
    lines.append(
        f"The top {len(results.top)} of {len(results.parts)} components keep {_percent(kept)} of the preference "
        f"alone; random sets of the same make keep {typical['kept']} (median). Without them {_percent(lost)} is lost; "
        f"without random sets {typical['lost']}."
    )
    supported = sum(finding.verdict == "supported" for finding in findings)
    lines.append(f"{supported} of {len(findings)} findings stand against their controls.")
    return lines
