"""JumpReLU: a threshold for each latent, trained through a window around it.

    z = h 1[h > theta]        rect = 1[|h - theta| < bandwidth / 2]
    dL/dh     = 1[h > theta] dL/dz                                  (nothing passes through the window to the input)
    dL/dtheta = -(theta / bandwidth) sum_b rect dL/dz - (1 / bandwidth) sum_b rect dL/dL0

with one of three penalties of the mean number of active latents `L0`:

    l0      c L0
    tanh    c mean_b sum_f tanh(4 z |d_f|)
    target  c (L0 / target - 1)^2

Sources: Rajamanoharan et al. 2024 (arXiv 2407.14435), section 3 and appendix; Anthropic, January 2025 update, for tanh.
"""

from __future__ import annotations

import math
from collections.abc import Mapping

import torch
from torch import Tensor

from assay.dictionaries.activations import Activation, JumpReLU
from assay.dictionaries.families.family import Asked, Moment, Part, Selected, per_latent
from assay.dictionaries.latents import SparseLatents
from assay.dictionaries.settings import Training

_THRESHOLD = 0.01
_TOO_MANY = 4.0
"""How many times its target the number of active latents is at first."""
_AT_ONCE = 2048
_SLOPE = 4.0
"""How fast the tanh penalty saturates."""


class JumpReLUFamily:
    """A trained threshold for each latent."""

    unit_norm = False

    def begin(self, part: Part, settings: Training, x: Tensor) -> None:
        """Thresholds: one number for all, or, on the way to a target, where each latent is active a little too often.

        Then `ceil(4 n target / latents)` of the `n` rows are above a latent's threshold, which lies halfway to the next
        (and one row at least is below): a run that starts with half the latents active spends its steps on closing
        them.
        """
        if settings.threshold is not None or settings.penalty != "target":
            start = _THRESHOLD if settings.threshold is None else settings.threshold
            part.own["threshold"] = torch.full_like(part.b_enc, start)
            return
        above = min(len(x) - 1, math.ceil(len(x) * _TOO_MANY * settings.target_l0 / settings.latents))
        blocks = torch.split(torch.arange(part.n_latents), _AT_ONCE)
        h = (torch.addmm(part.b_enc[block], x, part.W_enc[block].T) for block in blocks)
        found = [block.topk(above + 1, dim=0).values[-2:].mean(0) for block in h]
        part.own["threshold"] = torch.cat(found).clamp_min_(0)

    def select(self, part: Part, bias: Tensor, now: Moment) -> Selected:
        """Every latent above its threshold's window; those below the threshold itself have z = 0."""
        theta = part.own["threshold"]
        near = now.kernels.select_above(now.x, part.W_enc, bias, theta - now.settings.bandwidth / 2)
        h = near.values
        z = torch.where(h > theta[near.latents.long()], h, 0)
        pairs = SparseLatents(offsets=near.offsets, latents=near.latents, values=z, n_latents=near.n_latents)
        return Selected(pairs=pairs, h=h)

    def ask(self, part: Part, selected: Selected, dz: Tensor, now: Moment) -> Asked:
        """The slopes of the active, and the thresholds' gradient from the window."""
        settings, h, pairs = now.settings, selected.h, selected.pairs
        theta = part.own["threshold"][pairs.latents.long()]
        active = h > theta
        rect = ((h - theta).abs() < settings.bandwidth / 2).to(h.dtype)
        l0 = now.mesh.number(float(active.sum())) / now.rows
        step, pull, penalty = 0.0, None, now.weight * l0 / now.mesh.size
        if settings.penalty == "l0":
            step = now.weight / now.rows
        elif settings.penalty == "target":
            step = now.weight * 2 * (l0 / settings.target_l0 - 1) / settings.target_l0 / now.rows
            penalty = now.weight * (l0 / settings.target_l0 - 1) ** 2 / now.mesh.size
        else:
            cost, lengths = now.weight / now.rows, part.lengths()
            length = lengths.sum(1)[pairs.latents.long()]
            squashed = torch.tanh(_SLOPE * pairs.values * length)
            slope = cost * _SLOPE * (1 - squashed.square())
            dz = dz + slope * length
            pull = per_latent(pairs, slope * pairs.values)[:, None] / lengths.clamp_min(1e-30)
            penalty = cost * float(squashed.sum())
        d_theta = -(rect * (theta * dz + step)) / settings.bandwidth
        own = {"threshold": per_latent(pairs, d_theta)}
        return Asked(slopes=torch.where(active, dz, 0), pull=pull, own=own, penalty=penalty)

    def settle(self, part: Part) -> None:
        """Thresholds are not negative."""
        part.own["threshold"].clamp_min_(0)

    def activation(self, part: Part, settings: Training, memory: Mapping[str, Tensor]) -> Activation:
        """A JumpReLU with the trained thresholds."""
        return JumpReLU(threshold=part.own["threshold"].clone())
