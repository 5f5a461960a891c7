"""Where each site of each family is, read by hand from the models' own source: module, side, reshaping.

Nothing here uses assay. A line says `site  module side view...`: `>` is what leaves the module, `<` what enters it.
Views, with every model 32 wide, four heads of 8 (two of them for keys where they are grouped), 48 hidden units:

- `heads n`: the last dimension as n heads;
- `cols a b n`: columns a to b, as n heads (0: no heads);
- `part g m i`: the columns are g groups of m vectors; the i-th of each (GPT-NeoX: 4 groups of q, k, v);
- `parts g m a b`: vectors a to b of each group (Falcon's grouped queries);
- `shard h i`: CodeGen's four shards of [q | v | k], h heads in all;
- `latent n a b`: n heads, columns a to b of each (multi-head latent attention);
- `item i`: of a tuple; `times x`: the model multiplies what it uses by x.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

View = Callable[[Tensor], Tensor]


@dataclass(frozen=True)
class At:
    """One place: a module, a side, and how its tensor is read."""

    path: str
    side: str
    view: View
    item: int = 0
    factor: float = 1.0
    rows: bool = True
    """Whether it has rows; position embeddings may come once for all of them."""

    def under(self, block: str) -> At:
        path = self.path if self.path != "." else ""
        return At(".".join(p for p in (block, path) if p), self.side, self.view, self.item, self.factor, self.rows)


Facts = dict[str, At]


@dataclass(frozen=True)
class Row:
    """A model and what its sites are."""

    name: str
    model_type: str
    settings: dict[str, Any]
    facts: Facts
    inputs: str = "tokens"


def heads(n: int) -> View:
    return lambda x: x.reshape(*x.shape[:-1], n, -1)


def cols(a: int, b: int, n: int) -> View:
    return lambda x: x[..., a:b].reshape(*x.shape[:-1], n, -1) if n else x[..., a:b]


def part(g: int, m: int, i: int) -> View:
    return lambda x: x.reshape(*x.shape[:-1], g, m, -1)[..., i, :]


def parts(g: int, m: int, a: int, b: int) -> View:
    return lambda x: x.reshape(*x.shape[:-1], g, m, -1)[..., a:b, :].flatten(-3, -2)


def shard(h: int, i: int) -> View:
    def view(x: Tensor) -> Tensor:
        split = x.reshape(*x.shape[:-1], 4, -1)
        mine = torch.split(split, split.shape[-1] // 3, dim=-1)[i]
        return mine.reshape(*x.shape[:-1], 4, h // 4, -1).flatten(-3, -2)

    return view


def latent(n: int, a: int, b: int) -> View:
    return lambda x: x.reshape(x.shape[0], x.shape[-2], n, -1)[..., a:b]


VIEWS: dict[str, Callable[..., View]] = {
    "heads": heads,
    "cols": cols,
    "part": part,
    "parts": parts,
    "shard": shard,
    "latent": latent,
}
SIDES = {"<": "in", ">": "out"}


def lines_of(text: str) -> list[str]:
    return [line for line in text.splitlines() if line.strip()]


def read(text: str) -> Facts:
    """Read a table."""
    found: Facts = {}
    for line in lines_of(text):
        site, path, side, *rest = line.split()
        view, item, factor = (lambda x: x), 0, 1.0
        if "times" in rest:
            factor, rest = float(rest[rest.index("times") + 1]), rest[: rest.index("times")]
        if "item" in rest:
            item, rest = int(rest[rest.index("item") + 1]), rest[: rest.index("item")]
        if rest:
            view = VIEWS[rest[0]](*map(int, rest[1:]))
        found[site] = At(path, SIDES[side], view, item, factor, rows=site != "pos_embed")
    return found


def blocks(path: str, *tables: str, prefix: str = "", n: int = 2) -> Facts:
    """The same table for every block, or one table a block."""
    found: Facts = {}
    for i in range(n):
        table = tables[min(i, len(tables) - 1)]
        here = {"resid_pre": At(".", "in", lambda x: x), "resid_post": At(".", "out", lambda x: x), **read(table)}
        found |= {f"{prefix}blocks.{i}.{site}": at.under(path.format(i)) for site, at in here.items()}
    return found


def outside(root: str, text: str, prefix: str = "") -> Facts:
    """A table of what is outside the blocks."""
    return {f"{prefix}{site}": at.under(root) for site, at in read(text).items()}


def edit_table(table: str, *lines: str, drop: tuple[str, ...] = ()) -> str:
    """A table with some lines in the place of those of the same sites, and some left out."""
    new = {line.split()[0]: line for line in lines}
    old = {line.split()[0]: line for line in lines_of(table)}
    return "\n".join(line for site, line in {**old, **new}.items() if site not in drop)


# Decoders with queries, keys and values of their own

LLAMA = """
norm1      input_layernorm            >
attn.q     self_attn.q_proj           >  heads 4
attn.k     self_attn.k_proj           >  heads 2
attn.v     self_attn.v_proj           >  heads 2
attn.z     self_attn.o_proj           <  heads 4
attn.out   self_attn                  >
resid_mid  post_attention_layernorm   <
norm2      post_attention_layernorm   >
mlp.in     mlp                        <
mlp.gate   mlp.gate_proj              >
mlp.pre    mlp.up_proj                >
mlp.post   mlp.down_proj              <
mlp.out    mlp                        >
"""
MHA = ("attn.k self_attn.k_proj > heads 4", "attn.v self_attn.v_proj > heads 4")
TOKENS = """
embed       embed_tokens  >
final_norm  norm          >
"""
EXPERTS = (
    "mlp.router   mlp.gate > item 0",
    "mlp.weights  mlp.gate > item 1",
    "mlp.experts  mlp.gate > item 2",
)
NO_HIDDEN = ("mlp.gate", "mlp.pre", "mlp.post")
MOE = edit_table(LLAMA, *EXPERTS, drop=NO_HIDDEN)
UNGATED = edit_table(LLAMA, drop=("mlp.gate",))
SANDWICH = edit_table(
    LLAMA,
    "attn.out   post_attention_layernorm    >",
    "resid_mid  pre_feedforward_layernorm   <",
    "norm2      pre_feedforward_layernorm   >",
    "mlp.out    post_feedforward_layernorm  >",
)
POST_ONLY = edit_table(
    LLAMA,
    "attn.out   post_attention_layernorm    >",
    "resid_mid  mlp                         <",
    "mlp.out    post_feedforward_layernorm  >",
    drop=("norm1", "norm2"),
)
PARALLEL = edit_table(LLAMA, drop=("resid_mid", "norm2"))
SCALED = edit_table(LLAMA, "attn.out self_attn > times 0.5", "mlp.out mlp > times 0.5")
GATE_UP = ("mlp.gate mlp.gate_up_proj > cols 0 48 0", "mlp.pre mlp.gate_up_proj > cols 48 96 0")


def llama(name: str, model_type: str = "", table: str = LLAMA, out: str = TOKENS, **settings: Any) -> Row:
    facts = blocks("model.layers.{}", table) | outside("model", out)
    return Row(name, model_type or name, settings, facts)


def moe(
    name: str, model_type: str = "", *, dense: bool = False, table: str = MOE, first: str = LLAMA, **settings: Any
) -> Row:
    """Some keep their first block dense."""
    tables = (first, table) if dense else (table,)
    facts = blocks("model.layers.{}", *tables) | outside("model", TOKENS)
    return Row(name, model_type or name, settings, facts)


def latent_attention(name: str, model_type: str, q: str, **settings: Any) -> Row:
    lines = (
        f"attn.q self_attn.{q} > latent 4 0 16",
        "attn.k self_attn.kv_b_proj > latent 4 0 8",
        "attn.v self_attn.kv_b_proj > latent 4 8 20",
    )
    tables = edit_table(LLAMA, *lines), edit_table(MOE, *lines)
    facts = blocks("model.layers.{}", *tables) | outside("model", TOKENS)
    return Row(name, model_type, settings, facts)


def per_head(module: str) -> tuple[str, ...]:
    """Fused as q, k, v of each head in turn."""
    return tuple(f"attn.{name} {module} > part 4 3 {i}" for i, name in enumerate("qkv"))


GPT2 = """
norm1      ln_1          >
attn.q     attn.c_attn   >  cols 0 32 4
attn.k     attn.c_attn   >  cols 32 64 4
attn.v     attn.c_attn   >  cols 64 96 4
attn.z     attn.c_proj   <  heads 4
attn.out   attn          >
resid_mid  ln_2          <
norm2      ln_2          >
mlp.in     mlp           <
mlp.pre    mlp.c_fc      >
mlp.post   mlp.c_proj    <
mlp.out    mlp           >
"""
GPT2_OUT = "embed wte >\npos_embed wpe >\nfinal_norm ln_f >"
GPT_NEO = edit_table(
    GPT2,
    *(f"attn.{name} attn.attention.{name}_proj > heads 4" for name in "qkv"),
    "attn.z attn.attention.out_proj < heads 4",
)
GPTJ = """
norm1      ln_1           >
attn.q     attn.q_proj    >  heads 4
attn.k     attn.k_proj    >  heads 4
attn.v     attn.v_proj    >  heads 4
attn.z     attn.out_proj  <  heads 4
attn.out   attn           >
mlp.in     mlp            <
mlp.pre    mlp.fc_in      >
mlp.post   mlp.fc_out     <
mlp.out    mlp            >
"""
CODEGEN = edit_table(
    GPTJ,
    "attn.q attn.qkv_proj > shard 8 0",
    "attn.v attn.qkv_proj > shard 8 1",
    "attn.k attn.qkv_proj > shard 8 2",
    "attn.z attn.out_proj < heads 8",
)
NEOX = edit_table(
    """
