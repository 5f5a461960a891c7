"""Selections are exact. With small whole numbers the product is exact in any order, and ties are everywhere."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from assay.base.errors import NumericalError, SpecError
from assay.dictionaries.kernels.backend import Backend
from assay.dictionaries.kernels.compiled import Compiled
from assay.dictionaries.latents import SparseLatents

pytestmark = pytest.mark.usefixtures("tiles")

Encoder = tuple[Tensor, Tensor, Tensor]
SIZES = st.tuples(st.integers(1, 14), st.integers(1, 6), st.integers(1, 300), st.integers(0, 10_000))


def encoder(n: int, d: int, F: int, seed: int, whole: bool = True) -> Encoder:
    generator = torch.Generator().manual_seed(seed)
    x, W, b = (torch.randn(*shape, generator=generator) for shape in ((n, d), (F, d), (F,)))
    return (x.round(), W.round(), b.round()) if whole else (x, W, b)


def keep_in_order(h: Tensor, k: int) -> Tensor:
    """The k largest above 0 of a list, ties in favour of the earlier, the rest 0: by sorting all of it."""
    order = sorted(range(len(h)), key=lambda i: (-float(h[i]), i))[:k]
    kept = torch.zeros_like(h)
    kept[order] = h[order].clamp(min=0)
    return kept


def same(pairs: SparseLatents, dense: Tensor) -> None:
    assert torch.equal(pairs.to_dense(), dense)
    assert torch.equal(pairs.counts, (dense != 0).sum(dim=1))  # and no latent is there twice, or with 0
    assert (pairs.offsets.dtype, pairs.latents.dtype, pairs.values.dtype) == (torch.int64, torch.int32, torch.float32)
    flat = pairs.rows * pairs.n_latents + pairs.latents
    assert bool((flat.diff() > 0).all())  # ascending inside a row


@given(sizes=SIZES, share=st.floats(0, 1))
def test_row_selection_is_a_sort(path: Backend, sizes: tuple[int, int, int, int], share: float) -> None:
    x, W, b = encoder(*sizes)
    k = max(1, round(share * len(W)))
    h = x @ W.T + b
    same(path.select_rows(x, W, b, k), torch.stack([keep_in_order(row, k) for row in h]))


@given(sizes=SIZES, share=st.floats(0, 1))
def test_batch_selection_is_a_sort_of_everything(path: Backend, sizes: tuple[int, int, int, int], share: float) -> None:
    x, W, b = encoder(*sizes)
    h = x @ W.T + b
    total = max(1, round(share * h.numel()))
    pairs, bound = path.select_batch(x, W, b, total)
    same(pairs, keep_in_order(h.flatten(), total).reshape(h.shape))
    assert bound == (float(pairs.values.min()) if len(pairs.values) else 0.0)


@given(sizes=SIZES)
def test_above_is_a_comparison(path: Backend, sizes: tuple[int, int, int, int]) -> None:
    x, W, b = encoder(*sizes)
    bound = torch.randint(-3, 3, (len(W),), generator=torch.Generator().manual_seed(sizes[-1])).float()
    h = x @ W.T + b
    pairs = path.select_above(x, W, b, bound)
    kept = torch.zeros_like(h)
    kept[pairs.rows, pairs.latents.long()] = 1
    assert torch.equal(kept == 1, h > bound)
    assert torch.equal(pairs.values, h[h > bound])


def test_values_and_sets_are_those_of_topk(path: Backend) -> None:
    x, W, b = encoder(60, 24, 1000, 0, whole=False)
    h = x @ W.T + b
    pairs = path.select_rows(x, W, b, 20)
    values, latents = h.topk(20, dim=1)
    assert torch.allclose(pairs.values.reshape(60, 20).sort(descending=True).values, values, rtol=1e-5, atol=1e-5)
    assert torch.equal(pairs.latents.reshape(60, 20).long(), latents.sort().values)
    chosen, bound = path.select_batch(x, W, b, 1200)
    values, cells = h.flatten().topk(1200)
    assert torch.allclose(chosen.values.sort(descending=True).values, values, rtol=1e-5, atol=1e-5)
    assert torch.equal(chosen.rows * 1000 + chosen.latents, cells.sort().values)
    assert math.isclose(bound, float(values[-1]), rel_tol=1e-5)


def test_all_of_a_row_may_be_asked_for(path: Backend) -> None:
    x, W, b = encoder(9, 4, 500, 1)
    h = (x @ W.T + b).clamp(min=0)
    same(path.select_rows(x, W, b, 500), h)
    same(path.select_batch(x, W, b, h.numel())[0], h)


def test_rows_with_nothing_above_zero_are_empty(path: Backend) -> None:
    x, W, _ = encoder(9, 4, 150, 2)
    low = torch.full((150,), -100.0)
    assert path.select_rows(x, W, low, 3).counts.tolist() == [0] * 9
    pairs, bound = path.select_batch(x, W, low, 30)
    assert (pairs.counts.tolist(), bound) == ([0] * 9, 0.0)
    some = low.clone()
    some[[3, 140]] = 200.0
    assert path.select_rows(x, W, some, 5).latents.tolist() == [3, 140] * 9


def test_no_rows_give_no_pairs(path: Backend) -> None:
    _, W, b = encoder(1, 4, 20, 3)
    x = torch.empty(0, 4)
    assert path.select_rows(x, W, b, 3).n_rows == path.select_above(x, W, b, b).n_rows == 0


def test_one_row_may_take_the_whole_batch(path: Backend) -> None:
    x, W, b = encoder(40, 8, 400, 4, whole=False)
    x[17] *= 1000
    h = x @ W.T
    pairs, _ = path.select_batch(x, W, torch.zeros_like(b), 100)
    assert int(pairs.counts[17]) == 100
    assert torch.equal(pairs.latents.long(), h[17].topk(100).indices.sort().values)


@pytest.mark.parametrize("guess", [0.0, 1.5, 1e9])
def test_a_wrong_guess_of_the_bound_changes_nothing(
    both: tuple[Backend, Backend], monkeypatch: pytest.MonkeyPatch, guess: float
) -> None:
    x, W, b = encoder(40, 8, 400, 5)
    expected, bound = both[0].select_batch(x, W, b, 300)
    monkeypatch.setattr(Compiled, "_guess", lambda *_: guess)
    found, least = both[1].select_batch(x, W, b, 300)
    same(found, expected.to_dense())
    assert least == bound


def test_large_batches_are_sampled(both: tuple[Backend, Backend]) -> None:
    x, W, b = encoder(500, 6, 700, 6)
    h = x @ W.T + b
    for total in (1, 500, 100_000):
        chosen = [path.select_batch(x, W, b, total)[0] for path in both]
        same(chosen[1], chosen[0].to_dense())
        assert len(chosen[1].values) == min(total, int((h > 0).sum()))


def test_a_slice_of_the_input_is_read_as_it_is(path: Backend) -> None:
    x, W, b = encoder(10, 8, 90, 7)
    part = x[::2, :]
    same(path.select_rows(part, W, b, 4), path.select_rows(part.clone(), W, b, 4).to_dense())


SELECT: dict[str, Callable[[Backend, Tensor, Tensor, Tensor], object]] = {
    "rows": lambda path, x, W, b: path.select_rows(x, W, b, 2),
    "batch": lambda path, x, W, b: path.select_batch(x, W, b, 2),
    "above": lambda path, x, W, b: path.select_above(x, W, b, b),
}


@pytest.mark.parametrize("which", SELECT)
@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_rows_that_are_not_finite_are_refused(path: Backend, which: str, value: float) -> None:
    x, W, b = encoder(9, 4, 20, 8)
    x[6, 2] = value
    with pytest.raises(NumericalError, match="row 6 of x"):
        SELECT[which](path, x, W, b)


@pytest.mark.parametrize("which", SELECT)
def test_what_does_not_fit_is_refused(path: Backend, bare: Any, which: str) -> None:
    x, W, b = encoder(9, 4, 20, 9)
    wrong = {
        "x is torch.float64": (x.double(), W, b),
        r"W is torch.bfloat16": (x, W.bfloat16(), b),
        r"x has the shape \[9, 3\]": (x[:, :3], W, b),
        r"b has the shape \[19\]": (x, W, b[:19]),
        "W is not contiguous": (x, torch.randn(4, 20).T, b),
    }
    for message, given_ in wrong.items():
        with pytest.raises(SpecError, match=message):
            SELECT[which](bare, *given_)


@pytest.mark.parametrize("k", [0, -1, 21])
def test_a_number_of_latents_that_there_is_not_is_refused(path: Backend, k: int) -> None:
    x, W, b = encoder(9, 4, 20, 10)
    with pytest.raises(SpecError, match=f"k is {k}, and W has 20"):
        path.select_rows(x, W, b, k)
    with pytest.raises(SpecError, match="the batch has 180"):
        path.select_batch(x, W, b, 9 * k if k < 1 else 181)
