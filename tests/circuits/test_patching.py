"""Exact patching against raw torch hooks, and the laws any patching must keep."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch

from assay.circuits import Task, components, patch_components, patch_grid
from assay.circuits.patching import component_sites, sides

POINTS = ("resid_pre", "attn.out", "mlp.out")
DIRECTIONS = ("denoising", "noising")


@pytest.mark.parametrize("direction", DIRECTIONS)
@pytest.mark.parametrize("point", POINTS)
@torch.no_grad()
def test_every_cell_equals_a_raw_hook(case: Any, point: str, direction: Any) -> None:
    base, donor = case.ids(direction)
    places = [(block, point) for block in range(3)]
    given = case.raw.read(donor, places)
    expected = torch.tensor(
        [
            [case.raw.difference(base, {place: case.swap(given[place], position=p)}).item() for p in range(7)]
            for place in places
        ]
    )
    found = patch_grid(case.subject, case.task, point, direction)
    assert torch.allclose(found.values, expected, atol=1e-4)
    assert found.base == pytest.approx(case.raw.difference(base).item(), abs=1e-5)
    assert found.donor == pytest.approx(case.raw.difference(donor).item(), abs=1e-5)
    assert float((expected - found.base).abs().max()) > 1e-2  # the patches do something


@pytest.mark.parametrize("direction", DIRECTIONS)
@torch.no_grad()
def test_every_component_equals_a_raw_hook(case: Any, direction: Any) -> None:
    base, donor = case.ids(direction)
    given = case.raw.read(donor, [(block, point) for block in range(3) for point in ("z", "mlp.out")])
    parts = components(case.subject)
    expected = []
    for part in parts:
        place = (part.block, "mlp.out" if part.kind == "mlp" else "z")
        heads = None if part.kind == "mlp" else [part.head]
        change = case.swap(given[place], heads=heads, n_heads=case.raw.n_heads)
        expected.append(case.raw.difference(base, {place: change}).item())
    found = patch_components(case.subject, case.task, parts, direction)
    assert torch.allclose(found.values, torch.tensor(expected), atol=1e-4)
    assert float(found.effects.abs().max()) > 1e-2


@pytest.mark.parametrize("family", ["gpt2", "gemma2", "gpt_neox"])
def test_patching_a_run_with_itself_changes_nothing(case: Any) -> None:
    same = Task(clean=case.task.clean, corrupt=case.task.clean, answer=torch.tensor([12]), foil=torch.tensor([99]))
    parts = components(case.subject)
    for direction in ("denoising", "noising"):
        found = patch_components(case.subject, same, parts, direction)
        assert torch.allclose(found.values, torch.full((len(parts),), found.base), atol=1e-5)
        grid = patch_grid(case.subject, same, "resid_pre", direction)
        assert torch.allclose(grid.values, torch.full((3, 7), grid.base), atol=1e-5)


def test_the_stream_entering_the_first_block_is_the_prompt(make_case: Callable[..., Any]) -> None:
    """One differing token: that cell is the whole donor; where the prompts agree nothing changes, as nothing can
    reach back in time from it."""
    case = make_case("gpt2")
    corrupt = list(case.clean[0].tolist())
    corrupt[3] = 111
    task = Task.from_tokens(case.clean[0].tolist(), corrupt, 12, 99)
    for direction in ("denoising", "noising"):
        grid = patch_grid(case.subject, task, "resid_pre", direction)
        assert float(grid.normalised[0, 3]) == pytest.approx(1, abs=1e-5)
        assert float(grid.normalised[0].sum()) == pytest.approx(1, abs=1e-5)
        assert torch.allclose(grid.effects[:, :3], torch.zeros(3, 3), atol=1e-5)  # rounding of logits near 10
        assert float(grid.effects[1:, 4:].abs().max()) > 1e-2


def test_the_whole_stream_at_any_block_is_the_donor(case: Any) -> None:
    """All positions at once, through the sweep that patching uses, at every block."""
    from assay import Patch

    base, donor = (case.task.run(case.subject, side) for side in ("corrupt", "clean"))
    names = [f"blocks.{block}.resid_pre" for block in range(3)]
    given = case.task.run(case.subject, "clean", capture=names)
    values = case.subject.sweep(base.batch, [Patch(name, given) for name in names], case.task.metric)
    assert torch.allclose(values, case.task.metric(donor.logits).expand(3), atol=1e-4)


@pytest.mark.parametrize("family", ["gpt2", "gemma2", "gpt_neox"])
def test_denoising_one_way_is_noising_the_other(case: Any) -> None:
    turned = Task(clean=case.task.corrupt, corrupt=case.task.clean, answer=torch.tensor([12]), foil=torch.tensor([99]))
    one = patch_grid(case.subject, case.task, "attn.out", "denoising")
    other = patch_grid(case.subject, turned, "attn.out", "noising")
    assert torch.allclose(one.values, other.values, atol=1e-5)
    assert (one.base, one.donor) == pytest.approx((other.base, other.donor), abs=1e-5)


def test_denoising_patches_the_corrupt_run() -> None:
    assert sides("denoising") == ("corrupt", "clean")
    assert sides("noising") == ("clean", "corrupt")


def test_the_normalised_effect_is_the_share_of_the_way_to_the_donor(make_case: Callable[..., Any]) -> None:
    case = make_case("llama")
    found = patch_components(case.subject, case.task, components(case.subject), "noising")
    clean, corrupt = (case.raw.difference(ids).item() for ids in (case.clean, case.corrupt))
    assert torch.allclose(found.effects, found.values - clean, atol=1e-5)
    assert torch.allclose(found.normalised, (found.values - clean) / (corrupt - clean), atol=1e-4)


def test_chosen_positions_are_columns_of_the_grid_and_a_given_donor_is_used(make_case: Callable[..., Any]) -> None:
    case = make_case("llama")
    whole = patch_grid(case.subject, case.task, "mlp.out", "denoising")
    some = patch_grid(case.subject, case.task, "mlp.out", "denoising", positions=[6, 2])
    assert torch.allclose(some.values, whole.values[:, [6, 2]], atol=1e-5)
    names = [f"blocks.{block}.mlp.out" for block in range(3)]
    donor = case.task.run(case.subject, "corrupt", capture=names)  # the base's own side: nothing may change
    none = patch_grid(case.subject, case.task, "mlp.out", "denoising", donor=donor)
    assert torch.allclose(none.values, torch.full((3, 7), none.base), atol=1e-5)


def test_progress_counts_every_cell(make_case: Callable[..., Any]) -> None:
    case, seen = make_case("llama"), []
    patch_grid(case.subject, case.task, "resid_pre", "noising", progress=lambda done, n: seen.append((done, n)))
    assert seen[-1] == (21, 21)
    assert [done for done, _ in seen] == sorted(done for done, _ in seen)


def test_the_sites_of_components_are_whole(make_case: Callable[..., Any]) -> None:
    parts = [part for part in components(make_case("llama").subject) if part.block == 1]
    assert component_sites(parts) == ["blocks.1.attn.z", "blocks.1.mlp.out"]
