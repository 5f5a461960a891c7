"""The heavy parts of training a dictionary, each on plain PyTorch, on a compiled CPU path and on Triton.

    values     what goes in and comes out beside tensors: pairs sorted by latent, Adam's moments and one step's settings
    backend    the contract, and the choice of a path for a device
    checks     what every path refuses
    plain      PyTorch, on any device
    compiled   C on a CPU (kernels.c), built by `building` with the machine's compiler on first use
    triton     CUDA

Importing this package does not import torch.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from assay.dictionaries.kernels.backend import Backend
    from assay.dictionaries.kernels.values import AdamStep, ByLatent, Moments

_WHERE = {
    "backend": ("Backend",),
    "values": ("AdamStep", "ByLatent", "Moments"),
}
_MODULES = {name: module for module, names in _WHERE.items() for name in names}

__all__ = ["AdamStep", "Backend", "ByLatent", "Moments"]


def __getattr__(name: str) -> Any:
    """Import a name's module when it is first asked for."""
    if name in _MODULES:
        return getattr(importlib.import_module(f"assay.dictionaries.kernels.{_MODULES[name]}"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
