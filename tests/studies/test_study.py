"""A study: one hash, one result, from the cache or computed."""

from __future__ import annotations

import contextlib
import copy
import json
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from tally import TallySpec

from assay.activations.subject import load
from assay.base.artifacts import read_parquet, read_safetensors
from assay.base.errors import Cancelled, OutputError, SpecError, UnknownModel
from assay.studies import Event, Study, output
from assay.studies.run import execute
from assay.studies.store import cache_sizes, clear_cache

pytestmark = pytest.mark.usefixtures("home", "method")
PROMPT = "When Mary and John went to the store"
Log = Callable[[], list[str]]


@pytest.fixture
def study(model_folder: Path) -> Study:
    return Study(method="tally", model=str(model_folder), spec={"prompt": PROMPT})


def test_a_mapping_and_the_methods_own_class_make_the_same_study(study: Study) -> None:
    typed = Study(method="tally", model=study.model, spec=TallySpec(prompt=PROMPT))
    assert typed == study
    assert typed.key("f") == study.key("f")
    assert isinstance(study.spec, TallySpec)


def test_a_study_survives_json(study: Study) -> None:
    again = Study.model_validate_json(study.model_dump_json())
    assert again == study
    assert again.key("f") == study.key("f")


def test_the_key_tells_everything_that_matters_apart(study: Study) -> None:
    others = [
        study.model_copy(update={"seed": 1}),
        Study(method="tally", model=study.model, spec={"prompt": PROMPT + " today"}),
        Study(method="tally", model=study.model, spec={"prompt": PROMPT, "draws": 20}),
    ]
    keys = {study.key("f"), study.key("g"), *(other.key("f") for other in others)}
    assert len(keys) == 5


def test_the_models_spelling_is_no_part_of_the_key(study: Study) -> None:
    elsewhere = study.model_copy(update={"model": "./another/way/to/write/it"})
    assert elsewhere.key("f") == study.key("f")


def test_a_file_counts_by_its_contents(study: Study, tmp_path: Path) -> None:
    one, same, other = (tmp_path / name for name in ("one.json", "same.json", "other.json"))
    one.write_text("[1, 2]")
    same.write_text("[1, 2]")
    other.write_text("[1, 3]")
    keys = [
        Study(method="tally", model=study.model, spec={"prompt": PROMPT, "weights": path}).key("f")
        for path in (one, same, other)
    ]
    assert keys[0] == keys[1] != keys[2]


def test_a_missing_file_is_named_with_its_field(study: Study, tmp_path: Path) -> None:
    wrong = Study(method="tally", model=study.model, spec={"prompt": PROMPT, "weights": tmp_path / "absent.json"})
    with pytest.raises(SpecError, match=r"weights: cannot read '.*absent\.json'") as caught:
        wrong.run()
    assert caught.value.field == "weights"


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"method": "taly"}, "no method 'taly'; did you mean 'tally'"),
        ({"spec": {"prompt": "a", "drows": 3}}, r"tally: drows: there is no such field; did you mean 'draws'\?"),
        ({"spec": {}}, "tally: prompt: is required"),
        ({"spec": {"prompt": "a", "measure": "norms"}}, r"measure: 'norms' is not one of .*did you mean 'norm'\?"),
        ({"spec": {"prompt": "a", "draws": "many"}}, "draws: .*integer.*'many' was given"),
        ({"spec": {"prompt": "a", "draws": 0}}, "draws: .*greater than or equal to 1, but 0 was given"),
        ({"spec": {"prompt": " "}}, "prompt: the prompt is empty"),
        ({"spec": {"prompt": 3, "draws": 0}}, "tally: 2 problems\n  prompt: .*\n  draws: "),
        ({"seed": -1}, "study: seed: .*-1 was given"),
        ({"sed": 1}, "study: sed: there is no such field; did you mean 'seed'"),
        ({"spec": "prompt"}, "spec: a mapping or a TallySpec is needed, but str was given"),
    ],
)
def test_bad_input_is_a_spec_error_that_names_the_field(given: dict[str, object], message: str) -> None:
    with pytest.raises(SpecError, match=message):
        Study(**{"method": "tally", "model": "m", "spec": {"prompt": "a"}, **given})


def test_no_model_and_no_subject_is_an_error() -> None:
    with pytest.raises(SpecError, match="model: is required"):
        Study(method="tally", spec={"prompt": PROMPT}).run()


