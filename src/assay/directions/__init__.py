"""Directions: what can be read off the residual stream, and what each writer adds along it."""

from assay.directions.decomposition import Decomposition, decompose
from assay.directions.lens import Lens, logit_lens

__all__ = ["Decomposition", "Lens", "decompose", "logit_lens"]
