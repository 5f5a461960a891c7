"""Raw torch hooks, written by hand for each family: what the engine is held against.

Nothing here uses assay: paths, sides and reshapes are spelled out from the models' own source.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

HEADS, KV, D_HEAD = 4, 2, 8
Spec = tuple[str, str, Callable[[Tensor], Tensor]]


def same(x: Tensor) -> Tensor:
    return x


def heads(n: int) -> Callable[[Tensor], Tensor]:
    return lambda x: x.reshape(*x.shape[:2], n, -1)


def third(i: int) -> Callable[[Tensor], Tensor]:
    return lambda x: x[..., 32 * i : 32 * (i + 1)].reshape(*x.shape[:2], HEADS, D_HEAD)


def per_head(i: int) -> Callable[[Tensor], Tensor]:
    return lambda x: x.reshape(*x.shape[:2], HEADS, 3 * D_HEAD)[..., D_HEAD * i : D_HEAD * (i + 1)]


def sites(family: str, block: int) -> dict[str, Spec]:
    """Where each site of a block is, by hand."""
    if family == "gpt2":
        b = f"transformer.h.{block}"
        parts = {
            "attn.q": (f"{b}.attn.c_attn", "out", third(0)),
            "attn.k": (f"{b}.attn.c_attn", "out", third(1)),
            "attn.v": (f"{b}.attn.c_attn", "out", third(2)),
            "attn.z": (f"{b}.attn.c_proj", "in", heads(HEADS)),
            "attn.out": (f"{b}.attn", "out", same),
            "norm1": (f"{b}.ln_1", "out", same),
            "norm2": (f"{b}.ln_2", "out", same),
            "resid_mid": (f"{b}.ln_2", "in", same),
            "mlp.in": (f"{b}.mlp", "in", same),
            "mlp.pre": (f"{b}.mlp.c_fc", "out", same),
            "mlp.post": (f"{b}.mlp.c_proj", "in", same),
            "mlp.out": (f"{b}.mlp", "out", same),
        }
    elif family.startswith("gpt_neox"):
        b = f"gpt_neox.layers.{block}"
        parts = {
            "attn.q": (f"{b}.attention.query_key_value", "out", per_head(0)),
            "attn.k": (f"{b}.attention.query_key_value", "out", per_head(1)),
            "attn.v": (f"{b}.attention.query_key_value", "out", per_head(2)),
            "attn.z": (f"{b}.attention.dense", "in", heads(HEADS)),
            "attn.out": (f"{b}.attention", "out", same),
            "norm1": (f"{b}.input_layernorm", "out", same),
            "norm2": (f"{b}.post_attention_layernorm", "out", same),
            "mlp.in": (f"{b}.mlp", "in", same),
            "mlp.pre": (f"{b}.mlp.dense_h_to_4h", "out", same),
            "mlp.post": (f"{b}.mlp.dense_4h_to_h", "in", same),
            "mlp.out": (f"{b}.mlp", "out", same),
        }
        if family == "gpt_neox_sequential":
            parts["resid_mid"] = (f"{b}.post_attention_layernorm", "in", same)
    else:
        b = f"model.layers.{block}"
        post = family.startswith("gemma")
        parts = {
            "attn.q": (f"{b}.self_attn.q_proj", "out", heads(HEADS)),
            "attn.k": (f"{b}.self_attn.k_proj", "out", heads(KV)),
            "attn.v": (f"{b}.self_attn.v_proj", "out", heads(KV)),
            "attn.z": (f"{b}.self_attn.o_proj", "in", heads(HEADS)),
            "attn.out": (f"{b}.post_attention_layernorm" if post else f"{b}.self_attn", "out", same),
            "norm1": (f"{b}.input_layernorm", "out", same),
            "norm2": (f"{b}.{'pre_feedforward_layernorm' if post else 'post_attention_layernorm'}", "out", same),
            "resid_mid": (f"{b}.{'pre_feedforward_layernorm' if post else 'post_attention_layernorm'}", "in", same),
            "mlp.in": (f"{b}.mlp", "in", same),
            "mlp.gate": (f"{b}.mlp.gate_proj", "out", same),
            "mlp.pre": (f"{b}.mlp.up_proj", "out", same),
            "mlp.post": (f"{b}.mlp.down_proj", "in", same),
            "mlp.out": (f"{b}.post_feedforward_layernorm" if post else f"{b}.mlp", "out", same),
        }
    parts["resid_pre"], parts["resid_post"] = (b, "in", same), (b, "out", same)
    return {f"blocks.{block}.{name}": spec for name, spec in parts.items()}


def outside(family: str) -> dict[str, Spec]:
    """The sites outside the blocks, by hand."""
    if family == "gpt2":
        return {
            "embed": ("transformer.wte", "out", same),
            "pos_embed": ("transformer.wpe", "out", same),
            "final_norm": ("transformer.ln_f", "out", same),
        }
    root = "gpt_neox" if family.startswith("gpt_neox") else "model"
    embed, norm = ("embed_in", "final_layer_norm") if root == "gpt_neox" else ("embed_tokens", "norm")
    return {"embed": (f"{root}.{embed}", "out", same), "final_norm": (f"{root}.{norm}", "out", same)}


def read(module: nn.Module, ids: Tensor, spec: Spec) -> Tensor:
    """What a raw hook sees at a site."""
    path, side, view = spec
    seen: list[Tensor] = []

    def before(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        seen.append(args[0] if args else kwargs["hidden_states"])

    def after(_: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        seen.append(output[0] if isinstance(output, tuple) else output)

    at = module.get_submodule(path)
    if side == "in":
        handle = at.register_forward_pre_hook(before, with_kwargs=True)
    else:
        handle = at.register_forward_hook(after)
    try:
        with torch.no_grad():
            module(ids)
    finally:
        handle.remove()
    return view(seen[0]).detach()


def run_with(module: nn.Module, ids: Tensor, spec: Spec, change: Callable[[Tensor], None]) -> Tensor:
    """Logits with a raw hook that changes a copy of a site's whole tensor, through the site's own reshape."""
    path, side, view = spec

    def changed(x: Tensor) -> Tensor:
        new = x.clone()
        shaped = view(new)
        if shaped.data_ptr() == new.data_ptr() or shaped._base is new or shaped is new:
            change(shaped)
            return new
        raise AssertionError("the reshape is not a view")

    def before(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        if args:
            return (changed(args[0]), *args[1:]), kwargs
        return args, {**kwargs, "hidden_states": changed(kwargs["hidden_states"])}

    def after(_: nn.Module, args: tuple[Any, ...], output: Any) -> Any:
        return (changed(output[0]), *output[1:]) if isinstance(output, tuple) else changed(output)

    at = module.get_submodule(path)
    if side == "in":
        handle = at.register_forward_pre_hook(before, with_kwargs=True)
    else:
        handle = at.register_forward_hook(after)
    try:
        with torch.no_grad():
            logits: Tensor = module(ids).logits
            return logits
    finally:
        handle.remove()
