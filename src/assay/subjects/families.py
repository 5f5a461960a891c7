"""The families assay knows: one declaration each. The next family is one more."""

from __future__ import annotations

from assay.subjects.architecture import ArchitectureMap, FusedProjection

FAMILIES: tuple[ArchitectureMap, ...] = (
    ArchitectureMap(
        family="GPT-2",
        model_types=("gpt2",),
        blocks="transformer.h",
        embed="transformer.wte",
        pos_embed="transformer.wpe",
        final_norm="transformer.ln_f",
        norm1="ln_1",
        norm2="ln_2",
        attn="attn",
        projections=FusedProjection("c_attn", "thirds"),
        attn_proj="c_proj",
        mlp_gate=None,
        mlp_up="c_fc",
        mlp_down="c_proj",
    ),
    ArchitectureMap(
        family="GPT-NeoX",
        model_types=("gpt_neox",),
        blocks="gpt_neox.layers",
        embed="gpt_neox.embed_in",
        final_norm="gpt_neox.final_layer_norm",
        attn="attention",
        projections=FusedProjection("query_key_value", "per_head"),
        attn_proj="dense",
        mlp_gate=None,
        mlp_up="dense_h_to_4h",
        mlp_down="dense_4h_to_h",
        parallel="use_parallel_residual",
    ),
    ArchitectureMap(
        family="Llama",
        model_types=("llama", "mistral", "qwen2", "qwen3"),
        blocks="model.layers",
        embed="model.embed_tokens",
        final_norm="model.norm",
    ),
    ArchitectureMap(
        family="Gemma 2 and 3",
        model_types=("gemma2", "gemma3_text"),
        blocks="model.layers",
        embed="model.embed_tokens",
        final_norm="model.norm",
        norm2="pre_feedforward_layernorm",
        attn_post_norm="post_attention_layernorm",
        mlp_post_norm="post_feedforward_layernorm",
        logit_softcap="final_logit_softcapping",
    ),
)


def family_of(model_type: str) -> ArchitectureMap | None:
    """Return the map that serves a `config.model_type`, or None.

    Example:
        >>> family_of("gpt2").family
        'GPT-2'
    """
    return next((family for family in FAMILIES if model_type in family.model_types), None)
