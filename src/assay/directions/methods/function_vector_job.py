"""The `function-vector` study: what is measured, held against what, and said how."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np

from assay.base.errors import SpecError
from assay.base.findings import Finding, Findings
from assay.base.hashing import digest
from assay.base.method import Context, Progress, StepSpec
from assay.base.rng import numpy_stream
from assay.base.snippets import snippet
from assay.base.stats import bootstrap_interval
from assay.base.views import Bars, Distribution, Heatmap, View
from assay.controls.verdicts import compare, verdict
from assay.directions.methods.common import RATE
from assay.directions.methods.function_vector import FunctionVectorSpec
from assay.directions.methods.rows import text_rows

ARMS = ("zero-shot", "zero-shot edited", "shuffled", "shuffled edited", "few-shot")
LEAST = 15


def planned(card: Any, spec: FunctionVectorSpec, seed: int) -> list[StepSpec]:
    """List the steps of a study from its model's card, without loading weights."""
    return _steps(_items(spec), spec, seed, card.n_layers, card.n_heads, card.parameters)


def _items(spec: FunctionVectorSpec) -> list[dict[str, str]]:
    rows = text_rows(spec.data, ("input", "output"), field="data")
    if len(rows) < LEAST:
        raise SpecError(f"data: {spec.data} has {len(rows)} items; {LEAST} or more can be split in three", "data")
    return rows


