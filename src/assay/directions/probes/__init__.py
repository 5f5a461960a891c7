"""Probes: readouts fitted on labelled activations, what they are scored by, and what they must beat.

    splits        rows to fit on and to test on that share no group: there is no other kind of split
    linear        difference of means, LDA, logistic, ridge
    nonlinear     one hidden layer; attention over tokens
    sparse        a few latents of a dictionary
    scores        AUROC and others, with intervals that respect groups
    permutations  permuted labels at many sites at once, exactly
    baselines     what needs no model, and the comparison with it
    mdl           the online code

Importing this package does not import torch.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from assay.directions.probes.baselines import (
        Beats,
        bag_of_words,
        beats,
        counts,
        linear_arm,
        nearest,
        pca_logistic,
        site_baselines,
        text_baselines,
    )
    from assay.directions.probes.linear import Linear, calibrated, fit_linear, fit_probe
    from assay.directions.probes.mdl import DescriptionLength, description_length
    from assay.directions.probes.nonlinear import AttentionProbe, MLPProbe, fit_attention, fit_mlp
    from assay.directions.probes.permutations import BestSite, PermutedProbes, best_site, permuted_probes
    from assay.directions.probes.scores import (
        Score,
        auprc,
        auroc,
        auroc_null_sd,
        balanced_accuracy,
        calibration_error,
        evaluate,
        log_loss,
    )
    from assay.directions.probes.sparse import SparseProbe, fit_sparse, rank_latents
    from assay.directions.probes.splits import Split, grouped_folds, grouped_parts, grouped_split

_WHERE = {
    "baselines": (
        "Beats",
        "bag_of_words",
        "beats",
        "counts",
        "linear_arm",
        "nearest",
        "pca_logistic",
        "site_baselines",
        "text_baselines",
    ),
    "linear": (
        "Linear",
        "calibrated",
        "fit_linear",
        "fit_probe",
    ),
    "mdl": (
        "DescriptionLength",
        "description_length",
    ),
    "nonlinear": (
        "AttentionProbe",
        "MLPProbe",
        "fit_attention",
        "fit_mlp",
    ),
    "permutations": (
        "BestSite",
        "PermutedProbes",
        "best_site",
        "permuted_probes",
    ),
    "scores": (
        "Score",
        "auprc",
        "auroc",
        "auroc_null_sd",
        "balanced_accuracy",
        "calibration_error",
        "evaluate",
        "log_loss",
    ),
    "sparse": (
        "SparseProbe",
        "fit_sparse",
        "rank_latents",
    ),
    "splits": (
        "Split",
        "grouped_folds",
        "grouped_parts",
        "grouped_split",
    ),
}
_MODULES = {name: module for module, names in _WHERE.items() for name in names}

__all__ = [
    "AttentionProbe",
    "Beats",
    "BestSite",
    "DescriptionLength",
    "Linear",
    "MLPProbe",
    "PermutedProbes",
    "Score",
    "SparseProbe",
    "Split",
    "auprc",
    "auroc",
    "auroc_null_sd",
    "bag_of_words",
    "balanced_accuracy",
    "beats",
    "best_site",
    "calibrated",
    "calibration_error",
    "counts",
    "description_length",
    "evaluate",
    "fit_attention",
    "fit_linear",
    "fit_mlp",
    "fit_probe",
    "fit_sparse",
    "grouped_folds",
    "grouped_parts",
    "grouped_split",
    "linear_arm",
    "log_loss",
    "nearest",
    "pca_logistic",
    "permuted_probes",
    "rank_latents",
    "site_baselines",
    "text_baselines",
]


def __getattr__(name: str) -> Any:
    """Import a name's module when it is first asked for."""
    if name in _MODULES:
        return getattr(importlib.import_module(f"assay.directions.probes.{_MODULES[name]}"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
