"""How much each row counts: an outlier asks for no more than a bounded multiple of what a usual row asks for."""

from __future__ import annotations

import math

import torch
from jaxtyping import Float
from torch import Tensor

from assay.dictionaries.settings import Training
from assay.dictionaries.training.mesh import Mesh

_TINY = 1e-30


def row_weights(
    settings: Training, x: Float[Tensor, "rows d_in"], error: Float[Tensor, "rows d_out"], mesh: Mesh
) -> Float[Tensor, " rows"]:
    """The weight of each row's squared error in the loss, a constant to its gradient.

        w_b = min(1, outliers Q / (|x_b| |e_b|))        Q = the upper quartile of |x_b| |e_b|, over all processes' rows

    What a row adds to the gradients of encoder and decoder grows with `|x_b| |e_b|`. A token on which a model parks its
    attention can be a hundred times as long as others: one in a batch asks for thousands of times as much as all other
    rows, and Adam's second moment remembers that for `1 / (1 - beta2)` steps, in which nothing is learnt. The quartile
    bears that a quarter of the rows are outliers, or three quarters of them empty.

    Args:
        settings: Their `outliers`; None gives every row the weight 1.
        x: Scaled rows read.
        error: `y_hat - y` of the same rows.
        mesh: Where this process is; the usual row is that of the whole batch.
    """
    if settings.outliers is None:
        return x.new_ones(len(x))
    length, miss = (torch.linalg.vector_norm(rows, dim=1, dtype=torch.float64) for rows in (x, error))
    asks = length * miss
    everywhere = torch.cat(mesh.gathered(asks.cpu(), along="all")[:: mesh.latent])
    usual = float(everywhere.kthvalue(math.ceil(0.75 * len(everywhere))).values)
    if not usual:
        return x.new_ones(len(x))
    return torch.clamp(settings.outliers * usual / asks.clamp_min(_TINY), max=1.0).to(x.dtype)
