"""What a probe must beat: the words themselves, the token embedding, the length, the neighbours.

A probe of a deep layer shows that the layer holds something only if the same labels cannot be read off the text as
well. An `Arm` is anything that fits on some rows and reads all; the best baseline is chosen by its AUROC on validation
rows, and compared with the probe on test rows that chose nothing.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from jaxtyping import Float, Int

from assay.base.errors import NothingFound, NumericalError, SpecError
from assay.base.stats import Interval, bootstrap_interval
from assay.directions.probes.inputs import Groups, Labels, group_ids, matrix, positives
from assay.directions.probes.linear import LinearKind, fit_linear
from assay.directions.probes.logistic import logistic
from assay.directions.probes.scores import auroc, on_rows
from assay.directions.probes.splits import grouped_parts

Arm = Callable[[Int[np.ndarray, " train"], np.ndarray, np.ndarray], Float[np.ndarray, " rows"]]
"""Maps (training row numbers, labels of all rows, groups of all rows) to readouts of all rows. It looks at the labels
of the training rows only."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Beats:
    """A probe against the best of its baselines, on test rows.

    Args:
        probe: The probe's AUROC.
        baseline: The best baseline's.
        best: Which it is, by AUROC on validation rows.
        gain: `probe - baseline`.
        interval: Of the gain: paired bootstrap, groups resampled whole.
        validation: The AUROC of every arm on validation rows; the probe is "probe".
        test: The same on test rows.
    """

    probe: float
    baseline: float
    best: str
    gain: float
    interval: Interval
    validation: Mapping[str, float]
    test: Mapping[str, float]

    @property
    def beats(self) -> bool:
        """Whether the gain is above zero with its interval."""
        return self.interval.low > 0


def linear_arm(X: Any, kind: LinearKind = "logistic") -> Arm:
    """An arm that fits a linear probe on rows of numbers: a site, the token embedding, counts.

    Example:
        >>> X = np.array([[0.0], [0.1], [1.0], [0.9], [0.2], [0.8]])
        >>> arm = linear_arm(X, "lda")
        >>> arm(np.arange(4), np.array([0, 0, 1, 1, 0, 1]), np.arange(6)).round().astype(int).shape
        (6,)
    """
    data = matrix(X)

    def fit(train: np.ndarray, y: np.ndarray, groups: np.ndarray) -> np.ndarray:
        own = groups[train] if kind == "logistic" else None
        return fit_linear(kind, data[train], y[train], groups=own)(data)

    return fit


def bag_of_words(texts: Sequence[str], *, ngrams: int = 2, C: float = 10.0) -> Arm:
    """An arm that reads the text itself: TF-IDF of words and word pairs, fitted on training rows, then logistic.

    Args:
        texts: One a row.
        ngrams: The longest run of words that counts as one term.
        C: The inverse of the logistic penalty.

    Raises:
        SpecError: There are no texts.
    """
    if not texts:
        raise SpecError("there are no texts", "texts")
    raw = list(texts)

    def fit(train: np.ndarray, y: np.ndarray, groups: np.ndarray) -> np.ndarray:
        from sklearn.feature_extraction.text import TfidfVectorizer
        from sklearn.linear_model import LogisticRegression

        if len(raw) != len(y):
            raise SpecError(f"there are {len(raw)} texts for {len(y)} rows", "texts")
        if not any(raw[i].strip() for i in train):
            raise NothingFound("the training texts hold no word")
        # Single letters and signs are words too: "I", "a", "?".
        terms = TfidfVectorizer(ngram_range=(1, ngrams), sublinear_tf=True, token_pattern=r"\w+|[^\w\s]")
        seen = terms.fit_transform([raw[i] for i in train])
        model = LogisticRegression(C=C, max_iter=1000).fit(seen, positives(y[train]))
        return np.asarray(model.decision_function(terms.transform(raw)), dtype=np.float64)

    return fit


def counts(
    texts: Sequence[str], *, tokens: Sequence[int] | None = None, positions: Sequence[int] | None = None
) -> Float[np.ndarray, "rows counts"]:
    """The length of each text in characters and words, and its tokens and read position where given, as logarithms.

    Raises:
        SpecError: The lengths differ.

    Example:
        >>> np.expm1(counts(["a fine day"], tokens=[4])).round().tolist()
        [[10.0, 3.0, 4.0]]
    """
    columns: list[Sequence[int]] = [[len(text) for text in texts], [len(text.split()) for text in texts]]
    for name, given in (("tokens", tokens), ("positions", positions)):
        if given is not None:
            if len(given) != len(texts):
                raise SpecError(f"{name} has {len(given)} entries for {len(texts)} texts", name)
            columns.append(given)
    return np.asarray(np.log1p(np.array(columns, dtype=np.float64).T))


def nearest(X: Any, k: int = 10) -> Arm:
    """An arm that asks the k nearest training rows, columns standardised, nearer ones counting more.

    Raises:
        SpecError: k is not positive.
    """
    data = matrix(X)
    if k < 1:
        raise SpecError(f"k is {k}; ask at least one neighbour", "k")

    def fit(train: np.ndarray, y: np.ndarray, groups: np.ndarray) -> np.ndarray:
        from sklearn.neighbors import KNeighborsClassifier
        from sklearn.preprocessing import StandardScaler

        scaler = StandardScaler().fit(data[train])
        model = KNeighborsClassifier(min(k, len(train)), weights="distance")
        model.fit(scaler.transform(data[train]), positives(y[train]))
        return np.asarray(model.predict_proba(scaler.transform(data))[:, 1])

    return fit


