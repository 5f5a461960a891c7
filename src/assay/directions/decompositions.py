"""Decompositions that were there before dictionaries: PCA, ICA, NMF, k-means and sparse coding, under one interface.

    fit_basis(kind, X, k)  ->  encode, decode, decoder rows, reconstruction, fraction of variance explained

A trained dictionary is worth its training where it beats these at the same size and the same number of active units.
They are fitted by scikit-learn and satisfy `assay.base.protocols.Dictionary`.
"""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any, Literal, get_args

import numpy as np
import torch
from jaxtyping import Float, Shaped
from torch import Tensor

from assay.base.errors import NumericalError, SpecError
from assay.base.rng import stream_key
from assay.directions.vectors import Direction, Origin

Kind = Literal["pca", "ica", "nmf", "kmeans", "sparse coding"]
"""How activations are decomposed; see `fit`."""


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class FittedBasis:
    """A fitted decomposition: `x ~ offset + z decoder`.

    Args:
        kind: Which.
        site: Where its activations were read.
        decoder: What each unit writes, `[k, d]`.
        offset: What is there when no unit is active, `[d]`.
        reader: PCA and ICA: `z = (x - offset) reader`, `[d, k]`; nothing else.
        parts: NMF: the non-negative components over positive and negative parts, `[k, 2 d]`; nothing else.
        active: Sparse coding: the largest number of active units a row.
        origin: Where it comes from.

    Example:
        >>> X = np.random.default_rng(0).standard_normal((200, 4)) * np.array([5.0, 2.0, 0.1, 0.1])
        >>> basis = fit_basis("pca", X, 2)
        >>> basis.n_latents, basis.fve(X) > 0.99
        (2, True)
    """

    kind: Kind
    site: str
    decoder: Float[np.ndarray, "k d"]
    offset: Float[np.ndarray, " d"]
    reader: Float[np.ndarray, "d k"] | None = None
    parts: Float[np.ndarray, "k parts"] | None = None
    active: int = 0
    origin: Origin = field(default_factory=lambda: Origin(method="given"))

    @property
    def n_latents(self) -> int:
        """How many units it has."""
        return len(self.decoder)

    @property
    def unit_directions(self) -> Float[np.ndarray, "k d"]:
        """What each unit writes, with norm 1; k-means: from the mean of the data to the centre."""
        rows = self.decoder - self.offset if self.kind == "kmeans" else self.decoder
        sizes = np.linalg.norm(rows, axis=1, keepdims=True)
        return np.asarray(rows / np.where(sizes > 0, sizes, 1.0))

    def direction(self, unit: int, size: float = float("nan")) -> Direction:
        """What one unit writes, as a write vector.

        Raises:
            SpecError: There is no such unit.
        """
        if not 0 <= unit < self.n_latents:
            raise SpecError(f"unit {unit} is not one of 0 to {self.n_latents - 1}", "unit")
        row = torch.from_numpy(self.unit_directions[unit]).float()
        return Direction(site=self.site, vector=row, size=size, writes=f"{self.kind} {unit}", origin=self.origin)

    def encode(self, x: Any, /) -> Any:
        """Units of activations, `[..., d]` to `[..., k]`; a tensor gives a tensor.

        PCA and ICA: linear. NMF: non-negative least squares on the positive and negative parts. k-means: one at the
        nearest centre. Sparse coding: orthogonal matching pursuit with `active` units.
        """
        rows, back = _flat(x, len(self.offset))
        if self.reader is not None:
            return back((rows - self.offset) @ self.reader)
        if self.kind == "kmeans":
            distance = (self.decoder**2).sum(axis=1) - 2 * rows @ self.decoder.T
            return back(np.eye(self.n_latents)[distance.argmin(axis=1)])
        if self.parts is not None:
            return back(_non_negative(_signed_parts(rows - self.offset), self.parts))
        return back(_pursuit(rows - self.offset, self.decoder, self.active))

    def decode(self, z: Any, /) -> Any:
        """What the units say the activations are, `[..., k]` to `[..., d]`."""
        rows, back = _flat(z, self.n_latents)
        if self.kind == "kmeans":
            return back(rows @ self.decoder)
        return back(rows @ self.decoder + self.offset)

    def __call__(self, x: Any, /) -> Any:
        """The reconstruction."""
        return self.decode(self.encode(x))

    def fve(self, X: Any) -> float:
        """The fraction of variance explained: `1 - sum |x - x'|^2 / sum |x - mean|^2`, over rows.

        Raises:
            NumericalError: The rows do not vary.
        """
        rows = _rows(X)
        spread = float(((rows - rows.mean(axis=0)) ** 2).sum())
        if spread == 0:
            raise NumericalError("the rows do not vary, so no share of their variance is explained")
        return 1 - float(((rows - self(rows)) ** 2).sum()) / spread

    def l0(self, X: Any) -> float:
        """The mean number of active units a row."""
        return float((np.abs(self.encode(_rows(X))) > 1e-12).sum(axis=1).mean())


