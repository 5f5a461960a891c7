"""Scores agree with scikit-learn; their intervals widen with groups and cover the truth."""

from __future__ import annotations

import numpy as np
import pytest
import sklearn.metrics
from hypothesis import given
from hypothesis import strategies as st
from scipy.special import expit

from assay.base.errors import NumericalError, SpecError
from assay.directions.probes.scores import (
    auprc,
    auroc,
    auroc_null_sd,
    balanced_accuracy,
    calibration_error,
    evaluate,
    log_loss,
    many_accuracy,
    many_auroc,
)

pairs = st.lists(st.tuples(st.integers(-4, 4), st.booleans()), min_size=4, max_size=40).filter(
    lambda rows: len({label for _, label in rows}) == 2
)


@given(pairs)
def test_scores_are_scikit_learns_ties_included(rows):
    readout, y = np.array([r / 2 for r, _ in rows]), np.array([int(label) for _, label in rows])
    assert auroc(readout, y) == pytest.approx(sklearn.metrics.roc_auc_score(y, readout))
    assert auprc(readout, y) == pytest.approx(sklearn.metrics.average_precision_score(y, readout))
    assert balanced_accuracy(readout, y) == pytest.approx(sklearn.metrics.balanced_accuracy_score(y, readout > 0))
    assert log_loss(readout, y) == pytest.approx(sklearn.metrics.log_loss(y, expit(readout)))


@given(pairs)
def test_many_columns_at_once_are_one_at_a_time(rows):
    readout, y = np.array([float(r) for r, _ in rows]), np.array([label for _, label in rows])
    table, labels = np.stack([readout, -readout, readout**2], axis=1), np.stack([y, y[::-1], ~y], axis=1)
    for score, many in ((auroc, many_auroc), (balanced_accuracy, many_accuracy)):
        got = many(table, labels)
        assert got.tolist() == pytest.approx([score(table[:, i], labels[:, i]) for i in range(3)])


@given(pairs)
def test_turning_a_readout_round_turns_its_auroc_round(rows):
    readout, y = [float(r) for r, _ in rows], [label for _, label in rows]
    assert auroc([-r for r in readout], y) == pytest.approx(1 - auroc(readout, y))


def test_the_null_deviation_is_that_of_noise():
    rng = np.random.default_rng(0)
    y = np.arange(64) < 24
    seen = many_auroc(rng.normal(size=(64, 20_000)), np.repeat(y[:, None], 20_000, axis=1))
    assert np.std(seen) == pytest.approx(auroc_null_sd(24, 40), rel=0.02)


def test_calibration_error_is_zero_for_true_odds_and_large_for_boasts():
    rng = np.random.default_rng(0)
    odds = rng.normal(size=20_000)
    y = rng.random(20_000) < expit(odds)
    assert calibration_error(odds, y) < 0.02
    assert calibration_error(20 * odds, y) > 0.2


def test_intervals_hold_their_value_and_widen_where_rows_of_a_group_are_alike():
    rng = np.random.default_rng(0)
    groups = np.repeat(np.arange(20), 15)
    y = (groups % 2).astype(int)
    readout = rng.normal(size=20)[groups] + 0.8 * y + 0.1 * rng.normal(size=300)
    grouped = evaluate(readout, y, groups, n_boot=300)
    alone = evaluate(readout, y, n_boot=300)
    assert set(grouped) == {"auroc", "auprc", "balanced accuracy", "log loss", "ece"}
    for name, score in grouped.items():
        assert score.value == alone[name].value
        if name != "ece":  # its bias is larger than its spread in a resample
            assert score.value in score.interval
    width = [found["auroc"].interval.high - found["auroc"].interval.low for found in (grouped, alone)]
    assert width[0] > 2 * width[1]


def test_the_interval_of_auroc_covers_the_truth():
    from scipy.stats import norm

    truth = norm.cdf(1 / np.sqrt(2))
    covered = 0
    for seed in range(40):
        rng = np.random.default_rng(seed)
        y = np.arange(80) % 2
        score = evaluate(rng.normal(size=80) + y, y, metrics=("auroc",), n_boot=200)["auroc"]
        covered += truth in score.interval
    assert covered >= 34  # of 40 at 95%: fewer has a chance of 0.3%


def test_bad_input_is_refused():
    with pytest.raises(SpecError, match="two classes"):
        auroc([0.1, 0.2], [1, 1])
    with pytest.raises(SpecError, match="one label a row"):
        auroc([0.1, 0.2], [1, 0, 1])
    with pytest.raises(SpecError, match="one number a row"):
        auroc([[0.1], [0.2]], [1, 0])
    with pytest.raises(NumericalError, match="1 of 2 readouts"):
        auroc([0.1, np.nan], [1, 0])
    with pytest.raises(SpecError, match="bins is 0"):
        calibration_error([0.1, 0.2], [1, 0], bins=0)
    with pytest.raises(SpecError, match="both classes"):
        auroc_null_sd(0, 5)
