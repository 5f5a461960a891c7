"""ReLU and a penalty: L1 with unit decoder rows, L1 weighted by their lengths, and |z|^p with p falling.

    l1          c mean_b sum_f z            decoder rows have length 1
    l1-april    c mean_b sum_f z |d_f|      decoder rows are free
    p-anneal    c_t mean_b sum_f z^p        decoder rows have length 1; p falls from 1 to `p_end` over the second half

Sources: Bricken et al. 2023, "Towards Monosemanticity"; Anthropic 2024, "Update on how we train SAEs" (April);
Karvonen et al. 2024 (arXiv 2408.00113), section 4 for p-annealing.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from assay.dictionaries.activations import Activation, ReLU
from assay.dictionaries.families.family import Asked, Moment, Part, Selected, per_latent
from assay.dictionaries.settings import Training

_UPDATES = 10
"""How many times the power changes."""
_FLOOR = 1e-5
"""Added to z before a power below 1 is taken, whose slope at 0 is infinite."""


class L1Family:
    """An L1 penalty, decoder rows of length 1."""

    unit_norm = True

    def begin(self, part: Part, settings: Training, x: Tensor) -> None:
        """Nothing of its own."""

    def select(self, part: Part, bias: Tensor, now: Moment) -> Selected:
        """Every latent above 0."""
        pairs = now.kernels.select_above(now.x, part.W_enc, bias, torch.zeros_like(bias))
        return Selected(pairs=pairs, h=pairs.values)

    def ask(self, part: Part, selected: Selected, dz: Tensor, now: Moment) -> Asked:
        """`R . d + c / B`."""
        cost = now.weight / now.rows
        return Asked(slopes=dz + cost, penalty=cost * float(selected.h.sum()))

    def settle(self, part: Part) -> None:
        """Nothing of its own."""

    def activation(self, part: Part, settings: Training, memory: Mapping[str, Tensor]) -> Activation:
        """ReLU."""
        return ReLU()


class AprilFamily(L1Family):
    """An L1 penalty in which each latent counts by the length of what it writes; at several sites, by their sum."""

    unit_norm = False

    def ask(self, part: Part, selected: Selected, dz: Tensor, now: Moment) -> Asked:
        """`R . d + c / B |d|`, and `|d|` is pulled down by the sum of z."""
        cost = now.weight / now.rows
        lengths = part.lengths()
        total = lengths.sum(1)
        weights = total[selected.pairs.latents.long()]
        pull = cost * per_latent(selected.pairs, selected.h)[:, None] / lengths.clamp_min(1e-30)
        return Asked(slopes=dz + cost * weights, pull=pull, penalty=cost * float((selected.h * weights).sum()))


class PAnnealFamily(L1Family):
    """`z^p` with a power that falls, and a weight that rises so that the penalty does not jump."""

    def ask(self, part: Part, selected: Selected, dz: Tensor, now: Moment) -> Asked:
        """`R . d + c_t / B p (z + floor)^(p - 1)`."""
        z = selected.h + _FLOOR
        power = now.memory.setdefault("power", torch.ones((), dtype=torch.float64))
        factor = now.memory.setdefault("factor", torch.ones((), dtype=torch.float64))
        wanted = torch.as_tensor(power_at(now.settings, now.step), dtype=torch.float64)
        if wanted != power:
            before, after = (now.mesh.number(float(z.pow(float(p)).sum())) for p in (power, wanted))
            if after > 0:
                now.memory["power"], now.memory["factor"] = wanted, factor * before / after
        p, cost = float(now.memory["power"]), now.weight * float(now.memory["factor"]) / now.rows
        return Asked(slopes=dz + cost * p * z.pow(p - 1), penalty=cost * float(z.pow(p).sum()))


def power_at(settings: Training, step: int) -> float:
    """The power at a step: 1 in the first half, then `p_end` is reached in ten equal changes.

    Example:
        >>> settings = Training(family="p-anneal", steps=100, p_end=0.5)
        >>> [round(power_at(settings, step), 2) for step in (0, 49, 50, 55, 99)]
        [1.0, 1.0, 0.95, 0.9, 0.5]
    """
    half = settings.steps // 2
    if step < half:
        return 1.0
    done = min(_UPDATES, 1 + (step - half) * _UPDATES // max(1, settings.steps - half))
    return 1.0 + (settings.p_end - 1.0) * done / _UPDATES
