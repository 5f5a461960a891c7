"""Plain torch hooks at hand-written places, and eager copies of models: what captures and edits are held against."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import torch
from family_facts import At, Facts
from torch import Tensor, nn

Change = Callable[[Tensor], Tensor]


def unflatten(x: Tensor, rows: int) -> Tensor:
    """Some modules are called with rows and positions in one dimension."""
    return x.reshape(rows, -1, x.shape[-1]) if x.ndim == 2 else x


def pick(at: At, x: Tensor, rows: int) -> Tensor:
    value = at.view(unflatten(x, rows) if at.rows else x)
    return value if at.factor == 1.0 else value * at.factor


def put(at: At, x: Tensor, rows: int, change: Change) -> Tensor:
    """The tensor with what is read at a place changed: the view of its indices says where that lies."""
    where = at.view(unflatten(torch.arange(x.numel()).reshape(x.shape), rows))
    flat = x.clone().reshape(-1)
    value = flat[where]
    new = change(value * at.factor if at.factor != 1.0 else value)
    flat[where] = new / at.factor if at.factor != 1.0 else new
    return flat.reshape(x.shape)


def first_tensor(args: Sequence[Any], kwargs: Mapping[str, Any]) -> Tensor:
    found: Tensor = next(value for value in (*args, *kwargs.values()) if isinstance(value, Tensor))
    return found


def first_replaced(
    args: Sequence[Any], kwargs: Mapping[str, Any], new: Tensor
) -> tuple[tuple[Any, ...], dict[str, Any]]:
    for i, value in enumerate(args):
        if isinstance(value, Tensor):
            return (*args[:i], new, *args[i + 1 :]), dict(kwargs)
    name = next(name for name, value in kwargs.items() if isinstance(value, Tensor))
    return tuple(args), {**kwargs, name: new}


def output_tensor(output: Any, item: int) -> Tensor:
    found: Tensor = output if isinstance(output, Tensor) else output[item]
    return found


def output_replaced(output: Any, item: int, new: Tensor) -> Any:
    if isinstance(output, Tensor):
        return new
    return (*output[:item], new, *output[item + 1 :])


@contextmanager
def reading(
    module: nn.Module, facts: Facts, rows: int, keep: Callable[[Tensor], Tensor]
) -> Iterator[dict[str, Tensor]]:
    """Hook every place; what is seen there is in the dictionary after the forward."""
    seen: dict[str, Tensor] = {}
    handles = []

    def watch(site: str, at: At) -> None:
        def before(_: nn.Module, args: Any, kwargs: Any) -> None:
            seen[site] = keep(pick(at, first_tensor(args, kwargs), rows))

        def after(_: nn.Module, args: Any, output: Any) -> None:
            seen[site] = keep(pick(at, output_tensor(output, at.item), rows))

        target = module.get_submodule(at.path)
        if at.side == "in":
            handles.append(target.register_forward_pre_hook(before, with_kwargs=True))
        else:
            handles.append(target.register_forward_hook(after))

    for site, at in facts.items():
        watch(site, at)
    try:
        yield seen
    finally:
        for handle in handles:
            handle.remove()


@torch.no_grad()
def read_all(module: nn.Module, inputs: dict[str, Tensor], facts: Facts) -> tuple[Any, dict[str, Tensor]]:
    """One plain forward: its output, and a copy of what passes at every place."""
    rows = next(iter(inputs.values())).shape[0]
    with reading(module, facts, rows, lambda x: x.detach().clone()) as seen:
        output = module(**inputs)
    return output, seen


@torch.no_grad()
def run_changed(module: nn.Module, inputs: dict[str, Tensor], changes: Sequence[tuple[At, Change]]) -> Any:
    """One forward with changes made at places by plain hooks."""
    rows = next(iter(inputs.values())).shape[0]

    def hooked(at: At, change: Change) -> Any:
        def before(_: nn.Module, args: Any, kwargs: Any) -> Any:
            return first_replaced(args, kwargs, put(at, first_tensor(args, kwargs), rows, change))

        def after(_: nn.Module, args: Any, output: Any) -> Any:
            return output_replaced(output, at.item, put(at, output_tensor(output, at.item), rows, change))

        target = module.get_submodule(at.path)
        if at.side == "in":
            return target.register_forward_pre_hook(before, with_kwargs=True)
        return target.register_forward_hook(after)

    handles = [hooked(at, change) for at, change in changes]
    try:
        return module(**inputs)
    finally:
        for handle in handles:
            handle.remove()


def logits_of(output: Any) -> Tensor:
    logits = getattr(output, "logits", None)
    found: Tensor = output[0] if logits is None else logits
    return found


def eager_copy(module: nn.Module) -> Any:
    """The same model with attention written out, so that it can return its patterns."""
    twin: Any = copy.deepcopy(module)
    twin.set_attn_implementation("eager")
    twin.config._attn_implementation = "eager"  # some (Falcon) do not follow what was set
    return twin


@contextmanager
def softmaxes(
    change: Mapping[tuple[nn.Module, str], Change], attentions: Sequence[nn.Module]
) -> Iterator[dict[nn.Module, list[Tensor]]]:
    """See, and change, the scores and patterns that go through softmax while an attention module runs.

    Args:
        change: What to do to a module's "scores" or "pattern".
        attentions: The modules to watch.

    Yields:
        For each module, its scores and its pattern, as they went in and came out.
    """
    seen: dict[nn.Module, list[Tensor]] = {}
    inside: list[nn.Module] = []
    handles = []
    for module in attentions:
        handles.append(module.register_forward_pre_hook(lambda m, _: inside.append(m)))
        handles.append(module.register_forward_hook(lambda m, _, out: inside.pop() and None))
    originals = torch.softmax, nn.functional.softmax, Tensor.softmax

    def wrap(original: Callable[..., Tensor]) -> Callable[..., Tensor]:
        def softmax(x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
            if not inside:
                return original(x, *args, **kwargs)
            module = inside[-1]
            x = change.get((module, "scores"), lambda y: y)(x)
            out = original(x, *args, **kwargs)
            seen[module] = [x.detach().clone(), out.detach().clone()]
            return change.get((module, "pattern"), lambda y: y)(out)

        return softmax

    kernel = nn.functional.scaled_dot_product_attention

    def written_out(query: Tensor, key: Tensor, value: Tensor, attn_mask: Tensor, **_: Any) -> Tensor:
        if not inside:
            return kernel(query, key, value, attn_mask=attn_mask, **_)
        scores = query @ key.transpose(2, 3) * query.shape[-1] ** -0.5
        return nn.functional.softmax(scores + attn_mask, dim=-1) @ value

    nn.functional.scaled_dot_product_attention = written_out
    torch.softmax, nn.functional.softmax, Tensor.softmax = map(wrap, originals)  # type: ignore[assignment]
    try:
        yield seen
    finally:
        nn.functional.scaled_dot_product_attention = kernel
        torch.softmax, nn.functional.softmax, Tensor.softmax = originals  # type: ignore[assignment]
        for handle in handles:
            handle.remove()


@contextmanager
def attention_calls() -> Iterator[dict[nn.Module, tuple[Tensor, Tensor]]]:
    """Queries and keys as transformers' attention functions get them, `[batch, head, pos, d_head]`, by module."""
    from transformers import AttentionInterface

    seen: dict[nn.Module, tuple[Tensor, Tensor]] = {}
    original = AttentionInterface.get_interface

    def get_interface(self: Any, *given: Any) -> Any:
        function = original(self, *given)

        def spy(module: nn.Module, query: Tensor, key: Tensor, *args: Any, **kwargs: Any) -> Any:
            seen[module] = query.detach().clone(), key.detach().clone()
            return function(module, query, key, *args, **kwargs)

        return spy

    AttentionInterface.get_interface = get_interface
    try:
        yield seen
    finally:
        AttentionInterface.get_interface = original


