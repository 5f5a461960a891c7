"""A map for a model that no declaration knows: guessed from its modules' names, and believed only if it proves right.

Names repeat across families: a block has a norm called `input_layernorm` or `ln_1`, an attention with `q_proj` or
`query_key_value`, an MLP with `up_proj` or `fc1`. `candidates` reads a module's names into a few possible maps, from
the likely to the less so, and then offers the maps of declared families whose every path the module has. The caller
runs the load-time self-check on each and keeps the first that passes.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

from torch import nn

from assay.subjects.architecture import ArchitectureMap, Attention, Fused, Head, Latent, Mlp, Separate, Stack
from assay.subjects.block_points import read_field
from assay.subjects.families import FAMILIES
from assay.subjects.linear import linear_matrix, out_width
from assay.subjects.parts import Parts

QKV = (
    ("q_proj", "k_proj", "v_proj"),
    ("query", "key", "value"),
    ("q_lin", "k_lin", "v_lin"),
    ("wq", "wk", "wv"),
    ("q", "k", "v"),
)
FUSED = ("qkv_proj", "query_key_value", "c_attn", "Wqkv", "qkv", "in_proj")
PROJ = ("o_proj", "out_proj", "dense", "c_proj", "out_lin", "wo", "Wo", "o", "proj")
GATE = ("gate_proj", "w1", "wi_0", "gate")
UP = ("up_proj", "w3", "wi_1", "c_fc", "fc1", "fc_in", "dense_h_to_4h", "linear1", "lin1", "wi", "w1", "Wi")
DOWN = ("down_proj", "w2", "c_proj", "fc2", "fc_out", "dense_4h_to_h", "linear2", "lin2", "wo", "Wo")
GATE_UP = ("gate_up_proj", "gate_up", "w12")
POSITIONS = ("wpe", "embed_positions", "position_embeddings", "pos_embed")
ROUTER = ("gate", "router")
FINAL = ("norm", "ln_f", "final_layernorm", "final_layer_norm", "final_norm", "norm_f", "layer_norm", "layernorm")


def candidates(module: nn.Module) -> Iterator[ArchitectureMap]:
    """Yield the maps that a module may have, the likeliest first.

    Args:
        module: A transformers model whose `config.model_type` no declaration serves.

    Yields:
        Maps with `inferred=True`, to be proved.
    """
    yield from _by_structure(module)
    yield from _as_declared(module)


def _as_declared(module: nn.Module) -> Iterator[ArchitectureMap]:
    """The maps of declared families whose every path is there: much goes by another name, and is BERT or BART."""
    fitting = []
    for family in FAMILIES:
        try:
            for name in family.stacks:
                Parts(module, family, name)
        except Exception:  # of whatever kind: such a family's paths or settings are not this module's
            continue
        fitting.append(family)
    for embed, inside, family in itertools.product(_EMBEDDED, (None, "function"), fitting):
        name = f"inferred from {type(module).__name__}, laid out as {family.family}"
        stacks = {key: _varied(stack, embed, inside) for key, stack in family.stacks.items()}
        yield replace(family, family=name, stacks=stacks, inferred=True)


_EMBEDDED: tuple[dict[str, Any], ...] = ({}, {"embed_scale": None}, {"embed": None, "pos_embed": None})
"""How the stream may start: as in the family, unscaled, or in a way that has no site."""


def _varied(stack: Stack, embed: dict[str, Any], inside: Any) -> Stack:
    """A stack that starts in another way, or whose attention is computed by the modules themselves."""
    changes = dict(embed)
    for name in ("attn", "cross") if inside is not None else ():
        attn = getattr(stack, name)
        changes[name] = None if attn is None else replace(attn, inside=inside)
    return replace(stack, **changes)


def _by_structure(module: nn.Module) -> Iterator[ArchitectureMap]:
    base: nn.Module = getattr(module, "base_model", module)
    config: Any = getattr(module, "config", None)
    found = _blocks(base)
    if config is None or found is None:
        return
    path, blocks = found
    root = path.rpartition(".")[0]
    parent = base.get_submodule(root)
    embed = _embedding(base, module)
    at = f"{root}." if root else ""
    final = next((at + name for name in FINAL if hasattr(parent, name)), None)
    block = blocks[-1]  # mixtures of experts often keep their first blocks dense
    attentions, mlps = list(_attentions(block)), list(_mlps(block))
    norms = _norms(block)
    learned = next((at + name for name in POSITIONS if hasattr(parent, name)), None)
    stack = Stack(blocks=path, embed=embed, pos_embed=learned, final_norm=final, attn=None, mlp=None)
    starts = [stack, replace(stack, embed=None, pos_embed=None)]
    if hasattr(base, "embeddings"):
        starts.insert(0, replace(stack, embed="embeddings", pos_embed=None))
    scale = "logit_scale" if isinstance(getattr(config, "logit_scale", None), float) else None
    for start, attn, mlp in itertools.product(starts, attentions, mlps):
        known: dict[str, Any] = {
            "causal": bool(getattr(block.get_submodule(attn.path), "is_causal", True)),
            "n_kv_heads": _key_heads(block, attn, config),
        }
        heads = [Head(scale=scale, divisor="logits_scaling", softcap="final_logit_softcapping")]
        heads += [] if known["causal"] else [Head(linear=False)]  # as in BERT, a layer may stand before the unembedding
        for head, shaped in itertools.product(heads, _shapes(replace(start, attn=attn, mlp=mlp, **known), norms)):
            yield ArchitectureMap(
                family=f"inferred from {type(module).__name__}",
                model_types=(str(getattr(config, "model_type", "")),),
                stacks={"": shaped},
                head=head,
                inferred=True,
            )


def _key_heads(block: nn.Module, attn: Attention, config: Any) -> int | None:
    """How many heads keys have, by the widths of the projections; None where these do not tell."""
    if isinstance(attn.qkv, Latent):
        return None
    try:
        heads = int(read_field(config, "num_attention_heads", "n_head", "num_heads", "n_heads"))
        wide = linear_matrix(block.get_submodule(attn.proj if isinstance(attn.proj, str) else attn.proj[0])).shape[0]
        if isinstance(attn.qkv, Fused):
            keys = (out_width(block.get_submodule(attn.qkv.path)) - wide) // 2
        else:
            keys = out_width(block.get_submodule(attn.qkv.k))
            if out_width(block.get_submodule(attn.qkv.q)) != wide:
                return None
    except Exception:  # a projection that is not a plain linear map does not tell
        return None
    found = keys * heads // max(1, wide)
    return found if 0 < found <= heads else None


def _blocks(base: nn.Module) -> tuple[str, nn.ModuleList] | None:
    """The list of modules of one class that holds most of the weights."""
    lists = [
        (sum(p.numel() for p in found.parameters()), name, found)
        for name, found in base.named_modules()
        if isinstance(found, nn.ModuleList) and len(found) and len({type(item) for item in found}) == 1
    ]
    if not lists:
        return None
    _, name, found = max(lists, key=lambda item: item[0])
    return name, found


def _embedding(base: nn.Module, module: nn.Module) -> str | None:
    get = getattr(module, "get_input_embeddings", None)
    try:
        found = get() if get is not None else None
    except (AttributeError, NotImplementedError):
        found = None
    return next((name for name, child in base.named_modules() if child is found), None)


def _norms(block: nn.Module) -> list[str]:
    """The norms that are a block's own, in the order in which it declares them."""
    return [name for name, child in block.named_children() if "norm" in type(child).__name__.lower()]


