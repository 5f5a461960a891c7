"""Weights that are not where, or what, they seem: offloaded by accelerate, or quantised (bitsandbytes and others).

A forward pass needs none of this: accelerate brings weights in for each module, a quantised module multiplies by what
it keeps. It is needed where a weight is read beside the model, as for each head's own write (`attn.result`).
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn

from assay.base.errors import UnsupportedArchitecture


def true_weight(module: nn.Module, name: str = "weight") -> Tensor | None:
    """A module's weight as numbers: from where accelerate keeps it, and dequantised.

    Args:
        module: The module that owns it.
        name: The attribute.

    Returns:
        The weight, or None where the module has none. It is the parameter itself unless it was moved or quantised.

    Raises:
        UnsupportedArchitecture: If it is on the "meta" device and nothing says where its numbers are, or it is
            quantised in something else than a linear map.
    """
    weight = getattr(module, name, None)
    if not isinstance(weight, Tensor):
        return None
    if weight.device.type == "meta":
        return _offloaded(module, name)
    if not weight.is_floating_point():
        return _unpacked(module)
    return weight


def quantised(module: nn.Module) -> bool:
    """Whether a module's weight is kept in integers."""
    weight = getattr(module, "weight", None)
    return isinstance(weight, Tensor) and not weight.is_floating_point()


def offloads(module: nn.Module) -> Iterator[Any]:
    """The hooks through which accelerate keeps a module's weights elsewhere."""
    hook = getattr(module, "_hf_hook", None)
    for each in getattr(hook, "hooks", (hook,)):
        if getattr(each, "weights_map", None) is not None:
            yield each


def place_of(module: nn.Module) -> tuple[torch.device, torch.dtype]:
    """Where a module computes, and in what floating type: those of its first weight, wherever that is kept."""
    for at in module.modules():
        for each in offloads(at):
            device = torch.device(each.execution_device if each.execution_device is not None else "cpu")
            found = next((t for t in at._parameters.values() if t is not None and t.is_floating_point()), None)
            if found is not None:
                return device, found.dtype
        for parameter in at._parameters.values():
            if parameter is not None and parameter.device.type != "meta":
                return parameter.device, parameter.dtype if parameter.is_floating_point() else torch.float32
    return torch.device("cpu"), torch.float32


def _offloaded(module: nn.Module, name: str) -> Tensor:
    for each in offloads(module):
        if name in each.weights_map:
            found: Tensor = each.weights_map[name]
            return found if each.execution_device is None else found.to(each.execution_device)
    raise UnsupportedArchitecture(
        f"the {name} of {type(module).__name__} is on the 'meta' device, and no hook of accelerate's says where its "
        f"numbers are"
    )


@torch.no_grad()
def _unpacked(module: nn.Module) -> Tensor:
    """A quantised linear map's matrix, `[out, in]`: what it makes of the unit vectors, whatever packed it."""
    width = getattr(module, "in_features", None)
    if not isinstance(width, int):
        raise UnsupportedArchitecture(f"the weight of {type(module).__name__} is quantised, and no linear map says how")
    bias: Tensor | None = getattr(module, "bias", None)
    device = next(t.device for t in module.parameters())
    dtype = getattr(module, "compute_dtype", None) if bias is None else bias.dtype
    dtype = dtype or (torch.float32 if device.type == "cpu" else torch.float16)
    # forward, and not a call: hooks that are on the module are for what the model gives it
    rows: Tensor = module.forward(torch.eye(width, dtype=dtype, device=device))
    return (rows if bias is None else rows - bias).T
