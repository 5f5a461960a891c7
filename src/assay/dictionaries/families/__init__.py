"""The families that can be trained; `dictionaries.settings` names them and needs no torch."""

from __future__ import annotations

from assay.dictionaries.families.family import Family, Part
from assay.dictionaries.families.gated import GatedFamily
from assay.dictionaries.families.jumprelu import JumpReLUFamily
from assay.dictionaries.families.l1 import AprilFamily, L1Family, PAnnealFamily
from assay.dictionaries.families.topk import BatchTopKFamily, TopKFamily
from assay.dictionaries.settings import FamilyName

FAMILIES: dict[FamilyName, Family] = {
    "topk": TopKFamily(),
    "batchtopk": BatchTopKFamily(),
    "matryoshka": BatchTopKFamily(),
    "jumprelu": JumpReLUFamily(),
    "l1": L1Family(),
    "l1-april": AprilFamily(),
    "p-anneal": PAnnealFamily(),
    "gated": GatedFamily(),
}
"""Families by name; a Matryoshka is a BatchTopK whose reconstructions the trainer nests."""

__all__ = ["FAMILIES", "Family", "Part"]
