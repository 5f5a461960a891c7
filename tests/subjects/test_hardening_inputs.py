"""Masks act on every kind of input or are refused, and prompts of other kinds than those taken have a clear error."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import jaxtyping
import pytest
import torch
from torch import Tensor, nn

import assay
from assay.base.errors import SpecError
from assay.subjects.tiny import tiny_model
from assay.subjects.tokens import copied, is_cache

IDS = torch.tensor([[5, 17, 33, 64, 9, 11], [8, 9, 2, 11, 54, 3]])
LEFT = torch.tensor([[1, 1, 1, 1, 1, 1], [0, 0, 1, 1, 1, 1]])


@pytest.fixture
def untyped() -> Iterator[None]:
    """Types are not checked at run time, as they are not for users: what is wrong reaches assay's own checks."""
    jaxtyping.config.update("jaxtyping_disable", True)
    yield
    jaxtyping.config.update("jaxtyping_disable", False)


def alone(subject: Any, ids: Tensor = IDS) -> Tensor:
    """The second row's logits, without padding."""
    found: Tensor = subject.run(ids[1:, 2:]).logits
    return found


def test_a_mask_acts_on_every_input_that_has_tokens(tiny_module: Any) -> None:
    module = tiny_module("llama")
    subject = assay.load(module)
    embeds = module.get_input_embeddings()(IDS).detach()
    inputs: list[Any] = [
        IDS,
        {"input_ids": IDS},
        {"inputs_embeds": embeds},
        {"input_ids": IDS, "output_attentions": False},
    ]
    for x in (*inputs, {"input_ids": IDS, "attention_mask": LEFT}, subject.batch(IDS, mask=LEFT)):
        run = subject.run(x, mask=LEFT, edits=[assay.Scale("blocks.0.mlp.out", 1.0, positions=0)])
        assert torch.allclose(run.logits[1:, 2:], alone(subject), atol=1e-4)
        assert (run.batch.starts, run.batch.lengths) == ((0, 2), (6, 4))
    assert torch.equal(subject.run(IDS, mask=LEFT.tolist()).logits, subject.run(IDS, mask=LEFT).logits)
    given = {"inputs_embeds": embeds, "attention_mask": LEFT}  # without mask= as well
    assert torch.allclose(subject.run(given).logits[1:, 2:], alone(subject), atol=1e-4)


def test_a_mask_acts_on_an_encoder() -> None:
    subject = assay.load(tiny_model("t5"))
    ids, right = IDS % 60, LEFT.flip(1)
    expected = subject.run({"input_ids": ids, "attention_mask": right, "decoder_input_ids": ids[:, :3]}).logits
    found = subject.run({"input_ids": ids, "decoder_input_ids": ids[:, :3]}, mask=right).logits
    assert torch.equal(found, expected)
    assert not torch.allclose(found, subject.run({"input_ids": ids, "decoder_input_ids": ids[:, :3]}).logits, atol=1e-3)


