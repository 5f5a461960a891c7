"""One forward pass with captures, edits and gradients."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from assay.activations.apply import Placed, Window
from assay.activations.checking import edits_of
from assay.activations.context import Request, RunState, current_run
from assay.activations.edits import Edit
from assay.activations.hooks import running
from assay.activations.serving import watch
from assay.activations.values import Captured, Run, named
from assay.base.errors import InvalidEdit, SiteError, SpecError
from assay.base.sites import Site
from assay.subjects.inputs import rooted
from assay.subjects.model import Model
from assay.subjects.tokens import Batch

Metric = Callable[[Tensor], Tensor]


def plan_requests(model: Model, capture: str | Sequence[str], edits: Sequence[Edit]) -> dict[str, Request]:
    """Turn captures and edits into one request a site.

    Args:
        model: The model whose sites they name.
        capture: Site names and patterns.
        edits: Edits, in the order they are to be applied at one site.

    Returns:
        Requests by canonical name of the whole site, edits before captures.

    Raises:
        UnknownSite: If a name is not a site of this model.
        InvalidEdit: If something that is not an edit was given as one, or one edit without a list.
    """
    requests: dict[str, Request] = {}

    def request(site: Site) -> Request:
        whole = site.whole
        name = str(whole)
        if name not in requests:
            requests[name] = Request(whole, model.point(whole), guard=name in model.overwritten)
        return requests[name]

    for edit in edits_of(edits):
        if not isinstance(edit, Edit):
            raise InvalidEdit(f"edits are Add, Set, Scale, Clamp, Ablate, ProjectOut, Patch or Apply, not {edit!r:.80}")
        site = model.site(edit.site)
        request(site).edits.append(Placed(edit, site.head))
    for site in model.expand(capture):
        request(site).captures.append(site)
    return requests


def call(model: Model, batch: Batch, **options: Any) -> Any:
    """Call the user's module on a batch, with a cache only if asked."""
    inputs = batch.forward_inputs()
    if model.config is None:
        args = batch.args or ((inputs.pop("input_ids"),) if batch.inputs is None else ())
        return model.module(*args, **inputs)
    if model.own_positions or not model.takes("position_ids"):
        inputs.pop("position_ids", None)
    if model.takes("use_cache"):
        options = {"use_cache": False, **options}
    return model.module(*batch.args, **inputs, **options)


def forward(
    model: Model,
    batch: Batch,
    *,
    capture: str | Sequence[str] = (),
    edits: Sequence[Edit] = (),
    grad: Metric | None = None,
    options: dict[str, Any] | None = None,
) -> Run:
    """Run once.

    Args:
        model: The subject.
        batch: Its input.
        capture: Site names and patterns to read, after any edits there.
        edits: Changes to make.
        grad: A metric from logits to one value a row; its gradient at every captured site comes back as `run.grad`.
        options: More keyword arguments for the module.

    Returns:
        Logits, captured tensors, gradients.
    """
    model.require_eval()
    edits = edits_of(edits)  # read once, though it may be run twice
    if grad is not None:
        _require_graph(model)
        batch = rooted(batch) if model.architecture is None else batch
    while True:
        requests = plan_requests(model, capture, edits)
        state = RunState(requests, Window(batch), keep_graph=grad is not None)
        mode = _graph() if grad is not None else _no_graph()
        with mode, running(state):
            handles = _root_gradient(model, state) if grad is not None else []
            handles += watch(state, model)
            try:
                output = call(model, batch, **(options or {}))
            finally:
                for handle in handles:
                    handle.remove()
        state.check_fired()
        stale = state.overwritten() - model.overwritten
        if not stale:
            break
        model.overwritten |= stale  # the module wrote over what was captured: run again, and keep copies from now on
    logits = main_output(output)
    if state.limited is not None:
        state.limited.keep("logits", logits)
    captured = Captured(
        tensors=state.captured,
        head_dims={name: request.point.head_dim for name, request in requests.items()},
        resolve=model.site,
    )
    if grad is not None:
        with _graph():
            return _with_gradient(_result(logits, batch, captured), state, grad, logits)
    return _result(logits, batch, captured)


