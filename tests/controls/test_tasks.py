"""Control tasks tell memory from knowledge, by the split, and random tokens have no language left."""

from __future__ import annotations

from collections import Counter

import numpy as np
import pytest
import scipy.stats
from sklearn.metrics import balanced_accuracy_score, roc_auc_score

from assay.base.errors import NumericalError, SpecError
from assay.controls import control_labels
from assay.controls.tasks import score, selectivity
from assay.controls.tokens import random_tokens

WORDS, TEMPLATES, D = 48, 4, 40


def ridge(X, y, X_test):
    """The signed readout of a standardised ridge probe."""
    mean, sd = X.mean(axis=0), X.std(axis=0) + 1e-9
    A, target = (X - mean) / sd, 2.0 * y - 1
    weight = np.linalg.solve(A.T @ A + 10 * np.eye(A.shape[1]), A.T @ (target - target.mean()))
    return (X_test - mean) / sd @ weight + target.mean()


def classify(X, y, X_test):
    return (ridge(X, y, X_test) > 0).astype(int)


def words(seed=0, signal=0.0, templates=TEMPLATES):
    """Words in templates: a vector a word, a vector a template, and perhaps a direction that the label moves."""
    rng = np.random.default_rng(seed)
    word, template = np.repeat(np.arange(WORDS), templates), np.tile(np.arange(templates), WORDS)
    y = rng.permutation(np.arange(WORDS) % 2)[word]
    X = 2 * rng.normal(size=(WORDS, D))[word] + rng.normal(size=(templates, D))[template] + rng.normal(size=(len(y), D))
    X[:, 0] += signal * (2 * y - 1)
    return X, y, word.tolist(), template.tolist()


def test_a_real_property_is_selective_on_new_words_and_hardly_on_seen_ones():
    X, y, word, template = words(signal=8.0)
    found = selectivity(classify, X, y, word, template)
    seen, unseen = found.memorisation, found.generalisation
    assert seen.task > 0.95
    assert np.mean(seen.controls) > 0.75  # the probe remembers words
    assert unseen.task > 0.9
    assert np.mean(unseen.controls) == pytest.approx(0.5, abs=0.08)
    assert unseen.selectivity > seen.selectivity + 0.2
    assert unseen.p == pytest.approx(1 / 21)
    assert unseen.interval.low > 0.2
    assert unseen.selectivity in unseen.interval
    assert unseen.control().p == pytest.approx(unseen.p)


def test_memory_alone_has_no_selectivity_on_either_split():
    X, y, word, template = words(seed=1)
    found = selectivity(classify, X, y, word, template)
    assert found.memorisation.task > 0.75
    assert abs(found.memorisation.selectivity) < 0.1
    assert abs(found.generalisation.selectivity) < 0.2
    assert 0.0 in found.generalisation.interval


@pytest.mark.parametrize("metric", ["accuracy", "auc"])
def test_p_is_uniform_where_labels_are_random_among_types(metric):
    seen, unseen = [], []
    for seed in range(60):
        X, _, word, template = words(seed, templates=3)
        y = control_labels(word, np.arange(len(word)) % 2, 5000 + seed)
        found = selectivity(
            ridge if metric == "auc" else classify, X, y, word, template, n=9, splits=2, metric=metric, seed=seed
        )
        seen.append(found.memorisation.p)
        unseen.append(found.generalisation.p)
    for p in (seen, unseen):
        # accuracies tie, which can only make p larger
        assert np.mean(np.array(p) <= 0.1) <= 0.1 + 0.08
        if metric == "auc":
            assert scipy.stats.kstest(p, np.linspace(0.1, 1, 10).tolist()).pvalue > 0.01


def test_one_positive_in_ten_of_noise_has_no_selectivity():
    """A control task of other base rates would show .39 here."""
    rng = np.random.default_rng(0)
    rows = []
    for seed in range(4):
        X, y = rng.normal(size=(1200, 20)), (np.arange(1200) % 10 == 0).astype(int)
        found = selectivity(classify, X, y, np.repeat(np.arange(600), 2).tolist(), n=5, splits=1, seed=seed)
        rows.append((found.memorisation.selectivity, found.generalisation.selectivity))
        assert found.generalisation.task > 0.85
    assert np.abs(np.mean(rows, axis=0)).max() < 0.02


