"""Erasure is scored on rows it has not seen: in the null band where rows are many, and not where they are few."""

from __future__ import annotations

import numpy as np
import pytest

from assay.base.errors import SpecError
from assay.directions.erasure import inlp, leace, mean_projection, score_erasure


def made(n: int, d: int, seed: int, classes: int = 2) -> tuple[np.ndarray, np.ndarray]:
    """Rows of a falling spectrum that a linear probe tells apart nearly always."""
    rng = np.random.default_rng(seed)
    y = rng.permutation(np.arange(n) % classes)
    means = rng.standard_normal((classes, d))
    means *= 3.5 / np.linalg.norm(means[0] - means[1])
    return (rng.standard_normal((n, d)) + means[y]) * np.arange(1, d + 1) ** -0.5, y


def test_what_new_rows_find_is_within_chance_and_shrinks_with_rows() -> None:
    """Over 20 data sets each, at ten rows a dimension and at forty.

    A probe fitted on the eraser's own rows finds exactly nothing: that is LEACE's construction, and no test of it. A
    probe of new rows is above chance on average, by about `sqrt(d / n)`, since the erased direction is an estimate from
    n rows; in one data set that is less than its own error, so no more fall outside a 95% band than chance allows
    (P(> 4 of 20) = .003).
    """
    excess = []
    for n, train in ((320, 240), (1280, 960)):
        scores = [score_erasure(leace, *made(n, 24, seed), n_boot=100, seed=seed) for seed in range(20)]
        assert {len(score.train) for score in scores} == {train}
        assert min(score.before[0].auc for score in scores) > 0.9
        assert {score.after[0].auc for score in scores} == {0.5}
        assert sum(not score.erased for score in scores) <= 4
        excess.append(np.mean([score.fresh[0].auc - 0.5 for score in scores if score.fresh]))
    assert 0 < excess[1] < excess[0] < 0.1


def test_too_few_groups_to_tell_is_not_erased() -> None:
    x, y = made(400, 5, 5)
    groups = (np.where(y > 0, 4, 0) + np.arange(400) % 4).tolist()  # two of each class held out: one for a new probe
    score = score_erasure(leace, x, y, groups, n_boot=100, held_out=0.5)
    assert score.fresh is None and not score.erased
    with pytest.raises(SpecError, match="hold out more"):
        score_erasure(leace, x, y, groups, n_boot=100, held_out=0.25)


def test_an_interval_that_holds_everything_is_not_erased() -> None:
    """Four groups of each class, of which two are read: chance is in the interval, and so is what was found before."""
    rng = np.random.default_rng(0)
    groups = np.repeat(np.arange(16), 20)
    y = groups % 2
    x = rng.standard_normal((16, 6))[groups] + 3.0 * y[:, None] * np.eye(6)[0] + 0.3 * rng.standard_normal((320, 6))
    scores = [score_erasure(leace, x, y, groups.tolist(), n_boot=100, held_out=0.5, seed=seed) for seed in range(20)]
    wide = [s for s in scores if s.fresh and s.fresh[0].erased and s.fresh[0].interval.high >= s.before[0].auc]
    assert wide and not any(score.erased for score in wide)


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
    assert score.fresh is not None
    assert [leak.label for leak in score.after] == [leak.label for leak in score.fresh] == ["0", "1", "2"]
    assert all(before.auc > 0.8 > 0.65 > after.auc for before, after in zip(score.before, score.fresh, strict=True))
    assert score.eraser.rank == 2
    assert score.erased == all(leak.erased for leak in score.fresh)  # each below what was found before


def test_one_class_that_is_left_is_not_erased() -> None:
    """Of three classes, an eraser of the first against the rest leaves what tells the other two apart."""
    x, y = made(1500, 15, 3, classes=3)
    score = score_erasure(lambda a, b: leace(a, b == 0), x, y, n_boot=100)
    assert score.eraser.rank == 1 and score.fresh is not None
    assert not score.erased and max(leak.auc for leak in score.fresh) > 0.8


def test_groups_are_whole_on_one_side() -> None:
    x, y = made(600, 5, 4)
    groups = [i // 6 for i in range(600)]
    score = score_erasure(leace, x, y, groups, n_boot=100)
    assert not {groups[i] for i in score.train} & {groups[i] for i in score.test}
    assert "groups" in score.after[0].interval.method
