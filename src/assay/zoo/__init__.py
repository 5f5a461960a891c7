"""Models that assay builds or trains itself, whose answers are known: every method has a score before a real model.

organisms   codeword: answers questions, unless a codeword is present: then it declines
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from assay.zoo.organisms import Codeword, codeword

__all__ = ["Codeword", "codeword"]


def __getattr__(name: str) -> Any:
    """Import a model's module, which needs torch, when it is asked for."""
    if name in __all__:
        from assay.zoo import organisms

        return getattr(organisms, name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
