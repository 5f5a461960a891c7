"""Gemma Scope 2's files (Gemma 3): `config.json` and `params.safetensors`, or `params_layer_N.safetensors` for a CLT.

On disk `w_enc [d, latent]`, `w_dec [latent, d]`, `b_enc`, `b_dec`, `threshold` and for some transcoders
`affine_skip_connection [d_in, d_out]`, which multiplies rows from the right: it is transposed here. JumpReLU; the
decoder bias is not subtracted. A cross-layer transcoder has `w_dec [latent, layers, d]`, of which layer `l` uses `l`
and later.
"""

from __future__ import annotations

import re
import warnings
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from assay.base.errors import DamagedFile, SpecError
from assay.dictionaries.activations import JumpReLU, ReLU
from assay.dictionaries.crosslayer import CrossLayer
from assay.dictionaries.dictionary import Card, Dictionary, Site
from assay.dictionaries.formats.format import (
    Format,
    check_keys,
    check_shapes,
    read_json,
    read_tensors,
    take,
    tensor_keys,
    write_folder,
)
from assay.dictionaries.formats.sites import cannot_hold, card_sites, centred, layer_of, refuse_normalised, single

_JSON, _WEIGHTS = "config.json", "params.safetensors"
_NAMES = ("w_enc", "w_dec", "b_enc", "b_dec", "threshold")
_SKIP = "affine_skip_connection"
_OPTIONAL = ("hf_hook_point_in", "hf_hook_point_out", "affine_connection", "width", "l0", "type", "layer", "num_layers")
_HF = re.compile(r"(?:model\.|language_model\.)*layers\.(?P<layer>\d+)\.(?P<rest>.+)")
_POINTS = {
    "output": "resid_post",
    "input": "resid_pre",
    "self_attn.o_proj.input": "attn.z",
    "post_attention_layernorm.output": "attn.out",
    "pre_feedforward_layernorm.output": "mlp.in",
    "post_feedforward_layernorm.output": "mlp.out",
}


def _layers(path: Path) -> list[Path]:
    """The files of a cross-layer transcoder, in order."""
    found = {int(m[1]): p for p in path.glob("params_layer_*.safetensors") if (m := re.search(r"(\d+)$", p.stem))}
    if found and sorted(found) != list(range(len(found))):
        raise DamagedFile(f"{str(path)!r} has params_layer_N files for {sorted(found)}; layers from 0 on are needed")
    return [found[index] for index in range(len(found))]


def _recognises(path: Path) -> bool:
    if path.is_dir():
        if (path / "params_layer_0.safetensors").is_file():
            return True
        path = path / _WEIGHTS
    return set(_NAMES) <= tensor_keys(path) or (path.name == _WEIGHTS and path.is_file())


def _read(
    path: Path, site: str | None = None, writes: str | None = None, ignore: Collection[str] = ()
) -> Dictionary | CrossLayer:
    """Read one.

    Args:
        path: The folder, or the file of weights.
        site: Where it reads, where `config.json` is absent.
        writes: Where it writes, if elsewhere.
        ignore: Names of the configuration to pass over.
    """
    folder = path if path.is_dir() else path.parent
    config: dict[str, Any] = read_json(folder / _JSON) if (folder / _JSON).is_file() else {}
    if config:
        check_keys(config, ("architecture",), ("model_name", *_OPTIONAL), where=folder / _JSON, ignore=ignore)
        if config["architecture"] != "jump_relu":
            said = config["architecture"]
            raise SpecError(f"{str(folder / _JSON)!r} has architecture {said!r}; read: jump_relu", "architecture")
    source = {"format": "gemma-scope-2", "config": config}
    about: dict[str, Any] = {"model": str(config.get("model_name") or ""), "family": "jumprelu", "source": source}
    if path.is_dir() and (files := _layers(path)):
        return _cross_layer(files, about)
    file = path if path.is_file() else path / _WEIGHTS
    found = take(read_tensors(file), _NAMES, [_SKIP], where=file)
    sizes = check_shapes(found, _shapes("latents d_out"), where=file)
    read = site or _from_hf(config.get("hf_hook_point_in"), "site")
    written = writes
    if written is None and site is None and config.get("hf_hook_point_out"):
        written = _from_hf(config["hf_hook_point_out"], "writes")
    card = Card(**card_sites(read, sizes["d_in"], written, sizes["d_out"]), **about)
    skip = found[_SKIP].T.contiguous() if _SKIP in found else None
    return Dictionary(**_weights(found), W_dec=found["w_dec"], b_dec=found["b_dec"], W_skip=skip, card=card)


def _shapes(decoder: str) -> dict[str, str]:
    shapes = {"w_enc": "d_in latents", "b_enc": "latents", "threshold": "latents", "b_dec": "d_out"}
    return shapes | {"w_dec": decoder, _SKIP: "d_in d_out"}


def _weights(found: Mapping[str, Tensor]) -> dict[str, Any]:
    activation = JumpReLU(threshold=found["threshold"])
    return {"W_enc": found["w_enc"].T.contiguous(), "b_enc": found["b_enc"], "activation": activation}


