"""The engine: captures, edits, attention, replay sweeps and generation on the user's own module.

Activations of a whole corpus are stored by `harvest` and read by `Store`, or streamed by `Live`; both are a `Source`.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from assay.activations.corpora import Corpus, Texts, open_corpus
    from assay.activations.harvesting import Harvest, HarvestPlan, harvest
    from assay.activations.reservoir import Live, Reservoir
    from assay.activations.rows import TokenRows
    from assay.activations.source import Source
    from assay.activations.store import Store

_WHERE = {
    "corpora": ("Corpus", "Texts", "open_corpus"),
    "harvesting": ("Harvest", "HarvestPlan", "harvest"),
    "reservoir": ("Live", "Reservoir"),
    "rows": ("TokenRows",),
    "source": ("Source",),
    "store": ("Store",),
}
_MODULES = {name: module for module, names in _WHERE.items() for name in names}

__all__ = [
    "Corpus",
    "Harvest",
    "HarvestPlan",
    "Live",
    "Reservoir",
    "Source",
    "Store",
    "Texts",
    "TokenRows",
    "harvest",
    "open_corpus",
]


def __getattr__(name: str) -> Any:
    """Import a name's module when it is first asked for."""
    if name in _MODULES:
        return getattr(importlib.import_module(f"assay.activations.{_MODULES[name]}"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
