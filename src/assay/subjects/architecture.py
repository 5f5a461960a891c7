"""Where a family of models keeps its parts: a declaration, not code.

An `ArchitectureMap` names modules by dotted path. Paths in a stack are relative to the family's base model
(`LlamaForCausalLM.model`), paths in a block to the block; a tuple of paths means the first that is there. Nothing
here runs the model; `assay.activations.selfcheck` proves a map against the model it is used on.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

Path = str | tuple[str, ...]
Setting = str | int | float | bool | Callable[[Any], Any] | None
"""A constant, the name of a field of the config, or a function of the config."""


@dataclass(frozen=True, slots=True)
class Separate:
    """Queries, keys and values in three linear maps."""

    q: str = "self_attn.q_proj"
    k: str = "self_attn.k_proj"
    v: str = "self_attn.v_proj"


@dataclass(frozen=True, slots=True)
class Fused:
    """Queries, keys and values in one linear map.

    Args:
        path: The module.
        layout: `blocks` for `[all q | all k | all v]` (GPT-2, Phi-3); `grouped` for `[q ... q k v]`, one such group for
            each key head (GPT-NeoX, Falcon); `sharded` for CodeGen's four shards of `[q | v | k]`.
    """

    path: str
    layout: Literal["blocks", "grouped", "sharded"]


@dataclass(frozen=True, slots=True)
class Latent:
    """Keys and values from one compressed vector (multi-head latent attention).

    `attn.k` is then the part of each key that carries no position; the rotated part, which all heads share, joins it
    in `attn.rot_k`.

    Args:
        q: The map that makes queries.
        kv: The map from the compressed vector to `[k | v]`, head by head.
        nope: The config field with the width of a key's part without position.
    """

    q: Path = ("self_attn.q_b_proj", "self_attn.q_proj")
    kv: str = "self_attn.kv_b_proj"
    nope: str = "qk_nope_head_dim"


@dataclass(frozen=True, slots=True, kw_only=True)
class Attention:
    """An attention layer of a block.

    Args:
        path: The module that computes it.
        norm: The norm it reads through (in a post-norm block: the norm after it was added).
        qkv: Where queries, keys and values are made.
        proj: The output projection; its input is `z`.
        post: A module between the projection and the stream: a norm (Gemma 2) or a layer scale (DINOv2).
        inside: How scores and patterns are reached: through transformers' attention `interface`, through the torch
            `function` that the module calls (softmax, scaled dot product), or not at all.
    """

    path: str = "self_attn"
    norm: Path | None = "input_layernorm"
    qkv: Separate | Fused | Latent = Separate()
    proj: Path = "self_attn.o_proj"
    post: Path | None = None
    inside: Literal["interface", "function"] | None = "interface"


@dataclass(frozen=True, slots=True, kw_only=True)
class Mlp:
    """The feed-forward layer of a block, dense or of experts.

    Args:
        path: The module, where it is one.
        norm: The norm it reads through (in a post-norm block: the norm after it was added).
        gate: The projection that goes through the nonlinearity of a gated MLP.
        up: The projection into the hidden layer (the linear branch of a gated MLP).
        gate_up: Both in one map, `[gate | up]`; `up_gate` says that they come the other way round.
        up_gate: See `gate_up`.
        down: The projection out of the hidden layer.
        post: A module between the projection and the stream.
        router: The module that chooses experts. A block that has it is one of experts.
    """

    path: Path | None = "mlp"
    norm: Path | None = "post_attention_layernorm"
    gate: Path | None = "mlp.gate_proj"
    up: Path | None = "mlp.up_proj"
    gate_up: str | None = None
    up_gate: str | None = None
    down: Path = "mlp.down_proj"
    post: Path | None = None
    router: Path | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class StateSpace:
    """A selective state-space layer.

    Args:
        kind: `mamba` (dt, B and C from `x_proj`) or `mamba2` (all from `in_proj`).
        path: The module.
        norm: The norm it reads through.
    """

    kind: Literal["mamba", "mamba2"]
    path: str = "mixer"
    norm: str = "norm"


@dataclass(frozen=True, slots=True, kw_only=True)
class Stack:
    """A residual stream and the blocks on it.

    Args:
        blocks: The list of blocks.
        embed: The module whose output (times `embed_scale`) the stream starts with, learned positions aside.
        pos_embed: The learned position embedding, if its output is added to the stream.
        final_norm: The norm after the last block.
        attn: Attention, or None in a state-space model.
        cross: Attention to another stack.
        mlp: The feed-forward layer, or None where a block has none.
        ssm: The state-space layer.
        parallel: Whether attention and MLP read the same stream.
        post_norm: Whether norms stand after the addition, as in BERT: `x' = norm(x + f(x))`.
        causal: Whether a position sees only those before it.
        residual_scale: What attention's and the MLP's outputs are multiplied by before they are added (Granite).
        embed_scale: What the embedding is multiplied by outside its module (Granite).
        config: The part of the config that describes this stack, when it is not the whole.
        n_heads: The number of heads, where the config's usual fields do not say it.
        n_kv_heads: The number of key and value heads.
        source: The stack that cross-attention reads from.
    """

    blocks: str = "layers"
    embed: Path | None = "embed_tokens"
    pos_embed: Path | None = None
    final_norm: Path | None = "norm"
    attn: Attention | None = Attention()
    cross: Attention | None = None
    mlp: Mlp | None = Mlp()
    ssm: StateSpace | None = None
    parallel: Setting = False
    post_norm: Setting = False
    causal: bool = True
    residual_scale: Setting = None
    embed_scale: Setting = None
    config: str | None = None
    n_heads: Setting = None
    n_kv_heads: Setting = None
    source: str = ""


@dataclass(frozen=True, slots=True, kw_only=True)
class Head:
    """How the stream becomes logits: `cap tanh(scale (norm(x) W_U + b) / cap)`.

    Args:
        scale: What the logits are multiplied by (Cohere).
        divisor: What they are divided by (Granite).
        softcap: The `cap` (Gemma 2).
        linear: Whether norm and unembedding are all there is; BERT's head has a layer of its own between.
        project: A linear map between them, where there is one (OPT-350M).
    """

    scale: Setting = None
    divisor: Setting = None
    softcap: Setting = None
    linear: bool = True
    project: Path | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class ArchitectureMap:
    """The parts of one family of models.

    Args:
        family: The name shown to people.
        model_types: The values of `config.model_type` it serves.
        stacks: The stacks by name: `{"": stack}`, or `encoder` and `decoder`. The last one leads to the logits.
        head: How the last stack's stream becomes logits.
        inputs: What the module is given: tokens, images or audio.
        base: The path of the base model, when transformers' own `base_model` is not it.
        tiny: Settings of a small configuration for `assay.subjects.tiny`, beside the usual ones.
        auto: The transformers class that builds it.
        inferred: Whether the map was found by looking at a module rather than declared.
    """

    family: str
    model_types: tuple[str, ...]
    stacks: Mapping[str, Stack]
    head: Head = Head()
    inputs: Literal["tokens", "image", "audio"] = "tokens"
    base: str | None = None
    tiny: Mapping[str, Any] = field(default_factory=dict)
    auto: str = "AutoModelForCausalLM"
    inferred: bool = False


def setting(config: Any, value: Setting) -> Any:
    """What a setting says in a configuration."""
    if callable(value):
        return value(config)
    return getattr(config, value, None) if isinstance(value, str) else value