@contextmanager
def _graph() -> Iterator[None]:
    """Record a graph, whatever mode the caller is in."""
    with torch.inference_mode(False), torch.enable_grad():
        yield


@contextmanager
def _no_graph() -> Iterator[None]:
    """Record no graph; tensors still count how often they are written over, which inference mode's do not."""
    with torch.inference_mode(False), torch.no_grad():
        yield


def _result(logits: Tensor, batch: Batch, captured: Captured) -> Run:
    other = ("batch", *(f"dim{i}" for i in range(1, logits.ndim)))
    dims = ("batch", "pos", "vocab") if logits.ndim == 3 else other[: logits.ndim]
    return Run(logits=named(logits.detach(), dims), batch=batch, captured=captured)


def _require_graph(model: Model) -> None:
    """Refuse gradients through weights that no graph can hold."""
    if any(parameter.is_inference() for parameter in model.module.parameters()):
        raise SpecError(
            f"grad= needs weights that a graph can hold, and those of {model.name} were made in "
            f"torch.inference_mode(): make or load the module outside of it",
            "grad",
        )


def main_output(output: Any) -> Tensor:
    """A module's logits, or the first tensor that it returned.

    Raises:
        SiteError: If it returned none.
    """
    if isinstance(output, Tensor):
        return output
    logits = getattr(output, "logits", None)
    if isinstance(logits, Tensor):
        return logits
    items = output.values() if isinstance(output, Mapping) else output if isinstance(output, tuple | list) else ()
    for item in items:
        if isinstance(item, Tensor):
            return item
    raise SiteError(f"the module returned no tensor, but {type(output).__name__}")


def _root_gradient(model: Model, state: RunState) -> list[Any]:
    """Start the graph at the embedding, so that gradients exist even when no parameter wants one."""
    if model.architecture is None:
        return []

    def hook(module: Any, args: Any, output: Tensor) -> Tensor | None:
        mine = current_run() is state and not output.requires_grad
        return output.detach().requires_grad_() if mine else None

    return [
        parts.points(None)["embed"]().module.register_forward_hook(hook, prepend=True)
        for parts in model.stacks.values()
        if parts.has("embed")
    ]


def _with_gradient(run: Run, state: RunState, metric: Metric, logits: Tensor) -> Run:
    if not state.captured:
        raise SpecError("grad= needs capture=: the sites at which the gradient is wanted", "grad")
    value = metric(logits)
    one_a_row = isinstance(value, Tensor) and value.shape == logits.shape[:1]
    if isinstance(value, Tensor) and not one_a_row:
        raise SpecError(
            f"the metric must map logits {list(logits.shape)} to one value a row, [{logits.shape[0]}]; it gave a "
            f"tensor shaped {tuple(value.shape)}",
            "grad",
        )
    if not isinstance(value, Tensor) or not value.requires_grad:
        if not logits.requires_grad:
            raise SpecError("no parameter of this module wants a gradient, so none reaches its output", "grad")
        raise SpecError("the metric must be a tensor computed from the logits it is given", "grad")
    names = list(state.captured)
    raws = [state.raws[name] for name in names]
    for name, raw in zip(names, raws, strict=True):
        if not raw.requires_grad:
            why = "whole numbers" if not raw.is_floating_point() else "nothing before it wants a gradient"
            raise SpecError(f"there is no gradient at {name!r} ({why}): leave it out of capture=", "capture")
    found = torch.autograd.grad(value.sum(), raws, allow_unused=True)
    gradients = {}
    for name, raw, gradient in zip(names, raws, found, strict=True):
        site = state_site(name, state)
        point = state.requests[str(site.whole)].point
        whole = point.gradient(torch.zeros_like(raw) if gradient is None else gradient, state.n_rows)
        dims = state.captured[name].dims  # type: ignore[attr-defined]
        part = whole if site.head is None or point.head_dim is None else whole.select(point.head_dim, site.head)
        gradients[name] = named(part.detach(), dims)
    return replace(run, grad=replace(run.captured, tensors=gradients, what="differentiated"), value=value.detach())


def state_site(name: str, state: RunState) -> Site:
    """The site a captured name belongs to."""
    for request in state.requests.values():
        for site in request.captures:
            if str(site) == name:
                return site
    raise KeyError(name)
