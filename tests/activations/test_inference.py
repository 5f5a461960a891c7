"""Models that no declaration knows: what is inferred reads the same tensors as the declaration does."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import assay
from assay.activations import subject as loading
from assay.base.errors import UnsupportedArchitecture
from assay.subjects.tiny import tiny_model

SITES = ("resid_pre", "resid_post", "attn.out", "mlp.out", "logits")


@pytest.fixture
def undeclared(monkeypatch: pytest.MonkeyPatch) -> None:
    """No declaration knows any model."""
    monkeypatch.setattr(loading, "family_of", lambda module: None)


KINDS = ("gpt2", "gpt_neox", "llama", "gemma2", "falcon", "bloom", "phi", "cohere", "bert", "bart")


@pytest.mark.parametrize("kind", KINDS)
def test_an_inferred_map_reads_what_the_declared_one_reads(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    module = tiny_model(kind)
    declared = assay.load(module)
    names = [site for site in declared.sites() if site.endswith(SITES)]
    monkeypatch.setattr(loading, "family_of", lambda module: None)
    inferred = assay.load(module)
    assert inferred.architecture is not None and inferred.architecture.inferred
    assert inferred.checks and all(check.passed for check in inferred.checks)
    tokens = torch.tensor([[5, 6, 7, 8]])
    names = [site for site in names if site in inferred.sites()]
    assert any("resid_post" in site for site in names) and any("attn.out" in site for site in names)
    if kind == "bart":
        tokens = {"input_ids": tokens, "decoder_input_ids": tokens.flip(1)}  # type: ignore[assignment]
    expected, found = declared.run(tokens, capture=names), inferred.run(tokens, capture=names)
    assert all(torch.equal(expected[site], found[site]) for site in names)


class Strange(nn.Module):
    """A stack of blocks whose names say attention and MLP, and whose stream is multiplied instead of added to."""

    def __init__(self) -> None:
        super().__init__()
        self.config = tiny_model("llama").config
        self.inside = tiny_model("llama")
        for block in self.inside.model.layers:
            block.mlp.register_forward_hook(lambda part, given, output: output * 3 + 1)

    def forward(self, input_ids: torch.Tensor) -> torch.Tensor:
        return self.inside(input_ids, use_cache=False).logits ** 2


def test_a_module_that_fits_no_map_keeps_its_module_sites(undeclared: None) -> None:
    strange = assay.load(Strange().eval())
    run = strange.run(torch.tensor([[5, 6, 7]]), capture="module:inside.model.layers.0.out")
    assert run["module:inside.model.layers.0.out"].shape[:2] == (1, 3)
    with pytest.raises(UnsupportedArchitecture):
        strange.run(torch.tensor([[5, 6, 7]]), capture="blocks.0.resid_post")
