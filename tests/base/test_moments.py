"""Streamed moments are numpy's, whatever the blocks, and shrink as scikit-learn does from the rows."""

from __future__ import annotations

import tracemalloc

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import save_file
from sklearn.covariance import OAS, LedoitWolf

from assay.base.errors import DamagedFile, NumericalError, SpecError
from assay.base.moments import Moments, class_moments, read_blocks, stream_moments


def sample(n, d, seed=0, offset=0.0):
    rng = np.random.default_rng(seed)
    return offset + rng.standard_t(5, size=(n, d)) @ rng.normal(size=(d, d))


def blocks_of(rows, cuts):
    return np.split(rows, sorted(cut % (len(rows) + 1) for cut in cuts))


def close(found, expected):
    return np.abs(found - expected).max() <= 1e-10 * np.abs(expected).max()


@given(st.integers(2, 60), st.integers(1, 8), st.lists(st.integers(0, 100), max_size=6), st.sampled_from([0.0, 1e4]))
def test_any_blocks_give_what_numpy_gives(n, d, cuts, offset):
    rows = sample(n, d, seed=n, offset=offset)
    moments = stream_moments(blocks_of(rows, cuts))
    centred = rows - rows.mean(axis=0)
    squares = (centred**2).sum(axis=1)
    assert moments.n == n
    assert close(moments.mean, rows.mean(axis=0))
    assert close(moments.covariance(), np.cov(rows.T).reshape(d, d))
    assert close(moments.covariance(ddof=0), np.cov(rows.T, ddof=0).reshape(d, d))
    scale = np.sqrt(squares.sum()) * squares.sum()
    assert np.abs(moments.third - squares @ centred).max() <= 1e-10 * scale
    assert moments.fourth == pytest.approx(float(squares @ squares), rel=1e-10)


@given(st.integers(1, 30), st.integers(1, 30), st.integers(1, 30))
def test_merging_is_one_stream_in_any_order(a, b, c):
    parts = [Moments.of(sample(n, 4, seed=i, offset=10.0 * i)) for i, n in enumerate((a, b, c))]
    kept = parts[0].scatter.copy()
    left = parts[0].merge(parts[1]).merge(parts[2])
    right = parts[2].merge(parts[1].merge(parts[0]))
    for name in ("mean", "scatter", "third"):
        scale = np.abs(getattr(left, name)).max()
        assert np.abs(getattr(left, name) - getattr(right, name)).max() <= 1e-10 * scale
    assert left.fourth == pytest.approx(right.fourth, rel=1e-10)
    assert np.array_equal(parts[0].scatter, kept)


@pytest.mark.parametrize(("n", "d"), [(12, 40), (60, 20), (3000, 15)])
@pytest.mark.parametrize("offset", [0.0, 1e3])
def test_shrinkage_is_that_of_scikit_learn(n, d, offset):
    rows = sample(n, d, offset=offset)
    moments = stream_moments(np.array_split(rows, 5))
    for rule, estimator in (("ledoit-wolf", LedoitWolf()), ("oas", OAS())):
        fitted = estimator.fit(rows)
        assert moments.shrinkage(rule) == pytest.approx(fitted.shrinkage_, rel=1e-8)
        assert moments.shrunk(rule) == pytest.approx(fitted.covariance_, rel=1e-8, abs=1e-8 * moments.scatter.max() / n)
    assert close(moments.shrunk(0.0), moments.covariance(ddof=0))
    assert np.allclose(moments.shrunk(1.0), np.eye(d) * np.trace(moments.covariance(ddof=0)) / d)


def test_a_sphere_is_shrunk_all_the_way_and_still_has_its_trace():
    rows = np.random.default_rng(0).normal(size=(30, 60))
    moments = Moments.of(rows)
    assert moments.shrinkage("oas") > 0.9
    assert np.trace(moments.shrunk()) == pytest.approx(np.trace(moments.covariance(ddof=0)))
    assert np.linalg.matrix_rank(moments.shrunk()) == 60


