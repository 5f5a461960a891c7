"""Attention's inside: rotated queries and keys, scores and patterns, for the layers that ask.

transformers models fetch their attention function from `AttentionInterface.get_interface`. That method is wrapped
once; when no run is current, or the current run asked nothing of attention, it returns exactly what it returned
before. A layer that only captures keeps its own kernel (SDPA, flash, eager) and its own output bit for bit, and the
pattern is computed beside it. A layer whose scores or pattern are edited is computed explicitly.

Older models (GPT-J, BLOOM, Falcon, MPT) compute attention themselves. For a run that asks for their patterns, the
softmax or scaled-dot-product attention that such a module calls is seen through a `TorchFunctionMode`, which lasts
as long as the run and acts inside the modules asked for.
"""

from __future__ import annotations

import functools
import threading
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.overrides import TorchFunctionMode

from assay.activations.apply import apply_edits
from assay.activations.context import Request, RunState, current_run
from assay.base.errors import SiteError

_lock = threading.Lock()
_REFUSED = ("cache",)
_SOFTMAX = frozenset((torch.softmax, functional.softmax, Tensor.softmax))


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
            return function if run is None or not run.watches_attention else functools.partial(attend, run, function)

        get_interface._assay = True  # type: ignore[attr-defined]
        AttentionInterface.get_interface = get_interface


def attend(
    run: RunState,
    function: Callable[..., tuple[Tensor, Tensor | None]],
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    **kwargs: Any,
) -> tuple[Tensor, Tensor | None]:
    """One layer's attention, with what a run asked for on the way."""
    if run.attention is not None:
        return run.attention(function, module, query, key, value, attention_mask, kwargs)
    requests = run.attention_requests(module)
    if not requests:
        return function(module, query, key, value, attention_mask, **kwargs)
    query = _rotated(run, requests.get("rot_q"), query)
    key = _rotated_keys(run, requests.get("rot_k"), key, query)
    scores_at, pattern_at = requests.get("scores"), requests.get("pattern")
    inside = [r for r in (scores_at, pattern_at) if r is not None and not run.window_of(r).empty]
    if not (inside and (run.keep_graph or any(r.edits for r in inside))):
        output = function(module, query, key, value, attention_mask, **kwargs)
        if inside:
            with torch.no_grad():
                scores = attention_scores(module, query, key, attention_mask, kwargs)
                _inside(run, scores_at, pattern_at, scores, query.dtype, kwargs.get("s_aux"))
        return output
    scores = attention_scores(module, query, key, attention_mask, kwargs)
    pattern = _inside(run, scores_at, pattern_at, scores, query.dtype, kwargs.get("s_aux"))
    mixed = pattern @ _repeat(value, query.shape[1])
    return mixed.transpose(1, 2).contiguous(), pattern


def _inside(
    run: RunState,
    scores_at: Request | None,
    pattern_at: Request | None,
    scores: Tensor,
    dtype: torch.dtype,
    sinks: Tensor | None = None,
) -> Tensor:
    """Scores to pattern, edited and captured on the way; with sinks, a pattern's rows sum to less than one."""
    closes = run.keep_graph or any(r is not None and r.edits for r in (scores_at, pattern_at))
    blocked = unseen(scores) if closes else None
    scores = _serve(run, scores_at, scores, blocked, scores)
    if sinks is None:
        pattern = scores.softmax(-1, dtype=torch.float32).to(dtype)
    else:
        sink = sinks.reshape(1, -1, 1, 1).expand(scores.shape[0], -1, scores.shape[2], 1)
        pattern = torch.cat([scores, sink.to(scores.dtype)], -1).softmax(-1, dtype=torch.float32)[..., :-1].to(dtype)
    return _serve(run, pattern_at, pattern, blocked, torch.zeros_like(pattern) if closes else None)


def unseen(scores: Tensor, module: nn.Module | None = None) -> Tensor:
    """Which scores are those of keys that a query cannot see: minus infinity, or the least number there is.

    That is the least of the module's own precision, where it computes scores in another (GPT-J), and CodeGen divides it
    by the root of the heads' width.
    """
    parameters = () if module is None else module.parameters()
    half = any(dtype == torch.float16 for dtype in (scores.dtype, *(p.dtype for p in parameters)))
    return scores <= (torch.finfo(torch.float16).min / 20 if half else torch.finfo(scores.dtype).min / 100)


