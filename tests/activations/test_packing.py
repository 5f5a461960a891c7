"""Packing: attention over suffixes laid end to end is attention of each prompt by itself."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

from assay.activations.packing import Packing
from assay.activations.recording import Attended
from assay.subjects.tokens import Batch, from_ids

HEADS, KV, D = 4, 2, 8


class Layer(nn.Module):
    """What transformers' attention functions read off an attention module."""

    num_key_value_groups = HEADS // KV
    is_causal = True
    training = False


def functions() -> dict[str, Any]:
    from transformers.integrations.sdpa_attention import sdpa_attention_forward
    from transformers.models.llama.modeling_llama import eager_attention_forward

    return {"sdpa": sdpa_attention_forward, "eager": eager_attention_forward}


def masks(kind: str, batch: Batch) -> Tensor | None:
    """A causal mask as transformers makes it: none, boolean, additive, of a sliding window, or with a bias a head."""
    if kind == "none":
        return None
    at = torch.arange(batch.width)
    seen = (at[:, None] >= at) & batch.mask.bool()[:, None, None, :]
    seen = seen | torch.eye(batch.width, dtype=torch.bool)
    if kind == "window":
        seen = seen & (at[:, None] - at < 4)
    if kind in ("boolean", "window"):
        return seen
    closed = torch.zeros(seen.shape).masked_fill(~seen, torch.finfo(torch.float32).min)
    slopes = torch.arange(1, HEADS + 1)[None, :, None, None] / 10
    return closed if kind == "additive" else closed - (at[:, None] - at).abs() * slopes


@given(
    starts=st.lists(st.integers(0, 23), min_size=1, max_size=9),
    width=st.sampled_from([1, 7, 24]),
    size=st.sampled_from([1, 3]),
    kind=st.sampled_from(["none", "boolean", "additive", "window", "heads"]),
    function=st.sampled_from(["sdpa", "eager"]),
    seed=st.integers(0, 3),
)
def test_packed_attention_is_attention_of_each_by_itself(
    starts: list[int], width: int, size: int, kind: str, function: str, seed: int
) -> None:
    starts = [start % width for start in starts]
    lengths = (width, *(max(1, width - 3), max(1, width - 5)) * (size > 1))
    batch = Batch(ids=torch.zeros(size, width, dtype=torch.long), starts=(0,) * size, lengths=lengths)
    kind = "additive" if function == "eager" and kind in ("none", "boolean", "window") else kind
    mask, attend, layer = masks(kind, batch), functions()[function], Layer()
    generator = torch.Generator().manual_seed(seed)
    key, value = (torch.randn(size, width, KV, D, generator=generator) for _ in range(2))
    packing = Packing(batch, starts, batch.ids.device)
    n = sum(size * (width - start) for start in starts)
    assert len(packing.columns) == len(packing.rows) == packing.spans[-1].stop == n, "no token too many"
    q, k, v = (torch.randn(1, heads, n, D, generator=generator) for heads in (HEADS, KV, KV))
    attended = Attended(key=key, value=value, mask=mask, causal=True, others=frozenset())
    found = packing.attend(attend, layer, (q, k, v), attended, {"scaling": 0.3})
    for start, span in zip(starts, packing.spans, strict=True):
        own = [x[0, :, span].unflatten(1, (size, -1)).transpose(0, 1) for x in (q, k, v)]  # type: ignore[no-untyped-call]
        keys, values = (
            torch.cat([base.transpose(1, 2)[:, :, :start], new], 2) for base, new in ((key, own[1]), (value, own[2]))
        )
        query = torch.cat([torch.zeros(size, HEADS, start, D), own[0]], 2)  # as long as the keys: causal from the top
        expected = attend(layer, query, keys, values, mask, scaling=0.3)[0][:, start:]
        assert torch.allclose(found[span], expected.flatten(0, 1), atol=1e-5)


def test_each_column_of_each_suffix_is_found() -> None:
    batch = from_ids(torch.arange(10).view(2, 5))
    packing = Packing(batch, [3, 0], batch.ids.device)
    pool = torch.cat([batch.ids.flatten(), 100 * (1 + packing.rows) + packing.columns])
    assert pool[packing.source].tolist() == [
        [0, 1, 2, 103, 104],
        [5, 6, 7, 203, 204],
        [100, 101, 102, 103, 104],
        [200, 201, 202, 203, 204],
    ]
    assert packing.spans == [slice(0, 4), slice(4, 14)]


@pytest.mark.parametrize("width", [32, 200])
def test_attention_works_on_little_more_than_it_must(width: int) -> None:
    """Entries times keys, against the least there can be: each token and the columns up to its row's end."""
    batch = from_ids(torch.zeros(1, width, dtype=torch.long))
    starts = [start for _ in range(2) for start in range(width)]
    rows, _ = Packing(batch, starts, batch.ids.device)._classes
    worked = sum(r.tokens.numel() * r.keys.shape[1] for r in rows)
    assert worked < 1.6 * sum((width - start) * width for start in starts)
    assert len(rows) <= 2 + max(0, width // 16).bit_length()
