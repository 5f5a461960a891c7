"""What the kernels take and give beside tensors: pairs sorted by latent, Adam's moments, one step's settings."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from jaxtyping import Float, Int
from torch import Tensor

from assay.base.errors import SpecError


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class ByLatent:
    """Pairs latent by latent (CSC): those of latent `f` are `offsets[f] : offsets[f + 1]`, in the order given.

    Attributes:
        offsets: Where each latent's pairs begin, and the end of the last, int64 `[latent + 1]`.
        rows: The row of each pair, int32 `[pairs]`.
        values: Its activation z, `[pairs]`.
        slopes: The loss's derivative by its pre-activation h, `[pairs]`.
    """

    offsets: Int[Tensor, " latents_and_one"]
    rows: Int[Tensor, " pairs"]
    values: Float[Tensor, " pairs"]
    slopes: Float[Tensor, " pairs"]

    @property
    def n_latents(self) -> int:
        """How many latents there are."""
        return self.offsets.numel() - 1


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Moments:
    """Adam's running means of the gradient (`m_`) and of its square (`v_`); a step changes them in place.

    Attributes:
        m_dec: `[latent, d_out]`, as `v_dec`.
        v_dec: The decoder's second moment.
        m_enc: `[latent, d_in]`, as `v_enc`.
        v_enc: The encoder's second moment.
        m_b: `[latent]`, as `v_b`.
        v_b: The encoder bias's second moment.
    """

    m_dec: Float[Tensor, "latent d_out"]
    v_dec: Float[Tensor, "latent d_out"]
    m_enc: Float[Tensor, "latent d_in"]
    v_enc: Float[Tensor, "latent d_in"]
    m_b: Float[Tensor, " latent"]
    v_b: Float[Tensor, " latent"]

    @classmethod
    def zeros(cls, W_dec: Float[Tensor, "latent d_out"], W_enc: Float[Tensor, "latent d_in"]) -> Moments:
        """The moments before the first step.

        Example:
            >>> Moments.zeros(torch.ones(3, 2), torch.ones(3, 4)).m_enc.shape
            torch.Size([3, 4])
        """
        dec, enc, b = (torch.zeros_like(like, requires_grad=False) for like in (W_dec, W_enc, W_enc[:, 0]))
        return cls(m_dec=dec, v_dec=dec.clone(), m_enc=enc, v_enc=enc.clone(), m_b=b, v_b=b.clone())


@dataclass(frozen=True, slots=True, kw_only=True)
class AdamStep:
    """The settings of one step of Adam, by the formula of `torch.optim.Adam` without weight decay.

        m = beta1 m + (1 - beta1) g,   v = beta2 v + (1 - beta2) g²
        w -= lr (m / (1 - beta1^step)) / (sqrt(v / (1 - beta2^step)) + eps)

    Attributes:
        lr: The learning rate.
        step: The number of this step, from 1.
        beta1: How much of the mean gradient stays.
        beta2: How much of the mean square stays.
        eps: Added to the root.

    Raises:
        SpecError: A setting is out of its range.
    """

    lr: float
    step: int
    beta1: float = 0.9
    beta2: float = 0.999
    eps: float = 1e-8

    def __post_init__(self) -> None:
        if self.step < 1:
            raise SpecError(f"Adam's first step is 1, got step {self.step}", "step")
        for name, least in (("lr", 0.0), ("eps", 0.0)):
            value = getattr(self, name)
            if not (math.isfinite(value) and value >= least):
                raise SpecError(f"{name} is a finite number of at least {least:g}, got {value!r}", name)
        for name in ("beta1", "beta2"):
            if not 0 <= getattr(self, name) < 1:
                raise SpecError(f"{name} is at least 0 and less than 1, got {getattr(self, name)!r}", name)

    @property
    def rate(self) -> float:
        """The learning rate over what the mean gradient lacks of its full weight, `lr / (1 - beta1^step)`."""
        return self.lr / (1 - self.beta1**self.step)

    @property
    def root(self) -> float:
        """The root of what the mean square lacks of its full weight, `sqrt(1 - beta2^step)`."""
        return math.sqrt(1 - self.beta2**self.step)
