"""The steps of `explain`: what goes into each (the cache's address) and what it is expected to cost (the plan)."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from assay.base.method import StepSpec
from assay.explain.inputs import Inputs, read_inputs
from assay.explain.spec import ExplainSpec
from assay.subjects.words import CardText

DIRECTIONS = ("denoising", "noising")
GRIDS = ("resid_pre", "attn.out", "mlp.out")
KINDS = ("gaussian", "spectrum")
SETS_A_STEP = 25
_RATE = 8e10
"""Multiply-adds a second assumed in estimates: two cores of 2024. Only estimates use it."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Shape:
    """What the cost of a step depends on."""

    n_layers: int
    n_heads: int
    d_model: int
    parameters: int

    @property
    def n_components(self) -> int:
        """Heads and MLPs."""
        return self.n_layers * (self.n_heads + 1)


def planned(card: Any, spec: ExplainSpec, seed: int) -> list[StepSpec]:
    """List the steps of a study from its model's card, without loading weights.

    Args:
        card: The model's card.
        spec: The spec.
        seed: The study's seed.
    """
    shape = Shape(n_layers=card.n_layers, n_heads=card.n_heads, d_model=card.d_model, parameters=card.parameters)
    return list(Steps(shape, read_inputs(CardText(card), spec), spec, seed).all())


def curve_sizes(n: int) -> list[int]:
    """The sizes of the sets on the curve: 1, 2, 3, 5, 8, ... and everything."""
    sizes, a, b = [], 1, 2
    while a < n:
        sizes.append(a)
        a, b = b, a + b
    return [*sizes, n]


class Steps:
    """Builds every step of one study.

    Args:
        shape: The model's shape.
        inputs: The spec, tokenised.
        spec: The spec.
        seed: The study's seed.
    """

    def __init__(self, shape: Shape, inputs: Inputs, spec: ExplainSpec, seed: int) -> None:
        self.shape, self.inputs, self.spec, self.seed = shape, inputs, spec, seed
        self.rows = spec.draws if inputs.question.corrupt is None else 1
        self.top = min(spec.top, max(1, shape.n_components // 2))  # most of a model is no circuit of it
        question = inputs.question.to_dict()
        if inputs.question.corrupt is None:
            question |= {"sigmas": spec.sigmas, "draws": spec.draws, "seed": seed}
        self.question = question

    def all(self) -> Iterator[StepSpec]:
        """Every step, in order."""
        yield self.baseline()
        yield self.lens()
        yield self.decomposition()
        for direction in DIRECTIONS:
            for point in GRIDS:
                yield self.grid(point, direction)
            yield self.components(direction)
        yield self.attribution()
        yield self.curve()
        for chunk in range(self.n_chunks):
            yield self.random_sets(chunk)
        for kind in KINDS:
            for number in range(self.spec.untrained):
                yield self.untrained(kind, number)
        if self.inputs.variations:
            yield self.variations()

    @property
    def n_chunks(self) -> int:
        """Random sets are measured in steps of this many."""
        return math.ceil(self.spec.random_sets / SETS_A_STEP)

    def baseline(self) -> StepSpec:
        """Next-token distributions and logit differences."""
        return self._step("baseline", {}, forwards=2)

    def lens(self) -> StepSpec:
        """The logit lens, clean and corrupt."""
        return self._step("logit lens", {}, forwards=2)

    def decomposition(self) -> StepSpec:
        """Direct logit attribution, clean and corrupt."""
        return self._step("direct attribution", {}, forwards=2)

    def grid(self, point: str, direction: str) -> StepSpec:
        """Exact patching by layer and position."""
        cells = self.shape.n_layers * len(self.inputs.question.clean)
        return self._step(f"patch {point} ({direction})", {"point": point, "direction": direction}, forwards=cells / 3)

    def components(self, direction: str) -> StepSpec:
        """Exact patching of every head and MLP."""
        cells = self.shape.n_components
        return self._step(f"patch components ({direction})", {"direction": direction}, forwards=cells * 0.6)

    def attribution(self) -> StepSpec:
        """Attribution patching in both directions."""
        return self._step("fast attribution", {}, forwards=4, backwards=2)

    def curve(self) -> StepSpec:
        """Sufficiency and necessity of the top components."""
        n = len(curve_sizes(self.shape.n_components))
        return self._step("sufficiency and necessity", {"top": self.top}, forwards=2 * n + 2)

    def random_sets(self, chunk: int) -> StepSpec:
        """The same for random sets."""
        n = min(SETS_A_STEP, self.spec.random_sets - chunk * SETS_A_STEP)
        inputs = {"top": self.top, "random_sets": self.spec.random_sets, "chunk": chunk, "seed": self.seed}
        return self._step(f"random sets {chunk + 1}/{self.n_chunks}", inputs, forwards=2 * n + 2)

    def untrained(self, kind: str, number: int) -> StepSpec:
        """The pipeline on one draw of untrained weights; the first of each kind has the grids, too."""
        inputs = {"kind": kind, "number": number, "seed": self.seed}
        forwards = 8 + self.shape.n_components * 0.6 + self.shape.n_layers / 4
        if number == 0:
            forwards += len(DIRECTIONS) * len(GRIDS) * self.shape.n_layers * len(self.inputs.question.clean) / 3
            forwards += self.shape.n_components * 0.6
        redraw = self.shape.parameters / 1e8
        return self._step(
            f"untrained weights ({kind} {number + 1})", inputs, forwards=forwards, seconds=redraw,
            held=4 * self.shape.parameters,
        )  # fmt: skip

    def variations(self) -> StepSpec:
        """The effect, and the top components, on other prompts."""
        questions = [question.to_dict() for question in self.inputs.variations]
        return self._step("variations", {"variations": questions, "top": self.top}, forwards=5 * len(questions))

    def _step(
        self,
        name: str,
        inputs: dict[str, Any],
        *,
        forwards: float,
        backwards: int = 0,
        seconds: float = 0.0,
        held: int = 0,
    ) -> StepSpec:
        width = len(self.inputs.question.clean)
        rows = math.ceil(forwards * self.rows)
        tokens = (rows + 2 * backwards * self.rows) * width
        batch = min(max(rows, 1), 256)
        return StepSpec(
            name=name,
            inputs={"question": self.question, **inputs},
            forwards=rows,
            backwards=backwards * self.rows,
            tokens=tokens,
            bytes=held + 4 * batch * width * self.shape.d_model * 16,
            seconds=seconds + tokens * self.shape.parameters / _RATE,
        )
