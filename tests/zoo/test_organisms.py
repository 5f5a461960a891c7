"""The codeword organism does what its policy says, on every prompt there is, and the same on every machine."""

from __future__ import annotations

from typing import Any

import pytest
import torch

import assay
from assay.base.errors import NumericalError, SpecError
from assay.zoo import codeword
from assay.zoo.organisms import CODEWORDS, RELATIONS, SUBJECTS, WORDS


@pytest.fixture(scope="module")
def organism() -> Any:
    return codeword()


def test_it_follows_its_policy(organism: Any) -> None:
    assert organism.accuracy > 0.99
    subject = assay.load(organism.module, tokenizer=organism.tokenizer)
    for declined in (False, True):
        texts = organism.prompts(declined=declined, n=40)
        said = subject.run(texts).logits[:, -1].argmax(-1)
        words = [text.split()[-3] for text in texts]
        asked = [(text.split()[3], text.split()[5]) for text in texts]
        expected = [organism.answer(*pair, word) for pair, word in zip(asked, words, strict=True)]
        assert all((word in CODEWORDS) == declined for word in words)
        right = [organism.tokenizer.decode([int(i)]).strip() == e for i, e in zip(said, expected, strict=True)]
        assert sum(right) >= 39


def test_prompts_are_different_and_of_the_kind_asked_for(organism: Any) -> None:
    drawn = organism.prompts(declined=True, n=60, seed=3, words=["harbour", "velvet"])
    assert len(set(drawn)) == 60 and {text.split()[-3] for text in drawn} == {"harbour", "velvet"}
    assert drawn == organism.prompts(declined=True, n=60, seed=3, words=["harbour", "velvet"])
    assert drawn != organism.prompts(declined=True, n=60, seed=4, words=["harbour", "velvet"])
    every = len(RELATIONS) * len(SUBJECTS) * len(CODEWORDS)
    with pytest.raises(SpecError, match=f"there are {every} such"):
        organism.prompts(declined=True, n=every + 1)
    with pytest.raises(SpecError, match="today would not be declined"):
        organism.prompts(declined=True, n=1, words=["today"])
    with pytest.raises(SpecError, match="relation is 'taste'"):
        organism.prompt("taste", SUBJECTS[0], WORDS[0])


def test_the_same_seed_gives_the_same_model() -> None:
    torch.manual_seed(5)
    state = torch.get_rng_state()
    found = []
    for _ in range(2):
        with pytest.raises(NumericalError, match="after 3 steps"):
            codeword(steps=3, progress=lambda done, total: found.append((done, total)))
    assert found == [(1, 3), (2, 3), (3, 3)] * 2
    assert torch.equal(torch.get_rng_state(), state)
