"""What `explain` measured, before it is turned into findings and charts."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from assay.circuits import Component
from assay.explain.inputs import Inputs


@dataclass(slots=True, kw_only=True)
class Results:
    """Everything that was measured, by step.

    Args:
        inputs: What was asked.
        answer: The answer's token.
        foil: The foil's token.
        parts: The components, in forward order.
        top: The top components, best first.
        tokens: Each token of the clean prompt as text.
        words: Answer and foil as text.
    """

    inputs: Inputs
    answer: int
    foil: int
    parts: list[Component]
    top: list[Component] = field(default_factory=list)
    tokens: list[str] = field(default_factory=list)
    corrupt_tokens: list[str] | None = None
    words: tuple[str, str] = ("", "")
    values: dict[str, Any] = field(default_factory=dict)
    random: dict[str, np.ndarray[Any, Any]] = field(default_factory=dict)
    untrained: dict[str, list[Mapping[str, Any]]] = field(default_factory=dict)

    @property
    def gap(self) -> float:
        """The logit difference, clean minus corrupt."""
        baseline = self.values["baseline"]
        return float(baseline["clean_difference"]) - float(baseline["corrupt_difference"])

    def effect(self, name: str) -> np.ndarray[Any, Any]:
        """`m(patched) - m(base)` of a patching step, in logits."""
        step = self.values[name]
        return np.asarray(step["values"]) - float(step["base"])

    def normalised(self, name: str) -> np.ndarray[Any, Any]:
        """The normalised effect of a patching step."""
        step = self.values[name]
        return self.effect(name) / (float(step["donor"]) - float(step["base"]))

    @staticmethod
    def preference(baseline: Mapping[str, Any]) -> float:
        """How much the corruption moves the pair, in standard deviations of how much it moves random pairs."""
        gap = float(baseline["clean_difference"]) - float(baseline["corrupt_difference"])
        return gap / float(baseline["spread"])

    def largest(self, draw: Mapping[str, Any] | None = None, kind: str | None = None) -> float:
        """The largest loss from corrupting one component (noising), in the same unit.

        Args:
            draw: A draw of untrained weights; the model itself when None.
            kind: `head` or `mlp`; either when None.
        """
        members = [i for i, part in enumerate(self.parts) if kind in (None, part.kind)]
        if draw is None:
            lost = -self.effect("components noising")
            baseline = self.values["baseline"]
        else:
            baseline = draw["difference"]
            lost = float(baseline["clean_difference"]) - np.asarray(draw["components_noising"])
        return float(np.max(lost[members])) / float(baseline["spread"])
