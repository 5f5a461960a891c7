"""The whole job on a tiny model: what comes out, what it is held against, and what is left behind."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import assay
from assay import Findings, Study, circuits, directions
from assay.base.artifacts import read_parquet, read_safetensors
from assay.studies.run import execute
from assay.subjects.model import weights_hash

CLEAN = "When Mary and John went to the store, John gave a drink to"
CORRUPT = "When Mary and John went to the store, Mary gave a drink to"
SECTIONS = [
    "Question",
    "Baseline",
    "Lens and direct attribution",
    "Exact patching",
    "Fast attribution",
    "Sufficiency and necessity",
    "Controls",
]
VERDICTS = {"supported", "not distinguishable from control", "contradicted", "not testable"}


@pytest.fixture(scope="module")
def task(job: Any, ids: Callable[[str], torch.Tensor]) -> circuits.Task:
    answer, foil = int(ids(" Mary")), int(ids(" John"))
    return circuits.Task.from_tokens(ids(CLEAN)[0].tolist(), ids(CORRUPT)[0].tolist(), answer, foil)


@pytest.fixture(scope="module")
def gap(job: Any, task: circuits.Task) -> tuple[float, float]:
    """The logit difference, clean and corrupt, from the module itself."""
    with torch.no_grad():
        found = [task.metric(job.subject.module(batch.ids).logits) for batch in (task.clean, task.corrupt)]
    return float(found[0]), float(found[1])


def test_every_claim_has_a_verdict_and_controls_that_were_run(job: Any) -> None:
    assert len(job.findings) == 10
    for finding in job.findings:
        assert finding.verdict in VERDICTS
        assert finding.controls
        assert all(len(control.null) >= 2 for control in finding.controls)
        assert np.isfinite(finding.estimate)
        assert finding.interval is not None or finding.interval_note
        assert finding.cost.forwards > 0
        assert finding.provenance.weights_hash == job.subject.fingerprint
    assert len({finding.claim for finding in job.findings}) == 10


def test_the_preference_is_the_models_own(job: Any, gap: tuple[float, float]) -> None:
    detail = job.finding("baseline").detail
    assert (detail["clean"], detail["corrupt"]) == pytest.approx(gap, abs=1e-5)
    assert detail["logits"] == pytest.approx(gap[0] - gap[1], abs=1e-5)
    assert f"{gap[0] - gap[1]:.2f} logits" in job.finding("baseline").claim
    assert gap[0] - gap[1] > 0.1
    assert not any("does not lower" in warning for warning in job.findings.warnings)


def test_the_baselines_are_next_token_distributions(job: Any, task: circuits.Task, tiny_tokenizer: Any) -> None:
    for side, batch in (("clean", task.clean), ("corrupt", task.corrupt)):
        with torch.no_grad():
            best = job.subject.module(batch.ids).logits[0, -1].softmax(-1).topk(10)
        view = job.view(f"next-token-{side}")
        assert list(view.values) == pytest.approx(best.values.tolist(), abs=1e-6)
        assert list(view.labels) == [tiny_tokenizer.decode([token]) for token in best.indices.tolist()]


def test_the_top_components_are_those_that_hurt_the_most(job: Any, task: circuits.Task) -> None:
    parts = circuits.components(job.subject)
    effects = circuits.patch_components(job.subject, task, parts, "noising").effects.tolist()
    ranked = [part for _, part in sorted(zip(effects, parts, strict=True))]
    detail = job.finding("sets", "sufficiency").detail
    assert detail["components"] == [part.name for part in ranked[:4]]
    for kind in ("head", "mlp"):
        best = next(part for part in ranked if part.kind == kind)
        found = job.finding("patching", kind)
        assert found.detail["component"] == best.name
        assert found.detail["logits"] == pytest.approx(-effects[parts.index(best)], abs=1e-4)


def test_the_strongest_are_measured_in_what_random_pairs_of_tokens_change(job: Any, task: circuits.Task) -> None:
    clean, corrupt = (task.run(job.subject, side).logits[0, -1] for side in ("clean", "corrupt"))
    spread = float((clean - corrupt).std()) * 2**0.5
    for kind in ("head", "mlp"):
        found = job.finding("patching", kind)
        assert found.estimate == pytest.approx(found.detail["logits"] / spread, abs=1e-4)
        assert found.estimate > 0


def test_the_largest_direct_contribution_is_named(job: Any, task: circuits.Task) -> None:
    parts = directions.decompose(job.subject, task.clean, int(task.answer), int(task.foil))
    best = int(parts.parts.argmax())
    detail = job.finding("direct attribution").detail
    assert detail["part"] == parts.names[best]
    assert detail["logits"] == pytest.approx(float(parts.parts[best]), abs=1e-5)
    assert job.finding("direct attribution").claim.startswith(f"{parts.names[best]} writes the most for")


def test_the_preference_is_followed_from_the_token_that_differs_to_the_last(job: Any, task: circuits.Task) -> None:
    grid = circuits.patch_grid(job.subject, task, "resid_pre", "denoising").normalised
    detail = job.finding("patching", "residual").detail
    assert (detail["position"], detail["token"]) == (9, " John")  # the prompts differ there and nowhere else
    assert detail["stays_until"] == int((grid[:, 9] >= 0.5).sum()) >= 1
    late = [block for block in range(4) if all(float(v) >= 0.5 for v in grid[block:, -1])]
    assert detail["block"] == late[0]
    assert job.finding("patching", "residual").estimate == pytest.approx(late[0] / 3)


def test_sufficiency_and_necessity_are_those_of_the_top_components(job: Any, task: circuits.Task) -> None:
    parts = circuits.components(job.subject)
    names = job.finding("sets", "sufficiency").detail["components"]
    found = circuits.ablate_sets(job.subject, task, parts, [[p for p in parts if p.name in names]])
    assert job.finding("sets", "sufficiency").estimate == pytest.approx(float(found.kept[0]), abs=1e-3)
    assert job.finding("sets", "necessity").estimate == pytest.approx(float(found.lost[0]), abs=1e-3)
    curve = {series.name: series.values for series in job.view("sets-curve").series}
    assert curve["kept"][-1] == pytest.approx(1, abs=1e-3)
    assert curve["lost"][-1] == pytest.approx(1, abs=1e-3)
    assert list(job.view("sets-curve").x) == [1, 2, 3, 5, 8, 13, 15]


def test_the_sets_are_held_against_as_many_random_ones_as_asked(job: Any) -> None:
    for which in ("sufficiency", "necessity"):
        (control,) = job.finding("sets", which).controls
        assert control.name == "random sets"
        assert len(control.null) == 30
        assert len(set(control.null)) > 10
        view = job.view({"sufficiency": "sets-kept", "necessity": "sets-lost"}[which])
        assert list(view.null["random sets"]) == list(control.null)
    assert job.finding("sets", "sufficiency").verdict != "not testable"
    null = [job.finding("sets", which).controls[0].null for which in ("sufficiency", "necessity")]
    assert null[0] != null[1]


def test_untrained_weights_of_both_kinds_are_the_control(job: Any) -> None:
    (control,) = job.finding("direct attribution").controls
    assert len(control.null) == 2
    assert control.null[0] != control.null[1]
    assert job.finding("direct attribution").verdict == "not testable"  # two draws cannot say
    assert set(job.view("untrained-gap").null) == {"gaussian", "spectrum"}


def test_an_untrained_draw_goes_through_the_same_pipeline(job: Any, task: circuits.Task) -> None:
    """What is said of the Gaussian draw is what the public functions measure on that module."""
    module = assay.controls.reinitialised_module(job.subject.module, "gaussian", seed=0)
    untrained = assay.load(module, job.subject.tokenizer)
    clean, corrupt = (task.run(untrained, side).logits[0, -1] for side in ("clean", "corrupt"))
    change = clean - corrupt
    spread = float(change.std()) * 2**0.5
    found = next(c for c in job.finding("baseline").controls if c.name == "untrained weights").null[0]
    assert found == pytest.approx(float(change[task.answer[0]] - change[task.foil[0]]) / spread, abs=1e-4)
    effects = circuits.patch_components(untrained, task, circuits.components(untrained), "noising").effects
    (largest,) = job.view("untrained-component").null["gaussian"]
    assert largest == pytest.approx(-float(effects.min()) / spread, abs=1e-4)


def test_the_random_pairs_of_tokens_are_pairs_of_this_models_change(job: Any, task: circuits.Task) -> None:
    clean, corrupt = (task.run(job.subject, side).logits[0, -1] for side in ("clean", "corrupt"))
    change = clean - corrupt
    (control,) = (c for c in job.finding("baseline").controls if c.name == "random token pairs")
    every = (change[:, None] - change[None]).flatten() / (float(change.std()) * 2**0.5)
    assert len(control.null) == 999
    assert float((torch.tensor(control.null)[:, None] - every[None]).abs().amin(1).max()) < 1e-4
    assert np.std(control.null) == pytest.approx(1, abs=0.1)  # the unit of the estimate


def test_fast_attribution_is_correlated_with_exact_effects(job: Any) -> None:
    table = read_parquet(job.out / "artifacts" / "components.parquet")
    for direction in ("noising", "denoising"):
        fast, exact = (np.asarray(table[f"{name}_{direction}"]) for name in ("attribution", "exact"))
        found = job.finding("attribution", direction)
        assert found.estimate == pytest.approx(np.corrcoef(fast, exact)[0, 1], abs=1e-6)
        assert found.interval.low <= found.estimate <= found.interval.high
        worst = found.detail["worst"][0]
        miss = np.abs(fast - exact)
        assert worst["component"] == table["component"][int(miss.argmax())]
        assert worst["fast"] - worst["exact"] == pytest.approx((fast - exact)[miss.argmax()])
        rows = job.view(f"attribution-worst-{direction}").rows
        assert [abs(row[3]) for row in rows] == sorted((abs(row[3]) for row in rows), reverse=True)


def test_direct_attribution_sums_to_the_logit_difference(job: Any, gap: tuple[float, float]) -> None:
    assert sum(job.view("direct-sums").values) == pytest.approx(gap[0], rel=1e-3)
    heads = np.asarray(job.view("direct-heads").values)
    assert heads.shape == (3, 4)
    sums = dict(zip(job.view("direct-sums").labels, job.view("direct-sums").values, strict=True))
    assert heads.sum() == pytest.approx(sums["heads"], abs=1e-5)


def test_artifacts_hold_the_measurements(job: Any, task: circuits.Task) -> None:
    arrays = read_safetensors(job.out / "artifacts" / "patching.safetensors")
    grid = circuits.patch_grid(job.subject, task, "attn.out", "denoising")
    assert np.allclose(arrays["attn.out_denoising"], grid.values.numpy(), atol=1e-5)
    assert np.allclose(np.asarray(job.view("patch-attn-out-denoising").values), grid.normalised.numpy(), atol=1e-3)
    lens = read_safetensors(job.out / "artifacts" / "lens.safetensors")
    expected = directions.logit_lens(job.subject, task.clean, int(task.answer[0]), int(task.foil[0])).difference
    assert np.allclose(lens["clean_difference"], expected.numpy(), atol=1e-5)
    table = read_parquet(job.out / "artifacts" / "components.parquet")
    assert list(table["component"]) == [part.name for part in circuits.components(job.subject)]
    assert [name for name, top in zip(table["component"], table["top"], strict=True) if top] == sorted(
        job.finding("sets", "sufficiency").detail["components"], key=list(table["component"]).index
    )
    parts = directions.decompose(job.subject, task.clean, int(task.answer), int(task.foil))
    direct = dict(zip(parts.names, parts.parts.tolist(), strict=True))
    assert list(table["direct_attribution"]) == pytest.approx([direct[name] for name in table["component"]], abs=1e-5)


def test_every_chart_has_a_table_and_its_own_name(job: Any) -> None:
    views = job.findings.views
    assert list(dict.fromkeys(view.section for view in views))[: len(SECTIONS)] == SECTIONS
    assert len({view.id for view in views}) == len(views) > 25
    for view in views:
        columns, rows = view.table()
        assert columns
        assert rows
        assert all(len(row) == len(columns) for row in rows)
        assert view.title
        if view.id != "prompt":
            assert None not in [cell for row in rows for cell in row], view.id  # nothing that was not finite


def test_the_result_survives_json(job: Any) -> None:
    text = json.dumps(job.findings.to_dict(), allow_nan=False)
    assert Findings.from_dict(json.loads(text)) == job.findings


def test_the_output_is_whole_and_holds_no_nan(job: Any) -> None:
    def refuse(name: str) -> None:
        raise AssertionError(f"{name} in JSON")

    names = {str(path.relative_to(job.out)) for path in job.out.rglob("*") if path.is_file()}
    assert names == {
        "report.html",
        "findings.jsonl",
        "study.json",
        "artifacts/patching.safetensors",
        "artifacts/lens.safetensors",
        "artifacts/components.parquet",
    }
    lines = (job.out / "findings.jsonl").read_text().splitlines()
    assert len([json.loads(line, parse_constant=refuse) for line in lines]) == 10
    json.loads((job.out / "study.json").read_text(), parse_constant=refuse)
    report = (job.out / "report.html").read_text()
    visible = re.sub(r"<(script|style|pre)\b.*?</\1>", "", report, flags=re.DOTALL)
    assert not re.search(r"\b(nan|NaN|inf|Infinity|None)\b", visible)
    for view in job.findings.views[1:]:
        assert view.id in report


def test_the_planned_steps_are_the_executed_ones(job: Any) -> None:
    planned = [(planned.step.name, planned.key) for planned in job.before.steps]
    assert planned == [(step.name, step.key) for step in job.outcome.steps]
    assert job.before.cached == 0
    assert len({key for _, key in planned}) == len(planned) == 17
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("ASSAY_HOME", str(job.home))
        after = job.study.plan(subject=job.subject)
    assert all(planned.cached for planned in after.steps)
    assert after.finished


def test_running_again_computes_nothing(job: Any) -> None:
    outcome, calls = job.again()
    assert outcome.cached
    assert calls == []
    assert outcome.findings == job.findings


def test_from_finished_steps_the_result_is_made_without_the_model(job: Any) -> None:
    shutil.rmtree(job.home / "studies")
    outcome, calls = job.again()
    assert not outcome.cached
    assert calls == []
    assert outcome.findings == job.findings


def test_only_what_a_change_touches_is_computed(job: Any) -> None:
    """More random sets: the other steps answer from the cache, and the sets that were there before stay."""
    study = Study(method="explain", spec=job.study.spec.model_dump() | {"random_sets": 31})
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("ASSAY_HOME", str(job.home))
        new = {planned.step.name for planned in study.plan(subject=job.subject).remaining}
    assert new == {"random sets 1/2", "random sets 2/2"}


def test_the_users_module_is_as_it_was(job: Any) -> None:
    assert weights_hash(job.subject.module) == job.weights
    for part in job.subject.module.modules():
        assert not part._forward_hooks
        assert not part._forward_pre_hooks
    assert not job.subject.module.training
    assert all(parameter.grad is None for parameter in job.subject.module.parameters())


def test_the_seed_decides_every_draw(noised: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Computed anew in another home: the same numbers, to the last digit."""
    monkeypatch.setenv("ASSAY_HOME", str(tmp_path))
    again = execute(noised.study, subject=noised.subject).findings
    assert [finding.estimate for finding in again] == [finding.estimate for finding in noised.findings]
    assert [finding.controls for finding in again] == [finding.controls for finding in noised.findings]
    assert again.views == noised.findings.views
    assert again.summary == noised.findings.summary


