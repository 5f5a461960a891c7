"""sparsify's files: a folder named like the module, with `cfg.json` and `sae.safetensors`.

On disk `encoder.weight [latent, d]`, `encoder.bias`, `W_dec [latent, d]` (not transposed), `b_dec`, `W_skip [d, d]`.
TopK or GroupMax after ReLU. The decoder bias is subtracted before encoding unless `transcode` is true. `multi_topk` is
a loss and changes nothing that a trained dictionary computes. Checked against eai-sparsify 1.3.3.
"""

from __future__ import annotations

from collections.abc import Collection
from pathlib import Path
from typing import Any

from assay.base.errors import SpecError
from assay.dictionaries.activations import Activation, GroupMax, TopK
from assay.dictionaries.dictionary import Card, Dictionary
from assay.dictionaries.formats.format import (
    Format,
    check_keys,
    check_shapes,
    read_json,
    read_tensors,
    take,
    value,
    write_folder,
)
from assay.dictionaries.formats.sites import (
    cannot_hold,
    card_sites,
    centred,
    from_module,
    refuse_normalised,
    single,
    to_module,
)

_JSON, _WEIGHTS, _RUN = "cfg.json", "sae.safetensors", "config.json"
_NAMES = ("encoder.weight", "encoder.bias", "W_dec", "b_dec")
_KNOWN = (
    "k", "activation", "expansion_factor", "normalize_decoder", "num_latents", "multi_topk", "skip_connection",
    "transcode", "signed",
)  # fmt: skip


def _recognises(path: Path) -> bool:
    folder = path.parent if path.name == _WEIGHTS else path
    return (folder / _JSON).is_file() and (folder / _WEIGHTS).is_file()


def _read(path: Path, site: str | None = None, writes: str | None = None, ignore: Collection[str] = ()) -> Dictionary:
    """Read one.

    Args:
        path: The folder, whose name is the module's.
        site: Where it reads, where the folder's name does not say.
        writes: Where a transcoder writes, likewise.
        ignore: Names of the configuration to pass over.
    """
    folder = path.parent if path.name == _WEIGHTS else path
    config, where = read_json(folder / _JSON), folder / _WEIGHTS
    check_keys(config, ("d_in", "k"), _KNOWN, where=folder / _JSON, ignore=ignore)
    if config.get("signed"):
        raise SpecError(f"{str(folder)!r} keeps negative activations (signed), which is not read", "signed")
    found = take(read_tensors(where), _NAMES, ["W_skip"], where=where)
    shapes = {"encoder.weight": "latents d", "encoder.bias": "latents", "W_dec": "latents d", "b_dec": "d"}
    sizes = check_shapes(found, shapes | {"W_skip": "d d"}, where=where)
    if value(config, "d_in", int, where=folder / _JSON) != sizes["d"]:
        raise SpecError(
            f"'encoder.weight' of {str(where)!r} reads {sizes['d']} and {_JSON} says {config['d_in']}", "d_in"
        )
    if bool(config.get("skip_connection")) != ("W_skip" in found):
        raise SpecError(f"{str(where)!r} and {_JSON} disagree on whether there is a W_skip", "W_skip")
    run = read_json(folder.parent / _RUN) if (folder.parent / _RUN).is_file() else {}
    model, transcode = str(run.get("model") or ""), bool(config.get("transcode"))
    read, written = _sites(folder.absolute().name, model, transcode, site, writes)
    activation = _activation(config)
    return Dictionary(
        W_enc=found["encoder.weight"],
        b_enc=found["encoder.bias"],
        W_dec=found["W_dec"],
        b_dec=found["b_dec"],
        W_skip=found.get("W_skip"),
        activation=activation,
        card=Card(
            **card_sites(read, sizes["d"], written, sizes["d"]),
            model=model,
            family=activation.name,
            centred=not transcode,
            source={"format": "sparsify", "config": config},
        ),
    )


def _activation(config: dict[str, Any]) -> Activation:
    kind = value(config, "activation", str, where=Path(_JSON), default="topk")
    if kind not in {"topk", "groupmax"}:
        raise SpecError(f"activation is {kind!r}; read: topk, groupmax", "activation")
    return TopK(k=config["k"]) if kind == "topk" else GroupMax(k=config["k"])


def _sites(hookpoint: str, model: str, transcode: bool, site: str | None, writes: str | None) -> tuple[str, str | None]:
    if not transcode:
        return site or from_module(hookpoint, model), writes
    if site is not None and writes is None:
        raise SpecError("it is a transcoder, and site= says only where it reads; give writes=... too", "writes")
    return site or from_module(hookpoint, model, reads=True), writes or from_module(hookpoint, model)


def _write(dictionary: Any, path: Path, hookpoint: str | None = None, architecture: str = "llama") -> Path:
    """Write one into a folder named like its module, below `path` unless that has the name already.

    Args:
        dictionary: TopK or GroupMax, as wide in as out.
        path: The folder of the run.
        hookpoint: The module's name, where the site it writes does not give it.
        architecture: How modules are called: "llama", "gpt2" or "gpt_neox".
    """
    if not isinstance(dictionary, Dictionary):
        raise SpecError("sparsify files hold no cross-layer transcoders; 'circuit-tracer' and 'assay' do", "format")
    _, written = single(dictionary, "sparsify")
    refuse_normalised(dictionary, "sparsify")
    if not isinstance(dictionary.activation, TopK | GroupMax):
        raise cannot_hold("sparsify", dictionary, "TopK and GroupMax")
    if dictionary.card.d_in != dictionary.card.d_out:
        raise SpecError(
            "sparsify files hold dictionaries that are as wide in as out; 'saelens' and 'assay' hold others"
        )
    transcode = dictionary.kind == "transcoder"
    flat = centred(dictionary, not transcode)
    config = {
        "activation": dictionary.activation.name,
        "expansion_factor": max(1, flat.n_latents // flat.card.d_in),
        "normalize_decoder": False,
        "num_latents": flat.n_latents,
        "k": dictionary.activation.k,
        "multi_topk": False,
        "skip_connection": flat.W_skip is not None,
        "transcode": transcode,
        "d_in": flat.card.d_in,
    }
    tensors = {"encoder.weight": flat.W_enc, "encoder.bias": flat.b_enc, "W_dec": flat.W_dec, "b_dec": flat.b_dec}
    if flat.W_skip is not None:
        tensors["W_skip"] = flat.W_skip
    name = hookpoint or to_module(written.name, architecture)
    return write_folder(path if path.name == name else path / name, {_WEIGHTS: tensors}, {_JSON: config})


FORMAT = Format(
    name="sparsify",
    about="sparsify: a folder named like the module, with cfg.json and sae.safetensors",
    recognises=_recognises,
    read=_read,
    write=_write,
)
