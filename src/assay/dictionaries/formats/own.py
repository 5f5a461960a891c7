"""assay's own files: a folder with `dictionary.json` (card, nonlinearity) and `dictionary.safetensors` (weights).

A cross-layer transcoder is a folder with `crosslayer.json` and one such folder for each layer. The weights are written
first and the JSON, which holds their SHA-256, last: a folder without its JSON is not a dictionary yet.
"""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

from assay.base.artifacts import atomic_write_json, write_safetensors
from assay.base.errors import DamagedFile, SpecError, nearest
from assay.base.hashing import file_sha256
from assay.dictionaries.activations import Activation, Gated, GroupMax, JumpReLU, ReLU, TopK
from assay.dictionaries.crosslayer import CrossLayer
from assay.dictionaries.dictionary import Card, Dictionary, Site
from assay.dictionaries.formats.format import Format, read_json, read_tensors, staged, take

_SCHEMA = "assay-dictionary/1"
_CROSS_LAYER = "assay-cross-layer/1"
_JSON, _WEIGHTS, _LAYERS = "dictionary.json", "dictionary.safetensors", "crosslayer.json"
_ACTIVATIONS: dict[str, Any] = {
    "relu": ReLU,
    "topk": TopK,
    "jumprelu": JumpReLU,
    "gated": Gated,
    "groupmax": GroupMax,
}


def _recognises(path: Path) -> bool:
    return path.is_dir() and ((path / _JSON).is_file() or (path / _LAYERS).is_file())


def _write(dictionary: Dictionary | CrossLayer, path: Path) -> Path:
    with staged(path) as stage:
        if isinstance(dictionary, CrossLayer):
            for index, layer in enumerate(dictionary.layers):
                _write_one(layer, stage / f"layer_{index}")
            atomic_write_json(stage / _LAYERS, {"schema": _CROSS_LAYER, "layers": len(dictionary.layers)})
        else:
            _write_one(dictionary, stage)
    return path


def _write_one(dictionary: Dictionary, path: Path) -> None:
    arrays = {name: tensor.detach().cpu().float().numpy() for name, tensor in dictionary.tensors().items()}
    write_safetensors(path / _WEIGHTS, arrays)
    card = dataclasses.asdict(dictionary.card)
    document = {
        "schema": _SCHEMA,
        "activation": {"name": dictionary.activation.name, **dictionary.activation.settings()},
        "card": card,
        "weights": {"file": _WEIGHTS, "sha256": file_sha256(path / _WEIGHTS)},
    }
    atomic_write_json(path / _JSON, document)


def _read(path: Path) -> Dictionary | CrossLayer:
    if (path / _LAYERS).is_file():
        document = read_json(path / _LAYERS)
        if document.get("schema") != _CROSS_LAYER:
            raise SpecError(
                f"{path / _LAYERS} has schema {document.get('schema')!r}; this assay reads {_CROSS_LAYER!r}"
            )
        return CrossLayer(layers=tuple(_read_one(path / f"layer_{i}") for i in range(int(document["layers"]))))
    return _read_one(path)


def _read_one(path: Path) -> Dictionary:
    document = read_json(path / _JSON)
    if document.get("schema") != _SCHEMA:
        raise SpecError(f"{str(path / _JSON)!r} has schema {document.get('schema')!r}; this assay reads {_SCHEMA!r}")
    weights = path / _WEIGHTS
    if not weights.is_file():
        raise DamagedFile(f"{str(path)!r} has no {_WEIGHTS}; its weights are missing")
    if file_sha256(weights) != document["weights"]["sha256"]:
        raise DamagedFile(f"{str(weights)!r} does not have the hash that {_JSON} gives it: it was changed or cut short")
    kind = _activation_class(document["activation"]["name"], path)
    settings = {name: value for name, value in document["activation"].items() if name != "name"}
    own = [f.name for f in dataclasses.fields(kind) if f.name not in {"name", *settings}]
    found = take(read_tensors(weights), ["W_enc", "b_enc", "W_dec", "b_dec", *own], ["W_skip"], where=weights)
    activation: Activation = kind(**settings, **{name: found.pop(name) for name in own})
    return Dictionary(**found, activation=activation, card=_card(document["card"], path))


def _activation_class(name: str, path: Path) -> Any:
    if name not in _ACTIVATIONS:
        raise SpecError(
            f"{str(path)!r} has activation {name!r}{nearest(name, _ACTIVATIONS)}; known: {', '.join(_ACTIVATIONS)}"
        )
    return _ACTIVATIONS[name]


def _card(document: dict[str, Any], path: Path) -> Card:
    known = {f.name for f in dataclasses.fields(Card)}
    for name in document:
        if name not in known:
            raise SpecError(
                f"the card of {str(path)!r} has {name!r}, which means nothing here{nearest(name, known)}", name
            )
    sites = {name: tuple(Site(**site) for site in document[name]) for name in ("reads", "writes")}
    return Card(**{**document, **sites})


FORMAT = Format(
    name="assay",
    about="assay's own: a folder with dictionary.json and dictionary.safetensors",
    recognises=_recognises,
    read=_read,
    write=_write,
)
