"""Shuffles keep what they say they keep, exactly, and planted co-occurrence dies."""

from __future__ import annotations

from collections import Counter

import numpy as np
import pytest
import scipy.sparse
import scipy.stats
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays

from assay.base.errors import NumericalError, SpecError
from assay.controls.shuffles import (
    SHUFFLES,
    circular_shift,
    curveball,
    permute_latents,
    permute_tokens,
    shuffle_blocks,
    shuffle_control,
)

DRAW = {
    "curveball": curveball,
    "latents": permute_latents,
    "tokens": permute_tokens,
    "circular": circular_shift,
    "blocks": lambda codes, seed: shuffle_blocks(codes, seed, block=max(1, len(range(codes.shape[0])) // 2)),
}
CODES = arrays.arrays(
    np.float64,
    arrays.array_shapes(min_dims=2, max_dims=2, min_side=2, max_side=9),
    elements=st.sampled_from([0.0, 0.0, 1.0, 2.0, 3.5]),
)
ALL = pytest.mark.parametrize("draw", DRAW.values(), ids=DRAW.keys())


def topics(tokens=4000, latents=200, n_topics=10, seed=0):
    """Codes in which the latents of a topic fire together: tokens with few or many latents, rates that differ."""
    rng = np.random.default_rng(seed)
    topic = rng.integers(n_topics, size=tokens)
    rate = rng.gamma(2.0, 0.5, size=latents) * 0.02
    busy = rng.gamma(3.0, 1 / 3, size=tokens)
    chance = busy[:, None] * rate * np.where(np.arange(latents) % n_topics == topic[:, None], 9.0, 0.1)
    return np.where(rng.random((tokens, latents)) < chance, rng.gamma(2.0, 1.0, (tokens, latents)), 0.0)


def energy(codes):
    """The mean squared correlation between latents' supports."""
    support = (codes > 0).astype(float)
    r = np.corrcoef(support[:, support.std(axis=0) > 0].T)
    return float(np.mean(r[np.triu_indices(len(r), 1)] ** 2))


def columns(codes):
    return [sorted(column) for column in codes.T.tolist()]


def l0(codes):
    return (codes > 0).sum(axis=1).tolist()


@given(CODES, st.integers(0, 99))
def test_curveball_keeps_both_margins_and_each_latents_values(codes, seed):
    mixed = curveball(codes, seed)
    assert columns(mixed) == columns(codes)
    assert l0(mixed) == l0(codes)


@given(CODES, st.integers(0, 99))
def test_permuting_latents_keeps_their_values(codes, seed):
    assert columns(permute_latents(codes, seed)) == columns(codes)


@given(CODES, st.integers(0, 99))
def test_permuting_tokens_keeps_their_values(codes, seed):
    assert columns(permute_tokens(codes, seed).T) == columns(codes.T)


@given(CODES, st.integers(0, 99), st.integers(1, 8))
def test_a_circular_shift_rotates_each_latent_in_each_document(codes, seed, cut):
    documents = np.arange(len(codes)) >= cut
    for labels in (None, documents.tolist()):
        moved = circular_shift(codes, seed, labels)
        parts = [slice(None)] if labels is None else [~documents, documents]
        for part in parts:
            for old, new in zip(codes[part].T, moved[part].T, strict=True):
                assert any(np.array_equal(np.roll(old, by), new) for by in range(max(1, len(old))))


@given(CODES, st.integers(0, 99), st.integers(1, 3))
def test_blocks_move_whole_and_what_is_left_over_stays(codes, seed, block):
    if len(codes) // block < 2:
        return
    moved = shuffle_blocks(codes, seed, block=block)
    whole = len(codes) // block * block
    assert np.array_equal(moved[whole:], codes[whole:])
    for old, new in zip(codes[:whole].T, moved[:whole].T, strict=True):
        assert Counter(map(tuple, old.reshape(-1, block))) == Counter(map(tuple, new.reshape(-1, block)))


@ALL
@given(CODES, st.integers(0, 9))
def test_sparse_and_dense_are_one_and_the_codes_are_left_alone(draw, codes, seed):
    before = codes.copy()
    dense = draw(codes, seed)
    assert dense.dtype == codes.dtype
    assert np.array_equal(codes, before)
    for kind in (scipy.sparse.csr_matrix, scipy.sparse.csc_array, scipy.sparse.coo_array):
        sparse = draw(kind(codes), seed)
        assert isinstance(sparse, kind)
        assert np.array_equal(sparse.toarray(), dense)


@ALL
def test_a_seed_gives_one_draw_and_another_seed_another(draw):
    codes = topics(120, 20)
    assert np.array_equal(draw(codes, 3), draw(codes, 3))
    assert not np.array_equal(draw(codes, 3), draw(codes, 4))
    assert draw(codes.astype(np.float32), 3).dtype == np.float32


def test_planted_co_occurrence_dies_and_only_curveball_keeps_both_margins():
    codes = topics()
    planted = energy(codes)
    independent = energy(permute_latents(codes, 1))
    sd = {name: np.std(l0(shuffle.draw(codes, 0))) for name, shuffle in SHUFFLES.items()}
    left = {name: energy(shuffle.draw(codes, 0)) for name, shuffle in SHUFFLES.items()}
    assert planted > 10 * independent
    # Where L0 varies and is kept, busy tokens make all latents slightly correlated; the planted part is gone.
    assert all(found < 3 * independent for found in left.values()), left
    assert sd["co-occurrence"] == np.std(l0(codes)) == sd["co-occurrence and latent rates"]
    assert sd["co-occurrence and token counts"] < 0.7 * np.std(l0(codes))
    rates = (codes > 0).mean(axis=0)
    assert np.array_equal((curveball(codes, 0) > 0).mean(axis=0), rates)
    assert np.std((permute_tokens(codes, 0) > 0).mean(axis=0)) < 0.2 * rates.std()


def test_curveball_reaches_every_matrix_with_these_margins_equally_often():
    """Of the 0-1 matrices with row sums 2, 1, 1 and column sums 2, 1, 1 there are five."""
    codes = np.array([[1.0, 1, 0], [0, 0, 1], [1, 0, 0]])
    seen = Counter(tuple((curveball(codes, seed) > 0).astype(int).ravel()) for seed in range(400))
    assert len(seen) == 5
    assert scipy.stats.chisquare(list(seen.values())).pvalue > 0.01


def test_a_circular_shift_keeps_autocorrelation_and_permuting_does_not():
    rng = np.random.default_rng(0)
    slow = np.repeat(rng.gamma(1.0, size=(100, 5)), 20, axis=0) * (np.repeat(rng.random((100, 5)), 20, axis=0) < 0.3)

    def memory(codes):
        return float(np.mean([np.corrcoef(c, np.roll(c, 1))[0, 1] for c in codes.T]))

    assert memory(circular_shift(slow, 0)) == pytest.approx(memory(slow))
    assert memory(shuffle_blocks(slow, 0, block=20)) > 0.8
    assert abs(memory(permute_latents(slow, 0))) < 0.1
    assert abs(np.corrcoef(circular_shift(np.repeat(slow[:, :1], 2, axis=1), 0).T)[0, 1]) < 0.3


@pytest.mark.parametrize("destroys", ["co-occurrence", "co-occurrence and token counts", "alignment"])
def test_p_is_uniform_where_there_is_no_structure_to_destroy(destroys):
    """Codes that are themselves a draw of the shuffle: any place among other draws is as likely."""
    start, p = topics(300, 8, n_topics=2), []
    # Squared correlations of the values: continuous, so ties do not decide.
    statistic = lambda codes: float(np.sum(np.corrcoef(codes.T) ** 2))  # noqa: E731
    for seed in range(80):
        codes = SHUFFLES[destroys].draw(start, 10_000 + seed)
        p.append(shuffle_control(statistic, codes, destroys, n=9, seed=seed).p)
    assert scipy.stats.kstest(p, np.linspace(0.1, 1, 10).tolist()).pvalue > 0.01


def test_structure_has_a_small_p():
    codes = topics(600, 40, n_topics=4)
    for destroys in SHUFFLES:
        control = shuffle_control(energy, codes, destroys, n=19)
        assert control.p == pytest.approx(0.05)
        assert destroys in control.name


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda: curveball(np.ones(3), 0), SpecError, r"shape \(3,\)"),
        (lambda: curveball(np.array([[1.0, -1.0]]), 0), SpecError, "1 are below zero"),
        (lambda: permute_tokens(np.array([[1.0, np.nan]]), 0), NumericalError, "1 codes are NaN"),
        (lambda: curveball(np.eye(3), 0, trades=0), SpecError, "trades is 0"),
        (lambda: shuffle_blocks(np.eye(3), 0, block=2), SpecError, "blocks of 2 tokens, and there are 3"),
        (lambda: circular_shift(np.eye(3), 0, ["a", "b", "a"]), SpecError, "two stretches"),
        (lambda: circular_shift(np.eye(3), 0, ["a"]), SpecError, "1 entries for 3 tokens"),
        (lambda: shuffle_control(energy, np.eye(3), "alignment", n=0), SpecError, "n is 0"),
    ],
)
def test_bad_input_is_quoted(call, error, message):
    with pytest.raises(error, match=message):
        call()
