"""The families assay knows: one declaration each. The next family is one more."""

from __future__ import annotations

from assay.subjects.architecture import ArchitectureMap
from assay.subjects.families_decoders import DECODERS
from assay.subjects.families_other import OTHERS

FAMILIES: tuple[ArchitectureMap, ...] = (*DECODERS, *OTHERS)


def family_of(model_type: str) -> ArchitectureMap | None:
    """Return the map that serves a `config.model_type`, or None.

    Example:
        >>> family_of("gpt2").family
        'GPT-2'
    """
    return next((family for family in FAMILIES if model_type in family.model_types), None)
