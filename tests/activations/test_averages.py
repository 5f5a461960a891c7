"""Means over a set of prompts: those of all tokens together, whatever the batches and the padding."""

from __future__ import annotations

from typing import Any

import pytest
import torch

import assay
from assay.base.errors import InvalidEdit, SpecError, UnknownSite

TEXTS = ["When Mary and John went to the store", "Paris", "When John gave a drink", "milk and a drink"]
SITES = ["blocks.*.mlp.out", "blocks.2.attn.z", "blocks.1.attn.v.3"]


@pytest.mark.parametrize("max_rows", [1, 3, 16])
def test_the_mean_is_over_the_real_tokens_of_all_prompts(max_rows: int, tiny_subject: Any) -> None:
    mean = tiny_subject.mean(TEXTS, SITES, max_rows=max_rows)
    alone = [tiny_subject.run(text, capture=SITES) for text in TEXTS]
    for name in ("blocks.4.mlp.out", "blocks.2.attn.z", "blocks.1.attn.v.3"):
        expected = torch.cat([run[name][0] for run in alone]).double().mean(0)
        assert torch.allclose(mean[name].double(), expected, atol=1e-6)
        assert mean[name].dims == alone[0][name].dims[2:]
    assert torch.equal(mean["blocks.2.attn.hook_z.1"], mean["blocks.2.attn.z"][1])
    assert len(mean) == 8


def test_positions_say_which_tokens_count(tiny_subject: Any) -> None:
    site = "blocks.3.resid_post"
    alone = [tiny_subject.run(text, capture=site)[site][0] for text in TEXTS]
    rest = tiny_subject.mean(TEXTS, site, positions=slice(1, None))[site]
    assert torch.allclose(rest, torch.cat([x[1:] for x in alone]).mean(0), atol=1e-6)
    last = tiny_subject.mean(TEXTS, site, positions="last")[site]
    assert torch.allclose(last, torch.stack([x[-1] for x in alone]).mean(0), atol=1e-6)
    drink = tiny_subject.mean(TEXTS[2:], site, positions=assay.At(" drink"))[site]
    assert torch.allclose(drink, torch.stack([x[-1] for x in alone[2:]]).mean(0), atol=1e-6)


def test_a_mean_for_each_position_is_over_the_prompts_that_reach_it(tiny_subject: Any) -> None:
    site = "blocks.3.attn.z"
    alone = [tiny_subject.run(text, capture=site)[site][0] for text in TEXTS]
    for max_rows in (1, 2, 16):
        mean = tiny_subject.mean(TEXTS, site, by="position", max_rows=max_rows)[site]
        assert mean.dims == ("pos", "head", "d_head")
        for position in range(len(mean)):
            reach = torch.stack([x[position] for x in alone if len(x) > position])
            assert torch.allclose(mean[position], reach.mean(0), atol=1e-6)
    assert len(mean) == max(map(len, alone))


def test_ablating_with_a_mean_of_the_run_itself_is_the_mean_ablation(tiny_subject: Any) -> None:
    for site in ("blocks.2.attn.z", "blocks.2.attn.z.1", "blocks.1.mlp.post"):
        by_tensor = assay.Ablate(site, tiny_subject.mean(TEXTS, site)[site])
        found = tiny_subject.run(TEXTS, edits=[by_tensor])
        expected = tiny_subject.run(TEXTS, edits=[assay.Ablate(site, "mean")])
        assert torch.allclose(found.logits[:, -1], expected.logits[:, -1], atol=1e-5)
    generated = tiny_subject.generate(TEXTS[0], [by_tensor], apply_to="all", max_new_tokens=3)
    assert generated.generated.shape == (1, 11)


def test_what_has_no_mean_is_refused(tiny_subject: Any) -> None:
    with pytest.raises(SpecError, match=r"'query', 'key'.*a mean is taken at"):
        tiny_subject.mean(TEXTS, "blocks.0.attn.pattern")
    with pytest.raises(SpecError, match="no prompts"):
        tiny_subject.mean([], "blocks.0.mlp.out")
    with pytest.raises(UnknownSite):
        tiny_subject.mean(TEXTS, "blocks.0.mlp.outt")
    with pytest.raises(InvalidEdit, match="position 5 is outside"):
        tiny_subject.mean(["Paris"], "blocks.0.mlp.out", positions=5)
