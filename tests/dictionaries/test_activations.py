"""The nonlinearities, against their definitions one number at a time."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from assay.base.errors import SpecError
from assay.dictionaries import Activation, Gated, GroupMax, JumpReLU, ReLU, TopK

F = 6
NUMBERS = st.sampled_from([-2.0, -1.0, -0.5, 0.0, 0.25, 0.5, 1.0, 2.0])  # few, so that there are ties
ROWS = st.lists(st.lists(NUMBERS, min_size=F, max_size=F), min_size=1, max_size=4).map(torch.tensor)
THRESHOLD = torch.tensor([0.0, 0.25, 0.5, 1.0, 1.5, 0.0])
LOG_GAIN, OFFSET = torch.tensor([0.0, 0.5, -0.5, 0.0, 1.0, 0.0]), torch.tensor([0.0, 0.0, 0.5, -0.7, -1.0, 2.0])
ALL = (ReLU(), TopK(k=2), JumpReLU(threshold=THRESHOLD), Gated(log_gain=LOG_GAIN, offset=OFFSET), GroupMax(k=3))


@given(ROWS)
def test_definitions(h):
    for row, values in enumerate(h.tolist()):
        order = sorted(range(F), key=lambda f: (-values[f], f))
        groups = [max(range(start, start + 2), key=lambda f: (values[f], -f)) for start in (0, 2, 4)]
        wanted = {
            "relu": [max(v, 0.0) for v in values],
            "topk": [max(v, 0.0) if f in order[:2] else 0.0 for f, v in enumerate(values)],
            "jumprelu": [v if v > THRESHOLD[f] else 0.0 for f, v in enumerate(values)],
            "gated": [
                max(math.exp(LOG_GAIN[f]) * v + float(OFFSET[f]), 0.0) if v > 0 else 0.0 for f, v in enumerate(values)
            ],
            "groupmax": [max(v, 0.0) if f in groups else 0.0 for f, v in enumerate(values)],
        }
        for activation in ALL:
            assert activation(h)[row].tolist() == pytest.approx(wanted[activation.name]), activation.name


@pytest.mark.parametrize("activation", ALL, ids=lambda a: a.name)
def test_one_row_is_what_it_is_among_others_in_any_float_type(activation):
    assert isinstance(activation, Activation)
    h = torch.randn(3, 2, F, generator=torch.Generator().manual_seed(0))
    whole = activation(h)
    assert whole.shape == h.shape and torch.equal(activation(h[1, 1]), whole[1, 1])
    assert activation(h[:0]).shape == (0, 2, F)
    half = activation(h.bfloat16())
    if activation.name in ("relu", "topk", "groupmax"):
        assert half.dtype == torch.bfloat16 and torch.equal(half, whole.bfloat16())


@pytest.mark.parametrize("activation", ALL, ids=lambda a: a.name)
def test_nan_is_not_taken_for_silence(activation):
    z = activation(torch.full((1, F), float("nan")))
    assert bool(torch.isnan(z).any())


@pytest.mark.parametrize(
    ("make", "said"),
    [
        (lambda: TopK(k=0), "k is 0"),
        (lambda: GroupMax(k=-1), "k is -1"),
        (lambda: TopK(k=7)(torch.zeros(1, F)), "keeps 7 latents and there are 6"),
        (lambda: GroupMax(k=4)(torch.zeros(1, F)), "6 latents cannot be divided into 4"),
        (lambda: JumpReLU(threshold=torch.tensor([-1.0])), "-1 in some files"),
        (lambda: JumpReLU(threshold=torch.tensor([float("nan")])), "finite"),
    ],
)
def test_what_cannot_be_is_refused(make, said):
    with pytest.raises(SpecError, match=said):
        make()
