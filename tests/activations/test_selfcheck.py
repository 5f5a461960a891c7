"""The load-time self-check: right maps pass, and a map with one field wrong is refused with the identity that fails."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from functools import cache
from typing import Any

import pytest
from torch import nn

import assay
from assay.activations.selfcheck import self_check
from assay.base.errors import UnsupportedArchitecture
from assay.subjects.architecture import ArchitectureMap, Fused, Head, Latent, Separate, Stack, StateSpace
from assay.subjects.block_points import BlockPoints
from assay.subjects.families import family_of
from assay.subjects.tiny import tiny_model

Wrong = Callable[[Stack], Stack]
MHA = {"num_key_value_heads": 4}


def stack(**change: Any) -> Wrong:
    return lambda s: replace(s, **change)


def attn(**change: Any) -> Wrong:
    return lambda s: replace(s, attn=replace(s.attn, **change))  # type: ignore[type-var]


def cross(**change: Any) -> Wrong:
    return lambda s: replace(s, cross=replace(s.cross, **change)) if s.cross is not None else s


def mlp(**change: Any) -> Wrong:
    return lambda s: replace(s, mlp=replace(s.mlp, **change))  # type: ignore[type-var]


def swapped(one: str, two: str) -> Wrong:
    """Exchange two paths, each `attn.norm`, `mlp.up`, `attn.qkv.q`, ..."""

    def get(s: Any, path: str) -> Any:
        for name in path.split("."):
            s = getattr(s, name)
        return s

    def put(s: Any, path: str, value: Any) -> Any:
        name, _, rest = path.partition(".")
        return replace(s, **{name: put(getattr(s, name), rest, value) if rest else value})

    return lambda s: put(put(s, one, get(s, two)), two, get(s, one))


LLAMA: dict[str, Wrong] = {
    "norms swapped": swapped("attn.norm", "mlp.norm"),
    "the second norm is the first": mlp(norm="input_layernorm"),
    "the first norm is the second": attn(norm="post_attention_layernorm"),
    "no norm before the MLP": mlp(norm=None),
    "no norm before attention": attn(norm=None),
    "gate and up swapped": swapped("mlp.gate", "mlp.up"),
    "the gate forgotten": mlp(gate=None),
    "the gate taken for up": mlp(gate=None, up="mlp.gate_proj"),
    "up is the gate too": mlp(up="mlp.gate_proj"),
    "queries and keys swapped": swapped("attn.qkv.q", "attn.qkv.k"),
    "queries and values swapped": swapped("attn.qkv.q", "attn.qkv.v"),
    "keys and values swapped": swapped("attn.qkv.k", "attn.qkv.v"),
    "keys are the queries": attn(qkv=Separate(k="self_attn.q_proj")),
    "parallel": stack(parallel=True),
    "norms after the sum": stack(post_norm=True),
    "a multiplier on what is written": stack(residual_scale=0.5),
    "a multiplier on the embedding": stack(embed_scale=2.0),
    "another final norm": stack(final_norm="layers.1.input_layernorm"),
    "no final norm": stack(final_norm=None),
    "twice the heads": stack(n_heads=8),
    "half the heads": stack(n_heads=2),
    "three heads": stack(n_heads=3),
    "attention is the MLP": attn(path="mlp"),
    "a norm after attention": attn(post="post_attention_layernorm"),
    "a norm after the MLP": mlp(post="input_layernorm"),
    "another output matrix": attn(proj="self_attn.q_proj"),
    "another matrix out of the MLP": mlp(down="self_attn.o_proj"),
    "another embedding": stack(embed="layers.0.mlp"),
    "blocks that are not": stack(blocks="blocks"),
}

WRONG: list[tuple[str, dict[str, Any], dict[str, Wrong]]] = [
    ("llama", MHA, LLAMA),
    (
        "llama",
        {},
        {
            "as many keys as queries": stack(n_kv_heads=4),
            "one key for all": stack(n_kv_heads=1),
            "twice the heads, and the keys": stack(n_heads=8, n_kv_heads=4),
            "half the heads, and the keys": stack(n_heads=2, n_kv_heads=1),
        },
    ),
    (
        "gpt2",
        {},
        {
            "head by head": attn(qkv=Fused("attn.c_attn", "grouped")),
            "in shards": attn(qkv=Fused("attn.c_attn", "sharded")),
            "no positions": stack(pos_embed=None),
            "norms swapped": swapped("attn.norm", "mlp.norm"),
            "parallel": stack(parallel=True),
            "grouped keys": stack(n_kv_heads=2),
        },
    ),
    (
        "gpt_neox",
        {},
        {
            "in three": attn(qkv=Fused("attention.query_key_value", "blocks")),
            "norms swapped": swapped("attn.norm", "mlp.norm"),
            "one after the other": stack(parallel=False),
            "the first norm for both": mlp(norm="input_layernorm"),
        },
    ),
    ("gpt_neox", {"use_parallel_residual": False}, {"parallel": stack(parallel=True)}),
    (
        "codegen",
        {},
        {
            "in three": attn(qkv=Fused("attn.qkv_proj", "blocks")),
            "head by head": attn(qkv=Fused("attn.qkv_proj", "grouped")),
            "one after the other": stack(parallel=False),
        },
    ),
    ("bloom", {}, {"in three": attn(qkv=Fused("self_attention.query_key_value", "blocks"))}),
    (
        "gpt_bigcode",
        {},
        {"head by head": stack(n_kv_heads=4), "in three": attn(qkv=Fused("attn.c_attn", "sharded"))},
    ),
    (
        "falcon",
        {"new_decoder_architecture": True},
        {
            "norms swapped": swapped("attn.norm", "mlp.norm"),
            "in three": attn(qkv=Fused("self_attention.query_key_value", "blocks")),
            "every head its keys": stack(n_kv_heads=4),
            "one key for all": stack(n_kv_heads=1),
            "one after the other": stack(parallel=False),
        },
    ),
    (
        "phi3",
        {},
        {
            "up and gate": mlp(gate_up=None, up_gate="mlp.gate_up_proj"),
            "head by head": attn(qkv=Fused("self_attn.qkv_proj", "grouped")),
            "not gated": mlp(gate_up=None, gate=None, up="mlp.gate_up_proj"),
        },
    ),
    (
        "gemma2",
        {"attn_logit_softcapping": 2.0, "final_logit_softcapping": 3.0},
        {
            "the norms after swapped": swapped("attn.post", "mlp.post"),
            "the norms of attention swapped": swapped("attn.norm", "attn.post"),
            "the norms of the MLP swapped": swapped("mlp.norm", "mlp.post"),
            "no norm after attention": attn(post=None),
            "no norm after the MLP": mlp(post=None),
            "Llama's norms": mlp(norm="post_attention_layernorm", post=None),
        },
    ),
    (
        "olmo2",
        {},
        {
            "norms before": lambda s: mlp(norm="post_feedforward_layernorm", post=None)(
                attn(norm="post_attention_layernorm", post=None)(s)
            ),
            "norms swapped": swapped("attn.post", "mlp.post"),
            "parallel": stack(parallel=True),
            "queries and keys swapped": swapped("attn.qkv.q", "attn.qkv.k"),
        },
    ),
    (
        "granite",
        {},
        {
            "no multiplier on what is written": stack(residual_scale=None),
            "none on the embedding": stack(embed_scale=None),
        },
    ),
    ("cohere", {}, {"one after the other": stack(parallel=False)}),
    ("stablelm", {"use_parallel_residual": True}, {"one after the other": stack(parallel=False)}),
    (
        "opt",
        {"do_layer_norm_before": False},
        {"norms before": stack(post_norm=False), "norms swapped": swapped("attn.norm", "mlp.norm")},
    ),
    ("opt", {}, {"norms after": stack(post_norm=True)}),
    (
        "deepseek_v3",
        {},
        {
            "another split of keys and values": attn(qkv=Latent(nope="v_head_dim")),
            "as in Llama": attn(qkv=Separate()),
        },
    ),
    (
        "mixtral",
        {},
        {"the norm as router": mlp(router="post_attention_layernorm"), "no experts": mlp(router=None)},
    ),
    ("mamba", {}, {"as Mamba-2": stack(ssm=StateSpace(kind="mamba2"))}),
    ("mamba2", {}, {"as Mamba": stack(ssm=StateSpace(kind="mamba"))}),
    (
        "bert",
        {},
        {
            "norms before": stack(post_norm=False),
            "norms swapped": swapped("attn.norm", "mlp.norm"),
            "causal": stack(causal=True),
            "queries and keys swapped": swapped("attn.qkv.q", "attn.qkv.k"),
        },
    ),
    ("modernbert", {}, {"causal": stack(causal=True), "up and gate": mlp(gate_up=None, up_gate="mlp.Wi")}),
    ("vit", {}, {"causal": stack(causal=True), "norms swapped": swapped("attn.norm", "mlp.norm")}),
    (
        "dinov2",
        {},
        {"no layer scale": attn(post=None), "layer scales swapped": swapped("attn.post", "mlp.post")},
    ),
    (
        "t5",
        {"feed_forward_proj": "gated-gelu"},
        {
            "gate and up swapped": swapped("mlp.gate", "mlp.up"),
            "queries and keys swapped": swapped("attn.qkv.q", "attn.qkv.k"),
        },
    ),
]
CROSS: list[tuple[str, dict[str, Wrong]]] = [
    (
        "bart",
        {
            "it reads itself": stack(source=""),
            "queries and keys swapped": swapped("cross.qkv.q", "cross.qkv.k"),
            "keys and values swapped": swapped("cross.qkv.k", "cross.qkv.v"),
            "norms swapped": swapped("attn.norm", "cross.norm"),
            "attentions swapped": swapped("attn", "cross"),
            "no cross-attention": stack(cross=None),
        },
    ),
    ("t5", {"norms swapped": swapped("cross.norm", "mlp.norm"), "it reads itself": stack(source="")}),
    ("whisper", {"no positions": stack(pos_embed=None), "its own values": cross(qkv=Separate())}),
]
CASES = [
    pytest.param(model_type, settings, {"": wrong}, id=f"{model_type}{'*' * bool(settings)}: {what}")
    for model_type, settings, table in WRONG
    for what, wrong in table.items()
] + [
    pytest.param(model_type, {}, {"decoder": wrong}, id=f"{model_type}: {what}")
    for model_type, table in CROSS
    for what, wrong in table.items()
]


@cache
def known_good(model_type: str, settings: tuple[tuple[str, Any], ...]) -> nn.Module:
    """A model whose own map passes; maps are tried on it one after the other."""
    module = tiny_model(model_type, **dict(settings))
    checks = self_check(assay.Subject(module, architecture=family_of(model_type)))
    assert checks
    assert all(check.passed for check in checks)
    return module


def model(model_type: str, **settings: Any) -> nn.Module:
    return known_good(model_type, tuple(sorted(settings.items())))


def with_stacks(model_type: str, wrongs: dict[str, Wrong]) -> ArchitectureMap:
    family = family_of(model_type)
    assert family is not None
    stacks = {name: wrongs.get(name, wrongs.get("", lambda s: s))(found) for name, found in family.stacks.items()}
    return replace(family, stacks=stacks)


@pytest.mark.parametrize(("model_type", "settings", "wrongs"), CASES)
def test_a_map_with_one_field_wrong_is_refused(
    model_type: str, settings: dict[str, Any], wrongs: dict[str, Wrong]
) -> None:
    module = model(model_type, **settings)
    with pytest.raises(UnsupportedArchitecture) as refused:
        self_check(assay.Subject(module, architecture=with_stacks(model_type, wrongs)))
    named = r"self-check failed: .*(blocks|embed|final_norm)"
    assert refused.match(rf"{named}|expects '.*' in .*not there|columns, which are not|has none of the fields")


@pytest.mark.parametrize(
    ("model_type", "settings", "head"),
    [
        ("cohere", {"logit_scale": 0.25}, Head()),
        ("granite", {}, Head()),
        ("gemma2", {"final_logit_softcapping": 3.0}, Head()),
        ("gemma2", {"final_logit_softcapping": 3.0}, Head(softcap=5.0)),
        ("t5", {}, Head()),
        ("opt", {"word_embed_proj_dim": 16}, Head()),
        ("llama", {}, Head(scale=2.0)),
        ("bert", {}, Head()),
        ("modernbert", {}, Head()),
    ],
)
def test_a_wrong_head_is_refused(model_type: str, settings: dict[str, Any], head: Head) -> None:
    family = family_of(model_type)
    assert family is not None
    with pytest.raises(UnsupportedArchitecture, match=r"self-check failed: final_norm times the unembedding"):
        self_check(assay.Subject(model(model_type, **settings), architecture=replace(family, head=head)))


@pytest.mark.parametrize(
    ("model_type", "one", "two"),
    [
        ("mamba", "ssm.B", "ssm.C"),
        ("mamba", "ssm.x", "ssm.gate"),
        ("mamba2", "ssm.B", "ssm.C"),
        ("mamba2", "ssm.x", "ssm.gate"),
        ("falcon_mamba", "ssm.B", "ssm.C"),
        ("mixtral", "mlp.weights", "mlp.experts"),
        ("gpt2", "attn.q", "attn.k"),
        ("gpt_neox", "attn.q", "attn.k"),
        ("mpt", "attn.q", "attn.k"),
        ("bart", "cross_attn.q", "attn.q"),
        ("bart", "attn.k", "cross_attn.k"),
        ("llama", "resid_pre", "resid_mid"),
        ("llama", "attn.out", "mlp.out"),
    ],
)
def test_points_exchanged_are_refused(model_type: str, one: str, two: str, monkeypatch: pytest.MonkeyPatch) -> None:
    table = BlockPoints.table

    def exchanged(self: BlockPoints) -> dict[str, Any]:
        found = table(self)
        if one in found and two in found:
            found[one], found[two] = found[two], found[one]
        return found

    module = model(model_type)
    monkeypatch.setattr(BlockPoints, "table", exchanged)
    with pytest.raises(UnsupportedArchitecture, match=r"self-check failed: .*blocks"):
        self_check(assay.Subject(module, architecture=family_of(model_type)))
