"""What the methods share: the Python that a report shows is run here as it stands, for each of them."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest

import assay
from assay.base.errors import SpecError
from assay.base.findings import Findings
from assay.directions.labelled import Labelled
from assay.directions.methods.common import mean_tokens
from assay.directions.methods.rows import classes, codes, two_classes
from assay.studies import Study
from assay.studies.target import LoadedCard

NAMES = "Mary John Paris France store drink milk capital When gave went the to of is and".split()
METHODS = ("probe", "edit-fact", "erase", "steer", "function-vector", "lens", "local")
TEXTS = {
    "labelled": [
        {"text": f"{name} {'gave a drink' if label else 'is the store'}", "label": label, "group": name}
        for name in NAMES
        for label in (0, 1)
    ],
    "pairs": [{"positive": f"{name} gave a drink", "negative": f"{name} is the store"} for name in NAMES],
    "prompts": [{"text": f"the store {name}"} for name in NAMES[:4]],
    "train": [{"text": f"{name} gave the milk to {name}"} for name in NAMES],
    "facts": [
        {"prompt": "{} went to the", "subject": name, "target": " milk", "original": " store", "neighbours": ["the"]}
        for name in NAMES[:2]
    ],
    "items": [{"input": name, "output": NAMES[i - 5]} for i, name in enumerate(NAMES)],
}


def write(path: Path, rows: Sequence[dict[str, Any]]) -> Path:
    path.write_text("\n".join(map(json.dumps, rows)))
    return path


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("texts")
    return {name: write(folder / f"{name}.jsonl", rows) for name, rows in TEXTS.items()}


@pytest.fixture(scope="module")
def folder(tiny_module: Callable[..., Any], tiny_tokenizer: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny model that can be loaded again by its folder."""
    path = tmp_path_factory.mktemp("model")
    tiny_module("llama", max_position_embeddings=512).save_pretrained(path)
    tiny_tokenizer.save_pretrained(path)
    return path


def small(method: str, files: dict[str, Path]) -> dict[str, Any]:
    site = "blocks.1.resid_post"
    return {
        "probe": {"data": files["labelled"], "sites": site, "permutations": 19, "untrained": 1, "tasks": 2},
        "edit-fact": {
            "data": files["facts"],
            "text": files["prompts"],
            "unrelated": files["prompts"],
            "steps": 2,
            "random": 2,
        },
        "erase": {"data": files["labelled"], "site": site, "random": 2, "texts": 2, "held_out": 0.5},
        "steer": {
            "data": files["pairs"],
            "prompts": files["prompts"],
            "unrelated": files["prompts"],
            "toward": (" Paris",),
            "away": (" milk",),
            "doses": (-0.1, 0.1),
            "controls": 2,
        },
        "function-vector": {"data": files["items"], "heads": 2, "shots": 2, "prompts": 2, "every": 2, "random": 2},
        "lens": {
            "data": files["prompts"],
            "train": files["train"],
            "tokens": 2,
            "steps": 2,
            "controls": 2,
            "shuffles": 19,
            "untrained": 2,
        },
        "local": {"data": files["prompts"], "ks": (1, 2), "k": 2, "draws": 19},
    }[method]


def snippets(found: Findings) -> set[str]:
    return {view.python for view in found.views}


@pytest.mark.parametrize("method", METHODS)
def test_the_python_of_a_report_runs_as_it_stands(
    method: str, files: dict[str, Path], folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    study = Study(method=method, model=str(folder), spec=small(method, files), seed=3)
    found = study.run()
    (code,) = snippets(found)
    names: dict[str, Any] = {}
    exec(compile(code, "<report>", "exec"), names)
    assert names["study"] == study
    assert names["findings"].to_dict() == found.to_dict()
    assert capsys.readouterr().out == "\n".join(found.summary) + "\n"


def test_the_python_of_a_module_that_was_handed_over_begins_from_it(
    files: dict[str, Path], tiny_module: Callable[..., Any], tiny_tokenizer: Any
) -> None:
    module = tiny_module("llama", seed=1)
    subject = assay.load(module, tokenizer=tiny_tokenizer)
    found = Study(method="erase", spec=small("erase", files), seed=3).run(subject=subject)
    (code,) = snippets(found)
    names: dict[str, Any] = {"module": module, "tokenizer": tiny_tokenizer}
    exec(compile(code, "<report>", "exec"), names)
    assert names["findings"].to_dict() == found.to_dict()


def test_two_classes_are_told_apart_by_their_texts(files: dict[str, Path], tmp_path: Path) -> None:
    data = Labelled(texts=tuple("abc"), labels=("yes", "no", "yes"), groups=tuple("abc"))
    assert classes(data) == ["no", "yes"] and codes(data).tolist() == [1, 0, 1]
    assert two_classes(files["labelled"], "two").labels[:2] == (0, 1)
    three = write(tmp_path / "three.jsonl", [{"text": "x", "label": i} for i in range(3)])
    with pytest.raises(SpecError, match=r"three\.jsonl has 3 labels .*; a coin has two sides"):
        two_classes(three, "a coin has two sides")


def test_the_mean_length_is_of_the_first_fifty(tiny_module: Callable[..., Any], tiny_tokenizer: Any) -> None:
    card = LoadedCard(assay.load(tiny_module("llama"), tokenizer=tiny_tokenizer))
    long, short = "When Mary John went to the", "When Mary"
    assert mean_tokens(card, [long, short]) == 4
    assert mean_tokens(card, [short] * 50 + [long] * 1000) == 2
    assert mean_tokens(card, [""]) == mean_tokens(card, []) == 1
