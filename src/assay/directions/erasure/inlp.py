"""INLP: fit a probe, project its weights out, and again, until no probe beats the majority class.

    P = I - Q Q',   Q an orthonormal basis of the weights of ALL probes so far.

The product of the single projections equals this only where each weight lies in the range of the one before; a basis of
all rows does not depend on that. INLP takes out far more than the classes less one that are needed, which is why it has
to be held against as many random directions (`amnesic`).
"""

from __future__ import annotations

import warnings
from collections.abc import Hashable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from jaxtyping import Float, Shaped

from assay.base.errors import SpecError
from assay.directions.erasure.eraser import Eraser, activation_rows, class_columns
from assay.directions.probes.splits import grouped_split
from assay.directions.vectors import Origin


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class InlpFit:
    """An INLP eraser and how it came about.

    Args:
        eraser: The projection.
        accuracies: The accuracy of each round's probe on the held-out rows, before its weights were taken out.
        majority: The share of the largest class among those rows.
        stopped: Whether the last probe was no better than the majority; False when the rounds ran out first.
    """

    eraser: Eraser
    accuracies: tuple[float, ...]
    majority: float
    stopped: bool


def inlp(
    X: Any,
    y: Any,
    groups: Sequence[Hashable] | None = None,
    *,
    site: str = "",
    rounds: int = 64,
    held_out: float = 0.25,
    c: float = 1.0,
    seed: int = 0,
    origin: Origin | None = None,
) -> InlpFit:
    """Fit iterative null-space projection.

    Args:
        X: Activations, `[rows, d]`.
        y: Their labels, `[rows]`.
        groups: What each row is about; groups are whole on one side of the split. Each row is its own without.
        site: Where they were read.
        rounds: The largest number of probes.
        held_out: The share of groups whose rows decide when to stop.
        c: The logistic probes' inverse regularisation, for activations scaled to mean variance 1.
        seed: Seed of the split.
        origin: Where rows and labels come from.

    Raises:
        SpecError: The shapes do not fit, there is one class only, the groups are too few to split, or there
            are no rounds.
        NumericalError: A row is not finite.

    Source: Ravfogel et al. 2020, "Null it out", algorithm 1, with one basis of all rows in place of a product.

    Example:
        >>> rng = np.random.default_rng(0)
        >>> y = rng.integers(2, size=400)
        >>> X = rng.normal(size=(400, 6)) + 2.0 * y[:, None] * np.eye(6)[0]
        >>> found = inlp(X, y)
        >>> found.accuracies[0] > 0.8, found.eraser.rank >= 1
        (True, True)
    """
    rows = activation_rows(X)
    _, z = class_columns(y, len(rows))
    labels = z.argmax(axis=1)
    if not 0 < held_out < 1:
        raise SpecError(f"held_out is {held_out}; it must be between 0 and 1", "held_out")
    if rounds < 1 or not c > 0:
        raise SpecError(f"rounds={rounds}, c={c}: at least one probe, and an inverse regularisation above 0", "rounds")
    split = grouped_split(range(len(labels)) if groups is None else groups, labels, test=held_out, seed=seed)
    fit, held = split.train, split.test
    mean = rows[fit].mean(axis=0)
    centred = rows - mean
    scale = float(np.sqrt((centred[fit] ** 2).mean())) or 1.0
    centred = centred / scale
    majority = float(np.bincount(labels[held]).max() / len(held))
    weights = np.zeros((0, rows.shape[1]))
    basis, accuracies, stopped = weights, [], False
    for _ in range(rounds):
        left = centred - (centred @ basis.T) @ basis
        probe = logistic(left[fit], labels[fit], c)
        accuracies.append(float(probe.score(left[held], labels[held])))
        stopped = accuracies[-1] <= majority
        if stopped:
            break
        weights = np.concatenate([weights, probe.coef_])
        basis = _basis(weights)
        if len(basis) >= rows.shape[1]:
            break
    given = origin or Origin(method="INLP")
    named = replace(given, method="INLP", seed=seed, detail={**given.detail, "rounds": len(accuracies), "c": c})
    eraser = Eraser(site=site, read=basis, write=basis, mean=mean, origin=named)
    return InlpFit(eraser=eraser, accuracies=tuple(accuracies), majority=majority, stopped=stopped)


def _basis(rows: Float[np.ndarray, "w d"]) -> Float[np.ndarray, "k d"]:
    units = rows / np.maximum(np.linalg.norm(rows, axis=1, keepdims=True), 1e-300)
    _, sizes, right = np.linalg.svd(units, full_matrices=False)
    return np.asarray(right[sizes > 1e-8 * sizes[0]])


def logistic(X: Float[np.ndarray, "rows d"], y: Shaped[np.ndarray, " rows"], c: float = 1.0) -> Any:
    """A logistic probe, fitted by L-BFGS."""
    from sklearn.exceptions import ConvergenceWarning
    from sklearn.linear_model import LogisticRegression

    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ConvergenceWarning)
        return LogisticRegression(C=c, max_iter=500, tol=1e-5).fit(X, y)
