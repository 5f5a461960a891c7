"""Grouped splits: no group on two sides, every row once, classes in their shares."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from assay.base.errors import SpecError
from assay.directions.probes.splits import grouped_folds, grouped_parts, grouped_split

rows = st.lists(st.tuples(st.integers(0, 8), st.integers(0, 2)), min_size=4, max_size=60)


@given(rows, st.sampled_from([(0.5, 0.5), (0.7, 0.3), (0.5, 0.2, 0.3), (0.25,) * 4]), st.integers(0, 5))
def test_parts_never_share_a_group_and_hold_every_row_once(table, shares, seed):
    groups, y = np.array([g for g, _ in table]), np.array([label for _, label in table])
    try:
        parts = grouped_parts(groups, y, shares, seed=seed)
    except SpecError:
        return
    assert sorted(np.concatenate(parts).tolist()) == list(range(len(y)))
    held = [set(groups[part].tolist()) for part in parts]
    assert sum(map(len, held)) == len(set(groups.tolist()))
    assert all(set(y[part].tolist()) == set(y.tolist()) for part in parts)


@given(st.integers(2, 5), st.integers(0, 5))
def test_folds_cover_every_row_once_and_their_trains_share_no_group_with_their_tests(folds, seed):
    groups = np.repeat(np.arange(20), 3)
    y = np.tile([0, 1, 1], 20)
    splits = grouped_folds(groups, y, folds=folds, seed=seed)
    assert sorted(np.concatenate([split.test for split in splits]).tolist()) == list(range(60))
    for split in splits:
        assert not set(groups[split.train]) & set(groups[split.test])
        assert len(split.train) + len(split.test) == 60


@pytest.mark.parametrize("share", [0.1, 0.3, 0.5])
def test_classes_keep_their_shares_where_groups_are_small(share):
    rng = np.random.default_rng(0)
    groups = rng.integers(0, 150, size=600)
    y = (rng.random(600) < 0.2).astype(int)
    split = grouped_split(groups, y, test=share, seed=1)
    for label in (0, 1):
        assert np.sum(y[split.test] == label) == pytest.approx(share * np.sum(y == label), abs=4)


def test_one_label_a_group_is_stratified_by_group():
    groups = np.repeat(np.arange(40), 5)
    y = (groups < 8).astype(int)
    split = grouped_split(groups, y, test=0.25)
    assert y[split.test].sum() == 10


def test_a_split_depends_on_its_seed_alone():
    groups, y = np.repeat(np.arange(30), [*range(1, 31)]), np.arange(465) % 2
    first, again, other = (grouped_split(groups, y, seed=seed) for seed in (0, 0, 1))
    assert np.array_equal(first.test, again.test)
    assert not np.array_equal(first.test, other.test)


def test_no_group_is_always_on_one_side():
    """Were large groups placed first, the largest would be trained on whatever the seed."""
    groups, y = np.repeat(np.arange(12), [*range(2, 14)]), np.arange(90) % 2
    tested = np.zeros(12)
    for seed in range(60):
        tested[np.unique(groups[grouped_split(groups, y, test=0.5, seed=seed).test])] += 1
    assert tested.min() >= 10
    assert tested.max() <= 50


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: grouped_split([0, 0, 1, 1], [1, 1, 1, 1]), "all 4 rows have one label"),
        (lambda: grouped_split([0, 0, 0, 0], [0, 1, 0, 1]), r"1 groups are too few for 2 parts"),
        (lambda: grouped_split([0, 0, 1, 1], [0, 0, 1, 1]), r"too few .*\{'0': 1, '1': 1\}.*bring more groups"),
        (lambda: grouped_folds([0, 1, 2, 3], [0, 1, 0, 1], folds=3), "too few for 3 parts"),
        (lambda: grouped_folds([0, 1], [0, 1], folds=1), "folds is 1"),
        (lambda: grouped_split([0, 1], [0, 1, 1]), "groups has 2 entries for 3 rows"),
        (lambda: grouped_split([0, 1], [0, 1], test=1.0), "the shares are"),
    ],
)
def test_what_cannot_be_split_is_refused(make, message):
    with pytest.raises(SpecError, match=message):
        make()
