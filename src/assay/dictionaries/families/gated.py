"""Gated: one map decides which latents are active, and a rescaled copy of it says how much.

    pi = W_enc x + b_enc       z = relu(exp(log_gain) pi + offset) 1[pi > 0]
    L  = |y - y_hat(z)|^2 + c sum_f relu(pi) + |y - y_hat'(relu(pi))|^2     (the last through a frozen decoder)

with decoder rows of length 1. (Were they free and their lengths in the penalty, they would shrink at no cost, since the
last term does not hold them, and the gate's penalty with them.) `offset` is the paper's `b_mag - exp(r_mag) b_gate`:
the same functions, starting from the same one.

Source: Rajamanoharan et al. 2024 (arXiv 2404.16014), equations 7 to 9.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from assay.dictionaries.activations import Activation, Gated
from assay.dictionaries.families.family import Asked, Moment, Part, Selected, per_latent
from assay.dictionaries.latents import SparseLatents
from assay.dictionaries.settings import Training


class GatedFamily:
    """A gate and a magnitude."""

    unit_norm = True

    def begin(self, part: Part, settings: Training, x: Tensor) -> None:
        """Magnitudes that equal the gate's pre-activation at first."""
        part.own["log_gain"] = torch.zeros_like(part.b_enc)
        part.own["offset"] = torch.zeros_like(part.b_enc)

    def select(self, part: Part, bias: Tensor, now: Moment) -> Selected:
        """Every latent whose gate is open."""
        gate = now.kernels.select_above(now.x, part.W_enc, bias, torch.zeros_like(bias))
        which = gate.latents.long()
        z = torch.relu(part.own["log_gain"].exp()[which] * gate.values + part.own["offset"][which])
        pairs = SparseLatents(offsets=gate.offsets, latents=gate.latents, values=z, n_latents=gate.n_latents)
        return Selected(pairs=pairs, h=gate.values)

    def ask(self, part: Part, selected: Selected, dz: Tensor, now: Moment) -> Asked:
        """The magnitude's slope, the gate's own reconstruction, and the penalty on the gate."""
        pairs, h = selected.pairs, selected.h
        which = pairs.latents.long()
        gain = part.own["log_gain"].exp()[which]
        dm = torch.where(pairs.values > 0, dz, 0)
        # the gate in the place of z, beside whatever else is written (a skip, other layers' latents)
        other = SparseLatents(
            offsets=pairs.offsets, latents=pairs.latents, values=h - pairs.values, n_latents=pairs.n_latents
        )
        alone = now.kernels.decode(other, part.W_dec, torch.zeros_like(part.W_dec[0])).add_(now.error)
        through_gate = now.kernels.slopes(pairs, alone.mul_(2 * now.shares[:, None]), part.W_dec)
        cost = now.weight / now.rows
        return Asked(
            slopes=gain * dm + through_gate + cost,
            own={"log_gain": per_latent(pairs, dm * gain * h), "offset": per_latent(pairs, dm)},
            penalty=cost * float(h.sum()),
        )

    def settle(self, part: Part) -> None:
        """Nothing to keep in bounds."""

    def activation(self, part: Part, settings: Training, memory: Mapping[str, Tensor]) -> Activation:
        """Gated, as in training."""
        return Gated(log_gain=part.own["log_gain"].clone(), offset=part.own["offset"].clone())
