"""Patches of every position, from a prompt that begins like the base: the columns they leave alone are not computed."""

from __future__ import annotations

from typing import Any

import pytest
import torch

import assay
from assay.activations import replay
from assay.subjects.tiny import tiny_model

BASE = torch.tensor([[5, 9, 12, 20, 7, 31, 8, 4]])
DONOR = torch.tensor([[5, 9, 12, 20, 7, 33, 8, 6]])


def metric(logits: Any) -> torch.Tensor:
    return logits[:, -1, 30] - logits[:, -1, 31]


def counted(subject: Any, cells: list[Any], **options: Any) -> tuple[torch.Tensor, int]:
    """The values of a sweep, and how many tokens went through the first block's MLP."""
    seen = []
    mlp = subject.parts.of(0, "mlp")
    handle = mlp.register_forward_hook(lambda module, args, output: seen.append(args[0].numel() // args[0].shape[-1]))
    try:
        return subject.sweep(BASE, cells, metric, **options), sum(seen)
    finally:
        handle.remove()


@pytest.mark.parametrize("model_type", ["llama", "gpt2", "gpt_neox", "gemma2"])
def test_columns_that_a_patch_leaves_alone_are_not_computed(model_type: str, monkeypatch: Any) -> None:
    subject = assay.load(tiny_model(model_type))
    donor = subject.run(DONOR, capture=["blocks.0.attn.z", "blocks.0.resid_pre"])
    sites = [f"blocks.0.attn.z.{head}" for head in range(4)] * 3 + ["blocks.0.resid_pre"]
    cells = [assay.Patch(site, donor) for site in sites]
    found, tokens = counted(subject, cells)
    forward, _ = counted(subject, cells, exact="forward")
    monkeypatch.setattr(replay, "WORTH", len(cells) + 1)
    plain, all_tokens = counted(subject, cells)
    torch.testing.assert_close(found, forward, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(plain, forward, rtol=1e-4, atol=1e-5)
    assert tokens < 0.6 * all_tokens  # 3 columns of 8, the base and its values beside


def test_an_edit_that_changes_the_first_column_keeps_every_column() -> None:
    subject = assay.load(tiny_model("llama"))
    cells = [assay.Scale(f"blocks.0.attn.z.{head}", 0.5) for head in range(4)] * 3
    cells += [assay.Add("blocks.1.resid_pre", torch.linspace(-1, 1, 32))]
    found = subject.sweep(BASE, cells, metric)
    expected = subject.sweep(BASE, cells, metric, exact="forward")
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)


def test_an_edit_that_changes_nothing_gives_the_base() -> None:
    subject = assay.load(tiny_model("llama"))
    same = subject.run(BASE, capture="blocks.*.mlp.out")
    cells = [assay.Patch(f"blocks.{block}.mlp.out", same) for block in (0, 1)] * 5
    base = metric(subject.run(BASE).logits)
    torch.testing.assert_close(subject.sweep(BASE, cells, metric), base.expand(10), rtol=1e-4, atol=1e-5)


def test_a_later_edit_of_a_cell_does_not_hide_what_an_earlier_one_changes() -> None:
    subject = assay.load(tiny_model("llama"))
    donor = subject.run(DONOR, capture=["blocks.0.resid_pre", "blocks.1.attn.z"])
    same = subject.run(BASE, capture="blocks.1.mlp.out")
    cell = (
        assay.Patch("blocks.0.resid_pre", donor),
        assay.Patch("blocks.1.mlp.out", same),
        assay.Add("blocks.1.resid_pre", 0.1, positions=2),
    )
    found = subject.sweep(BASE, [cell] * 4, metric)
    expected = subject.sweep(BASE, [cell] * 4, metric, exact="forward")
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)
