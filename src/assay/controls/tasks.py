"""Control tasks: does a probe read what the labels say, or does it remember which item has which label?

A control task gives each *type* of item (each word) a random label and keeps the base rates. Whatever a probe scores on
it is memory. Selectivity is the score on the task less the score on control tasks, and *the split decides what it
means*, so it is given twice, from one fit:

- memorisation: types that were seen in training, in groups (templates, sentences) that were not. A probe that has
  memorised the words scores high on the control task too, and its selectivity is near 0.
- generalisation: types that were not seen. Nothing can be known of the control task, and selectivity is what the probe
  learned of the property itself.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Hashable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Literal, get_args

import numpy as np
from jaxtyping import Int

from assay.base.errors import NumericalError, SpecError
from assay.base.findings import Control
from assay.base.rng import numpy_stream
from assay.base.stats import Interval, Numbers, bootstrap_interval, permutation_p
from assay.controls.labels import control_labels, label_array
from assay.controls.verdicts import compare

Fit = Callable[[Any, np.ndarray, Any], Any]
"""`fit(X_train, y_train, X_test)`: labels of the test rows, or scores of them for the metric "auc"."""

Metric = Literal["accuracy", "balanced accuracy", "auc"]
"""How predictions are scored."""

_TRIES = 200


@dataclass(frozen=True, slots=True, kw_only=True)
class TaskScore:
    """The score on a task beside the scores on its control tasks, on one kind of split.

    Args:
        split: "memorisation" or "generalisation".
        metric: The metric.
        task: The score on the task, averaged over splits.
        controls: The same on each control task.
        p: The place of the task among its control tasks, `(1 + #{control >= task}) / (draws + 1)`.
        interval: Of the selectivity, by a bootstrap over types; None unless the metric is accuracy.
        types: How many types were tested on, over all splits.
        rows: How many rows a split tests on, on average.
    """

    split: str
    metric: Metric
    task: float
    controls: tuple[float, ...]
    p: float
    interval: Interval | None
    types: int
    rows: float

    @property
    def selectivity(self) -> float:
        """The score on the task less the mean score on the control tasks."""
        return self.task - float(np.mean(self.controls))

    def control(self) -> Control:
        """The control tasks as a control of the task's score."""
        said = f"each type has a random label, at the task's base rates; {self.split} split"
        return compare("control task", said, self.task, self.controls)


@dataclass(frozen=True, slots=True, kw_only=True)
class Selectivity:
    """Selectivity on both kinds of split.

    Args:
        memorisation: On types that were seen in training.
        generalisation: On types that were not.
        splits: How many splits were averaged.
    """

    memorisation: TaskScore
    generalisation: TaskScore
    splits: int


def selectivity(
    fit: Fit,
    X: Any,
    y: Numbers,
    types: Sequence[Hashable],
    groups: Sequence[Hashable] | None = None,
    *,
    n: int = 20,
    splits: int = 3,
    test: float = 1 / 3,
    metric: Metric = "accuracy",
    seed: int = 0,
) -> Selectivity:
    """Return how much better a probe does on a task than on control tasks, for seen and for unseen types apart.

    In each split a share of the types and a share of the groups is held out. The probe is fitted on the other types in
    the other groups, and tested in the held-out groups on the seen types (memorisation) and on the unseen types
    (generalisation). Each of the n control tasks goes through the same splits. `fit` must be the whole pipeline,
    standardisation and choice of regulariser included.

    Where y has one label a type, p is exact: under the null the task is one more random labelling of the types.

    Args:
        fit: `fit(X_train, y_train, X_test)` gives labels of the test rows, or scores for the metric "auc".
        X: Indexable by rows, `[rows, ...]`.
        y: Labels, `[rows]`.
        types: The type of each row, such as its word.
        groups: What else a row belongs to, such as its template. Without groups, rows of a seen type are held out.
        n: Number of control tasks; p cannot be smaller than 1 / (n + 1).
        splits: Number of splits, `splits * (n + 1)` fits in all.
        test: The share of types, and of groups, that is held out.
        metric: "accuracy", "balanced accuracy", or "auc" (two classes).
        seed: Seed of the streams.

    Raises:
        SpecError: The lengths differ, a label is missing, there is one class only, or there are too few types or groups
            to hold any out.
        NumericalError: X holds numbers that are not finite, or a prediction is not.

    Source: Hewitt and Liang 2019, "Designing and interpreting probes with control tasks", sections 2 and 3; splits by
    type: ours.

    Example:
        >>> rng = np.random.default_rng(0)
        >>> words = np.repeat(np.arange(60), 4)  # 60 words in 4 templates
        >>> y = words % 2
        >>> X = rng.normal(size=(60, 40))[words] + 0.1 * rng.normal(size=(240, 40))
        >>> X[:, 0] += 4 * (2 * y - 1)
        >>> def fit(X, y, X_test):
        ...     weight = np.linalg.lstsq(X, 2.0 * y - 1, rcond=None)[0]
        ...     return (X_test @ weight > 0).astype(int)
        >>> found = selectivity(fit, X, y, words.tolist(), (np.arange(240) % 4).tolist())
        >>> found.memorisation.selectivity < 0.2 < found.generalisation.selectivity
        True
    """
    X = np.asarray(X) if isinstance(X, list | tuple) else X
    labels = _checked(X, y, types, groups, n, splits, test, metric)
    drawn = list(_splits(labels, types, groups, splits, test, metric, seed))
    tasks = [labels, *_controls(labels, types, drawn, n, metric, seed)]
    scores = np.empty((2, len(tasks), splits))
    hits: list[list[np.ndarray]] = [[], []]
    for number, split in enumerate(drawn):
        tested = np.concatenate(split.tested)
        right = np.empty((len(tasks), len(tested)))
        for at, task in enumerate(tasks):
            guess = np.asarray(fit(X[split.train], task[split.train], X[tested]))
            cut = len(split.tested[0])
            for arm, part in enumerate((slice(None, cut), slice(cut, None))):
                scores[arm, at, number] = score(task[tested[part]], _predictions(guess, len(tested))[part], metric)
            if metric == "accuracy":
                right[at] = guess == task[tested]
        gain = right[0] - right[1:].mean(axis=0)
        hits[0].append(gain[: len(split.tested[0])])
        hits[1].append(gain[len(split.tested[0]) :])
    arms = []
    for arm, name in enumerate(("memorisation", "generalisation")):
        rows = np.concatenate([split.tested[arm] for split in drawn])
        kinds = [types[row] for row in rows]
        interval = None
        if metric == "accuracy":
            interval = bootstrap_interval(np.concatenate(hits[arm]), seed=seed, groups=kinds)
        means = scores[arm].mean(axis=1)
        arms.append(
            TaskScore(
                split=name,
                metric=metric,
                task=float(means[0]),
                controls=tuple(means[1:].tolist()),
                p=permutation_p(float(means[0]), means[1:]),
                interval=interval,
                types=len(set(kinds)),
                rows=len(rows) / splits,
            )
        )
    return Selectivity(memorisation=arms[0], generalisation=arms[1], splits=splits)


