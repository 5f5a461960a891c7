"""What turns pre-activations `h` into activations `z`, one frozen value for each nonlinearity.

    ReLU       z = max(h, 0)
    TopK       the k largest h of a row, then ReLU
    JumpReLU   z = h where h > threshold, else 0
    Gated      z = relu(exp(log_gain) h + offset) where h > 0, else 0
    GroupMax   the largest of each of k groups of neighbouring latents, then ReLU

BatchTopK and the Matryoshka family choose over a batch while they train and have a threshold afterwards, so a trained
one is a JumpReLU whose threshold is the same for every latent.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol, runtime_checkable

import torch
from jaxtyping import Float
from torch import Tensor

from assay.base.errors import SpecError


@runtime_checkable
class Activation(Protocol):
    """A nonlinearity of pre-activations."""

    @property
    def name(self) -> str:
        """What files call it."""

    def __call__(self, h: Float[Tensor, "*rows latent"]) -> Float[Tensor, "*rows latent"]:
        """Activations of pre-activations."""

    def tensors(self) -> dict[str, Tensor]:
        """Its own weights, by the name files give them."""

    def settings(self) -> dict[str, int]:
        """Its own numbers, by the name files give them."""


@dataclass(frozen=True, slots=True)
class ReLU:
    """`z = max(h, 0)`.

    Example:
        >>> ReLU()(torch.tensor([-1.0, 2.0])).tolist()
        [0.0, 2.0]
    """

    name: str = "relu"

    def __call__(self, h: Float[Tensor, "*rows latent"]) -> Float[Tensor, "*rows latent"]:
        """Activations of pre-activations."""
        return torch.relu(h)

    def tensors(self) -> dict[str, Tensor]:
        """None."""
        return {}

    def settings(self) -> dict[str, int]:
        """None."""
        return {}


@dataclass(frozen=True, slots=True, kw_only=True)
class TopK:
    """The `k` largest of a row, then ReLU; of equal ones the first.

    Raises:
        SpecError: k is below 1.

    Example:
        >>> TopK(k=2)(torch.tensor([[3.0, -1.0, 2.0, 1.0]])).tolist()
        [[3.0, 0.0, 2.0, 0.0]]
    """

    k: int
    name: str = "topk"

    def __post_init__(self) -> None:
        _check_k(self.k)

    def __call__(self, h: Float[Tensor, "*rows latent"]) -> Float[Tensor, "*rows latent"]:
        """Activations of pre-activations.

        Raises:
            SpecError: There are fewer latents than k.
        """
        if self.k > h.shape[-1]:
            raise SpecError(f"TopK keeps {self.k} latents and there are {h.shape[-1]}", "k")
        order = torch.sort(h, dim=-1, descending=True, stable=True).indices[..., : self.k]
        kept = torch.relu(h.gather(-1, order))
        return torch.zeros_like(h).scatter(-1, order, kept)

    def tensors(self) -> dict[str, Tensor]:
        """None."""
        return {}

    def settings(self) -> dict[str, int]:
        """`k`."""
        return {"k": self.k}


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class JumpReLU:
    """`z = h` where `h > threshold`, else 0; the threshold is one number a latent and not negative.

    Raises:
        SpecError: A threshold is negative or not finite.

    Example:
        >>> JumpReLU(threshold=torch.tensor([0.5, 2.0]))(torch.tensor([1.0, 1.0])).tolist()
        [1.0, 0.0]
    """

    threshold: Float[Tensor, " latent"]
    name: str = "jumprelu"

    def __post_init__(self) -> None:
        if not bool((torch.isfinite(self.threshold) & (self.threshold >= 0)).all()):
            raise SpecError(
                f"a JumpReLU's thresholds run from {float(self.threshold.min()):g} to {float(self.threshold.max()):g}; "
                "they must be finite and not negative (-1 in some files means that none was estimated)",
                "threshold",
            )

    def __call__(self, h: Float[Tensor, "*rows latent"]) -> Float[Tensor, "*rows latent"]:
        """Activations of pre-activations."""
        return torch.where(h <= self.threshold, 0, h)  # NaN stays NaN

    def tensors(self) -> dict[str, Tensor]:
        """`threshold`."""
        return {"threshold": self.threshold}

    def settings(self) -> dict[str, int]:
        """None."""
        return {}


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Gated:
    """One affine map decides whether a latent is active, the same map rescaled says how much.

        z = relu(exp(log_gain) h + offset)  where h > 0, else 0

    With the paper's `b_gate` as the encoder's bias, its `r_mag` is `log_gain` and its `b_mag` is
    `offset + exp(log_gain) b_gate`.

    Source: Rajamanoharan et al. 2024 (arXiv 2404.16014), section 3.2.

    Example:
        >>> gated = Gated(log_gain=torch.zeros(2), offset=torch.tensor([0.0, -3.0]))
        >>> gated(torch.tensor([[2.0, 2.0], [-1.0, 5.0]])).tolist()
        [[2.0, 0.0], [0.0, 2.0]]
    """

    log_gain: Float[Tensor, " latent"]
    offset: Float[Tensor, " latent"]
    name: str = "gated"

    def __call__(self, h: Float[Tensor, "*rows latent"]) -> Float[Tensor, "*rows latent"]:
        """Activations of pre-activations."""
        return torch.where(h <= 0, 0, torch.relu(torch.exp(self.log_gain) * h + self.offset))  # NaN stays NaN

    def tensors(self) -> dict[str, Tensor]:
        """`log_gain` and `offset`."""
        return {"log_gain": self.log_gain, "offset": self.offset}

    def settings(self) -> dict[str, int]:
        """None."""
        return {}


@dataclass(frozen=True, slots=True, kw_only=True)
class GroupMax:
    """The largest of each of `k` groups of `F / k` neighbouring latents, then ReLU; of equal ones the first.

    Source: the activation "groupmax" of sparsify.

    Example:
        >>> GroupMax(k=2)(torch.tensor([1.0, 2.0, -1.0, -2.0])).tolist()
        [0.0, 2.0, 0.0, 0.0]
    """

    k: int
    name: str = "groupmax"

    def __post_init__(self) -> None:
        _check_k(self.k)

    def __call__(self, h: Float[Tensor, "*rows latent"]) -> Float[Tensor, "*rows latent"]:
        """Activations of pre-activations.

        Raises:
            SpecError: k does not divide the number of latents.
        """
        if h.shape[-1] % self.k:
            raise SpecError(f"{h.shape[-1]} latents cannot be divided into {self.k} groups of one size", "k")
        groups = torch.unflatten(h, -1, (self.k, -1))
        best = groups.argmax(-1, keepdim=True)
        kept = torch.relu(groups.gather(-1, best))
        return torch.zeros_like(groups).scatter(-1, best, kept).flatten(-2)

    def tensors(self) -> dict[str, Tensor]:
        """None."""
        return {}

    def settings(self) -> dict[str, int]:
        """`k`."""
        return {"k": self.k}


def _check_k(k: int) -> None:
    if isinstance(k, bool) or not isinstance(k, int) or k < 1:
        raise SpecError(f"k is {k!r}; it is how many latents a row keeps, an int of 1 or more", "k")
