"""Steering: directions that are written, by edits or into the weights, and what a dose of them does.

extract        directions from prompts that differ: means, pairs, PCA of differences; ActAdd
select         the direction that a behaviour goes through, chosen over positions and blocks
weights        directional ablation everywhere, as edits and as a copy with edited weights
functions      function vectors and task vectors, and how questions are answered with them
latents        steering and clamping by a dictionary's latents; task vectors rewritten in few latents
conditional    steering that each prompt decides for itself
dose           dose and response, with a guard, side effects and control vectors at every dose
behaviour      openers, divergences and answers as numbers of the logits
"""

from assay.directions.steering.behaviour import behaves, divergence, opener_ids, opener_score
from assay.directions.steering.conditional import Condition, Steered, fit_condition, steer_if
from assay.directions.steering.dose import Budget, Curve, DoseResponse, SideEffect, control_vectors, dose_response
from assay.directions.steering.extract import (
    ActivationAddition,
    Contrast,
    activation_addition,
    agreement,
    direction_of,
    extract,
)
from assay.directions.steering.functions import (
    InContextTask,
    Questions,
    Score,
    function_vector,
    indirect_effects,
    mean_heads,
    patch_in,
    score,
    score_arms,
    task_vectors,
)
from assay.directions.steering.latents import Cleaned, clamp_latents, clean_task_vector, max_activations, steer_latent
from assay.directions.steering.select import Candidate, Filters, Selection, mean_differences, select_direction
from assay.directions.steering.weights import ablate_everywhere, orthogonalised, stream_sites

__all__ = [
    "ActivationAddition",
    "Budget",
    "Candidate",
    "Cleaned",
    "Condition",
    "Contrast",
    "Curve",
    "DoseResponse",
    "Filters",
    "InContextTask",
    "Questions",
    "Score",
    "Selection",
    "SideEffect",
    "Steered",
    "ablate_everywhere",
    "activation_addition",
    "agreement",
    "behaves",
    "clamp_latents",
    "clean_task_vector",
    "control_vectors",
    "direction_of",
    "divergence",
    "dose_response",
    "extract",
    "fit_condition",
    "function_vector",
    "indirect_effects",
    "max_activations",
    "mean_differences",
    "mean_heads",
    "opener_ids",
    "opener_score",
    "orthogonalised",
    "patch_in",
    "score",
    "score_arms",
    "select_direction",
    "steer_if",
    "steer_latent",
    "stream_sites",
    "task_vectors",
]