def score(y: Numbers, predicted: Numbers, metric: Metric = "accuracy") -> float:
    """Return how well predictions agree with labels.

    Args:
        y: Labels, `[rows]`.
        predicted: Labels; for "auc" scores, larger for the second of two classes.
        metric: "accuracy", "balanced accuracy" (the mean of the classes' recalls), or "auc" (the share of pairs of the
            two classes that are in the right order, ties counting half).

    Raises:
        SpecError: The metric is unknown, the lengths differ, a label is missing, predictions are scores where labels
            are needed, or the AUC is asked of other than two classes.
        NumericalError: A score is not finite.

    Example:
        >>> score([0, 0, 1, 1], [0, 1, 1, 1]), score([0, 0, 1, 1], [0.1, 0.9, 0.4, 0.8], "auc")
        (0.75, 0.5)
    """
    if metric not in get_args(Metric):
        raise SpecError(f"metric is {metric!r}; valid: {', '.join(map(repr, get_args(Metric)))}", "metric")
    truth, guess = label_array(y), np.asarray(predicted)
    if truth.ndim != 1 or not truth.size or truth.shape != guess.shape:
        raise SpecError(f"y has the shape {truth.shape}, predicted {guess.shape}; both need one entry a row", "y")
    classes = np.unique(truth)
    if metric == "auc":
        if classes.size != 2:
            raise SpecError(f"the AUC compares two classes, and there are {classes.size}", "metric")
        if not np.issubdtype(guess.dtype, np.number):
            raise SpecError("the AUC needs scores, and the predictions are labels; use metric='accuracy'", "metric")
        if not np.isfinite(guess.astype(np.float64)).all():
            raise NumericalError("a predicted score is not finite")
        from scipy.stats import rankdata

        positive = truth == classes[1]
        ranks, count = rankdata(guess), int(positive.sum())
        above = float(ranks[positive].sum()) - count * (count + 1) / 2
        return above / (count * (truth.size - count))
    if np.issubdtype(guess.dtype, np.floating) and np.any(guess != np.rint(guess)):
        raise SpecError(f"{metric} needs labels, and the predictions are scores; use metric='auc'", "metric")
    right = guess == truth
    if metric == "balanced accuracy":
        return float(np.mean([right[truth == kind].mean() for kind in classes]))
    return float(right.mean())


@dataclass(frozen=True, slots=True, kw_only=True)
class _Split:
    """Rows to fit on, and the rows to test on: of seen types, and of unseen ones."""

    train: Int[np.ndarray, " train"]
    tested: tuple[Int[np.ndarray, " seen"], Int[np.ndarray, " unseen"]]

    def serves(self, labels: np.ndarray, metric: Metric) -> bool:
        """Whether labels can be learned, and scored, on it."""
        least = 2 if metric == "auc" else 1
        enough = all(len(rows) and np.unique(labels[rows]).size >= least for rows in self.tested)
        return enough and np.unique(labels[self.train]).size > 1


