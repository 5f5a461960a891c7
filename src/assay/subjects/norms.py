"""What a norm does, read off the module: its kind, gain, bias and denominator.

LayerNorm: `y = g (x - mean x) / s + b`, `s = sqrt(var x + eps)`. RMSNorm: `y = g x / s`, `s = sqrt(mean x^2 + eps)`.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Literal

import torch
from jaxtyping import Float
from torch import Tensor, nn

from assay.base.errors import UnsupportedArchitecture
from assay.subjects.placement import place_of, true_weight


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

    The gain is the module's weight, or one more than it (Gemma, Nemotron), or ones; where none of these reproduces
    what the module does, the gain is read off its output.

    Args:
        module: A norm over a last dimension of size `d`.
        d: That size.

    Returns:
        Its kind, gain, bias and eps.

    Raises:
        UnsupportedArchitecture: If it is neither a LayerNorm nor an RMSNorm.
    """
    device, dtype = place_of(module)
    like = torch.zeros(d, dtype=dtype, device=device)
    bias = module(like)
    probe = torch.linspace(-2.0, 3.0, d).to(like) + torch.sin(torch.arange(d)).to(like)
    tolerance = 5e-2 if like.dtype in (torch.float16, torch.bfloat16) else 1e-4
    here, shifted = module(probe), module(probe + 8)
    centred = bool((here - shifted).abs().max() <= 0.1 * (here - bias).abs().max())
    kind: Literal["layer", "rms"] = "layer" if centred else "rms"
    eps = next((float(getattr(module, n)) for n in ("variance_epsilon", "eps", "epsilon") if hasattr(module, n)), None)
    eps = _measure_eps(module, kind, probe, here - bias, bias) if eps is None else eps
    error = float("inf")
    for gain in _gains(module, like):
        norm = Norm(kind=kind, gain=torch.ones_like(like) if gain is None else gain, bias=bias, eps=eps)
        if gain is None:
            norm = replace(norm, gain=(here - bias) / norm.frozen(probe, norm.scale(probe)))
        found = norm.frozen(probe, norm.scale(probe)) + norm.bias
        error = float((found - here).abs().max() / here.abs().max().clamp(min=1e-30))
        other = norm.frozen(probe.flip(0), norm.scale(probe.flip(0))) + norm.bias
        error = max(error, float((other - module(probe.flip(0))).abs().max() / here.abs().max().clamp(min=1e-30)))
        if error <= tolerance:
            return norm
    raise UnsupportedArchitecture(
        f"{type(module).__name__} is neither a LayerNorm nor an RMSNorm: a probe differs by {error:.2g}"
    )


def _measure_eps(module: nn.Module, kind: Literal["layer", "rms"], probe: Tensor, here: Tensor, bias: Tensor) -> float:
    """The constant under the root of a norm that does not say it (OLMo), from how much less than itself it scales.

    With `m` the mean square of `x` and `T = t^2 m`, `r = y(t x) / y(x)` is `sqrt((T + eps T / m) / (T + eps))`, so
    `eps = T (1 - r^2) / (r^2 - T / m)`.
    """
    square = float((probe - probe.mean() if kind == "layer" else probe).float().pow(2).mean())
    target = 1e-5
    at = int(here.abs().argmax())
    ratio = float((module(probe * (target / square) ** 0.5) - bias)[at] / here[at]) ** 2
    found = target * (1 - ratio) / max(ratio - target / square, 1e-12)
    return float(f"{max(found, 0.0):.2g}")


def _gains(module: nn.Module, like: Tensor) -> Iterator[Tensor | None]:
    """What the gain may be; None stands for reading it off the output."""
    weight = true_weight(module)
    if weight is not None and weight.shape == like.shape:
        yield weight.detach().to(like)
        yield weight.detach().to(like) + 1
    yield torch.ones_like(like)
    yield None
