"""Hooks on the user's module: put there for one run, deaf to every other, and gone at its end.

A hook looks the current run up in a `ContextVar` and does nothing unless that run is its own, so two threads with
different edits on one module never see each other.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager, nullcontext
from typing import Any

from torch import nn

from assay.activations.attention import Functions, intercept
from assay.activations.context import Request, RunState
from assay.activations.current import CURRENT
from assay.subjects.points import Traffic


@contextmanager
def running(state: RunState) -> Iterator[RunState]:
    """Hook what the run asked for, make it the current one, and take every hook away at the end.

    Args:
        state: The run.
    """
    if state.limited is not None:
        state.limited.check()
    handles: list[Any] = []
    token = CURRENT.set(state)
    try:
        for (module, side), requests in _by_module(state.requests.values()).items():
            if side == "in":
                hook = _pre_hook(state, requests)
                handles.append(module.register_forward_pre_hook(hook, with_kwargs=True))
            elif side == "out":
                handles.append(module.register_forward_hook(_post_hook(state, requests), with_kwargs=True))
        if state.watches_attention:
            intercept()
        functions = Functions(state)
        watched = {r.point.module for r in state.requests.values() if r.point.side == "function"}
        for module in watched:
            handles += functions.watch(module)
        with functions if watched else nullcontext():
            yield state
    finally:
        for handle in handles:
            handle.remove()
        CURRENT.reset(token)


def _by_module(requests: Iterable[Request]) -> dict[tuple[nn.Module, str], list[Request]]:
    grouped: dict[tuple[nn.Module, str], list[Request]] = {}
    for request in sorted(requests, key=lambda request: not request.point.in_place):
        grouped.setdefault((request.point.module, request.point.side), []).append(request)
    return grouped


def _pre_hook(state: RunState, requests: list[Request]) -> Any:
    def hook(module: nn.Module, *rest: Any) -> Any:
        if CURRENT.get() is not state:
            return None
        args, kwargs = rest
        traffic = Traffic(module, args, kwargs, rows=state.n_rows)
        changed = False
        for request in requests:
            changed |= state.serve(request, traffic)
        return (traffic.args, traffic.kwargs) if changed else None

    return hook


def _post_hook(state: RunState, requests: list[Request]) -> Any:
    def hook(module: nn.Module, *rest: Any) -> Any:
        if CURRENT.get() is not state:
            return None
        *before, output = rest
        args, kwargs = before
        traffic = Traffic(module, args, kwargs, output, state.n_rows)
        changed = False
        for request in requests:
            changed |= state.serve(request, traffic)
        return traffic.output if changed else None

    return hook
