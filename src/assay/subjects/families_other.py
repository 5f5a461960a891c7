"""Encoders, encoder-decoders and vision models."""

from __future__ import annotations

from typing import Any

from assay.subjects.architecture import ArchitectureMap, Attention, Fused, Head, Mlp, Separate, Stack
from assay.subjects.families_decoders import plain

BERT = Stack(
    blocks="encoder.layer",
    embed=("embeddings_project", "embeddings"),
    final_norm=None,
    attn=Attention(
        path="attention.self",
        norm="attention.output.LayerNorm",
        qkv=Separate("attention.self.query", "attention.self.key", "attention.self.value"),
        proj="attention.output.dense",
    ),
    mlp=plain("intermediate.dense", "output.dense", "output.LayerNorm", None),
    post_norm=True,
    causal=False,
)
MASKED: dict[str, Any] = {"auto": "AutoModelForMaskedLM", "head": Head(linear=False)}
SEQ2SEQ: dict[str, Any] = {
    "d_model": 32,
    "encoder_layers": 2,
    "decoder_layers": 2,
    "encoder_attention_heads": 4,
    "decoder_attention_heads": 4,
    "encoder_ffn_dim": 48,
    "decoder_ffn_dim": 48,
    "decoder_start_token_id": 1,
    "forced_eos_token_id": None,
}


def bart_style(*, post_norm: bool, decoder: bool, **more: Any) -> Stack:
    """A stack as BART, Marian and Whisper have it."""
    root = "decoder" if decoder else "encoder"
    cross = Attention(
        path="encoder_attn",
        norm="encoder_attn_layer_norm",
        qkv=Separate("encoder_attn.q_proj", "encoder_attn.k_proj", "encoder_attn.v_proj"),
        proj="encoder_attn.out_proj",
    )
    given: dict[str, Any] = {
        "blocks": f"{root}.layers",
        "embed": (f"{root}.layernorm_embedding", f"{root}.embed_tokens"),
        "final_norm": f"{root}.layer_norm",
        "attn": Attention(norm="self_attn_layer_norm", proj="self_attn.out_proj"),
        "cross": cross if decoder else None,
        "mlp": plain("fc1", "fc2", "final_layer_norm", None),
        "post_norm": post_norm,
        "n_kv_heads": f"{root}_attention_heads",
        "causal": decoder,
        "source": "encoder" if decoder else "",
    }
    return Stack(**{**given, **more})


def t5_style(*, decoder: bool) -> Stack:
    """A stack of T5: its layers are numbered, and the MLP comes last."""
    root, last = ("decoder", 2) if decoder else ("encoder", 1)
    ff = f"layer.{last}.DenseReluDense"
    cross = Attention(
        path="layer.1.EncDecAttention",
        norm="layer.1.layer_norm",
        qkv=Separate("layer.1.EncDecAttention.q", "layer.1.EncDecAttention.k", "layer.1.EncDecAttention.v"),
        proj="layer.1.EncDecAttention.o",
    )
    return Stack(
        blocks=f"{root}.block",
        embed=f"{root}.embed_tokens",
        final_norm=f"{root}.final_layer_norm",
        attn=Attention(
            path="layer.0.SelfAttention",
            norm="layer.0.layer_norm",
            qkv=Separate("layer.0.SelfAttention.q", "layer.0.SelfAttention.k", "layer.0.SelfAttention.v"),
            proj="layer.0.SelfAttention.o",
        ),
        cross=cross if decoder else None,
        mlp=Mlp(
            path=ff,
            norm=f"layer.{last}.layer_norm",
            gate=f"{ff}.wi_0",
            up=(f"{ff}.wi_1", f"{ff}.wi"),
            down=f"{ff}.wo",
        ),
        causal=decoder,
        source="encoder" if decoder else "",
    )


def _t5_scale(config: Any) -> float:
    """T5's config says whether the decoder's output is scaled; UMT5's always is, and MT5's never."""
    scaled = getattr(config, "scale_decoder_outputs", config.model_type == "umt5")
    return float(config.d_model) ** -0.5 if scaled else 1.0


def clip_style(root: str, config: str | None, *, vision: bool, causal: bool) -> Stack:
    """A tower of CLIP or SigLIP."""
    at = f"{root}." if root else ""
    return Stack(
        blocks=f"{at}encoder.layers",
        embed=(f"{at}pre_layrnorm", f"{at}embeddings"),
        final_norm=f"{at}post_layernorm" if vision else f"{at}final_layer_norm",
        attn=Attention(norm="layer_norm1", proj="self_attn.out_proj"),
        mlp=plain("mlp.fc1", "mlp.fc2", "layer_norm2"),
        causal=causal,
        config=config,
    )


IMAGE = {"image_size": 16, "patch_size": 8, "num_channels": 3}
TOWERS = {"vision_config": IMAGE, "text_config": {}, "projection_dim": 16}

