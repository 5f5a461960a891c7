"""Models that assay builds or trains itself, whose answers are known: every method has a score before a real model.

organisms   codeword: answers questions, unless a codeword is present: then it declines
references  what `zoo:codeword` means wherever a model is asked for: trained once, kept in the cache
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from assay.zoo.organisms import Codeword, codeword
    from assay.zoo.references import folder_of

_MODULES = {"Codeword": "organisms", "codeword": "organisms", "folder_of": "references"}

__all__ = ["Codeword", "codeword", "folder_of"]


def __getattr__(name: str) -> Any:
    """Import a name's module when it is asked for; the models' need torch."""
    if name in _MODULES:
        return getattr(importlib.import_module(f"assay.zoo.{_MODULES[name]}"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
