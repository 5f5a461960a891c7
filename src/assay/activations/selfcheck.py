"""Prove an architecture map on the model it is used with: a few tokens, the identities, and nothing else believed."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from assay.activations.context import Request
from assay.activations.forward import call, forward
from assay.activations.identities import Check as Check
from assay.activations.identities import Identities, compare
from assay.activations.responses import Responses
from assay.base.errors import AssayError, UnsupportedArchitecture
from assay.subjects.inputs import batch_from, example_inputs
from assay.subjects.model import Model
from assay.subjects.tokens import Batch, from_ids
from assay.subjects.upkeep import compiled


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
    part = compiled(model.module)
    if part is not None:
        what = f"its {part!r}" if part else type(getattr(model.module, "_orig_mod", model.module)).__name__
        raise UnsupportedArchitecture(
            f"{what} is compiled by torch.compile, whose graphs pass the modules inside by: load the module itself "
            f"(`._orig_mod` of what torch.compile gave), not compiled in place"
        )
    try:
        with torch.no_grad(), _left_as_found(model.module):
            assert model.architecture is not None
            batch = batch_from(model, example_inputs(model.module, model.architecture.inputs, n_tokens=n_tokens))
            checks = _checks(model, batch)
            model.sides = padding_sides(model, n_tokens)
            if not model.sides:  # RoBERTa counts positions from an offset of its own
                model.own_positions = True
                model.sides = padding_sides(model, n_tokens)
    except UnsupportedArchitecture:
        raise
    except AssayError as error:
        raise UnsupportedArchitecture(f"the self-check failed: {error}") from error
    except Exception as error:
        raise UnsupportedArchitecture(
            f"the self-check failed: {_site_of(error)} cannot be computed: {type(error).__name__}: {error}"
        ) from error
    failed = next((check for check in checks if not check.passed), None)
    if failed is not None:
        raise UnsupportedArchitecture(
            f"the self-check failed: {failed.identity}; off by {failed.error:.2g} (tolerance {failed.tolerance:.2g})"
        )
    return checks


def _site_of(error: Exception) -> str:
    """The site that was being read or edited when an error came up, if one was."""
    trace, found = error.__traceback__, "one of the identities"
    while trace is not None:
        request = trace.tb_frame.f_locals.get("request")
        if isinstance(request, Request):
            found = str(request.site)
        trace = trace.tb_next
    return found


def padding_sides(model: Model, n_tokens: int = 6) -> tuple[str, ...]:
    """The sides on which prompts can be padded: those where a prompt keeps the logits it has alone.

    Args:
        model: A model with an architecture map. Of an encoder-decoder both sides' prompts are tried. What is given
            images beside its tokens is padded on the right, as it was trained; images alone are never padded.
        n_tokens: How long the longer of two prompts is.
    """
    if model.architecture is None or model.architecture.inputs == "image":
        return ("left", "right") if len(model.stacks) == 1 else ("right",)
    if len(model.stacks) > 1:
        names = ("", "decoder_") if model.architecture.inputs == "tokens" else ("decoder_",)
        return tuple(s for s in ("left", "right") if all(_bears(model, name, s, n_tokens) for name in names))
    ids = example_inputs(model.module, "tokens", rows=2, n_tokens=n_tokens)["input_ids"]
    short = n_tokens - 2
    alone = _logits(call(model, from_ids(ids[1:, :short])))
    good = []
    for side in ("left", "right"):
        mask, row = torch.ones_like(ids), torch.full_like(ids, getattr(model.config, "pad_token_id", None) or 0)
        row[0] = ids[0]
        start = n_tokens - short if side == "left" else 0
        mask[1] = 0
        mask[1, start : start + short] = 1
        row[1, start : start + short] = ids[1, :short]
        found = _logits(call(model, from_ids(row, mask)))[1:]
        found = found[:, start : start + short] if found.ndim == 3 else found
        if bool((found - alone).abs().max() <= _rounding(model) * alone.abs().max()):
            good.append(side)
    return tuple(good)


def _bears(model: Model, name: str, side: str, n_tokens: int) -> bool:
    """Whether an encoder-decoder gives the same logits when the encoder's or the decoder's prompt is padded."""
    assert model.architecture is not None
    given = example_inputs(model.module, model.architecture.inputs, rows=2, n_tokens=n_tokens)
    ids = given[f"{name}input_ids"]
    short = ids.shape[1] - 2
    alone = {key: value[1:] for key, value in given.items()} | {f"{name}input_ids": ids[1:, :short]}
    expected = _logits(call(model, batch_from(model, alone)))
    columns = slice(0, short) if side == "right" else slice(2, None)
    mask, padded = torch.ones_like(ids), ids.clone()
    mask[1], padded[1] = 0, getattr(model.config, "pad_token_id", None) or 0
    mask[1, columns], padded[1, columns] = 1, ids[1, :short]
    inputs = {**given, f"{name}input_ids": padded, f"{name}attention_mask": mask}
    found = _logits(call(model, batch_from(model, inputs)))[1:, columns if name else slice(None)]
    return bool((found - expected).abs().max() <= _rounding(model) * expected.abs().max())


def _rounding(model: Model) -> float:
    """How much is rounding, relative to the largest value: by the precision of the weights."""
    half = (torch.float16, torch.bfloat16)
    return 5e-2 if any(parameter.dtype in half for parameter in model.module.parameters()) else 1e-4


def _logits(output: Any) -> Tensor:
    logits = getattr(output, "logits", None)
    found: Tensor = output[0] if logits is None else logits
    return found


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
    _require_numbers(model.module, _logits(plain))
    run = forward(model, batch, capture=[site for site in model.sites() if not site.endswith(".result")])
    loose = _rounding(model)
    checks = [compare("capturing leaves the logits as they are", run.logits, _logits(plain), 0.0)]
    for name, parts in model.stacks.items():
        known = Identities(parts, run, loose, model.stacks.get(parts.stack.source) if parts.stack.cross else None)
        checks += known.hidden_states(_hidden_states(plain, name))
        checks += known.embeddings()
        for block in range(len(parts.blocks)):
            checks += known.block(block)
        checks += known.final()
        if all(check.passed for check in checks):
            checks += Responses(model, known, batch).checks()
    return checks


def _require_numbers(module: nn.Module, logits: Tensor) -> None:
    """Refuse a model whose own logits are not numbers: nothing can be proved on it."""
    if not bool(torch.isnan(logits).any()):
        return
    tensors = (*module.named_parameters(), *module.named_buffers())
    held = [name for name, t in tensors if t.is_floating_point() and t.device.type != "meta" and bool(t.isnan().any())]
    where = f": its weights {', '.join(map(repr, held[:3]))} do" if held else ", though its weights do not"
    raise UnsupportedArchitecture(f"the model's own logits hold NaN, before anything is captured or edited{where}")


def _hidden_states(output: Any, stack: str) -> tuple[Tensor, ...]:
    """What the model itself reports as its residual stream, where it does."""
    at = {"vision": "vision_model_output", "text": "text_model_output"}.get(stack)
    output = output if at is None else getattr(output, at, None)
    name = f"{stack}_hidden_states" if stack in ("encoder", "decoder") else "hidden_states"
    return getattr(output, name, None) or ()
