"""assay: find out what a neural network has learned, and whether to believe it.

Names load on first use: `import assay` imports neither torch nor transformers.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from assay.base.version import __version__

if TYPE_CHECKING:
    from assay import circuits, controls, directions
    from assay.activations.edits import Ablate, Add, Apply, Clamp, Patch, ProjectOut, Scale, Set
    from assay.activations.serving import limits
    from assay.activations.subject import Subject, load
    from assay.activations.values import Run
    from assay.base.errors import AssayError
    from assay.base.findings import Control, Finding, Findings
    from assay.studies import Study
    from assay.subjects.positions import At, Span

__all__ = [
    "Ablate",
    "Add",
    "Apply",
    "AssayError",
    "At",
    "Clamp",
    "Control",
    "Finding",
    "Findings",
    "Patch",
    "ProjectOut",
    "Run",
    "Scale",
    "Set",
    "Span",
    "Study",
    "Subject",
    "__version__",
    "circuits",
    "controls",
    "directions",
    "limits",
    "load",
]

_HOMES = {
    **dict.fromkeys(
        ("Ablate", "Add", "Apply", "Clamp", "Patch", "ProjectOut", "Scale", "Set"), "assay.activations.edits"
    ),
    **dict.fromkeys(("Subject", "load"), "assay.activations.subject"),
    **dict.fromkeys(("At", "Span"), "assay.subjects.positions"),
    "limits": "assay.activations.serving",
    "Run": "assay.activations.values",
    "AssayError": "assay.base.errors",
    **dict.fromkeys(("Control", "Finding", "Findings"), "assay.base.findings"),
    "Study": "assay.studies",
}


def __getattr__(name: str) -> Any:
    if name in ("circuits", "controls", "directions"):
        return importlib.import_module(f"assay.{name}")
    if name in _HOMES:
        value = getattr(importlib.import_module(_HOMES[name]), name)
        globals()[name] = value
        return value
    raise AttributeError(f"module 'assay' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
