"""Direct logit attribution: the parts are the whole, and each part is what a hand computes."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from transformers.models.llama import modeling_llama

import assay
from assay.base.errors import NumericalError, UnsupportedArchitecture
from assay.directions import decompose
from assay.subjects.tokens import from_texts

BIASED = ("gpt2", "gpt_neox", "gpt_neox_sequential")


def part(found: Any, name: str) -> float:
    return float(found.parts[found.names.index(name)])


@torch.no_grad()
def test_the_parts_sum_to_the_models_own_logit_difference(case: Any) -> None:
    found = decompose(case.subject, case.ids, case.answer, case.foil)
    own = float(case.difference(case.module(case.ids).logits[0, -1]))
    assert found.total == pytest.approx(own, abs=1e-6)
    assert float(found.parts.sum()) == pytest.approx(own, rel=1e-4, abs=1e-5)
    assert found.error < 1e-4


def test_every_writer_is_a_part_and_constants_are_parts_of_their_own(case: Any) -> None:
    names = set(decompose(case.subject, case.ids, case.answer, case.foil).names)
    writers = {f"L{b}H{h}" for b in range(3) for h in range(4)} | {f"MLP{b}" for b in range(3)} | {"embed"}
    constants = {
        "pos_embed": case.family == "gpt2",
        "attention biases": case.family in BIASED,
        "norm bias": case.family in BIASED,
        "soft-cap": case.family == "gemma2",
    }
    assert names == writers | {name for name, there in constants.items() if there}


@torch.no_grad()
def test_a_head_an_mlp_and_the_embedding_are_what_a_hand_computes(case: Any) -> None:
    seen: dict[str, torch.Tensor] = {}
    last = case.block(2)
    handles = [
        case.block(1, case.paths.projection).register_forward_pre_hook(lambda m, args: seen.update(z=args[0][0, -1])),
        case.block(1, case.paths.projection).register_forward_hook(lambda m, args, out: seen.update(out=out[0, -1])),
        case.block(1, case.paths.mlp).register_forward_hook(lambda m, args, out: seen.update(mlp=out[0, -1])),
        last.register_forward_hook(
            lambda m, args, out: seen.update(stream=(out if isinstance(out, torch.Tensor) else out[0])[0, -1])
        ),
    ]
    try:
        case.module(case.ids)
    finally:
        for handle in handles:
            handle.remove()
    projection = case.block(1, case.paths.projection)
    matrix = projection.weight if case.family == "gpt2" else projection.weight.T  # Conv1D is [in, out]
    found = decompose(case.subject, case.ids, case.answer, case.foil)
    for head in (0, 2):
        written = seen["z"][8 * head : 8 * head + 8] @ matrix[8 * head : 8 * head + 8]
        if case.paths.post is not None:
            written = case.paths.norm(case.block(1, case.paths.post), written, seen["out"])
        assert part(found, f"L1H{head}") == pytest.approx(case.direct(written, seen["stream"]), rel=1e-3, abs=1e-5)
    assert part(found, "MLP1") == pytest.approx(case.direct(seen["mlp"], seen["stream"]), rel=1e-3, abs=1e-5)
    embedded = case.module.get_input_embeddings().weight[case.ids[0, -1]]
    embedded = embedded * 32**0.5 if case.family.startswith("gemma") else embedded
    assert part(found, "embed") == pytest.approx(case.direct(embedded, seen["stream"]), rel=1e-3, abs=1e-5)


@torch.no_grad()
def test_a_soft_cap_is_the_difference_it_makes(make_case: Callable[[str], Any]) -> None:
    case = make_case("gemma2")
    logits = case.module(case.ids).logits[0, -1]
    uncapped = 10 * torch.atanh(logits / 10)
    found = decompose(case.subject, case.ids, case.answer, case.foil)
    expected = float(case.difference(logits) - case.difference(uncapped))
    assert abs(expected) > 1e-3
    assert part(found, "soft-cap") == pytest.approx(expected, rel=1e-2)


@torch.no_grad()
def test_an_unembedding_bias_is_a_part(tiny_module: Callable[..., Any]) -> None:
    module = tiny_module("llama")
    module.lm_head = torch.nn.Linear(32, 128, bias=True)
    module.lm_head.bias.copy_(torch.linspace(-2, 2, 128))
    found = decompose(assay.load(module), torch.tensor([[5, 17, 40]]), 12, 99)
    assert part(found, "unembedding bias") == pytest.approx(float(module.lm_head.bias[12] - module.lm_head.bias[99]))
    assert found.error < 1e-4


def test_a_bias_behind_a_post_norm_is_divided_with_the_heads(tiny_module: Callable[..., Any]) -> None:
    subject = assay.load(tiny_module("gemma2", attention_bias=True))
    assert float(subject.module.model.layers[0].self_attn.o_proj.bias.detach().abs().max()) > 0.1
    found = decompose(subject, torch.tensor([[5, 17, 40]]), 12, 99)
    assert abs(part(found, "attention biases")) > 1e-3
    assert found.error < 1e-4


def test_over_rows_it_is_the_mean(case: Any) -> None:
    other = case.ids.flip(1)
    both = decompose(case.subject, torch.cat([case.ids, other]), case.answer, case.foil)
    each = [decompose(case.subject, ids, case.answer, case.foil) for ids in (case.ids, other)]
    assert both.names == each[0].names
    assert torch.allclose(both.parts, (each[0].parts + each[1].parts) / 2, atol=1e-4)
    assert both.total == pytest.approx((each[0].total + each[1].total) / 2, abs=1e-4)


@pytest.mark.parametrize("family", ["gpt2", "gemma2", "gpt_neox"])
@pytest.mark.parametrize("padding", ["left", "right"])
def test_prompts_of_different_length_are_each_read_at_their_own_end(
    case: Any, tiny_tokenizer: Any, padding: str
) -> None:
    subject = assay.load(case.module, tokenizer=tiny_tokenizer)
    texts = ["When Mary and John went to the store", "When Mary went"]
    batch = from_texts(tiny_tokenizer, texts, side=padding)
    both = decompose(subject, batch, case.answer, case.foil)
    each = [decompose(subject, text, case.answer, case.foil) for text in texts]
    assert torch.allclose(both.parts, (each[0].parts + each[1].parts) / 2, atol=1e-4)
    assert both.error < 1e-4


def test_turning_answer_and_foil_turns_every_sign(case: Any) -> None:
    one = decompose(case.subject, case.ids, case.answer, case.foil)
    turned = decompose(case.subject, case.ids, case.foil, case.answer)
    assert torch.allclose(one.parts, -turned.parts, atol=1e-5)


class Extra(modeling_llama.LlamaDecoderLayer):
    """A Llama block that writes something the map does not know of."""

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        return super().forward(*args, **kwargs) + 0.5


def test_a_model_that_writes_more_than_its_map_says_is_refused(tiny_module: Callable[..., Any]) -> None:
    """The load-time check refuses it first; unchecked, the sum does not come out and the parts are not given."""
    module = tiny_module("llama")
    module.model.layers[1].__class__ = Extra
    ids = torch.tensor([[5, 17, 40]])
    with pytest.raises(UnsupportedArchitecture, match=r"blocks.1: what enters plus its layers' outputs leaves"):
        decompose(assay.load(module), ids, 12, 99)
    with pytest.raises(NumericalError, match=r"the parts sum to .*, the logit difference is"):
        decompose(assay.load(module, check=False), ids, 12, 99)
