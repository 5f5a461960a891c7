"""assay's own files: everything comes back as it was, and what was changed since is noticed."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from dictionary_files import activations, change, made

from assay.base.errors import DamagedFile, SpecError
from assay.dictionaries import load


@pytest.mark.parametrize("kind", activations())
def test_card_and_weights_come_back(kind: str, tmp_path: Path) -> None:
    torch.manual_seed(0)
    dictionary = made(
        activations()[kind],
        centred=True,
        normalisation="layer_norm",
        mean_norm=3.5,
        family="x",
        training={"steps": 7, "l0": [1.5, 2.0]},
        source={"format": "assay"},
    )
    again = load(dictionary.save(tmp_path / "it"))
    assert again.card == dictionary.card
    assert again.tensors().keys() == dictionary.tensors().keys()
    assert all(torch.equal(again.tensors()[name], tensor) for name, tensor in dictionary.tensors().items())
    assert again.activation.settings() == dictionary.activation.settings()


def test_changed_weights_are_noticed(tmp_path: Path) -> None:
    where = made(activations()["relu"]).save(tmp_path / "it")
    change(where / "dictionary.safetensors", lambda held: held | {"b_enc": held["b_enc"] + 1})
    with pytest.raises(DamagedFile, match="hash"):
        load(where)
    (where / "dictionary.safetensors").unlink()
    with pytest.raises(DamagedFile, match="missing"):
        load(where)


@pytest.mark.parametrize("value", [float("nan"), {1, 2}])
def test_a_card_that_json_cannot_say_is_refused_before_anything_is_written(value: object, tmp_path: Path) -> None:
    for format in ("assay", "saelens"):
        with pytest.raises(SpecError, match="JSON"):
            made(activations()["relu"], training={"l0": value}).save(tmp_path / "it", format)
    assert not any(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("path", "value", "said"),
    [
        (("schema",), "assay-dictionary/9", "assay-dictionary/9"),
        (("activation", "name"), "relus", "did you mean 'relu'"),
        (("card", "famly"), "x", "did you mean 'family'"),
    ],
)
def test_what_is_not_known_is_refused_by_name(path: tuple[str, ...], value: str, said: str, tmp_path: Path) -> None:
    where = made(activations()["relu"]).save(tmp_path / "it")
    document = json.loads((where / "dictionary.json").read_text())
    inner = document
    for name in path[:-1]:
        inner = inner[name]
    inner[path[-1]] = value
    (where / "dictionary.json").write_text(json.dumps(document))
    with pytest.raises(SpecError, match=said):
        load(where)
