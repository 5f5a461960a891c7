"""Sets of components: the ends of sufficiency and necessity, and any set against raw hooks."""

from __future__ import annotations

import random
from collections.abc import Callable
from typing import Any

import pytest
import torch

from assay.circuits import Component, Task, ablate_sets, components, patch_components


@torch.no_grad()
def without(case: Any, gone: list[Component]) -> float:
    """The metric on the clean prompt with components at their values on the corrupt prompt, by raw hooks."""
    places = sorted({(part.block, "mlp.out" if part.kind == "mlp" else "z") for part in gone})
    there = case.raw.read(case.corrupt, places)
    changes = {}
    for place in places:
        heads = None if place[1] == "mlp.out" else [p.head for p in gone if p.kind == "head" and p.block == place[0]]
        changes[place] = case.swap(there[place], heads=heads, n_heads=case.raw.n_heads)
    return float(case.raw.difference(case.clean, changes))


def test_everything_keeps_all_and_nothing_keeps_none(case: Any) -> None:
    parts = components(case.subject)
    found = ablate_sets(case.subject, case.task, parts, [parts, []])
    assert found.kept.tolist() == pytest.approx([1, 0], abs=1e-3)
    assert found.lost.tolist() == pytest.approx([1, 0], abs=1e-3)
    assert found.clean == pytest.approx(without(case, []), abs=1e-5)
    assert found.none == pytest.approx(without(case, parts), abs=1e-5)
    assert abs(found.clean - found.none) > 1e-3


def test_any_set_equals_raw_hooks(case: Any) -> None:
    parts = components(case.subject)
    draw = random.Random(3)
    sets = [draw.sample(parts, k) for k in (1, 4, 9)] + [[p for p in parts if p.block == 1]]
    found = ablate_sets(case.subject, case.task, parts, sets)
    expected_only = [without(case, [p for p in parts if p not in s]) for s in sets]
    expected_without = [without(case, s) for s in sets]
    assert found.only.tolist() == pytest.approx(expected_only, abs=1e-4)
    assert found.without.tolist() == pytest.approx(expected_without, abs=1e-4)
    gap = found.clean - found.none
    assert found.kept.tolist() == pytest.approx([(v - found.none) / gap for v in found.only.tolist()], abs=1e-5)
    assert found.lost.tolist() == pytest.approx([(found.clean - v) / gap for v in found.without.tolist()], abs=1e-5)


def test_a_set_kept_is_its_complement_ablated(make_case: Callable[..., Any]) -> None:
    case = make_case("gpt_neox")
    parts = components(case.subject)
    some = parts[2:7]
    found = ablate_sets(case.subject, case.task, parts, [some, [p for p in parts if p not in some]])
    assert found.only.tolist() == pytest.approx(found.without.tolist()[::-1], abs=1e-5)


def test_ablating_one_component_is_noising_it(make_case: Callable[..., Any]) -> None:
    case = make_case("llama")
    parts = components(case.subject)
    found = ablate_sets(case.subject, case.task, parts, [[part] for part in parts])
    exact = patch_components(case.subject, case.task, parts, "noising")
    assert torch.allclose(found.without, exact.values, atol=1e-4)


def test_only_the_given_universe_is_ablated(make_case: Callable[..., Any]) -> None:
    case = make_case("llama")
    heads = [part for part in components(case.subject) if part.kind == "head"]
    found = ablate_sets(case.subject, case.task, heads, [heads[:3]])
    assert found.none == pytest.approx(without(case, heads), abs=1e-4)
    assert float(found.only[0]) == pytest.approx(without(case, heads[3:]), abs=1e-4)


def test_under_noise_the_ends_hold_and_draws_are_averaged(make_case: Callable[..., Any]) -> None:
    case = make_case("gpt2")
    parts = components(case.subject)
    prompt = case.clean[0].tolist()
    task = Task.from_noise(case.subject, prompt, [1, 2, 4], 12, 99, draws=3)
    found = ablate_sets(case.subject, task, parts, [parts, [], parts[:4]])
    assert found.kept[:2].tolist() == pytest.approx([1, 0], abs=1e-3)
    each = []
    for draw in task.noise:
        noise = (type(draw)("embed", draw.value, positions=(1, 2, 4)),)
        alone = Task(
            clean=case.task.clean,
            corrupt=case.task.clean,
            answer=torch.tensor([12]),
            foil=torch.tensor([99]),
            noise=noise,
        )
        each.append(ablate_sets(case.subject, alone, parts, [parts[:4]]).without)
    assert float(found.without[2]) == pytest.approx(float(torch.stack(each).mean()), abs=1e-4)


def test_progress_ends_at_every_run(make_case: Callable[..., Any]) -> None:
    case, seen = make_case("llama"), []
    parts = components(case.subject)
    ablate_sets(case.subject, case.task, parts, [parts[:2]], progress=lambda done, n: seen.append((done, n)))
    assert seen[-1] == (3, 3)