@pytest.mark.usefixtures("untyped")
def test_a_mask_that_would_not_act_is_refused(tiny_module: Any) -> None:
    module = tiny_module("llama")
    subject = assay.load(module)
    embeds = module.get_input_embeddings()(IDS).detach()
    for x in ((IDS,), embeds, {"output_attentions": False, "position_ids": IDS}):
        with pytest.raises(SpecError, match="mask= goes with"):
            subject.run(x, mask=LEFT)
    with pytest.raises(SpecError, match="a batch has a mask of its own"):
        subject.run(subject.batch(IDS), mask=LEFT)
    with pytest.raises(SpecError, match="differ: give one"):
        subject.run({"input_ids": IDS, "attention_mask": torch.ones_like(LEFT)}, mask=LEFT)
    with pytest.raises(SpecError, match=r"shaped \(1, 6\)"):
        subject.run({"input_ids": IDS}, mask=LEFT[:1])
    with pytest.raises(SpecError, match="of 1 and 0"):
        subject.run(IDS, mask="left")
    with pytest.raises(SpecError, match="'left' or the 'right', not 'middle'"):
        subject.run(IDS, padding="middle")
    vision = assay.load(tiny_model("clip"))
    with pytest.raises(SpecError, match="mask= goes with token ids"):
        vision.run(IDS % 60, mask=LEFT)

    class Sums(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.embed = nn.Embedding(70, 8)

        def forward(self, ids: Tensor) -> Tensor:
            found: Tensor = self.embed(ids).cumsum(1)
            return found

    generic = assay.load(Sums().eval())
    with pytest.raises(SpecError, match="no argument 'attention_mask'"):
        generic.run(IDS, mask=LEFT)
    with pytest.raises(SpecError, match="mask= goes with token ids"):
        generic.run(torch.randn(2, 6), mask=LEFT)
    assert torch.equal(generic.run(IDS, mask=torch.ones_like(IDS)).logits, generic.run(IDS).logits)


def test_whole_numbers_of_any_width_are_token_ids(tiny_module: Any) -> None:
    subject = assay.load(tiny_module("gpt2"))
    expected = subject.run(IDS).logits
    for dtype in (torch.uint8, torch.int8, torch.int16, torch.uint16, torch.int32):
        assert torch.equal(subject.run(IDS.to(dtype)).logits, expected)
        assert torch.equal(subject.run({"input_ids": IDS.to(dtype), "output_attentions": False}).logits, expected)
    with pytest.raises(SpecError, match=r"integers .* not complex64"):
        subject.run(IDS.to(torch.complex64))


@pytest.mark.usefixtures("untyped")
@pytest.mark.parametrize("x", [[[1, 2, 3]], [1, 2, 3], (1, 2, 3), [[]], [torch.tensor([1, 2])]], ids=str)
def test_token_ids_in_lists_are_asked_for_as_a_tensor(x: Any, tiny_module: Any, tiny_subject: Any) -> None:
    for subject in (assay.load(tiny_module("gpt2")), tiny_subject):
        with pytest.raises(SpecError, match=r"as a tensor \[batch, pos\]"):
            subject.run(x)


@pytest.mark.usefixtures("untyped")
def test_an_empty_prompt_and_a_list_by_name_say_what_is_wrong(tiny_module: Any) -> None:
    subject = assay.load(tiny_module("gpt2"))
    with pytest.raises(SpecError, match="no prompt was given"):
        subject.run([])
    with pytest.raises(SpecError, match="return_tensors='pt'"):
        subject.run({"input_ids": [[1, 2, 3]], "output_attentions": False})
    with pytest.raises(SpecError, match=r"as a tensor \[batch, pos\]"):
        subject.run({"input_ids": [[1, 2, 3]]})


def test_half_a_character_is_no_text(tiny_subject: Any) -> None:
    for text in ("When \ud83d", ["Mary", "\udc00 John"]):
        with pytest.raises(SpecError, match="half a character"):
            tiny_subject.run(text)


@pytest.mark.usefixtures("untyped")
def test_what_is_no_tokenizer_is_refused(tiny_module: Any) -> None:
    for wrong in ("gpt2", 3):
        with pytest.raises(SpecError, match="tokenizer= is a tokenizer"):
            assay.load(tiny_module("gpt2"), tokenizer=wrong)


def test_a_copied_cache_is_its_own_and_outside_of_any_graph(tiny_module: Any) -> None:
    cache = tiny_module("llama")(IDS, use_cache=True).past_key_values
    assert is_cache(cache)
    assert not any(map(is_cache, (IDS, None, True, {"a": IDS}, (IDS,), 3)))
    again = copied(cache)
    mine, theirs = cache.layers[0].keys, again.layers[0].keys
    assert torch.equal(mine, theirs) and mine.data_ptr() != theirs.data_ptr()
    assert mine.requires_grad and not theirs.requires_grad
    assert copied(IDS) is IDS
