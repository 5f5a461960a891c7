"""Llama Scope's files: `hyperparams.json` and `checkpoints/final.safetensors`.

On disk `encoder.weight [latent, d]`, `decoder.weight [d, latent]`. The weights are for inputs and targets times
`s = sqrt(d) / average norm`; its own loader folds that, then gives decoder rows length 1, and compares with one
threshold after both. With `n` the length of a decoder row times `s_in / s_out`, that is here

    W_enc <- n W_enc      b_enc <- n b_enc / s_in      W_dec <- W_dec s_in / (s_out n)      b_dec <- b_dec / s_out

Source: Language-Model-SAEs, `SparseAutoEncoder.from_config`.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

import torch

from assay.base.errors import DamagedFile, SpecError
from assay.dictionaries.activations import Activation, JumpReLU, ReLU, TopK
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
    from_hook,
    refuse_normalised,
    single,
    to_hook,
    uniform,
)

_JSON, _WEIGHTS = "hyperparams.json", "checkpoints/final.safetensors"
_NAMES = ("encoder.weight", "encoder.bias", "decoder.weight", "decoder.bias")
_KNOWN = (
    "d_sae", "hook_point_in", "hook_point_out", "act_fn", "jump_relu_threshold", "top_k", "norm_activation",
    "dataset_average_activation_norm", "use_decoder_bias", "apply_decoder_bias_to_pre_encoder", "expansion_factor",
    "sparsity_include_decoder_norm", "init_encoder_with_decoder_transpose", "decoder_exactly_fixed_norm",
    "init_decoder_norm", "init_encoder_norm", "decoder_bias_init_method", "use_glu_encoder", "use_ghost_grads",
    "use_batch_norm_mse", "l1_coefficient", "l1_coefficient_warmup_steps", "lp", "k_warmup_steps", "initial_k",
    "device", "dtype", "seed", "tp_size", "ddp_size", "strict_loading", "sae_pretrained_name_or_path", "sae_type",
    "exp_name", "exp_series", "exp_result_dir", "sparsity_threshold_finetune", "train_mode", "model_name",
)  # fmt: skip


def _recognises(path: Path) -> bool:
    return (path / _JSON).is_file() and (path / _WEIGHTS).is_file()


def _read(path: Path, site: str | None = None, writes: str | None = None, ignore: Collection[str] = ()) -> Dictionary:
    """Read one.

    Args:
        path: The folder of `hyperparams.json`.
        site: Where it reads, instead of what the file says.
        writes: Where it writes, instead of what the file says.
        ignore: Names of the configuration to pass over.
    """
    config, where = read_json(path / _JSON), path / _WEIGHTS
    check_keys(config, ("d_model", "hook_point_in"), _KNOWN, where=path / _JSON, ignore=ignore)
    if config.get("use_glu_encoder"):
        raise SpecError(
            f"{str(path)!r} has a gated linear encoder (use_glu_encoder), which is not read", "use_glu_encoder"
        )
    names = _NAMES if config.get("use_decoder_bias", True) else _NAMES[:3]
    found = take(read_tensors(where), names, where=where)
    shapes = {"encoder.weight": "latents d_in", "encoder.bias": "latents", "decoder.weight": "d_out latents"}
    sizes = check_shapes(found, shapes | {"decoder.bias": "d_out"}, where=where)
    told = {name: value(config, name, int, where=path / _JSON, default=0) for name in ("d_model", "d_sae")}
    if sizes["d_in"] != told["d_model"] or sizes["latents"] != (told["d_sae"] or sizes["latents"]):
        raise SpecError(
            f"'encoder.weight' of {str(where)!r} does not have the shape that {_JSON} gives it", "encoder.weight"
        )
    scale_in, scale_out, mean = _scales(config, path)
    rows = found["decoder.weight"].T * (scale_in / scale_out)
    norms = torch.ones(len(rows))
    if config.get("sparsity_include_decoder_norm", True):
        norms = rows.norm(dim=1)
        norms = torch.where(norms > 0, norms, 1.0)
    read = site or from_hook(str(config["hook_point_in"]))
    written = writes or (None if site or not config.get("hook_point_out") else from_hook(str(config["hook_point_out"])))
    bias = found.get("decoder.bias", torch.zeros(sizes["d_out"]))
    return Dictionary(
        W_enc=found["encoder.weight"] * norms[:, None],
        b_enc=found["encoder.bias"] * norms / scale_in,
        W_dec=rows / norms[:, None],
        b_dec=bias / scale_out,
        activation=_activation(config, sizes["latents"]),
        card=Card(
            **card_sites(read, sizes["d_in"], written, sizes["d_out"]),
            model=str(config.get("model_name") or "meta-llama/Llama-3.1-8B"),
            family="jumprelu",
            centred=bool(config.get("apply_decoder_bias_to_pre_encoder", False)) and "decoder.bias" in found,
            mean_norm=mean,
            source={"format": "llama-scope", "config": config},
        ),
    )


def _scales(config: Mapping[str, Any], path: Path) -> tuple[float, float, float | None]:
    """What inputs and targets were multiplied by, and the mean length of inputs."""
    how = value(config, "norm_activation", str, where=path / _JSON, default="dataset-wise")
    if how in {"inference", "none"}:
        return 1.0, 1.0, None
    norms = config.get("dataset_average_activation_norm")
    if how != "dataset-wise" or not isinstance(norms, Mapping) or not {"in", "out"} <= set(norms):
        raise SpecError(
            f"{str(path / _JSON)!r} has norm_activation {how!r} and dataset_average_activation_norm {norms!r}; read: "
            "'dataset-wise' with the norms of 'in' and 'out', or 'inference'",
            "norm_activation",
        )
    root = math.sqrt(float(config["d_model"]))
    try:
        mean = None if float(norms["in"]) == root else float(norms["in"])  # a factor of 1 says that none was measured
        return root / float(norms["in"]), root / float(norms["out"]), mean
    except (TypeError, ValueError, ZeroDivisionError) as error:
        raise DamagedFile(f"{str(path / _JSON)!r} has average norms {dict(norms)!r}: {error}") from error


def _activation(config: Mapping[str, Any], latents: int) -> Activation:
    kind = value(config, "act_fn", str, where=Path(_JSON), default="jumprelu")
    threshold = value(config, "jump_relu_threshold", float, where=Path(_JSON), default=0.0)
    if kind == "jumprelu" or (kind == "topk" and threshold > 0):
        return JumpReLU(threshold=torch.full((latents,), threshold))
    if kind == "topk":
        return TopK(k=int(config["top_k"]))
    if kind == "relu":
        return ReLU()
    raise SpecError(f"act_fn is {kind!r}; read: jumprelu, topk, relu", "act_fn")


def _write(dictionary: Any, path: Path) -> Path:
    """Write one whose latents share a threshold, with decoder rows of length 1 and nothing left to fold."""
    if not isinstance(dictionary, Dictionary):
        raise SpecError("llama-scope files hold no cross-layer transcoders; 'circuit-tracer' and 'assay' do", "format")
    read, written = single(dictionary, "llama-scope")
    refuse_normalised(dictionary, "llama-scope")
    if dictionary.W_skip is not None:
        raise SpecError("llama-scope files have no skip; 'sparsify', 'circuit-tracer' and 'assay' do", "format")
    if not isinstance(dictionary.activation, ReLU | JumpReLU):
        raise cannot_hold("llama-scope", dictionary, "JumpReLU with one threshold (and ReLU)")
    activation = dictionary.activation
    if isinstance(activation, JumpReLU) and not uniform(activation.threshold):
        low, high = float(activation.threshold.min()), float(activation.threshold.max())
        raise SpecError(
            f"llama-scope files hold one threshold for all latents, and these run from {low:g} to {high:g}; "
            "'gemma-scope', 'saelens' and 'assay' hold one each",
            "threshold",
        )
    threshold = float(activation.threshold[0]) if isinstance(activation, JumpReLU) else 0.0
    hooks, root = [to_hook(read.name)[0], to_hook(written.name)[0]], math.sqrt(dictionary.card.d_in)
    config = {
        "d_model": dictionary.card.d_in,
        "d_sae": dictionary.n_latents,
        "hook_point_in": hooks[0],
        "hook_point_out": hooks[1],
        "act_fn": "jumprelu",
        "jump_relu_threshold": threshold,
        "norm_activation": "dataset-wise",  # with a factor of 1, so that every loader leaves the weights as they are
        "dataset_average_activation_norm": {"in": root, "out": root},
        "sparsity_include_decoder_norm": False,
        "use_decoder_bias": True,
        "apply_decoder_bias_to_pre_encoder": dictionary.card.centred,
        "model_name": dictionary.card.model,
    }
    tensors = {
        "encoder.weight": dictionary.W_enc,
        "encoder.bias": dictionary.b_enc,
        "decoder.weight": dictionary.W_dec.T,
        "decoder.bias": dictionary.b_dec,
    }
    return write_folder(path, {_WEIGHTS: tensors}, {_JSON: config})


FORMAT = Format(
    name="llama-scope",
    about="Llama Scope: hyperparams.json and checkpoints/final.safetensors",
    recognises=_recognises,
    read=_read,
    write=_write,
)