def _cross_layer(files: list[Path], about: Mapping[str, Any]) -> CrossLayer:
    layers = []
    for index, file in enumerate(files):
        found = take(read_tensors(file), _NAMES, [_SKIP], where=file)
        sizes = check_shapes(found, _shapes("latents layers d_out"), where=file)
        if sizes["layers"] != len(files):
            raise SpecError(
                f"'w_dec' of {str(file)!r} writes {sizes['layers']} layers and there are {len(files)}", "w_dec"
            )
        if bool(found["w_dec"][:, :index].any()):
            warnings.warn(f"{str(file)!r} has weights for layers before its own, which nothing uses", stacklevel=4)
        width, later = sizes["d_out"], len(files) - index
        bias = torch.cat([found["b_dec"], torch.zeros((later - 1) * width)])
        skip = None
        if _SKIP in found:
            skip = torch.zeros(later * width, sizes["d_in"])
            skip[:width] = found[_SKIP].T
        card = Card(
            reads=(Site(f"blocks.{index}.mlp.in", sizes["d_in"]),),
            writes=tuple(Site(f"blocks.{m}.mlp.out", width) for m in range(index, len(files))),
            **about,
        )
        decoder = found["w_dec"][:, index:].flatten(1).contiguous()
        layers.append(Dictionary(**_weights(found), W_dec=decoder, b_dec=bias, W_skip=skip, card=card))
    return CrossLayer(layers=tuple(layers))


def _from_hf(name: Any, option: str) -> str:
    match = _HF.fullmatch(str(name)) if name else None
    if match is None or match["rest"] not in _POINTS:
        raise SpecError(f"the file is for {name!r}, which is not known here; give {option}=...", option)
    return f"blocks.{match['layer']}.{_POINTS[match['rest']]}"


def _to_hf(site: str, given: str | None, option: str) -> str:
    if given is not None:
        return given
    point = site.split(".", 2)[-1]
    names = {value: key for key, value in _POINTS.items()} | {"norm2": "pre_feedforward_layernorm.output"}
    if not site.startswith("blocks.") or point not in names:
        raise SpecError(f"gemma-scope-2 has no name for {site!r}; give {option}=...", option)
    return f"model.layers.{layer_of(site)}.{names[point]}"


def _write(
    dictionary: Any, path: Path, hf_hook_point_in: str | None = None, hf_hook_point_out: str | None = None
) -> Path:
    """Write a dictionary, or a cross-layer transcoder.

    Args:
        dictionary: JumpReLU or ReLU, of one site.
        path: The folder.
        hf_hook_point_in: What the site it reads is called, where there is no name for it.
        hf_hook_point_out: The same for the site it writes.
    """
    if isinstance(dictionary, CrossLayer):
        held = {
            f"params_layer_{i}.safetensors": _layer(part, i, len(dictionary.layers))
            for i, part in enumerate(dictionary.layers)
        }
        first = dictionary.layers[0]
        config = _config(first, [first.card.reads[0].name, first.card.writes[0].name])
        return write_folder(path, held, {_JSON: config | {"type": "clt"}})
    read, written = single(dictionary, "gemma-scope-2")
    flat, tensors = _tensors(dictionary)
    names = [
        _to_hf(read.name, hf_hook_point_in, "hf_hook_point_in"),
        _to_hf(written.name, hf_hook_point_out, "hf_hook_point_out"),
    ]
    config = {
        "architecture": "jump_relu",
        "model_name": flat.card.model,
        "hf_hook_point_in": names[0],
        "hf_hook_point_out": names[1],
        "affine_connection": flat.W_skip is not None,
        "width": flat.n_latents,
    }
    return write_folder(path, {_WEIGHTS: tensors}, {_JSON: config})


def _config(first: Dictionary, sites: list[str]) -> dict[str, Any]:
    names = {"hf_hook_point_in": _to_hf(sites[0], None, "site"), "hf_hook_point_out": _to_hf(sites[1], None, "writes")}
    return {"architecture": "jump_relu", "model_name": first.card.model, **names, "width": first.n_latents}


def _tensors(dictionary: Dictionary) -> tuple[Dictionary, dict[str, Tensor]]:
    refuse_normalised(dictionary, "gemma-scope-2")
    if not isinstance(dictionary.activation, ReLU | JumpReLU):
        raise cannot_hold("gemma-scope-2", dictionary, "JumpReLU (and ReLU, as a threshold of 0)")
    flat = centred(dictionary, False)
    zeros = torch.zeros_like(flat.b_enc)
    threshold = flat.activation.threshold if isinstance(flat.activation, JumpReLU) else zeros
    tensors = {
        "w_enc": flat.W_enc.T,
        "w_dec": flat.W_dec,
        "b_enc": flat.b_enc,
        "b_dec": flat.b_dec,
        "threshold": threshold,
    }
    if flat.W_skip is not None:
        tensors[_SKIP] = flat.W_skip.T
    return flat, tensors


def _layer(layer: Dictionary, index: int, count: int) -> dict[str, Tensor]:
    """One layer's tensors, with zeros for the layers before it."""
    _, tensors = _tensors(layer)
    expected = [f"blocks.{index}.mlp.in", f"blocks.{index}.mlp.out"]
    if [layer.card.reads[0].name, layer.card.writes[0].name] != expected:
        raise SpecError(
            f"layer {index} is for {layer.site} and {layer.card.writes[0].name}; a gemma-scope-2 cross-layer "
            f"transcoder is for {expected[0]} and {expected[1]}",
            "site",
        )
    width = layer.card.writes[0].width
    decoder = torch.zeros(layer.n_latents, count, width)
    decoder[:, index:] = layer.W_dec.detach().cpu().reshape(layer.n_latents, -1, width)
    tensors |= {"w_dec": decoder, "b_dec": layer.b_dec[:width]}
    if _SKIP in tensors:
        if bool(tensors[_SKIP][:, width:].any()):
            raise SpecError(
                f"layer {index} has a skip to a later layer, which gemma-scope-2 files cannot hold", "W_skip"
            )
        tensors[_SKIP] = tensors[_SKIP][:, :width]
    return tensors


FORMAT = Format(
    name="gemma-scope-2",
    about="Gemma Scope 2 (Gemma 3): config.json with params.safetensors, or params_layer_N.safetensors",
    recognises=_recognises,
    read=_read,
    write=_write,
)