def _steps(
    items: list[dict[str, str]], spec: FunctionVectorSpec, seed: int, blocks: int, heads: int, parameters: int = 0
) -> list[StepSpec]:
    inputs = {"items": digest(items), "seed": seed, "shots": spec.shots, "prompts": spec.prompts}
    tried = {"heads": spec.heads, "every": spec.every, "scales": list(spec.scales)}
    test, dev = len(items) * 3 // 10, len(items) // 5
    cells = len(range(0, blocks, spec.every)) * len(spec.scales)

    def step(name: str, more: dict[str, Any], forwards: int, tokens: int) -> StepSpec:
        seconds = tokens * parameters / RATE
        return StepSpec(name=name, inputs=inputs | more, forwards=forwards, tokens=tokens, seconds=seconds)

    long = 6 * (spec.shots + 1)
    return [
        step("heads", {}, spec.prompts * 3, spec.prompts * (2 * long + blocks * heads // 2)),
        step("choice", tried, (cells + 1) * dev, (cells + 1) * dev * 6),
        step("scores", tried | {"random": spec.random}, (2 * spec.random + 5) * test, (2 * spec.random + 9) * test * 6),
    ]


def run(subject: Any, spec: FunctionVectorSpec, ctx: Context) -> Findings:
    """Measure, and say what it means."""
    items = _items(spec)
    measured = _Measured(subject, items, spec, ctx.seed)
    first, second, third = _steps(items, spec, ctx.seed, subject.n_blocks, subject.parts.n_heads)
    heads = ctx.step(first, measured.heads)
    measured.found = heads
    choice = ctx.step(second, measured.choice)
    scores = ctx.step(third, lambda progress: measured.scores(choice, progress))
    ctx.artifact("function_vector", arrays={"vector": np.asarray(scores["vector"])})
    python = snippet(subject.reference, "function-vector", spec, ctx.seed)
    report = _Report(items=items, spec=spec, heads=heads, choice=choice, scores=scores, python=python, ctx=ctx)
    return Findings(findings=(report.works(),), views=report.views(), summary=report.summary())


class _Measured:
    """What is measured.

    Args:
        subject: The subject.
        items: The items.
        spec: The spec.
        seed: The study's seed.
    """

    def __init__(self, subject: Any, items: list[dict[str, str]], spec: FunctionVectorSpec, seed: int) -> None:
        from assay.directions.steering.functions import InContextTask

        self.subject, self.spec, self.seed = subject, spec, seed
        self.task = InContextTask(items=tuple((row["input"], row["output"]) for row in items))
        order = numpy_stream(seed, "function vector", "split").permutation(len(items)).tolist()
        dev, test = len(items) // 5, len(items) * 3 // 10
        self.test, self.dev, self.pool = order[:test], order[test : test + dev], order[test + dev :]
        self.found: Mapping[str, Any] = {}

    def heads(self, progress: Progress) -> Mapping[str, Any]:
        """Each head's mean after examples, and what it does after shuffled ones."""
        from assay.directions.steering.functions import indirect_effects, mean_heads

        asked = [self.pool[i % len(self.pool)] for i in range(self.spec.prompts)]
        shots = min(self.spec.shots, len(self.pool) - 1)
        said = {"shots": shots, "pool": self.pool, "seed": self.seed}
        means = mean_heads(self.subject, self.task.prompts(asked, **said))
        shuffled = self.task.prompts(asked, shuffled=True, **said)
        effects = indirect_effects(
            self.subject, means, shuffled, progress=lambda done, total: progress(done, total, "patching heads")
        )
        return {"means": means.numpy(), "effects": effects.numpy()}

    @cached_property
    def means(self) -> Any:
        """The heads' means."""
        import torch

        return torch.tensor(np.asarray(self.found["means"]))

    def vector(self, effects: np.ndarray, site: str) -> Any:
        """The sum of the heads with the largest effects, to be added at a site."""
        import torch

        from assay.directions.steering.functions import function_vector

        return function_vector(
            self.subject, self.means, torch.tensor(np.asarray(effects)), site=site, n_heads=self.spec.heads
        )

    def choice(self, progress: Progress) -> Mapping[str, Any]:
        """The mean probability of the answer, by block and scale, on items that are not reported."""
        from assay.directions.steering.functions import score

        blocks = list(range(0, self.subject.n_blocks, self.spec.every))
        prompts = self.task.prompts(self.dev)
        table = np.zeros((len(blocks), len(self.spec.scales)))
        for row, block in enumerate(blocks):
            direction = self.vector(self.found["effects"], f"blocks.{block}.resid_post")
            for column, scale in enumerate(self.spec.scales):
                edit = direction.add_raw(scale, positions="last")
                table[row, column] = score(self.subject, prompts, [edit]).mean_probability
            progress(row + 1, len(blocks), "trying blocks")
        best = divmod(int(table.argmax()), len(self.spec.scales))
        return {
            "blocks": blocks,
            "table": table,
            "site": f"blocks.{blocks[best[0]]}.resid_post",
            "scale": self.spec.scales[best[1]],
        }

    def scores(self, choice: Mapping[str, Any], progress: Progress) -> Mapping[str, Any]:
        """Every arm on the items that chose nothing, and the same of random heads and vectors."""
        import torch

        from assay.controls.directions import isotropic_directions
        from assay.directions.steering.functions import score, score_arms
        from assay.directions.vectors import Direction

        site, scale = str(choice["site"]), float(choice["scale"])
        direction = self.vector(self.found["effects"], site)
        shots = min(self.spec.shots, len(self.pool))
        arms = score_arms(
            self.subject,
            self.task,
            [direction.add_raw(scale, positions="last")],
            asked=self.test,
            pool=self.pool,
            shots=shots,
            seed=self.seed,
        )
        prompts, n = self.task.prompts(self.test), self.spec.random
        shape = np.asarray(self.found["effects"]).shape
        random, isotropic = [], isotropic_directions(direction.vector, n, self.seed)
        for draw in range(n):
            rng = numpy_stream(self.seed, "function vector", "heads", draw)
            heads = self.vector(rng.random(shape).astype(np.float32), site)
            other = Direction(site=site, vector=torch.as_tensor(isotropic[draw]))
            random.append(
                [
                    score(self.subject, prompts, [kind.add_raw(scale, positions="last")]).mean_probability
                    for kind in (heads, other)
                ]
            )
            progress(draw + 1, n, "random heads and vectors")
        return {
            "vector": direction.vector.numpy(),
            **{f"{name} probability": list(arms[name].probability) for name in ARMS},
            **{f"{name} accuracy": arms[name].accuracy for name in ARMS},
            "random heads": np.asarray([row[0] for row in random]),
            "isotropic": np.asarray([row[1] for row in random]),
        }


@dataclass(frozen=True, slots=True, kw_only=True)
class _Report:
    """What the measurements say."""

    items: list[dict[str, str]]
    spec: FunctionVectorSpec
    heads: Mapping[str, Any]
    choice: Mapping[str, Any]
    scores: Mapping[str, Any]
    python: str
    ctx: Context

    def works(self) -> Finding:
        """The vector does the task without examples, more than other heads' and other vectors."""
        before, after = (np.asarray(self.scores[f"{name} probability"]) for name in ("zero-shot", "zero-shot edited"))
        gains = after - before
        estimate = float(gains.mean())
        base = float(before.mean())
        controls = (
            compare(
                "random heads",
                f"as many heads ({self.spec.heads}), drawn at random, summed the same",
                estimate,
                np.asarray(self.scores["random heads"]) - base,
            ),
            compare(
                "isotropic", "random vectors of the same norm", estimate, np.asarray(self.scores["isotropic"]) - base
            ),
        )
        interval = bootstrap_interval(gains, seed=self.ctx.seed)
        accuracy = {name: float(self.scores[f"{name} accuracy"]) for name in ARMS}
        return Finding(
            claim=f"a vector of {self.spec.heads} heads, added {self.choice['scale']:g} times at {self.choice['site']}"
            f", does {self.spec.data.stem} without examples: {accuracy['zero-shot edited']:.0%} right, from "
            f"{accuracy['zero-shot']:.0%}; with examples {accuracy['few-shot']:.0%}",
            estimate=estimate,
            unit="gain in the answer's probability",
            n=len(gains),
            controls=controls,
            interval=interval,
            verdict=verdict(estimate, controls, interval),
            cost=self.ctx.cost(),
            provenance=self.ctx.provenance(self.items),
            tags=("function vector",),
            detail={"accuracy": accuracy, "heads": self.top()},
        )

    def top(self) -> list[str]:
        """The heads that the vector is made of, the strongest first."""
        effects = np.asarray(self.heads["effects"])
        order = np.argsort(-effects, axis=None, kind="stable")[: self.spec.heads]
        return [f"L{block}H{head}" for block, head in zip(*np.unravel_index(order, effects.shape), strict=True)]

    def summary(self) -> tuple[str, ...]:
        """Headline lines."""
        found = self.works()
        return (
            f"{found.claim} ({found.verdict}).",
            f"Its heads: {', '.join(self.top())}.",
        )

    def views(self) -> tuple[View, ...]:
        """The charts."""
        effects = np.asarray(self.heads["effects"])
        table = np.asarray(self.choice["table"])
        works = self.works()
        return (
            Bars(
                id="arms",
                section="The vector",
                title="Accuracy with and without it",
                caption="On items that chose nothing.",
                labels=list(ARMS),
                values=[float(self.scores[f"{name} accuracy"]) for name in ARMS],
                unit="share right",
                python=self.python,
            ),
            Distribution(
                id="controls",
                section="The vector",
                title="The gain among its controls",
                null={control.name: control.null for control in works.controls},
                estimate=works.estimate,
                unit="probability",
                python=self.python,
            ),
            Heatmap(
                id="heads",
                section="How it was made",
                title="What each head's mean does after shuffled examples",
                rows=[str(block) for block in range(len(effects))],
                columns=[str(head) for head in range(effects.shape[1])],
                values=effects.tolist(),
                row_title="block",
                column_title="head",
                unit="probability",
                python=self.python,
            ),
            Heatmap(
                id="choice",
                section="How it was made",
                title="Where it was tried",
                caption="The mean probability of the answer on items that are not reported.",
                rows=[str(block) for block in self.choice["blocks"]],
                columns=[f"x {scale:g}" for scale in self.spec.scales],
                values=table.tolist(),
                row_title="block",
                column_title="scale",
                unit="probability",
                diverging=False,
                python=self.python,
            ),
        )
