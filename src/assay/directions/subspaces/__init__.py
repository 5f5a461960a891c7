"""Causal subspaces: where a variable lives, found by interchange, and whether the patch can be believed.

interchange  a subspace, pairs of prompts, and the exchange of one by the other
das          DAS and boundless DAS, beside random subspaces
ravel        cause and isolate
illusion     a direction split by what reads it
"""

from assay.directions.subspaces.das import Alignment, DasFit, align, boundless_das, das
from assay.directions.subspaces.illusion import Illusion, illusion_test, next_read, split_direction
from assay.directions.subspaces.interchange import Interchanges, Subspace, interchange_accuracy
from assay.directions.subspaces.ravel import Ravel, ravel

__all__ = [
    "Alignment",
    "DasFit",
    "Illusion",
    "Interchanges",
    "Ravel",
    "Subspace",
    "align",
    "boundless_das",
    "das",
    "illusion_test",
    "interchange_accuracy",
    "next_read",
    "ravel",
    "split_direction",
]