class Functions(TorchFunctionMode):
    """Sees the softmax, or the scaled dot-product attention, that some modules call in one run.

    Args:
        run: The run.
    """

    def __init__(self, run: RunState) -> None:
        super().__init__()
        self.run = run
        self.inside: list[nn.Module] = []

    def watch(self, module: nn.Module) -> list[Any]:
        """Hook a module, so that what it calls is known to be its own; the handles are the caller's to remove."""

        def enter(module: nn.Module, *_: Any) -> None:
            if current_run() is self.run:
                self.inside.append(module)

        def leave(module: nn.Module, *_: Any) -> None:
            if current_run() is self.run and self.inside:
                self.inside.pop()

        return [module.register_forward_pre_hook(enter), module.register_forward_hook(leave, always_call=True)]

    def __torch_function__(self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None) -> Any:
        """Serve the run's requests where an attention function is called; leave every other call alone."""
        kwargs = kwargs or {}
        if not self.inside or current_run() is not self.run:
            return func(*args, **kwargs)
        if func in _SOFTMAX:
            return self._softmax(func, args, kwargs)
        if func is functional.scaled_dot_product_attention:
            return self._attention(args, kwargs)
        return func(*args, **kwargs)

    def _softmax(self, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Tensor:
        run, requests = self.run, self.run.attention_requests(self.inside[-1])
        scores, *rest = args
        shape = scores.shape
        scores = scores.view(run.n_rows, -1, *shape[-2:])
        blocked = unseen(scores, self.inside[-1])
        scores = _serve(run, requests.get("scores"), scores, blocked, scores)
        pattern: Tensor = func(scores, *rest, **kwargs)
        return _serve(run, requests.get("pattern"), pattern, blocked, torch.zeros_like(pattern)).reshape(shape)

    def _attention(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Tensor:
        names = ("query", "key", "value", "attn_mask", "dropout_p", "is_causal", "scale")
        given = {**dict(zip(names, args, strict=False)), **kwargs}
        query, key, value = given["query"], given["key"], given["value"]

        def function(module: nn.Module, q: Tensor, k: Tensor, v: Tensor, *_: Any, **__: Any) -> tuple[Tensor, None]:
            output = functional.scaled_dot_product_attention(**{**given, "query": q, "key": k, "value": v})
            return output.transpose(1, 2), None

        causal = {"is_causal": bool(given.get("is_causal", False)), "scaling": given.get("scale")}
        mixed, _ = attend(self.run, function, self.inside[-1], query, key, value, given.get("attn_mask"), **causal)
        return mixed.transpose(1, 2)


def _serve(
    run: RunState,
    request: Request | None,
    value: Tensor,
    blocked: Tensor | None = None,
    closed: Tensor | None = None,
) -> Tensor:
    """Edit and capture; keys that a query cannot see stay closed to it, whatever an edit says."""
    if request is None or (window := run.window_of(request)).empty:
        return value
    request.fired = True
    new = apply_edits(value, request.edits, window, request.point) if request.edits else value
    raw = new
    if (request.edits or run.keep_graph) and blocked is not None and closed is not None:
        new = torch.where(blocked, closed, new)
    if request.captures:
        run.keep(request, new, raw)
    return new


def _rotated_keys(run: RunState, request: Request | None, key: Tensor, query: Tensor) -> Tensor:
    """The keys of this forward's own positions, which a cache may have put others before.

    A cache holds keys as they were before edits, so those of earlier forwards are edited again, and captured no more.
    """
    past = key.shape[2] - query.shape[2] if request is not None and request.site.point == "attn.rot_k" else 0
    if past <= 0 or request is None:
        return _rotated(run, request, key)
    window = run.window_of(request)
    before, old = replace(window, first=window.first - past, width=past), key[:, :, :past]
    if request.edits and not before.empty:
        old = apply_edits(old.transpose(1, 2), request.edits, before, request.point).transpose(1, 2)
    return torch.cat([old, _rotated(run, request, key[:, :, past:])], 2)


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
        kwargs: The layer's other arguments: `scaling`, `softcap`, `sliding_window`, `is_causal`, `position_bias`.

    Raises:
        SiteError: If the layer uses a term that is not handled here.
    """
    for name in _REFUSED:
        if kwargs.get(name) is not None:
            raise SiteError(f"scores and patterns of {type(module).__name__} are not available: it passes {name!r}")
    scaling = kwargs.get("scaling")
    rows, n_heads, n_query, _ = query.shape
    # Queries that share a key head are rows of one product, and what follows writes in place: the tensors are large.
    grouped = query.reshape(rows, key.shape[1], -1, query.shape[-1])
    scores = (grouped @ key.transpose(2, 3)).view(rows, n_heads, n_query, -1)
    scores.mul_(query.shape[-1] ** -0.5 if scaling is None else scaling)
    softcap: float | None = kwargs.get("softcap")
    if softcap is not None:
        scores = softcap * torch.tanh(scores / softcap)
    bias: Tensor | None = kwargs.get("position_bias")
    if bias is not None:
        scores = scores + bias[..., : key.shape[2]]
    if mask is None or mask.ndim == 2:
        visible = _visible(module, query.shape[2], key.shape[2], kwargs, query.device)
        if mask is not None:
            visible = visible & mask.bool()[:, None, None, -key.shape[2] :]
        if scores.dtype == torch.float16:  # whose scores may overflow, and infinity plus minus infinity is no number
            return scores.masked_fill_(~visible, float("-inf"))
        closed = torch.zeros(visible.shape, dtype=scores.dtype, device=scores.device)
        return scores.add_(closed.masked_fill_(~visible, float("-inf")))
    mask = mask[..., : key.shape[2]]
    if mask.dtype == torch.bool:
        return scores.masked_fill_(~mask, torch.finfo(scores.dtype).min)
    return scores.add_(mask)


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
