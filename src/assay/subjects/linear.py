"""The matrix of a linear map, whatever module computes it: a plain one, a quantised one, or one with LoRA around it."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from assay.base.errors import UnsupportedArchitecture
from assay.subjects.placement import place_of, true_weight


def linear_matrix(module: nn.Module) -> Tensor:
    """A linear map's matrix as `[in, out]`.

    `nn.Linear` and transformers' `Conv1D` have it. A module with others inside (LoRA around a projection, say) is asked
    what it makes of the unit vectors, because a `weight` of its own may be a part of what it computes.

    Args:
        module: The module.

    Raises:
        UnsupportedArchitecture: If it is no linear map.
    """
    if not _plain(module):
        return _measured(module)[0]
    weight = true_weight(module)
    assert weight is not None
    return weight if type(module).__name__ == "Conv1D" else weight.T


def linear_bias(module: nn.Module) -> Tensor | None:
    """A linear map's bias, or None."""
    return true_weight(module, "bias") if _plain(module) else _measured(module)[1]


def out_width(module: nn.Module) -> int:
    """How wide a linear map's output is; quantised maps say so beside their packed weights."""
    stated = getattr(module, "out_features", None)
    return int(stated) if stated is not None else int(linear_matrix(module).shape[1])


def _plain(module: nn.Module) -> bool:
    """Whether a module's `weight` is all that it multiplies by."""
    return isinstance(getattr(module, "weight", None), Tensor) and not any(module.children())


def _in_width(module: nn.Module) -> int | None:
    """How wide a linear map's input is, as it says itself or a map inside it does."""
    for found in module.modules():
        width = getattr(found, "in_features", None)
        if isinstance(width, int):
            return width
        weight = getattr(found, "weight", None)
        if type(found).__name__ == "Conv1D" and isinstance(weight, Tensor):
            return int(weight.shape[0])
    return None


@torch.no_grad()
def _measured(module: nn.Module) -> tuple[Tensor, Tensor | None]:
    """What a module makes of zero and of the unit vectors, and the proof that it makes the same of any other."""
    kind = type(module).__name__
    width = _in_width(module)
    if width is None:
        raise UnsupportedArchitecture(
            f"{kind} is no plain linear map: it has no weight, and does not say how wide it is"
        )
    device, dtype = place_of(module)
    probe = torch.sin(torch.arange(3 * width, dtype=torch.float32) * 0.7).view(3, width).to(device, dtype)
    unit = torch.eye(width, dtype=dtype, device=device)
    # forward, and not a call: hooks that are on the module are for what the model gives it
    out = module.forward(torch.cat([torch.zeros_like(unit[:1]), unit, probe])[None])
    if not isinstance(out, Tensor) or out.shape[:2] != (1, width + 4):
        raise UnsupportedArchitecture(f"{kind} is no plain linear map: it does not give one vector for one")
    bias, rows, found = out[0, 0], out[0, 1 : width + 1] - out[0, 0], out[0, width + 1 :]
    expected = probe @ rows + bias
    error = float((found - expected).abs().max() / found.abs().max().clamp(min=1e-30))
    if not error <= (0.1 if dtype in (torch.float16, torch.bfloat16) else 1e-3):
        raise UnsupportedArchitecture(f"{kind} is no plain linear map: of a sum it makes another by {error:.2g}")
    return rows, bias if bool(bias.any()) else None
