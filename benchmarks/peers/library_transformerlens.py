"""The benchmark's work in TransformerLens 4."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pandas as pd
import torch
from torch import Tensor
from transformer_lens import patching
from transformer_lens.model_bridge import TransformerBridge

DISTRIBUTIONS = ["transformer-lens"]
ENDS = ("hook_resid_pre", "hook_resid_mid", "hook_resid_post", "hook_mlp_out")
HEADS = ("attn.hook_q", "attn.hook_k", "attn.hook_v", "attn.hook_z")
SITES = {
    "one": lambda i: ["blocks.15.hook_resid_post"] if i == 15 else [],
    "all": lambda i: [f"blocks.{i}.{end}" for end in (*ENDS, *HEADS)],
    "patterns": lambda i: [f"blocks.{i}.{end}" for end in (*ENDS, *HEADS, "attn.hook_pattern")],
}


def load(folder: str, *, patterns: bool = False) -> Any:
    """The bridge, in evaluation mode; it sets attention to eager, so patterns need nothing more."""
    return TransformerBridge.boot_transformers(folder).eval()


def run(model: Any, ids: Tensor, what: str) -> Callable[[], tuple[Tensor, Any]]:
    """A forward, or `run_with_cache` with the names listed."""
    if what == "plain":

        @torch.no_grad()
        def plain() -> tuple[Tensor, Any]:
            return model(ids), {}

        return plain
    names = [name for block in range(model.cfg.n_layers) for name in SITES[what](block)]

    @torch.no_grad()
    def work() -> tuple[Tensor, Any]:
        logits, cache = model.run_with_cache(ids, names_filter=names)
        return logits, {name: cache[name] for name in names}

    return work


def generate(model: Any, ids: Tensor, vector: Tensor, block: int, new: int) -> Callable[[], Tensor]:
    """The bridge's `generate`, with a hook."""

    def hook(value: Tensor, hook: Any) -> Tensor:
        return value + vector

    @torch.no_grad()
    def work() -> Tensor:
        with model.hooks(fwd_hooks=[(f"blocks.{block}.hook_resid_post", hook)]):
            return model.generate(
                ids, max_new_tokens=new, do_sample=False, stop_at_eos=False, return_type="tokens", verbose=False
            )

    return work


def sweep(
    model: Any,
    clean: Tensor,
    corrupt: Tensor,
    metric: Callable[[Tensor], Tensor],
    blocks: range,
    positions: range,
) -> tuple[Callable[[], Tensor], str]:
    """Its grid of patches, `transformer_lens.patching`."""
    names = [f"blocks.{block}.hook_resid_pre" for block in blocks]
    cells = pd.DataFrame([(i, p) for i in blocks for p in positions], columns=["layer", "pos"])

    def scalar(logits: Tensor) -> Tensor:
        return metric(logits).mean()

    @torch.no_grad()
    def work() -> Tensor:
        _, cache = model.run_with_cache(clean, names_filter=names)
        return patching.generic_activation_patch(
            model, corrupt, cache, scalar, patching.layer_pos_patch_setter, "resid_pre", index_df=cells
        )

    return work, "transformer_lens.patching"