def test_running_again_answers_from_the_cache(study: Study, log: Log) -> None:
    first = execute(study)
    assert (first.cached, log()) == (False, ["measure", "draws"])
    second = execute(study)
    assert (second.cached, log()) == (True, ["measure", "draws"])
    assert second.findings.to_dict() == first.findings.to_dict()
    assert second.cost == first.cost
    assert second.cost.forwards == 1 + 19
    assert second.cost.backwards == 2
    assert second.cost.seconds > 0
    assert second.cost.peak_bytes > 10_000_000  # a process with torch holds more


def test_a_loaded_subject_has_the_same_hash_and_the_same_result(study: Study, log: Log) -> None:
    by_reference = study.run()
    subject = load(study.model)
    given = Study(method="tally", spec={"prompt": PROMPT}).run(subject)
    assert log() == ["measure", "draws"]
    assert given.to_dict() == by_reference.to_dict()


def test_a_module_of_the_users_own_can_be_studied(tiny_module: Callable, tiny_tokenizer: object, log: Log) -> None:
    subject = load(tiny_module("llama", seed=5), tokenizer=tiny_tokenizer)
    study = Study(method="tally", spec={"prompt": PROMPT})
    assert [planned.cached for planned in study.plan(subject).steps] == [False, False]
    finding = study.run(subject).findings[0]
    assert [planned.cached for planned in study.plan(subject).steps] == [True, True]
    assert finding.provenance.weights_hash == subject.fingerprint
    assert finding.provenance.tokenizer_hash
    assert log() == ["measure", "draws"]


def test_a_finding_says_where_it_comes_from(study: Study) -> None:
    findings = study.run()
    provenance = findings.findings[0].provenance
    assert provenance.model == study.model
    assert len(provenance.weights_hash) >= 32
    assert len(provenance.tokenizer_hash) == 64
    assert {"python", "torch", "transformers", "numpy"} <= set(provenance.versions)
    other = Study(method="tally", model=study.model, spec={"prompt": PROMPT, "draws": 20}).run()
    assert other.findings[0].provenance.spec_hash != provenance.spec_hash
    assert other.findings[0].provenance.data_hash == provenance.data_hash  # the same tokens were measured


def test_steps_are_shared_by_studies_that_ask_for_the_same(study: Study, log: Log) -> None:
    study.run()
    study.model_copy(update={"seed": 1}).run()
    assert log() == ["measure", "draws", "draws"]  # measuring needs no seed


def test_no_cache_computes_everything_again_and_keeps_it(study: Study, log: Log) -> None:
    study.run()
    study.run(cache=False)
    assert log() == ["measure", "draws"] * 2
    study.run()
    assert log() == ["measure", "draws"] * 2


def test_a_step_that_is_asked_for_twice_counts_once(study: Study, log: Log) -> None:
    """The method asks for its draws twice; even where nothing kept may answer, they are computed and paid for once."""
    outcome = execute(study, cache=False)
    assert log() == ["measure", "draws"]
    assert [step.name for step in outcome.steps] == ["measure", "draws"]
    assert outcome.cost.forwards == 20
    assert outcome.findings.findings[0].cost == outcome.cost


def test_the_tokenizers_hash_is_no_matter_of_the_door(study: Study, model_folder: Path) -> None:
    by_reference = study.run().findings[0].provenance
    subject = load(str(model_folder))
    subject.tokenizer(["Mary", "Mary and John"], padding=True)  # leaves its mark on the tokenizer
    given = Study(method="tally", spec={"prompt": PROMPT}).run(subject, cache=False).findings[0].provenance
    assert given.tokenizer_hash == by_reference.tokenizer_hash


def test_the_plan_runs_nothing_and_knows_the_cache(study: Study, log: Log) -> None:
    plan = study.plan()
    assert [planned.step.name for planned in plan.steps] == ["measure", "draws"]
    assert (plan.forwards, plan.backwards, plan.seconds, plan.cached) == (20, 2, 2.0, 0)
    assert plan.tokens == 20 * len(plan.steps[0].step.inputs["tokens"])
    assert log() == []
    study.run()
    assert study.plan().finished
    assert study.plan().remaining == ()
    reseeded = study.model_copy(update={"seed": 3}).plan()
    assert [planned.cached for planned in reseeded.steps] == [True, False]
    assert [planned.step.name for planned in reseeded.remaining] == ["draws"]
    assert reseeded.to_dict()["remaining"]["forwards"] == 19


