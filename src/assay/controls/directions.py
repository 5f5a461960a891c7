"""Random directions to hold a direction against, all of its own norm.

Three nulls, each keeping more of what makes a direction effective without meaning, and one that keeps meaning too:

- isotropic: any direction at all. Nearly all of them point where activations do not go, so this null is easy to beat.
- covariance-matched: drawn from N(0, Sigma), Sigma the covariance of the activations; points where they vary.
- label-shuffled: a difference of means between two classes drawn at random; has its noise too.
- semantic: the same extraction from other contrasts. What only these do not do is about *this* contrast.

Arrays come back as numpy, torch tensors as torch tensors of the same dtype and device.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, TypeVar

import numpy as np
from jaxtyping import Float

from assay.base.errors import NumericalError, SpecError
from assay.base.rng import numpy_stream
from assay.base.stats import Numbers
from assay.controls.labels import label_array

Array = TypeVar("Array")

_ROUNDING = 1e-14  # relative


def isotropic_directions(direction: Array, n: int, seed: int) -> Array:
    """Return n directions uniform on the sphere whose radius is the norm of `direction`, as `[n, d]`.

    Raises:
        SpecError: `direction` is not one vector.
        NumericalError: It is zero or not finite.

    Example:
        >>> draws = isotropic_directions(np.array([3.0, 4.0]), n=2, seed=0)
        >>> np.linalg.norm(draws, axis=1).round(6).tolist()
        [5.0, 5.0]
    """
    vector = _vector(direction)
    draws = numpy_stream(seed, "directions", "isotropic").standard_normal((_count(n), vector.size))
    return _like(_scaled(draws, vector), direction)


def covariance_matched_directions(direction: Array, activations: Numbers, n: int, seed: int) -> Array:
    """Return n directions drawn from N(0, Sigma) and scaled to the norm of `direction`, as `[n, d]`.

    `v = Xc' z / |Xc' z| |direction|` with Xc the centred activations and z standard normal: Sigma is never formed, and
    works for fewer rows than dimensions.

    Args:
        direction: The direction under test, `[d]`.
        activations: Activations at its site, `[rows, d]`.
        n: Number of directions.
        seed: Seed of the stream.

    Raises:
        SpecError: The shapes do not fit, or there are fewer than two rows.
        NumericalError: The direction is zero, the activations are constant, or either is not finite.
    """
    vector, centred = _vector(direction), _centred(activations, direction)
    draws = numpy_stream(seed, "directions", "covariance").standard_normal((_count(n), len(centred))) @ centred
    return _like(_scaled(draws, vector), direction)


def shuffled_difference_directions(direction: Array, activations: Numbers, labels: Numbers, n: int, seed: int) -> Array:
    """Return n differences of class means under permuted labels, scaled to the norm of `direction`, as `[n, d]`.

    Args:
        direction: The direction under test, `[d]`.
        activations: The activations it was fitted on, `[rows, d]`.
        labels: Their labels, two classes, `[rows]`.
        n: Number of directions.
        seed: Seed of the stream.

    Raises:
        SpecError: The shapes do not fit, or there are not exactly two classes.
        NumericalError: The direction is zero, the activations are constant, or either is not finite.
    """
    vector, rows = _vector(direction), _centred(activations, direction)
    y = label_array(labels, "labels")
    classes = np.unique(y)
    if y.shape != (len(rows),) or classes.size != 2:
        raise SpecError(
            f"labels has shape {y.shape} and {classes.size} classes; it needs two classes, one a row", "labels"
        )
    positive = y == classes[1]
    weights = np.where(positive, 1 / positive.sum(), -1 / (~positive).sum())
    rng = numpy_stream(seed, "directions", "shuffled labels")
    draws = rng.permuted(np.tile(weights, (_count(n), 1)), axis=1) @ rows
    return _like(_scaled(draws, vector), direction)


def semantic_directions(
    direction: Array, contrasts: Sequence[tuple[Any, Any]], extract: Callable[[Any, Any], Any]
) -> Array:
    """Return the directions that the same extraction finds in other contrasts, scaled to the norm of `direction`.

    A steering vector may work because it comes from *some* contrast: it lies where contrasts lie, and has their size. A
    claim about one contrast (formality) must hold against others that were made as carefully (tense, topic, length).

    Args:
        direction: The direction under test, `[d]`.
        contrasts: Pairs (rows, labels), each another contrast at the same site.
        extract: The extraction that gave `direction`: maps (rows, labels) to a vector `[d]`, choices it makes included.

    Returns:
        One a contrast, `[contrasts, d]`.

    Raises:
        SpecError: There is no contrast, or one gives a vector of another shape.
        NumericalError: One gives a vector that is zero or not finite.

    Example:
        >>> gap = lambda rows, labels: rows[labels == 1].mean(axis=0) - rows[labels == 0].mean(axis=0)
        >>> rows = np.array([[0.0, 0.0], [2.0, 0.0], [0.0, 1.0], [2.0, 1.0]])
        >>> contrasts = [(rows, np.array([0, 1, 0, 1])), (rows, np.array([0, 0, 1, 1]))]
        >>> semantic_directions(np.array([3.0, 4.0]), contrasts, gap).tolist()
        [[5.0, 0.0], [0.0, 5.0]]
    """
    vector = _vector(direction)
    if not contrasts:
        raise SpecError("semantic controls need at least one other contrast, got none", "contrasts")
    found = []
    for number, (rows, labels) in enumerate(contrasts):
        other = _numpy(extract(rows, labels)).astype(np.float64)
        if other.shape != vector.shape:
            raise SpecError(
                f"contrast {number} gives the shape {other.shape}, the direction has {vector.shape}", "extract"
            )
        if not np.isfinite(other).all() or not other.any():
            raise NumericalError(f"contrast {number} gives a vector that is zero or not finite")
        found.append(other)
    return _like(_scaled(np.stack(found), vector), direction)


def _scaled(draws: Float[np.ndarray, "n d"], vector: Float[np.ndarray, " d"]) -> Float[np.ndarray, "n d"]:
    norms = np.linalg.norm(draws, axis=1, keepdims=True)
    if not norms.all():
        raise NumericalError("the activations do not vary, so no direction can be drawn from them")
    return np.asarray(draws * (np.linalg.norm(vector) / norms))


def _vector(direction: object) -> Float[np.ndarray, " d"]:
    vector = _numpy(direction).astype(np.float64)
    if vector.ndim != 1:
        raise SpecError(f"direction has shape {vector.shape}; it must be one vector [d]", "direction")
    if not np.isfinite(vector).all() or not vector.any():
        raise NumericalError("the direction is zero or not finite; it has no norm to match")
    return vector


def _rows(activations: object, direction: object) -> Float[np.ndarray, "rows d"]:
    rows, d = _numpy(activations).astype(np.float64), _numpy(direction).size
    if rows.ndim != 2 or rows.shape[1] != d or len(rows) < 2:
        raise SpecError(
            f"activations has shape {rows.shape}; it must be [rows, {d}] with two rows or more", "activations"
        )
    if not np.isfinite(rows).all():
        raise NumericalError("the activations are not all finite")
    return rows


def _centred(activations: object, direction: object) -> Float[np.ndarray, "rows d"]:
    rows = _rows(activations, direction)
    centred = rows - rows.mean(axis=0)
    if np.abs(centred).max() <= _ROUNDING * np.abs(rows).max():  # the mean of equal numbers is off by rounding
        raise NumericalError("the activations do not vary, so no direction can be drawn from them")
    return np.asarray(centred)


def _count(n: int) -> int:
    if n < 1:
        raise SpecError(f"n is {n}; at least one direction is drawn", "n")
    return n


def _numpy(value: Any) -> np.ndarray:
    if hasattr(value, "detach"):  # a torch tensor, in any precision, on any device
        value = value.detach().to("cpu")
        value = value.double() if value.is_floating_point() else value
    return np.asarray(value)


def _like(draws: np.ndarray, direction: Array) -> Array:
    if hasattr(direction, "new_tensor"):
        given: Any = direction
        out: Array = (given if given.is_floating_point() else given.float()).new_tensor(draws)
        return out
    return draws  # type: ignore[return-value]  # Array is numpy's here