norm1      input_layernorm           >
attn.z     attention.dense           <  heads 4
attn.out   attention                 >
resid_mid  post_attention_layernorm  <
norm2      post_attention_layernorm  >
mlp.in     mlp                       <
mlp.pre    mlp.dense_h_to_4h         >
mlp.post   mlp.dense_4h_to_h         <
mlp.out    mlp                       >
""",
    *per_head("attention.query_key_value"),
)
NEOX_OUT = "embed embed_in >\nfinal_norm final_layer_norm >"
OPT = """
norm1      self_attn_layer_norm  >
attn.q     self_attn.q_proj      >  heads 4
attn.k     self_attn.k_proj      >  heads 4
attn.v     self_attn.v_proj      >  heads 4
attn.z     self_attn.out_proj    <  heads 4
attn.out   self_attn             >
resid_mid  final_layer_norm      <
norm2      final_layer_norm      >
mlp.in     fc1                   <
mlp.pre    fc1                   >
mlp.post   fc2                   <
mlp.out    fc2                   >
"""
OPT_POST = edit_table(OPT, "resid_mid self_attn_layer_norm >")
BLOOM = edit_table(
    NEOX,
    *per_head("self_attention.query_key_value"),
    "attn.z self_attention.dense < heads 4",
    "attn.out self_attention.dense >",
    "mlp.out mlp.dense_4h_to_h >",
)
MULTI_QUERY = (
    "attn.q self_attention.query_key_value > cols 0 32 4",
    "attn.k self_attention.query_key_value > cols 32 40 1",
    "attn.v self_attention.query_key_value > cols 40 48 1",
)
GROUPED = (
    "attn.q self_attention.query_key_value > parts 2 4 0 2",
    "attn.k self_attention.query_key_value > part 2 4 2",
    "attn.v self_attention.query_key_value > part 2 4 3",
)
FALCON = edit_table(BLOOM, "attn.out self_attention >", "mlp.out mlp >")
FALCON_PARALLEL = edit_table(FALCON, drop=("resid_mid", "norm2"))
FALCON_TWO = edit_table(FALCON, *GROUPED, "norm1 ln_attn >", "norm2 ln_mlp >", drop=("resid_mid",))
FALCON_OUT = "embed word_embeddings >\nfinal_norm ln_f >"
MPT_OUT = "embed wte >\nfinal_norm norm_f >"
MPT = """
norm1      norm_1         >
attn.q     attn.Wqkv      >  cols 0 32 4
attn.k     attn.Wqkv      >  cols 32 64 4
attn.v     attn.Wqkv      >  cols 64 96 4
attn.z     attn.out_proj  <  heads 4
attn.out   attn           >
resid_mid  norm_2         <
norm2      norm_2         >
mlp.in     ffn            <
mlp.pre    ffn.up_proj    >
mlp.post   ffn.down_proj  <
mlp.out    ffn.down_proj  >
"""
PHI = edit_table(
    PARALLEL,
    "attn.z    self_attn.dense < heads 4",
    "mlp.pre   mlp.fc1 >",
    "mlp.post  mlp.fc2 <",
    drop=("mlp.gate",),
)
PERSIMMON = edit_table(
    UNGATED,
    *per_head("self_attn.query_key_value"),
    "attn.z    self_attn.dense < heads 4",
    "mlp.pre   mlp.dense_h_to_4h >",
    "mlp.post  mlp.dense_4h_to_h <",
)
APERTUS = edit_table(
    UNGATED, "norm1 attention_layernorm >", "norm2 feedforward_layernorm >", "resid_mid feedforward_layernorm <"
)
PHI3 = edit_table(
    LLAMA,
    *GATE_UP,
    "attn.q self_attn.qkv_proj > cols 0 32 4",
    "attn.k self_attn.qkv_proj > cols 32 48 2",
    "attn.v self_attn.qkv_proj > cols 48 64 2",
)
GLM4 = edit_table(LLAMA, *GATE_UP, "attn.out post_self_attn_layernorm >", "mlp.out post_mlp_layernorm >")
LAYER_NORM = "embed embed_tokens >\nfinal_norm final_layernorm >"
MAMBA = """
norm1      norm            >
ssm.x      mixer.in_proj   >  cols 0 48 0
ssm.gate   mixer.in_proj   >  cols 48 96 0
ssm.dt     mixer.x_proj    >  cols 0 6 0
ssm.B      mixer.x_proj    >  cols 6 10 0
ssm.C      mixer.x_proj    >  cols 10 14 0
ssm.post   mixer.out_proj  <
ssm.out    mixer           >
"""
MAMBA2 = edit_table(
    MAMBA,
    "ssm.gate  mixer.in_proj > cols 0 64 0",
    "ssm.x     mixer.in_proj > cols 64 128 0",
    "ssm.B     mixer.in_proj > cols 128 136 0",
    "ssm.C     mixer.in_proj > cols 136 144 0",
    "ssm.dt    mixer.in_proj > cols 144 152 0",
)
MAMBA_OUT = "embed embeddings >\nfinal_norm norm_f >"


def row(name: str, path: str, table: str, out: str, model_type: str = "", **settings: Any) -> Row:
    """A decoder whose blocks are at `path`, with what is outside them beside the list."""
    root = path.rpartition(".")[0].rpartition(".")[0] or path.rpartition(".")[0]
    return Row(name, model_type or name, settings, blocks(path, table) | outside(root, out))


def gpt(name: str, table: str, out: str, model_type: str = "", **settings: Any) -> Row:
    facts = blocks("transformer.h.{}", table) | outside("transformer", out)
    return Row(name, model_type or name, settings, facts)


def opt(name: str, table: str = OPT, *, model_type: str = "opt", embed: str = "embed_tokens", **settings: Any) -> Row:
    out = f"embed {embed} >\npos_embed embed_positions >\nfinal_norm final_layer_norm >"
    if table is OPT_POST:
        out = out.rpartition("\n")[0]
    facts = blocks("model.decoder.layers.{}", table) | outside("model.decoder", out)
    return Row(name, model_type, settings, facts)


def mamba(name: str, table: str = MAMBA) -> Row:
    return Row(name, name, {}, blocks("backbone.layers.{}", table) | outside("backbone", MAMBA_OUT))


BIGCODE = tuple(line.replace("self_attention.query_key_value", "attn.c_attn") for line in MULTI_QUERY)
OLMO_CLIP = {"clip_qkv": 0.2}
POSITIONS = "embed embed_tokens >\npos_embed embed_positions >\nfinal_norm layer_norm >"

DECODERS = (
    gpt("gpt2", GPT2, GPT2_OUT),
    gpt("gpt_neo", GPT_NEO, GPT2_OUT),
    gpt("gptj", GPTJ, "embed wte >\nfinal_norm ln_f >"),
    gpt("codegen", CODEGEN, "embed wte >\nfinal_norm ln_f >", n_head=8, num_attention_heads=8, rotary_dim=2),
    row("gpt_neox", "gpt_neox.layers.{}", edit_table(NEOX, drop=("resid_mid",)), NEOX_OUT),
    row("gpt_neox, sequential", "gpt_neox.layers.{}", NEOX, NEOX_OUT, "gpt_neox", use_parallel_residual=False),
    gpt("gpt_bigcode", edit_table(GPT2, *BIGCODE), GPT2_OUT),
    gpt(
        "gpt_bigcode, every head its keys",
        edit_table(GPT2, *per_head("attn.c_attn")),
        GPT2_OUT,
        model_type="gpt_bigcode",
        multi_query=False,
    ),
    opt("opt"),
    opt("opt, post-norm", OPT_POST, do_layer_norm_before=False),
    opt("opt, projected", embed="project_in", word_embed_proj_dim=16),
    opt("opt, as OPT-350M", OPT_POST, embed="project_in", word_embed_proj_dim=16, do_layer_norm_before=False),
    gpt("bloom", BLOOM, "embed word_embeddings_layernorm >\nfinal_norm ln_f >"),
    gpt("falcon", edit_table(FALCON_PARALLEL, *MULTI_QUERY), FALCON_OUT),
    gpt("falcon, new, two norms", FALCON_TWO, FALCON_OUT, "falcon", new_decoder_architecture=True),
    gpt(
        "falcon, new, one norm",
        edit_table(FALCON_PARALLEL, *GROUPED),
        FALCON_OUT,
        "falcon",
        new_decoder_architecture=True,
        num_ln_in_parallel_attn=1,
    ),
    gpt(
        "falcon, sequential, ALiBi",
        FALCON,
        FALCON_OUT,
        "falcon",
        multi_query=False,
        parallel_attn=False,
        alibi=True,
        bias=True,
        num_kv_heads=4,
    ),
    gpt("falcon, ALiBi", edit_table(FALCON_PARALLEL, *MULTI_QUERY), FALCON_OUT, "falcon", alibi=True),
    row("mpt", "transformer.blocks.{}", MPT, MPT_OUT),
    row("mpt, clipped", "transformer.blocks.{}", MPT, MPT_OUT, "mpt", attn_config={"clip_qkv": 0.2}),
    row("xglm", "model.layers.{}", OPT, POSITIONS),
    row("biogpt", "biogpt.layers.{}", OPT, POSITIONS),
    llama("llama"),
    llama("llama, tied, with biases", "llama", tie_word_embeddings=True, attention_bias=True, mlp_bias=True),
    llama("mistral", sliding_window=4),
    llama("ministral", sliding_window=4),
    llama("ministral3"),
    llama("qwen2"),
    llama("qwen3"),
    llama("smollm3"),
    llama("olmo"),
    llama("olmo, clipped", "olmo", **OLMO_CLIP),
    llama("helium"),
    llama("seed_oss"),
    llama("ernie4_5"),
    llama("hunyuan_v1_dense"),
    llama("gemma"),
    llama("cwm"),
    llama("arcee", table=UNGATED),
    llama("nemotron", table=UNGATED),
    llama("starcoder2", table=edit_table(UNGATED, "mlp.pre mlp.c_fc >", "mlp.post mlp.c_proj <")),
    llama("apertus", table=APERTUS),
    row("persimmon", "model.layers.{}", PERSIMMON, LAYER_NORM),
    row("phi", "model.layers.{}", PHI, LAYER_NORM),
    llama("phi3", table=PHI3),
    llama("glm", table=edit_table(LLAMA, *GATE_UP)),
    llama("glm4", table=GLM4),
    llama("stablelm"),
    llama("stablelm, parallel", "stablelm", PARALLEL, use_parallel_residual=True),
    llama("stablelm, normed queries", "stablelm", qk_layernorm=True),
    llama("olmo2", table=POST_ONLY),
    llama("olmo3", table=POST_ONLY, sliding_window=4),
    llama("exaone4", table=POST_ONLY),
    llama("cohere", table=PARALLEL, logit_scale=0.25),
    llama("cohere, normed queries", "cohere", PARALLEL, use_qk_norm=True),
    llama("cohere2", table=PARALLEL, sliding_window=4, logit_scale=0.25),
    llama("granite", table=SCALED, out="embed embed_tokens > times 2.0\nfinal_norm norm >"),
    llama("gemma2", table=SANDWICH, attn_logit_softcapping=2.0, final_logit_softcapping=3.0),
    llama("gemma3_text", table=SANDWICH, layer_types=["sliding_attention", "full_attention"]),
    llama("vaultgemma", table=edit_table(SANDWICH, "attn.out self_attn >", "mlp.out mlp >")),
    moe("mixtral"),
    moe("qwen2_moe", dense=True),
    moe("qwen3_moe", dense=True),
    moe("olmoe"),
    moe("olmoe, clipped", "olmoe", **OLMO_CLIP),
    moe("phimoe", table=edit_table(MOE, *(line.replace("mlp.gate", "mlp.router") for line in EXPERTS))),
    moe("ernie4_5_moe", dense=True),
    moe(
        "gpt_oss",
        table=edit_table(MOE, *(line.replace("mlp.gate", "mlp.router") for line in EXPERTS), "mlp.out mlp > item 0"),
    ),
    moe("flex_olmo", table=edit_table(POST_ONLY, *EXPERTS, drop=NO_HIDDEN)),
    Row(
        "granitemoe",
        "granitemoe",
        {},
        blocks(
            "model.layers.{}",
            edit_table(
                MOE,
                *(line.replace("mlp.gate", "block_sparse_moe.router") for line in EXPERTS),
                "attn.out self_attn > times 0.5",
                "mlp.in block_sparse_moe <",
                "mlp.out block_sparse_moe > times 0.5",
            ),
        )
        | outside("model", "embed embed_tokens > times 2.0\nfinal_norm norm >"),
    ),
    latent_attention("deepseek_v2", "deepseek_v2", "q_b_proj"),
    latent_attention("deepseek_v2, queries whole", "deepseek_v2", "q_proj", q_lora_rank=None),
    latent_attention("deepseek_v3", "deepseek_v3", "q_b_proj"),
    latent_attention("deepseek_v3, queries whole", "deepseek_v3", "q_proj", q_lora_rank=None),
    moe("glm4_moe", dense=True, first=edit_table(LLAMA, *MHA), table=edit_table(MOE, *MHA)),
    mamba("mamba"),
    mamba("falcon_mamba"),
    mamba("mamba2", MAMBA2),
)

# Encoders

BERT = """
norm1      attention.output.LayerNorm  >
attn.q     attention.self.query        >  heads 4
attn.k     attention.self.key          >  heads 4
attn.v     attention.self.value        >  heads 4
attn.z     attention.output.dense      <  heads 4
attn.out   attention.output.dense      >
resid_mid  attention                   >
norm2      output.LayerNorm            >
mlp.in     intermediate.dense          <
mlp.pre    intermediate.dense          >
mlp.post   output.dense                <
mlp.out    output.dense                >
"""
DISTILBERT = """
norm1      sa_layer_norm       >
attn.q     attention.q_lin     >  heads 4
attn.k     attention.k_lin     >  heads 4
attn.v     attention.v_lin     >  heads 4
attn.z     attention.out_lin   <  heads 4
attn.out   attention           >
resid_mid  sa_layer_norm       >
norm2      output_layer_norm   >
mlp.in     ffn                 <
mlp.pre    ffn.lin1            >
mlp.post   ffn.lin2            <
mlp.out    ffn                 >
"""
MODERNBERT = """
norm1      attn_norm  >
attn.q     attn.Wqkv  >  cols 0 32 4
attn.k     attn.Wqkv  >  cols 32 64 4
attn.v     attn.Wqkv  >  cols 64 96 4
attn.z     attn.Wo    <  heads 4
attn.out   attn       >
resid_mid  mlp_norm   <
norm2      mlp_norm   >
mlp.in     mlp        <
mlp.gate   mlp.Wi     >  cols 0 48 0
mlp.pre    mlp.Wi     >  cols 48 96 0
mlp.post   mlp.Wo     <
mlp.out    mlp        >
"""


def bert(name: str, root: str, model_type: str = "", embed: str = "embeddings", **settings: Any) -> Row:
    facts = blocks(f"{root}.encoder.layer.{{}}", BERT) | outside(root, f"embed {embed} >")
    return Row(name, model_type or name, settings, facts)


ENCODERS = (
    bert("bert", "bert"),
    bert("roberta", "roberta"),
    bert("xlm-roberta", "roberta"),
    bert("camembert", "roberta"),
    bert("electra", "electra", embed="embeddings_project"),
    bert("electra, as wide within", "electra", "electra", embedding_size=32),
    Row(
        "distilbert",
        "distilbert",
        {},
        blocks("distilbert.transformer.layer.{}", DISTILBERT) | outside("distilbert", "embed embeddings >"),
    ),
    Row(
        "modernbert",
        "modernbert",
        {"layer_types": ["sliding_attention", "full_attention"]},
        blocks("model.layers.{}", edit_table(MODERNBERT, drop=("norm1",)), MODERNBERT)
        | outside("model", "embed embeddings >\nfinal_norm final_norm >"),
    ),
)

# Encoder-decoders

CROSS = """
norm_cross      encoder_attn_layer_norm  >
cross_attn.q    encoder_attn.q_proj      >  heads 4
cross_attn.k    encoder_attn.k_proj      >  heads 4
cross_attn.v    encoder_attn.v_proj      >  heads 4
cross_attn.z    encoder_attn.out_proj    <  heads 4
cross_attn.out  encoder_attn             >
"""
BART_CROSS = edit_table(OPT_POST + CROSS, "resid_cross encoder_attn_layer_norm >")
MBART_CROSS = edit_table(OPT + CROSS, "resid_mid encoder_attn_layer_norm <", "resid_cross final_layer_norm <")


def bart(name: str, *, post: bool, out: str, inputs: str = "pairs", **settings: Any) -> Row:
    sides = {"encoder": (OPT_POST if post else OPT), "decoder": (BART_CROSS if post else MBART_CROSS)}
    facts: Facts = {}
    for side, table in sides.items():
        facts |= blocks(f"model.{side}.layers.{{}}", table, prefix=f"{side}.")
        facts |= outside(f"model.{side}", out, prefix=f"{side}.")
    return Row(name, name, settings, facts, inputs)


SUMS = f"embed embed_tokens > times {math.sqrt(32)}\npos_embed embed_positions >"
T5_SELF = """
norm1     layer.0.layer_norm       >
attn.q    layer.0.SelfAttention.q  >  heads 4
attn.k    layer.0.SelfAttention.k  >  heads 4
attn.v    layer.0.SelfAttention.v  >  heads 4
attn.z    layer.0.SelfAttention.o  <  heads 4
attn.out  layer.0.SelfAttention    >
"""
T5_CROSS = """
resid_mid       layer.1.layer_norm         <
norm_cross      layer.1.layer_norm         >
cross_attn.q    layer.1.EncDecAttention.q  >  heads 4
cross_attn.k    layer.1.EncDecAttention.k  >  heads 4
cross_attn.v    layer.1.EncDecAttention.v  >  heads 4
cross_attn.z    layer.1.EncDecAttention.o  <  heads 4
cross_attn.out  layer.1.EncDecAttention    >
resid_cross     layer.2.layer_norm         <
"""
T5_MLP = """
norm2     layer.1.layer_norm            >
mlp.in    layer.1.DenseReluDense        <
mlp.pre   layer.1.DenseReluDense.wi     >
mlp.post  layer.1.DenseReluDense.wo     <
mlp.out   layer.1.DenseReluDense        >
"""
T5_GATED = edit_table(T5_MLP, "mlp.gate layer.1.DenseReluDense.wi_0 >", "mlp.pre layer.1.DenseReluDense.wi_1 >")


def t5(name: str, model_type: str, mlp: str, **settings: Any) -> Row:
    out = "embed embed_tokens >\nfinal_norm final_layer_norm >"
    encoder = T5_SELF + "\nresid_mid layer.1.layer_norm <\n" + mlp.strip()
    decoder = T5_SELF + T5_CROSS + mlp.replace("layer.1.", "layer.2.").strip()
    facts: Facts = {}
    for side, table in (("encoder", encoder), ("decoder", decoder)):
        facts |= blocks(f"{side}.block.{{}}", table, prefix=f"{side}.") | outside(side, out, prefix=f"{side}.")
    return Row(name, model_type, settings, facts, "pairs")


def whisper() -> Row:
    """Its encoder has two heads here, its decoder four."""
    two = {name: f"attn.{name} self_attn.{path} heads 2" for name, path in (("q", "q_proj >"), ("k", "k_proj >"))}
    two |= {name: f"attn.{name} self_attn.{path} heads 2" for name, path in (("v", "v_proj >"), ("z", "out_proj <"))}
    facts = blocks("model.encoder.layers.{}", edit_table(OPT, *two.values()), prefix="encoder.")
    facts |= blocks("model.decoder.layers.{}", MBART_CROSS, prefix="decoder.")
    facts |= outside("model.encoder", "final_norm layer_norm >", prefix="encoder.")
    facts |= outside("model.decoder", POSITIONS, prefix="decoder.")
    return Row("whisper", "whisper", {}, facts, "audio")


PAIRS = (
    t5("t5", "t5", T5_MLP, feed_forward_proj="relu"),
    t5("t5, gated", "t5", T5_GATED, feed_forward_proj="gated-gelu"),
    t5("t5, untied", "t5", T5_GATED, feed_forward_proj="gated-gelu", tie_word_embeddings=False),
    t5("mt5", "mt5", T5_GATED),
    t5("umt5", "umt5", T5_GATED),
    bart("bart", post=True, out="embed layernorm_embedding >"),
    bart("mbart", post=False, out="embed layernorm_embedding >\nfinal_norm layer_norm >"),
    bart("marian", post=True, out=SUMS),
    bart("pegasus", post=False, out=SUMS + "\nfinal_norm layer_norm >"),
    whisper(),
)

# Vision

VIT = """
norm1      layernorm_before    >
attn.q     attention.q_proj    >  heads 4
attn.k     attention.k_proj    >  heads 4
attn.v     attention.v_proj    >  heads 4
attn.z     attention.o_proj    <  heads 4
attn.out   attention           >
resid_mid  layernorm_after     <
norm2      layernorm_after     >
mlp.in     mlp                 <
mlp.pre    mlp.fc1             >
mlp.post   mlp.fc2             <
mlp.out    mlp                 >
"""
DINO = edit_table(
    VIT,
    "norm1     norm1         >",
    "attn.out  layer_scale1  >",
    "resid_mid norm2         <",
    "norm2     norm2         >",
    "mlp.out   layer_scale2  >",
)
DINO_GATED = edit_table(DINO, "mlp.gate mlp.gate_proj >", "mlp.pre mlp.up_proj >", "mlp.post mlp.down_proj <")
CLIP = """
norm1      layer_norm1         >
attn.q     self_attn.q_proj    >  heads 4
attn.k     self_attn.k_proj    >  heads 4
attn.v     self_attn.v_proj    >  heads 4
attn.z     self_attn.out_proj  <  heads 4
attn.out   self_attn           >
resid_mid  layer_norm2         <
norm2      layer_norm2         >
mlp.in     mlp                 <
mlp.pre    mlp.fc1             >
mlp.post   mlp.fc2             <
mlp.out    mlp                 >
"""


def vision(name: str, root: str, path: str, table: str, model_type: str = "", **settings: Any) -> Row:
    facts = blocks(f"{root}.{path}", table) | outside(root, "embed embeddings >\nfinal_norm layernorm >")
    return Row(name, model_type or name, settings, facts, "image")


def tower(root: str, embed: str, norm: str, prefix: str = "") -> Facts:
    at = f"{root}." if root else ""
    return blocks(f"{at}encoder.layers.{{}}", CLIP, prefix=prefix) | outside(
        root, f"embed {embed} >\nfinal_norm {norm} >", prefix=prefix
    )


VISION = (
    vision("vit", "vit", "layers.{}", VIT),
    vision("dinov2", "dinov2", "encoder.layer.{}", DINO),
    vision("dinov2, gated", "dinov2", "encoder.layer.{}", DINO_GATED, "dinov2", use_swiglu_ffn=True),
    vision("dinov2_with_registers", "dinov2_with_registers", "encoder.layer.{}", DINO),
    Row(
        "clip",
        "clip",
        {},
        tower("vision_model", "pre_layrnorm", "post_layernorm", "vision.")
        | tower("text_model", "embeddings", "final_layer_norm", "text."),
        "image and text",
    ),
    Row(
        "siglip",
        "siglip",
        {},
        tower("vision_model", "embeddings", "post_layernorm", "vision.")
        | tower("text_model", "embeddings", "final_layer_norm", "text."),
        "image and text",
    ),
    Row("clip_vision_model", "clip_vision_model", {}, tower("", "pre_layrnorm", "post_layernorm"), "image"),
    Row("siglip_vision_model", "siglip_vision_model", {}, tower("", "embeddings", "post_layernorm"), "image"),
    Row("clip_text_model", "clip_text_model", {}, tower("", "embeddings", "final_layer_norm")),
    Row("siglip_text_model", "siglip_text_model", {}, tower("", "embeddings", "final_layer_norm")),
)
ROWS: dict[str, Row] = {row.name: row for row in (*DECODERS, *ENCODERS, *PAIRS, *VISION)}


def inputs(given: str, rows: int = 2, n: int = 7) -> dict[str, Tensor]:
    """What such a model is called with."""
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(4, 64, (rows, n), generator=generator)
    image = torch.randn(rows, 3, 16, 16, generator=generator)
    if given == "tokens":
        return {"input_ids": ids}
    if given == "image":
        return {"pixel_values": image}
    if given == "image and text":
        return {"pixel_values": image, "input_ids": ids}
    target = torch.randint(4, 64, (rows, n - 2), generator=generator)
    if given == "audio":
        return {"input_features": torch.randn(rows, 8, 16, generator=generator), "decoder_input_ids": target}
    return {"input_ids": ids, "decoder_input_ids": target}
