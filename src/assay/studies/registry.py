"""The list of built-in methods; their modules are imported when a method is first asked for."""

from __future__ import annotations

import importlib

from assay.base.method import Method, get_method, methods

METHOD_MODULES: tuple[str, ...] = (
    "assay.dictionaries.methods.train",
    "assay.directions.methods.behaviour",
    "assay.directions.methods.dual_basis",
    "assay.directions.methods.edit_fact",
    "assay.directions.methods.erase",
    "assay.directions.methods.function_vector",
    "assay.directions.methods.lens",
    "assay.directions.methods.local",
    "assay.directions.methods.probe",
    "assay.directions.methods.steer",
    "assay.directions.methods.subspace",
    "assay.explain.method",
)
"""Modules that register methods. Importing one must not import torch."""


def load_methods() -> tuple[Method, ...]:
    """Import the built-in method modules and return every registered method, sorted by name."""
    for module in METHOD_MODULES:
        importlib.import_module(module)
    return methods()


def find_method(name: str) -> Method:
    """Return the method `name`, after importing the built-in ones.

    Raises:
        SpecError: There is none; the message offers the nearest names.
    """
    load_methods()
    return get_method(name)
