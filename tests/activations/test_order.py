"""The order of stored rows: a bijection in every epoch, and a function of the seed and the place alone."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats

from assay.activations.order import Order, Permutation
from assay.base.errors import SpecError


@given(st.integers(1, 700), st.integers(0, 99))
def test_a_permutation_is_one(n: int, seed: int) -> None:
    assert np.array_equal(np.sort(Permutation(n, seed, "test")(np.arange(n))), np.arange(n))


@settings(max_examples=25)
@given(st.integers(1, 300), st.integers(1, 9), st.integers(1, 9), st.integers(0, 5))
def test_every_epoch_has_every_row_once(n: int, chunk: int, window: int, seed: int) -> None:
    order = Order(n, seed, chunk=chunk, window=window)
    for epoch in range(3):
        assert np.array_equal(np.sort(order.rows(epoch * n, n)), np.arange(n))


@settings(max_examples=25)
@given(st.integers(1, 200), st.integers(1, 9), st.integers(1, 9), st.lists(st.integers(1, 60), max_size=8))
def test_how_it_is_read_makes_no_difference(n: int, chunk: int, window: int, counts: list[int]) -> None:
    order = Order(n, 0, chunk=chunk, window=window)
    starts = np.cumsum([0, *counts])
    parts = [order.rows(int(start), count) for start, count in zip(starts, counts, strict=False)]
    again = Order(n, 0, chunk=chunk, window=window).rows(0, int(starts[-1]))
    assert np.array_equal(np.concatenate([*parts, np.empty(0, np.int64)]), again)


def test_seeds_and_epochs_have_orders_of_their_own() -> None:
    order = Order(5000, 0)
    rows = [order.rows(0, 5000), order.rows(5000, 5000), Order(5000, 1).rows(0, 5000)]
    for i in range(3):
        for j in range(i):
            assert (rows[i] == rows[j]).mean() < 0.01


@pytest.mark.parametrize("window", [2, 99])
def test_every_row_is_as_likely_at_a_place(window: int) -> None:
    counts = np.zeros((20, 20))
    for seed in range(300):
        counts[np.arange(20), Order(20, seed, chunk=3, window=window).rows(0, 20)] += 1
    assert stats.chisquare(counts[0]).pvalue > 1e-4  # the first place
    if window == 99:  # one window: the last row, which is in the short chunk, may be anywhere
        assert stats.chisquare(counts[:, 19]).pvalue > 1e-4


def test_neighbours_on_the_disk_are_not_neighbours_in_a_batch() -> None:
    rows = Order(100_000, 0, chunk=16, window=64).rows(0, 4096)
    assert abs(stats.spearmanr(rows[:-1], rows[1:]).statistic) < 0.1
    together = np.abs(np.diff(rows)) < 16
    assert together.mean() < 0.05  # 1 in 64 of one window's rows are of one chunk


def test_a_window_reads_whole_chunks() -> None:
    rows = Order(10_000, 3, chunk=10, window=20).rows(0, 200)
    assert len(np.unique(rows // 10)) == 20


def test_the_order_is_what_it_was() -> None:
    # Written down once: a resumed run must meet the same rows with any later version.
    assert Order(1000, 7).rows(0, 6).tolist() == [162, 781, 647, 976, 415, 927]
    assert Permutation(10, 0, "a")(np.arange(10)).tolist() == [6, 5, 9, 7, 4, 1, 3, 0, 2, 8]


def test_nothing_cannot_be_ordered() -> None:
    with pytest.raises(SpecError):
        Order(0, 0)
    with pytest.raises(SpecError):
        Permutation(0, 0)