def test_without_a_corrupt_prompt_the_noised_words_are_named(noised: Any) -> None:
    (warning,) = (text for text in noised.findings.warnings if "corrupt prompt" in text)
    assert "the embeddings of ' John', ' went' were noised (3 sigma, 2 draws)" in warning
    assert noised.view("prompt").contrast is None
    assert len(noised.findings) == 10
    assert all(np.isfinite(finding.estimate) for finding in noised.findings)
    assert any("under noise" in line for line in noised.findings.summary)


def test_without_answer_and_foil_the_likeliest_two_are_used_and_named(
    noised: Any, ids: Callable[[str], torch.Tensor], tiny_tokenizer: Any
) -> None:
    with torch.no_grad():
        best = noised.subject.module(ids("When John went to")).logits[0, -1].topk(2).indices.tolist()
    answer, foil = (tiny_tokenizer.decode([token]) for token in best)
    assert f"No answer was given: the likeliest token, {answer!r}, was used." in noised.findings.warnings
    assert f"No foil was given: the runner-up, {foil!r}, was used." in noised.findings.warnings
    assert (noised.view("prompt").answer, noised.view("prompt").foil) == (answer, foil)


def test_the_bare_prompt_is_planned_and_kept_like_any_other(noised: Any) -> None:
    assert [planned.key for planned in noised.before.steps] == [step.key for step in noised.outcome.steps]
    outcome, calls = noised.again()
    assert outcome.cached
    assert calls == []


