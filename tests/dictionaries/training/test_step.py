"""A training step's closed-form gradients, against autograd on the dense loss of the paper."""

from __future__ import annotations

import pytest
import torch
from dense import LATENTS, PLAIN, ROWS, SETTINGS, D, loss

from assay.dictionaries.dictionary import Site
from assay.dictionaries.kernels.backend import backend
from assay.dictionaries.settings import Training
from assay.dictionaries.training.begin import begin
from assay.dictionaries.training.mesh import Mesh
from assay.dictionaries.training.step import apply, dense_gradients, forward_backward
from assay.dictionaries.training.weights import row_weights


def made(name: str, longer: float = 1.0, **more):
    """A state away from its start, with rows to learn from, two of them `longer` times as long as they would be."""
    settings = Training(
        latents=LATENTS, steps=10, batch=ROWS, sparsity_warmup=0.0, dead="none", **SETTINGS[name], **more
    )
    stream = torch.Generator().manual_seed(1)
    x = torch.randn(ROWS, D, generator=stream) * 3 + 1
    x[[5, 40]] *= longer
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
    settings, state, x = made(name, **PLAIN)
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


@pytest.mark.parametrize("path", ["plain", "compiled"])
@pytest.mark.parametrize("name", SETTINGS)
def test_what_is_minimised_is_the_logarithm_of_a_loss_that_holds_outliers_back(name, path):
    settings, state, x = made(name, longer=30.0, outliers=2.0)
    if name == "p-anneal":
        state.step = 0
    gradients, report, error = forward_backward(state, settings, backend("cpu", path), x, x)
    asks = x.norm(dim=1) * error.norm(dim=1)
    held = (2.0 * asks.sort().values[ROWS * 3 // 4 - 1] / asks).clamp_max(1.0)
    assert held[[5, 40]].max() < 0.02 and float((held == 1).float().mean()) > 0.7
    weights = {n.rpartition(".")[2]: w.clone().requires_grad_() for n, w in state.weights()}
    value = loss(weights, x, x, settings, state.step, state.centred, held=held)
    counted = float((held * error.square().sum(1)).mean()) + report.penalty
    if name not in ("matryoshka", "gated"):  # as above
        assert value.item() == pytest.approx(counted, rel=1e-5)
    (value * (D / counted)).backward()
    for weight_name, tensor in dense_gradients(state, settings, backend("cpu", path), gradients).items():
        wanted = weights[weight_name.rpartition(".")[2]].grad
        assert float((tensor - wanted).norm() / wanted.norm()) <= 1e-5, weight_name


def test_one_outlier_in_a_batch_does_not_stop_the_dictionary():
    def after(longer: float, **more):
        settings, state, x = made("topk", lr=3e-3, relative=False, **more)
        settings = settings.model_copy(update={"steps": 200})
        kernels, first = backend("cpu"), x.clone()
        first[5] *= longer
        for batch in (first, *[x] * 60):
            gradients, report, _ = forward_backward(state, settings, kernels, batch, batch)
            apply(state, settings, kernels, gradients)
        return report.fvu

    without, held, free = after(1.0), after(300.0), after(300.0, outliers=None)
    assert abs(held - without) * 10 < free - without


@pytest.mark.parametrize(("rows", "value"), [(0, 0.0), (1, 0.0), (32, 1e-20), (45, 0.0), (ROWS, 0.0)])
def test_empty_rows_do_not_make_outliers_of_the_others(rows, value):
    settings, _, x = made("topk")
    x, error = x.clone(), 0.3 * x
    x[:rows] = value
    assert bool((row_weights(settings, x, error, Mesh()) == 1).all())
    x[-1] *= 1e25 if rows < 45 else 1.0  # its square is more than float32 holds
    found = row_weights(settings, x, error, Mesh())
    assert bool((found[:-1] == 1).all()) and (rows >= 45 or 0 < float(found[-1]) < 1e-20)


@pytest.mark.parametrize("latents", [100, 4000])
def test_thresholds_on_the_way_to_a_target_start_where_four_times_as_many_are_active(latents):
    settings = Training(family="jumprelu", penalty="target", target_l0=5.0, latents=latents, steps=10, batch=256)
    x = torch.randn(256, D, generator=torch.Generator().manual_seed(0)) + 3
    site = (Site("blocks.0.resid_post", D),)
    state = begin(settings, x, x, site, site)
    _, report, _ = forward_backward(state, settings, backend("cpu"), x * state.scale_in, x * state.scale_in)
    above = -(-256 * 4 * 5 // latents)  # of each latent's rows
    assert report.l0 == pytest.approx(above * latents / 256, rel=0.01)
    fixed = begin(settings.model_copy(update={"threshold": 0.3}), x, x, site, site)
    assert fixed.parts[0].own["threshold"].unique().tolist() == [pytest.approx(0.3)]


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