def test_what_a_step_adds_comes_back_with_it_from_the_cache(study: Study, log: Log, tmp_path: Path) -> None:
    """A warning or artifact made inside a step is part of the result even when the step itself is not run again."""
    first = study.run()
    clear_studies(study)
    again = study.run(out=tmp_path / "out")
    assert log() == ["measure", "draws"]
    assert again.warnings == first.warnings == ("19 draws cannot give a p below 0.05",)
    assert set(again.artifacts) == {"null", "tokens"}
    null = read_safetensors(tmp_path / "out" / "artifacts" / "null.safetensors")["null"]
    assert np.array_equal(null, np.array(again.findings[0].controls[0].null))


def clear_studies(study: Study) -> None:
    from assay.studies.store import Store

    Store(lambda text: None).study_path(study.plan().study).unlink()


def test_the_output_folder_holds_the_result(study: Study, tmp_path: Path) -> None:
    out = tmp_path / "new" / "runs" / "one"
    findings = study.run(out=out)
    assert sorted(path.relative_to(out).as_posix() for path in out.rglob("*") if path.is_file()) == [
        "artifacts/null.safetensors",
        "artifacts/tokens.parquet",
        "findings.jsonl",
        "report.html",
        "study.json",
    ]
    assert [json.loads(line) for line in (out / "findings.jsonl").read_text().splitlines()] == [
        finding.to_dict() for finding in findings
    ]
    about = json.loads((out / "study.json").read_text())
    assert Study(**about["study"]) == study
    assert about["key"] == study.plan().study
    assert [step["name"] for step in about["steps"]] == ["measure", "draws"]
    table = read_parquet(out / "artifacts" / "tokens.parquet")
    assert np.mean(table["value"]) == pytest.approx(findings.findings[0].estimate, rel=1e-12)
    report = (out / "report.html").read_text()
    assert "Compare the embeddings of a prompt" in report
    assert "Frequent tokens have shorter embeddings" in report  # when it misleads


def test_the_cache_fills_the_output_folder_again(study: Study, tmp_path: Path, log: Log) -> None:
    study.run(out=tmp_path / "one")
    study.run(out=tmp_path / "two")
    assert log() == ["measure", "draws"]
    names = {path.relative_to(tmp_path / "one") for path in (tmp_path / "one").rglob("*")}
    assert names == {path.relative_to(tmp_path / "two") for path in (tmp_path / "two").rglob("*")}
    for name in names:
        if (tmp_path / "one" / name).is_file():
            assert (tmp_path / "one" / name).read_bytes() == (tmp_path / "two" / name).read_bytes()


def test_the_output_folder_is_checked_before_anything_runs(study: Study, tmp_path: Path, log: Log) -> None:
    (tmp_path / "file").write_text("mine")
    with pytest.raises(OutputError, match="is a file, not a folder"):
        study.run(out=tmp_path / "file")
    with pytest.raises(OutputError, match="is a file, not a folder"):
        study.run(out=tmp_path / "file" / "below")
    assert log() == []
    assert (tmp_path / "file").read_text() == "mine"


