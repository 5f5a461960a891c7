"""Tiny models as subjects, one a family, and their norms written out by hand."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import assay
from assay import Subject

IDS = torch.tensor([[5, 17, 40, 9, 77, 30, 21]])
ANSWER, FOIL = 12, 99


def layer_norm(module: nn.Module, x: Tensor, scale_of: Tensor) -> Tensor:
    """LayerNorm without its bias, divided by the scale of another vector."""
    sd = (scale_of.var(-1, unbiased=False, keepdim=True) + module.eps).sqrt()
    return (x - x.mean(-1, keepdim=True)) / sd * module.weight


def rms_norm(module: nn.Module, x: Tensor, scale_of: Tensor) -> Tensor:
    """Llama's RMSNorm, divided by the scale of another vector."""
    return x / (scale_of.pow(2).mean(-1, keepdim=True) + module.variance_epsilon).sqrt() * module.weight


def gemma_norm(module: nn.Module, x: Tensor, scale_of: Tensor) -> Tensor:
    """Gemma's RMSNorm, whose gain is one plus its weight."""
    return x / (scale_of.pow(2).mean(-1, keepdim=True) + module.eps).sqrt() * (1 + module.weight)


@dataclass(frozen=True)
class Paths:
    """Where a family keeps what is written to the stream, and how its norms compute."""

    blocks: str
    projection: str
    mlp: str
    final: str
    norm: Callable[[nn.Module, Tensor, Tensor], Tensor]
    post: str | None = None


LLAMA = Paths("model.layers", "self_attn.o_proj", "mlp", "model.norm", rms_norm)
NEOX = Paths("gpt_neox.layers", "attention.dense", "mlp", "gpt_neox.final_layer_norm", layer_norm)
GEMMA = Paths(
    "model.layers", "self_attn.o_proj", "post_feedforward_layernorm", "model.norm", gemma_norm,
    "post_attention_layernorm",
)  # fmt: skip
PATHS = {
    "gpt2": Paths("transformer.h", "attn.c_proj", "mlp", "transformer.ln_f", layer_norm),
    "gpt_neox": NEOX,
    "gpt_neox_sequential": NEOX,
    "llama": LLAMA,
    "qwen2": LLAMA,
    "qwen3": LLAMA,
    "gemma2": GEMMA,
    "gemma3_text": GEMMA,
}


@dataclass(frozen=True, kw_only=True)
class Case:
    """One family's tiny model, as a subject and with its parts by hand."""

    family: str
    subject: Subject
    paths: Paths

    ids = IDS
    answer, foil = ANSWER, FOIL

    @property
    def module(self) -> Any:
        return self.subject.module

    def block(self, i: int, path: str = "") -> Any:
        return self.module.get_submodule(f"{self.paths.blocks}.{i}.{path}".rstrip("."))

    def difference(self, logits: Tensor) -> Tensor:
        """The logit difference along the last dimension."""
        return logits[..., self.answer] - logits[..., self.foil]

    def direct(self, x: Tensor, stream: Tensor) -> float:
        """What a part of the last position's stream adds to the logit difference, the final norm frozen."""
        read = self.difference(self.module.get_output_embeddings().weight.T)
        return float(self.paths.norm(self.module.get_submodule(self.paths.final), x, stream) @ read)


@pytest.fixture(scope="session")
def make_case(tiny_module: Callable[..., Any]) -> Callable[[str], Case]:
    """The case of a family."""
    made: dict[str, Case] = {}

    def make(family: str) -> Case:
        if family not in made:
            made[family] = Case(family=family, subject=assay.load(tiny_module(family)), paths=PATHS[family])
        return made[family]

    return make


@pytest.fixture
def case(family: str, make_case: Callable[[str], Case]) -> Case:
    """The case of every family in turn."""
    return make_case(family)


@pytest.fixture
def make_subject(tiny_module: Callable[..., Any], tiny_tokenizer: Any) -> Callable[..., Any]:
    """Make a subject of a tiny model of a family, with the tokenizer that fits them all."""
    return lambda family, **settings: assay.load(tiny_module(family, **settings), tokenizer=tiny_tokenizer)
