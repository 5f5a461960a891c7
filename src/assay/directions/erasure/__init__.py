"""Erasure: affine maps that take a concept out of activations, scored on rows they have not seen.

eraser    the map as a value: rows, edits, files
leace     LEACE and mean projection, in closed form, from rows or streamed moments
inlp      iterative null-space projection
score     what probes find before and after, on held-out groups
amnesic   what the model loses, against random erasures of the same rank
"""

from assay.directions.erasure.amnesic import Amnesic, Arm, amnesic, random_erasers
from assay.directions.erasure.eraser import Eraser
from assay.directions.erasure.inlp import InlpFit, inlp
from assay.directions.erasure.leace import LabelledMoments, leace, leace_from_moments, mean_projection
from assay.directions.erasure.score import ErasureScore, Leak, score_erasure

__all__ = [
    "Amnesic",
    "Arm",
    "Eraser",
    "ErasureScore",
    "InlpFit",
    "LabelledMoments",
    "Leak",
    "amnesic",
    "inlp",
    "leace",
    "leace_from_moments",
    "mean_projection",
    "random_erasers",
    "score_erasure",
]