OTHERS: tuple[ArchitectureMap, ...] = (
    ArchitectureMap(
        family="BERT",
        model_types=("bert", "roberta", "xlm-roberta", "camembert", "electra"),
        stacks={"": BERT},
        **MASKED,
    ),
    ArchitectureMap(
        family="DistilBERT",
        model_types=("distilbert",),
        stacks={
            "": Stack(
                blocks="transformer.layer",
                embed="embeddings",
                final_norm=None,
                attn=Attention(
                    path="attention",
                    norm="sa_layer_norm",
                    qkv=Separate("attention.q_lin", "attention.k_lin", "attention.v_lin"),
                    proj="attention.out_lin",
                ),
                mlp=plain("ffn.lin1", "ffn.lin2", "output_layer_norm", "ffn"),
                post_norm=True,
                causal=False,
            )
        },
        tiny={"dim": 32, "hidden_dim": 48},
        **MASKED,
    ),
    ArchitectureMap(
        family="ModernBERT",
        model_types=("modernbert",),
        stacks={
            "": Stack(
                embed="embeddings",
                final_norm="final_norm",
                attn=Attention(path="attn", norm="attn_norm", qkv=Fused("attn.Wqkv", "blocks"), proj="attn.Wo"),
                mlp=Mlp(norm="mlp_norm", gate_up="mlp.Wi", down="mlp.Wo"),
                causal=False,
            )
        },
        tiny={"pad_token_id": 0, "local_attention": 4, "global_attn_every_n_layers": 2},
        **MASKED,
    ),
    ArchitectureMap(
        family="T5",
        model_types=("t5", "mt5", "umt5"),
        stacks={"encoder": t5_style(decoder=False), "decoder": t5_style(decoder=True)},
        head=Head(scale=_t5_scale),
        auto="AutoModelForSeq2SeqLM",
        tiny={
            "num_layers": 2,
            "num_decoder_layers": 2,
            "d_kv": 8,
            "d_ff": 48,
            "num_heads": 4,
            "d_model": 32,
            "decoder_start_token_id": 0,
        },
    ),
    ArchitectureMap(
        family="BART",
        model_types=("bart",),
        stacks={
            "encoder": bart_style(post_norm=True, decoder=False),
            "decoder": bart_style(post_norm=True, decoder=True),
        },
        auto="AutoModelForSeq2SeqLM",
        tiny=SEQ2SEQ,
    ),
    ArchitectureMap(
        family="mBART",
        model_types=("mbart",),
        stacks={
            "encoder": bart_style(post_norm=False, decoder=False),
            "decoder": bart_style(post_norm=False, decoder=True),
        },
        auto="AutoModelForSeq2SeqLM",
        tiny=SEQ2SEQ,
    ),
    *(
        ArchitectureMap(
            family=family,
            model_types=(family.lower(),),
            stacks={
                side: bart_style(
                    post_norm=post_norm,
                    decoder=side == "decoder",
                    pos_embed=f"{side}.embed_positions",
                    embed_scale=lambda config: config.d_model**0.5 if config.scale_embedding else 1.0,
                )
                for side in ("encoder", "decoder")
            },
            auto="AutoModelForSeq2SeqLM",
            tiny={**SEQ2SEQ, "pad_token_id": 0, "scale_embedding": True},
        )
        for family, post_norm in (("Marian", True), ("Pegasus", False))
    ),
    ArchitectureMap(
        family="Whisper",
        model_types=("whisper",),
        stacks={
            "encoder": bart_style(post_norm=False, decoder=False, embed=None),
            "decoder": bart_style(post_norm=False, decoder=True, pos_embed="decoder.embed_positions"),
        },
        inputs="audio",
        auto="AutoModelForSpeechSeq2Seq",
        tiny={**SEQ2SEQ, "max_source_positions": 8, "max_target_positions": 16, "num_mel_bins": 8, "pad_token_id": 0},
    ),
    ArchitectureMap(
        family="ViT",
        model_types=("vit",),
        stacks={
            "": Stack(
                embed="embeddings",
                final_norm="layernorm",
                attn=Attention(
                    path="attention",
                    norm="layernorm_before",
                    qkv=Separate("attention.q_proj", "attention.k_proj", "attention.v_proj"),
                    proj="attention.o_proj",
                ),
                mlp=plain("mlp.fc1", "mlp.fc2", "layernorm_after"),
                causal=False,
            )
        },
        head=Head(linear=False),
        inputs="image",
        auto="AutoModelForImageClassification",
        tiny=IMAGE,
    ),
    ArchitectureMap(
        family="DINOv2",
        model_types=("dinov2", "dinov2_with_registers"),
        stacks={
            "": Stack(
                blocks="encoder.layer",
                embed="embeddings",
                final_norm="layernorm",
                attn=Attention(
                    path="attention",
                    norm="norm1",
                    qkv=Separate("attention.q_proj", "attention.k_proj", "attention.v_proj"),
                    proj="attention.o_proj",
                    post="layer_scale1",
                ),
                mlp=Mlp(
                    norm="norm2",
                    gate="mlp.gate_proj",
                    up=("mlp.up_proj", "mlp.fc1"),
                    down=("mlp.down_proj", "mlp.fc2"),
                    post="layer_scale2",
                ),
                causal=False,
            )
        },
        head=Head(linear=False),
        inputs="image",
        auto="AutoModelForImageClassification",
        tiny=IMAGE,
    ),
    *(
        ArchitectureMap(
            family=name,
            model_types=(model_type,),
            stacks={
                "vision": clip_style("vision_model", "vision_config", vision=True, causal=False),
                "text": clip_style("text_model", "text_config", vision=False, causal=causal),
            },
            head=Head(linear=False),
            inputs="image",
            auto="AutoModel",
            tiny=TOWERS,
        )
        for name, model_type, causal in (("CLIP", "clip", True), ("SigLIP", "siglip", False))
    ),
    ArchitectureMap(
        family="CLIP and SigLIP, vision alone",
        model_types=("clip_vision_model", "siglip_vision_model"),
        stacks={"": clip_style("", None, vision=True, causal=False)},
        head=Head(linear=False),
        inputs="image",
        auto="AutoModel",
        tiny=IMAGE,
    ),
    *(
        ArchitectureMap(
            family=f"{name}, text alone",
            model_types=(model_type,),
            stacks={"": clip_style("", None, vision=False, causal=causal)},
            head=Head(linear=False),
            auto=auto,
        )
        for name, model_type, causal, auto in (
            ("CLIP", "clip_text_model", True, "AutoModel"),
            ("SigLIP", "siglip_text_model", False, "SiglipTextModel"),
        )
    ),
)
