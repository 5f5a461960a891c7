"""The `train-dictionary` study, on a tiny model and its own activations."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

import assay
from assay.activations.corpora import open_corpus
from assay.activations.harvesting import harvest
from assay.base.errors import SpecError
from assay.dictionaries import load
from assay.studies import Study

WORDS = "When Mary John went to the store gave a drink and milk capital of France is Paris".split()


@pytest.fixture(scope="module")
def folder(tiny_module, tiny_tokenizer, tmp_path_factory) -> Path:
    """A tiny model in a folder, and a store of its activations."""
    place = tmp_path_factory.mktemp("train")
    tiny_module("llama").save_pretrained(place / "model")
    tiny_tokenizer.save_pretrained(place / "model")
    subject = assay.load(str(place / "model"))
    stream = torch.Generator().manual_seed(0)
    lines = [" ".join(WORDS[int(i)] for i in torch.randint(len(WORDS), (24,), generator=stream)) for _ in range(160)]
    (place / "text.txt").write_text("\n".join(lines))
    corpus = open_corpus(place / "text.txt", split="line")
    harvest(subject, corpus, sites=["blocks.1.resid_post", "blocks.1.mlp.in", "blocks.1.mlp.out"],
            out=place / "store", context=16, dtype="float32")  # fmt: skip
    return place


def study(folder: Path, name: str, **spec) -> Study:
    given = {
        "store": str(folder / "store"),
        "dictionary": str(folder / name),
        "reads": ["blocks.1.resid_post"],
        "latents": 96,
        "k": 6,
        "steps": 150,
        "batch": 128,
        "held_out": 512,
        "texts": 8,
        "lr": 5e-3,
        "checkpoint_every": 50,
    }
    return Study(method="train-dictionary", model=str(folder / "model"), spec=given | spec)


def test_a_study_trains_measures_and_says(folder, tmp_path):
    findings = study(folder, "first").run(out=tmp_path / "report")
    explains, harmless = findings.findings
    assert explains.estimate > max(explains.controls[0].null) and explains.verdict == "supported"
    assert explains.interval.low <= explains.estimate <= explains.interval.high
    assert 0 < explains.detail["l0"] <= 6
    assert len(harmless.controls[0].null) == 19
    dictionary = load(folder / "first" / "dictionary")
    assert dictionary.n_latents == 96 and dictionary.site == "blocks.1.resid_post"
    assert dictionary.card.model == str(folder / "model")
    assert (tmp_path / "report" / "report.html").is_file()
    assert {view.id for view in findings.views} >= {"measured", "random", "curve-fvu", "density"}
    again = study(folder, "first").run()
    assert again.findings[0].estimate == explains.estimate


def test_a_lost_dictionary_is_trained_again_and_another_is_refused(folder):
    import shutil

    first = study(folder, "lost").run()
    shutil.rmtree(folder / "lost")
    assert study(folder, "lost").run().findings[0].estimate == first.findings[0].estimate
    assert (folder / "lost" / "dictionary").is_dir()
    with pytest.raises(SpecError, match="holds a run with settings"):
        study(folder, "lost", latents=64).run()


@pytest.mark.parametrize(
    "spec",
    [
        {"reads": ["blocks.1.mlp.in"], "writes": ["blocks.1.mlp.out"], "skip": True},
        {"reads": ["blocks.1.resid_post", "blocks.1.mlp.out"], "family": "batchtopk"},
        {"reads": ["blocks.1.mlp.in"], "writes": ["blocks.1.mlp.out"], "cross_layer": True},
    ],
    ids=["transcoder", "crosscoder", "cross-layer"],
)
def test_other_kinds(folder, spec, request):
    found = study(folder, request.node.callspec.id, **spec).run()
    assert found.findings[0].estimate > 0


def test_arms_leave_a_part_as_it_started(folder):
    found = study(folder, "arms", arms=True, steps=60).run()
    table = next(view for view in found.views if view.id == "measured")
    values = {row[0]: row[1] for row in table.rows}
    assert values["fve, decoder frozen"] < values["fve"] and values["fve, encoder frozen"] < values["fve"]


@pytest.mark.parametrize(
    ("spec", "said"),
    [
        ({"reads": ["blocks.0.resid_post"]}, "no activations of 'blocks.0.resid_post'"),
        ({"reads": []}, "has several sites"),
        ({"held_out": 100_000}, "fewer than a batch"),
        ({"store": "nowhere"}, "nowhere"),
    ],
)
def test_bad_requests_write_nothing(folder, spec, said):
    with pytest.raises(SpecError, match=said):
        study(folder, "bad", **spec).run()
    assert not (folder / "bad").exists()


def test_a_store_of_another_model_is_refused(folder, tiny_module, tiny_tokenizer):
    subject = assay.load(tiny_module("gpt2"), tokenizer=tiny_tokenizer)
    with pytest.raises(SpecError, match="harvested from"):
        study(folder, "other").run(subject=subject)


def test_the_plan_runs_nothing(folder):
    plan = study(folder, "planned").plan()
    assert [step.step.name for step in plan.steps] == ["train", "reconstruction", "model"]
    assert plan.seconds > 0 and not (folder / "planned").exists()
