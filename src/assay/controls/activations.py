"""Activations with the mean and covariance of real ones and nothing else: what a Gaussian of that spectrum gives.

A claim about clusters, sparse directions or a dictionary's latents that also holds for these was about second moments.
"""

from __future__ import annotations

from typing import Any, TypeVar

import numpy as np

from assay.base.errors import NumericalError, SpecError
from assay.base.moments import Moments, stream_moments
from assay.base.rng import numpy_stream

Rows = TypeVar("Rows")


def spectrum_matched_activations(activations: Rows, n: int | None = None, seed: int = 0) -> Rows:
    """Return n rows drawn from `mu + Sigma^1/2 z`, z standard normal, mu and Sigma those of the activations.

    With fewer rows than dimensions, Sigma has their rank and so have the draws: `x = mu + Xc' z / sqrt(rows - 1)` with
    the centred rows Xc. Otherwise `Sigma^1/2 = V diag(s)^1/2 V'` from its eigenvalues, those below zero by rounding
    taken as zero.

    Args:
        activations: `[rows, d]`, an array or a tensor, or the `Moments` of rows that were streamed.
        n: How many rows to draw; as many as were given by default.
        seed: Seed of the stream.

    Returns:
        `[n, d]`, of the kind and type that was given; float64 from moments.

    Raises:
        SpecError: There are fewer than two rows, or the shape is wrong.
        NumericalError: A number is not finite, or the rows do not vary.

    Example:
        >>> rows = np.random.default_rng(0).exponential(size=(500, 3)) * [1.0, 5.0, 0.1]
        >>> drawn = spectrum_matched_activations(rows, n=20000)
        >>> bool(np.allclose(np.cov(drawn.T), np.cov(rows.T), rtol=0.1, atol=0.1))
        True
    """
    given: Any = activations
    if n is not None and n < 1:
        raise SpecError(f"n is {n}; at least one row is drawn", "n")
    rng = numpy_stream(seed, "activations", "spectrum")
    if isinstance(given, Moments):
        return _from_moments(given, given.n if n is None else n, rng)  # type: ignore[return-value]
    rows = _numpy(given)
    count = len(rows) if n is None else n
    if len(rows) <= rows.shape[1]:
        mean = rows.mean(axis=0)
        centred = (rows - mean) / np.sqrt(len(rows) - 1)
        if not centred.any():
            raise NumericalError("the activations do not vary, so there is no spectrum to match")
        drawn = mean + rng.standard_normal((count, len(rows))) @ centred
    else:
        drawn = _from_moments(stream_moments(np.array_split(rows, max(1, len(rows) // 8192))), count, rng)
    if hasattr(given, "new_tensor"):
        out: Rows = given.new_tensor(drawn)
        return out
    dtype = np.asarray(given).dtype
    like: Any = drawn.astype(dtype if np.issubdtype(dtype, np.floating) else np.float64)
    return like  # type: ignore[no-any-return]  # Rows is numpy's here


def _from_moments(moments: Moments, n: int, rng: np.random.Generator) -> np.ndarray:
    values, vectors = np.linalg.eigh(moments.covariance())
    if values[-1] <= 0:
        raise NumericalError("the activations do not vary, so there is no spectrum to match")
    kept = values > values[-1] * moments.d * np.finfo(np.float64).eps
    root = (vectors[:, kept] * np.sqrt(values[kept])) @ vectors[:, kept].T
    return np.asarray(moments.mean + rng.standard_normal((n, moments.d)) @ root)


def _numpy(given: Any) -> np.ndarray:
    if hasattr(given, "detach"):  # a torch tensor, in any precision, on any device
        given = given.detach().to("cpu").double()
    rows = np.asarray(given, dtype=np.float64)
    if rows.ndim != 2 or len(rows) < 2 or not rows.shape[1]:
        raise SpecError(
            f"activations has shape {rows.shape}; it must be [rows, d] with two rows or more", "activations"
        )
    if not np.isfinite(rows).all():
        raise NumericalError("the activations are not all finite")
    if np.ptp(rows, axis=0).max() <= 1e-14 * np.abs(rows).max():  # the covariance of equal numbers is rounding
        raise NumericalError("the activations do not vary, so there is no spectrum to match")
    return rows
