"""Attribution patching against automatic differentiation, finite differences, and the exact effect it approximates."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from assay.circuits import Task, attribute, components, patch_components, patch_grid

DIRECTIONS = ("denoising", "noising")


def by_hand(case: Any, base: Tensor, donor: Tensor, places: list[Any]) -> dict[Any, Tensor]:
    """`(donor - base) * d metric / d activation` at each place, by autograd on the raw module."""
    with torch.no_grad():
        there = case.raw.read(donor, places)
    case.raw.module.requires_grad_(True)
    here: dict[Any, Tensor] = {}

    def keep(place: Any) -> Callable[[Tensor], Tensor]:
        def change(x: Tensor) -> Tensor:
            here[place] = x
            return x

        return change

    value = case.raw.difference(base, {place: keep(place) for place in places}).sum()
    found = torch.autograd.grad(value, [here[place] for place in places])
    return {
        place: ((there[place] - here[place]) * gradient).detach() for place, gradient in zip(places, found, strict=True)
    }


def of_parts(case: Any, products: dict[Any, Tensor]) -> Tensor:
    """The products summed over each component."""
    values = []
    for part in components(case.subject):
        if part.kind == "mlp":
            values.append(products[part.block, "mlp.out"].sum())
        else:
            width = products[part.block, "z"].shape[-1] // case.raw.n_heads
            values.append(products[part.block, "z"][..., part.head * width : (part.head + 1) * width].sum())
    return torch.stack(values)


@pytest.mark.parametrize("direction", DIRECTIONS)
def test_it_equals_automatic_differentiation_on_the_raw_module(case: Any, direction: Any) -> None:
    base, donor = case.ids(direction)
    places = [(block, point) for block in range(3) for point in ("resid_pre", "z", "mlp.out")]
    products = by_hand(case, base, donor, places)
    found = attribute(case.subject, case.task, components(case.subject), direction)
    assert torch.allclose(found.components, of_parts(case, products), atol=1e-4, rtol=1e-4)
    residual = torch.stack([products[block, "resid_pre"][0].sum(-1) for block in range(3)])
    assert torch.allclose(found.residual, residual, atol=1e-4, rtol=1e-4)
    assert float(found.components.abs().max()) > 1e-2


@pytest.mark.parametrize("family", ["gpt2", "gpt_neox"])  # RMS norms compute in float32
@pytest.mark.parametrize("direction", DIRECTIONS)
@torch.no_grad()
def test_it_is_the_slope_of_the_patched_metric_at_the_base(
    make_case: Callable[..., Any], family: str, direction: Any
) -> None:
    """Central differences in float64 along `base + a (donor - base)`, one component at a time."""
    case = make_case(family, torch.float64)
    base, donor = case.ids(direction)
    there = case.raw.read(donor, [(block, point) for block in range(3) for point in ("z", "mlp.out")])
    here = case.raw.read(base, list(there))
    slopes = []
    for part in components(case.subject):
        place = (part.block, "mlp.out" if part.kind == "mlp" else "z")
        heads = None if part.kind == "mlp" else [part.head]

        def at(a: float, place: Any = place, heads: Any = heads) -> Tensor:
            between = torch.lerp(here[place], there[place], a)
            return case.raw.difference(base, {place: case.swap(between, heads=heads, n_heads=4)})

        slopes.append((at(1e-4) - at(-1e-4)).item() / 2e-4)
    found = attribute(case.subject, case.task, components(case.subject), direction)
    assert torch.allclose(found.components.double(), torch.tensor(slopes).double(), atol=1e-5, rtol=1e-4)


def test_it_is_exact_in_the_limit_of_a_small_change(make_case: Callable[..., Any]) -> None:
    """The miss is of second order: with a tenth of the change, a tenth of the relative miss."""
    case = make_case("gpt2", torch.float64)
    parts = components(case.subject)
    misses = []
    for sigmas in (0.1, 0.01):
        task = Task.from_noise(case.subject, case.clean[0].tolist(), [1, 2, 4], 12, 99, sigmas=sigmas)
        patched = patch_components(case.subject, task, parts, "noising")
        grid = patch_grid(case.subject, task, "resid_pre", "noising")
        fast = attribute(case.subject, task, parts, "noising")
        for exact, estimate in ((patched.effects, fast.components), (grid.effects, fast.residual)):
            misses.append(float((exact - estimate).abs().max() / exact.abs().max()))
    for first, second in zip(misses[:2], misses[2:], strict=True):
        assert 1e-3 < first < 0.5
        assert second < first / 4


def test_nothing_differs_and_nothing_is_attributed(make_case: Callable[..., Any]) -> None:
    case = make_case("gpt2")
    same = Task(clean=case.task.clean, corrupt=case.task.clean, answer=torch.tensor([12]), foil=torch.tensor([99]))
    found = attribute(case.subject, same, components(case.subject), "denoising")
    assert not found.components.any()
    assert not found.residual.any()


@pytest.mark.parametrize("direction", DIRECTIONS)
def test_over_draws_of_noise_it_is_their_mean(make_case: Callable[..., Any], direction: Any) -> None:
    case = make_case("gemma3_text")
    parts = components(case.subject)
    prompt = case.clean[0].tolist()
    together = Task.from_noise(case.subject, prompt, [1, 2, 4], 12, 99, draws=3)
    whole = attribute(case.subject, together, parts, direction)
    single = []
    for draw in together.noise:
        one = Task.from_noise(case.subject, prompt, [1, 2, 4], 12, 99, draws=1)
        alone = Task(
            clean=one.clean, corrupt=one.corrupt, answer=torch.tensor([12]), foil=torch.tensor([99]),
            noise=(type(draw)("embed", draw.value, positions=(1, 2, 4), rows=0),),
        )  # fmt: skip
        single.append(attribute(case.subject, alone, parts, direction))
    assert torch.allclose(whole.components, torch.stack([s.components for s in single]).mean(0), atol=1e-5)
    assert torch.allclose(whole.residual, torch.stack([s.residual for s in single]).mean(0), atol=1e-5)


def test_it_leaves_no_gradients_on_the_users_module(make_case: Callable[..., Any]) -> None:
    case = make_case("qwen3")
    attribute(case.subject, case.task, components(case.subject), "noising")
    assert all(parameter.grad is None for parameter in case.subject.module.parameters())
