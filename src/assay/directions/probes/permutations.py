"""Label permutations of a probe at many sites at once, exactly: as if each had been refitted.

The rows of a site are factored once; the true labels and all permutations of them are then the columns of one matrix
(see `closed`). What each fit chooses for itself (the penalty, the shrinkage) it chooses again for every permutation.

Labels are permuted inside the training rows and inside the test rows. Both keep their class counts, so the split that
was made for the true labels is as good for every permutation, and p is exact even though the split is stratified.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Literal, get_args

import numpy as np
from jaxtyping import Bool, Float

from assay.base.errors import SpecError
from assay.base.rng import numpy_stream
from assay.base.stats import permutation_p
from assay.controls.labels import Scheme, exchange
from assay.controls.multiplicity import familywise_p, max_null
from assay.directions.probes.closed import factor, gaps, lda, ridge
from assay.directions.probes.inputs import Groups, Labels, group_ids, matrix, positives
from assay.directions.probes.linear import check_settings, check_shrinkage, fit_probe
from assay.directions.probes.scores import many_accuracy, many_auroc
from assay.directions.probes.splits import Split
from assay.directions.vectors import Origin, Probe

ClosedKind = Literal["difference of means", "lda", "ridge"]
"""The probes that have a closed form."""

SiteMetric = Literal["auroc", "balanced accuracy"]
"""What a permutation is scored by."""

_HELD = 8_000_000  # numbers of one [rows, labels] table held at once


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class PermutedProbes:
    """Held-out scores of a probe at each site, and of the same probe on permuted labels.

    Args:
        kind: The probe.
        metric: The score.
        scheme: How labels were permuted: "rows", "within" or "among" groups.
        sites: The sites, in order.
        values: The score at each site.
        null: The score of each permutation at each site. A row is one permutation at all sites: a joint draw.
    """

    kind: str
    metric: str
    scheme: str
    sites: tuple[str, ...]
    values: Float[np.ndarray, " sites"]
    null: Float[np.ndarray, "permutations sites"]

    @property
    def p(self) -> Float[np.ndarray, " sites"]:
        """The p of each site as if it had been the only one."""
        return np.array([permutation_p(v, draws) for v, draws in zip(self.values, self.null.T, strict=True)])

    @property
    def familywise(self) -> Float[np.ndarray, " sites"]:
        """The p of each site that allows for all of them (max-T)."""
        return familywise_p(self.values, self.null)

    @property
    def best_null(self) -> Float[np.ndarray, " permutations"]:
        """The best score over sites of each permutation: what the best site looks like when nothing is there."""
        return max_null(self.null)

    @property
    def best(self) -> str:
        """The site with the highest score."""
        return self.sites[int(np.argmax(self.values))]

    @property
    def best_p(self) -> float:
        """The p of the best site, its selection repeated in the null."""
        return permutation_p(float(self.values.max()), self.best_null)


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class BestSite:
    """The best of many sites, held against the best of as many sites with permuted labels.

    Args:
        probe: The probe at that site, fitted on the training rows.
        value: Its held-out score.
        p: Its p, with the selection repeated in the null.
        p_alone: Its p as if no other site had been looked at: too small.
        expected: The mean score of the best site under permuted labels: what selection alone gives.
        sites: All sites, and their joint null.
    """

    probe: Probe
    value: float
    p: float
    p_alone: float
    expected: float
    sites: PermutedProbes


def permuted_probes(
    kind: ClosedKind,
    sites: Mapping[str, Any],
    y: Labels,
    groups: Groups | None = None,
    *,
    split: Split,
    n: int = 999,
    seed: int = 0,
    scheme: Scheme = "auto",
    metric: SiteMetric = "auroc",
    standardise: bool = True,
    shrinkage: float | None = None,
    penalty: float | None = None,
    progress: Callable[[int, int], object] | None = None,
) -> PermutedProbes:
    """Fit a probe at every site on the true labels and on n permutations of them, and score all on held-out rows.

    Every number equals that of a refit: standardisation, Ledoit-Wolf shrinkage and leave-one-out included. One
    eigendecomposition a site; a permutation costs products with it.

    Args:
        kind: The probe.
        sites: Rows by site; a mapping that reads them when asked is asked once for each.
        y: Two labels, one a row.
        groups: The group of each row; see `assay.controls.permutation_test` for what they do to a permutation.
        split: Rows to fit on and to test on, with no group in both.
        n: Number of permutations.
        seed: Seed of the stream.
        scheme: What is exchangeable: "rows", "within" or "among" groups; "auto" sees which by the labels.
        metric: The held-out score.
        standardise: See `fit_probe`.
        shrinkage: See `fit_probe`.
        penalty: See `fit_probe`.
        progress: Told how many sites are done, of how many.

    Raises:
        SpecError: There are no sites, not two classes on both sides, a group on both sides, or the scheme cannot move
            a label.
        NumericalError: A row is not finite.

    Example:
        >>> from assay.directions.probes.splits import grouped_split
        >>> rng = np.random.default_rng(0)
        >>> y, groups = np.arange(60) % 2, np.arange(60)
        >>> noise = rng.normal(size=(60, 4))
        >>> sites = {"blocks.0.resid_post": noise, "blocks.1.resid_post": noise + 3.0 * y[:, None]}
        >>> found = permuted_probes("lda", sites, y, groups, split=grouped_split(groups, y), n=99)
        >>> found.best, found.best_p
        ('blocks.1.resid_post', 0.01)
    """
    if kind not in get_args(ClosedKind):
        raise SpecError(
            f"kind is {kind!r}; closed forms: {', '.join(map(repr, get_args(ClosedKind)))}. For another probe give "
            "its whole pipeline to assay.controls.permutation_test",
            "kind",
        )
    check_settings(kind, shrinkage=shrinkage, penalty=penalty)
    if metric not in get_args(SiteMetric):
        raise SpecError(f"metric is {metric!r}; valid: {', '.join(map(repr, get_args(SiteMetric)))}", "metric")
    if not sites:
        raise SpecError("there are no sites to probe", "sites")
    chosen, labels = permuted_labels(y, groups, split, n, seed, scheme)
    scores = np.empty((n + 1, len(sites)))
    for done, name in enumerate(sites, 1):
        X = matrix(sites[name], name)
        if len(X) != len(labels):
            raise SpecError(f"{name} has {len(X)} rows for {len(labels)} labels", "sites")
        train, test = X[split.train], X[split.test]
        if kind == "lda":
            check_shrinkage(len(train), train.shape[1], shrinkage)
        size = max(1, _HELD // len(train))
        readout = _reader(kind, train, test, standardise, shrinkage, penalty)
        for start in range(0, n + 1, size):
            some = labels[:, start : start + size]
            score = many_auroc if metric == "auroc" else many_accuracy
            scores[start : start + size, done - 1] = score(readout(some[split.train]), some[split.test])
        if progress is not None:
            progress(done, len(sites))
    return PermutedProbes(
        kind=kind, metric=metric, scheme=chosen, sites=tuple(sites), values=scores[0], null=scores[1:]
    )


def best_site(
    kind: ClosedKind,
    sites: Mapping[str, Any],
    y: Labels,
    groups: Groups | None = None,
    *,
    split: Split,
    n: int = 999,
    seed: int = 0,
    origin: Origin | None = None,
    positions: Any = "last",
    **options: Any,
) -> BestSite:
    """Take the site whose probe scores best on held-out rows, with a p that repeats the choice in the null.

    The best of 24 sites of pure noise, with 64 rows to test on, has a mean AUROC of .62. So the best score is held
    against the best score over the same sites for each permutation of the labels.

    Args:
        kind: The probe.
        sites: Rows by site.
        y: Two labels, one a row.
        groups: The group of each row.
        split: Rows to fit on and to test on.
        n: Number of permutations.
        seed: Seed of the stream.
        origin: Where the rows come from, for the probe.
        positions: Which token of a prompt the rows are, for the probe.
        options: Others of `permuted_probes`.

    Raises:
        SpecError: See `permuted_probes`.
        NumericalError: A row is not finite.

    Example:
        >>> from assay.directions.probes.splits import grouped_split
        >>> rng = np.random.default_rng(0)
        >>> y = np.arange(80) % 2
        >>> sites = {f"blocks.{i}.resid_post": rng.normal(size=(80, 4)) for i in range(8)}
        >>> best = best_site("lda", sites, y, split=grouped_split(np.arange(80), y), n=99)
        >>> best.p > 0.05, best.expected > 0.5
        (True, True)
    """
    found = permuted_probes(kind, sites, y, groups, split=split, n=n, seed=seed, **options)
    at = int(np.argmax(found.values))
    settings = {name: options[name] for name in ("standardise", "shrinkage", "penalty") if name in options}
    given = origin or Origin(method=kind)
    whole = Origin(
        method=given.method,
        subject=given.subject,
        data=given.data,
        train=tuple(split.train.tolist()),
        test=tuple(split.test.tolist()),
        detail={**given.detail, "best of": len(found.sites)},
    )
    train = np.asarray(sites[found.best], dtype=np.float64)[split.train]
    labels = np.asarray(y)[split.train]
    probe = fit_probe(kind, train, labels, site=found.best, positions=positions, origin=whole, seed=seed, **settings)
    return BestSite(
        probe=probe,
        value=float(found.values[at]),
        p=found.best_p,
        p_alone=float(found.p[at]),
        expected=float(found.best_null.mean()),
        sites=found,
    )


def permuted_labels(
    y: Labels, groups: Groups | None, split: Split, n: int, seed: int, scheme: Scheme = "auto"
) -> tuple[str, Bool[np.ndarray, "rows labels"]]:
    """The scheme, and the true labels (column 0) with n permutations of them, inside train and inside test.

    Raises:
        SpecError: A side of the split lacks a class, the sides share a group, or the scheme cannot move a label.
    """
    if n < 1:
        raise SpecError(f"n is {n}; a permutation test needs at least one permutation", "n")
    labels = positives(y)
    ids = None if groups is None else group_ids(groups, labels.size)
    sides = (split.train, split.test)
    _check_split(labels, ids, sides)
    chosen = exchange(labels, None if ids is None else ids.tolist(), scheme)[0]
    table = np.repeat(labels[:, None], n + 1, axis=1)
    stuck: list[SpecError] = []
    for name, rows in zip(("train", "test"), sides, strict=True):
        own = None if ids is None else ids[rows].tolist()
        try:
            draw = exchange(labels[rows], own, chosen)[1]  # type: ignore[arg-type]
        except SpecError as error:  # no label can move on this side; moving those of the other alone is as exact
            stuck.append(error)
            continue
        rng = numpy_stream(seed, "probe permutation", chosen, name)
        for column in range(1, n + 1):
            table[rows, column] = labels[rows[draw(rng)]]
    if len(stuck) == len(sides):
        raise stuck[0]
    return chosen, table


def _check_split(labels: np.ndarray, ids: np.ndarray | None, sides: tuple[np.ndarray, np.ndarray]) -> None:
    train, test = sides
    shared = np.intersect1d(train, test) if ids is None else np.intersect1d(ids[train], ids[test])
    if shared.size:
        what = "rows" if ids is None else "groups"
        raise SpecError(f"{shared.size} {what} are in both train and test; use grouped_split", "split")
    for name, rows in zip(("train", "test"), sides, strict=True):
        if len(np.unique(labels[rows])) < 2:
            raise SpecError(f"the {name} rows have one class; use grouped_split, or bring more groups", "split")


def _reader(
    kind: ClosedKind,
    train: np.ndarray,
    test: np.ndarray,
    standardise: bool,
    shrinkage: float | None,
    penalty: float | None,
) -> Callable[[np.ndarray], Float[np.ndarray, "rows labels"]]:
    """Maps label vectors of the training rows to readouts of the test rows."""
    if kind == "difference of means":
        mean = train.mean(axis=0)
        left, right = train - mean, test - mean

        def difference(labels: np.ndarray) -> np.ndarray:
            theta = gaps(left, labels)
            up = labels.mean(axis=0)
            return np.asarray(right @ theta - (0.5 - up) * np.square(theta).sum(axis=0))

        return difference
    rows = factor(train, standardise=standardise)
    seen = rows.rotate(test)

    def readout(labels: np.ndarray) -> np.ndarray:
        found = ridge(rows, labels, penalty) if kind == "ridge" else lda(rows, labels, shrinkage)
        return np.asarray(seen @ found.c + found.bias)

    return readout
