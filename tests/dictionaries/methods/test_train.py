"""The `train-dictionary` study, on a tiny model and its own activations."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

import assay
from assay.activations.corpora import open_corpus
from assay.activations.harvesting import harvest
from assay.activations.store import Store
from assay.base.errors import DamagedFile, OutputError, SpecError
from assay.dictionaries import load
from assay.studies import Study
from assay.studies.recheck import recheck

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
    harvest(subject, corpus, sites=["blocks.1.resid_post", "blocks.1.mlp.in", "blocks.1.mlp.out", "blocks.1.attn.z"],
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
    assert not any("rough" in said or "target" in said for said in findings.warnings)
    with pytest.raises(SpecError, match="folder of a training run; its dictionary is"):
        load(folder / "first")


def test_a_missed_target_and_too_few_texts_are_said(folder):
    asked = {"family": "jumprelu", "penalty": "target", "target_l0": 2.0, "k": 32, "steps": 10, "texts": 1000}
    said = " ".join(study(folder, "missed", held_out=96, **asked).run().warnings)
    assert "the target is 2: it is a penalty and no promise" in said
    assert "whole texts are held out, and 1000 were asked for" in said and "it is rough" in said


def test_a_lost_dictionary_is_trained_again_and_another_is_refused(folder):
    first = study(folder, "lost").run()
    shutil.rmtree(folder / "lost")
    assert study(folder, "lost").run().findings[0].estimate == first.findings[0].estimate
    assert (folder / "lost" / "dictionary").is_dir()
    with pytest.raises(SpecError, match="holds a run with other settings"):
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


def test_arms_say_what_is_explained_without(folder):
    arms = ["decoder", "encoder", "random-tokens", "reinitialised"]
    first = study(folder, "arms", arms=arms, steps=60)
    found = first.run()
    table = next(view for view in found.views if view.id == "measured")
    values = {row[0]: row[1] for row in table.rows}
    assert values["fve, decoder frozen"] < values["fve"] and values["fve, encoder frozen"] < values["fve"]
    assert values["fve, trained on random tokens, of these rows"] < values["fve"]
    assert {"fve, random tokens", "fve, redrawn weights"} <= values.keys()
    assert any("redrawn weights" in line for line in found.summary)
    given = Store.open(folder / "store")
    for arm in arms[2:]:
        place = folder / "arms" / "arms" / arm
        store = Store.open(place / "activations")
        assert store.n == given.n and store.sites == ("blocks.1.resid_post",) and store.dtype == given.dtype
        assert load(place / "dictionary").card.model.endswith(arm)
    assert [step.step.name for step in first.plan().steps][3:] == [f"arm {arm}" for arm in arms]


def test_latents_of_heads_have_their_shares(folder, tmp_path):
    found = study(folder, "heads", reads=["blocks.1.attn.z"], steps=40).run(out=tmp_path / "report")
    table = next(view for view in found.views if view.id == "heads-0")
    heads = assay.load(str(folder / "model")).run(torch.tensor([[3, 4]]), capture="blocks.1.attn.z").captured
    assert len(table.rows) == heads["blocks.1.attn.z"].shape[-2] > 1
    assert sum(row[1] for row in table.rows) == pytest.approx(1) and sum(row[3] for row in table.rows) == 96
    saved = load_file(tmp_path / "report" / "artifacts" / "heads.safetensors")
    assert saved["decoder blocks.1.attn.z"].shape == (96, len(table.rows))


def test_a_result_is_checked_with_other_controls(folder, tmp_path):
    study(folder, "checked").run(out=tmp_path / "saved")
    pairs = recheck(tmp_path / "saved")
    assert all(pair.holds for pair in pairs)
    assert pairs[0].saved.estimate == pairs[0].again.estimate
    assert pairs[0].saved.controls[0].null != pairs[0].again.controls[0].null


@pytest.mark.parametrize(
    ("spec", "said"),
    [
        ({"reads": ["blocks.0.resid_post"]}, "no activations of 'blocks.0.resid_post'"),
        ({"reads": []}, "has several sites"),
        ({"held_out": 100_000}, "fewer than a batch"),
        ({"store": "nowhere"}, "nowhere"),
        ({"dictionary": ""}, "names no folder"),
        ({"training_seed": 0, "seed": 3}, "training_seed"),
        ({"arms": ["decoder", "decoder"]}, "named twice"),
        ({"held_out": 64, "texts": 4, "batch": 10_000}, "fewer than a batch"),
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


def harvested(folder: Path, place: Path, layout: str = "pack") -> None:
    subject = assay.load(str(folder / "model"))
    corpus = open_corpus(folder / "text.txt", split="line")
    harvest(subject, corpus, sites=["blocks.1.resid_post"], out=place, context=16, layout=layout, tokens=1500)


def test_a_store_that_was_harvested_anew_is_another_study(folder, tmp_path):
    harvested(folder, tmp_path / "store")
    asked = {"store": str(tmp_path / "store"), "steps": 20}
    study(folder, "anew", **asked).run()
    shutil.rmtree(tmp_path / "store")
    harvested(folder, tmp_path / "store", layout="split")
    with pytest.raises(SpecError, match="holds a run with other data"):
        study(folder, "anew", **asked).run()


def test_a_damaged_store_trains_nothing(folder, tmp_path):
    harvested(folder, tmp_path / "store")
    shard = next((tmp_path / "store").glob("shard-*"))
    bytes_ = bytearray(shard.read_bytes())
    bytes_[-5] ^= 0x41
    shard.write_bytes(bytes_)
    with pytest.raises(DamagedFile, match=shard.name):
        study(folder, "damaged", store=str(tmp_path / "store")).run()
    shard.unlink()
    with pytest.raises(DamagedFile, match=shard.name):
        study(folder, "damaged", store=str(tmp_path / "store")).run()
    assert not (folder / "damaged").exists()


def test_the_plan_counts_the_texts_that_there_are(folder):
    step = next(step for step in study(folder, "counted", texts=1000).plan().steps if step.step.name == "model").step
    assert step.forwards % 24 == 0 and 0 < step.forwards // 24 <= 512 // 16
    assert step.tokens == step.forwards * 16


def test_a_place_that_cannot_be_written_is_known_before_training(folder, tmp_path):
    (tmp_path / "file").write_text("mine")
    with pytest.raises(OutputError, match="is a file"):
        study(folder, "never", dictionary=str(tmp_path / "file" / "below"), steps=1_000_000_000).run()
    assert (tmp_path / "file").read_text() == "mine"


def test_the_plan_runs_nothing(folder):
    plan = study(folder, "planned").plan()
    assert [step.step.name for step in plan.steps] == ["train", "reconstruction", "model"]
    assert plan.seconds > 0 and not (folder / "planned").exists()