def test_noise_belongs_to_the_address_of_what_it_makes(noised: Any) -> None:
    """Another seed, other noise: nothing is answered from the cache."""
    other = Study(method="explain", spec=noised.study.spec, seed=1)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("ASSAY_HOME", str(noised.home))
        assert other.plan(subject=noised.subject).cached == 0


def test_variations_have_an_interval_and_a_null_of_their_own(varied: Any, ids: Callable[[str], torch.Tensor]) -> None:
    findings = [finding for finding in varied.findings if "variations" in finding.tags]
    assert len(findings) == 3
    assert len(varied.findings) == 13
    for finding in findings:
        assert finding.n == 16
        assert finding.interval is not None
        assert finding.interval.low <= finding.estimate <= finding.interval.high
        assert finding.controls[0].name == "swapped answers"
        assert finding.verdict != "not testable"
    lines = [json.loads(line) for line in varied.study.spec.vary.read_text().splitlines()]

    @torch.no_grad()
    def difference(line: dict[str, str], side: str) -> float:
        logits = varied.subject.module(ids(line[side])).logits[0, -1]
        return float(logits[int(ids(line["answer"]))] - logits[int(ids(line["foil"]))])

    gaps = [difference(line, "clean") - difference(line, "corrupt") for line in lines]
    assert list(varied.view("variations-gap").values) == pytest.approx(gaps, abs=1e-4)
    assert findings[0].estimate == pytest.approx(np.mean(gaps), abs=1e-4)
    assert not any("variation" in text for text in varied.findings.warnings)