def test_splits_never_share_what_they_hold_out():
    _, y, word, template = words()
    seen = []

    def watch(X_train, y_train, X_test):
        seen.append((set(X_train[:, 0].tolist()), X_test[:, 0].tolist()))
        return np.zeros(len(X_test), dtype=int)

    rows = np.arange(len(y), dtype=float)[:, None]
    found = selectivity(watch, rows, y, word, template, n=2, splits=4)
    assert len(seen) == 4 * 3
    for train, tested in seen:
        assert not train & set(tested)
        assert not {template[int(i)] for i in train} & {template[int(i)] for i in tested}
        trained = {word[int(i)] for i in train}
        assert {word[int(i)] in trained for i in tested} == {True, False}
        kinds = [word[int(i)] in trained for i in tested]
        assert kinds == sorted(kinds, reverse=True)  # seen first
    assert found.generalisation.types >= WORDS // 3
    assert found.memorisation.rows + found.generalisation.rows == np.mean([len(tested) for _, tested in seen])


def test_without_groups_rows_of_seen_types_are_held_out():
    _, y, word, _ = words()

    def watch(X_train, y_train, X_test):
        trained = {word[int(i)] for i in X_train[:, 0]}
        kinds = [word[int(i)] in trained for i in X_test[:, 0]]
        assert len(trained) == WORDS - WORDS // 3
        assert sum(kinds) == len(trained)  # one of four rows of each seen word
        assert len(kinds) - sum(kinds) == 4 * (WORDS // 3)
        return np.zeros(len(X_test), dtype=int)

    selectivity(watch, np.arange(len(y), dtype=float)[:, None], y, word, n=1, splits=2)


def test_scores_are_those_of_scikit_learn():
    rng = np.random.default_rng(0)
    y, labels, scores = rng.integers(0, 3, 50), rng.integers(0, 3, 50), rng.integers(0, 9, 50) / 3
    assert score(y, labels, "balanced accuracy") == pytest.approx(balanced_accuracy_score(y, labels))
    assert score(y, labels) == np.mean(y == labels)
    assert score(y > 1, scores, "auc") == pytest.approx(roc_auc_score(y > 1, scores))


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"y": np.zeros(6, dtype=int)}, SpecError, "1 class"),
        ({"y": np.arange(5)}, SpecError, "one entry a row"),
        ({"types": ["a"] * 6}, SpecError, "types has 1 value"),
        ({"groups": ["a"] * 6}, SpecError, "groups has 1 value"),
        ({"types": list("abcdef")}, SpecError, "types in several rows"),
        ({"X": np.full((6, 1), np.nan)}, NumericalError, "6 of 6 rows, row 0 first"),
        ({"n": 0}, SpecError, "n=0"),
        ({"fit": lambda X, y, X_test: np.full(len(X_test), 0.3)}, SpecError, "use metric='auc'"),
        ({"fit": lambda X, y, X_test: np.zeros(1)}, SpecError, "one a row"),
    ],
)
def test_bad_input_is_quoted(change, error, message):
    given = {
        "fit": lambda X, y, X_test: np.zeros(len(X_test), dtype=int),
        "X": np.ones((6, 1)),
        "y": np.array([0, 1, 0, 1, 0, 1]),
        "types": ["a", "a", "b", "b", "c", "c"],
    }
    with pytest.raises(error, match=message):
        selectivity(**(given | change))


PROMPTS = [[1, 5, 5, 5, 6, 2], [1, 7, 5], [1], []]


@pytest.mark.parametrize("draw", ["uniform", "unigram"])
def test_random_tokens_keep_lengths_and_special_tokens(draw):
    drawn = random_tokens(PROMPTS, draw, 0, vocab=20, keep=[1, 2])
    assert [len(row) for row in drawn] == [6, 3, 1, 0]
    assert [row[0] for row in drawn[:3]] == [1, 1, 1]
    assert drawn[0][5] == 2
    assert not {1, 2} & {*drawn[0][1:5], *drawn[1][1:]}
    assert drawn == random_tokens(PROMPTS, draw, 0, vocab=20, keep=[1, 2])


def test_uniform_and_unigram_tokens_have_the_frequencies_they_say():
    long = [[1, *np.random.default_rng(0).choice([3, 4, 9], size=3000, p=[0.6, 0.3, 0.1]).tolist()]]
    count = Counter(random_tokens(long, "unigram", 1, keep=[1])[0][1:])
    expected = Counter(long[0][1:])
    assert scipy.stats.chisquare([count[t] for t in (3, 4, 9)], [expected[t] for t in (3, 4, 9)]).pvalue > 0.01
    count = Counter(random_tokens(long, "uniform", 1, vocab=10, keep=[1])[0][1:])
    assert sorted(count) == [0, 2, 3, 4, 5, 6, 7, 8, 9]
    assert scipy.stats.chisquare(list(count.values())).pvalue > 0.01


def test_random_tokens_say_what_they_lack():
    with pytest.raises(SpecError, match="size of the vocabulary"):
        random_tokens(PROMPTS, "uniform", 0)
    with pytest.raises(SpecError, match="special tokens only"):
        random_tokens([[1]], "unigram", 0, keep=[1])
