"""The fast rotations are orthogonal, mix everything with everything, and point nowhere in particular."""

from __future__ import annotations

import math

import numpy as np
import pytest
import scipy.stats
import torch

from assay.base.rng import torch_stream
from assay.controls.rotations import DENSE_UP_TO, MIXED_UP_TO, Mixing, Rotations, SignedPermutation, grid, haar

# one number, dense, two factors of a grid, prime (two layers), a prime next to a square, long
SIDES = [1, 2, 32, 96, 97, 100, 192, 576, 577, 1021]


def matrix(d, seed=0, name="q"):
    rotation = Rotations(seed, ("test",)).draw(d, torch_stream(seed, name))
    return rotation(torch.eye(d, dtype=torch.float64))


@pytest.mark.parametrize("d", SIDES)
def test_every_rotation_is_orthogonal(d):
    q = matrix(d)
    assert torch.allclose(q @ q.T, torch.eye(d, dtype=torch.float64), atol=1e-12)


@pytest.mark.parametrize("d", SIDES[2:])
def test_every_coordinate_is_mixed_with_every_other(d):
    q = matrix(d)
    layers = 1 if math.prod(grid(d)) == d else 2
    rest = d - math.prod(grid(d))  # a coordinate left over in both layers meets only part of the others
    assert float((q == 0).double().mean()) <= (rest / d) ** 2 * layers
    assert float(q.abs().max()) < 1.0 - 1e-6
    assert int((q.abs() > 1e-3 / math.sqrt(d)).sum()) > 0.9 * d * d


@pytest.mark.parametrize("d", [64, 192, 577])
def test_rotations_average_to_nothing_and_keep_no_direction(d):
    x = torch.ones(d, 1, dtype=torch.float64) / math.sqrt(d)
    rotated = [Rotations(s, ("test",)).draw(d, torch_stream(s, "q"))(x) for s in range(100)]
    draws = torch.cat(rotated, dim=1)
    cosines = (x.T @ draws).ravel()
    assert float(cosines.abs().max()) < 5 / math.sqrt(d)
    assert abs(float(cosines.mean())) < 5 / math.sqrt(d * 100)
    assert float(draws.mean(dim=1).norm()) < 1.5 / math.sqrt(100)


def test_haar_matrices_have_the_trace_of_haar_matrices():
    """Diaconis, Shahshahani 1994: the trace of a Haar orthogonal matrix is nearly N(0, 1). That of a bare QR is not."""
    q = haar(2000, 12, torch.Generator().manual_seed(0))
    assert torch.allclose(q @ q.mT, torch.eye(12, dtype=torch.float64), atol=1e-12)
    traces = q.diagonal(dim1=1, dim2=2).sum(1).numpy()
    assert scipy.stats.kstest(traces, "norm").pvalue > 0.01
    assert np.mean(torch.linalg.det(q).numpy() > 0) == pytest.approx(0.5, abs=0.05)


def test_two_rotations_of_one_draw_have_nothing_in_common():
    rotations = Rotations(0, ("test",))
    one, other = (rotations.draw(192, torch_stream(0, name))(torch.eye(192)) for name in ("a", "b"))
    overlap = (one * other).sum() / 192
    assert abs(float(overlap)) < 5 / 192
    assert float((one @ other.T).abs().max()) < 0.9
    layers = [rotations.draw(192, torch_stream(0, name)).layers[0] for name in ("a", "b")]
    for ours, theirs in zip(layers[0][1:], layers[1][1:], strict=True):
        same = (ours.abs() == theirs.abs()).all(dim=(1, 2))  # one block in one place, up to signs
        assert int(same.sum()) <= 2


def test_a_rotation_is_its_key():
    assert torch.equal(matrix(192, 3, "a"), matrix(192, 3, "a"))
    assert not torch.equal(matrix(192, 3, "a"), matrix(192, 3, "b"))
    assert not torch.equal(matrix(192, 3, "a"), matrix(192, 4, "a"))


@pytest.mark.parametrize("d", [64, 192, 577])
def test_a_transposed_matrix_is_rotated_like_a_contiguous_one(d):
    rotation = Rotations(0, ("test",)).draw(d, torch_stream(0, "q"))
    w = torch.randn(30, d, generator=torch.Generator().manual_seed(0))
    assert torch.allclose(rotation(w.T), rotation(w.T.contiguous()), atol=1e-6)
    assert torch.allclose(rotation(w.T).double(), matrix(d, name="q") @ w.T.double(), atol=1e-5)


def test_sides_longer_than_any_width_are_permuted_with_signs():
    d = MIXED_UP_TO + 1
    rotation = Rotations(0, ("test",)).draw(d, torch_stream(0, "q"))
    assert isinstance(rotation, SignedPermutation)
    x = torch.arange(1.0, d + 1)[:, None]
    y = rotation(x)
    assert torch.equal(y.abs().sort(dim=0).values, x)
    assert 0.4 < float((y < 0).float().mean()) < 0.6
    assert float((y.abs() == x).float().mean()) < 0.01
    assert torch.equal(rotation.rows(x, 10, 20), y[10:20])
    assert isinstance(Rotations(0, ("test",)).draw(MIXED_UP_TO, torch_stream(0, "q")), Mixing)


def test_the_grid_fits_and_leaves_little_over():
    for d in range(DENSE_UP_TO + 1, MIXED_UP_TO + 1):
        a, b = grid(d)
        assert a <= b <= 128, d
        assert d - 2 * math.sqrt(d) <= a * b <= d, d
