"""Directions: what can be read off a site and written to it, and what each writer adds along it.

vectors         Probe (reads), Direction (writes), and the explicit step from one to the other
dual            write vectors that move one readout each
data            labelled texts, and what a subject holds while it reads them
decomposition   a logit difference over everything that writes to the stream
lens            what the model would say if it stopped after each block
"""

from assay.directions.basis import condition, cross_talk, dual, on_distribution_dual
from assay.directions.data import Labelled, mean_norms, read_sites
from assay.directions.decomposition import Decomposition, decompose
from assay.directions.lens import Lens, logit_lens
from assay.directions.vectors import Conversion, Direction, Origin, Probe

__all__ = [
    "Conversion",
    "Decomposition",
    "Direction",
    "Labelled",
    "Lens",
    "Origin",
    "Probe",
    "condition",
    "cross_talk",
    "decompose",
    "dual",
    "logit_lens",
    "mean_norms",
    "on_distribution_dual",
    "read_sites",
]