def test_classes_are_streamed_apart():
    rows, labels = sample(40, 3), np.arange(40) % 3
    found = class_moments((rows[i : i + 7], labels[i : i + 7]) for i in range(0, 40, 7))
    for kind in range(3):
        assert close(found[kind].covariance(), np.cov(rows[labels == kind].T))
    whole = found[0].merge(found[1]).merge(found[2])
    assert close(whole.scatter, stream_moments([rows]).scatter)


@pytest.mark.parametrize("kind", ["npy", "safetensors"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_files_are_read_in_blocks(tmp_path, kind, dtype):
    rows = torch.tensor(sample(50, 6)).to(dtype)
    path = tmp_path / f"rows.{kind}"
    if kind == "npy" and dtype == torch.bfloat16:
        rows = rows.to(torch.float16)  # numpy has no bfloat16
    if kind == "npy":
        np.save(path, rows.numpy())
    else:
        save_file({"x": rows, "y": torch.zeros(3)}, path)
    blocks = list(read_blocks(path, key="x", size=8))
    assert [len(block) for block in blocks] == [8] * 6 + [2]
    assert np.array_equal(np.concatenate(blocks), rows.double().numpy())
    assert close(stream_moments(read_blocks(path, key="x", size=8)).covariance(), np.cov(rows.double().numpy().T))


def test_a_tensor_is_streamed_and_left_as_it_is():
    rows = torch.tensor(sample(20, 3), dtype=torch.float64, requires_grad=True)
    before = rows.detach().clone()
    assert close(stream_moments([rows]).covariance(), np.cov(before.numpy().T))
    assert torch.equal(rows.detach(), before)
    array = before.numpy()
    stream_moments([array])
    assert np.array_equal(array, before.numpy())


def test_memory_does_not_grow_with_the_rows():
    def peak(blocks):
        rng = np.random.default_rng(0)
        tracemalloc.start()
        stream_moments(rng.normal(size=(256, 64)) for _ in range(blocks))
        found = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        return found

    assert peak(200) < 1.1 * peak(10)


def test_bad_rows_are_refused_with_their_place(tmp_path):
    rows = sample(10, 3)
    rows[7, 1] = np.nan
    with pytest.raises(NumericalError, match=r"block 1 has 1 rows that are not finite, row 2 first"):
        stream_moments([rows[:5], rows[5:]])
    with pytest.raises(SpecError, match="at least one row"):
        stream_moments([])
    with pytest.raises(SpecError, match=r"shape \(3,\)"):
        stream_moments([np.ones(3)])
    with pytest.raises(SpecError, match="width 2 after rows of width 3"):
        stream_moments([np.ones((2, 3)), np.ones((2, 2))])
    with pytest.raises(SpecError, match="more than 1 rows, got 1"):
        Moments.of(np.ones((1, 2))).covariance()
    with pytest.raises(NumericalError, match="do not vary"):
        Moments.of(np.ones((4, 2))).shrinkage()
    with pytest.raises(SpecError, match="'ledoit-wolf', 'oas'"):
        Moments.of(np.eye(3)).shrinkage("ledoit")
    with pytest.raises(SpecError, match="one a row"):
        class_moments([(np.eye(3), [0, 1])])
    (tmp_path / "x.npy").write_bytes(b"no")
    with pytest.raises(DamagedFile, match=r"x\.npy"):
        list(read_blocks(tmp_path / "x.npy"))
    (tmp_path / "x.safetensors").write_bytes(b"no")
    with pytest.raises(DamagedFile, match="no safetensors file"):
        list(read_blocks(tmp_path / "x.safetensors"))
    save_file({"rows": torch.ones(2, 2), "line": torch.ones(2)}, tmp_path / "y.safetensors")
    with pytest.raises(SpecError, match=r"did you mean 'rows'"):
        list(read_blocks(tmp_path / "y.safetensors", key="row"))
    with pytest.raises(SpecError, match=r"shape \(2,\)"):
        list(read_blocks(tmp_path / "y.safetensors", key="line"))
    with pytest.raises(SpecError, match=r"neither \.npy nor"):
        list(read_blocks(tmp_path / "x.csv"))
