"""Circuits: which parts of a model a behaviour depends on, by exact patching and by gradient."""

from assay.circuits.attribution import Attribution, attribute
from assay.circuits.components import Component, components
from assay.circuits.patching import Effects, patch_components, patch_grid
from assay.circuits.sets import SetEffects, ablate_sets
from assay.circuits.task import Task

__all__ = [
    "Attribution",
    "Component",
    "Effects",
    "SetEffects",
    "Task",
    "ablate_sets",
    "attribute",
    "components",
    "patch_components",
    "patch_grid",
]