def pca_logistic(X: Any, components: int = 20) -> Arm:
    """An arm that fits logistic regression on the first principal components of the training rows.

    Raises:
        SpecError: The number of components is not positive.
    """
    data = matrix(X)
    if components < 1:
        raise SpecError(f"components is {components}; there must be at least one", "components")

    def fit(train: np.ndarray, y: np.ndarray, groups: np.ndarray) -> np.ndarray:
        from sklearn.decomposition import PCA

        up = positives(y[train])
        if not np.ptp(data[train], axis=0).any():
            raise NothingFound("all training rows are the same")
        most = min(components, len(train) - 1, data.shape[1])
        model = PCA(most, svd_solver="full").fit(data[train])
        weight, bias = logistic(model.transform(data[train]), up, 1.0)
        return np.asarray(model.transform(data) @ weight + bias)

    return fit


def text_baselines(
    texts: Sequence[str],
    *,
    embedding: Any = None,
    tokens: Sequence[int] | None = None,
    positions: Sequence[int] | None = None,
) -> dict[str, Arm]:
    """The baselines that need no layer of the model: words, length, and the token embedding where given.

    Args:
        texts: One a row.
        embedding: What the site "embed" holds, `[rows, d]`: its mean over tokens, or the token that the probe reads.
        tokens: The number of tokens of each text.
        positions: The position that the probe reads.
    """
    arms: dict[str, Arm] = {
        "bag of words": bag_of_words(texts),
        "length": linear_arm(counts(texts, tokens=tokens, positions=positions), "lda"),
    }
    if embedding is not None:
        arms["token embedding"] = linear_arm(embedding)
        arms["nearest token embeddings"] = nearest(embedding)
    return arms


def site_baselines(X: Any, *, k: int = 10, components: int = 20) -> dict[str, Arm]:
    """The baselines on the probe's own rows that look for no direction: the nearest rows, and the largest components.

    Args:
        X: What the site holds, `[rows, d]`.
        k: How many neighbours.
        components: How many principal components.
    """
    return {"nearest neighbours": nearest(X, k), "PCA + logistic": pca_logistic(X, components)}


def beats(
    probe: Arm,
    baselines: Mapping[str, Arm],
    y: Labels,
    groups: Groups,
    *,
    shares: tuple[float, float, float] = (0.5, 0.2, 0.3),
    level: float = 0.95,
    n_boot: int = 1000,
    seed: int = 0,
) -> Beats:
    """Compare a probe with the best of its baselines: chosen on validation rows, compared on test rows.

    The probe is one arm and may choose for itself on the training rows only (its C, its layer); give it as it is.

    Args:
        probe: The probe, as an arm.
        baselines: The others by name.
        y: Two labels, one a row.
        groups: The group of each row; no group is in two parts.
        shares: Of the rows for training, validation and test.
        level: Coverage of the interval.
        n_boot: Number of resamples.
        seed: Seed of the parts and of the bootstrap.

    Raises:
        SpecError: There is no baseline, one is named "probe", or the groups are too few for three parts.
        NumericalError: An arm's readout is not finite.

    Example:
        >>> rng = np.random.default_rng(0)
        >>> y = np.arange(200) % 2
        >>> clear, faint = (rng.normal(size=(200, 2)) + shift * y[:, None] for shift in (3.0, 0.5))
        >>> found = beats(linear_arm(clear, "lda"), {"faint": linear_arm(faint, "lda")}, y, np.arange(200))
        >>> found.best, found.beats
        ('faint', True)
    """
    if not baselines or "probe" in baselines:
        raise SpecError(f"baselines are {sorted(baselines)}; give at least one, and none named 'probe'", "baselines")
    labels = np.asarray(y)
    up = positives(labels)
    ids = group_ids(groups, labels.size)
    train, validation, test = grouped_parts(groups, labels, shares, seed=seed)
    arms = {"probe": probe, **baselines}
    readouts = {name: _readout(name, arm, train, labels, ids) for name, arm in arms.items()}
    chosen = {name: auroc(values[validation], up[validation]) for name, values in readouts.items()}
    tested = {name: auroc(values[test], up[test]) for name, values in readouts.items()}
    best = max(baselines, key=lambda name: chosen[name])
    table = np.stack([readouts["probe"][test], readouts[best][test], up[test]], axis=1)
    area = on_rows("auroc")

    def gain(rows: np.ndarray) -> float:
        return area(rows[:, [0, 2]]) - area(rows[:, [1, 2]])

    interval = bootstrap_interval(table, gain, level, n_boot, seed, ids[test].tolist())
    return Beats(
        probe=tested["probe"],
        baseline=tested[best],
        best=best,
        gain=gain(table),
        interval=interval,
        validation=chosen,
        test=tested,
    )


def _readout(name: str, arm: Arm, train: np.ndarray, y: np.ndarray, ids: np.ndarray) -> Float[np.ndarray, " rows"]:
    try:
        values = np.asarray(arm(train, y, ids), dtype=np.float64)
    except NothingFound:  # what says nothing reads the same of every row
        values = np.zeros(y.size)
    if values.shape != y.shape or not np.isfinite(values).all():
        raise NumericalError(f"the arm {name!r} gave readouts of shape {values.shape} for {y.size} rows, or NaN")
    return values
