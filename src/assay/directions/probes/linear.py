"""Linear probes: difference of means, LDA, ridge and logistic regression.

Each is fitted on rows it may standardise, and handed back as one `Probe` in the units of the activations. What a
method chooses (a penalty, a shrinkage) it chooses on the rows it is given and nothing else: give it training rows.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any, Literal, get_args

import numpy as np
import torch
from jaxtyping import Float

from assay.base.errors import NothingFound, NumericalError, SpecError
from assay.directions.probes.closed import Factor, factor, gaps, lda, ridge
from assay.directions.probes.inputs import Groups, Labels, group_ids, matrix, positives
from assay.directions.probes.logistic import held_out_losses, logistic
from assay.directions.probes.splits import grouped_folds
from assay.directions.vectors import Origin, Probe

LinearKind = Literal["difference of means", "lda", "logistic", "ridge"]
"""How a linear probe is fitted."""

STRENGTHS = tuple(10.0**k for k in range(-4, 3))
"""The values of C that logistic regression chooses from: the inverse of its penalty, per sum of losses."""


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Linear:
    """A linear readout in float64: `X weight + bias`.

    Args:
        weight: In the units of the rows, `[d]`.
        bias: The readout at zero.
        detail: What was chosen on the way.
    """

    weight: Float[np.ndarray, " d"]
    bias: float
    detail: Mapping[str, Any]

    def __call__(self, X: Any) -> Float[np.ndarray, " rows"]:
        """The readout of each row."""
        return np.asarray(matrix(X) @ self.weight + self.bias)


def fit_probe(
    kind: LinearKind,
    X: Float[np.ndarray, "rows d"],
    y: Labels,
    *,
    site: str,
    groups: Groups | None = None,
    reads: str = "",
    positions: Any = "last",
    origin: Origin | None = None,
    seed: int = 0,
    standardise: bool = True,
    shrinkage: float | None = None,
    penalty: float | None = None,
    C: float | None = None,
) -> Probe:
    """Fit a linear probe: `r(x) = weight . x + bias`, positive for the larger label.

    - "difference of means": `weight = mu+ - mu-`, zero half way between; nothing is standardised or weighted.
    - "lda": `weight = S^-1 (mu+ - mu-)`, S pooled within classes, Ledoit-Wolf shrunk.
    - "ridge": least squares on -1 and 1, the penalty by closed-form leave-one-out.
    - "logistic": `min sum log(1 + exp(-y r)) + |w|^2 / 2C`, C by grouped cross-validation, L-BFGS.

    Readouts of "lda" and "logistic" are log odds; those of the other two are not: see `calibrated`.

    Args:
        kind: The method.
        X: Training rows, `[rows, d]`.
        y: Two labels, one a row.
        site: The site the rows were read at.
        groups: The group of each row; needed where C is chosen by cross-validation.
        reads: What a positive readout says; "<larger label>, not <smaller label>" by default.
        positions: Which token of a prompt the rows are.
        origin: Where the rows come from; method, seed and settings are filled in.
        seed: Seed of the folds.
        standardise: Divide each column by its deviation in these rows first; folded into the weight. Not for
            difference of means.
        shrinkage: Of "lda", between 0 and 1, instead of Ledoit and Wolf's.
        penalty: Of "ridge", instead of leave-one-out's.
        C: Of "logistic", instead of the cross-validated one.

    Raises:
        SpecError: The kind is unknown, there are not two classes, a setting belongs to another kind, LDA is to run
            unshrunk on too few rows, or groups are missing or too few.
        NumericalError: A row is not finite.
        NothingFound: Nothing separates the classes.

    Source: Marks and Tegmark 2023, "The geometry of truth", section 5 (mass-mean probes: LDA); Ledoit and Wolf 2004.

    Example:
        >>> rng = np.random.default_rng(0)
        >>> y = np.arange(40) % 2
        >>> X = rng.normal(size=(40, 3)) + 4.0 * y[:, None] * np.array([1.0, 0.0, 0.0])
        >>> probe = fit_probe("lda", X, y, site="blocks.3.resid_post")
        >>> probe.reads, bool(((probe(torch.tensor(X)) > 0).numpy() == y).mean() > 0.9)
        ('1, not 0', True)
    """
    fitted = fit_linear(
        kind, X, y, groups=groups, seed=seed, standardise=standardise, shrinkage=shrinkage, penalty=penalty, C=C
    )
    classes = np.unique(np.asarray(y)).tolist()
    given = origin or Origin(method=kind)
    return Probe(
        site=site,
        weight=torch.tensor(fitted.weight, dtype=torch.float32),
        bias=fitted.bias,
        reads=reads or f"{classes[1]}, not {classes[0]}",
        positions=positions,
        origin=replace(given, method=kind, seed=seed, detail={**given.detail, **fitted.detail}),
    )


def fit_linear(
    kind: LinearKind,
    X: Any,
    y: Labels,
    *,
    groups: Groups | None = None,
    seed: int = 0,
    standardise: bool = True,
    shrinkage: float | None = None,
    penalty: float | None = None,
    C: float | None = None,
) -> Linear:
    """Fit the readout of `fit_probe` as float64 numbers, with no site to belong to."""
    check_settings(kind, shrinkage=shrinkage, penalty=penalty, C=C)
    data = matrix(X)
    up = positives(y, len(data))
    if kind == "logistic":
        weight, bias, detail = _logistic(data, up, groups, seed, standardise, C)
        return Linear(weight=_something(weight, kind), bias=bias, detail=detail)
    column = up[:, None]
    if kind == "difference of means":
        weight = gaps(data, column)[:, 0]
        middle = (data[up].mean(axis=0) + data[~up].mean(axis=0)) / 2
        return Linear(weight=_something(weight, kind), bias=float(-weight @ middle), detail={})
    if kind == "lda":
        check_shrinkage(len(data), data.shape[1], shrinkage)
    rows = factor(data, standardise=standardise)
    _varies(rows)
    found = ridge(rows, column, penalty) if kind == "ridge" else lda(rows, column, shrinkage)
    unfolded = rows.unfold(found.c, found.bias)
    name = "penalty" if kind == "ridge" else "shrinkage"
    detail = {name: float(found.setting[0]), "standardised": standardise}
    return Linear(weight=_something(unfolded.weight[:, 0], kind), bias=float(unfolded.bias[0]), detail=detail)


def check_settings(kind: str, **given: float | None) -> None:
    """See that a kind is known, and that each setting belongs to it.

    Raises:
        SpecError: It is not, or one does not.
    """
    if kind not in get_args(LinearKind):
        raise SpecError(f"kind is {kind!r}; valid: {', '.join(map(repr, get_args(LinearKind)))}", "kind")
    own = {"lda": "shrinkage", "ridge": "penalty", "logistic": "C"}.get(kind)
    for name, value in given.items():
        if value is not None and name != own:
            takes = f"its setting is {own}" if own else "it has no settings"
            raise SpecError(f"a {kind} probe has no {name} (got {value}); {takes}", name)


def check_shrinkage(rows: int, d: int, shrinkage: float | None) -> None:
    """See that a covariance with no shrinkage has rows enough to be inverted.

    Raises:
        SpecError: There are fewer than ten rows a dimension.
    """
    if shrinkage == 0 and rows < 10 * d:
        raise SpecError(
            f"LDA without shrinkage needs 10 rows a dimension; got {rows} rows of {d}: leave shrinkage out "
            "(Ledoit-Wolf), give one above 0, or reduce the dimensions first",
            "shrinkage",
        )


def calibrated(probe: Probe, X: Float[np.ndarray, "rows d"], y: Labels) -> Probe:
    """A probe scaled and shifted so that its readout is a log odds: `p = sigmoid(r(x))`; the order is unchanged.

    Platt's fit: logistic regression, not penalised, of the labels on the readout. Give it rows that the probe was
    not fitted on.

    Raises:
        SpecError: There are not two classes, or the readout tells them apart without an error (no finite scale fits).
        NumericalError: The readout points the wrong way on these rows.

    Source: Platt 1999, "Probabilistic outputs for support vector machines", section 2.

    Example:
        >>> y = np.array([0, 0, 1, 0, 1, 1])
        >>> X = np.array([[-3.0], [-2.0], [-1.0], [1.0], [2.0], [3.0]])
        >>> probe = calibrated(fit_probe("difference of means", X, y, site="embed"), X, y)
        >>> round(float(torch.sigmoid(probe(torch.tensor([[0.0]])))[0]), 3)
        0.5
    """
    from sklearn.linear_model import LogisticRegression

    data = matrix(X)
    up = positives(y, len(data))
    readout = data @ probe.weight.double().numpy() + probe.bias
    if readout[up].min() > readout[~up].max():
        raise SpecError(
            "the readout tells these rows apart without an error, so no finite scale fits: give more rows", "X"
        )
    spread = float(readout.std()) or 1.0
    model = LogisticRegression(C=1e6, max_iter=1000).fit(readout[:, None] / spread, up)
    slope, shift = float(model.coef_[0, 0]) / spread, float(model.intercept_[0])
    if slope <= 0:
        raise NumericalError("the probe's readout is no higher for the class it reads on these rows; nothing to scale")
    return replace(probe, weight=probe.weight * slope, bias=probe.bias * slope + shift)


def _logistic(
    X: np.ndarray, up: np.ndarray, groups: Groups | None, seed: int, standardise: bool, C: float | None
) -> tuple[np.ndarray, float, dict[str, Any]]:
    detail: dict[str, Any] = {"standardised": standardise}
    if C is None:
        if groups is None:
            raise SpecError("C is chosen by grouped cross-validation: give groups, or C", "groups")
        folds = grouped_folds(groups, up, folds=min(5, _smallest(groups, up)), seed=seed)
        losses = held_out_losses(X, up, folds, STRENGTHS, standardise=standardise)
        C = STRENGTHS[int(np.argmin(losses.mean(axis=1)))]
        detail["folds"] = len(folds)
    elif not C > 0:
        raise SpecError(f"C is {C}; it must be positive", "C")
    weight, bias = logistic(X, up, C, standardise=standardise)
    return weight, bias, {"C": C, **detail}


def _smallest(groups: Groups, up: np.ndarray) -> int:
    """How many groups hold the rarer class: no more folds can each hold both."""
    ids = group_ids(groups, up.size)
    fewest = min(len(np.unique(ids[up])), len(np.unique(ids[~up])))
    if fewest < 2:
        raise SpecError(
            "one class lives in a single group, so no split can hold it on both sides: bring more groups, or give C",
            "groups",
        )
    return fewest


def _varies(rows: Factor) -> None:
    if not rows.s2.size:
        raise NumericalError("all rows of X are the same; there is nothing to read")


def _something(weight: np.ndarray, kind: str) -> Float[np.ndarray, " d"]:
    if not np.isfinite(weight).all() or not weight.any():
        raise NothingFound(f"the {kind} probe found nothing that separates the classes: their means are the same")
    return weight