def _splits(
    labels: np.ndarray,
    types: Sequence[Hashable],
    groups: Sequence[Hashable] | None,
    splits: int,
    test: float,
    metric: Metric,
    seed: int,
) -> Iterator[_Split]:
    kinds = _numbers(types)
    for number in range(splits):
        rng = numpy_stream(seed, "control tasks", "split", number)
        for _ in range(_TRIES):
            unseen = _held_out(kinds, test, rng)
            if groups is None:
                held = _rows_held_out(kinds, test, rng)
                split = _Split(
                    train=np.flatnonzero(~unseen & ~held), tested=(np.flatnonzero(~unseen & held), unseen.nonzero()[0])
                )
            else:
                held = _held_out(_numbers(groups), test, rng)
                taught = np.isin(kinds, np.unique(kinds[~unseen & ~held]))  # a type may be in held-out groups alone
                tested = (np.flatnonzero(~unseen & held & taught), np.flatnonzero(unseen & held))
                split = _Split(train=np.flatnonzero(~unseen & ~held), tested=tested)
            if split.serves(labels, metric):
                break
        else:
            what = "types" if groups is None else "types and groups"
            raise SpecError(
                f"no split of these {what} has two classes to fit on and rows of seen and unseen types to test on, in "
                f"{_TRIES} tries: give more types, types in several {'rows' if groups is None else 'groups'}, or "
                "another share with test=",
                "types",
            )
        yield split


def _controls(
    labels: np.ndarray, types: Sequence[Hashable], splits: Sequence[_Split], n: int, metric: Metric, seed: int
) -> Iterator[np.ndarray]:
    """Control labels that every split can serve; those that leave one class only are drawn again."""
    rng = numpy_stream(seed, "control tasks", "labels")
    for _ in range(n):
        for _ in range(_TRIES):
            drawn = control_labels(types, labels, int(rng.integers(1 << 62)))
            if all(split.serves(drawn, metric) for split in splits):
                break
        else:
            raise SpecError(
                f"in {_TRIES} control tasks, a split had one class only: the rarest label has too few types", "y"
            )
        yield drawn


def _held_out(ids: np.ndarray, share: float, rng: np.random.Generator) -> np.ndarray:
    """Which rows belong to a random share of the ids, at least one of them and not all."""
    count = int(ids.max()) + 1
    size = min(max(1, round(share * count)), count - 1)
    return np.isin(ids, rng.choice(count, size=size, replace=False))


def _rows_held_out(ids: np.ndarray, share: float, rng: np.random.Generator) -> np.ndarray:
    """A random share of the rows of each id that has two rows or more."""
    order = np.lexsort((rng.random(ids.size), ids))
    first = np.searchsorted(ids[order], ids[order])
    place = np.empty(ids.size, dtype=int)
    place[order] = np.arange(ids.size) - first
    count = np.bincount(ids)[ids]
    return np.asarray(place < np.minimum(np.maximum(1, np.rint(share * count)), count - 1))


def _numbers(names: Sequence[Hashable]) -> Int[np.ndarray, " rows"]:
    number = {name: i for i, name in enumerate(dict.fromkeys(names))}
    return np.array([number[name] for name in names])


def _predictions(guess: np.ndarray, rows: int) -> np.ndarray:
    if guess.shape != (rows,):
        raise SpecError(f"fit returned the shape {guess.shape} for {rows} test rows; it needs one a row", "fit")
    return guess


def _checked(
    X: Any,
    y: Numbers,
    types: Sequence[Hashable],
    groups: Sequence[Hashable] | None,
    n: int,
    splits: int,
    test: float,
    metric: str,
) -> np.ndarray:
    labels = label_array(y)
    lengths = {"X": len(X), "y": len(labels), "types": len(types), "groups": len(labels if groups is None else groups)}
    if labels.ndim != 1 or len(set(lengths.values())) > 1:
        raise SpecError(f"X, y, types and groups need one entry a row, got {lengths}", "y")
    if np.unique(labels).size < 2:
        raise SpecError(f"y has {np.unique(labels).size} class; a task needs two classes or more", "y")
    if metric not in get_args(Metric):
        raise SpecError(f"metric is {metric!r}; valid: {', '.join(map(repr, get_args(Metric)))}", "metric")
    if n < 1 or splits < 1 or not 0 < test < 1:
        raise SpecError(f"n={n}, splits={splits}, test={test}: at least one of each, and a share between 0 and 1", "n")
    for name, given in (("types", types), ("groups", groups)):
        if given is not None and len(set(given)) < 2:
            raise SpecError(f"{name} has {len(set(given))} value; at least two are needed to hold one out", name)
    values = X.detach().cpu().double().numpy() if hasattr(X, "detach") else X if isinstance(X, np.ndarray) else None
    if values is not None and np.issubdtype(values.dtype, np.floating) and not np.isfinite(values).all():
        flat = values.reshape(len(values), math.prod(values.shape[1:]))
        bad = np.flatnonzero(~np.isfinite(flat).all(axis=1))
        raise NumericalError(f"X is not finite in {bad.size} of {len(values)} rows, row {bad[0]} first")
    return labels
