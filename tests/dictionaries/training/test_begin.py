"""First weights and scales."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from scipy.optimize import minimize

from assay.base.errors import NumericalError, SpecError
from assay.dictionaries.dictionary import Site
from assay.dictionaries.settings import Training
from assay.dictionaries.training.begin import begin, centre

IN, OUT = (
    (Site("blocks.0.mlp.in", 6), Site("blocks.1.mlp.in", 6)),
    (Site("blocks.0.mlp.out", 4), Site("blocks.1.mlp.out", 4)),
)


def rows(d: int, seed: int = 0) -> torch.Tensor:
    stream = torch.Generator().manual_seed(seed)
    return torch.randn(200, d, generator=stream) * torch.linspace(0.1, 30, d) + 5


@given(seed=st.integers(0, 30))
def test_the_geometric_median_has_the_least_distance(seed):
    x = rows(3, seed)[:40]
    found = centre(x, "median")

    def distance(m) -> float:
        return float((x.double() - torch.as_tensor(m)).norm(dim=1).sum())

    best = minimize(distance, x.mean(0).double().numpy(), method="Nelder-Mead", options={"xatol": 1e-6, "fatol": 1e-8})
    assert distance(found.double()) <= best.fun * (1 + 1e-4)
    assert torch.equal(centre(x, "zero"), torch.zeros(3))
    torch.testing.assert_close(centre(x, "mean"), x.mean(0))


def test_each_site_is_scaled_to_the_root_of_its_width_and_directions_have_length_one():
    x, y = rows(12), rows(8, 1)
    state = begin(Training(latents=50, k=4), x, y, IN, OUT)
    for scaled, width in ((x * state.scale_in, 6), (y * state.scale_out, 4)):
        for part in scaled.split(width, dim=1):
            assert float(part.norm(dim=1).mean()) == pytest.approx(math.sqrt(width), rel=1e-5)
    part = state.parts[0]
    torch.testing.assert_close(part.W_dec.norm(dim=1), torch.ones(50))
    torch.testing.assert_close(part.W_enc.norm(dim=1), torch.ones(50))
    torch.testing.assert_close(part.lengths(), torch.full((50, 2), math.sqrt(0.5)))
    assert not state.centred
    torch.testing.assert_close(state.b_dec, centre(y * state.scale_out, "median"))
    tied = begin(Training(latents=50, k=4), x, x, IN, IN)
    assert tied.centred and torch.equal(tied.parts[0].W_enc, tied.parts[0].W_dec)


def test_layers_read_their_own_site_and_write_from_it_on():
    state = begin(Training(latents=20, k=4), rows(12), rows(8, 1), IN, OUT, cross_layer=True)
    assert [(p.reads, p.writes, p.W_dec.shape[1]) for p in state.parts] == [
        (slice(0, 6), slice(0, 8), 8),
        (slice(6, 12), slice(4, 8), 4),
    ]
    assert not torch.equal(state.parts[0].W_enc, state.parts[1].W_enc)


@pytest.mark.parametrize(
    ("asked", "reads", "said"),
    [
        ({"skip": True}, IN, "no skip"),
        ({"family": "matryoshka"}, IN, "nested groups"),
        ({"centred": True}, IN, "leave centred out"),
        ({}, IN[:1], "as many sites"),
    ],
)
def test_cross_layer_transcoders_that_cannot_be(asked, reads, said):
    with pytest.raises(SpecError, match=said):
        begin(Training(latents=20, k=4, **asked), rows(6 * len(reads)), rows(8), reads, OUT, cross_layer=True)


def test_rows_that_say_nothing_are_named():
    with pytest.raises(NumericalError, match=r"every row of blocks\.1\.mlp\.in is 0"):
        begin(Training(latents=8, k=2), torch.cat([rows(6), torch.zeros(200, 6)], dim=1), rows(8), IN, OUT)
    broken = rows(12)
    broken[3, 3] = float("inf")
    with pytest.raises(NumericalError, match="infinite"):
        begin(Training(latents=8, k=2), broken, rows(8), IN, OUT)
