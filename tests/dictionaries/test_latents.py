"""Pairs and dense activations are the same thing."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from assay.base.errors import SpecError
from assay.dictionaries import SparseLatents


@st.composite
def dense(draw) -> torch.Tensor:
    shape = (*draw(st.lists(st.integers(0, 4), max_size=3)), draw(st.integers(1, 6)))
    stream = torch.Generator().manual_seed(draw(st.integers(0, 99)))
    z = torch.randn(shape, generator=stream)
    return torch.where(torch.rand(shape, generator=stream) < draw(st.sampled_from([0.0, 0.4, 1.0])), z, 0)


@given(dense())
def test_there_and_back(z):
    sparse = SparseLatents.from_dense(z)
    assert torch.equal(sparse.to_dense(), z)
    assert sparse.shape == tuple(z.shape[:-1]) and sparse.n_rows == z[..., 0].numel()
    assert torch.equal(sparse.counts.reshape(z.shape[:-1]), (z != 0).sum(-1))
    assert torch.equal(torch.bincount(sparse.rows, minlength=sparse.n_rows), sparse.counts)
    for row in range(sparse.n_rows):
        latents = sparse.latents[sparse.offsets[row] : sparse.offsets[row + 1]]
        assert bool((latents.diff() > 0).all())


def test_a_single_row_without_leading_dimensions_stays_one():
    assert SparseLatents.from_dense(torch.tensor([0.0, 2.0])).to_dense().tolist() == [0.0, 2.0]


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"values": torch.ones(2)}, "values"),
        ({"offsets": torch.zeros(0, dtype=torch.int64)}, "an offset for each row"),
        ({"shape": (3,)}, "3 rows"),
        ({"shape": ()}, "1 rows"),
    ],
)
def test_parts_that_do_not_fit_are_refused(change, said):
    parts = {
        "offsets": torch.tensor([0, 1, 1]),
        "latents": torch.tensor([2], dtype=torch.int32),
        "values": torch.ones(1),
        "n_latents": 3,
    }
    SparseLatents(**parts)
    with pytest.raises((SpecError, TypeError), match=said):  # TypeError: tests check shapes before assay does
        SparseLatents(**(parts | change))
