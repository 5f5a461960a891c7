"""Erasure is scored on rows it has not seen: in the null band where rows are many, and not where they are few."""

from __future__ import annotations

import numpy as np
import pytest
from sklearn.metrics import roc_auc_score

from assay.base.errors import SpecError
from assay.directions.erasure import inlp, leace, mean_projection, null_band, score_erasure
from assay.directions.erasure.score import auc


def made(n: int, d: int, seed: int, classes: int = 2) -> tuple[np.ndarray, np.ndarray]:
    """Rows of a falling spectrum that a linear probe tells apart nearly always."""
    rng = np.random.default_rng(seed)
    y = rng.permutation(np.arange(n) % classes)
    means = rng.standard_normal((classes, d))
    means *= 3.5 / np.linalg.norm(means[0] - means[1])
    return (rng.standard_normal((n, d)) + means[y]) * np.arange(1, d + 1) ** -0.5, y


def test_the_auc_is_scikit_learns() -> None:
    rng = np.random.default_rng(0)
    scores, y = rng.integers(0, 9, 200).astype(float), rng.integers(2, size=200) > 0
    assert auc(scores, y) == pytest.approx(roc_auc_score(y, scores))
    assert np.isnan(auc(scores, np.zeros(200, dtype=bool)))


def test_the_null_band_is_the_spread_of_an_auc_of_noise() -> None:
    rng = np.random.default_rng(0)
    y = np.arange(60) < 20
    draws = [auc(rng.standard_normal(60), y) for _ in range(4000)]
    assert null_band(20, 40) == pytest.approx(np.std(draws), rel=0.04)
    with pytest.raises(SpecError, match="both classes"):
        null_band(0, 3)


def test_at_ten_rows_a_dimension_held_out_rows_are_in_the_null_band() -> None:
    """Over 20 data sets, no more fall outside a 95% band than chance allows (P(> 4 of 20) = .003)."""
    scores = [score_erasure(leace, *made(320, 24, seed), n_boot=100, seed=seed) for seed in range(20)]
    assert {len(score.train) for score in scores} == {240}
    assert min(score.before[0].auc for score in scores) > 0.9
    assert sum(not score.after[0].in_band for score in scores) <= 4
    assert np.mean([score.after[0].auc for score in scores]) == pytest.approx(0.5, abs=0.03)


def test_with_too_few_rows_erasure_does_not_carry_over() -> None:
    """Two rows a dimension: nothing is left in the rows it was fitted on; somebody with rows of their own finds it."""
    x, y = made(1600, 60, 0)
    few = score_erasure(mean_projection, x, y, n_boot=100, held_out=0.925)
    train = np.asarray(few.train)
    assert len(train) == 120
    erased = few.eraser(x[train])
    assert np.abs(erased[y[train] == 1].mean(0) - erased[y[train] == 0].mean(0)).max() < 1e-12
    assert few.fresh is not None and few.fresh[0].auc > 0.5 + 4 * few.fresh[0].null_sd
    many = score_erasure(mean_projection, x, y, n_boot=100, held_out=0.5)
    assert many.fresh is not None and many.fresh[0].auc < few.fresh[0].auc
    with pytest.raises(SpecError, match="too few to invert"):
        score_erasure(leace, x, y, n_boot=100, held_out=0.925)


def test_leace_moves_rows_less_than_the_others() -> None:
    x, y = made(1200, 20, 1)
    moved = [
        score_erasure(fit, x, y, n_boot=100).moved
        for fit in (leace, mean_projection, lambda a, b: inlp(a, b, rounds=4).eraser)
    ]
    assert moved[0] < moved[1] < moved[2]


def test_what_was_not_erased_is_still_found() -> None:
    x, y = made(900, 12, 2)
    other = np.arange(900) % 2
    score = score_erasure(lambda a, b: leace(a, other[: len(a)]), x, y, n_boot=200)
    assert not score.erased and score.after[0].auc > 0.9
    assert score.fresh is not None and score.fresh[0].auc > 0.9


def test_several_classes_are_each_scored() -> None:
    score = score_erasure(leace, *made(1500, 15, 3, classes=3), n_boot=100)
    assert [leak.label for leak in score.after] == ["0", "1", "2"]
    assert all(leak.auc > 0.8 for leak in score.before)
    assert score.erased and score.eraser.rank == 2


def test_groups_are_whole_on_one_side() -> None:
    x, y = made(600, 5, 4)
    groups = [i // 6 for i in range(600)]
    score = score_erasure(leace, x, y, groups, n_boot=100)
    assert not {groups[i] for i in score.train} & {groups[i] for i in score.test}
    assert "groups" in score.after[0].interval.method
