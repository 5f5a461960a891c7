"""Attention's inside: rotated queries and keys, scores and patterns, for the layers that ask.

transformers models fetch their attention function from `AttentionInterface.get_interface`. That method is wrapped
once; when no run is current, or the current run asked nothing of attention, it returns exactly what it returned
before. A layer that only captures keeps its own kernel (SDPA, flash, eager) and its own output bit for bit, and the
pattern is computed beside it. A layer whose scores or pattern are edited is computed explicitly.
"""

from __future__ import annotations

import functools
import threading
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from assay.activations.apply import apply_edits
from assay.activations.context import Request, RunState, current_run
from assay.base.errors import SiteError

_lock = threading.Lock()
_REFUSED = ("s_aux", "position_bias", "cache")


def intercept() -> None:
    """Wrap transformers' look-up of attention functions, once per process."""
    from transformers import AttentionInterface

    with _lock:
        original = AttentionInterface.get_interface
        if getattr(original, "_assay", False):
            return

        @functools.wraps(original)
        def get_interface(self: Any, *args: Any, **kwargs: Any) -> Any:
            function = original(self, *args, **kwargs)
            run = current_run()
            return function if run is None or not run.watches_attention else functools.partial(_attend, run, function)

        get_interface._assay = True  # type: ignore[attr-defined]
        AttentionInterface.get_interface = get_interface


def _attend(
    run: RunState,
    function: Callable[..., tuple[Tensor, Tensor | None]],
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    **kwargs: Any,
) -> tuple[Tensor, Tensor | None]:
    if run.record_attention is not None:
        run.record_attention(module, key, value)
    requests = run.attention_requests(module)
    if not requests or run.window.empty:
        return function(module, query, key, value, attention_mask, **kwargs)
    query = _rotated(run, requests.get("attn.rot_q"), query)
    past = key.shape[2] - query.shape[2]
    if past and "attn.rot_k" in requests:
        key = torch.cat([key[:, :, :past], _rotated(run, requests["attn.rot_k"], key[:, :, past:])], 2)
    else:
        key = _rotated(run, requests.get("attn.rot_k"), key)
    scores_at, pattern_at = requests.get("attn.scores"), requests.get("attn.pattern")
    explicit = run.keep_graph or any(r is not None and r.edits for r in (scores_at, pattern_at))
    wanted = scores_at is not None or pattern_at is not None
    if not (wanted and explicit):
        output = function(module, query, key, value, attention_mask, **kwargs)
        if wanted:
            with torch.no_grad():
                scores = attention_scores(module, query, key, attention_mask, kwargs)
                _inside(run, scores_at, pattern_at, scores, query.dtype)
        return output
    scores = attention_scores(module, query, key, attention_mask, kwargs)
    pattern = _inside(run, scores_at, pattern_at, scores, query.dtype)
    mixed = pattern @ _repeat(value, query.shape[1])
    return mixed.transpose(1, 2).contiguous(), pattern


def _inside(
    run: RunState, scores_at: Request | None, pattern_at: Request | None, scores: Tensor, dtype: torch.dtype
) -> Tensor:
    blocked = scores <= torch.finfo(scores.dtype).min / 2
    scores = _serve(run, scores_at, scores, blocked, scores)
    pattern = scores.softmax(-1, dtype=torch.float32).to(dtype)
    return _serve(run, pattern_at, pattern, blocked, torch.zeros_like(pattern))


def _serve(
    run: RunState,
    request: Request | None,
    value: Tensor,
    blocked: Tensor | None = None,
    closed: Tensor | None = None,
) -> Tensor:
    """Edit and capture; keys that a query cannot see stay closed to it, whatever an edit says."""
    if request is None:
        return value
    request.fired = True
    new = apply_edits(value, request.edits, run.window, request.point) if request.edits else value
    raw = new
    if (request.edits or run.keep_graph) and blocked is not None and closed is not None:
        new = torch.where(blocked, closed, new)
    if request.captures:
        run.keep(request, new, raw)
    return new


def _rotated(run: RunState, request: Request | None, heads_first: Tensor) -> Tensor:
    if request is None:
        return heads_first
    if not run.keep_graph:
        return _serve(run, request, heads_first.transpose(1, 2)).transpose(1, 2)
    value = heads_first.transpose(1, 2).contiguous()
    return _serve(run, request, value).transpose(1, 2)


def attention_scores(
    module: nn.Module, query: Tensor, key: Tensor, mask: Tensor | None, kwargs: dict[str, Any]
) -> Tensor:
    """Scaled, capped and masked scores, `[batch, head, query, key]`, as the layer's own kernel computes them inside.

    Args:
        module: The attention module.
        query: `[batch, head, query, d_head]`, rotated.
        key: `[batch, kv head, key, d_head]`, rotated.
        mask: What the layer passes: None (causal), boolean, additive, or `[batch, key]`.
        kwargs: The layer's other arguments: `scaling`, `softcap`, `sliding_window`, `is_causal`.

    Raises:
        SiteError: If the layer uses a term that is not handled here.
    """
    for name in _REFUSED:
        if kwargs.get(name) is not None:
            raise SiteError(f"scores and patterns of {type(module).__name__} are not available: it passes {name!r}")
    scaling = kwargs.get("scaling")
    scores: Tensor = query @ _repeat(key, query.shape[1]).transpose(2, 3)
    scores = scores * (query.shape[-1] ** -0.5 if scaling is None else scaling)
    softcap: float | None = kwargs.get("softcap")
    if softcap is not None:
        scores = softcap * torch.tanh(scores / softcap)
    if mask is None or mask.ndim == 2:
        visible = _visible(module, query.shape[2], key.shape[2], kwargs, query.device)
        if mask is not None:
            visible = visible & mask.bool()[:, None, None, -key.shape[2] :]
        return scores.masked_fill(~visible, float("-inf"))
    mask = mask[..., : key.shape[2]]
    if mask.dtype == torch.bool:
        return scores.masked_fill(~mask, torch.finfo(scores.dtype).min)
    return scores + mask


def _visible(module: nn.Module, n_query: int, n_key: int, kwargs: dict[str, Any], device: torch.device) -> Tensor:
    causal = kwargs.get("is_causal")
    causal = getattr(module, "is_causal", True) if causal is None else causal
    at = torch.arange(n_key - n_query, n_key, device=device)[:, None]
    seen = torch.arange(n_key, device=device)[None]
    visible: Tensor = at >= seen if causal else torch.ones(n_query, n_key, dtype=torch.bool, device=device)
    window: int | None = kwargs.get("sliding_window")
    if window is not None:
        visible = visible & (at - seen < window)
    return visible


def _repeat(heads: Tensor, n_heads: int) -> Tensor:
    return heads if heads.shape[1] == n_heads else heads.repeat_interleave(n_heads // heads.shape[1], 1)
