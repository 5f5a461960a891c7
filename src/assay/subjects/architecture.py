"""Where a family of models keeps its parts: a declaration, not code.

An `ArchitectureMap` names modules by dotted path. Paths of a block's parts are relative to the block. Nothing here
runs the model; `assay.activations.selfcheck` proves a map against the model it is used on.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal


@dataclass(frozen=True, slots=True)
class FusedProjection:
    """Queries, keys and values in one linear map.

    Args:
        path: The module, relative to the attention module.
        layout: `thirds` for `[q | k | v]` over all heads (GPT-2); `per_head` for `[q_h | k_h | v_h]` head by head
            (GPT-NeoX).
    """

    path: str
    layout: Literal["thirds", "per_head"]


@dataclass(frozen=True, slots=True)
class SeparateProjections:
    """Queries, keys and values in three linear maps, each relative to the attention module."""

    q: str = "q_proj"
    k: str = "k_proj"
    v: str = "v_proj"


@dataclass(frozen=True, slots=True, kw_only=True)
class ArchitectureMap:
    """The parts of one family of decoder-only language models.

    Args:
        family: The name shown to people.
        model_types: The values of `config.model_type` it serves.
        blocks: The list of blocks.
        embed: The token embedding, whose output (after any multiplier) is written to the residual stream.
        pos_embed: The learned position embedding, if its output is added to the stream.
        final_norm: The norm before the unembedding.
        norm1: The norm that attention reads through.
        norm2: The norm that the MLP reads through.
        attn: The attention module.
        projections: Where queries, keys and values are made.
        attn_proj: The output projection, relative to the attention module; its input is `z`.
        attn_post_norm: A norm on attention's output, if that is what is added to the stream (Gemma 2).
        mlp: The MLP module.
        mlp_gate: The projection that goes through the nonlinearity of a gated MLP, relative to the MLP.
        mlp_up: The projection into the hidden layer (the linear branch of a gated MLP).
        mlp_down: The projection out of the hidden layer.
        mlp_post_norm: A norm on the MLP's output, if that is what is added to the stream.
        parallel: The name of the config field that says attention and MLP read the same stream, or a constant.
        logit_softcap: The config field with the cap `c` in `c tanh(logits / c)`.
    """

    family: str
    model_types: tuple[str, ...]
    blocks: str
    embed: str
    final_norm: str
    pos_embed: str | None = None
    norm1: str = "input_layernorm"
    norm2: str = "post_attention_layernorm"
    attn: str = "self_attn"
    projections: FusedProjection | SeparateProjections = SeparateProjections()
    attn_proj: str = "o_proj"
    attn_post_norm: str | None = None
    mlp: str = "mlp"
    mlp_gate: str | None = "gate_proj"
    mlp_up: str = "up_proj"
    mlp_down: str = "down_proj"
    mlp_post_norm: str | None = None
    parallel: str | bool = False
    logit_softcap: str | None = None

    def is_parallel(self, config: Any) -> bool:
        """Whether attention and MLP read the same residual stream in this configuration."""
        return bool(getattr(config, self.parallel)) if isinstance(self.parallel, str) else self.parallel

    def softcap(self, config: Any) -> float | None:
        """The final logits' soft-cap in this configuration, or None."""
        value = getattr(config, self.logit_softcap, None) if self.logit_softcap else None
        return None if value is None else float(value)
