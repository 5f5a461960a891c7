"""What a norm does, read off the module: its kind, gain, bias and denominator.

LayerNorm: `y = g (x - mean x) / s + b`, `s = sqrt(var x + eps)`. RMSNorm: `y = g x / s`, `s = sqrt(mean x^2 + eps)`.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from jaxtyping import Float
from torch import Tensor, nn

from assay.base.errors import UnsupportedArchitecture


@dataclass(frozen=True, slots=True, kw_only=True)
class Norm:
    """A norm as a linear map after division by its scale.

    Args:
        kind: `layer` subtracts the mean, `rms` does not.
        gain: The factor after division, `[d]`.
        bias: The offset after the gain, `[d]`.
        eps: The constant under the root.
    """

    kind: Literal["layer", "rms"]
    gain: Float[Tensor, " d"]
    bias: Float[Tensor, " d"]
    eps: float

    def centre(self, x: Tensor) -> Tensor:
        """Subtract the mean where the norm does; `[..., d] -> [..., d]`."""
        return x - x.mean(-1, keepdim=True) if self.kind == "layer" else x

    def scale(self, x: Float[Tensor, "*any d"]) -> Float[Tensor, "*any 1"]:
        """The denominator, `[..., d] -> [..., 1]`."""
        return (self.centre(x.float()).pow(2).mean(-1, keepdim=True) + self.eps).sqrt().to(x.dtype)

    def frozen(self, x: Tensor, scale: Tensor) -> Tensor:
        """Apply the norm with a given denominator and without its bias: linear in `x`.

        Args:
            x: Parts of the stream, `[..., d]`.
            scale: The denominator of the whole stream, `[..., 1]`.

        Returns:
            `g centre(x) / scale`, `[..., d]`.
        """
        return self.gain * self.centre(x) / scale


@torch.no_grad()
def read_norm(module: nn.Module, d: int) -> Norm:
    """Find out what a norm module computes by asking it.

    Args:
        module: A norm over a last dimension of size `d`.
        d: That size.

    Returns:
        Its kind, gain, bias and eps.

    Raises:
        UnsupportedArchitecture: If it is neither a LayerNorm nor an RMSNorm.
    """
    parameter = next(module.parameters(), None)
    like = torch.zeros(d) if parameter is None else torch.zeros(d, dtype=parameter.dtype, device=parameter.device)
    eps = next((float(getattr(module, n)) for n in ("variance_epsilon", "eps", "epsilon") if hasattr(module, n)), 1e-6)
    ones = torch.ones_like(like)
    bias = module(like)
    probe = torch.linspace(-2.0, 3.0, d).to(like)
    tolerance = 5e-2 if like.dtype in (torch.float16, torch.bfloat16) else 1e-4
    here, shifted = module(probe), module(probe + 8)
    centred = bool((here - shifted).abs().max() <= 0.1 * (here - bias).abs().max())
    if centred:
        weight = getattr(module, "weight", None)
        norm = Norm(kind="layer", gain=ones if weight is None else weight.detach(), bias=bias, eps=eps)
    else:
        norm = Norm(kind="rms", gain=(module(ones) - bias) * (1 + eps) ** 0.5, bias=bias, eps=eps)
    error = (norm.frozen(probe, norm.scale(probe)) + norm.bias - here).abs().max()
    if not bool(error <= tolerance * here.abs().max()):
        raise UnsupportedArchitecture(
            f"{type(module).__name__} is neither a LayerNorm nor an RMSNorm: a probe differs by {float(error):.2g}"
        )
    return norm
