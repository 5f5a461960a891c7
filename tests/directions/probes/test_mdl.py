"""The online code: noise costs its entropy, what can be read costs less, and no block sees its own groups."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from assay.base.errors import NumericalError, SpecError
from assay.directions.probes.mdl import description_length


@pytest.mark.parametrize("share", [0.5, 0.1])
def test_noise_compresses_to_its_entropy_and_no_further(share):
    rng = np.random.default_rng(0)
    y = rng.permutation(400) < 400 * share
    found = description_length(rng.normal(size=(400, 30)), y.astype(int), np.arange(400), shuffles=2)
    assert found.entropy_compression == pytest.approx(1.0, abs=0.06)
    assert found.uniform == 400
    if share == 0.1:  # the uniform code flatters imbalanced labels
        assert found.compression > 1.9


def test_labels_that_can_be_read_cost_less_than_labels_that_cannot():
    rng = np.random.default_rng(0)
    y = np.arange(400) % 2
    X = rng.normal(size=(400, 10)) + 2.0 * y[:, None] * (np.arange(10) < 2)
    task = description_length(X, y, np.arange(400), shuffles=1)
    control = description_length(X, rng.permutation(y), np.arange(400), shuffles=1)
    assert task.compression > 2
    assert control.compression < 1.05


def test_a_probe_that_knows_nothing_costs_one_bit_a_label_and_one_that_knows_all_costs_the_first_block():
    y, X = np.arange(100) % 2, np.zeros((100, 2)) + (np.arange(100) % 2)[:, None]
    nothing = description_length(X, y, np.arange(100), fit=lambda *_: lambda rows: np.zeros(len(rows)))
    assert nothing.online == pytest.approx((100.0,) * 3)
    everything = description_length(X, y, np.arange(100), fit=lambda *_: lambda rows: 200 * rows[:, 0] - 100)
    assert everything.online == pytest.approx((1.0,) * 3)


@given(st.lists(st.integers(1, 9), min_size=3, max_size=30), st.integers(0, 3))
def test_no_block_shares_a_group_with_what_it_is_predicted_from(sizes, seed):
    groups = np.repeat(np.arange(len(sizes)), sizes)
    y = np.arange(groups.size) % 2
    X = np.stack([groups, np.arange(groups.size)], axis=1).astype(float)
    sent = []

    def fit(rows, labels, own):
        assert len(rows) == len(labels) == len(own)
        seen = set(rows[:, 0])

        def predict(block):
            assert not seen & set(block[:, 0])
            sent.append(block[:, 1])
            return np.zeros(len(block))

        return predict

    found = description_length(X, y, groups, fit=fit, shuffles=1, seed=seed)
    first = groups.size - sum(map(len, sent))
    assert first >= 1
    assert len(np.unique(np.concatenate(sent))) == groups.size - first if sent else True
    assert found.online == pytest.approx((float(groups.size),))


def test_bad_input_is_refused():
    X, y = np.random.default_rng(0).normal(size=(20, 2)), np.arange(20) % 2
    with pytest.raises(SpecError, match="one group"):
        description_length(X, y, np.zeros(20))
    with pytest.raises(SpecError, match="shuffles is 0"):
        description_length(X, y, np.arange(20), shuffles=0)
    with pytest.raises(NumericalError, match="not finite"):
        description_length(X, y, np.arange(20), fit=lambda *_: lambda rows: np.full(len(rows), np.nan))
