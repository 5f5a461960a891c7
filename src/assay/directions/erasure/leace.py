"""LEACE and mean projection: the closed forms that take a concept's linear trace out of activations.

    U = left singular vectors of Sigma^-1/2 Sigma_xz
    x' = x - Sigma^1/2 U U' Sigma^-1/2 (x - mu)                                                        (LEACE)
    x' = x - Q Q' (x - mu),    Q an orthonormal basis of the differences of class means                (mean projection)

After LEACE, `Sigma_xz` is zero on the fitted distribution: no affine probe with a convex loss beats the constant
predictor there, and of all maps with that property it moves activations least. It promises nothing about rows it was
not fitted on (score those: `score_erasure`), nor about probes that are not affine.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from jaxtyping import Float

from assay.base.errors import NumericalError, SpecError
from assay.directions.erasure.eraser import Eraser, activation_rows, class_columns
from assay.directions.vectors import Origin

ROWS_PER_DIMENSION = 10
"""Rows a dimension that a covariance needs before it may be inverted without shrinkage."""

_CUT = 1e-8  # relative to the largest singular value: what is below it is rounding, at any scale of the labels
_NULL = 1e-12  # relative to the largest eigenvalue: directions in which activations do not vary


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class LabelledMoments:
    """What LEACE needs of activations X and labels Z, gathered piece by piece in constant memory.

    `assay.base.moments.Moments` streams X alone; here the products with the labels are kept too, and the shrinkage is
    the one that concept-erasure uses.

    Args:
        n: Rows seen.
        mean_x: `[d]`.
        mean_z: `[c]`.
        xx: `sum (x - mean)(x - mean)'`, `[d, d]`.
        xz: `sum (x - mean)(z - mean)'`, `[d, c]`.

    Example:
        >>> X, z = np.arange(12.0).reshape(6, 2), np.array([[0.0], [1], [0], [1], [1], [0]])
        >>> parts = LabelledMoments.of(X[:2], z[:2]).merged(LabelledMoments.of(X[2:], z[2:]))
        >>> parts.n, bool(np.allclose(parts.xx, LabelledMoments.of(X, z).xx))
        (6, True)
    """

    n: int
    mean_x: Float[np.ndarray, " d"]
    mean_z: Float[np.ndarray, " c"]
    xx: Float[np.ndarray, "d d"]
    xz: Float[np.ndarray, "d c"]

    @classmethod
    def of(cls, X: Float[np.ndarray, "rows d"], z: Float[np.ndarray, "rows c"]) -> LabelledMoments:
        """The moments of one piece, in float64.

        Raises:
            SpecError: The shapes do not fit.
            NumericalError: A number is not finite.
        """
        x, labels = np.asarray(X, dtype=np.float64), np.asarray(z, dtype=np.float64)
        if x.ndim != 2 or labels.ndim != 2 or len(x) != len(labels) or not len(x):
            raise SpecError(f"X is {x.shape} and z {labels.shape}; they must be [rows, d] and [rows, c]", "X")
        if not (np.isfinite(x).all() and np.isfinite(labels).all()):
            raise NumericalError("X or z is not finite")
        mean_x, mean_z = x.mean(axis=0), labels.mean(axis=0)
        centred = x - mean_x
        return cls(n=len(x), mean_x=mean_x, mean_z=mean_z, xx=centred.T @ centred, xz=centred.T @ (labels - mean_z))

    def merged(self, other: LabelledMoments) -> LabelledMoments:
        """The moments of both pieces together.

        Source: Chan, Golub and LeVeque 1983, "Algorithms for computing the sample variance".
        """
        if self.mean_x.shape != other.mean_x.shape or self.mean_z.shape != other.mean_z.shape:
            raise SpecError(
                f"pieces of {self.xz.shape} and {other.xz.shape} (d, labels) cannot be of one data set", "other"
            )
        n = self.n + other.n
        dx, dz, share = other.mean_x - self.mean_x, other.mean_z - self.mean_z, self.n * other.n / n
        return LabelledMoments(
            n=n,
            mean_x=self.mean_x + dx * (other.n / n),
            mean_z=self.mean_z + dz * (other.n / n),
            xx=self.xx + other.xx + share * np.outer(dx, dx),
            xz=self.xz + other.xz + share * np.outer(dx, dz),
        )

    def covariance(self, *, shrinkage: bool = False) -> Float[np.ndarray, "d d"]:
        """The covariance of X; with shrinkage, drawn towards the sphere by the amount that n and d call for.

            a S + b I,   a = 1 - (tr(S)^2 / n) / (|S|^2 - tr(S)^2 / d),   b = (1 - a) tr(S) / d

        Source: Bodnar, Gupta and Parolya 2014, "On the strong convergence of the optimal linear shrinkage estimator",
        with the identity as target; a is kept between 0 and 1.
        """
        if self.n < 2:
            raise SpecError(f"a covariance needs two rows or more, got {self.n}", "X")
        if not shrinkage:
            return self.xx / (self.n - 1)
        s = self.xx / self.n
        d, trace = len(s), float(np.trace(s))
        spread = float((s * s).sum()) - trace**2 / d
        a = float(np.clip(1 - (trace**2 / self.n) / spread, 0.0, 1.0)) if spread > 0 else 0.0
        return a * s + (1 - a) * trace / d * np.eye(d)


def leace(
    X: Any,
    y: Any,
    *,
    site: str = "",
    shrinkage: bool = False,
    affine: bool = True,
    origin: Origin | None = None,
) -> Eraser:
    """Fit LEACE: of all affine maps after which no linear probe finds the label, the one that moves the rows least.

    Args:
        X: Activations, `[rows, d]`.
        y: Their labels, of two classes or more, `[rows]`.
        site: Where they were read.
        shrinkage: Shrink the covariance; required below 10 rows a dimension.
        affine: Keep the mean where it is; else erase linearly, about zero.
        origin: Where rows and labels come from; the method is filled in.

    Returns:
        An eraser of rank at most the number of classes less one.

    Raises:
        SpecError: The shapes do not fit, there is one class only, or there are too few rows.
        NumericalError: A row is not finite, or the rows do not vary.

    Source: Belrose et al. 2023, "LEACE: Perfect linear concept erasure in closed form", section 4.

    Example:
        >>> rng = np.random.default_rng(0)
        >>> y = rng.integers(2, size=200)
        >>> X = rng.normal(size=(200, 5)) + 3.0 * y[:, None]
        >>> gap = leace(X, y)(X)[y == 1].mean(axis=0) - leace(X, y)(X)[y == 0].mean(axis=0)
        >>> bool(np.abs(gap).max() < 1e-12)
        True
    """
    rows = activation_rows(X)
    _, z = class_columns(y, len(rows))
    return leace_from_moments(LabelledMoments.of(rows, z), site=site, shrinkage=shrinkage, affine=affine, origin=origin)


def leace_from_moments(
    moments: LabelledMoments,
    *,
    site: str = "",
    shrinkage: bool = False,
    affine: bool = True,
    origin: Origin | None = None,
) -> Eraser:
    """Fit LEACE to moments that were gathered before; see `leace`."""
    _enough(moments, shrinkage)
    values, vectors = np.linalg.eigh(moments.covariance(shrinkage=shrinkage))
    if values[-1] <= 0:
        raise NumericalError("the activations do not vary, so there is nothing to erase from")
    kept = values > values[-1] * _NULL
    roots, vectors = np.sqrt(values[kept]), vectors[:, kept]
    whiten, colour = (vectors / roots) @ vectors.T, (vectors * roots) @ vectors.T
    left = _concept(whiten @ moments.xz / (moments.n - 1), _label_scale(moments))
    read, write = left.T @ whiten, left.T @ colour
    return Eraser(
        site=site,
        read=read,
        write=write,
        mean=moments.mean_x if affine else np.zeros_like(moments.mean_x),
        origin=_named(origin, "LEACE", {"shrinkage": shrinkage, "affine": affine, "rows": moments.n}),
    )


def mean_projection(X: Any, y: Any, *, site: str = "", origin: Origin | None = None) -> Eraser:
    """Project out the span of the differences of class means: LEACE with the identity for the covariance.

    It zeroes the same cross-covariance and needs no inverse, so few rows will do; it moves activations more.

    Args:
        X: Activations, `[rows, d]`.
        y: Their labels, `[rows]`.
        site: Where they were read.
        origin: Where rows and labels come from.

    Raises:
        SpecError: The shapes do not fit, or there is one class only.
        NumericalError: A row is not finite.

    Source: Haghighatkhah et al. 2022, "Better hit the nail on the head than beat around the bush".

    Example:
        >>> X, y = np.array([[0.0, 1], [0, 3], [4, 1], [4, 3]]), np.array([0, 0, 1, 1])
        >>> mean_projection(X, y)(X).round(12).tolist()
        [[2.0, 1.0], [2.0, 3.0], [2.0, 1.0], [2.0, 3.0]]
    """
    rows = activation_rows(X)
    _, z = class_columns(y, len(rows))
    moments = LabelledMoments.of(rows, z)
    basis = _concept(moments.xz / (moments.n - 1), _label_scale(moments)).T
    return Eraser(
        site=site,
        read=basis,
        write=basis,
        mean=moments.mean_x,
        origin=_named(origin, "mean projection", {"rows": moments.n}),
    )


def _label_scale(moments: LabelledMoments) -> Float[np.ndarray, " c"]:
    """The standard deviation of each label column that is of zeros and ones: `sqrt(p (1 - p))`, else 1."""
    p = moments.mean_z
    inside = (p > 0) & (p < 1)
    return np.where(inside, np.sqrt(np.where(inside, p * (1 - p), 1.0)), 1.0)


def _concept(cross: Float[np.ndarray, "d c"], scale: Float[np.ndarray, " c"]) -> Float[np.ndarray, "d k"]:
    """An orthonormal basis of the columns, by a cut relative to the largest; a rare class counts as a common one."""
    left, sizes, _ = np.linalg.svd(cross / scale, full_matrices=False)
    rank = min(int((sizes > sizes[0] * _CUT).sum()) if sizes[0] > 0 else 0, max(1, cross.shape[1] - 1))
    return np.asarray(left[:, :rank])


def _enough(moments: LabelledMoments, shrinkage: bool) -> None:
    d = len(moments.mean_x)
    if not shrinkage and moments.n < ROWS_PER_DIMENSION * d:
        raise SpecError(
            f"{moments.n} rows of {d} dimensions are too few to invert their covariance: give "
            f"{ROWS_PER_DIMENSION * d} rows or more, or shrinkage=True",
            "X",
        )


def _named(origin: Origin | None, method: str, detail: dict[str, Any]) -> Origin:
    given = origin or Origin(method=method)
    return replace(given, method=method, detail={**given.detail, **detail})
