"""Generation under the module's own cache: the same as without one, edits where they were said to be."""

from __future__ import annotations

from typing import Any

import pytest
import torch

import assay
from assay.base.errors import SiteNotFired, SpecError

IDS = torch.tensor([[5, 17, 33, 64, 9, 101, 42]])


def test_without_edits_it_is_the_modules_own(family: str, tiny_module: Any) -> None:
    module = tiny_module(family)
    subject = assay.load(module)
    expected = module.generate(IDS, max_new_tokens=6, do_sample=False, attention_mask=torch.ones_like(IDS))
    run = subject.generate(IDS, max_new_tokens=6)
    assert torch.equal(run.generated, expected)
    with torch.no_grad():
        again = module(run.generated[:, :-1]).logits[:, IDS.shape[1] - 1 :]
    assert torch.allclose(run.logits, again, atol=1e-4)


@pytest.mark.parametrize("apply_to", ["prompt", "new", "all"])
def test_with_and_without_a_cache_agree(family: str, apply_to: Any, tiny_module: Any) -> None:
    subject = assay.load(tiny_module(family))
    value = 2 * torch.randn(32, generator=torch.Generator().manual_seed(3))
    edits = [assay.Add("blocks.1.resid_post", value), assay.Scale("blocks.0.attn.z.1", 0.0)]
    capture = ["blocks.2.resid_post", "blocks.1.attn.z"]
    cached = subject.generate(IDS, edits, capture, apply_to=apply_to, max_new_tokens=5)
    plain = subject.generate(IDS, edits, capture, apply_to=apply_to, max_new_tokens=5, use_cache=False)
    assert torch.equal(cached.generated, plain.generated)
    assert torch.allclose(cached.logits, plain.logits, atol=1e-4)
    for name in capture:
        assert cached[name].shape[1] == {"prompt": 7, "new": 4, "all": 11}[apply_to]
        assert torch.allclose(cached[name], plain[name], atol=1e-4)
    untouched = subject.generate(IDS, max_new_tokens=5)
    assert not torch.allclose(cached.logits[:, -1], untouched.logits[:, -1], atol=1e-3)


def test_editing_the_prompt_is_not_editing_what_follows(tiny_module: Any) -> None:
    """The first new token depends on the prompt alone: "new" leaves its logits as they were."""
    subject = assay.load(tiny_module("llama"))
    plain = subject.generate(IDS, max_new_tokens=3)
    edit = [assay.Add("blocks.1.resid_post", torch.ones(32) * 3)]
    new = subject.generate(IDS, edit, apply_to="new", max_new_tokens=3)
    prompt = subject.generate(IDS, edit, apply_to="prompt", max_new_tokens=3)
    assert torch.equal(new.logits[:, 0], plain.logits[:, 0])
    assert not torch.allclose(prompt.logits[:, 0], plain.logits[:, 0], atol=1e-3)


def test_prompts_of_different_length_generate_as_alone(tiny_subject: Any) -> None:
    texts = ["When Mary went to the store", "When John"]
    edits = [assay.Add("blocks.2.resid_post", torch.ones(32), positions="last")]
    both = tiny_subject.generate(texts, edits, apply_to="prompt", max_new_tokens=4)
    for i, text in enumerate(texts):
        alone = tiny_subject.generate(text, edits, apply_to="prompt", max_new_tokens=4)
        assert torch.allclose(both.logits[i], alone.logits[0], atol=1e-4)


def test_sampling_follows_the_seed(tiny_module: Any) -> None:
    subject = assay.load(tiny_module("llama"))
    torch.manual_seed(0)
    first = subject.generate(IDS, max_new_tokens=8, do_sample=True).generated
    torch.manual_seed(0)
    assert torch.equal(first, subject.generate(IDS, max_new_tokens=8, do_sample=True).generated)


def test_where_edits_apply_must_be_said(tiny_module: Any) -> None:
    subject = assay.load(tiny_module("llama"))
    edits = [assay.Add("blocks.1.resid_post", 1.0)]
    with pytest.raises(SpecError, match="'prompt', the 'new' tokens or 'all'"):
        subject.generate(IDS, edits)
    with pytest.raises(SpecError, match="num_beams=1"):
        subject.generate(IDS, edits, apply_to="all", num_beams=2)
    with pytest.raises(SpecError, match="drafts tokens"):
        subject.generate(IDS, edits, apply_to="all", prompt_lookup_num_tokens=2)
    with pytest.raises(SiteNotFired, match="apply_to"):
        subject.generate(IDS, edits, apply_to="new", max_new_tokens=1)
