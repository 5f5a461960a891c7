"""Ridge, LDA and difference-of-means probes of many label vectors at once, in closed form.

One eigendecomposition of the training rows serves every label vector: `X = Z V'` with `Z = X V`, `X'X = V diag(s2) V'`,
X centred (and standardised). A vector of labels then costs a few products with Z. Fitting one probe is the case of
one label vector, so what a permutation computes is what a fit computes.

    ridge   c = (s2 + lam)^-1 Z'y            lam by leave-one-out, for each label vector on its own
    LDA     c = ((1-g)(L - q aa') + g m I)^-1 a      L = diag(s2)/n, a = V'(mu+ - mu-), q = n+ n-/n^2

The pooled within-class covariance is the total one less a rank-one term, so its inverse is the Sherman-Morrison
(rank-one Woodbury) step on a diagonal; the Ledoit-Wolf shrinkage g needs `|x_i - mu_{y_i}|^4` only, again products.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from jaxtyping import Bool, Float

from assay.base.errors import SpecError
from assay.directions.probes.inputs import standard

PENALTIES = tuple(10.0**k for k in range(-4, 3))
"""The ridge penalties that leave-one-out chooses from, in units of the number of rows."""

_NULL = 1e-12  # relative; eigenvalues below are rounding


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Factor:
    """Training rows, standardised and factored.

    Args:
        mean: What was subtracted from each row.
        scale: What each column was divided by.
        V: Eigenvectors of X'X, without its null space.
        s2: Their eigenvalues.
        Z: The rows in that basis, `X V`.
    """

    mean: Float[np.ndarray, " d"]
    scale: Float[np.ndarray, " d"]
    V: Float[np.ndarray, "d rank"]
    s2: Float[np.ndarray, " rank"]
    Z: Float[np.ndarray, "rows rank"]

    def rotate(self, X: Float[np.ndarray, "rows d"]) -> Float[np.ndarray, "rows rank"]:
        """Other rows in the same basis."""
        return np.asarray(((X - self.mean) / self.scale) @ self.V)

    def unfold(self, c: Float[np.ndarray, "rank n"], bias: Float[np.ndarray, " n"]) -> Fitted:
        """Weights in the units of the rows as they were given."""
        weight = (self.V @ c) / self.scale[:, None]
        return Fitted(weight=weight, bias=bias - self.mean @ weight)


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Fitted:
    """Linear readouts `X weight + bias`, one a label vector, in float64.

    Args:
        weight: One column a label vector.
        bias: One a label vector.
    """

    weight: Float[np.ndarray, "d n"]
    bias: Float[np.ndarray, " n"]


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Coefficients:
    """Readouts `Z c + bias` in the basis of a factor.

    Args:
        c: One column a label vector.
        bias: One a label vector.
        setting: The penalty or the shrinkage of each; empty for difference of means.
    """

    c: Float[np.ndarray, "rank n"]
    bias: Float[np.ndarray, " n"]
    setting: Float[np.ndarray, " n"]


def factor(X: Float[np.ndarray, "rows d"], *, standardise: bool = True) -> Factor:
    """Standardise and factor training rows, by the smaller of their two Gram matrices."""
    mean, scale = standard(X)
    if not standardise:
        scale = np.ones_like(scale)
    centred = (X - mean) / scale
    rows, d = centred.shape
    if rows > d:
        s2, V = np.linalg.eigh(centred.T @ centred)
        keep = s2 > _NULL * s2[-1]
        s2, V = s2[keep], V[:, keep]
        return Factor(mean=mean, scale=scale, V=V, s2=s2, Z=centred @ V)
    s2, U = np.linalg.eigh(centred @ centred.T)
    keep = s2 > _NULL * s2[-1]
    s2, U = s2[keep], U[:, keep]
    return Factor(mean=mean, scale=scale, V=(centred.T @ U) / np.sqrt(s2), s2=s2, Z=U * np.sqrt(s2))


def ridge(rows: Factor, labels: Bool[np.ndarray, "rows n"], penalty: float | None = None) -> Coefficients:
    """Ridge regression of each label vector, coded -1 and 1, the penalty by closed-form leave-one-out.

    `r_i = (y_i - yhat_i) / (1 - h_ii)` with `h = 1/n + Z (s2 + lam)^-1 Z'` is the residual of row i when it is left
    out, without a refit. The penalty with the least sum of squares is taken, for each label vector on its own.

    Raises:
        SpecError: The penalty is not positive.
    """
    if penalty is not None and not penalty > 0:
        raise SpecError(f"the ridge penalty is {penalty}; it must be positive", "penalty")
    y = 2.0 * labels - 1.0
    n = len(y)
    mean = y.mean(axis=0)
    inner = rows.Z.T @ y  # Z is centred, so y need not be
    grid = [penalty] if penalty is not None else [n * each for each in PENALTIES]
    best = np.full(y.shape[1], grid[0])
    if len(grid) > 1:
        centred = y - mean
        losses = [_left_out(rows, centred, inner, each) for each in grid]
        best = np.asarray(grid)[np.argmin(losses, axis=0)]
    return Coefficients(c=inner / (rows.s2[:, None] + best), bias=mean, setting=best)


def _left_out(rows: Factor, centred: np.ndarray, inner: np.ndarray, penalty: float) -> Float[np.ndarray, " n"]:
    """The sum of squared leave-one-out residuals of each label vector."""
    shrunk = 1.0 / (rows.s2 + penalty)
    leverage = 1.0 / len(centred) + np.square(rows.Z) @ shrunk
    residual = centred - rows.Z @ (shrunk[:, None] * inner)
    return np.asarray(np.square(1.0 / np.maximum(1.0 - leverage, 1e-12)) @ np.square(residual))


def lda(rows: Factor, labels: Bool[np.ndarray, "rows n"], shrinkage: float | None = None) -> Coefficients:
    """Linear discriminant of each label vector: `S^-1 (mu+ - mu-)`, S pooled within classes and shrunk.

    `S_g = (1 - g) S + g (tr S / d) I`, g by Ledoit and Wolf on the rows less their class means, or given. The bias
    puts zero where the two normal densities, weighted by their classes' shares, are equal.

    Raises:
        SpecError: The shrinkage lies outside [0, 1].

    Source: Ledoit and Wolf 2004, "A well-conditioned estimator for large-dimensional covariance matrices", section 3.
    """
    if shrinkage is not None and not 0 <= shrinkage <= 1:
        raise SpecError(f"the shrinkage is {shrinkage}; it lies between 0 (none) and 1", "shrinkage")
    n, d = len(labels), len(rows.mean)
    up = labels.sum(axis=0).astype(np.float64)
    down = n - up
    gap = gaps(rows.Z, labels)
    size = np.square(gap).sum(axis=0)
    q = up * down / n**2
    L = rows.s2 / n
    trace = L.sum() - q * size
    along: np.ndarray = rows.Z @ gap if shrinkage is None else np.empty(0)
    g = np.full(up.size, shrinkage) if shrinkage is not None else _ledoit_wolf(rows, labels, along, q, size, trace)
    A = (1 - g) * L[:, None] + g * trace / d
    c = gap / A
    # Sherman-Morrison: taking (1-g) q aa' from A scales A^-1 a.
    c = c / (1.0 - (1 - g) * q * (gap * c).sum(axis=0))
    middle = ((down - up) / (2 * n)) * (gap * c).sum(axis=0)  # halfway between the class means, from their joint mean
    return Coefficients(c=c, bias=np.log(up / down) - middle, setting=g)


def _ledoit_wolf(
    rows: Factor, labels: np.ndarray, along: np.ndarray, q: np.ndarray, size: np.ndarray, trace: np.ndarray
) -> Float[np.ndarray, " n"]:
    """The shrinkage of each label vector: `min(b, delta) / delta`; `along` is Z (mu+ - mu-)."""
    n, d = len(labels), len(rows.mean)
    up = labels.sum(axis=0) / n
    offset = np.where(labels, 1.0 - up, -up)  # a row's class mean is offset * gap
    norms = np.square(rows.Z).sum(axis=1)[:, None] - 2 * offset * along + np.square(offset) * size
    fourth = np.square(norms).sum(axis=0) / n
    L = rows.s2 / n
    squared = np.square(L).sum() - 2 * q * np.square(along).sum(axis=0) / n + np.square(q * size)
    delta = (squared - np.square(trace) / d) / d
    beta = np.minimum((fourth - squared) / (n * d), delta)
    return np.asarray(np.where(delta > 0, beta / np.where(delta > 0, delta, 1.0), 0.0))


def gaps(X: Float[np.ndarray, "rows d"], labels: Bool[np.ndarray, "rows n"]) -> Float[np.ndarray, "d n"]:
    """The difference of the class means of X for each label vector."""
    up = labels.sum(axis=0)
    return np.asarray(X.T @ np.where(labels, 1.0 / up, -1.0 / (len(labels) - up)))
