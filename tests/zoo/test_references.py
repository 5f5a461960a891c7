"""`zoo:<name>` is a folder in the cache that loads as any other, and unknown names are named."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

import assay
from assay.base.artifacts import home
from assay.base.errors import UnknownModel
from assay.subjects.sources import resolve
from assay.zoo.organisms import Codeword, _module, _tokenizer, prompt_of, table_of_facts
from assay.zoo.references import NAMES, RECIPE, folder_of, write

PROMPTS = [prompt_of("colour", "item0", "harbour"), prompt_of("owner", "item11", "quartz")]


@pytest.fixture(autouse=True)
def _own_home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A cache of the test's own: no other may find what is written here."""
    monkeypatch.setenv("ASSAY_HOME", str(tmp_path / "home"))


def untrained() -> Codeword:
    """An organism before its training."""
    tokenizer = _tokenizer()
    module = _module(len(tokenizer), 16, 1, 3).eval()
    return Codeword(module=module, tokenizer=tokenizer, facts=table_of_facts(3), accuracy=0.0, seed=3)


def test_what_is_written_loads_as_it_was(tmp_path: Path) -> None:
    made = untrained()
    write(made, tmp_path / "model")
    subject, other = assay.load(str(tmp_path / "model")), assay.load(made.module, tokenizer=made.tokenizer)
    torch.testing.assert_close(subject.run(PROMPTS).logits, other.run(PROMPTS).logits, atol=0, rtol=0)
    assert subject.tokenizer(PROMPTS)["input_ids"] == made.tokenizer(PROMPTS)["input_ids"]


def test_a_reference_is_the_folder_in_the_cache() -> None:
    write(untrained(), home() / "models" / f"zoo-codeword-{RECIPE}")
    said: list[str] = []
    source = resolve("zoo:codeword", notify=said.append)
    assert source.kind == "folder" and source.path == folder_of("codeword") and source.converted
    assert not said  # it was there
    assert source.card().n_layers == 1
    assert assay.load("zoo:codeword").name == "zoo:codeword"


@pytest.mark.parametrize("name", ["codewrd", "", "../codeword", "Codeword"])
def test_unknown_names_are_refused_before_anything_is_made(name: str) -> None:
    with pytest.raises(UnknownModel, match=f"valid: zoo:{NAMES[0]}"):
        resolve(f"zoo:{name}")
    assert not (home() / "models").exists()
