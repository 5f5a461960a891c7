"""RAVEL: does a subspace carry one attribute of an entity and leave its others alone?

Cause is the share of prompts about the attribute that are answered with the source's value; isolate the share of
prompts about each other attribute that keep the base's value; `disentangle = (cause + mean isolate) / 2`.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from assay.activations.subject import Subject
from assay.base.errors import SpecError
from assay.directions.subspaces.interchange import Interchanges, Subspace, interchange_accuracy


@dataclass(frozen=True, slots=True, kw_only=True)
class Ravel:
    """Scores of one subspace, beside those of random subspaces of its dimension.

    Args:
        cause: See the module.
        isolate: By attribute.
        null: `disentangle` of each random subspace. Doing nothing has cause 0 and isolate 1, so one half.
        n: Interchanges of cause, then of all of isolate.
    """

    cause: float
    isolate: Mapping[str, float]
    null: tuple[float, ...]
    n: tuple[int, int]

    @property
    def disentangle(self) -> float:
        """The mean of cause and of the mean of isolate."""
        return (self.cause + sum(self.isolate.values()) / len(self.isolate)) / 2


def ravel(
    subject: Subject,
    subspace: Subspace,
    cause: Interchanges,
    isolate: Mapping[str, Interchanges],
    *,
    controls: int = 10,
    seed: int = 0,
) -> Ravel:
    """Score a subspace.

    Args:
        subject: The subject.
        subspace: The subspace meant to carry the attribute.
        cause: Prompts about the attribute, answered with the source's value.
        isolate: By other attribute: prompts about it, answered with the base's own value.
        controls: How many random subspaces to score.
        seed: Their seed.

    Raises:
        SpecError: No other attribute is given.

    Source: Huang et al. 2024, "RAVEL: evaluating interpretability methods on disentangling language model
        representations", section 3.
    """
    if not isolate:
        raise SpecError("RAVEL needs prompts about at least one other attribute", "isolate")

    def scores(one: Subspace) -> tuple[float, dict[str, float]]:
        kept = {name: interchange_accuracy(subject, one, data) for name, data in isolate.items()}
        return interchange_accuracy(subject, one, cause), kept

    moved, kept = scores(subspace)
    null = []
    for i in range(controls):
        other = Subspace.random(subspace.site, subspace.k, subspace.basis.shape[1], seed=seed * 1000 + i)
        a, b = scores(other)
        null.append((a + sum(b.values()) / len(b)) / 2)
    sizes = (len(cause), sum(len(data) for data in isolate.values()))
    return Ravel(cause=moved, isolate=kept, null=tuple(null), n=sizes)
