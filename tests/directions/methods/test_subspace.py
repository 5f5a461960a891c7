"""The `subspace` study: a subspace that is planted is found, and an untrained model's is not believed."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.numpy import load_file

import assay
from assay.base.errors import NothingFound, SpecError
from assay.directions.methods.subspace_job import first_tokens
from assay.directions.subspaces import Subspace
from assay.directions.subspaces.interchange import Interchanges, answers, read_at
from assay.studies import Study

SITE = "blocks.1.resid_post"
WORDS = "When Mary John went to the store gave a drink and milk capital of France is Paris".split()
N = 192


@pytest.fixture(scope="module")
def subject(tiny_module: Callable[..., Any], tiny_tokenizer: Any) -> Any:
    return assay.load(tiny_module("gpt2", n_layer=3), tokenizer=tiny_tokenizer)


@pytest.fixture(scope="module")
def rows(subject: Any) -> list[dict[str, str]]:
    """What the model says once its two dimensions of largest variance are exchanged; half ask what must stay."""
    rng = np.random.default_rng(0)
    texts = [" ".join(rng.choice(WORDS, 4)) for _ in range(2 * N)]
    base, source = texts[:N], texts[N:]
    held = read_at(subject, texts, SITE, "last")
    plane = Subspace.spanned_by(torch.linalg.svd(held - held.mean(0))[2][:2], SITE)
    ids = tuple(int(subject.batch([f"When {word}"]).prompt(0)[-1]) for word in dict.fromkeys(WORDS))
    data = Interchanges(base=base, source=source, answer=(ids[0],) * N, choices=ids)
    values = data.read(subject, SITE)[1]
    own = answers(subject, data)[0].tolist()
    due = answers(subject, data, lambda keep: plane.edits(values[keep]))[0].tolist()
    word = dict(zip(ids, dict.fromkeys(WORDS), strict=True))
    return [
        {
            "base": base[i],
            "source": source[i],
            "answer": f" {word[due[i]]}",
            "original": f" {word[own[i]]}",
            "group": str(i % 24),
            "attribute": "the rest",
        }
        for i in range(N)
    ]


def write(path: Path, rows: list[dict[str, str]]) -> Path:
    path.write_text("\n".join(map(json.dumps, rows)))
    return path


def test_a_planted_subspace_is_found_in_new_groups(subject: Any, rows: list[dict[str, str]], tmp_path: Path) -> None:
    data = write(tmp_path / "planted.jsonl", rows)
    spec = {"data": data, "site": SITE, "k": 2, "epochs": 20, "lr": 5e-2, "random": 39}
    study = Study(method="subspace", spec=spec)
    plan = study.plan(subject=subject)
    assert [planned.step.name for planned in plan.steps] == ["fit", "scores", "refits"]
    assert plan.forwards > 0 and plan.backwards > 0
    found = study.run(subject=subject, out=tmp_path / "out")
    (cause,), (ravel,), (illusion,) = (found.tagged(tag) for tag in ("cause", "ravel", "illusion"))
    random, permuted, components, whole = cause.controls
    assert len(random.null) == 39 and len(permuted.null) == 199
    assert cause.estimate > max(random.null) and cause.verdict == "supported"
    assert components.p is None and whole.p is None and components.null[0] > max(random.null)  # planted there
    assert cause.n == 12 and cause.detail["rows"] + cause.detail["fitted rows"] <= N
    assert set(ravel.detail["isolate"]) == {"the rest"} and 0 <= ravel.estimate <= 1
    assert illusion.detail["row_share"] == pytest.approx(1) and illusion.detail["null_share"] < 1e-6
    assert illusion.detail["v"] == pytest.approx(illusion.detail["v_row"], abs=1e-4)
    assert study.run(subject=subject).to_dict() == found.to_dict()
    (code,) = {view.python for view in found.views}
    names: dict[str, Any] = {"module": subject.module, "tokenizer": subject.tokenizer}
    exec(compile(code, "<report>", "exec"), names)
    assert names["findings"].to_dict() == found.to_dict()
    kept = load_file(tmp_path / "out" / "artifacts" / "subspace.safetensors")
    assert (
        np.allclose(kept["basis"] @ kept["basis"].T, np.eye(2), atol=1e-5) and kept["pca"].shape == kept["basis"].shape
    )


def test_answers_drawn_by_lot_are_not_supported_and_refits_are_a_control(
    subject: Any, rows: list[dict[str, str]], tmp_path: Path
) -> None:
    rng = np.random.default_rng(1)
    words = [f" {word}" for word in dict.fromkeys(WORDS)]
    drawn = [row | {"answer": str(rng.choice([w for w in words if w != row["original"]]))} for row in rows]
    spec = {
        "data": write(tmp_path / "lot.jsonl", drawn),
        "site": "blocks.0.mlp.post",
        "kind": "boundless das",
        "epochs": 1,
        "random": 19,
        "refits": 2,
        "held_out": 0.5,
    }
    found = Study(method="subspace", spec=spec).run(subject=subject)
    (cause,), (illusion,) = (found.tagged(tag) for tag in ("cause", "illusion"))
    assert cause.verdict == "not distinguishable from control" and not found.tagged("ravel")
    assert [len(control.null) for control in cause.controls] == [19, 199, 2, 1, 1]
    shares = illusion.detail["row_share"] ** 2 + illusion.detail["null_share"] ** 2
    assert shares == pytest.approx(1, abs=1e-4) and illusion.detail["null_share"] > 0.1  # an MLP's input has both
    assert any("No row says what must stay" in text for text in found.warnings)


def test_bad_input_is_named_and_leaves_nothing_behind(subject: Any, rows: list[dict[str, str]], tmp_path: Path) -> None:
    out = tmp_path / "out"
    changed = [row for row in rows if row["answer"] != row["original"]]
    still = [row | {"answer": row["original"]} for row in rows]
    unknown = [row | {"original": row["answer"], "answer": row["original"]} for row in changed]
    cases: list[tuple[list[dict[str, str]], type[Exception], str]] = [
        (changed[:3], SpecError, "groups; 4 or more"),
        (still, SpecError, "in no row"),
        ([{k: v for k, v in row.items() if k != "attribute"} for row in still], SpecError, "lacks an attribute"),
        ([{k: v for k, v in row.items() if k != "source"} for row in rows], SpecError, "line 1 lacks a text"),
        ([row | {"more": "x"} for row in rows], SpecError, "means nothing here"),
        (unknown, NothingFound, "as the file's originals say"),
        ([row | {"answer": row["original"] + " gave"} for row in changed], SpecError, "begin with the same token"),
    ]
    for given, error, message in cases:
        spec = {"data": write(tmp_path / "bad.jsonl", given), "site": SITE, "k": 1}
        with pytest.raises(error, match=message):
            Study(method="subspace", spec=spec).run(subject=subject, out=out)
        assert not out.exists()
    with pytest.raises(SpecError, match="tokens of its own"):
        first_tokens(subject, [{"base": "went to Par", "answer": "is"}], "answer")
    with pytest.raises(SpecError, match="32 dimensions"):
        spec = {"data": write(tmp_path / "wide.jsonl", rows), "site": SITE, "k": 33}
        Study(method="subspace", spec=spec).run(subject=subject)
