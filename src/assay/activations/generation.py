"""Generation with edits and captures under the module's own cache."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any, Literal, get_args

import torch
from torch import Tensor, nn

from assay.activations.apply import Window
from assay.activations.context import RunState, current_run
from assay.activations.edits import Ablate, Edit
from assay.activations.forward import plan_requests
from assay.activations.hooks import running
from assay.activations.values import Captured, Run, named
from assay.base.errors import SpecError
from assay.subjects.model import Model
from assay.subjects.tokens import Batch

ApplyTo = Literal["prompt", "new", "all"]


def generate(
    model: Model,
    batch: Batch,
    edits: Sequence[Edit],
    capture: str | Sequence[str],
    *,
    apply_to: ApplyTo | None,
    max_new_tokens: int,
    **options: Any,
) -> Run:
    """Generate from a left-padded (or unpadded) batch; see `Subject.generate`.

    Raises:
        SpecError: If edits or captures are given without saying where they apply, or with beam search.
    """
    _check(model, batch, edits, capture, apply_to, max_new_tokens, options)
    low, high = {"prompt": (0, batch.width), "new": (batch.width, None)}.get(apply_to or "all", (0, None))
    window = Window(batch, width=0, low=low, high=high)
    state = RunState(plan_requests(model, capture, edits), window, append=True)
    cached = bool(_setting(model, options, "use_cache", True))
    tracker = model.point(model.site("embed")).module.register_forward_pre_hook(_advance(state, cached, model))
    config = {
        "max_new_tokens": max_new_tokens,
        "do_sample": False,
        "pad_token_id": _pad_id(model),
        "output_logits": True,
        "return_dict_in_generate": True,
        **options,
        "use_cache": cached,
        "num_beams": 1,
        "num_return_sequences": 1,
    }
    try:
        with torch.no_grad(), running(state):
            module: Any = model.module
            output = module.generate(input_ids=batch.ids, attention_mask=batch.mask, **config)
    finally:
        tracker.remove()
    if edits or capture:
        state.check_fired()
    captured = Captured(
        tensors={name: named(_join(pieces), pieces[0].dims) for name, pieces in state.pieces.items()},  # type: ignore[attr-defined]
        head_dims={name: request.point.head_dim for name, request in state.requests.items()},
        resolve=model.site,
    )
    logits = named(torch.stack(output.logits, 1), ("batch", "pos", "vocab"))
    return Run(logits=logits, batch=batch, captured=captured, generated=output.sequences)


def _check(
    model: Model,
    batch: Batch,
    edits: Sequence[Edit],
    capture: str | Sequence[str],
    apply_to: str | None,
    max_new_tokens: int,
    options: dict[str, Any],
) -> None:
    """Refuse what edits and captures cannot follow."""
    if (edits or capture) and apply_to not in get_args(ApplyTo):
        raise SpecError(
            f"apply_to={apply_to!r}: say whether edits and captures apply to the 'prompt', the 'new' tokens or 'all'",
            "apply_to",
        )
    model.require_eval()
    for name in ("num_beams", "num_return_sequences"):
        if _setting(model, options, name, 1) not in (1, None):
            raise SpecError(f"edits and captures follow rows, and {name} changes them: use {name}=1", name)
    for name in ("return_dict_in_generate", "output_logits"):
        if name in options:
            raise SpecError(f"{name}= is set here already: the run has the tokens and the logits", name)
    if max_new_tokens < 1:
        raise SpecError(f"max_new_tokens={max_new_tokens}: at least 1", "max_new_tokens")
    if any(isinstance(edit, Ablate) and edit.needs_mean for edit in edits):
        raise SpecError(
            "Ablate(..., 'mean') needs all of a run's tokens, which generation does not have: give a tensor"
        )
    for name in ("assistant_model", "prompt_lookup_num_tokens"):
        if options.get(name) is not None:
            raise SpecError(f"{name}= drafts tokens and takes some back; edits and captures cannot follow that", name)
    if any(start + length != batch.width for start, length in zip(batch.starts, batch.lengths, strict=True)):
        raise SpecError("generation needs padding on the left: give texts, or a mask whose rows end with real tokens")


def _advance(state: RunState, cached: bool, model: Model) -> Any:
    """Before each forward: move the window to the columns this forward covers."""

    def hook(module: nn.Module, args: tuple[Any, ...]) -> None:
        if current_run() is not state:
            return
        width = args[0].shape[1]
        first = state.window.last if cached else 0
        state.window = replace(state.window, first=first, width=width)
        if not cached:
            state.pieces.clear()

    return hook


def _setting(model: Model, options: dict[str, Any], name: str, default: Any) -> Any:
    """A setting of generation: from the call, from a configuration given with it, or from the module's own."""
    if name in options:
        return options[name]
    for config in (options.get("generation_config"), getattr(model.module, "generation_config", None)):
        value = getattr(config, name, None)
        if value is not None:
            return value
    return default


def _join(pieces: list[Tensor]) -> Tensor:
    """Join the steps along positions; patterns keep their steps' rows and are padded to the last width."""
    dims = pieces[0].dims  # type: ignore[attr-defined]
    along = dims.index("pos") if "pos" in dims else dims.index("query") if "query" in dims else 1
    if "key" in dims:
        width = max(piece.shape[-1] for piece in pieces)
        pieces = [nn.functional.pad(piece, (0, width - piece.shape[-1])) for piece in pieces]
    return torch.cat(pieces, along)


def _pad_id(model: Model) -> int | None:
    for owner in (model.tokenizer, getattr(model.module, "generation_config", None), model.config):
        value = getattr(owner, "pad_token_id", None)
        if value is not None:
            return int(value)
    end = getattr(getattr(model.module, "generation_config", None), "eos_token_id", None)
    return int(end[0]) if isinstance(end, list) else end
