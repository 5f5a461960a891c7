"""Penalised logistic regression for a path of penalties on one factorisation.

    min_{w, b}  sum log(1 + exp(-y (X w + b))) + |w|^2 / 2C

by L-BFGS in the eigenbasis of X'X, each coordinate divided by `(s2/4 + 1/C)^1/2`: its largest curvature. A residual
stream's spectrum falls by many orders of magnitude, and there L-BFGS on the columns themselves (scikit-learn's) is not
done after a thousand steps, where this takes some tens. The optimum is the same one.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from jaxtyping import Bool, Float

from assay.base.errors import NumericalError
from assay.directions.probes.closed import Factor, factor
from assay.directions.probes.splits import Split

_STEPS = 2000
_GRADIENT = 1e-6  # in preconditioned units, where a step of 1 is large
_FAR = 1e-2  # a gradient above it means that the search was given up, not that it is slow to polish


def logistic(
    X: Float[np.ndarray, "rows d"], up: Bool[np.ndarray, " rows"], C: float, *, standardise: bool = True
) -> tuple[Float[np.ndarray, " d"], float]:
    """Fit one penalty: weight and bias in the units of the rows.

    Raises:
        NumericalError: The search did not converge.
    """
    rows = factor(X, standardise=standardise)
    weights, biases = path(rows, up, (C,))
    fitted = rows.unfold(weights, biases)
    return fitted.weight[:, 0], float(fitted.bias[0])


def held_out_losses(
    X: Float[np.ndarray, "rows d"],
    up: Bool[np.ndarray, " rows"],
    folds: tuple[Split, ...],
    strengths: Sequence[float],
    *,
    standardise: bool = True,
) -> Float[np.ndarray, "strengths rows"]:
    """The log loss of each row, in nats, under probes fitted on the folds without it, one for each C."""
    loss = np.empty((len(strengths), len(X)))
    for fold in folds:
        rows = factor(X[fold.train], standardise=standardise)
        weights, biases = path(rows, up[fold.train], strengths)
        readout = rows.rotate(X[fold.test]) @ weights + biases
        loss[:, fold.test] = np.logaddexp(0.0, np.where(up[fold.test, None], -readout, readout)).T
    return loss


def path(
    rows: Factor, up: Bool[np.ndarray, " rows"], strengths: Sequence[float]
) -> tuple[Float[np.ndarray, "rank strengths"], Float[np.ndarray, " strengths"]]:
    """Weights and biases in the basis of a factor for each C, each search beginning where the last one ended.

    Raises:
        NumericalError: A search did not converge.
    """
    from scipy.optimize import minimize

    sign = np.where(up, 1.0, -1.0)
    share = float(up.mean())
    weight, bias = np.zeros(len(rows.s2)), float(np.log(share / (1 - share)))
    weights, biases = np.empty((len(rows.s2), len(strengths))), np.empty(len(strengths))
    for i in np.argsort(strengths):
        C = strengths[i]
        scale = np.append(1.0 / np.sqrt(rows.s2 / 4 + 1 / C), 2.0 / np.sqrt(len(up)))

        def objective(u: np.ndarray, C: float = C, scale: np.ndarray = scale) -> tuple[float, np.ndarray]:
            w, b = u[:-1] * scale[:-1], u[-1] * scale[-1]
            margin = sign * (rows.Z @ w + b)
            # d/dm log(1 + exp(-m)) = -sigmoid(-m), written so that it never overflows
            slope = -sign * np.exp(-np.logaddexp(0.0, margin))
            gradient = np.append(rows.Z.T @ slope + w / C, slope.sum()) * scale
            return float(np.logaddexp(0.0, -margin).sum() + w @ w / (2 * C)), gradient

        start = np.append(weight, bias) / scale
        options = {"maxiter": _STEPS, "maxfun": 2 * _STEPS, "gtol": _GRADIENT, "ftol": 1e-15, "maxcor": 20}
        found = minimize(objective, start, jac=True, method="L-BFGS-B", options=options)
        if not float(np.abs(found.jac).max()) < _FAR:
            raise NumericalError(
                f"logistic regression did not converge at C = {C:g} (gradient {np.abs(found.jac).max():.2g}); give a "
                "smaller C"
            )
        weight, bias = found.x[:-1] * scale[:-1], float(found.x[-1] * scale[-1])
        weights[:, i], biases[i] = weight, bias
    return weights, biases
