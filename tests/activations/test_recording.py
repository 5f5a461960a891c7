"""Recording: what a base run tells, and which runs cannot be told by their blocks."""

from __future__ import annotations

from typing import Any

import pytest
import torch

import assay
from assay.activations.recording import Recording, ReplayRefused, differs
from assay.subjects.tiny import tiny_model

IDS = torch.tensor([[5, 17, 33, 64, 9, 11, 42, 7, 3]])
NOT_PACKED = {
    "bloom": "does not call one attention function",
    "gptj": "does not call one attention function",
    "mpt": "does not call one attention function",
    "mamba": "does not call one attention function",
}


@torch.no_grad()
def record(subject: Any, ids: Any = IDS, edits: Any = ()) -> Recording:
    return Recording(subject, subject.batch(ids), edits)


def test_streams_are_those_of_a_run(family: str, tiny_module: Any) -> None:
    subject = assay.load(tiny_module(family))
    base = record(subject)
    run = subject.run(IDS, capture=["blocks.*.resid_pre", "blocks.2.resid_post"])
    names = [*(f"blocks.{i}.resid_pre" for i in range(3)), "blocks.2.resid_post"]
    assert [torch.equal(stream, run[name]) for stream, name in zip(base.streams, names, strict=True)] == [True] * 4
    assert base.why_not_packed == ""


def test_keys_and_masks_are_those_of_attention(tiny_module: Any) -> None:
    subject = assay.load(tiny_module("gemma3_text"))
    base = record(subject)
    keys = subject.run(IDS, capture="blocks.*.attn.rot_k")
    for block in range(3):
        attended = base.attended(block)
        assert torch.equal(attended.key, keys[f"blocks.{block}.attn.rot_k"])
        assert attended.causal
    windowed, whole = base.attended(0).mask, base.attended(2).mask
    assert windowed is not None
    assert int(windowed[0, 0, -1].sum()) == 4, "the window of the first layers"
    assert whole is None or int(whole[0, 0, -1].sum()) == 9


@pytest.mark.parametrize("model_type", sorted(NOT_PACKED))
def test_what_cannot_be_packed_says_why(model_type: str) -> None:
    assert NOT_PACKED[model_type] in record(assay.load(tiny_model(model_type))).why_not_packed


def test_attention_that_looks_ahead_is_not_packed(tiny_module: Any) -> None:
    module = tiny_module("llama")
    subject = assay.load(module)
    for layer in module.model.layers:
        layer.self_attn.is_causal = False
    assert "looks ahead" in record(subject).why_not_packed


def test_arguments_belong_to_tokens() -> None:
    subject = assay.load(tiny_model("llama"))
    ids, mask = torch.zeros(2, 9, dtype=torch.long), torch.zeros(2, 9, dtype=torch.long)
    ids[0], mask[0], ids[1, 3:], mask[1, 3:] = IDS[0], 1, IDS[0, :6], 1
    base = record(subject, subject.tokens(ids, mask=mask))
    rows, columns = torch.tensor([0, 1, 1]), torch.tensor([4, 4, 8])
    taken = base.packed_arguments(0, rows, columns)
    assert taken["position_ids"].tolist() == [[4, 1, 5]]
    cosine = base.calls[0].arguments["position_embeddings"][0]
    assert torch.equal(taken["position_embeddings"][0], torch.stack([cosine[0, 4], cosine[1, 4], cosine[1, 8]])[None])
    again = base.repeated_arguments(0, 2)
    assert again["position_ids"].shape == (4, 9)
    assert torch.equal(again["position_ids"][2:], base.calls[0].arguments["position_ids"])
    base.calls[0].arguments["bias"] = torch.zeros(4, 4)
    with pytest.raises(ReplayRefused, match="'bias', shaped"):
        base.packed_arguments(0, rows, columns)


@pytest.mark.parametrize("model_type", ["t5", "bart", "bert"])
def test_other_shapes_of_model_are_refused(model_type: str) -> None:
    with pytest.raises(ReplayRefused):
        record(assay.load(tiny_model(model_type)))


def test_base_edits_beyond_the_embeddings_are_refused(tiny_module: Any) -> None:
    subject = assay.load(tiny_module("llama"))
    with pytest.raises(ReplayRefused, match="beyond the embeddings"):
        record(subject, edits=[assay.Scale("blocks.0.mlp.out", 0.5)])
    plain, edited = record(subject), record(subject, edits=[assay.Scale("embed", 0.5)])
    assert not torch.equal(plain.streams[0], edited.streams[0])


def test_a_block_called_twice_is_refused(tiny_module: Any) -> None:
    module = tiny_module("llama")
    subject = assay.load(module)
    module.model.layers[1] = module.model.layers[0]  # the subject still has the block that was there
    with pytest.raises(ReplayRefused, match="each called once"):
        record(subject)


def test_logits_that_do_not_follow_from_the_stream_are_refused(tiny_module: Any) -> None:
    module = tiny_module("llama")
    subject = assay.load(module)
    original = module.forward
    module.forward = lambda *args, **kwargs: _shifted(original(*args, **kwargs))
    with pytest.raises(ReplayRefused, match="do not come from the stream"):
        record(subject)


def _shifted(output: Any) -> Any:
    output.logits = output.logits + 1
    return output


def test_rounding_is_no_difference() -> None:
    x = torch.randn(5, 64, generator=torch.Generator().manual_seed(0))
    assert differs(x * (1 + 1e-6), x) == 0
    assert differs(x + 0.05, x) > 1e-3
    assert differs(x.bfloat16() * 1.01, x.bfloat16()) == 0
    assert differs(x.bfloat16() * 1.5, x.bfloat16()) > 0
    assert differs(torch.full_like(x, torch.nan), x) == float("inf")
    large = torch.cat([x, torch.full((5, 1), 1e4)], 1)
    assert differs(large + torch.nn.functional.pad(torch.full((5, 64), 300.0), (0, 1)), large) > 0
