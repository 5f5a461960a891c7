"""Lazy logits: any index gives what the full logits give there, and no more is unembedded than that."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from assay.activations.lazy import Known, LazyLogits

ROWS, WIDTH, D, VOCAB = 6, 5, 4, 11
WEIGHT = torch.randn(D, VOCAB, generator=torch.Generator().manual_seed(0))
STREAM = torch.randn(ROWS * WIDTH, D, generator=torch.Generator().manual_seed(1))
INDEX = torch.arange(ROWS * WIDTH).view(ROWS, WIDTH)
FULL = (STREAM @ WEIGHT).view(ROWS, WIDTH, VOCAB)
IDS = torch.tensor([3, 9, 3, 0, 10, 7])


def lazy(asked: list[int] | None = None) -> LazyLogits:
    """Lazy logits of `FULL`, noting how many entries are computed."""

    def unembed(hidden: Tensor, ids: Tensor | None) -> Tensor:
        logits = hidden @ (WEIGHT if ids is None else WEIGHT[:, ids])
        if asked is not None:
            asked.append(logits.numel())
        return logits

    return LazyLogits(Known(STREAM, INDEX), unembed, VOCAB)


KEYS: list[Any] = [
    (slice(None), -1),
    (slice(None), 2, 5),
    (slice(None), -1, -2),
    (slice(1, 4), 0, [7, 3, 7]),
    (slice(None), -1, IDS),
    (torch.arange(ROWS), -1, IDS),
    ([0, 4], -1, [3, 4]),
    (torch.tensor([0, 5]), 1),
    (torch.tensor([True, False, True, False, True, False]), 1, 2),
    (2, -1),
    (2, -1, 4),
    (slice(None), -1, slice(2, 6)),
    (slice(None), -1, IDS[:4].view(2, 2)),
    (..., -1, slice(None)),
    (Ellipsis, 3),
    (slice(None), slice(1, 3)),
    (slice(None), [1, 3], 5),
    3,
    (slice(None), torch.tensor(2), torch.tensor(4)),
    (slice(None), None, 2),
]


@pytest.mark.parametrize("key", KEYS, ids=str)
def test_any_index_is_that_of_the_full_logits(key: Any) -> None:
    found, expected = lazy()[key], FULL[key]
    assert found.shape == expected.shape
    assert torch.allclose(found, expected, atol=1e-6)
    if not isinstance(key, tuple) or not isinstance(key[0], Tensor):
        assert torch.allclose(lazy().rows(1, 6)[key], FULL[1:6][key], atol=1e-6)


def test_no_more_is_computed_than_is_looked_at() -> None:
    asked: list[int] = []
    logits = lazy(asked)
    assert torch.allclose(logits[:, -1, 3] - logits[:, -1, 5], FULL[:, -1, 3] - FULL[:, -1, 5], atol=1e-6)
    assert asked == [ROWS, ROWS], "one entry of each row, twice"
    assert torch.allclose(logits.rows(2, 4)[:, -1], FULL[2:4, -1], atol=1e-6)
    assert asked[2:] == [ROWS * VOCAB], "one position of all rows"
    assert torch.equal(logits[:, -1, 3], logits[:, -1][:, 3])
    assert len(asked) == 3, "a position is computed once"
    assert torch.allclose(logits.softmax(-1), FULL.softmax(-1), atol=1e-6)
    assert torch.allclose(logits[:, 0], FULL[:, 0], atol=1e-6)
    assert asked[3:] == [FULL.numel()]


def test_tokens_that_rows_share_are_unembedded_once() -> None:
    asked: list[int] = []
    index = torch.tensor([[0, 1, 2, 3, 4], [0, 1, 2, 8, 9], [0, 1, 2, 13, 14]])

    def unembed(hidden: Tensor, ids: Tensor | None) -> Tensor:
        asked.append(len(hidden))
        return hidden @ WEIGHT

    logits = LazyLogits(Known(STREAM, index), unembed, VOCAB)
    assert torch.allclose(logits.full(), (STREAM @ WEIGHT)[index], atol=1e-6)
    assert asked == [9]


def test_functions_operators_and_attributes_see_all_logits() -> None:
    logits = lazy()
    assert torch.allclose(torch.logsumexp(logits, -1), FULL.logsumexp(-1), atol=1e-6)  # type: ignore[call-overload]
    assert torch.allclose(logits - logits.mean(-1, keepdim=True), FULL - FULL.mean(-1, keepdim=True), atol=1e-6)
    assert torch.allclose(2 * logits, 2 * FULL, atol=1e-6)  # type: ignore[operator]
    assert torch.equal(torch.stack([logits, logits])[0], logits.full())  # type: ignore[list-item]
    assert (logits.shape, logits.ndim, len(logits), logits.size(1)) == (FULL.shape, 3, ROWS, WIDTH)
    assert (logits.dtype, logits.device) == (FULL.dtype, FULL.device)


@pytest.mark.parametrize("key", [(slice(None), 5), (slice(None), -6), (slice(None), 0, 11), (slice(None), 0, [0, -12])])
def test_what_is_outside_is_refused(key: Any) -> None:
    with pytest.raises(IndexError):
        lazy()[key]
