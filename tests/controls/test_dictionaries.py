"""Random dictionaries and random errors."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from assay.base.errors import NumericalError, SpecError
from assay.base.rng import torch_stream
from assay.controls.dictionaries import random_dictionaries, random_errors


def rows(n: int = 60, d: int = 8, seed: int = 0) -> torch.Tensor:
    return torch.randn(n, d, generator=torch.Generator().manual_seed(seed)) * torch.arange(1.0, d + 1)


def test_one_direction_explains_the_best_projection():
    x = rows()
    centred = x - x.mean(0)
    for draw, share in enumerate(random_dictionaries(x, 30, 1, draws=3, seed=4)):
        v = torch.nn.functional.normalize(
            torch.randn(30, 8, generator=torch_stream(4, "random dictionary", draw)), dim=1
        )
        best = (centred @ v.T).square().max(1).values.sum() / centred.square().sum()
        assert share == pytest.approx(float(best), rel=1e-4)


@given(seed=st.integers(0, 50), n_latents=st.integers(4, 40))
def test_more_directions_a_row_explain_more_and_all_dimensions_everything(seed, n_latents):
    x = rows(12, 4, seed)
    shares = [random_dictionaries(x, n_latents, k, draws=1, seed=seed)[0] for k in (1, 2, 4)]
    assert 0 <= shares[0] <= shares[1] + 1e-9 <= shares[2] + 2e-9 <= 1 + 1e-6
    assert random_dictionaries(x + 100, n_latents, 2, draws=1, seed=seed)[0] == pytest.approx(shares[1], abs=1e-3)


def test_draws_are_named_by_the_seed_and_told():
    told = []
    found = random_dictionaries(rows(), 20, 2, draws=3, seed=1, progress=lambda *now: told.append(now[:2]))
    assert told == [(1, 3), (2, 3), (3, 3)] and len(set(found)) == 3
    assert random_dictionaries(rows(), 20, 2, draws=2, seed=1) == found[:2]
    assert random_dictionaries(rows(), 20, 2, draws=1, seed=2)[0] != found[0]


def test_what_cannot_be_drawn_is_refused():
    for k in (0, 21):
        with pytest.raises(SpecError, match=f"k is {k}"):
            random_dictionaries(rows(), 20, k)
    with pytest.raises(NumericalError, match="no variance"):
        random_dictionaries(torch.ones(5, 3), 4, 1)


@given(seed=st.integers(0, 50))
def test_errors_keep_their_lengths_row_by_row(seed):
    error = torch.randn(3, 4, 6, generator=torch.Generator().manual_seed(seed))
    error[1, 2] = 0
    drawn = list(random_errors(error, draws=3, seed=seed))
    for one in drawn:
        torch.testing.assert_close(one.norm(dim=-1), error.norm(dim=-1))
    assert not torch.equal(drawn[0], drawn[1])


def test_errors_of_two_sites_point_apart():
    error = torch.ones(50, 32)
    one, two = (next(random_errors(error, of=name)) for name in ("blocks.0.mlp.out 0", "blocks.1.mlp.out 0"))
    cosines = torch.nn.functional.cosine_similarity(one, two)
    assert float(cosines.abs().mean()) < 0.3 and torch.equal(one, next(random_errors(error, of="blocks.0.mlp.out 0")))
    mean = torch.stack(list(random_errors(error, draws=40))).mean(0)
    assert float(mean.norm(dim=1).mean() / error.norm(dim=1).mean()) < 0.25, "they point anywhere"
