"""Controls: the same pipeline where the claimed structure was destroyed, and the verdict they lead to.

    weights      the same architecture with Gaussian or spectrum-matched weights
    sets         random sets of components with the same make-up
    labels       permuted labels, control-task labels
    directions   random directions of the same norm, matched to the covariance or to shuffled labels
    prompts      the effect over variations of a prompt
    multiplicity the null of the largest of many statistics
    verdicts     an estimate against its controls

Nothing here knows a method: a control takes a callable, `statistic(X, y) -> float` or `run(module) -> float`, and
returns draws from a null. Importing this package does not import torch.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from assay.controls.directions import (
    covariance_matched_directions,
    isotropic_directions,
    shuffled_difference_directions,
)
from assay.controls.labels import PermutationResult, control_labels, permutation_test, shuffled
from assay.controls.multiplicity import familywise_p, max_null
from assay.controls.prompts import PromptEffect, prompt_effect
from assay.controls.sets import count_matched_sets, matched_sets
from assay.controls.verdicts import compare, verdict

if TYPE_CHECKING:
    from assay.controls.weights import WeightKind, WeightNull, reinitialised_module

__all__ = [
    "PermutationResult",
    "PromptEffect",
    "WeightKind",
    "WeightNull",
    "compare",
    "control_labels",
    "count_matched_sets",
    "covariance_matched_directions",
    "familywise_p",
    "isotropic_directions",
    "matched_sets",
    "max_null",
    "permutation_test",
    "prompt_effect",
    "reinitialised_module",
    "shuffled",
    "shuffled_difference_directions",
    "verdict",
]


def __getattr__(name: str) -> Any:
    """Import the weight controls, which need torch, when one of them is asked for."""
    if name in ("WeightKind", "WeightNull", "reinitialised_module"):
        from assay.controls import weights

        return getattr(weights, name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
