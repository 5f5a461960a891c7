"""Controls: the same pipeline where the claimed structure was destroyed, and the verdict they lead to.

    weights       the same architecture with Gaussian or spectrum-matched weights; an earlier checkpoint
    sets          random sets of components with the same make-up
    labels        permuted labels, control-task labels
    tasks         selectivity: a task against control tasks, on types seen and unseen
    directions    random directions of the same norm: isotropic, of the same covariance, shuffled, of other meanings
    activations   Gaussian activations with the same mean and covariance
    tokens        random tokens
    shuffles      codes with one thing destroyed and the rest kept
    prompts       the effect over variations of a prompt
    repair        self-repair: direct, total and repaired effect apart
    multiplicity  the null of the largest of many statistics; screens
    feature       a feature of the model or of the data set: seven steps and what follows
    verdicts      an estimate against its controls

Nothing here knows a method: a control takes a callable, `statistic(X, y) -> float` or `run(module) -> float`, and
returns draws from a null.

Importing this package does not import torch.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from assay.controls.activations import spectrum_matched_activations
    from assay.controls.directions import (
        covariance_matched_directions,
        isotropic_directions,
        semantic_directions,
        shuffled_difference_directions,
    )
    from assay.controls.feature import (
        FeatureReport,
        Step,
        dose_step,
        effect_step,
        feature_verdict,
        null_step,
        recurrence_step,
        specificity_step,
    )
    from assay.controls.labels import PermutationResult, control_labels, permutation_test, shuffled
    from assay.controls.multiplicity import BestOf, Screen, best_of, familywise_p, max_null, screen
    from assay.controls.prompts import PromptEffect, prompt_effect
    from assay.controls.repair import Repair, self_repair
    from assay.controls.sets import count_matched_sets, matched_sets
    from assay.controls.shuffles import (
        SHUFFLES,
        Shuffle,
        circular_shift,
        curveball,
        permute_latents,
        permute_tokens,
        shuffle_blocks,
        shuffle_control,
    )
    from assay.controls.tasks import Selectivity, TaskScore, selectivity
    from assay.controls.tokens import random_tokens
    from assay.controls.verdicts import compare, verdict
    from assay.controls.weights import WeightKind, WeightNull, checkpoint_control, reinitialised_module

_WHERE = {
    "activations": ("spectrum_matched_activations",),
    "directions": (
        "covariance_matched_directions",
        "isotropic_directions",
        "semantic_directions",
        "shuffled_difference_directions",
    ),
    "feature": (
        "FeatureReport",
        "Step",
        "dose_step",
        "effect_step",
        "feature_verdict",
        "null_step",
        "recurrence_step",
        "specificity_step",
    ),
    "labels": ("PermutationResult", "control_labels", "permutation_test", "shuffled"),
    "multiplicity": ("BestOf", "Screen", "best_of", "familywise_p", "max_null", "screen"),
    "prompts": ("PromptEffect", "prompt_effect"),
    "repair": ("Repair", "self_repair"),
    "sets": ("count_matched_sets", "matched_sets"),
    "shuffles": (
        "SHUFFLES",
        "Shuffle",
        "circular_shift",
        "curveball",
        "permute_latents",
        "permute_tokens",
        "shuffle_blocks",
        "shuffle_control",
    ),
    "tasks": ("Selectivity", "TaskScore", "selectivity"),
    "tokens": ("random_tokens",),
    "verdicts": ("compare", "verdict"),
    "weights": ("WeightKind", "WeightNull", "checkpoint_control", "reinitialised_module"),
}
_MODULES = {name: module for module, names in _WHERE.items() for name in names}

__all__ = [
    "SHUFFLES",
    "BestOf",
    "FeatureReport",
    "PermutationResult",
    "PromptEffect",
    "Repair",
    "Screen",
    "Selectivity",
    "Shuffle",
    "Step",
    "TaskScore",
    "WeightKind",
    "WeightNull",
    "best_of",
    "checkpoint_control",
    "circular_shift",
    "compare",
    "control_labels",
    "count_matched_sets",
    "covariance_matched_directions",
    "curveball",
    "dose_step",
    "effect_step",
    "familywise_p",
    "feature_verdict",
    "isotropic_directions",
    "matched_sets",
    "max_null",
    "null_step",
    "permutation_test",
    "permute_latents",
    "permute_tokens",
    "prompt_effect",
    "random_tokens",
    "recurrence_step",
    "reinitialised_module",
    "screen",
    "selectivity",
    "self_repair",
    "semantic_directions",
    "shuffle_blocks",
    "shuffle_control",
    "shuffled",
    "shuffled_difference_directions",
    "specificity_step",
    "spectrum_matched_activations",
    "verdict",
]


def __getattr__(name: str) -> Any:
    """Import a name's module when it is first asked for."""
    if name in _MODULES:
        return getattr(importlib.import_module(f"assay.controls.{_MODULES[name]}"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
