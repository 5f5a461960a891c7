"""Directions: what can be read off a site and written to it, and what each writer adds along it.

    vectors         Probe (reads), Direction (writes), and the explicit step from one to the other
    basis           write vectors that move one readout each
    labelled        texts with labels and groups
    data            what a subject holds while it reads texts
    probes/         probes, their scores, their baselines, permuted labels
    steering/       directions from contrasts, what they do dose by dose, editing the weights instead
    erasure/        taking a readout away, and how much was taken
    subspaces/      interchange interventions: where a variable lives
    editing         one fact rewritten in one MLP
    decomposition   a logit difference over everything that writes to the stream
    decompositions  PCA, ICA, NMF, k-means and sparse coding: what a dictionary is compared with
    lens            what the model would say if it stopped after each block
    tuned_lens      the same with a trained affine map for each block
    movements       how far readouts move under edits, here and downstream
    local           how much of a site is already there in the last few tokens

Importing this package does not import torch.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from assay.directions.basis import condition, cross_talk, dual, on_distribution_dual
    from assay.directions.data import mean_norms, read_sites
    from assay.directions.decomposition import Decomposition, decompose
    from assay.directions.decompositions import FittedBasis, fit_basis
    from assay.directions.editing import Fact, key_covariance, rome
    from assay.directions.labelled import Labelled
    from assay.directions.lens import Lens, logit_lens
    from assay.directions.local import Locality, local_processing
    from assay.directions.movements import movements
    from assay.directions.tuned_lens import TunedLens, lens_divergence, train_tuned_lens
    from assay.directions.vectors import Conversion, Direction, Origin, Probe

_WHERE = {
    "basis": ("condition", "cross_talk", "dual", "on_distribution_dual"),
    "data": ("mean_norms", "read_sites"),
    "decomposition": ("Decomposition", "decompose"),
    "decompositions": ("FittedBasis", "fit_basis"),
    "editing": ("Fact", "key_covariance", "rome"),
    "labelled": ("Labelled",),
    "lens": ("Lens", "logit_lens"),
    "local": ("Locality", "local_processing"),
    "movements": ("movements",),
    "tuned_lens": ("TunedLens", "lens_divergence", "train_tuned_lens"),
    "vectors": ("Conversion", "Direction", "Origin", "Probe"),
}
_MODULES = {name: module for module, names in _WHERE.items() for name in names}

__all__ = [
    "Conversion",
    "Decomposition",
    "Direction",
    "Fact",
    "FittedBasis",
    "Labelled",
    "Lens",
    "Locality",
    "Origin",
    "Probe",
    "TunedLens",
    "condition",
    "cross_talk",
    "decompose",
    "dual",
    "fit_basis",
    "key_covariance",
    "lens_divergence",
    "local_processing",
    "logit_lens",
    "mean_norms",
    "movements",
    "on_distribution_dual",
    "read_sites",
    "rome",
    "train_tuned_lens",
]


def __getattr__(name: str) -> Any:
    """Import a name's module when it is first asked for."""
    if name in _MODULES:
        return getattr(importlib.import_module(f"assay.directions.{_MODULES[name]}"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
