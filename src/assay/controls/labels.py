"""Nulls for labels: permute them and fit again, or give every type of item a label it does not deserve."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass
from typing import Any, Literal, get_args

import numpy as np
from jaxtyping import Shaped

from assay.base.errors import NumericalError, SpecError
from assay.base.rng import numpy_stream
from assay.base.stats import Numbers, Side, group_rows, permutation_p

Scheme = Literal["auto", "rows", "within", "among"]
"""What is exchangeable under the null; see `permutation_test`."""


@dataclass(frozen=True, slots=True, kw_only=True)
class PermutationResult:
    """The outcome of a permutation test.

    Args:
        value: The statistic on the true labels.
        null: The statistic on each permutation of them.
        p: `(1 + #{null >= value}) / (n + 1)` for the side "greater".
        side: The direction of the claim.
        scheme: How the labels were permuted: "rows", "within" or "among".
    """

    value: float
    null: tuple[float, ...]
    p: float
    side: Side
    scheme: str


def label_array(y: Any, name: str = "y") -> Shaped[np.ndarray, "rows ..."]:
    """Return labels as an array, none of them missing.

    A missing label is neither class, and NaN equals nothing, not even itself: it would be counted as a class without
    rows, or as the text 'nan'.

    Args:
        y: Labels, an array, a tensor or a sequence.
        name: The argument they were given as.

    Raises:
        SpecError: A label is None or NaN, or labels of several kinds cannot be put in order.

    Example:
        >>> label_array(["b", "a"]).tolist()
        ['b', 'a']
    """
    given = y.detach().cpu().numpy() if hasattr(y, "detach") else y
    try:
        labels = np.asarray(given)
        flat = labels.ravel().tolist() if isinstance(given, np.ndarray) or labels.ndim != 1 else list(given)
        missing = [i for i, label in enumerate(flat) if label is None or (isinstance(label, float) and label != label)]
        if not missing and labels.dtype == object:
            sorted(set(flat))
    except (TypeError, ValueError) as error:
        raise SpecError(f"{name} must be labels of one kind, one a row: {error}", name) from error
    if missing:
        raise SpecError(
            f"{len(missing)} of {len(flat)} labels are missing (None or NaN), number {missing[0]} first: leave those "
            "rows out",
            name,
        )
    return labels


def permutation_test(
    statistic: Callable[[Any, np.ndarray], float],
    X: Any,
    y: Numbers,
    groups: Sequence[Hashable] | None = None,
    n: int = 999,
    seed: int = 0,
    *,
    side: Side = "greater",
    scheme: Scheme = "auto",
) -> PermutationResult:
    """Test whether a statistic of (X, y) is larger than with labels that have nothing to do with X.

    `statistic` must be the whole pipeline, so that every choice it makes on the data (layer, position, regulariser,
    threshold) is made again on each permutation; then p is uniform under the null, whatever it chooses.

    What may be exchanged depends on the groups (word types, templates, entities):

    - `"rows"`: any label with any other. The default without groups.
    - `"within"`: labels trade places inside their group; every group keeps its own labels. The default when labels vary
      inside some group.
    - `"among"`: groups trade whole label blocks. The default when each group has one label, which is then a property of
      the group: permuting rows would claim more independent labels than there are. Groups whose labels vary can trade
      too, with groups of the same size.

    Args:
        statistic: Maps (X, labels) to a number; larger speaks for the claim.
        X: Passed on as it is.
        y: Labels, one a row, `[rows]` or `[rows, ...]`.
        groups: The group of each row.
        n: Number of random permutations. p cannot be smaller than 1 / (n + 1).
        seed: Seed of the stream.
        side: The direction of the claim.
        scheme: What is exchangeable.

    Raises:
        SpecError: A label is missing, the lengths differ, the scheme needs groups, or no permutation could change the
            labels.
        NumericalError: The statistic is not finite.

    Example:
        >>> X, y = np.arange(20.0), np.arange(20) >= 10
        >>> gap = lambda X, y: X[y].mean() - X[~y].mean()
        >>> result = permutation_test(gap, X, y, n=199)
        >>> result.value, result.p
        (10.0, 0.005)
    """
    labels = label_array(y)
    if labels.ndim < 1 or not len(labels):
        raise SpecError("a permutation test needs labels, got none", "y")
    if n < 1:
        raise SpecError(f"n is {n}; a permutation test needs at least one permutation", "n")
    chosen, draw = exchange(labels, groups, scheme)
    rng = numpy_stream(seed, "permutation", chosen)
    value = _finite(statistic(X, labels), "the true labels")
    null = tuple(_finite(statistic(X, labels[draw(rng)]), f"permutation {i}") for i in range(n))
    return PermutationResult(value=value, null=null, p=permutation_p(value, null, side), side=side, scheme=chosen)


def shuffled(y: Shaped[np.ndarray, "rows ..."], seed: int) -> Shaped[np.ndarray, "rows ..."]:
    """Return the labels in random order: the same base rates, no relation to the rows.

    Example:
        >>> sorted(shuffled(np.array([0, 0, 1, 2]), seed=0).tolist())
        [0, 0, 1, 2]
    """
    labels = np.asarray(y)
    return labels[numpy_stream(seed, "shuffled").permutation(len(labels))]


def control_labels(types: Sequence[Hashable], y: Numbers, seed: int) -> Shaped[np.ndarray, " rows"]:
    """Return the labels of a control task: one random label per type of item, with the base rates of the real labels.

    A probe that learns them has memorised types. Selectivity is accuracy on the task less accuracy on the control task.
    The number of types per label is the empirical marginal of y rounded to whole types (the remainders are drawn): a
    control with other base rates would be easier or harder for reasons that have nothing to do with memory.

    Args:
        types: The type of each row, such as its word.
        y: The real labels, `[rows]`.
        seed: Seed of the stream.

    Raises:
        SpecError: The lengths differ, or there are no rows.

    Source: Hewitt and Liang 2019, "Designing and interpreting probes with control tasks", section 2.

    Example:
        >>> labels = control_labels(["cat", "dog", "cat", "cow", "emu"], [0, 1, 0, 1, 0], seed=0)
        >>> bool(labels[0] == labels[2])
        True
    """
    labels = label_array(y)
    if labels.ndim != 1 or not labels.size or len(types) != labels.size:
        raise SpecError(f"types has {len(types)} entries and y the shape {labels.shape}; both need one a row", "types")
    rng = numpy_stream(seed, "control labels")
    number = {kind: i for i, kind in enumerate(dict.fromkeys(types))}
    values, counts = np.unique(labels, return_counts=True)
    quota = counts * (len(number) / labels.size)
    whole = np.floor(quota).astype(int)
    left = len(number) - int(whole.sum())
    if left:
        rest = quota - whole
        whole[rng.choice(len(values), size=left, replace=False, p=rest / rest.sum())] += 1
    drawn = rng.permutation(np.repeat(values, whole))
    return np.asarray(drawn[[number[kind] for kind in types]])


_Draw = Callable[[np.random.Generator], np.ndarray]


def exchange(labels: np.ndarray, groups: Sequence[Hashable] | None, scheme: Scheme) -> tuple[str, _Draw]:
    """Return the scheme to use, and a function that draws one order of the rows under it; see `permutation_test`."""
    if scheme not in get_args(Scheme):
        raise SpecError(f"scheme is {scheme!r}; valid: {', '.join(map(repr, get_args(Scheme)))}", "scheme")
    if groups is None and scheme in ("within", "among"):
        raise SpecError(f"scheme {scheme!r} permutes groups; give groups, one label a row", "groups")
    if bool(np.all(labels == labels[:1])):
        raise SpecError(f"all {len(labels)} labels are the same, so no permutation changes them", "y")
    if groups is None:
        return "rows", lambda rng: rng.permutation(len(labels))
    if len(groups) != len(labels):
        raise SpecError(f"groups has {len(groups)} labels for {len(labels)} rows; it needs one a row", "groups")
    ids = np.empty(len(labels), dtype=int)
    for i, rows in enumerate(group_rows(groups).values()):
        ids[rows] = i
    first = np.unique(ids, return_index=True)[1]
    constant = bool(np.all(labels == labels[first][ids]))
    chosen = ("among" if constant else "within") if scheme == "auto" else scheme
    if chosen == "rows":
        return chosen, lambda rng: rng.permutation(len(labels))
    if chosen == "within" and constant:
        raise SpecError("each group has one label, so permuting within groups changes nothing; use 'among'", "scheme")
    if chosen == "within":
        return chosen, lambda rng: _within(ids, rng)
    if constant:  # each group takes the label of the first row of another
        return chosen, lambda rng: np.asarray(rng.permutation(first)[ids])
    return chosen, _blocks_among(ids)


def _within(ids: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    order = np.empty(ids.size, dtype=int)
    order[np.argsort(ids, kind="stable")] = np.lexsort((rng.random(ids.size), ids))
    return order


def _blocks_among(ids: np.ndarray) -> _Draw:
    by_size: dict[int, list[np.ndarray]] = {}
    for group in range(ids.max() + 1):
        rows = np.flatnonzero(ids == group)
        by_size.setdefault(rows.size, []).append(rows)
    if all(len(same) == 1 for same in by_size.values()):
        raise SpecError("no two groups have the same size, so none can trade labels; use scheme='within'", "scheme")
    tables = [np.stack(same) for same in by_size.values()]

    def draw(rng: np.random.Generator) -> np.ndarray:
        order = np.empty(ids.size, dtype=int)
        for table in tables:
            order[table] = table[rng.permutation(len(table))]
        return order

    return draw


def _finite(value: float, where: str) -> float:
    number = float(value)
    if not np.isfinite(number):
        raise NumericalError(f"the statistic is {number} on {where}; a permutation test needs finite numbers")
    return number
