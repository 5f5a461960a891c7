"""Decoding, gradients and the fused step against autograd of the dense formula and `torch.optim.Adam`."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from assay.base.errors import SpecError
from assay.dictionaries.kernels.backend import Backend
from assay.dictionaries.kernels.values import AdamStep, ByLatent, Moments
from assay.dictionaries.latents import SparseLatents

pytestmark = pytest.mark.usefixtures("tiles")

TOLERANCE = 1e-5


@dataclass
class Weights:
    W_dec: Tensor
    W_enc: Tensor
    b_enc: Tensor
    b_dec: Tensor

    def clone(self) -> Weights:
        return Weights(*(getattr(self, name).clone() for name in ("W_dec", "W_enc", "b_enc", "b_dec")))


def problem(n: int = 33, d: int = 19, m: int = 21, F: int = 150, seed: int = 0) -> tuple[Tensor, Tensor, Weights]:
    generator = torch.Generator().manual_seed(seed)
    shapes = ((n, d), (n, m), (F, m), (F, d), (F,), (m,))
    x, y, W_dec, W_enc, b_enc, b_dec = (torch.randn(*shape, generator=generator) for shape in shapes)
    return x, y, Weights(W_dec / W_dec.norm(dim=1, keepdim=True), W_enc, b_enc, b_dec)


def relative(found: Tensor, expected: Tensor) -> float:
    return float((found - expected).norm() / expected.norm().clamp(min=1e-30))


def part_of(pairs: SparseLatents, keep: Tensor) -> SparseLatents:
    """Some of the pairs, of the same rows."""
    counts = torch.bincount(pairs.rows[keep], minlength=pairs.n_rows)
    offsets = torch.cat([torch.zeros(1, dtype=torch.int64), counts.cumsum(0)])
    return replace(pairs, offsets=offsets, latents=pairs.latents[keep], values=pairs.values[keep])


def grouped_by_latent(path: Backend, *stacked: tuple[SparseLatents, Tensor], F: int) -> ByLatent:
    rows = torch.cat([pairs.rows + i * pairs.n_rows for i, (pairs, _) in enumerate(stacked)]).to(torch.int32)
    latents = torch.cat([pairs.latents for pairs, _ in stacked])
    values = torch.cat([pairs.values for pairs, _ in stacked])
    return path.by_latent(rows, latents, values, torch.cat([slopes for _, slopes in stacked]), F)


@pytest.mark.parametrize("k", [1, 7, 150])
def test_decoding_is_the_dense_product(path: Backend, k: int) -> None:
    x, y, w = problem()
    pairs = path.select_rows(x, w.W_enc, w.b_enc, k)
    dense = pairs.to_dense().double()
    expected = dense @ w.W_dec.double() + w.b_dec
    assert relative(path.decode(pairs, w.W_dec, w.b_dec), expected) < TOLERANCE
    R, slopes, squares = path.residual(pairs, w.W_dec, w.b_dec, y, 0.25)
    error = expected - y
    assert relative(R, 0.25 * error) < TOLERANCE
    assert relative(squares, (error**2).sum(dim=1)) < TOLERANCE
    dots = 0.25 * error @ w.W_dec.double().T
    assert relative(slopes, dots[pairs.rows, pairs.latents.long()]) < TOLERANCE
    assert relative(path.slopes(pairs, R, w.W_dec), dots[pairs.rows, pairs.latents.long()]) < TOLERANCE


def test_slopes_of_other_rows(path: Backend) -> None:
    x, _, w = problem()
    pairs = path.select_rows(x, w.W_enc, w.b_enc, 5)
    R = torch.randn(70, 21, generator=torch.Generator().manual_seed(1))
    rows = torch.randint(70, pairs.latents.shape, generator=torch.Generator().manual_seed(2))
    expected = (R.double() @ w.W_dec.double().T)[rows, pairs.latents.long()]
    for dtype in (torch.int32, torch.int64):
        assert relative(path.slopes(pairs, R, w.W_dec, rows.to(dtype)), expected) < TOLERANCE


@given(
    pairs=st.lists(st.tuples(st.integers(0, 9), st.integers(0, 6)), max_size=40),
    extra=st.integers(0, 3),
)
def test_sorting_by_latent_is_stable(path: Backend, pairs: list[tuple[int, int]], extra: int) -> None:
    n = len(pairs)
    rows = torch.tensor([row for row, _ in pairs], dtype=torch.int32)
    latents = torch.tensor([latent for _, latent in pairs], dtype=torch.int32)
    values = torch.arange(n, dtype=torch.float32)
    found = path.by_latent(rows, latents, values, -values, 7 + extra)
    order = sorted(range(n), key=lambda i: pairs[i][1])
    assert found.values.tolist() == [float(i) for i in order] == [-slope for slope in found.slopes.tolist()]
    assert found.rows.tolist() == [pairs[i][0] for i in order]
    counts = [sum(latent == f for _, latent in pairs) for f in range(7 + extra)]
    assert found.offsets.diff().tolist() == counts and int(found.offsets[0]) == 0


def dense_gradients(x: Tensor, y: Tensor, w: Weights, mask: Tensor, shifted: bool, penalty: Tensor) -> list[Tensor]:
    """Autograd in float64 of |full - y|²/n + 0.5 |first half's part - y|²/n + penalty . norms of the decoder's rows."""
    named = [tensor.double().requires_grad_() for tensor in (w.W_dec, w.W_enc, w.b_enc, w.b_dec)]
    W_dec, W_enc, b_enc, b_dec = named
    z = ((x - b_dec if shifted else x.double()) @ W_enc.T + b_enc) * mask
    half = len(W_dec) // 2
    full = z @ W_dec + b_dec
    prefix = z[:, :half] @ W_dec[:half] + b_dec
    loss = ((full - y) ** 2).sum() / len(x) + 0.5 * ((prefix - y) ** 2).sum() / len(x)
    (loss + (penalty * W_dec.norm(dim=1)).sum()).backward()
    return [tensor.grad for tensor in named if tensor.grad is not None]


@dataclass
class Sparse:
    """The same loss by the kernels: two residuals, stacked."""

    grouped: ByLatent
    R: Tensor
    X: Tensor
    options: dict[str, Any]
    mask: Tensor


def sparse_parts(
    path: Backend, x: Tensor, y: Tensor, w: Weights, shifted: bool, penalty: Tensor | None, k: int = 6
) -> Sparse:
    centred = x - w.b_dec if shifted else x
    pairs = path.select_rows(centred, w.W_enc, w.b_enc, k)
    prefix = part_of(pairs, pairs.latents < len(w.W_dec) // 2)
    R1, s1, _ = path.residual(pairs, w.W_dec, w.b_dec, y, 2.0 / len(x))
    R2, s2, _ = path.residual(prefix, w.W_dec, w.b_dec, y, 1.0 / len(x))
    options: dict[str, Any] = {"shift": w.b_dec} if shifted else {}
    if penalty is not None:
        options["pull"] = penalty / w.W_dec.norm(dim=1)
    return Sparse(
        grouped=grouped_by_latent(path, (pairs, s1), (prefix, s2), F=len(w.W_dec)),
        R=torch.cat([R1, R2]),
        X=x,
        options=options,
        mask=pairs.to_dense() != 0,
    )


@pytest.mark.parametrize(("shifted", "k"), [(False, 6), (True, 6), (True, 70)])  # 70 of 150: formed as matrices
def test_gradients_are_those_of_autograd(path: Backend, shifted: bool, k: int) -> None:
    x, y, w = problem(d=21 if shifted else 19)
    penalty = 0.1 * torch.rand(len(w.W_dec), generator=torch.Generator().manual_seed(3))
    s = sparse_parts(path, x, y, w, shifted, penalty, k)
    expected = dense_gradients(x, y, w, s.mask, shifted, penalty)
    g_dec, g_enc, g_b = path.gradients(s.grouped, s.R, s.X, W_dec=w.W_dec, **s.options)
    w_before, moments = w.clone(), Moments.zeros(w.W_dec, w.W_enc)
    adam = AdamStep(lr=1e-3, step=1)
    told, pulled = path.update(s.grouped, s.R, s.X, w.W_dec, w.W_enc, w.b_enc, moments, adam, **s.options)
    g_b_dec = s.R.sum(dim=0) - (pulled if shifted else 0)
    for found, right in zip((g_dec, g_enc, g_b, g_b_dec), expected, strict=True):
        assert relative(found, right) < TOLERANCE
    assert relative(told, expected[2]) < TOLERANCE
    assert relative(pulled, expected[2] @ w_before.W_enc.double()) < TOLERANCE
    for moment, gradient in ((moments.m_dec, g_dec), (moments.m_enc, g_enc), (moments.m_b, g_b)):
        assert relative(moment, 0.1 * gradient) < TOLERANCE
    for moment, gradient in ((moments.v_dec, g_dec), (moments.v_enc, g_enc), (moments.v_b, g_b)):
        assert relative(moment, 0.001 * gradient**2) < TOLERANCE


@pytest.mark.parametrize("unit_norm", [False, True])
def test_steps_are_those_of_torch_adam(path: Backend, unit_norm: bool) -> None:
    x, y, w = problem(d=21)
    penalty = None if unit_norm else 0.1 * torch.rand(len(w.W_dec), generator=torch.Generator().manual_seed(3))
    reference = w.clone()
    tensors = [reference.W_dec, reference.W_enc, reference.b_enc]
    optimizer = torch.optim.Adam(tensors, lr=1e-2, betas=(0.8, 0.99), eps=1e-6)
    moments = Moments.zeros(w.W_dec, w.W_enc)
    for step in range(1, 7):
        rows = slice(5 * step - 5, 5 * step)  # other latents are active at each step
        s = sparse_parts(path, x[rows].clone(), y[rows].clone(), w, True, penalty)
        gradients = list(path.gradients(s.grouped, s.R, s.X, W_dec=w.W_dec, **s.options))
        if unit_norm:
            gradients[0] -= (gradients[0] * reference.W_dec).sum(dim=1, keepdim=True) * reference.W_dec
        for tensor, gradient in zip(tensors, gradients, strict=True):
            tensor.grad = gradient
        optimizer.step()
        if unit_norm:
            reference.W_dec /= reference.W_dec.norm(dim=1, keepdim=True)
        adam = AdamStep(lr=1e-2, step=step, beta1=0.8, beta2=0.99, eps=1e-6)
        path.update(*(s.grouped, s.R, s.X, w.W_dec, w.W_enc, w.b_enc, moments, adam), unit_norm=unit_norm, **s.options)
        for found, right in zip((w.W_dec, w.W_enc, w.b_enc), tensors, strict=True):
            assert torch.allclose(found, right, rtol=1e-5, atol=1e-6)
    if unit_norm:
        assert torch.allclose(w.W_dec.norm(dim=1), torch.ones(len(w.W_dec)), atol=1e-6)


def test_a_step_without_pairs_lets_moments_decay(path: Backend) -> None:
    x, _, w = problem()
    moments = Moments.zeros(w.W_dec, w.W_enc)
    moments.m_enc.fill_(1.0)
    moments.v_enc.fill_(4.0)
    before = w.clone()
    none = torch.empty(0, dtype=torch.int32)
    grouped = path.by_latent(none, none, torch.empty(0), torch.empty(0), len(w.W_dec))
    adam = AdamStep(lr=0.1, step=100)
    g_b, pulled = path.update(grouped, torch.zeros(33, 21), x, w.W_dec, w.W_enc, w.b_enc, moments, adam)
    assert not g_b.any() and not pulled.any()
    assert torch.equal(w.W_dec, before.W_dec) and torch.equal(w.b_enc, before.b_enc)
    mean, square = 0.9 / (1 - 0.9**100), 0.999 * 4 / (1 - 0.999**100)
    assert torch.allclose(w.W_enc, before.W_enc - 0.1 * mean / square**0.5)
    assert torch.allclose(moments.m_enc, torch.tensor(0.9)) and torch.allclose(moments.v_enc, torch.tensor(3.996))


def test_empty_rows_decode_to_the_bias(path: Backend) -> None:
    x, y, w = problem()
    pairs = path.select_rows(x, w.W_enc, torch.full_like(w.b_enc, -1e3), 4)
    assert torch.equal(path.decode(pairs, w.W_dec, w.b_dec), w.b_dec.expand(33, 21))
    R, slopes, _ = path.residual(pairs, w.W_dec, w.b_dec, y, 1.0)
    assert len(slopes) == 0
    assert torch.equal(R, w.b_dec - y)


def test_a_decoder_row_of_zeros_stays_finite(path: Backend) -> None:
    x, y, w = problem()
    w.W_dec[3] = 0
    moments = Moments.zeros(w.W_dec, w.W_enc)
    none = torch.empty(0, dtype=torch.int32)
    grouped = path.by_latent(none, none, torch.empty(0), torch.empty(0), len(w.W_dec))
    adam = AdamStep(lr=0.1, step=1)
    path.update(grouped, y * 0, x, w.W_dec, w.W_enc, w.b_enc, moments, adam, unit_norm=True)
    assert not w.W_dec[3].any() and bool(torch.isfinite(w.W_dec).all())


def whole_step(path: Backend, seed: int = 0) -> list[Tensor]:
    """Everything that a few steps of one path give."""
    x, y, w = problem(n=200, F=400, d=21, seed=seed)
    moments, given_ = Moments.zeros(w.W_dec, w.W_enc), []
    for step in range(1, 4):
        s = sparse_parts(path, x, y, w, True, None, k=9)
        given_ += path.update(
            *(s.grouped, s.R, s.X, w.W_dec, w.W_enc, w.b_enc, moments, AdamStep(lr=1e-3, step=step)), **s.options
        )
    pairs, _ = path.select_batch(x, w.W_enc, w.b_enc, 900)
    above = path.select_above(x, w.W_enc, w.b_enc, w.b_enc)
    return [w.W_dec, w.W_enc, w.b_enc, moments.m_dec, *given_, pairs.values, pairs.latents, above.values]


def test_the_same_bits_again(path: Backend) -> None:
    for first, second in zip(whole_step(path), whole_step(path), strict=True):
        assert torch.equal(first, second)


@pytest.mark.parametrize("tiles", [False], indirect=True)  # waking threads for tiny tiles takes long
def test_two_threads_give_what_one_gives(path: Backend) -> None:
    one = whole_step(path)
    assert torch.get_num_threads() == 1
    torch.set_num_threads(2)
    try:
        two, again = whole_step(path), whole_step(path)
    finally:
        torch.set_num_threads(1)
    for first, second, third in zip(one, two, again, strict=True):
        assert torch.equal(second, third)
        assert relative(second.double(), first.double()) < 1e-6


@pytest.mark.parametrize("seed", range(3))
def test_the_paths_agree(both: tuple[Backend, Backend], seed: int) -> None:
    for first, second in zip(*(whole_step(path, seed) for path in both), strict=True):
        assert relative(second.double(), first.double()) < TOLERANCE


def test_what_does_not_fit_is_refused_and_changes_nothing(path: Backend, bare: Any) -> None:
    x, y, w = problem(d=21)
    s = sparse_parts(path, x, y, w, False, None)
    moments, adam = Moments.zeros(w.W_dec, w.W_enc), AdamStep(lr=0.1, step=1)
    good: dict[str, Any] = {"grouped": s.grouped, "R": s.R, "X": s.X, "W_dec": w.W_dec, "W_enc": w.W_enc}
    good |= {"b_enc": w.b_enc, "moments": moments, "adam": adam}
    F = len(w.W_dec)
    wrong: dict[str, dict[str, Any]] = {
        "R is torch.float64": {"R": s.R.double()},
        "no multiple of the": {"R": s.R[:60].clone(), "grouped": replace(s.grouped, rows=s.grouped.rows % 60)},
        "grouped.rows go from 0 to": {"R": s.R[:33].clone()},
        "grouped.rows is torch.int64": {"grouped": replace(s.grouped, rows=s.grouped.rows.long())},
        "grouped.offsets must rise": {"grouped": replace(s.grouped, offsets=s.grouped.offsets + 1)},
        r"W_enc has the shape \[150, 20\]": {"W_enc": torch.zeros(F, 20)},
        "b_enc is torch.float16": {"b_enc": w.b_enc.half()},
        "W_dec is not contiguous": {"W_dec": torch.zeros(21, F).T},
        r"moments.m_dec has the shape": {"moments": Moments.zeros(w.W_dec[:3], w.W_enc[:3])},
        r"pull has the shape \[3\]": {"pull": torch.zeros(3)},
        r"shift has the shape \[3\]": {"shift": torch.zeros(3)},
    }
    before = w.clone()
    for message, change in wrong.items():
        with pytest.raises(SpecError, match=message):
            bare.update(**(good | change))
    assert torch.equal(w.W_dec, before.W_dec) and torch.equal(w.W_enc, before.W_enc) and not moments.m_dec.any()
    with pytest.raises(SpecError, match="give W_dec as well"):
        bare.gradients(s.grouped, s.R, s.X, pull=torch.zeros(F))


def test_pairs_that_do_not_fit_are_refused(path: Backend, bare: Any) -> None:
    x, y, w = problem()
    pairs = path.select_rows(x, w.W_enc, w.b_enc, 3)
    with pytest.raises(SpecError, match="the pairs are of 150 latents and W_dec has 149"):
        bare.decode(pairs, w.W_dec[:149], w.b_dec)
    with pytest.raises(SpecError, match=r"bias has the shape \[20\]"):
        bare.decode(pairs, w.W_dec, w.b_dec[:20])
    with pytest.raises(SpecError, match="33 rows where there are 32"):
        bare.residual(pairs, w.W_dec, w.b_dec, y[:32], 1.0)
    with pytest.raises(SpecError, match="rows go from"):
        bare.slopes(pairs, y[:5], w.W_dec, pairs.rows)
    with pytest.raises(SpecError, match=r"pairs.latents is torch.int64"):
        bare.decode(replace(pairs, latents=pairs.latents.long()), w.W_dec, w.b_dec)
    with pytest.raises(SpecError, match=r"latents go from 0 to 7, and must lie in 0 \.\. 6"):
        bare.by_latent(*torch.tensor([[0, 0], [0, 7]], dtype=torch.int32), torch.ones(2), torch.ones(2), 7)


def test_indices_outside_are_refused_before_c_follows_them(both: tuple[Backend, Backend]) -> None:
    x, _, w = problem()
    pairs = both[1].select_rows(x, w.W_enc, w.b_enc, 3)
    for latent in (-1, 150):
        outside = pairs.latents.clone()
        outside[5] = latent
        with pytest.raises(SpecError, match=r"pairs\.latents go from"):
            both[1].decode(replace(pairs, latents=outside), w.W_dec, w.b_dec)
    with pytest.raises(SpecError, match=r"pairs\.offsets must rise"):
        both[1].decode(replace(pairs, offsets=pairs.offsets.flip(0)), w.W_dec, w.b_dec)