def _attentions(block: nn.Module) -> Iterator[Attention]:
    for name, child in block.named_modules():
        names = {key for key, _ in child.named_children()}
        at = f"{name}." if name else ""
        proj = next((key for key in PROJ if key in names), None)
        if proj is None or not name:
            continue
        if {"kv_b_proj"} <= names:
            latent = Latent(q=(f"{at}q_b_proj", f"{at}q_proj"), kv=f"{at}kv_b_proj")
            yield Attention(path=name, qkv=latent, proj=at + proj)
        for q, k, v in QKV:
            if {q, k, v} <= names:
                yield Attention(path=name, qkv=Separate(at + q, at + k, at + v), proj=at + proj)
        for fused in FUSED:
            if fused in names:
                for layout in ("blocks", "grouped"):
                    yield Attention(path=name, qkv=Fused(at + fused, layout), proj=at + proj)


def _mlps(block: nn.Module) -> Iterator[Mlp]:
    for name, child in block.named_modules():
        names = {key for key, _ in child.named_children()}
        at = f"{name}." if name else ""
        path = name or None
        down = next((key for key in DOWN if key in names), None)
        router = next((key for key in ROUTER if key in names and "experts" in names), None)
        if router is not None and path is not None:
            dense = {"gate": f"{at}gate_proj", "up": f"{at}up_proj", "down": f"{at}down_proj"}
            yield Mlp(path=path, router=at + router, **dense)
            return
        if down is None:
            continue
        fused = next((key for key in GATE_UP if key in names), None)
        if fused is not None:
            yield Mlp(path=path, gate_up=at + fused, down=at + down)
            yield Mlp(path=path, up_gate=at + fused, down=at + down)
        gate = next((key for key in GATE if key in names), None)
        up = next((key for key in UP if key in names and key != gate), None)
        if up is not None:
            yield Mlp(path=path, gate=None if gate is None else at + gate, up=at + up, down=at + down)


def _shapes(stack: Stack, norms: list[str]) -> Iterator[Stack]:
    """The ways in which a block may use its norms: before each layer, after, around, shared, or after the sum."""
    assert stack.attn is not None and stack.mlp is not None
    attn, mlp = stack.attn, stack.mlp
    first, second = norms[0] if norms else None, norms[1] if len(norms) > 1 else None

    def ways(parallel: bool) -> Iterator[Stack]:
        pre = replace(stack, parallel=parallel)
        for one, two, three in itertools.permutations(norms[1:]) if len(norms) == 4 else ():
            yield replace(pre, attn=replace(attn, norm=first, post=one), mlp=replace(mlp, norm=two, post=three))
        yield replace(pre, attn=replace(attn, norm=first), mlp=replace(mlp, norm=second))
        if second is not None:
            after = replace(mlp, norm=None, post=second)
            yield replace(pre, attn=replace(attn, norm=None, post=first), mlp=after)

    for residual in (None, "residual_multiplier"):
        for way in ways(parallel=False):
            scaled = replace(way, residual_scale=residual, embed_scale="embedding_multiplier" if residual else None)
            yield scaled
            yield _by_function(scaled)
    for way in ways(parallel=True):
        yield way
        yield _by_function(way)
    if second is not None:
        yield replace(
            stack, post_norm=True, causal=False, attn=replace(attn, norm=first), mlp=replace(mlp, norm=second)
        )


def _by_function(stack: Stack) -> Stack:
    """The same stack, whose attention is computed by the module itself."""
    return stack if stack.attn is None else replace(stack, attn=replace(stack.attn, inside="function"))
