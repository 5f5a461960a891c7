"""The charts of `explain`: every measurement as a view, with the Python that computes it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np

from assay.base.labels import token_label
from assay.base.views import Bars, Distribution, Heatmap, Lines, Prompt, Scatter, Series, Table, View
from assay.explain.results import Results
from assay.explain.snippets import Snippets
from assay.explain.steps import DIRECTIONS, KINDS, Steps, curve_sizes

_POINTS = {
    "resid_pre": ("Residual stream", "the stream entering the block"),
    "attn.out": ("Attention output", "what the block's attention writes"),
    "mlp.out": ("MLP output", "what the block's MLP writes"),
}
_SAY = {
    "denoising": "clean into corrupt: 1 restores the whole preference, 0 nothing",
    "noising": "corrupt into clean: 1 destroys the whole preference, 0 nothing",
}
SHOWN = 24
_PAIRS = "standard deviations over random pairs"
_LENS = "Lens and direct attribution"


class Charts:
    """Builds views from results.

    Args:
        results: What was measured.
        steps: The steps, for the spec.
        model: How the user referred to the model.
        decode: From a token's id to its text.
    """

    def __init__(self, results: Results, steps: Steps, model: str, decode: Callable[[int], str]) -> None:
        self.results, self.steps, self.decode = results, steps, decode
        self.code = Snippets(results, steps.spec, model, steps.seed)
        self.blocks = [str(i) for i in range(steps.shape.n_layers)]
        self.answer, self.foil = results.words
        self.difference = f"logit difference, {token_label(self.answer)} minus {token_label(self.foil)}"

    def prompt(self) -> View:
        """The question."""
        results = self.results
        return Prompt(
            id="prompt",
            section="Question",
            title="The question",
            tokens=results.tokens,
            contrast=results.corrupt_tokens,
            answer=self.answer,
            foil=self.foil,
            python=self.code.task(),
        )

    def baseline(self) -> list[View]:
        """The next-token distributions."""
        found: list[View] = []
        base = self.results.values["baseline"]
        for side in ("clean", "corrupt"):
            found.append(
                Bars(
                    id=f"next-token-{side}",
                    section="Baseline",
                    title=f"Next token, {side}",
                    caption=f"The {len(base[f'{side}_top'])} likeliest next tokens of the {side} prompt. "
                    f"{self.difference}: "
                    f"{float(base[f'{side}_difference']):.3f}.",
                    labels=[self.decode(token) for token in base[f"{side}_top"]],
                    values=list(base[f"{side}_probability"]),
                    unit="probability",
                    label_tokens=True,
                    python=self.code.baseline(side),
                )
            )
        return found

    def lens(self) -> list[View]:
        """The logit lens: at the last position, at every position, and in words."""
        return [self._lens_last(), self._lens_grid(), self._lens_tokens()]

    def _lens_last(self) -> View:
        values = self.results.values["lens"]
        draws = np.array([draw["lens"] for kind in KINDS for draw in self.results.untrained[kind]])[:, 1:]
        series = [
            Series(name=side, values=np.asarray(values[f"{side}_difference"])[1:, -1].tolist())
            for side in ("clean", "corrupt")
        ]
        middle = Series(
            name=f"untrained weights (median and middle half of {len(draws)})",
            values=np.median(draws, 0).tolist(),
            low=np.quantile(draws, 0.25, axis=0).tolist(),
            high=np.quantile(draws, 0.75, axis=0).tolist(),
        )
        return Lines(
            id="lens-last",
            section=_LENS,
            title="Logit lens at the last position",
            caption=f"The {self.difference}, read from the stream after each block through the model's own final norm "
            "and unembedding. Early layers need not be in the final basis.",
            x=self.blocks,
            series=[*series, middle],
            x_title="after block",
            y_title="logits",
            python=self.code.lens(),
        )

    def _lens_grid(self) -> View:
        return Heatmap(
            id="lens-grid",
            section=_LENS,
            title="Logit lens at every position, clean",
            caption=f"The {self.difference}, at each position of the clean prompt.",
            rows=["embed", *self.blocks],
            columns=self.results.tokens,
            values=np.asarray(self.results.values["lens"]["clean_difference"]).tolist(),
            row_title="after block",
            column_title="position",
            unit="logits",
            column_tokens=True,
            python=self.code.lens_grid(),
        )

    def _lens_tokens(self) -> View:
        values = self.results.values["lens"]
        probability, rank = np.asarray(values["clean_probability"]), np.asarray(values["clean_rank"])
        tops = [token_label(self.decode(token)) for token in values["clean_top"]]
        after = ["embed", *self.blocks]
        answer = token_label(self.answer)
        return Table(
            id="lens-tokens",
            section=_LENS,
            title="What the lens says at the last position, clean",
            caption=f"The best token after each block, with the probability and the rank (0 is best) of {answer}.",
            columns=("after block", "best token", f"p({answer})", f"rank of {answer}"),
            rows=[(after[i], tops[i], float(probability[i]), float(rank[i])) for i in range(len(after))],
            python=self.code.lens_tokens(),
        )

    def direct(self) -> list[View]:
        """Direct logit attribution."""
        names = list(self.results.values["direct"]["names"])
        parts = np.asarray(self.results.values["direct"]["parts"])
        by_name = dict(zip(names, parts.tolist(), strict=True))
        order = np.argsort(-np.abs(parts))[:SHOWN]
        n_heads = self.steps.shape.n_heads
        heads = [[by_name[f"L{block}H{head}"] for head in range(n_heads)] for block in range(len(self.blocks))]
        sums = {
            "embeddings": sum(v for k, v in by_name.items() if k.endswith("embed")),
            "heads": float(np.sum(heads)),
            "MLPs": sum(v for k, v in by_name.items() if k.startswith("MLP")),
            **{
                k: v
                for k, v in by_name.items()
                if k in ("attention biases", "norm bias", "unembedding bias", "soft-cap")
            },
        }
        total = float(self.results.values["direct"]["total"])
        error = float(self.results.values["direct"]["error"])
        return [
            Bars(
                id="direct-sums",
                section=_LENS,
                title="Direct logit attribution by kind",
                caption=f"Every writer's own contribution to the {self.difference}, final norm frozen. The "
                f"parts sum to {total:.4f} "
                f"(relative error {error:.1g}).",
                labels=list(sums),
                values=list(sums.values()),
                unit="logits",
                python=self.code.direct(),
            ),
            Bars(
                id="direct-top",
                section=_LENS,
                title=f"The {len(order)} largest direct contributions",
                caption="Positive pushes towards the answer. Effects through later components are not in these.",
                labels=[names[i] for i in order],
                values=parts[order].tolist(),
                unit="logits",
                python=self.code.direct(),
            ),
            Heatmap(
                id="direct-heads",
                section=_LENS,
                title="Direct logit attribution of every head",
                caption="Positive pushes towards the answer.",
                rows=self.blocks,
                columns=[str(h) for h in range(n_heads)],
                values=heads,
                row_title="block",
                column_title="head",
                unit="logits",
                python=self.code.direct(),
            ),
        ]

    def patching(self) -> list[View]:
        """Exact patching by layer and position, and by head."""
        found: list[View] = []
        for point, (name, what) in _POINTS.items():
            for direction in DIRECTIONS:
                found.append(
                    Heatmap(
                        id=f"patch-{point.replace('.', '-').replace('_', '-')}-{direction}",
                        section="Exact patching",
                        title=f"{name}, {direction}",
                        caption=f"{what.capitalize()}, {_SAY[direction]}.",
                        rows=self.blocks,
                        columns=self.results.tokens,
                        values=self.results.normalised(f"{point} {direction}").tolist(),
                        row_title="block",
                        column_title="position",
                        unit="normalised effect",
                        column_tokens=True,
                        python=self.code.grid(point, direction),
                    )
                )
        for direction in DIRECTIONS:
            found += self._by_component(direction)
        return found

    def _by_component(self, direction: str) -> list[View]:
        effects = self.results.normalised(f"components {direction}")
        parts, n_heads = self.results.parts, self.steps.shape.n_heads
        heads = np.array([e for e, part in zip(effects, parts, strict=True) if part.kind == "head"]).reshape(
            -1, n_heads
        )
        order = np.argsort(-np.abs(effects))[:SHOWN]
        return [
            Heatmap(
                id=f"patch-heads-{direction}",
                section="Exact patching",
                title=f"Every head, {direction}",
                caption=f"The head's z at all positions, {_SAY[direction]}.",
                rows=self.blocks,
                columns=[str(h) for h in range(n_heads)],
                values=heads.tolist(),
                row_title="block",
                column_title="head",
                unit="normalised effect",
                python=self.code.components(direction),
            ),
            Bars(
                id=f"patch-top-{direction}",
                section="Exact patching",
                title=f"The {len(order)} largest components, {direction}",
                caption=f"Heads (z) and MLPs (output) at all positions, {_SAY[direction]}.",
                labels=[parts[i].name for i in order],
                values=effects[order].tolist(),
                unit="normalised effect",
                python=self.code.components(direction),
            ),
        ]

    def attribution(self) -> list[View]:
        """The fast estimate beside the exact effect."""
        found: list[View] = []
        names = [part.name for part in self.results.parts]
        for direction in DIRECTIONS:
            exact = self.results.effect(f"components {direction}")
            fast = np.asarray(self.results.values["attribution"][direction])
            worst = np.argsort(-np.abs(fast - exact))[:10]
            found.append(
                Scatter(
                    id=f"attribution-{direction}",
                    section="Fast attribution",
                    title=f"Attribution patching beside exact patching, {direction}",
                    caption=f"Each point is a head or an MLP. One backward pass gives all estimates; on the "
                    f"line they are exact. "
                    f"Pearson {np.corrcoef(fast, exact)[0, 1]:.3f}.",
                    x=exact.tolist(),
                    y=fast.tolist(),
                    labels=names,
                    x_title="exact effect (logits)",
                    y_title="estimate from one backward (logits)",
                    identity_line=True,
                    python=self.code.attribution(direction),
                )
            )
            found.append(
                Table(
                    id=f"attribution-worst-{direction}",
                    section="Fast attribution",
                    title=f"The worst misses, {direction}",
                    caption="Where one backward pass would mislead: saturation, and effects that need many "
                    "positions at once.",
                    columns=("component", "exact", "estimate", "miss"),
                    rows=[(names[i], float(exact[i]), float(fast[i]), float(fast[i] - exact[i])) for i in worst],
                    python=self.code.attribution(direction),
                )
            )
        return found

    def sets(self) -> list[View]:
        """Sufficiency and necessity."""
        values = self.results.values["curve"]
        sizes = curve_sizes(len(self.results.parts))
        section = "Sufficiency and necessity"
        kept, lost = np.asarray(values["kept"])[: len(sizes)], np.asarray(values["lost"])[: len(sizes)]
        top = len(self.results.top)
        found: list[View] = [
            Lines(
                id="sets-curve",
                section=section,
                title="How much the top components keep, and how much is lost without them",
                caption="Components ranked by their exact effect (noising). Kept: all others resample-ablated. "
                "Lost: only these "
                "resample-ablated. Shares of the preference between everything ablated (0) and nothing (1); "
                "above 1, what was "
                "ablated worked against the answer.",
                x=[float(k) for k in sizes],
                series=[Series(name="kept", values=kept.tolist()), Series(name="lost", values=lost.tolist())],
                x_title="number of top components",
                y_title="share of the preference",
                log_x=True,
                python=self.code.curve(),
            )
        ]
        for which in ("kept", "lost") if self.results.random["kept"].size else ():
            found.append(
                Distribution(
                    id=f"sets-{which}",
                    section=section,
                    title=f"The top {top} against random sets: {which}",
                    caption=f"{len(self.results.random[which])} random sets with as many heads and as many MLPs.",
                    null={"random sets": self.results.random[which].tolist()},
                    estimate=float(np.asarray(values[which])[-1]),
                    unit=f"share of the preference {which}",
                    python=self.code.sets(),
                )
            )
        return found

    def controls(self) -> list[View]:
        """The pipeline on untrained weights."""
        preference, largest = self.results.preference, self.results.largest
        untrained = self.results.untrained
        found: list[View] = [
            Distribution(
                id="untrained-gap",
                section="Controls",
                title="The preference with untrained weights",
                caption="Clean minus corrupt logit difference, in standard deviations of the same change over random "
                "pairs of tokens, on the same architecture with Gaussian and with spectrum-matched weights.",
                null={kind: [preference(draw["difference"]) for draw in untrained[kind]] for kind in KINDS},
                estimate=preference(self.results.values["baseline"]),
                unit=_PAIRS,
                python=self.code.draws(),
            ),
            Distribution(
                id="untrained-component",
                section="Controls",
                title="The largest component effect with untrained weights",
                caption="The change when the most important component is corrupted (noising), in the same unit, "
                "against "
                "the largest in each draw.",
                null={kind: [largest(draw) for draw in untrained[kind]] for kind in KINDS},
                estimate=largest(),
                unit=_PAIRS,
                python=self.code.draws(),
            ),
        ]
        for kind in KINDS:
            found.append(self._untrained_grid(kind))
        return found

    def _untrained_grid(self, kind: str) -> View:
        draw = self.results.untrained[kind][0]
        base = float(draw["difference"]["corrupt_difference"])
        return Heatmap(
            id=f"untrained-{kind}",
            section="Controls",
            title=f"Residual stream, denoising, {kind} weights",
            caption="The same patching on untrained weights, in logits: the architecture alone makes part of "
            "the picture, such as "
            "the cells before the first block.",
            rows=self.blocks,
            columns=self.results.tokens,
            values=(np.asarray(draw["resid_pre_denoising"]) - base).tolist(),
            row_title="block",
            column_title="position",
            unit="logits",
            column_tokens=True,
            python=self.code.untrained(kind),
        )

    def variations(self) -> list[View]:
        """The effect on other prompts."""
        found = self.results.values["variations"]
        gap = np.asarray(found["clean"]) - np.asarray(found["corrupt"])
        labels = [
            f"{i + 1} {self.decode(q.answer) if q.answer is not None else ''}"
            for i, q in enumerate(self.results.inputs.variations)
        ]
        views: list[View] = [
            Bars(
                id="variations-gap",
                section="Variations",
                title="The preference on each variation",
                caption="Clean minus corrupt logit difference of each prompt of the file.",
                labels=labels,
                values=gap.tolist(),
                unit="logits",
                python=self.code.variations(),
            )
        ]
        for which in ("kept", "lost"):
            views.append(
                Bars(
                    id=f"variations-{which}",
                    section="Variations",
                    title=f"The main prompt's top components on each variation: {which}",
                    caption="These prompts did not choose the components.",
                    labels=labels,
                    values=np.asarray(found[which]).tolist(),
                    unit=f"share of the preference {which}",
                    python=self.code.variations(),
                )
            )
        return views


def charts(results: Results, steps: Steps, model: str, decode: Callable[[int], str]) -> list[View]:
    """Every view of a study, in the order of the report."""
    make = Charts(results, steps, model, decode)
    found: list[Any] = [make.prompt(), *make.baseline(), *make.lens(), *make.direct(), *make.patching()]
    found += [*make.attribution(), *make.sets(), *make.controls()]
    if "variations" in results.values:
        found += make.variations()
    return found