def test_an_unknown_model_leaves_nothing(tmp_path: Path) -> None:
    study = Study(method="tally", model=str(tmp_path / "absent"), spec={"prompt": PROMPT})
    with pytest.raises(UnknownModel):
        study.run(out=tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_a_cache_that_cannot_be_written_is_said_before_anything_runs(
    study: Study, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, log: Log
) -> None:
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("ASSAY_HOME", str(tmp_path / "file"))
    with pytest.raises(OutputError, match="ASSAY_HOME"):
        study.run()
    assert log() == []


def test_a_cache_that_can_only_be_read_still_answers(
    study: Study, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, log: Log
) -> None:
    study.run()
    monkeypatch.setattr("assay.studies.run.check_writable", refuse_the_cache)
    assert len(study.run(out=tmp_path / "out")) == 1
    with pytest.raises(OutputError, match="read-only"):
        study.model_copy(update={"seed": 1}).run(out=tmp_path / "other")
    assert log() == ["measure", "draws"]
    assert not (tmp_path / "other").exists()


def refuse_the_cache(path: Path, *, what: str) -> None:
    if "cache" in what:
        raise OutputError(f"{what} {path} is read-only")
    output.check_writable(path, what=what)


def test_a_cache_that_fills_keeps_what_is_finished(
    study: Study, small_disk: Path, monkeypatch: pytest.MonkeyPatch, log: Log
) -> None:
    """The cache's disk is really full when the second step ends; with room again the study goes on from the first."""
    monkeypatch.setenv("ASSAY_HOME", str(small_disk / "home"))
    ballast = small_disk / "ballast"

    def fill(event: Event) -> None:
        if (event.kind, event.step) == ("start", "draws"):
            with contextlib.suppress(OSError), ballast.open("wb", buffering=0) as file:
                while True:
                    file.write(bytes(4096))

    with pytest.raises(OutputError, match="no room left"):
        study.run(progress=fill)
    ballast.unlink()
    assert [path for path in small_disk.rglob(".tmp-*") if path.is_file()] == []
    study.run()
    assert log() == ["measure", "draws", "draws"]


def test_events_tell_the_whole_story_in_order(study: Study) -> None:
    events: list[Event] = []
    study.run(progress=events.append)
    told = [(event.kind, event.step) for event in events if event.kind not in {"phase", "progress"}]
    assert told == [
        ("plan", ""),
        ("start", "measure"),
        ("finish", "measure"),
        ("start", "draws"),
        ("finish", "draws"),
        ("done", ""),
    ]
    last = [event for event in events if event.kind == "progress" and event.step == "draws"][-1]
    assert (last.done, last.total, last.index, last.count) == (19, 19, 2, 2)
    assert any(event.kind == "phase" and "loading" in event.message for event in events)
    assert all(event.seconds > 0 for event in events if event.kind == "finish")


def test_cancelling_keeps_what_is_finished(study: Study, log: Log) -> None:
    cancel = threading.Event()

    def stop_in_draws(event: Event) -> None:
        if event.step == "draws" and event.kind == "progress":
            cancel.set()

    with pytest.raises(Cancelled, match="finished steps are kept"):
        study.run(progress=stop_in_draws, cancel=cancel)
    assert log() == ["measure", "draws"]
    study.run()
    assert log() == ["measure", "draws", "draws"]


@pytest.mark.parametrize("damage", ["truncated", "empty", "another field", "another word"])
def test_a_damaged_record_is_said_and_computed_again(study: Study, log: Log, home: Path, damage: str) -> None:
    first = study.run()
    (record,) = (home / "studies").rglob("*.json")
    text = record.read_text()
    damaged = {
        "truncated": text[: len(text) // 2],
        "empty": "",
        "another field": text.replace('"n":', '"m":'),
        "another word": text.replace("embeddings are longer", "embeddings are larger"),
    }[damage]
    assert damaged != text
    record.write_text(damaged)
    notices: list[Event] = []
    again = execute(study, watcher=notices.append)
    assert not again.cached
    assert [e for e in notices if e.kind == "notice" and "damaged" in e.message]
    assert again.findings.to_dict() == first.to_dict()
    assert log() == ["measure", "draws"]  # the steps were whole
    assert execute(study).cached


def test_a_damaged_step_is_said_and_only_it_is_computed_again(study: Study, log: Log, home: Path) -> None:
    study.run()
    clear_studies(study)
    draws = next(planned.key for planned in study.plan().steps if planned.step.name == "draws")
    (entry,) = (home / "steps").rglob(f"{draws}.safetensors")
    entry.write_bytes(entry.read_bytes()[:-3])
    notices: list[Event] = []
    study.run(progress=notices.append)
    assert [e for e in notices if e.kind == "notice" and "damaged cache entry" in e.message]
    assert log() == ["measure", "draws", "draws"]


@pytest.mark.parametrize("damage", ["removed", "altered"])
def test_a_damaged_artifact_is_made_again(study: Study, log: Log, home: Path, tmp_path: Path, damage: str) -> None:
    study.run(out=tmp_path / "one")
    (blob,) = (home / "blobs").rglob("*.safetensors")
    if damage == "removed":
        blob.unlink()
    else:
        content = bytearray(blob.read_bytes())
        content[-1] ^= 1
        blob.write_bytes(content)
    events: list[Event] = []
    study.run(out=tmp_path / "two", progress=events.append)
    assert [e for e in events if e.kind == "notice"]
    assert log() == ["measure", "draws", "draws"]
    name = "artifacts/null.safetensors"
    assert (tmp_path / "two" / name).read_bytes() == (tmp_path / "one" / name).read_bytes()


def test_an_error_in_the_method_leaves_no_output_and_keeps_finished_steps(
    model_folder: Path, tmp_path: Path, log: Log
) -> None:
    weights = tmp_path / "weights.json"
    weights.write_text("[1.0]")
    study = Study(method="tally", model=str(model_folder), spec={"prompt": PROMPT, "weights": weights})
    with pytest.raises(SpecError, match="1 weights were given"):
        study.run(out=tmp_path / "out")
    assert not (tmp_path / "out").exists()
    assert log() == []


def test_clearing_the_cache_leaves_the_models(study: Study, home: Path, log: Log) -> None:
    (home / "models").mkdir(parents=True)
    (home / "models" / "weights").write_bytes(b"w" * 100)
    (home / "mine.txt").write_text("not assay's")
    study.run()
    assert {"steps", "studies", "blobs", "models"} <= {entry.name for entry in cache_sizes()}
    assert clear_cache() > 0
    assert (home / "models" / "weights").exists()
    study.run()
    assert log() == ["measure", "draws"] * 2
    clear_cache(models=True)
    assert not (home / "models").exists()
    assert (home / "mine.txt").exists()


@pytest.mark.parametrize("out", ["", "  "])
def test_an_output_folder_without_a_name_is_refused(study: Study, log: Log, out: str) -> None:
    with pytest.raises(OutputError, match="the output folder's name is empty"):
        study.run(out=out)
    assert log() == []


def test_an_output_folder_of_an_unknown_user_is_refused(study: Study) -> None:
    with pytest.raises(OutputError, match="home folder of a user"):
        study.run(out="~nobody-of-that-name/x")


def test_an_output_folder_beside_one_that_is_not_there(study: Study, tmp_path: Path) -> None:
    outcome = execute(study, out=tmp_path / "never" / ".." / "out")
    assert outcome.out == tmp_path / "out"
    assert (tmp_path / "out" / "study.json").is_file()
    assert not (tmp_path / "never").exists()


def test_an_empty_file_name_is_refused(study: Study) -> None:
    with pytest.raises(SpecError, match="weights: is empty") as caught:
        Study(method="tally", model=study.model, spec={"prompt": PROMPT, "weights": ""}).run()
    assert caught.value.field == "weights"


def test_another_tokenizer_is_another_study(study: Study, tiny_tokenizer: Any, log: Log) -> None:
    """A tokenizer passed in changes every key, and the plan sees the same keys as the run."""
    study.run()
    other = copy.deepcopy(tiny_tokenizer)
    other.add_tokens(["Mary and John"])
    subject = load(study.model, tokenizer=other)
    assert [planned.cached for planned in study.plan(subject).steps] == [False, False]
    assert study.run(subject).findings[0].n < study.run().findings[0].n
    assert log() == ["measure", "draws"] * 2
    again = study.plan(subject)
    assert (again.finished, [planned.cached for planned in again.steps]) == (True, [True, True])


def test_a_study_is_read_from_a_file_and_its_files_lie_beside_it(study: Study, tmp_path: Path) -> None:
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "weights.json").write_text(json.dumps([1.0] * 8))
    written = {"method": "tally", "model": study.model, "spec": {"prompt": PROMPT, "weights": "data/weights.json"}}
    (tmp_path / "study.json").write_text(json.dumps(written))
    found = Study.read(tmp_path / "study.json")
    assert found.spec.weights == tmp_path / "data" / "weights.json"  # type: ignore[attr-defined]
    assert found.key("f") == Study(**{**written, "spec": {**found.spec.model_dump()}}).key("f")
    found.run()
    for text, message in (("[]", "holds a list"), ("{", "is no study"), ('{"method": "tally"}', "prompt: is required")):
        (tmp_path / "bad.json").write_text(text)
        with pytest.raises(SpecError, match=message):
            Study.read(tmp_path / "bad.json")
    with pytest.raises(SpecError, match="is no study"):
        Study.read(tmp_path / "absent.json")


def test_the_study_of_a_saved_result_is_read(study: Study, tmp_path: Path) -> None:
    study.run(out=tmp_path / "out")
    found = Study.read(tmp_path / "out" / "study.json")
    assert found.key("f") == study.key("f")
