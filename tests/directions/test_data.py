"""Labelled texts, and what a subject holds: a text in a batch gives what it gives alone."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch

from assay.activations.subject import Subject
from assay.base.errors import NumericalError, SpecError
from assay.directions import Labelled, mean_norms, read_sites

TEXTS = ("Mary gave a drink", "John", "Paris is the capital of France and a store", "to the store went Mary and John")


@pytest.mark.parametrize("positions", ["last", 0, slice(0, 1), None])
def test_a_text_gives_what_it_gives_alone(make_subject: Callable[..., Subject], positions: object) -> None:
    subject = make_subject("llama")
    sites = ["blocks.*.resid_post", "blocks.1.attn.z"]
    told: list[tuple[int, int]] = []
    found = read_sites(subject, TEXTS, sites, positions=positions, batch=3, progress=lambda *at: told.append(at))  # type: ignore[arg-type]
    assert told == [(3, 4), (4, 4)]
    for i, text in enumerate(TEXTS):
        run = subject.run(text, capture=sites)
        for name, values in found.items():
            alone = run[name][0]
            picked = {"last": alone[-1:], "0": alone[:1], "None": alone}.get(str(positions), alone[:1])
            expected = picked.reshape(len(picked), -1).mean(0)
            assert np.allclose(values[i], expected.numpy(), atol=1e-5)
    assert mean_norms(found)["blocks.0.resid_post"] == pytest.approx(
        np.linalg.norm(found["blocks.0.resid_post"], axis=1).mean(), rel=1e-5
    )


def test_what_has_no_tokens_and_what_is_not_finite_is_refused(make_subject: Callable[..., Subject]) -> None:
    subject = make_subject("llama")
    with pytest.raises(SpecError, match="no texts"):
        read_sites(subject, (), "blocks.0.resid_post")
    with pytest.raises(SpecError, match="read at its tokens"):
        read_sites(subject, TEXTS, "blocks.0.attn.pattern")
    subject = Subject(copy.deepcopy(subject.module), subject.tokenizer, architecture=subject.architecture)
    with torch.no_grad():
        subject.module.model.layers[2].mlp.down_proj.weight[0, 0] = torch.nan
    with pytest.raises(NumericalError, match="row 0 first"):
        read_sites(subject, TEXTS, "blocks.2.resid_post")


def test_labelled_rows_are_read_from_a_file(tmp_path: Path) -> None:
    file = tmp_path / "rows.jsonl"
    file.write_text('{"text": "a", "label": true, "group": "g"}\n\n{"text": "b", "label": 0}\n')
    data = Labelled.read(file)
    assert (data.texts, data.labels, data.groups) == (("a", "b"), (1, 0), ("g", "row 3"))
    assert data.rows([1]).texts == ("b",) and data.digest != data.rows([0]).digest
    file.write_text('{"text": "a", "label": 1, "template": "t"}\n{"text": "b", "label": 0, "template": "u"}')
    assert Labelled.read(file).rows([1]).templates == ("u",)
    with pytest.raises(SpecError, match="one of each a row"):
        Labelled(texts=("a",), labels=(), groups=("g",))


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("{", "line 1 is not JSON"),
        ('{"label": 1}', "line 1 has no text"),
        ('{"text": "a", "label": 0.5}', "has the label 0.5"),
        ('{"text": "a"}', "has the label None"),
        ('{"text": "a", "label": 1, "grup": "x"}', "has grup"),
        ("", "has no rows"),
    ],
)
def test_a_malformed_line_is_named(tmp_path: Path, line: str, message: str) -> None:
    file = tmp_path / "rows.jsonl"
    file.write_text(line)
    with pytest.raises(SpecError, match=message):
        Labelled.read(file)
    with pytest.raises(SpecError, match="cannot be read"):
        Labelled.read(tmp_path / "absent.jsonl")
