"""Adam's settings and moments."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch

from assay.base.errors import SpecError
from assay.dictionaries.kernels.values import AdamStep, ByLatent, Moments


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"step": 0}, "first step is 1, got step 0"),
        ({"lr": -1.0}, "lr is a finite number of at least 0, got -1.0"),
        ({"lr": math.nan}, "got nan"),
        ({"eps": -1e-8}, "eps"),
        ({"beta1": 1.0}, "beta1 is at least 0 and less than 1, got 1.0"),
        ({"beta2": -0.1}, "beta2"),
    ],
)
def test_settings_out_of_range_are_refused(change: dict[str, Any], message: str) -> None:
    with pytest.raises(SpecError, match=message):
        AdamStep(**({"lr": 1e-3, "step": 1} | change))


def test_corrections_are_those_of_the_formula() -> None:
    adam = AdamStep(lr=0.1, step=3, beta1=0.5, beta2=0.75)
    assert adam.rate == pytest.approx(0.1 / (1 - 0.125))
    assert adam.root == pytest.approx((1 - 0.75**3) ** 0.5)


def test_moments_begin_at_zero_and_share_nothing() -> None:
    moments = Moments.zeros(torch.ones(3, 2, requires_grad=True), torch.ones(3, 4))
    names = ("m_dec", "v_dec", "m_enc", "v_enc", "m_b", "v_b")
    tensors = [getattr(moments, name) for name in names]
    assert [list(tensor.shape) for tensor in tensors] == [[3, 2], [3, 2], [3, 4], [3, 4], [3], [3]]
    assert len({tensor.data_ptr() for tensor in tensors}) == 6
    assert not any(tensor.any() or tensor.requires_grad or not tensor.is_contiguous() for tensor in tensors)


def test_pairs_by_latent_know_how_many_latents_there_are() -> None:
    none = torch.empty(0)
    grouped = ByLatent(offsets=torch.zeros(6, dtype=torch.int64), rows=none.int(), values=none, slopes=none)
    assert grouped.n_latents == 5
