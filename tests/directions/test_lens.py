"""The logit lens: its last row is the model, and an earlier row is the model that ends there."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch

from assay import Add
from assay.base.errors import SpecError
from assay.directions import logit_lens
from assay.subjects.tokens import from_ids


def test_the_last_row_is_the_models_own_output(case: Any) -> None:
    with torch.no_grad():
        logits = case.module(case.ids).logits
    found = logit_lens(case.subject, case.ids, case.answer, case.foil)
    assert found.difference.shape == (4, 7)
    assert torch.allclose(found.difference[-1], case.difference(logits)[0], atol=1e-5)
    last = logits[0, -1]
    assert float(found.probability[-1]) == pytest.approx(float(last.softmax(-1)[case.answer]), rel=1e-4)
    assert int(found.top[-1]) == int(last.argmax())
    order = last.argsort(descending=True).tolist()
    assert float(found.rank[-1]) == order.index(case.answer)


def test_a_middle_row_is_the_model_without_the_blocks_that_follow(case: Any) -> None:
    """A model cut after block 1 computes final norm and unembedding (and soft-cap) of that block's output."""
    short = copy.deepcopy(case.module)
    parent, _, name = case.paths.blocks.rpartition(".")
    setattr(short.get_submodule(parent), name, short.get_submodule(case.paths.blocks)[:2])
    short.config.num_hidden_layers = 2
    with torch.no_grad():
        logits = short(case.ids).logits
    found = logit_lens(case.subject, case.ids, case.answer, case.foil)
    assert torch.allclose(found.difference[2], case.difference(logits)[0], atol=1e-5)
    assert int(found.top[2]) == int(logits[0, -1].argmax())
    assert not torch.allclose(found.difference[2], found.difference[3], atol=1e-2)


def test_the_first_row_is_the_embedding(make_case: Callable[[str], Any]) -> None:
    case = make_case("llama")
    with torch.no_grad():
        stream = case.module.model.embed_tokens(case.ids)
        logits = case.module.lm_head(case.module.model.norm(stream))
    found = logit_lens(case.subject, case.ids, case.answer, case.foil)
    assert torch.allclose(found.difference[0], case.difference(logits)[0], atol=1e-5)
    assert float(found.probability[0]) == pytest.approx(float(logits[0, -1].softmax(-1)[case.answer]), rel=1e-4)


def test_over_rows_it_is_the_mean(make_case: Callable[[str], Any]) -> None:
    case = make_case("gpt2")
    other = case.ids.flip(1)
    both = logit_lens(case.subject, torch.cat([case.ids, other]), case.answer, case.foil)
    each = [logit_lens(case.subject, ids, case.answer, case.foil) for ids in (case.ids, other)]
    for name in ("difference", "probability", "rank"):
        expected = (getattr(each[0], name) + getattr(each[1], name)) / 2
        assert torch.allclose(getattr(both, name), expected, atol=1e-4), name


def test_the_lens_reads_the_edited_run(make_case: Callable[[str], Any]) -> None:
    case = make_case("gpt2")
    shift = torch.randn(32, generator=torch.Generator().manual_seed(0))
    edits = [Add("blocks.1.resid_post", shift, positions=3)]
    plain = logit_lens(case.subject, case.ids, case.answer, case.foil)
    edited = logit_lens(case.subject, case.ids, case.answer, case.foil, edits)
    changed = (plain.difference - edited.difference).abs() > 1e-4
    assert not changed[:2].any()
    assert changed[2].tolist() == [False, False, False, True, False, False, False]
    assert changed[3, 4:].any()


def test_prompts_of_different_length_have_no_common_positions(make_case: Callable[[str], Any]) -> None:
    case = make_case("gpt2")
    padded = from_ids(torch.tensor([[5, 17, 40], [5, 17, 0]]), torch.tensor([[1, 1, 1], [1, 1, 0]]))
    with pytest.raises(SpecError, match="give prompts of one length"):
        logit_lens(case.subject, padded, case.answer, case.foil)
