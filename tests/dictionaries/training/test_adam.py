"""A whole run, against `torch.optim.Adam` and autograd on the dense loss of the paper from the same first weights.

The trainer's own schedules (rate, weight of the penalty, power) are given to the peer as numbers; everything else (the
forward pass, gradients, moments, unit decoder rows, thresholds at 0) is torch's.
"""

from __future__ import annotations

import pytest
import torch
from dense import PLAIN, loss

from assay.dictionaries.settings import Training
from assay.dictionaries.training.source import Rows
from assay.dictionaries.training.trainer import Trainer

READ, WRITE = "blocks.0.mlp.in", "blocks.0.mlp.out"
STEPS, BATCH = 50, 96
UNIT = ("topk", "batchtopk", "matryoshka", "l1", "p-anneal", "gated")
ASKED = {
    "topk": {"family": "topk", "k": 4},
    "topk, transcoder": {"family": "topk", "k": 4, "skip": True},
    "topk, betas and clip": {"family": "topk", "k": 4, "betas": (0.5, 0.95), "eps": 1e-6, "clip": 3.0},
    "batchtopk": {"family": "batchtopk", "k": 4},
    "matryoshka": {"family": "matryoshka", "k": 4, "groups": (0.1, 0.3, 0.6)},
    "jumprelu": {"family": "jumprelu", "threshold": 0.3, "bandwidth": 0.4, "sparsity": 0.7},
    "jumprelu, target": {
        "family": "jumprelu",
        "threshold": 0.3,
        "bandwidth": 0.4,
        "penalty": "target",
        "target_l0": 5.0,
    },
    "jumprelu, tanh": {"family": "jumprelu", "threshold": 0.3, "bandwidth": 0.4, "penalty": "tanh"},
    "l1": {"family": "l1", "sparsity": 0.5},
    "l1-april": {"family": "l1-april", "sparsity": 0.5},
    "l1-april, transcoder": {"family": "l1-april", "sparsity": 0.5},
    "p-anneal": {"family": "p-anneal", "sparsity": 0.5, "p_end": 0.5},
    "gated": {"family": "gated", "sparsity": 0.5},
    "gated, skip": {"family": "gated", "sparsity": 0.5, "skip": True},
}


def rows() -> Rows:
    stream = torch.Generator().manual_seed(5)
    x = torch.randn(BATCH * 4, 12, generator=stream) @ torch.randn(12, 12, generator=stream) + 2
    y = torch.relu(x @ torch.randn(12, 9, generator=stream)) + 1
    return Rows({READ: x, WRITE: y}, batch=BATCH)


def peer(trainer: Trainer, batches: list[tuple[torch.Tensor, torch.Tensor]]) -> dict[str, torch.Tensor]:
    """The weights that torch.optim.Adam ends with."""
    asked, state = trainer.settings, trainer.state
    weights = {name.rpartition(".")[2]: w.clone().requires_grad_() for name, w in state.weights()}
    adam = torch.optim.Adam(weights.values(), lr=1.0, betas=asked.betas, eps=asked.eps)
    decoder, memory = weights["W_dec"], {}
    for step, (x, y) in enumerate(batches):
        adam.param_groups[0]["lr"] = asked.rate_at(step)
        adam.zero_grad()
        loss(weights, x, y, asked, step, state.centred, memory=memory).backward()
        if asked.clip is not None:
            torch.nn.utils.clip_grad_norm_(weights.values(), asked.clip)
        with torch.no_grad():
            if asked.family in UNIT:
                decoder.grad -= (decoder.grad * decoder).sum(1, keepdim=True) * decoder
            adam.step()
            if asked.family in UNIT:
                decoder /= decoder.norm(dim=1, keepdim=True)
            if asked.family == "jumprelu":
                weights["threshold"].clamp_(min=0)
    return weights


@pytest.mark.parametrize("name", ASKED)
def test_fifty_steps_are_those_of_autograd_and_adam(name):
    data = rows()
    asked = Training(
        latents=40, steps=STEPS, batch=BATCH, lr=3e-3, warmup=0.1, decay=0.3, sparsity_warmup=0.3, dead="none",
        **PLAIN, **ASKED[name],
    )  # fmt: skip
    other = name.endswith(("transcoder", "skip"))
    trainer = Trainer(asked, data.batch(0), [READ], [WRITE] if other else None)
    state = trainer.state
    batches = []
    for step in range(STEPS):
        batch = data.batch(step)
        x = batch[READ] * state.scale_in
        batches.append((x, batch[WRITE] * state.scale_out if other else x))
    begun = {n: w.clone() for n, w in state.weights()}
    wanted = peer(trainer, batches)
    for step in range(STEPS):
        trainer.step(data.batch(step))
    assert trainer.done
    for weight_name, found in state.weights():
        torch_s = wanted[weight_name.rpartition(".")[2]].detach()
        moved = (torch_s - begun[weight_name]).norm()
        assert moved > 0, weight_name
        assert float((found - torch_s).norm() / moved) < 1e-3, weight_name
