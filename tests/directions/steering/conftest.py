"""Tiny subjects with a tokenizer, prompts that they can read, and a dictionary that is plain algebra."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import Tensor

import assay
from assay import Subject


@dataclass(frozen=True, kw_only=True)
class ReluDictionary:
    """A ReLU autoencoder of one site: `z = relu((x - b) E + c)`, `x^ = z D + b`."""

    site: str
    encoder: Tensor
    decoder: Tensor
    offset: Tensor
    threshold: Tensor

    @property
    def n_latents(self) -> int:
        return len(self.decoder)

    def encode(self, x: Tensor) -> Tensor:
        return torch.relu((x - self.offset) @ self.encoder + self.threshold)

    def decode(self, z: Tensor) -> Tensor:
        return z @ self.decoder + self.offset


@pytest.fixture(scope="session")
def make_dictionary() -> Callable[..., ReluDictionary]:
    """A random dictionary of a site of width 32."""

    def make(site: str, n: int = 48, seed: int = 0) -> ReluDictionary:
        generator = torch.Generator().manual_seed(seed)
        rows = torch.randn(n, 32, generator=generator)
        rows = rows / rows.norm(dim=1, keepdim=True)
        offset = 0.1 * torch.randn(32, generator=generator)
        return ReluDictionary(
            site=site, encoder=rows.T.contiguous(), decoder=rows, offset=offset, threshold=torch.full((n,), -0.2)
        )

    return make


@pytest.fixture(scope="session")
def make_subject(tiny_module: Callable[..., Any], tiny_tokenizer: Any) -> Callable[..., Subject]:
    """A tiny subject of a family that reads text."""
    made: dict[str, Subject] = {}

    def make(family: str) -> Subject:
        if family not in made:
            made[family] = assay.load(tiny_module(family), tokenizer=tiny_tokenizer)
        return made[family]

    return make


@pytest.fixture(scope="session")
def gpt2(make_subject: Callable[..., Subject]) -> Subject:
    """A tiny GPT-2: biases everywhere, positions learned, embeddings tied."""
    return make_subject("gpt2")
