"""Dictionaries: SAEs, transcoders, crosscoders, cross-layer transcoders; trained sparsely, read from every format.

    latents      activations of latents as (row, latent, value), and dense
    activations  what turns pre-activations into activations: ReLU, TopK, JumpReLU, Gated, GroupMax
    dictionary   the value: weights, activation and card; encode, decode, save
    crosslayer   a transcoder whose latents write to their own layer and every later one
    formats/     reading and writing assay's files and everyone else's
    settings     what can be trained and how
    families/    the loss of each, in closed form over active latents
    training/    the step, dead latents, checkpoints, several processes, the loop
    heads        each latent's share per head, where heads lie side by side
    metrics      what a dictionary explains, and what the model keeps when it runs on it
    methods/     the study `train-dictionary`
    kernels/     selection, sparse decode and the fused update, on plain PyTorch, a compiled CPU path and Triton

Importing this package does not import torch.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from assay.dictionaries.activations import Activation, Gated, GroupMax, JumpReLU, ReLU, TopK
    from assay.dictionaries.crosslayer import CrossLayer
    from assay.dictionaries.dictionary import Card, Dictionary, Site
    from assay.dictionaries.formats import load
    from assay.dictionaries.formats.sites import after_gain
    from assay.dictionaries.heads import HeadShares, head_shares
    from assay.dictionaries.latents import SparseLatents
    from assay.dictionaries.metrics import reconstruction, recovered
    from assay.dictionaries.settings import Training
    from assay.dictionaries.training.runs import Wanted, train, train_many
    from assay.dictionaries.training.trainer import Trained

_WHERE = {
    "activations": ("Activation", "Gated", "GroupMax", "JumpReLU", "ReLU", "TopK"),
    "crosslayer": ("CrossLayer",),
    "dictionary": ("Card", "Dictionary", "Site"),
    "formats": ("load",),
    "formats.sites": ("after_gain",),
    "heads": ("HeadShares", "head_shares"),
    "metrics": ("reconstruction", "recovered"),
    "settings": ("Training",),
    "training.runs": ("Wanted", "train", "train_many"),
    "training.trainer": ("Trained",),
    "latents": ("SparseLatents",),
}
_MODULES = {name: module for module, names in _WHERE.items() for name in names}

__all__ = [
    "Activation",
    "Card",
    "CrossLayer",
    "Dictionary",
    "Gated",
    "GroupMax",
    "HeadShares",
    "JumpReLU",
    "ReLU",
    "Site",
    "SparseLatents",
    "TopK",
    "Trained",
    "Training",
    "Wanted",
    "after_gain",
    "head_shares",
    "load",
    "reconstruction",
    "recovered",
    "train",
    "train_many",
]


def __getattr__(name: str) -> Any:
    if name in _MODULES:
        return getattr(importlib.import_module(f"assay.dictionaries.{_MODULES[name]}"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted(__all__)
