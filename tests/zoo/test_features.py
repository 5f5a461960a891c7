"""Rows of known features are what they say they are."""

from __future__ import annotations

import pytest
import torch

from assay.activations.source import Source
from assay.base.errors import SpecError
from assay.zoo.features import SITE, Features


def test_rows_are_sums_of_their_features():
    data = Features(n=40, d=16, active=3, batch=4000, noise=0.05)
    x, active = data.rows(3)
    left = x - active @ data.directions
    assert float(left.std()) == pytest.approx(0.05, rel=0.05)
    there = active > 0
    assert float(there.float().sum(1).mean()) == pytest.approx(3, rel=0.05)
    assert bool(((active[there] >= 0.5) & (active[there] <= 1.5)).all())
    torch.testing.assert_close(there.float().mean(0), data.frequencies, atol=0.03, rtol=0)
    torch.testing.assert_close(data.directions.norm(dim=1), torch.ones(40))
    assert torch.equal(data.batch(3)[SITE], x)


def test_a_batch_depends_on_the_seed_and_the_step_alone():
    one, two = Features(n=20, d=8, active=2, batch=16), Features(n=20, d=8, active=2, batch=16)
    two.batch(0), two.batch(5)
    assert torch.equal(one.batch(2)[SITE], two.batch(2)[SITE])
    assert not torch.equal(one.batch(2)[SITE], one.batch(3)[SITE])
    other = Features(n=20, d=8, active=2, batch=16, seed=1)
    assert not torch.equal(one.batch(2)[SITE], other.batch(2)[SITE])
    assert one.describe() == two.describe() != other.describe()
    assert isinstance(one, Source) and one.widths == {SITE: 8} and one.batch_size == 16


def test_frequencies_fall_with_rank_as_asked():
    flat, steep = (Features(n=64, d=16, active=4, skew=skew).frequencies for skew in (0.0, 1.0))
    torch.testing.assert_close(flat, torch.full((64,), 4 / 64))
    assert bool((steep.diff() < 0).all()) and float(steep.sum()) == pytest.approx(4, rel=1e-4)


def test_features_are_spread_out_more_than_chance():
    found = Features(n=64, d=16).directions
    chance = torch.nn.functional.normalize(torch.randn(64, 16, generator=torch.Generator().manual_seed(0)), dim=1)

    def closest(v: torch.Tensor) -> float:
        return float((v @ v.T - 2 * torch.eye(64)).max(dim=1).values.mean())

    assert closest(found) < closest(chance) - 0.05


def test_recovery_is_the_mean_over_features_of_the_best_cosine():
    data = Features(n=32, d=16, active=2)
    assert data.recovered(data.directions.flip(0) * 7) == pytest.approx(1.0, abs=1e-5)
    assert data.recovered(torch.cat([data.directions, torch.randn(99, 16)])) == pytest.approx(1.0, abs=1e-5)
    half = data.recovered(data.directions[:16])
    assert 0.5 < half < 0.95
    assert data.recovered(-data.directions) < 0.7, "a direction and its opposite are two features"


def test_more_than_there_are_is_refused():
    for active in (0.0, 32.0, 40.0):
        with pytest.raises(SpecError, match="is not possible"):
            Features(n=32, d=16, active=active)
    with pytest.raises(SpecError, match="more than nine rows in ten"):
        Features(n=32, d=16, active=30.0)