def test_the_main_prompts_components_are_what_the_variations_test(varied: Any, ids: Any) -> None:
    names = varied.finding("sets", "sufficiency").detail["components"]
    parts = circuits.components(varied.subject)
    top = [part for part in parts if part.name in names]
    line = json.loads(varied.study.spec.vary.read_text().splitlines()[3])
    task = circuits.Task.from_tokens(
        ids(line["clean"])[0].tolist(),
        ids(line["corrupt"])[0].tolist(),
        int(ids(line["answer"])),
        int(ids(line["foil"])),
    )
    found = circuits.ablate_sets(varied.subject, task, parts, [top])
    assert varied.view("variations-kept").values[3] == pytest.approx(float(found.kept[0]), rel=1e-2, abs=1e-3)
    assert varied.view("variations-lost").values[3] == pytest.approx(float(found.lost[0]), rel=1e-2, abs=1e-3)


def test_a_changed_line_is_another_study_and_the_rest_is_kept(varied: Any, tmp_path: Path) -> None:
    path = tmp_path / "other.jsonl"
    path.write_text("\n".join(varied.study.spec.vary.read_text().splitlines()[:2]))
    outcome, _ = varied.again(vary=path)
    assert not outcome.cached
    assert any("Only 2 variations were given" in text for text in outcome.findings.warnings)
    assert [f.n for f in outcome.findings if "variations" in f.tags] == [2, 2, 2]
