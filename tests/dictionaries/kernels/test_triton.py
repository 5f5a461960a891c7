"""The Triton programs against plain PyTorch, in the interpreter where there is no GPU; skipped without Triton."""

from __future__ import annotations

import os
from typing import Any

import pytest
import torch
from torch import Tensor

if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"  # read when Triton is imported
pytest.importorskip("triton")

from assay.base.errors import NumericalError, SpecError
from assay.dictionaries.kernels import triton as module
from assay.dictionaries.kernels.backend import Backend, backend
from assay.dictionaries.kernels.values import AdamStep, Moments
from assay.dictionaries.latents import SparseLatents

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


@pytest.fixture(scope="module", params=[False, True], ids=["whole", "chunks"])
def paths(request: pytest.FixtureRequest) -> Any:
    with pytest.MonkeyPatch.context() as patch:
        if request.param:
            patch.setattr(module, "CHUNK", 100)
            patch.setattr(module, "_BLOCK", 32)
        yield backend(DEVICE, "plain"), backend(DEVICE, "triton")


def tensors(*shapes: tuple[int, ...], seed: int = 0, whole: bool = True) -> list[Tensor]:
    generator = torch.Generator().manual_seed(seed)
    made = [torch.randn(*shape, generator=generator) for shape in shapes]
    return [(tensor.round() if whole else tensor).to(DEVICE) for tensor in made]


def same(found: SparseLatents, expected: SparseLatents) -> None:
    for name in ("offsets", "latents", "values"):
        left, right = getattr(found, name), getattr(expected, name)
        assert left.dtype == right.dtype and torch.equal(left, right), name


def relative(found: Tensor, expected: Tensor) -> float:
    return float((found - expected).norm() / expected.norm().clamp(min=1e-30))


@pytest.mark.parametrize(("F", "k"), [(1, 1), (40, 7), (50, 30)])
def test_selections_are_those_of_plain(paths: tuple[Backend, Backend], F: int, k: int) -> None:
    plain, path = paths
    for seed, shift in ((1, 0.0), (2, -100.0), (3, -3.0)):  # half, none, few above 0
        x, W, b = tensors((4, 4), (F, 4), (F,), seed=seed)
        b += shift
        same(path.select_rows(x, W, b, k), plain.select_rows(x, W, b, k))
        for total in (1, 2 * k):
            found, bound = path.select_batch(x, W, b, total)
            expected, least = plain.select_batch(x, W, b, total)
            same(found, expected)
            assert bound == least
        same(path.select_above(x, W, b, b * 2), plain.select_above(x, W, b, b * 2))


def test_values_of_any_size_are_ordered(paths: tuple[Backend, Backend]) -> None:
    plain, path = paths
    x = torch.eye(3, device=DEVICE)
    W = (10.0 ** torch.linspace(-44, 38, 50)).repeat(3, 1).T.contiguous().to(DEVICE)
    b = torch.zeros(50, device=DEVICE)
    for k in (1, 20):
        same(path.select_rows(x, W, b, k), plain.select_rows(x, W, b, k))


@pytest.mark.parametrize(("unit_norm", "options"), [(True, ()), (False, ("pull", "shift"))])
def test_steps_are_those_of_plain(paths: tuple[Backend, Backend], unit_norm: bool, options: tuple[str, ...]) -> None:
    x, y, W_enc, W_dec, b_enc, b_dec, shift, pull = tensors(
        *((5, 5), (5, 21), (12, 5), (12, 21), (12,), (21,), (5,), (12,)), whole=False
    )
    W_dec /= W_dec.norm(dim=1, keepdim=True)
    given = {name: value for name, value in (("pull", pull), ("shift", shift)) if name in options}
    results = []
    for path in paths:
        w, moments = [W_dec.clone(), W_enc.clone(), b_enc.clone()], Moments.zeros(W_dec, W_enc)
        made: list[Tensor] = []
        for step in range(1, 3):
            pairs = path.select_rows(x, w[1], w[2], 4)
            R, slopes, squares = path.residual(pairs, w[0], b_dec, y, 0.5)
            rows = torch.cat([pairs.rows, pairs.rows + 5]).to(torch.int32)  # stacked: the same loss a second time
            latents, values, twice = (torch.cat([each, each]) for each in (pairs.latents, pairs.values, slopes))
            grouped = path.by_latent(rows, latents, values, twice, 12)
            stacked = torch.cat([R, R])
            made += [R, slopes, squares, *path.gradients(grouped, stacked, x, W_dec=w[0], **given)]
            adam = AdamStep(lr=1e-2, step=step, eps=1e-3)
            made += path.update(grouped, stacked, x, *w, moments, adam, unit_norm=unit_norm, **given)
        names = ("m_dec", "v_dec", "m_enc", "v_enc", "m_b", "v_b")
        results.append([*made, *w, *(getattr(moments, name) for name in names)])
    for expected, found in zip(*results, strict=True):
        assert relative(found, expected) < 1e-5


def test_nothing_selected_is_a_step_too(paths: tuple[Backend, Backend]) -> None:
    _, path = paths
    x, W, b, bias = tensors((4, 5), (6, 5), (6,), (5,))
    pairs = path.select_rows(x, W, b - 100, 2)
    assert torch.equal(path.decode(pairs, W, bias), bias.expand(4, 5))
    R, slopes, _ = path.residual(pairs, W, bias, x, 1.0)
    grouped = path.by_latent(pairs.rows.to(torch.int32), pairs.latents, pairs.values, slopes, 6)
    before = W.clone()
    g_b, pulled = path.update(grouped, R, x, W, W.clone(), b, Moments.zeros(W, W), AdamStep(lr=0.1, step=1))
    assert torch.equal(W, before) and not g_b.any() and not pulled.any()


def test_what_does_not_fit_is_refused(paths: tuple[Backend, Backend]) -> None:
    _, path = paths
    x, W, b = tensors((4, 5), (6, 5), (6,))
    with pytest.raises(SpecError, match=r"W is torch\.float64"):
        path.select_rows(x, W.double(), b, 2)
    with pytest.raises(SpecError, match="k is 7, and W has 6"):
        path.select_rows(x, W, b, 7)
    x[2, 1] = torch.nan
    with pytest.raises(NumericalError, match="row 2 of x"):
        path.select_above(x, W, b, b)
