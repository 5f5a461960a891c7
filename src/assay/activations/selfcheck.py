"""Prove an architecture map on the model it is used with: a few tokens, the identities, and nothing else believed."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from assay.activations.edits import Add
from assay.activations.forward import call, forward
from assay.activations.values import Run
from assay.base.errors import AssayError, UnsupportedArchitecture
from assay.subjects.model import Model
from assay.subjects.parts import linear_bias
from assay.subjects.tokens import Batch, from_ids


@dataclass(frozen=True, slots=True, kw_only=True)
class Check:
    """One identity and how far the model is from it.

    Args:
        identity: What should hold.
        error: The largest absolute difference, relative to the largest value.
        tolerance: How much is float rounding.
    """

    identity: str
    error: float
    tolerance: float

    @property
    def passed(self) -> bool:
        """Whether the difference is float rounding."""
        return self.error <= self.tolerance


def self_check(model: Model, n_tokens: int = 6) -> list[Check]:
    """Check every identity that standard sites promise.

    Args:
        model: A model with an architecture map.
        n_tokens: How many tokens to run.

    Returns:
        The checks, all passed.

    Raises:
        UnsupportedArchitecture: Naming the first identity that fails, and by how much.
    """
    if model.module.training:
        raise UnsupportedArchitecture(
            f"{type(model.module).__name__} is in training mode, where dropout makes every run different: call "
            f".eval() first"
        )
    vocab = int(model.config.vocab_size)
    ids = (torch.arange(n_tokens, device=model.device) * 7919 + 11) % vocab
    batch = from_ids(ids[None])
    try:
        with torch.no_grad(), _left_as_found(model.module):
            checks = _checks(model, batch)
    except AssayError:
        raise
    except Exception as error:
        raise UnsupportedArchitecture(f"running the map's sites failed: {type(error).__name__}: {error}") from error
    failed = next((check for check in checks if not check.passed), None)
    if failed is not None:
        raise UnsupportedArchitecture(
            f"the self-check failed: {failed.identity}; off by {failed.error:.2g} (tolerance {failed.tolerance:.2g})"
        )
    return checks


@contextmanager
def _left_as_found(module: nn.Module) -> Iterator[None]:
    """Take away the hooks that transformers leaves on a module once it was asked for its hidden states."""
    mark = "_output_capturing_hooks_installed"
    before = [(m, set(m._forward_hooks), set(m._forward_pre_hooks), mark in m.__dict__) for m in module.modules()]
    try:
        yield
    finally:
        for m, hooks, pre_hooks, marked in before:
            for key in set(m._forward_hooks) - hooks:
                del m._forward_hooks[key]
            for key in set(m._forward_pre_hooks) - pre_hooks:
                del m._forward_pre_hooks[key]
            if not marked and mark in m.__dict__:
                delattr(m, mark)


def _checks(model: Model, batch: Batch) -> list[Check]:
    plain = call(model, batch, output_hidden_states=True)
    run = forward(model, batch, capture=[site for site in model.sites() if not site.endswith(".result")])
    half = run.logits.dtype in (torch.float16, torch.bfloat16)
    loose = 5e-2 if half else 1e-4

    def check(identity: str, found: Tensor, expected: Tensor, tolerance: float = loose) -> Check:
        scale = expected.float().abs().max().clamp(min=1e-12)
        error = float((found.float() - expected.float().to(found.device)).abs().max() / scale)
        return Check(identity=identity, error=error if error == error else float("inf"), tolerance=tolerance)

    checks = [check("capturing leaves the logits as they are", run.logits, plain.logits, 0.0)]
    checks += [
        check(f"blocks.{i}.resid_pre equals output_hidden_states[{i}]", run[f"blocks.{i}.resid_pre"], hidden)
        for i, hidden in enumerate(plain.hidden_states[: model.n_blocks])
    ]
    stream = run["embed"] + (run["pos_embed"] if "pos_embed" in run else 0)
    checks.append(check("the embeddings make blocks.0.resid_pre", stream, run["blocks.0.resid_pre"]))
    for i in range(model.n_blocks):
        checks += _block_checks(model, run, i, check)
        stream = stream + run[f"blocks.{i}.attn.out"].to(stream.device) + run[f"blocks.{i}.mlp.out"].to(stream.device)
    last = run[f"blocks.{model.n_blocks - 1}.resid_post"]
    checks.append(check("the writers sum to the residual stream", stream, last))
    checks += _tail_checks(model, run, last, check)
    checks += _edit_checks(model, batch, run, check)
    return checks


def _block_checks(model: Model, run: Run, i: int, check) -> list[Check]:  # type: ignore[no-untyped-def]
    block, parts = f"blocks.{i}", model.parts
    pre, attn, mlp = run[f"{block}.resid_pre"], run[f"{block}.attn.out"], run[f"{block}.mlp.out"]
    checks = [
        check(f"{block}: what enters plus attention plus MLP leaves", pre + attn + mlp, run[f"{block}.resid_post"])
    ]
    if parts.has("resid_mid"):
        checks.append(check(f"{block}.resid_mid is what enters plus attention", pre + attn, run[f"{block}.resid_mid"]))
    pattern, value = run[f"{block}.attn.pattern"], run[f"{block}.attn.v"]
    value = value.repeat_interleave(pattern.shape[1] // value.shape[2], 2)
    mixed = torch.einsum("bhqk,bkhd->bqhd", pattern, value)
    checks.append(check(f"{block}.attn.pattern times v is z", mixed, run[f"{block}.attn.z"]))
    if model.architecture is not None and model.architecture.attn_post_norm is None:
        projection = parts.of(i, f"{model.architecture.attn}.{model.architecture.attn_proj}")
        out = run[f"{block}.attn.z"].flatten(-2) @ parts.output_matrix(i)
        bias = linear_bias(projection)
        checks.append(check(f"{block}.attn.z times W_O is attn.out", out if bias is None else out + bias, attn))
    return checks


def _tail_checks(model: Model, run: Run, last: Tensor, check) -> list[Check]:  # type: ignore[no-untyped-def]
    parts = model.parts
    norm = model.norm("final_norm")
    normed = norm.frozen(last, norm.scale(last)) + norm.bias
    weight, bias = parts.unembedding()
    logits = run["final_norm"] @ weight.T + (0 if bias is None else bias)
    if parts.softcap is not None:
        logits = parts.softcap * torch.tanh(logits / parts.softcap)
    return [
        check("the final norm, read as gain and scale, gives final_norm", normed, run["final_norm"]),
        check("final_norm times the unembedding (and soft-cap) gives the logits", logits, run.logits),
    ]


def _edit_checks(model: Model, batch: Batch, run: Run, check) -> list[Check]:  # type: ignore[no-untyped-def]
    """An edit must reach what comes after it, whole: the stream that leaves has it, not only the norm that reads it."""
    block = f"blocks.{model.n_blocks - 1}"
    site = f"{block}.resid_mid" if model.parts.has("resid_mid") else f"{block}.resid_pre"
    shift = run[site].float().std() * torch.ones(model.parts.d_model, device=run[site].device)
    edited = forward(
        model, batch, capture=[f"{block}.resid_post", f"{block}.mlp.out", f"{block}.attn.out"], edits=[Add(site, shift)]
    )
    expected = run[site] + shift.to(run[site].dtype) + edited[f"{block}.mlp.out"]
    if not model.parts.has("resid_mid"):
        expected = expected + edited[f"{block}.attn.out"]
    return [check(f"adding to {site} adds to what leaves the block", edited[f"{block}.resid_post"], expected)]
