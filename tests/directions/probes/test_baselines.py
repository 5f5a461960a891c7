"""Baselines read the text when the text says it, and a probe beats them only by what they lack."""

from __future__ import annotations

import numpy as np
import pytest

from assay.base.errors import NumericalError, SpecError
from assay.directions.probes.baselines import (
    bag_of_words,
    beats,
    counts,
    linear_arm,
    nearest,
    pca_logistic,
    site_baselines,
    text_baselines,
)
from assay.directions.probes.scores import auroc

N = 240
GROUPS = np.arange(N) // 2


def material(seed=0):
    rng = np.random.default_rng(seed)
    y = rng.permutation(np.arange(N // 2) % 2)[GROUPS]
    fillers = "the a of river stone cloud paper lamp chair".split()
    texts = [" ".join(rng.choice(fillers, 6)) for _ in range(N)]
    return rng, y, texts


def heldout(arm, y):
    train, test = np.arange(160), np.arange(160, N)
    return auroc(arm(train, y, GROUPS)[test], y[test])


def test_a_bag_of_words_reads_words_and_word_order_only_as_far_as_pairs():
    _, y, texts = material()
    said = [text + (" good" if label else " bad") for text, label in zip(texts, y, strict=True)]
    assert heldout(bag_of_words(said), y) == 1.0
    assert heldout(bag_of_words(texts), y) < 0.65
    ordered = [text + (" so not" if label else " not so") for text, label in zip(texts, y, strict=True)]
    assert heldout(bag_of_words(ordered), y) > 0.95
    assert heldout(bag_of_words(ordered, ngrams=1), y) < 0.65


@pytest.mark.parametrize("make", [nearest, pca_logistic, linear_arm])
def test_arms_over_numbers_read_what_is_there_and_do_not_see_held_out_labels(make):
    rng, y, _ = material()
    X = rng.normal(size=(N, 6)) + 2.0 * y[:, None]
    arm = make(X)
    assert heldout(arm, y) > 0.95
    train = np.arange(160)
    other = y.copy()
    other[160:] = 1 - other[160:]
    assert np.array_equal(arm(train, y, GROUPS), arm(train, other, GROUPS))


def test_a_line_in_one_small_column_is_seen_by_the_probe_and_missed_by_neighbours_and_large_components():
    rng, y, _ = material()
    X = rng.normal(size=(N, 80))
    X[:, 3] += 4.0 * y
    X[:, 10:] *= 10.0
    found = beats(linear_arm(X, "lda"), site_baselines(X), y, GROUPS)
    assert set(found.test) == {"probe", "nearest neighbours", "PCA + logistic"}
    assert found.beats


def test_counts_read_length():
    _, y, texts = material()
    longer = [text + " more words" * int(label) for text, label in zip(texts, y, strict=True)]
    assert heldout(linear_arm(counts(longer), "lda"), y) > 0.95
    assert counts(longer, tokens=[1] * N, positions=[2] * N).shape == (N, 4)
    with pytest.raises(SpecError, match="tokens has 1 entries for 240 texts"):
        counts(longer, tokens=[1])


def test_a_probe_of_what_the_words_say_does_not_beat_them():
    rng, y, texts = material()
    said = [text + (" good" if label else " bad") for text, label in zip(texts, y, strict=True)]
    X = rng.normal(size=(N, 6)) + 2.0 * y[:, None]
    arms = text_baselines(said, embedding=rng.normal(size=(N, 4)), tokens=[7] * N)
    assert set(arms) == {"bag of words", "length", "token embedding", "nearest token embeddings"}
    found = beats(linear_arm(X, "lda"), arms, y, GROUPS)
    assert (found.best, found.baseline) == ("bag of words", 1.0)
    assert not found.beats
    assert found.gain <= 0
    assert found.gain in found.interval


def test_a_probe_of_what_the_words_do_not_say_beats_them():
    rng, y, texts = material()
    X = rng.normal(size=(N, 6)) + 2.0 * y[:, None]
    found = beats(linear_arm(X, "lda"), text_baselines(texts), y, GROUPS)
    assert found.beats
    assert found.gain == pytest.approx(found.probe - found.baseline)
    assert found.validation[found.best] == max(value for name, value in found.validation.items() if name != "probe")
    assert found.test["probe"] == found.probe


def test_noise_does_not_beat_noise():
    wins = 0
    for seed in range(20):
        rng, y, _ = material(seed)
        arms = {str(i): linear_arm(rng.normal(size=(N, 3)), "lda") for i in range(3)}
        wins += beats(linear_arm(rng.normal(size=(N, 3)), "lda"), arms, y, GROUPS, n_boot=100, seed=seed).beats
    assert wins <= 3  # 2.5% of 20; more has a chance of 0.1%


def test_bad_input_is_refused():
    rng, y, _ = material()
    arm = linear_arm(rng.normal(size=(N, 3)), "lda")
    with pytest.raises(SpecError, match="at least one"):
        beats(arm, {}, y, GROUPS)
    with pytest.raises(SpecError, match="none named 'probe'"):
        beats(arm, {"probe": arm}, y, GROUPS)
    with pytest.raises(NumericalError, match="'broken' gave readouts"):
        beats(arm, {"broken": lambda *_: np.full(N, np.nan)}, y, GROUPS)
    with pytest.raises(SpecError, match="no texts"):
        bag_of_words([])
    with pytest.raises(SpecError, match="k is 0"):
        nearest(rng.normal(size=(4, 2)), 0)
    with pytest.raises(SpecError, match="components is 0"):
        pca_logistic(rng.normal(size=(4, 2)), 0)