def traces(module: nn.Module) -> Any:
    """Everything about a module that a run could leave something on."""
    hooks = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")
    parts = [
        (name, type(part).__name__, sorted(part.__dict__), [len(getattr(part, kind)) for kind in hooks])
        for name, part in module.named_modules()
    ]
    config: Any = getattr(module, "config", None)
    return parts, None if config is None else (config.to_dict(), sorted(config.__dict__), config._attn_implementation)


def gradients_of(
    module: nn.Module, inputs: dict[str, Tensor], facts: Facts, metric: Callable[[Tensor], Tensor]
) -> dict[str, Tensor]:
    """Plain autograd's gradient at every place: retained on the tensors that pass there."""
    rows = next(iter(inputs.values())).shape[0]
    raw: dict[str, Tensor] = {}
    handles = []

    def watch(site: str, at: At) -> None:
        def before(_: nn.Module, args: Any, kwargs: Any) -> None:
            raw[site] = first_tensor(args, kwargs)
            raw[site].retain_grad()

        def after(_: nn.Module, args: Any, output: Any) -> None:
            raw[site] = output_tensor(output, at.item)
            raw[site].retain_grad()

        target = module.get_submodule(at.path)
        if at.side == "in":
            handles.append(target.register_forward_pre_hook(before, with_kwargs=True))
        else:
            handles.append(target.register_forward_hook(after))

    for site, at in facts.items():
        watch(site, at)
    module.zero_grad()
    try:
        metric(logits_of(module(**inputs))).sum().backward()
    finally:
        for handle in handles:
            handle.remove()
        module.zero_grad()
    found = {}
    for site, tensor in raw.items():
        gradient = torch.zeros_like(tensor) if tensor.grad is None else tensor.grad
        found[site] = replace(facts[site], factor=1.0).view(unflatten(gradient, rows)) / facts[site].factor
    return found
