"""A training step's closed-form gradients, against autograd on the dense loss of the paper."""

from __future__ import annotations

import pytest
import torch
from dense import LATENTS, ROWS, SETTINGS, D, loss

from assay.dictionaries.dictionary import Site
from assay.dictionaries.kernels.backend import backend
from assay.dictionaries.settings import Training
from assay.dictionaries.training.begin import begin
from assay.dictionaries.training.step import apply, dense_gradients, forward_backward


def made(name: str, **more):
    """A state away from its start, with rows to learn from."""
    settings = Training(
        latents=LATENTS, steps=10, batch=ROWS, sparsity_warmup=0.0, dead="none", **SETTINGS[name], **more
    )
    stream = torch.Generator().manual_seed(1)
    x = torch.randn(ROWS, D, generator=stream) * 3 + 1
    site = (Site("blocks.0.resid_post", D),)
    state = begin(settings, x, x, site, site)
    for weight_name, weight in state.weights():
        if "threshold" not in weight_name:
            weight += 0.1 * torch.randn(weight.shape, generator=stream)
    x = x * state.scale_in
    return settings, state, x


@pytest.mark.parametrize("path", ["plain", "compiled"])
@pytest.mark.parametrize("name", SETTINGS)
def test_gradients_are_autograds_of_the_dense_loss(name, path):
    settings, state, x = made(name)
    if name == "p-anneal":
        state.step = 0
    kernels = backend("cpu", path)
    weights = {n.rpartition(".")[2]: w.clone().requires_grad_() for n, w in state.weights()}
    value = loss(weights, x, x, settings, state.step, state.centred)
    value.backward()
    gradients, report, _ = forward_backward(state, settings, kernels, x, x)
    if name not in ("matryoshka", "gated"):  # whose loss has more reconstructions than the one that is reported
        assert value.item() == pytest.approx(report.penalty + report.squared_error, rel=1e-5)
    found = dense_gradients(state, settings, kernels, gradients)
    for weight_name, tensor in found.items():
        wanted = weights[weight_name.rpartition(".")[2]].grad
        assert wanted.norm() > 0, weight_name
        assert float((tensor - wanted).norm() / wanted.norm()) <= 1e-5, weight_name
    assert {n.rpartition(".")[2] for n in found} == set(weights)


@pytest.mark.parametrize("name", SETTINGS)
def test_fused_step_is_the_unfused_one(name):
    settings, state, x = made(name)
    _, other, _ = made(name)
    kernels = backend("cpu")
    unfused = settings.model_copy(update={"clip": 1e30})
    for _ in range(3):
        apply(state, settings, kernels, forward_backward(state, settings, kernels, x, x)[0])
        apply(other, unfused, kernels, forward_backward(other, unfused, kernels, x, x)[0])
    for (label, one), (_, two) in zip(state.weights(), other.weights(), strict=True):
        torch.testing.assert_close(one, two, rtol=1e-4, atol=1e-6, msg=label)
