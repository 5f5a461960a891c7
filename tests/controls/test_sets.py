"""Random sets have the make-up of the chosen one, differ from it, and are uniform among those that do."""

from __future__ import annotations

from collections import Counter

import pytest
import scipy.stats
from hypothesis import given
from hypothesis import strategies as st

from assay.base.errors import SpecError
from assay.controls import count_matched_sets, matched_sets

UNIVERSE = [("attn", layer, head) for layer in range(6) for head in range(4)] + [
    ("mlp", layer, 0) for layer in range(6)
]
CHOSEN = {("attn", 1, 2), ("attn", 3, 0), ("attn", 3, 1), ("mlp", 0, 0)}


def kind(component):
    return component[0]


def kind_and_layer(component):
    return component[:2]


@given(
    st.sets(st.sampled_from(UNIVERSE), min_size=2, max_size=12),
    st.integers(0, 5),
    st.sampled_from([kind, kind_and_layer]),
)
def test_every_set_has_the_make_up_of_the_chosen_one(chosen, seed, strata):
    n = min(40, count_matched_sets(chosen, UNIVERSE, strata) - 1)
    if n < 1:
        return
    sets = matched_sets(chosen, UNIVERSE, strata, n=n, seed=seed)
    assert len(set(sets)) == n
    assert frozenset(chosen) not in sets
    for found in sets:
        assert found <= set(UNIVERSE)
        assert Counter(map(strata, found)) == Counter(map(strata, chosen))


def test_the_number_of_sets_is_counted_by_hand():
    assert count_matched_sets(CHOSEN, UNIVERSE, kind) == 2024 * 6  # C(24, 3) C(6, 1)
    assert count_matched_sets(CHOSEN, UNIVERSE, kind_and_layer) == 4 * 6 * 1


def test_all_the_others_can_be_had_and_no_more():
    sets = matched_sets(CHOSEN, UNIVERSE, kind_and_layer, n=23)
    assert len(set(sets)) == 23
    message = r"24 random sets .* 23 others have this make-up \(.*1 of 4 in \('attn', 1\).*\); ask for fewer"
    with pytest.raises(SpecError, match=message):
        matched_sets(CHOSEN, UNIVERSE, kind_and_layer, n=24)


@pytest.mark.parametrize("n", [6, 2])
def test_sets_are_uniform_whether_listed_or_drawn(n):
    """C(6, 2) - 1 = 14 others: 6 wanted lists them all (14 < 4 x 6), 2 wanted draws until two differ."""
    counts = Counter(found for seed in range(700) for found in matched_sets({1, 2}, range(6), n=n, seed=seed))
    assert len(counts) == 14
    assert scipy.stats.chisquare(list(counts.values())).pvalue > 0.001


def test_sets_follow_their_seed_and_not_the_order_of_the_chosen_set():
    first = matched_sets(sorted(CHOSEN), UNIVERSE, kind, n=30, seed=1)
    assert matched_sets(sorted(CHOSEN, reverse=True), UNIVERSE, kind, n=30, seed=1) == first
    assert matched_sets(CHOSEN, UNIVERSE, kind, n=30, seed=2) != first
    assert matched_sets(CHOSEN, UNIVERSE, kind, n=40, seed=1)[:30] == first


@pytest.mark.parametrize(
    ("chosen", "message"),
    [
        ([("attn", 9, 9)], r"\('attn', 9, 9\) is in the chosen set and not in the universe of 30"),
        ([("mlp", 0, 0), ("mlp", 0, 0)], "holds .* 2 times"),
        ([], "the chosen set is empty"),
        (UNIVERSE, "0 others have this make-up"),
    ],
)
def test_sets_that_cannot_be_matched_are_refused(chosen, message):
    with pytest.raises(SpecError, match=message):
        matched_sets(chosen, UNIVERSE, kind, n=10)
    with pytest.raises(SpecError, match="ask for at least 1"):
        matched_sets(CHOSEN, UNIVERSE, kind, n=0)
