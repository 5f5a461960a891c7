"""The benchmark's work in assay."""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import Any

from torch import Tensor

import assay

DISTRIBUTIONS = ["assay"]
ALL = [f"blocks.*.{p}" for p in "resid_pre resid_mid resid_post attn.q attn.k attn.v attn.z mlp.out".split()]
CAPTURES = {"plain": [], "one": ["blocks.15.resid_post"], "all": ALL, "patterns": [*ALL, "blocks.*.attn.pattern"]}


def load(folder: str, *, patterns: bool = False) -> Any:
    """The subject."""
    logging.getLogger("transformers").setLevel(logging.ERROR)
    return assay.load(folder)


def run(subject: Any, ids: Tensor, what: str) -> Callable[[], tuple[Tensor, Any]]:
    """One run with captures."""

    def work() -> tuple[Tensor, Any]:
        found = subject.run(ids, capture=CAPTURES[what])
        return found.logits, found.captured

    return work


def generate(subject: Any, ids: Tensor, vector: Tensor, block: int, new: int) -> Callable[[], Tensor]:
    """Generate with one vector added."""
    edit = assay.Add(f"blocks.{block}.resid_post", vector)

    def work() -> Tensor:
        return subject.generate(ids, edits=[edit], apply_to="all", max_new_tokens=new, min_new_tokens=new).generated

    return work


def sweep(
    subject: Any,
    clean: Tensor,
    corrupt: Tensor,
    metric: Callable[[Tensor], Tensor],
    blocks: range,
    positions: range,
) -> tuple[Callable[[], Tensor], str]:
    """`Subject.sweep` over the grid."""
    names = [f"blocks.{block}.resid_pre" for block in blocks]

    def work() -> Tensor:
        donor = subject.run(clean, capture=names)
        return subject.sweep(corrupt, [assay.Patch(n, donor, positions=p) for n in names for p in positions], metric)

    return work, "subject.sweep"
