"""The dual basis: write vectors that move one readout each.

    V = W^T (W W^T)^-1,    W V = I

for probe rows W `[k, d]`: writing `delta V_i` moves readout i by delta, every other listed readout by 0, and is the
shortest vector that does. Under activations of covariance `S` the vector that does it at the least Mahalanobis length
is `S W^T (W S W^T)^-1 e_i`. Nothing is promised about readouts that are not listed, nor about what the model then does.
"""

from __future__ import annotations

import torch
from jaxtyping import Float
from torch import Tensor

from assay.base.errors import NumericalError, SpecError

LIMIT = 30.0
"""The largest condition number of W inverted as it is: beyond it a dual is ten times as long, and mostly noise."""


def dual(W: Float[Tensor, "k d"], *, ridge: float = 0.0, limit: float = LIMIT) -> Float[Tensor, "k d"]:
    """Return the write vectors of probe rows: the rows of `pinv(W)^T`.

    Args:
        W: The probes' weights, one a row.
        ridge: `W^T (W W^T + ridge I)^-1` instead: shorter vectors, and readouts that are no longer apart; see
            `cross_talk`.
        limit: The largest condition number of W that is accepted without a ridge.

    Returns:
        Write vectors, one a row: `W @ dual(W).T` is the identity.

    Raises:
        SpecError: W is no matrix, or has more rows than columns.
        NumericalError: W is not finite, or its condition number is above the limit.

    Example:
        >>> W = torch.tensor([[1.0, 0.0, 0.0], [0.8, 0.6, 0.0]])
        >>> bool(torch.allclose(W @ dual(W).T, torch.eye(2), atol=1e-6))
        True
    """
    rows = _rows(W)
    return _like(_inverted(rows, ridge, limit), W)


def on_distribution_dual(
    W: Float[Tensor, "k d"], activations: Float[Tensor, "rows d"], *, ridge: float = 0.0, limit: float = LIMIT
) -> Float[Tensor, "k d"]:
    """Return the write vectors that activations come by most easily: rows of `(S W^T (W S W^T)^-1)^T`.

    S is the covariance of the activations, shrunk by Ledoit and Wolf's rule.

    Args:
        W: The probes' weights, one a row.
        activations: Activations at their site.
        ridge: A multiple of the mean of `diag(W S W^T)` that is added to it.
        limit: The largest condition number of `S^1/2 W^T` that is accepted without a ridge.

    Raises:
        SpecError: The shapes do not fit.
        NumericalError: Something is not finite, or the condition number is above the limit.
    """
    from sklearn.covariance import ledoit_wolf

    rows, x = _rows(W), torch.as_tensor(activations).double()
    if x.ndim != 2 or x.shape[1] != rows.shape[1] or len(x) < 2:
        raise SpecError(
            f"activations have the shape {tuple(x.shape)}; they must be [rows, {rows.shape[1]}]", "activations"
        )
    if not bool(torch.isfinite(x).all()):
        raise NumericalError("the activations are not all finite")
    if float((x - x[0]).abs().max()) <= 1e-14 * float(x.abs().max()):
        raise NumericalError("the activations do not vary, so they come by no direction")
    covariance = torch.from_numpy(ledoit_wolf(x.numpy())[0])
    values, vectors = torch.linalg.eigh(covariance)
    root = (vectors * values.clamp(min=0).sqrt()) @ vectors.T
    seen = rows @ root  # the probes, on activations made white
    if ridge:
        ridge = ridge * float((seen * seen).sum(1).mean())
    writes: Tensor = _inverted(seen, ridge, limit) @ root
    return _like(writes, W)


def condition(W: Float[Tensor, "k d"]) -> float:
    """The condition number of probe rows of length 1: how nearly they say the same."""
    rows = _rows(W)
    return float(torch.linalg.cond(rows / rows.norm(dim=1, keepdim=True)))


def cross_talk(W: Float[Tensor, "k d"], V: Float[Tensor, "k d"]) -> Float[Tensor, "k k"]:
    """How far readouts move that should not: `W V^T - I`; entry (i, j) is readout i when j is written."""
    rows, writes = _rows(W), torch.as_tensor(V).double()
    return rows @ writes.T - torch.eye(len(rows), dtype=torch.float64)


def _rows(W: Tensor) -> Tensor:
    rows = torch.as_tensor(W).detach().to("cpu", torch.float64)
    if rows.ndim != 2 or not rows.numel():
        raise SpecError(f"W has the shape {tuple(rows.shape)}; it must be [k, d], one probe a row", "W")
    if not bool(torch.isfinite(rows).all()) or not bool(rows.any(1).all()):
        raise NumericalError("a probe is zero or not finite")
    if len(rows) > rows.shape[1]:
        raise SpecError(
            f"W has {len(rows)} probes in {rows.shape[1]} dimensions; no more readouts than dimensions can be moved "
            "apart",
            "W",
        )
    return rows


def _like(values: Tensor, W: Tensor) -> Tensor:
    """In the precision of W; whole numbers would cut them off."""
    given = torch.as_tensor(W)
    return values.to(given.dtype if given.is_floating_point() else torch.get_default_dtype())


def _inverted(rows: Tensor, ridge: float, limit: float) -> Tensor:
    """`(rows rows^T + ridge)^-1 rows`, by the rows' own lengths first, so that those do not count as dependence."""
    if not ridge >= 0 or ridge == float("inf"):
        raise SpecError(f"ridge is {ridge}; it must be finite and not negative", "ridge")
    if ridge:
        solved: Tensor = torch.linalg.solve(rows @ rows.T + ridge * torch.eye(len(rows), dtype=rows.dtype), rows)
        return solved
    lengths = rows.norm(dim=1, keepdim=True)
    number = float(torch.linalg.cond(rows / lengths))
    if not number <= limit:
        raise NumericalError(
            f"the probes are too nearly dependent to be written apart: condition number {number:.3g}, limit {limit:g}. "
            "Leave one out, or accept cross-talk with ridge= (say 0.01)"
        )
    inverse: Tensor = torch.linalg.pinv(rows / lengths).T / lengths
    return inverse
