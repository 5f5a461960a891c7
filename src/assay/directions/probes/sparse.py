"""k-sparse probes: how few latents of a dictionary carry a concept."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal, get_args

import numpy as np
import torch
from jaxtyping import Float, Int

from assay.base.errors import NumericalError, SpecError
from assay.directions.probes.inputs import Groups, Labels, matrix, positives, standard
from assay.directions.probes.linear import fit_probe
from assay.directions.vectors import Origin, Probe

Ranking = Literal["mean difference", "l1"]
"""How latents are ranked before the best k are taken."""


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class SparseProbe:
    """A probe of k latents.

    Args:
        latents: Which, the highest ranked first.
        probe: Its weight over all latents of the dictionary, zero at every other.
    """

    latents: tuple[int, ...]
    probe: Probe

    def __call__(self, codes: Any) -> Float[np.ndarray, " rows"]:
        """The readout of each row of codes."""
        chosen = list(self.latents)
        table = _codes(codes)
        if table.shape[1] != len(self.probe.weight):
            raise SpecError(f"the probe reads {len(self.probe.weight)} latents; got {table.shape[1]}", "codes")
        return np.asarray(table[:, chosen] @ self.probe.weight.double().numpy()[chosen] + self.probe.bias)


def rank_latents(
    codes: Any, y: Labels, by: Ranking = "mean difference", *, positive_only: bool = False, C: float = 0.1
) -> Int[np.ndarray, " latents"]:
    """Rank latents by how they differ between two classes, the best first; latents with a score of 0 are left out.

    - "mean difference": `|mean+ - mean-|`, in the units of the codes.
    - "l1": the absolute weight in an L1-penalised logistic probe on standardised codes, classes weighted alike.

    Rank on training rows: ranked on test rows, some latent always separates them.

    Args:
        codes: Activations of latents, `[rows, latents]`; dense, or a sparse value with `to_dense()`.
        y: Two labels, one a row.
        by: The ranking.
        positive_only: Rank by the signed score, and leave out latents that speak against the class.
        C: The inverse of the L1 penalty.

    Raises:
        SpecError: The ranking is unknown, or there are not two classes.
        NumericalError: A code is not finite, or no latent differs.

    Source: Gurnee et al. 2023, "Finding neurons in a haystack", section 3.

    Example:
        >>> codes = np.array([[0.0, 1.0, 0.0], [0.0, 2.0, 0.1], [3.0, 1.0, 0.0], [2.0, 0.0, 0.0]])
        >>> rank_latents(codes, [0, 0, 1, 1]).tolist(), rank_latents(codes, [0, 0, 1, 1], positive_only=True).tolist()
        ([0, 1, 2], [0])
    """
    if by not in get_args(Ranking):
        raise SpecError(f"by is {by!r}; valid: {', '.join(map(repr, get_args(Ranking)))}", "by")
    table = _codes(codes)
    up = positives(y, len(table))
    score = table[up].mean(axis=0) - table[~up].mean(axis=0) if by == "mean difference" else _l1(table, up, C)
    if not positive_only:
        score = np.abs(score)
    order = np.argsort(-score, kind="stable")
    order = order[score[order] > 0]
    if not order.size:
        raise NumericalError("no latent differs between the classes in these rows; nothing to rank")
    return np.asarray(order)


def fit_sparse(
    codes: Any,
    y: Labels,
    groups: Groups,
    *,
    site: str,
    ks: Sequence[int] = (1, 2, 5, 10),
    by: Ranking = "mean difference",
    positive_only: bool = False,
    reads: str = "",
    origin: Origin | None = None,
    seed: int = 0,
) -> dict[int, SparseProbe]:
    """Fit a logistic probe on the best k latents, for each k; ranking and fit see the training rows only.

    Args:
        codes: Activations of latents on training rows.
        y: Two labels, one a row.
        groups: The group of each row, for the choice of C.
        site: The site the dictionary reads.
        ks: How many latents.
        by: See `rank_latents`.
        positive_only: See `rank_latents`.
        reads: What a positive readout says.
        origin: Where the rows come from.
        seed: Seed of the folds.

    Returns:
        By k, in the order of `ks`. Where fewer latents differ than k, the probe has fewer.

    Raises:
        SpecError: A k is not positive, or there are too few groups or classes.
        NumericalError: A code is not finite, or no latent differs.

    Example:
        >>> rng = np.random.default_rng(0)
        >>> y = np.arange(60) % 2
        >>> codes = np.abs(rng.normal(size=(60, 20)))
        >>> codes[:, 7] += 3.0 * y
        >>> fit_sparse(codes, y, np.arange(60), site="blocks.3.resid_post", ks=(1,))[1].latents
        (7,)
    """
    if not ks or min(ks) < 1:
        raise SpecError(f"ks is {tuple(ks)}; give the numbers of latents, each at least 1", "ks")
    table = _codes(codes)
    order = rank_latents(table, y, by, positive_only=positive_only)
    given = origin or Origin(method="k-sparse")
    found: dict[int, SparseProbe] = {}
    for k in ks:
        chosen = order[:k]
        narrow = fit_probe(
            "logistic", table[:, chosen], y, site=site, groups=groups, reads=reads, origin=given, seed=seed
        )
        weight = torch.zeros(table.shape[1])
        weight[torch.tensor(chosen)] = narrow.weight
        detail = {**narrow.origin.detail, "k": k, "ranked by": by, "positive only": positive_only}
        latents = tuple(chosen.tolist())
        origin_k = replace(narrow.origin, method="k-sparse", detail=detail)
        found[k] = SparseProbe(latents=latents, probe=replace(narrow, weight=weight, origin=origin_k))
    return found


def _l1(table: np.ndarray, up: np.ndarray, C: float) -> Float[np.ndarray, " latents"]:
    from sklearn.linear_model import LogisticRegression

    alive = np.flatnonzero(table.std(axis=0) > 0)
    if not alive.size:
        return np.zeros(table.shape[1])
    mean, scale = standard(table[:, alive])
    # scikit-learn 1.8 renamed the way to ask for L1.
    renamed = LogisticRegression().get_params()["penalty"] == "deprecated"
    asked: dict[str, Any] = {"l1_ratio": 1.0} if renamed else {"penalty": "l1"}
    model = LogisticRegression(
        C=C, solver="liblinear", class_weight="balanced", max_iter=1000, random_state=0, **asked
    ).fit((table[:, alive] - mean) / scale, up)
    score = np.zeros(table.shape[1])
    score[alive] = model.coef_[0]
    return score


def _codes(codes: Any) -> Float[np.ndarray, "rows latents"]:
    dense = codes.to_dense() if hasattr(codes, "to_dense") else codes
    if isinstance(dense, torch.Tensor):
        dense = dense.detach().float().cpu().numpy()
    return matrix(dense, "codes")
