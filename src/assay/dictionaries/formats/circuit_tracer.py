"""circuit-tracer's files: `layer_N.safetensors` a layer, or `W_enc_N` and `W_dec_N` files of a cross-layer transcoder.

A transcoder has `W_enc [latent, d]` and `W_dec [latent, d]`, neither transposed, `b_enc`, `b_dec`, for a JumpReLU
`activation_function.threshold`, for a TopK `k`, for a skip `W_skip [d_out, d_in]`. A cross-layer transcoder has
`W_enc_N`, `b_enc_N`, `b_dec_N` and maybe `threshold_N` in one file a layer and `W_dec_N [latent, layers - N, d]` in
another. `config.yaml` beside them names the hooks. The bias is not subtracted. Checked against circuit-tracer 0.5.0.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from assay.base.artifacts import atomic_write_text, write_safetensors
from assay.base.errors import DamagedFile, SpecError
from assay.dictionaries.activations import Activation, JumpReLU, ReLU, TopK
from assay.dictionaries.crosslayer import CrossLayer
from assay.dictionaries.dictionary import Card, Dictionary, Site
from assay.dictionaries.formats.format import Format, check_shapes, plain, read_tensors, staged, take, tensor_keys
from assay.dictionaries.formats.sites import (
    cannot_hold,
    card_sites,
    centred,
    from_hook,
    layer_of,
    refuse_normalised,
    single,
    to_hook,
)

_YAML = "config.yaml"
_NAMES = ("W_enc", "W_dec", "b_enc", "b_dec")
_THRESHOLD = "activation_function.threshold"


def _files(path: Path) -> list[Path]:
    return sorted(path.glob("layer_*.safetensors"), key=_number)


def _number(path: Path) -> int:
    found = re.search(r"(\d+)$", path.stem)
    return int(found[1]) if found else -1


def _recognises(path: Path) -> bool:
    if path.is_dir():
        return (path / "W_enc_0.safetensors").is_file() or any(set(_NAMES) <= tensor_keys(p) for p in _files(path)[:1])
    return set(_NAMES) <= tensor_keys(path)


def _read(
    path: Path,
    layer: int | None = None,
    site: str | None = None,
    writes: str | None = None,
    k: int | None = None,
) -> Dictionary | CrossLayer:
    """Read a transcoder, or a cross-layer transcoder.

    Args:
        path: A `layer_N.safetensors`, a folder of them, or a folder of `W_enc_N` and `W_dec_N`.
        layer: Which layer of a folder of transcoders.
        site: Where it reads, where there is no `config.yaml`; with `*` for the layer in a cross-layer transcoder.
        writes: Where it writes, likewise.
        k: How many latents a row keeps, for a TopK whose file and configuration do not say.
    """
    if (path / "W_enc_0.safetensors").is_file():
        return _cross_layer(path, site, writes)
    if path.is_dir():
        held = {_number(file): file for file in _files(path)}
        if layer is None and len(held) > 1:
            raise SpecError(f"{str(path)!r} has transcoders for layers {sorted(held)}; give layer=...", "layer")
        if layer is not None and layer not in held:
            raise SpecError(f"{str(path)!r} has no layer {layer}; it has {sorted(held)}", "layer")
        path = held[layer] if layer is not None else next(iter(held.values()))
    return _one(path, site, writes, k)


def _one(file: Path, site: str | None, writes: str | None, k: int | None) -> Dictionary:
    config = _yaml(file.parent / _YAML)
    found = take(read_tensors(file), _NAMES, [_THRESHOLD, "W_skip", "k"], where=file)
    shapes = {"W_enc": "latents d_in", "W_dec": "latents d_out", "b_enc": "latents", "b_dec": "d_out"}
    sizes = check_shapes(found, shapes | {_THRESHOLD: "latents", "W_skip": "d_out d_in"}, where=file)
    read, written = (_hook(config, name, _number(file)) for name in ("feature_input_hook", "feature_output_hook"))
    read, written = site or read, writes or written
    if read is None or written is None:
        raise SpecError(f"{str(file)!r} has no {_YAML} that names its hooks; give site=... and writes=...", "site")
    activation = _activation(config, found, k)
    return Dictionary(
        **{name: found[name] for name in _NAMES},
        W_skip=found.get("W_skip"),
        activation=activation,
        card=Card(
            **card_sites(read, sizes["d_in"], written, sizes["d_out"]),
            model=str(config.get("model_name") or ""),
            family={"relu": "l1"}.get(activation.name, activation.name),
            source={"format": "circuit-tracer", "config": config},
        ),
    )


def _activation(config: Mapping[str, Any], found: Mapping[str, Tensor], k: int | None) -> Activation:
    if _THRESHOLD in found:
        return JumpReLU(threshold=found[_THRESHOLD])
    if k is not None or "k" in found or config.get("activation") == "topk":
        count = k if k is not None else found["k"] if "k" in found else config.get("k")
        if count is None:
            raise SpecError("the configuration says topk and neither it nor the file says k; give k=...", "k")
        return TopK(k=int(count))
    if config.get("activation") not in (None, "relu"):
        raise SpecError(f"activation is {config['activation']!r} and the file has no {_THRESHOLD!r}", "activation")
    return ReLU()


def _yaml(path: Path) -> dict[str, Any]:
    """The plain values of a flat YAML file: names and scalars on lines of their own; lists are passed over."""
    if not path.is_file():
        return {}
    config: dict[str, Any] = {}
    for line in path.read_text("utf-8", errors="replace").splitlines():
        if match := re.fullmatch(r"(\w+):\s+([^#]*?)\s*(?:#.*)?", line):
            text = match[2]
            try:
                config[match[1]] = json.loads(text)
            except ValueError:
                config[match[1]] = text.strip("'\"")
    return config


def _hook(config: Mapping[str, Any], name: str, layer: int) -> str | None:
    return from_hook(f"blocks.{layer}.{config[name]}") if config.get(name) and layer >= 0 else None


def _cross_layer(path: Path, site: str | None, writes: str | None) -> CrossLayer:
    config, count = _yaml(path / _YAML), len(list(path.glob("W_enc_*.safetensors")))
    names = [_names(config, count, given, option) for given, option in ((site, "site"), (writes, "writes"))]
    layers = []
    for index in range(count):
        encoder, decoder = path / f"W_enc_{index}.safetensors", path / f"W_dec_{index}.safetensors"
        if not (encoder.is_file() and decoder.is_file()):
            raise DamagedFile(f"{str(path)!r} has {count} layers and not both files of layer {index}")
        keys = [f"W_enc_{index}", f"b_enc_{index}", f"b_dec_{index}"]
        found = take(read_tensors(encoder), keys, [f"threshold_{index}"], where=encoder)
        found |= take(read_tensors(decoder), [f"W_dec_{index}"], where=decoder)
        shapes = dict(zip(keys, ("latents d_in", "latents", "d_out"), strict=True))
        shapes |= {f"threshold_{index}": "latents", f"W_dec_{index}": "latents later d_out"}
        sizes = check_shapes(found, shapes, where=path)
        if sizes["later"] != count - index:
            raise SpecError(
                f"'W_dec_{index}' of {str(path)!r} writes {sizes['later']} layers, and from {index} on there are "
                f"{count - index}",
                f"W_dec_{index}",
            )
        width, threshold = sizes["d_out"], found.get(f"threshold_{index}")
        card = Card(
            reads=(Site(names[0][index], sizes["d_in"]),),
            writes=tuple(Site(name, width) for name in names[1][index:]),
            model=str(config.get("model_name") or ""),
            family="jumprelu" if threshold is not None else "l1",
            source={"format": "circuit-tracer", "config": config},
        )
        layers.append(
            Dictionary(
                W_enc=found[keys[0]],
                b_enc=found[keys[1]],
                W_dec=found[f"W_dec_{index}"].flatten(1).contiguous(),
                b_dec=torch.cat([found[keys[2]], torch.zeros((count - index - 1) * width)]),
                activation=ReLU() if threshold is None else JumpReLU(threshold=threshold),
                card=card,
            )
        )
    return CrossLayer(layers=tuple(layers))


def _names(config: Mapping[str, Any], count: int, given: str | None, option: str) -> list[str]:
    """The site of each layer."""
    key = {"site": "feature_input_hook", "writes": "feature_output_hook"}[option]
    if given is not None and "*" not in given:
        raise SpecError(f"{option} is {given!r}; a cross-layer transcoder needs a '*' for the layer", option)
    if given is None and not config.get(key):
        raise SpecError(
            f"there is no {_YAML} that names {key}; give {option}=..., such as 'blocks.*.resid_mid'", option
        )
    if given is not None:
        return [given.replace("*", str(index)) for index in range(count)]
    return [from_hook(f"blocks.{index}.{config[key]}") for index in range(count)]


def _write(dictionary: Any, path: Path) -> Path:
    """Write `layer_N.safetensors` or a cross-layer transcoder's files, and `config.yaml`, into the folder `path`.

    Layers of one model go into one folder, one call each.
    """
    if isinstance(dictionary, CrossLayer):
        return _write_cross_layer(dictionary, path)
    read, written = single(dictionary, "circuit-tracer")
    flat = _fits(dictionary)
    if dictionary.kind != "transcoder":
        raise SpecError(
            "circuit-tracer files hold transcoders, and this is an SAE; 'saelens' and 'assay' hold it", "format"
        )
    if layer_of(read.name) != layer_of(written.name):
        raise SpecError(
            f"circuit-tracer's transcoders stay in one layer, and this one goes {read.name} -> {written.name}"
        )
    tensors = {"W_enc": flat.W_enc, "W_dec": flat.W_dec, "b_enc": flat.b_enc, "b_dec": flat.b_dec}
    if isinstance(flat.activation, JumpReLU):
        tensors[_THRESHOLD] = flat.activation.threshold
    if flat.W_skip is not None:
        tensors["W_skip"] = flat.W_skip
    hooks = [_short(to_hook(site.name)[0]) for site in (read, written)]
    extra = {"activation": "topk", "k": flat.activation.k} if isinstance(flat.activation, TopK) else {}
    if isinstance(flat.activation, ReLU):
        extra = {"activation": "relu"}
    text = _config_text("transcoder_set", hooks, flat.card.model, extra)
    if (path / _YAML).is_file() and (path / _YAML).read_text("utf-8") != text:
        raise SpecError(
            f"{str(path / _YAML)!r} is for other hooks, another model or another activation; choose another folder"
        )
    with staged(path) as stage:
        arrays = {name: plain(tensor).numpy() for name, tensor in tensors.items()}
        write_safetensors(stage / f"layer_{layer_of(read.name)}.safetensors", arrays)
        atomic_write_text(stage / _YAML, text)
    return path


def _fits(dictionary: Dictionary) -> Dictionary:
    refuse_normalised(dictionary, "circuit-tracer")
    if not isinstance(dictionary.activation, ReLU | JumpReLU | TopK):
        raise cannot_hold("circuit-tracer", dictionary, "ReLU, JumpReLU and TopK")
    return centred(dictionary, False)


def _short(hook: str) -> str:
    return hook.split(".", 2)[2] if hook.startswith("blocks.") else hook


def _config_text(kind: str, hooks: list[str], model: str, extra: Mapping[str, Any]) -> str:
    names = {"feature_input_hook": hooks[0], "feature_output_hook": hooks[1]}
    values = {"model_kind": kind, **names, "model_name": model, **extra}
    return "".join(f"{name}: {json.dumps(value)}\n" for name, value in values.items())


def _write_cross_layer(transcoder: CrossLayer, path: Path) -> Path:
    hooks = []
    parts: dict[str, dict[str, Tensor]] = {}
    for index, layer in enumerate(transcoder.layers):
        flat, width = _fits(layer), layer.card.writes[0].width
        if isinstance(flat.activation, TopK) or flat.W_skip is not None:
            raise SpecError(
                "circuit-tracer's cross-layer files hold neither TopK nor a skip; 'assay' holds both", "format"
            )
        if {layer_of(layer.site), layer_of(layer.card.writes[0].name)} != {index}:
            raise SpecError(f"layer {index} is for {layer.site}; circuit-tracer counts layers from 0", "layers")
        hooks.append(tuple(_short(to_hook(site.name)[0]) for site in (layer.card.reads[0], layer.card.writes[0])))
        encoder = {f"W_enc_{index}": flat.W_enc, f"b_enc_{index}": flat.b_enc, f"b_dec_{index}": flat.b_dec[:width]}
        if isinstance(flat.activation, JumpReLU):
            encoder[f"threshold_{index}"] = flat.activation.threshold
        parts[f"W_enc_{index}"] = encoder
        parts[f"W_dec_{index}"] = {f"W_dec_{index}": flat.W_dec.reshape(flat.n_latents, -1, width)}
    if len(set(hooks)) != 1:
        raise SpecError(
            f"layers have different hooks: {sorted(set(hooks))}; circuit-tracer names one for all", "layers"
        )
    with staged(path) as stage:
        for name, tensors in parts.items():
            write_safetensors(stage / f"{name}.safetensors", {key: plain(t).numpy() for key, t in tensors.items()})
        model = transcoder.layers[0].card.model
        atomic_write_text(stage / _YAML, _config_text("cross_layer_transcoder", list(hooks[0]), model, {}))
    return path


FORMAT = Format(
    name="circuit-tracer",
    about="circuit-tracer: layer_N.safetensors, or W_enc_N and W_dec_N of a cross-layer transcoder, and config.yaml",
    recognises=_recognises,
    read=_read,
    write=_write,
)
