"""dictionary_learning's files: `trainer_N/config.json` with `ae.pt`, or `checkpoints/ae_STEP.pt` below it.

| class | keys | encodes |
|---|---|---|
| AutoEncoder | `bias`, `encoder.weight [latent, d]`, `decoder.weight [d, latent]`, `encoder.bias` | ReLU, subtracted |
| AutoEncoderNew | `decoder.bias` instead of `bias` | ReLU, not subtracted |
| GatedAutoEncoder | `decoder_bias`, `r_mag`, `gate_bias`, `mag_bias` | gated, subtracted |
| AutoEncoderTopK | `b_dec`, `k`, `threshold` | TopK, subtracted; by `use_threshold=True` by its threshold |
| BatchTopKSAE | the same | by its threshold, subtracted |
| MatryoshkaBatchTopKSAE | `W_enc [d, latent]`, `W_dec`, `b_enc`, `b_dec`, `k`, `threshold`, `group_sizes` | the same |
| JumpReluAutoEncoder | `W_enc`, `W_dec`, `b_enc`, `b_dec`, `threshold` | by its thresholds, not subtracted |

"Subtracted" is said of the decoder bias, before encoding. `.pt` files are read as plain tensors; nothing in them is
executed. Checked against dictionary-learning 0.1.0.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from assay.base.artifacts import atomic_write_json
from assay.base.errors import DamagedFile, SpecError
from assay.dictionaries.activations import Activation, Gated, JumpReLU, ReLU, TopK
from assay.dictionaries.dictionary import Card, Dictionary
from assay.dictionaries.formats.format import (
    Format,
    check_shapes,
    pickle_keys,
    plain,
    read_json,
    read_pickle,
    save_pickle,
    staged,
    take,
    value,
)
from assay.dictionaries.formats.sites import (
    cannot_hold,
    card_sites,
    centred,
    from_hook,
    layer_of,
    refuse_normalised,
    single,
)

_FILE, _JSON = "ae.pt", "config.json"
_LINEAR = ("encoder.weight", "decoder.weight")
_UNTRANSPOSED = ("W_enc", "W_dec", "b_enc", "b_dec")
_CLASSES: dict[str, tuple[str, ...]] = {
    "AutoEncoder": (*_LINEAR, "encoder.bias", "bias"),
    "AutoEncoderNew": (*_LINEAR, "encoder.bias", "decoder.bias"),
    "GatedAutoEncoder": (*_LINEAR, "decoder_bias", "r_mag", "gate_bias", "mag_bias"),
    "AutoEncoderTopK": (*_LINEAR, "encoder.bias", "b_dec", "k", "threshold"),
    "BatchTopKSAE": (*_LINEAR, "encoder.bias", "b_dec", "k", "threshold"),
    "MatryoshkaBatchTopKSAE": (*_UNTRANSPOSED, "k", "threshold", "group_sizes"),
    "JumpReluAutoEncoder": (*_UNTRANSPOSED, "threshold"),
}
_FAMILIES = {
    "AutoEncoder": "l1",
    "AutoEncoderNew": "l1",
    "GatedAutoEncoder": "gated",
    "AutoEncoderTopK": "topk",
    "BatchTopKSAE": "batchtopk",
    "MatryoshkaBatchTopKSAE": "matryoshka",
    "JumpReluAutoEncoder": "jumprelu",
}
_CENTRED = {"AutoEncoder", "GatedAutoEncoder", "AutoEncoderTopK", "BatchTopKSAE", "MatryoshkaBatchTopKSAE"}
_REFUSED = {"CrossCoder": "its latents have a decoder a layer", "IdentityDict": "it has no weights"}
_SUBMODULE = re.compile(
    r"(?P<point>resid_pre|resid_mid|resid_post|resid|mlp_out|attn_out|mlp|attention)_layer_?(?P<n>\d+)"
)
_POINTS = {
    "resid": "resid_post",
    "mlp": "mlp.out",
    "mlp_out": "mlp.out",
    "attn_out": "attn.out",
    "attention": "attn.out",
}


def _file(path: Path) -> Path:
    return path / _FILE if path.is_dir() else path


def _recognises(path: Path) -> bool:
    file = _file(path)
    if file.name == _FILE and file.is_file():
        return True
    held = pickle_keys(file)
    return bool(held) and any(set(names) == held for names in _CLASSES.values())


def _read(
    path: Path,
    site: str | None = None,
    writes: str | None = None,
    dict_class: str | None = None,
    use_threshold: bool = False,
) -> Dictionary:
    """Read one.

    Args:
        path: The folder of `ae.pt`, or a `.pt` file.
        site: Where it reads, where the configuration does not say.
        writes: Where it writes, if elsewhere.
        dict_class: Its class, where there is no configuration and its keys leave two.
        use_threshold: Read an AutoEncoderTopK as its `encode(use_threshold=True)`.
    """
    file = _file(path)
    config = _config(file)
    trainer = value(config, "trainer", dict, where=file, default={})
    held = read_pickle(file)
    if not isinstance(held, Mapping) or not all(isinstance(value, Tensor) for value in held.values()):
        raise DamagedFile(f"{str(file)!r} holds {type(held).__name__} and should hold tensors by name")
    kind = _class(dict_class or value(trainer, "dict_class", str, where=file, default=""), held, file)
    found = take(held, _CLASSES[kind], where=file)
    sizes = _check(found, file)
    for name, size in {"activation_dim": sizes["d"], "dict_size": sizes["latents"]}.items():
        if value(trainer, name, int, where=file, default=size) != size:
            raise SpecError(f"{str(file)!r} has {name} = {size} and its {_JSON} says {trainer[name]}", name)
    read = site or _site(trainer, file)
    if value(config, "buffer", dict, where=file, default={}).get("io") == "in_and_out" and writes is None:
        raise SpecError(
            f"{str(file)!r} was trained from a module's input to its output; give site=... and writes=...", "writes"
        )
    card = Card(
        **card_sites(read, sizes["d"], writes, sizes["d"]),
        model=str(trainer.get("lm_name") or ""),
        family="p-anneal" if trainer.get("trainer_class") == "PAnnealTrainer" else _FAMILIES[kind],
        centred=kind in _CENTRED,
        source={"format": "dictionary-learning", "class": kind, "config": config},
    )
    return Dictionary(**_weights(found), **_encoder(kind, found, use_threshold, file), card=card)


def _config(file: Path) -> dict[str, Any]:
    for folder in (file.parent, file.parent.parent):
        if (folder / _JSON).is_file() and "trainer" in (config := read_json(folder / _JSON)):
            return config
    return {}


def _class(said: Any, held: Mapping[str, Any], file: Path) -> str:
    if said in _REFUSED:
        raise SpecError(f"{str(file)!r} is a {said}, which is not read: {_REFUSED[said]}", "dict_class")
    if said and said not in _CLASSES:
        raise SpecError(f"{str(file)!r} is a {said!r}; read: {', '.join(_CLASSES)}", "dict_class")
    if said:
        return str(said)
    fitting = [name for name, keys in _CLASSES.items() if set(keys) == set(held)]
    if len(fitting) == 1:
        return fitting[0]
    what = f"could be {' or '.join(fitting)}" if fitting else f"holds {', '.join(sorted(held))}, as no class does"
    raise SpecError(f"{str(file)!r} has no {_JSON} and {what}; give dict_class=...", "dict_class")


def _check(found: Mapping[str, Tensor], file: Path) -> dict[str, int]:
    per_latent = ("encoder.bias", "b_enc", "r_mag", "gate_bias", "mag_bias")
    per_input = ("bias", "decoder.bias", "decoder_bias", "b_dec")
    shapes = {"encoder.weight": "latents d", "decoder.weight": "d latents", "W_enc": "d latents", "W_dec": "latents d"}
    shapes |= dict.fromkeys(per_latent, "latents") | dict.fromkeys(per_input, "d")
    if "threshold" in found:
        shapes["threshold"] = "" if "k" in found else "latents"
    return check_shapes(found, shapes, where=file)


def _site(trainer: Mapping[str, Any], file: Path) -> str:
    name = str(trainer.get("submodule_name") or "")
    if match := _SUBMODULE.fullmatch(name):
        return f"blocks.{match['n']}.{_POINTS.get(match['point'], match['point'])}"
    try:
        return from_hook(name)
    except SpecError:
        raise SpecError(
            f"{str(file)!r} is for the submodule {name or None!r} of layer {trainer.get('layer')!r}, which does not "
            "say whether that is the stream, the MLP or attention; give site=..., such as "
            f"'blocks.{trainer.get('layer', 0)}.resid_post'",
            "site",
        ) from None


def _weights(found: Mapping[str, Tensor]) -> dict[str, Any]:
    bias = next(found[name] for name in ("b_dec", "bias", "decoder.bias", "decoder_bias") if name in found)
    if "W_enc" in found:
        return {"W_enc": found["W_enc"].T.contiguous(), "W_dec": found["W_dec"], "b_dec": bias}
    return {"W_enc": found["encoder.weight"], "W_dec": found["decoder.weight"].T.contiguous(), "b_dec": bias}


def _encoder(kind: str, found: Mapping[str, Tensor], use_threshold: bool, file: Path) -> dict[str, Any]:
    if kind == "GatedAutoEncoder":
        bias, gain = found["gate_bias"], found["r_mag"]
        return {"b_enc": bias, "activation": Gated(log_gain=gain, offset=found["mag_bias"] - gain.exp() * bias)}
    bias = found["b_enc"] if "b_enc" in found else found["encoder.bias"]
    activation: Activation = ReLU()
    if kind == "AutoEncoderTopK" and not use_threshold:
        activation = TopK(k=int(found["k"]))
    elif "threshold" in found:
        threshold = found["threshold"]
        if threshold.ndim == 0 and float(threshold) < 0:
            raise SpecError(
                f"{str(file)!r} has threshold {float(threshold):g}: none was estimated yet, so single rows cannot be "
                "encoded as in training. Train on past threshold_start_step, or give dict_class='AutoEncoderTopK' to "
                "keep k a row",
                "threshold",
            )
        # a trained threshold may be negative; a ReLU follows there, so that is the same as 0
        activation = JumpReLU(threshold=threshold.clamp_min(0).expand(len(bias)).clone())
    return {"b_enc": bias, "activation": activation}


def _write(dictionary: Any, path: Path) -> Path:
    """Write `ae.pt` and `config.json` into the folder `path`."""
    if not isinstance(dictionary, Dictionary):
        raise SpecError("dictionary-learning files hold no cross-layer transcoders; 'circuit-tracer' and 'assay' do")
    read, _ = single(dictionary, "dictionary-learning")
    refuse_normalised(dictionary, "dictionary-learning")
    if dictionary.kind == "transcoder" or dictionary.W_skip is not None:
        raise SpecError(
            "dictionary-learning files hold SAEs without a skip; 'saelens', 'sparsify' and 'assay' hold others"
        )
    kind, state = _state(dictionary)
    trainer: dict[str, Any] = {
        "dict_class": kind,
        "trainer_class": dictionary.card.training.get("trainer_class"),
        "activation_dim": dictionary.card.d_in,
        "dict_size": dictionary.n_latents,
        "layer": layer_of(read.name) if ".layers." in read.name or read.name.startswith("blocks.") else None,
        "lm_name": dictionary.card.model,
        "submodule_name": _submodule(read.name),
    }
    if "k" in state:
        trainer["k"] = int(state["k"])
    buffer = {"io": "out", "ctx_len": dictionary.card.training.get("ctx_len")}  # SAELens looks for it
    held = json.loads(json.dumps({"trainer": trainer, "buffer": buffer}))
    with staged(path) as stage:
        save_pickle({name: plain(tensor) for name, tensor in state.items()}, stage / _FILE)
        atomic_write_json(stage / _JSON, held)
    return path


def _submodule(site: str) -> str:
    names = {"resid_post": "resid_post", "resid_pre": "resid_pre", "mlp.out": "mlp_out", "attn.out": "attn_out"}
    match = re.fullmatch(r"blocks\.(\d+)\.(.+)", site)
    return f"{names[match[2]]}_layer_{match[1]}" if match and match[2] in names else site


def _state(dictionary: Dictionary) -> tuple[str, dict[str, Tensor]]:
    activation = dictionary.activation
    if isinstance(activation, JumpReLU):
        flat = centred(dictionary, False)
        weights = {"W_enc": flat.W_enc.T, "W_dec": flat.W_dec, "b_enc": flat.b_enc, "b_dec": flat.b_dec}
        return "JumpReluAutoEncoder", weights | {"threshold": activation.threshold}
    flat = centred(dictionary, True)
    linear = {"encoder.weight": flat.W_enc, "decoder.weight": flat.W_dec.T}
    if isinstance(activation, Gated):
        bias = activation.offset + activation.log_gain.exp() * flat.b_enc
        own = {"decoder_bias": flat.b_dec, "r_mag": activation.log_gain, "gate_bias": flat.b_enc, "mag_bias": bias}
        return "GatedAutoEncoder", linear | own
    linear["encoder.bias"] = flat.b_enc
    if isinstance(activation, TopK):
        buffers = {"k": torch.tensor(activation.k, dtype=torch.int), "threshold": torch.tensor(-1.0)}
        return "AutoEncoderTopK", linear | {"b_dec": flat.b_dec} | buffers
    if isinstance(activation, ReLU):
        return "AutoEncoder", linear | {"bias": flat.b_dec}
    raise cannot_hold("dictionary-learning", dictionary, "ReLU, Gated, TopK and JumpReLU")


FORMAT = Format(
    name="dictionary-learning",
    about="dictionary_learning: ae.pt and config.json",
    recognises=_recognises,
    read=_read,
    write=_write,
)
