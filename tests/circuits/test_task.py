"""A task: what it insists on, its metric, and the noise of causal tracing."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch

from assay.base.errors import SpecError
from assay.circuits import Task, ablate_sets, attribute, components, patch_components, patch_grid

PROMPT = (5, 17, 40, 9, 77, 30, 21)
NOISED = (1, 2, 4)


def noise(case: Any, **options: Any) -> Task:
    return Task.from_noise(case.subject, PROMPT, NOISED, 12, 99, **options)


def added(case: Any, task: Task) -> torch.Tensor:
    """What the noise adds to the token embeddings, `[draws, pos, d_model]`, read off the first block by a raw hook."""
    seen: list[torch.Tensor] = []
    handle = case.raw.blocks[0].register_forward_pre_hook(lambda module, args: seen.append(args[0].detach()))
    try:
        task.run(case.subject, "corrupt")
        task.run(case.subject, "clean")
    finally:
        handle.remove()
    return seen[0] - seen[1]


def test_prompts_of_different_length_are_refused() -> None:
    with pytest.raises(SpecError, match=r"clean is \(1, 3\) and corrupt \(1, 2\)") as caught:
        Task.from_tokens([1, 2, 3], [1, 2], 5, 6)
    assert caught.value.field == "corrupt"


@pytest.mark.parametrize(("answer", "foil"), [([5], [6]), ([5, 6, 7], [1, 2, 3])])
def test_a_row_without_an_answer_of_its_own_is_refused(answer: Any, foil: Any) -> None:
    with pytest.raises(SpecError, match="2 rows need as many answers and foils, not") as caught:
        Task.from_tokens([[1, 2], [3, 4]], [[1, 5], [3, 6]], answer, foil)
    assert caught.value.field == "answer"


def test_a_side_is_clean_or_corrupt(make_case: Callable[..., Any]) -> None:
    case = make_case("gpt2")
    with pytest.raises(SpecError, match="side='corupt': 'clean' or 'corrupt'"):
        case.task.run(case.subject, "corupt")


@pytest.mark.parametrize("family", ["gpt2", "gemma2"])
def test_each_row_has_its_own_answer_and_foil_and_effects_are_means_over_rows(case: Any) -> None:
    clean, corrupt = torch.cat([case.clean, case.clean.flip(1)]), torch.cat([case.corrupt, case.corrupt.flip(1)])
    task = Task.from_tokens(clean, corrupt, [12, 40], torch.tensor([99, 7]))
    single = [Task.from_tokens(clean[i], corrupt[i], a, f) for i, (a, f) in enumerate([(12, 99), (40, 7)])]
    logits = case.subject.run(clean).logits[:, -1]
    found = task.metric(case.subject.run(clean).logits)
    assert found.tolist() == pytest.approx([float(logits[0, 12] - logits[0, 99]), float(logits[1, 40] - logits[1, 7])])
    parts = components(case.subject)
    both = patch_components(case.subject, task, parts, "noising")
    each = [patch_components(case.subject, one, parts, "noising") for one in single]
    assert torch.allclose(both.values, (each[0].values + each[1].values) / 2, atol=1e-4)
    assert both.base == pytest.approx((each[0].base + each[1].base) / 2, abs=1e-4)
    fast = attribute(case.subject, task, parts, "noising")
    alone = [attribute(case.subject, one, parts, "noising").components for one in single]
    assert torch.allclose(fast.components, (alone[0] + alone[1]) / 2, atol=1e-4)
    sets = ablate_sets(case.subject, task, parts, [parts[:5]])
    apart = [ablate_sets(case.subject, one, parts, [parts[:5]]).only for one in single]
    assert float(sets.only[0]) == pytest.approx(float(apart[0] + apart[1]) / 2, abs=1e-4)


def test_one_answer_serves_every_row() -> None:
    task = Task.from_tokens([[1, 2], [3, 4]], [[1, 5], [3, 6]], 12, 99)
    assert task.answer.tolist() == [12, 12]
    assert task.foil.tolist() == [99, 99]


def test_the_metric_is_the_logit_difference_at_the_last_position(case: Any) -> None:
    for side, ids in (("clean", case.clean), ("corrupt", case.corrupt)):
        found = case.task.metric(case.task.run(case.subject, side).logits)
        assert torch.equal(found, case.raw.difference(ids))


def test_the_same_seed_gives_the_same_noise_and_another_seed_another(make_case: Callable[..., Any]) -> None:
    case = make_case("llama")
    one, same, other = (added(case, noise(case, seed=seed)) for seed in (3, 3, 4))
    assert torch.equal(one, same)
    assert float((one - other).abs().max()) > 0.1


def test_a_draw_is_the_same_however_many_there_are(make_case: Callable[..., Any]) -> None:
    case = make_case("llama")
    assert torch.allclose(added(case, noise(case, draws=2)), added(case, noise(case, draws=5))[:2], atol=1e-6)


def test_only_the_noised_positions_differ(case: Any) -> None:
    difference = added(case, noise(case)).abs().amax(-1)
    rest = [p for p in range(len(PROMPT)) if p not in NOISED]
    assert difference.shape == (3, 7)
    assert not difference[:, rest].any()
    assert float(difference[:, list(NOISED)].min()) > 0.1


def test_draws_are_independent(make_case: Callable[..., Any]) -> None:
    values = added(make_case("gpt2"), noise(make_case("gpt2"), draws=40))[:, list(NOISED)].flatten(1)
    correlation = torch.corrcoef(values) - torch.eye(40)
    assert float(correlation.abs().max()) < 0.5  # 96 numbers each: the sd of a correlation is 0.1


@pytest.mark.parametrize("family", ["gpt2", "gemma2", "gpt_neox"])
def test_the_noise_has_as_many_standard_deviations_of_the_embeddings_as_asked(case: Any) -> None:
    """Of what the embedding layer writes: in Gemma that is the matrix times `sqrt(d_model)`."""
    weight = case.subject.module.get_input_embeddings().weight
    multiplier = 32**0.5 if case.family.startswith("gemma") else 1.0
    sd = float(weight.detach().std()) * multiplier
    for sigmas in (0.5, 3.0):
        values = added(case, noise(case, sigmas=sigmas, draws=60))[:, list(NOISED)]  # 5,760 numbers
        assert float(values.std()) == pytest.approx(sigmas * sd, rel=0.05)
        assert abs(float(values.mean())) < 0.1 * sigmas * sd


@pytest.mark.parametrize("family", ["gpt2", "gemma2", "gpt_neox"])
def test_effects_under_noise_are_averages_over_the_draws(case: Any) -> None:
    """Each draw by raw hooks: noise on the embeddings' output, then one component at a time from the clean run."""
    task = noise(case, draws=2)
    parts = components(case.subject)[:7]
    found = patch_components(case.subject, task, parts, "denoising")
    grid = patch_grid(case.subject, task, "resid_pre", "denoising")
    clean = torch.tensor([PROMPT])
    shift = added(case, task)
    with torch.no_grad():
        there = case.raw.read(clean, [(b, point) for b in range(3) for point in ("z", "mlp.out", "resid_pre")])

        def value(change: dict[Any, Any]) -> float:
            total = 0.0
            for draw in shift:

                def noised(x: torch.Tensor, draw: torch.Tensor = draw) -> torch.Tensor:
                    return x + draw

                total += float(case.raw.difference(clean, {(0, "resid_pre"): noised, **change}))
            return total / 2

        for part, measured in zip(parts, found.values.tolist(), strict=True):
            place = (part.block, "mlp.out" if part.kind == "mlp" else "z")
            heads = None if part.kind == "mlp" else [part.head]
            assert measured == pytest.approx(
                value({place: case.swap(there[place], heads=heads, n_heads=4)}), abs=2e-4
            ), part.name
        restored = value({(1, "resid_pre"): case.swap(there[1, "resid_pre"], position=4)})
        assert float(grid.values[1, 4]) == pytest.approx(restored, abs=2e-4)
        assert found.base == pytest.approx(value({}), abs=2e-4)
        assert found.donor == pytest.approx(float(case.raw.difference(clean)), abs=1e-4)
