"""Decoder-only language models: transformers, mixtures of experts, and state-space models."""

from __future__ import annotations

from typing import Any

from assay.subjects.architecture import (
    ArchitectureMap,
    Attention,
    Fused,
    Head,
    Latent,
    Mlp,
    Path,
    Separate,
    Stack,
    StateSpace,
)

NO_SETTINGS: dict[str, Any] = {}
LINEAR = Head()


def decoder(
    family: str, *model_types: str, head: Head = LINEAR, tiny: dict[str, Any] = NO_SETTINGS, **stack: Any
) -> ArchitectureMap:
    """A family with one stack."""
    return ArchitectureMap(family=family, model_types=model_types, stacks={"": Stack(**stack)}, head=head, tiny=tiny)


def plain(up: str, down: str, norm: Path | None = "post_attention_layernorm", path: str | None = "mlp") -> Mlp:
    """A feed-forward layer without a gate."""
    return Mlp(path=path, norm=norm, gate=None, up=up, down=down)


GPT2_MLP = plain("mlp.c_fc", "mlp.c_proj", "ln_2")
OUT_PROJ = Separate("attn.q_proj", "attn.k_proj", "attn.v_proj")
OPT_STYLE = Attention(norm="self_attn_layer_norm", proj="self_attn.out_proj")
EXPERTS = {"num_experts": 4, "num_local_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 32}
LATENT: dict[str, Any] = {
    "num_key_value_heads": 4,
    "q_lora_rank": 16,
    "kv_lora_rank": 16,
    "qk_nope_head_dim": 8,
    "qk_rope_head_dim": 8,
    "v_head_dim": 12,
    "n_routed_experts": 4,
    "n_shared_experts": 1,
    "n_group": 1,
    "topk_group": 1,
    "first_k_dense_replace": 1,
    **EXPERTS,
}

DECODERS: tuple[ArchitectureMap, ...] = (
    decoder(
        "GPT-2",
        "gpt2",
        blocks="h",
        embed="wte",
        pos_embed="wpe",
        final_norm="ln_f",
        attn=Attention(path="attn", norm="ln_1", qkv=Fused("attn.c_attn", "blocks"), proj="attn.c_proj"),
        mlp=GPT2_MLP,
    ),
    decoder(
        "GPT-Neo",
        "gpt_neo",
        blocks="h",
        embed="wte",
        pos_embed="wpe",
        final_norm="ln_f",
        attn=Attention(
            path="attn.attention",
            norm="ln_1",
            qkv=Separate("attn.attention.q_proj", "attn.attention.k_proj", "attn.attention.v_proj"),
            proj="attn.attention.out_proj",
            inside="function",
        ),
        mlp=GPT2_MLP,
        tiny={"num_layers": 2, "attention_types": [[["global", "local"], 1]], "window_size": 4},
    ),
    decoder(
        "GPT-J",
        "gptj",
        blocks="h",
        embed="wte",
        final_norm="ln_f",
        attn=Attention(path="attn", norm="ln_1", qkv=OUT_PROJ, proj="attn.out_proj", inside="function"),
        mlp=plain("mlp.fc_in", "mlp.fc_out", None),
        parallel=True,
        tiny={"rotary_dim": 4},
    ),
    decoder(
        "CodeGen",
        "codegen",
        blocks="h",
        embed="wte",
        final_norm="ln_f",
        attn=Attention(
            path="attn", norm="ln_1", qkv=Fused("attn.qkv_proj", "sharded"), proj="attn.out_proj", inside="function"
        ),
        mlp=plain("mlp.fc_in", "mlp.fc_out", None),
        parallel=True,
        tiny={"rotary_dim": 4},
    ),
    decoder(
        "GPT-NeoX",
        "gpt_neox",
        embed="embed_in",
        final_norm="final_layer_norm",
        attn=Attention(path="attention", qkv=Fused("attention.query_key_value", "grouped"), proj="attention.dense"),
        mlp=plain("mlp.dense_h_to_4h", "mlp.dense_4h_to_h"),
        parallel="use_parallel_residual",
    ),
    decoder(
        "GPT-BigCode",
        "gpt_bigcode",
        blocks="h",
        embed="wte",
        pos_embed="wpe",
        final_norm="ln_f",
        attn=Attention(path="attn", norm="ln_1", qkv=Fused("attn.c_attn", "grouped"), proj="attn.c_proj"),
        mlp=GPT2_MLP,
        n_kv_heads=lambda config: 1 if config.multi_query else config.n_head,
    ),
    decoder(
        "OPT",
        "opt",
        blocks="decoder.layers",
        embed=("decoder.project_in", "decoder.embed_tokens"),
        pos_embed="decoder.embed_positions",
        final_norm="decoder.final_layer_norm",
        attn=OPT_STYLE,
        mlp=plain("fc1", "fc2", "final_layer_norm", None),
        post_norm=lambda config: not config.do_layer_norm_before,
        head=Head(project="decoder.project_out"),
        tiny={"ffn_dim": 48, "word_embed_proj_dim": 32},
    ),
    decoder(
        "BLOOM",
        "bloom",
        blocks="h",
        embed="word_embeddings_layernorm",
        final_norm="ln_f",
        attn=Attention(
            path="self_attention",
            qkv=Fused("self_attention.query_key_value", "grouped"),
            proj="self_attention.dense",
            inside="function",
        ),
        mlp=plain("mlp.dense_h_to_4h", "mlp.dense_4h_to_h"),
    ),
    decoder(
        "Falcon",
        "falcon",
        blocks="h",
        embed="word_embeddings",
        final_norm="ln_f",
        attn=Attention(
            path="self_attention",
            norm=("ln_attn", "input_layernorm"),
            qkv=Fused("self_attention.query_key_value", "grouped"),
            proj="self_attention.dense",
            inside="function",
        ),
        mlp=plain("mlp.dense_h_to_4h", "mlp.dense_4h_to_h", ("ln_mlp", "post_attention_layernorm")),
        parallel=lambda config: config.new_decoder_architecture or config.parallel_attn,
        n_kv_heads=lambda config: (
            config.num_kv_heads
            if config.new_decoder_architecture
            else 1
            if config.multi_query
            else config.num_attention_heads
        ),
        tiny={"ffn_hidden_size": 48},
    ),
    decoder(
        "MPT",
        "mpt",
        blocks="blocks",
        embed="wte",
        final_norm="norm_f",
        attn=Attention(
            path="attn", norm="norm_1", qkv=Fused("attn.Wqkv", "blocks"), proj="attn.out_proj", inside="function"
        ),
        mlp=plain("ffn.up_proj", "ffn.down_proj", "norm_2", "ffn"),
    ),
    decoder(
        "XGLM",
        "xglm",
        final_norm="layer_norm",
        attn=Attention(norm="self_attn_layer_norm", proj="self_attn.out_proj", inside="function"),
        mlp=plain("fc1", "fc2", "final_layer_norm", None),
        pos_embed="embed_positions",
        tiny={"ffn_dim": 48, "attention_heads": 4, "num_layers": 2},
    ),
    decoder(
        "BioGPT",
        "biogpt",
        final_norm="layer_norm",
        attn=OPT_STYLE,
        mlp=plain("fc1", "fc2", "final_layer_norm", None),
        pos_embed="embed_positions",
    ),
    decoder(
        "Llama",
        *("llama", "mistral", "ministral", "ministral3", "qwen2", "qwen3", "smollm3", "olmo", "helium", "seed_oss"),
        *("ernie4_5", "hunyuan_v1_dense", "gemma", "cwm"),
    ),
    decoder("Arcee and Nemotron", "arcee", "nemotron", mlp=plain("mlp.up_proj", "mlp.down_proj")),
    decoder("StarCoder2", "starcoder2", mlp=plain("mlp.c_fc", "mlp.c_proj")),
    decoder(
        "Apertus",
        "apertus",
        attn=Attention(norm="attention_layernorm"),
        mlp=plain("mlp.up_proj", "mlp.down_proj", "feedforward_layernorm"),
    ),
    decoder(
        "Persimmon",
        "persimmon",
        final_norm="final_layernorm",
        attn=Attention(qkv=Fused("self_attn.query_key_value", "grouped"), proj="self_attn.dense"),
        mlp=plain("mlp.dense_h_to_4h", "mlp.dense_4h_to_h"),
    ),
    decoder(
        "Phi",
        "phi",
        final_norm="final_layernorm",
        attn=Attention(proj="self_attn.dense"),
        mlp=plain("mlp.fc1", "mlp.fc2", None),
        parallel=True,
    ),
    decoder(
        "Phi-3",
        "phi3",
        attn=Attention(qkv=Fused("self_attn.qkv_proj", "blocks")),
        mlp=Mlp(gate_up="mlp.gate_up_proj"),
        tiny={"pad_token_id": 0},
    ),
    decoder("GLM", "glm", mlp=Mlp(gate_up="mlp.gate_up_proj"), tiny={"pad_token_id": 0}),
    decoder(
        "GLM-4",
        "glm4",
        attn=Attention(post="post_self_attn_layernorm"),
        mlp=Mlp(gate_up="mlp.gate_up_proj", post="post_mlp_layernorm"),
        tiny={"pad_token_id": 0},
    ),
    decoder("StableLM", "stablelm", parallel="use_parallel_residual"),
    decoder(
        "OLMo 2 and EXAONE 4",
        *("olmo2", "olmo3", "exaone4"),
        attn=Attention(norm=None, post="post_attention_layernorm"),
        mlp=Mlp(norm=None, post="post_feedforward_layernorm"),
    ),
    decoder(
        "FlexOlmo",
        "flex_olmo",
        attn=Attention(norm=None, post="post_attention_layernorm"),
        mlp=Mlp(norm=None, post="post_feedforward_layernorm", router="mlp.gate"),
        tiny=EXPERTS,
    ),
    decoder("Cohere", "cohere", "cohere2", mlp=Mlp(norm=None), parallel=True, head=Head(scale="logit_scale")),
    decoder(
        "Granite",
        "granite",
        embed_scale="embedding_multiplier",
        residual_scale="residual_multiplier",
        head=Head(divisor="logits_scaling"),
        tiny={
            "embedding_multiplier": 2.0,
            "residual_multiplier": 0.5,
            "logits_scaling": 3.0,
            "attention_multiplier": 0.3,
        },
    ),
    decoder(
        "Granite MoE",
        "granitemoe",
        embed_scale="embedding_multiplier",
        residual_scale="residual_multiplier",
        head=Head(divisor="logits_scaling"),
        mlp=Mlp(path="block_sparse_moe", router="block_sparse_moe.router"),
        tiny={"embedding_multiplier": 2.0, "residual_multiplier": 0.5, "logits_scaling": 3.0, **EXPERTS},
    ),
    decoder(
        "Gemma 2 and 3",
        *("gemma2", "gemma3_text", "vaultgemma"),
        attn=Attention(post="post_attention_layernorm"),
        mlp=Mlp(norm="pre_feedforward_layernorm", post="post_feedforward_layernorm"),
        head=Head(softcap="final_logit_softcapping"),
        tiny={"sliding_window": 4, "query_pre_attn_scalar": 8},
    ),
    decoder(
        "Mixtral and Qwen MoE",
        *("mixtral", "qwen2_moe", "qwen3_moe", "olmoe", "phimoe", "ernie4_5_moe"),
        mlp=Mlp(router=("mlp.gate", "mlp.router")),
        tiny={**EXPERTS, "shared_expert_intermediate_size": 32, "decoder_sparse_step": 1, "mlp_only_layers": [0]},
    ),
    decoder("GPT-OSS", "gpt_oss", mlp=Mlp(router="mlp.router"), tiny={**EXPERTS, "sliding_window": 4}),
    decoder(
        "DeepSeek",
        *("deepseek_v2", "deepseek_v3"),
        attn=Attention(qkv=Latent()),
        mlp=Mlp(router="mlp.gate"),
        tiny=LATENT,
    ),
    decoder("GLM-4 MoE", "glm4_moe", mlp=Mlp(router="mlp.gate"), tiny={**LATENT, "pad_token_id": 0}),
    decoder(
        "Mamba",
        *("mamba", "falcon_mamba"),
        embed="embeddings",
        final_norm="norm_f",
        attn=None,
        mlp=None,
        ssm=StateSpace(kind="mamba"),
        tiny={"state_size": 4, "time_step_rank": 6},
    ),
    decoder(
        "Mamba-2",
        "mamba2",
        embed="embeddings",
        final_norm="norm_f",
        attn=None,
        mlp=None,
        ssm=StateSpace(kind="mamba2"),
        tiny={"state_size": 4, "num_heads": 8, "head_dim": 8, "n_groups": 2, "expand": 2, "chunk_size": 8},
    ),
)
