"""Directions: what can be read off a site and written to it, and what each writer adds along it.

    vectors         Probe (reads), Direction (writes), and the explicit step from one to the other
    basis           write vectors that move one readout each
    data            labelled texts, and what a subject holds while it reads them
    decomposition   a logit difference over everything that writes to the stream
    lens            what the model would say if it stopped after each block

Importing this package does not import torch.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from assay.directions.basis import condition, cross_talk, dual, on_distribution_dual
    from assay.directions.data import Labelled, mean_norms, read_sites
    from assay.directions.decomposition import Decomposition, decompose
    from assay.directions.lens import Lens, logit_lens
    from assay.directions.vectors import Conversion, Direction, Origin, Probe

_WHERE = {
    "basis": ("condition", "cross_talk", "dual", "on_distribution_dual"),
    "data": ("Labelled", "mean_norms", "read_sites"),
    "decomposition": ("Decomposition", "decompose"),
    "lens": ("Lens", "logit_lens"),
    "vectors": ("Conversion", "Direction", "Origin", "Probe"),
}
_MODULES = {name: module for module, names in _WHERE.items() for name in names}

__all__ = [
    "Conversion",
    "Decomposition",
    "Direction",
    "Labelled",
    "Lens",
    "Origin",
    "Probe",
    "condition",
    "cross_talk",
    "decompose",
    "dual",
    "logit_lens",
    "mean_norms",
    "on_distribution_dual",
    "read_sites",
]


def __getattr__(name: str) -> Any:
    """Import a name's module when it is first asked for."""
    if name in _MODULES:
        return getattr(importlib.import_module(f"assay.directions.{_MODULES[name]}"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
