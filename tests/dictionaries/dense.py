"""The losses of every family as a paper writes them: dense, over `[rows, latents]`, for autograd to differentiate.

What is a constant there is detached here. The straight-through estimators are written as `torch.autograd.Function`.
"""

from __future__ import annotations

import torch
from torch import Tensor

from assay.dictionaries.families.l1 import power_at
from assay.dictionaries.settings import Training

ROWS, D, LATENTS = 64, 12, 40
PLAIN = {"relative": False, "outliers": None}
"""The loss of the paper and nothing else."""
SETTINGS = {
    "topk": {"family": "topk", "k": 4},
    "batchtopk": {"family": "batchtopk", "k": 4},
    "matryoshka": {"family": "matryoshka", "k": 4, "groups": (0.1, 0.3, 0.6)},
    "jumprelu": {"family": "jumprelu", "threshold": 0.3, "bandwidth": 0.4, "sparsity": 0.7},
    "jumprelu-target": {
        "family": "jumprelu",
        "threshold": 0.3,
        "bandwidth": 0.4,
        "penalty": "target",
        "target_l0": 5.0,
    },
    "jumprelu-tanh": {"family": "jumprelu", "threshold": 0.3, "bandwidth": 0.4, "penalty": "tanh"},
    "l1": {"family": "l1", "sparsity": 0.3},
    "l1-april": {"family": "l1-april", "sparsity": 0.3},
    "p-anneal": {"family": "p-anneal", "sparsity": 0.3},
    "gated": {"family": "gated", "sparsity": 0.3},
}


class Step(torch.autograd.Function):
    """`1[h > theta]`, whose slope in theta is that of a window."""

    @staticmethod
    def forward(ctx, h, theta, bandwidth):
        ctx.save_for_backward(h, theta)
        ctx.bandwidth = bandwidth
        return (h > theta).to(h.dtype)

    @staticmethod
    def backward(ctx, out):
        h, theta = ctx.saved_tensors
        rect = ((h - theta).abs() < ctx.bandwidth / 2).to(h.dtype)
        return None, (-rect * out / ctx.bandwidth).sum(0), None


class Jump(torch.autograd.Function):
    """`h 1[h > theta]`, likewise."""

    @staticmethod
    def forward(ctx, h, theta, bandwidth):
        ctx.save_for_backward(h, theta)
        ctx.bandwidth = bandwidth
        return h * (h > theta)

    @staticmethod
    def backward(ctx, out):
        h, theta = ctx.saved_tensors
        rect = ((h - theta).abs() < ctx.bandwidth / 2).to(h.dtype)
        return out * (h > theta), (-theta * rect * out / ctx.bandwidth).sum(0), None


def loss(
    weights: dict[str, Tensor],
    x: Tensor,
    y: Tensor,
    settings: Training,
    step: int,
    centred: bool,
    widths=(),
    memory: dict[str, float] | None = None,
    held: Tensor | None = None,
):
    """`mean_b w_b |y_hat - y|^2` and the penalty, for weights by name as the state has them; `w` is `held`, or 1.

    `memory` keeps the power and the factor of p-annealing from step to step.
    """
    W_enc, b_enc, W_dec, b_dec = (weights[n] for n in ("W_enc", "b_enc", "W_dec", "b_dec"))
    rows, c = len(x), settings.sparsity_at(step)
    h = (x - b_dec if centred else x) @ W_enc.T + b_enc
    lengths = torch.stack([p.norm(dim=1) for p in W_dec.split(list(widths or (W_dec.shape[1],)), dim=1)]).sum(0)
    skip = x @ weights["W_skip"].T if "W_skip" in weights else 0

    def mean_square(error):
        return (error.square().sum(1) * (1 if held is None else held)).sum() / rows

    def sse(z, decoder=W_dec, bias=b_dec):
        return mean_square(z @ decoder + bias + skip - y)

    family = settings.family
    if family == "topk":
        top = h.topk(settings.k, dim=1)
        return sse(torch.zeros_like(h).scatter(1, top.indices, top.values.relu()))
    if family in ("batchtopk", "matryoshka"):
        flat = h.relu().flatten()
        top = flat.topk(settings.k * rows)
        z = torch.zeros_like(flat).scatter(0, top.indices, top.values).view_as(h)
        if family == "batchtopk":
            return sse(z)
        ends = torch.tensor(settings.sizes()).cumsum(0)
        return torch.stack([sse(z[:, :end], W_dec[:end]) for end in ends]).mean()
    if family == "jumprelu":
        theta = weights["threshold"]
        z = Jump.apply(h, theta, settings.bandwidth)
        l0 = Step.apply(h, theta, settings.bandwidth).sum() / rows
        penalty = {
            "l0": l0,
            "target": (l0 / settings.target_l0 - 1).square(),
            "tanh": torch.tanh(4 * z * lengths).sum() / rows,
        }
        return sse(z) + c * penalty[settings.penalty]
    if family == "gated":
        z = (weights["log_gain"].exp() * h + weights["offset"]).relu() * (h > 0)
        beside = skip.detach() if "W_skip" in weights else 0
        alone = mean_square(h.relu() @ W_dec.detach() + b_dec.detach() + beside - y)
        return sse(z) + c * h.relu().sum() / rows + alone
    z = h.relu()
    if family == "l1":
        return sse(z) + c * z.sum() / rows
    if family == "l1-april":
        return sse(z) + c * (z * lengths).sum() / rows
    memory = {} if memory is None else memory
    p, before, factor = power_at(settings, step), memory.get("power", 1.0), memory.get("factor", 1.0)
    active = z[z > 0] + 1e-5
    if p != before:  # the weight rises so that the penalty does not jump
        factor *= float((active.pow(before).sum() / active.pow(p).sum()).detach())
        memory |= {"power": p, "factor": factor}
    return sse(z) + c * factor * active.pow(p).sum() / rows