def fit_basis(
    kind: Kind,
    X: Any,
    k: int,
    *,
    site: str = "",
    active: int = 8,
    iterations: int = 200,
    seed: int = 0,
    origin: Origin | None = None,
) -> FittedBasis:
    """Decompose activations into k units.

    - "pca": directions of largest variance; the least error of any k linear directions.
    - "ica": independent directions (FastICA) in the span of the first k of PCA, so with its error.
    - "nmf": non-negative parts of `[x+, x-]`, the positive and the negative part side by side (activations have signs).
    - "kmeans": centres; one active unit a row.
    - "sparse coding": unit-norm directions of which `active` are used a row (k may exceed d).

    Args:
        kind: Which.
        X: Activations, `[rows, d]`.
        k: How many units.
        site: Where they were read.
        active: Sparse coding: the number of active units a row.
        iterations: The largest number of iterations.
        seed: Seed of what is random.
        origin: Where the rows come from.

    Raises:
        SpecError: The kind is unknown, k does not fit, or there are fewer rows than units.
        NumericalError: A row is not finite, or ICA does not converge.

    Example:
        >>> X = np.random.default_rng(0).standard_normal((300, 6))
        >>> [fit_basis(kind, X, 3).decoder.shape for kind in ("pca", "kmeans")]
        [(3, 6), (3, 6)]
    """
    if kind not in get_args(Kind):
        raise SpecError(f"kind is {kind!r}; valid: {', '.join(map(repr, get_args(Kind)))}", "kind")
    rows = _rows(X)
    n, d = rows.shape
    if not 1 <= k <= (d if kind in ("pca", "ica") else n) or k > n:
        raise SpecError(f"k is {k}; {kind} of {n} rows of {d} dimensions needs 1 to {min(n, d)}", "k")
    if kind == "sparse coding" and not 1 <= active <= k:
        raise SpecError(f"active is {active}; it must be 1 to k = {k}", "active")
    state = stream_key(seed, "decomposition", kind) % (1 << 31)
    parts = _FITTERS[kind](rows, k, iterations, state, active)
    given = origin or Origin(method=kind)
    named = replace(given, method=kind, seed=seed, detail={**given.detail, "k": k, "active": active, "rows": n})
    return FittedBasis(kind=kind, site=site, origin=named, **parts)


def _pca(rows: np.ndarray, k: int, iterations: int, state: int, active: int) -> dict[str, Any]:
    from sklearn.decomposition import PCA

    model = PCA(n_components=k, svd_solver="full").fit(rows)
    return {"decoder": model.components_, "offset": model.mean_, "reader": model.components_.T.copy()}


def _ica(rows: np.ndarray, k: int, iterations: int, state: int, active: int) -> dict[str, Any]:
    from sklearn.decomposition import FastICA
    from sklearn.exceptions import ConvergenceWarning

    with warnings.catch_warnings():
        warnings.simplefilter("error", ConvergenceWarning)
        try:
            model = FastICA(
                n_components=k, whiten="unit-variance", max_iter=iterations, tol=1e-3, random_state=state
            ).fit(rows)
        except ConvergenceWarning:
            raise NumericalError(
                f"ICA did not converge in {iterations} iterations: Gaussian directions have no independent axes; give "
                "more iterations=, more rows or a smaller k"
            ) from None
    return {"decoder": model.mixing_.T.copy(), "offset": model.mean_, "reader": model.components_.T.copy()}


def _nmf(rows: np.ndarray, k: int, iterations: int, state: int, active: int) -> dict[str, Any]:
    from sklearn.decomposition import NMF
    from sklearn.exceptions import ConvergenceWarning

    d = rows.shape[1]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ConvergenceWarning)  # a few more iterations change little
        model = NMF(n_components=k, init="nndsvda", max_iter=iterations, random_state=state, tol=1e-3)
        model.fit(_signed_parts(rows))
    parts = model.components_
    return {"decoder": parts[:, :d] - parts[:, d:], "offset": np.zeros(d), "parts": parts}


