"""What a family of dictionaries is to the trainer: how it selects latents, and what its loss asks of each of them.

A training step is closed-form. With the selected pairs `(b, f)` of a batch of `B` rows, their activations `z`, the
reconstruction `y_hat` and `R = (2 / B)(y_hat - y)`, the trainer computes `R_b . W_dec[f]` for each pair; a family turns
that into the slope `dLoss / dh` of each pair, adds its own penalty's part, and says what its own weights get:

    dW_dec[f] = sum_b z_bf R_b + pull_f W_dec[f]      dW_enc[f] = sum_b slope_bf (x_b - a b_dec)      db_enc = sum slope

No tensor has `B x F` numbers.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Protocol

import torch
from jaxtyping import Float
from torch import Tensor

from assay.dictionaries.activations import Activation
from assay.dictionaries.latents import SparseLatents
from assay.dictionaries.settings import Training


@dataclass(slots=True, kw_only=True)
class Part:
    """The weights of one encoder and its decoder while they are trained.

    Attributes:
        W_enc: `[latent, d_in]`.
        b_enc: `[latent]`.
        W_dec: `[latent, d_out]`.
        own: A family's further weights, each `[latent]`.
        reads: Its columns of the input.
        writes: Its columns of the output.
        widths: Widths of the sites it writes, which penalties on decoder lengths keep apart.
    """

    W_enc: Float[Tensor, "latent d_in"]
    b_enc: Float[Tensor, " latent"]
    W_dec: Float[Tensor, "latent d_out"]
    own: dict[str, Tensor] = field(default_factory=dict)
    reads: slice = field(default_factory=lambda: slice(None))
    writes: slice = field(default_factory=lambda: slice(None))
    widths: tuple[int, ...] = ()

    @property
    def n_latents(self) -> int:
        """How many latents it has."""
        return len(self.W_enc)

    def lengths(self) -> Float[Tensor, "latent site"]:
        """The length of each latent's decoder row at each site it writes."""
        if len(self.widths) <= 1:
            return torch.as_tensor(torch.linalg.vector_norm(self.W_dec, dim=1, keepdim=True))
        sites = torch.split(self.W_dec, list(self.widths), dim=1)
        return torch.stack([torch.linalg.vector_norm(part, dim=1) for part in sites], dim=1)


@dataclass(frozen=True, slots=True, kw_only=True)
class Moment:
    """What a family may need to know of a step besides the pairs.

    Attributes:
        settings: How the dictionary is trained.
        step: Counted from 0.
        rows: `B`, rows in the whole batch, over all processes.
        mesh: Where this process is among those that train together.
        weight: The sparsity penalty's weight now.
        kernels: The kernels in use.
        x: The rows read, `[rows, d_in]`.
        error: `y_hat - y`, `[rows, d_out]`.
        shares: What a row's squared error counts in the loss, `[rows]`: `1 / B`, and less for an outlier.
        target: `y - b_dec`, `[rows, d_out]`.
        memory: A family's numbers that last from step to step (a running threshold, a power), float64 scalars.
    """

    settings: Training
    step: int
    rows: int
    weight: float
    mesh: Any
    kernels: Any
    x: Tensor
    error: Tensor
    shares: Tensor
    target: Tensor
    memory: dict[str, Tensor]


@dataclass(frozen=True, slots=True, kw_only=True)
class Selected:
    """Pairs of a batch: those that are active, and those near enough to matter.

    Attributes:
        pairs: With the activations `z` as values; some may be 0.
        h: Their pre-activations.
    """

    pairs: SparseLatents
    h: Float[Tensor, " pairs"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Asked:
    """What a family's loss asks of the selected pairs and of its own weights.

    Attributes:
        slopes: `dLoss / dh` of each pair.
        pull: `dW_dec[f]` gets `pull[f, s]` times the part of `W_dec[f]` at site `s`; None for nothing.
        own: Gradients of the family's own weights.
        penalty: The penalty's value, for the curves.
    """

    slopes: Float[Tensor, " pairs"]
    pull: Float[Tensor, "latent site"] | None = None
    own: Mapping[str, Tensor] = field(default_factory=dict)
    penalty: float = 0.0


class Family(Protocol):
    """A family of dictionaries."""

    unit_norm: bool
    """Whether decoder rows are kept at length 1."""

    def begin(self, part: Part, settings: Training, x: Tensor) -> None:
        """Add the family's own weights to a fresh part, which will read rows like these."""

    def select(self, part: Part, bias: Tensor, now: Moment) -> Selected:
        """The pairs of a batch, for the encoder's bias with the centring folded in."""

    def ask(self, part: Part, selected: Selected, dz: Tensor, now: Moment) -> Asked:
        """What the loss asks, given `dz`, `R_b . W_dec[f]` of each pair."""

    def settle(self, part: Part) -> None:
        """Put the family's own weights back where they must be, after each step."""

    def activation(self, part: Part, settings: Training, memory: Mapping[str, Tensor]) -> Activation:
        """The nonlinearity of the finished dictionary."""


def per_latent(pairs: SparseLatents, values: Float[Tensor, " pairs"]) -> Float[Tensor, " latent"]:
    """Sum values over the pairs of each latent, in the order of the rows."""
    out = torch.zeros(pairs.n_latents, dtype=values.dtype, device=values.device)
    return out.index_add_(0, pairs.latents.long(), values)