def _kmeans(rows: np.ndarray, k: int, iterations: int, state: int, active: int) -> dict[str, Any]:
    from sklearn.cluster import KMeans

    model = KMeans(n_clusters=k, n_init=4, max_iter=iterations, random_state=state).fit(rows)
    return {"decoder": model.cluster_centers_, "offset": rows.mean(axis=0)}


def _sparse(rows: np.ndarray, k: int, iterations: int, state: int, active: int) -> dict[str, Any]:
    from sklearn.decomposition import MiniBatchDictionaryLearning

    mean = rows.mean(axis=0)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", RuntimeWarning)  # pursuit says so when a row needs fewer units
        model = MiniBatchDictionaryLearning(
            n_components=k,
            fit_algorithm="lars",
            transform_algorithm="omp",
            transform_n_nonzero_coefs=active,
            alpha=float(np.sqrt(((rows - mean) ** 2).sum(axis=1).mean()) / max(2, active)),
            max_iter=max(1, iterations // 20),
            batch_size=min(len(rows), 256),
            random_state=state,
        ).fit(rows - mean)
    atoms = model.components_
    sizes = np.linalg.norm(atoms, axis=1, keepdims=True)
    return {"decoder": atoms / np.where(sizes > 0, sizes, 1.0), "offset": mean, "active": active}


_FITTERS: Mapping[str, Any] = {"pca": _pca, "ica": _ica, "nmf": _nmf, "kmeans": _kmeans, "sparse coding": _sparse}


def _signed_parts(rows: Float[np.ndarray, "rows d"]) -> Float[np.ndarray, "rows parts"]:
    return np.concatenate([np.maximum(rows, 0), np.maximum(-rows, 0)], axis=1)


def _non_negative(rows: Float[np.ndarray, "rows d"], parts: Float[np.ndarray, "k d"]) -> Float[np.ndarray, "rows k"]:
    from scipy.optimize import nnls

    # The same minimum with k equations in place of d: |z' P - x|^2 = |z' L - x P^+ L|^2 + const, P P' = L L'.
    _, sizes, right = np.linalg.svd(parts, full_matrices=False)
    keep = right[sizes > 1e-10 * sizes[0]]
    small, seen = parts @ keep.T, rows @ keep.T
    return np.stack([nnls(small.T, row)[0] for row in seen])


def _pursuit(rows: Float[np.ndarray, "rows d"], atoms: Float[np.ndarray, "k d"], n: int) -> Float[np.ndarray, "rows k"]:
    from sklearn.linear_model import orthogonal_mp_gram

    with warnings.catch_warnings():
        warnings.simplefilter("ignore", RuntimeWarning)  # a row is already met by fewer units
        found = orthogonal_mp_gram(atoms @ atoms.T, atoms @ rows.T, n_nonzero_coefs=n)
    return np.asarray(found).reshape(len(atoms), len(rows)).T.copy()


def _rows(X: Any) -> Float[np.ndarray, "rows d"]:
    if isinstance(X, Tensor):
        X = X.detach().to("cpu").double().numpy()
    rows = np.asarray(X, dtype=np.float64)
    if rows.ndim != 2 or len(rows) < 2:
        raise SpecError(f"X has the shape {rows.shape}; it must be [rows, d] with two rows or more", "X")
    if not np.isfinite(rows).all():
        raise NumericalError(f"{int((~np.isfinite(rows)).any(axis=1).sum())} of {len(rows)} rows of X are not finite")
    return rows


def _flat(x: Any, width: int) -> tuple[Shaped[np.ndarray, "rows width"], Any]:
    """Rows of any leading shape as float64, and how to give the answer back in that shape and kind."""
    tensor = isinstance(x, Tensor)
    values = x.detach().to("cpu").double().numpy() if tensor else np.asarray(x, dtype=np.float64)
    if values.shape[-1:] != (width,):
        raise SpecError(f"the last dimension must be {width}; got {values.shape}", "x")

    def back(rows: np.ndarray) -> Any:
        shaped = rows.reshape(*values.shape[:-1], rows.shape[-1])
        return torch.from_numpy(np.ascontiguousarray(shaped)).to(x) if tensor else shaped

    return values.reshape(-1, width), back
