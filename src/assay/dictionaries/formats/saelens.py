"""SAELens's files: a folder with `cfg.json` and `sae_weights.safetensors`, of v6 and of the flat configurations before.

On disk `W_enc` is `[d, latent]`, which is transposed here. What a configuration says is folded or becomes a field:

    rescale_acts_by_decoder_norm   each decoder row's length moves into the encoder, as SAELens does on the fly
    expected_average_only_in       the factor of `activation_scaler.json` beside it is folded; without it: refused
    covariance_whitening           the maps of `activation_whitening.safetensors` are folded
    layer_norm, constant_norm_rescale   `Card.normalisation`
    hook_z                         `attn.z`, whose heads lie side by side
    topk_threshold                 of a BatchTopK training file: the threshold of every latent

Checked against sae-lens 6.54.0.
"""

from __future__ import annotations

import math
import re
from collections.abc import Collection, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from assay.base.errors import SpecError
from assay.dictionaries.activations import Activation, Gated, JumpReLU, ReLU, TopK
from assay.dictionaries.dictionary import Card, Dictionary, Normalisation
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
from assay.dictionaries.formats.sites import card_sites, centred, from_hook, single, to_hook

_JSON, _WEIGHTS = "cfg.json", "sae_weights.safetensors"
_SCALER, _WHITENING = "activation_scaler.json", "activation_whitening.safetensors"
_WRITTEN_AS = "6.54.0"

_OWN = {
    "standard": (),
    "topk": (),
    "jumprelu": ("threshold",),
    "batchtopk": ("topk_threshold",),
    "matryoshka_batchtopk": ("topk_threshold",),
    "gated": ("b_gate", "b_mag", "r_mag"),
    "transcoder": (),
    "skip_transcoder": ("W_skip",),
    "jumprelu_transcoder": ("threshold",),
    "jumprelu_skip_transcoder": ("threshold", "W_skip"),
}
"""What each architecture has beside `W_enc`, `W_dec`, `b_dec` and, but for gated, `b_enc`."""

_REFUSED = {
    "abstopk": "it keeps negative activations, which no other dictionary has",
    "matching_pursuit": "it encodes in steps, each from what the last left over",
    "temporal": "it has attention layers of its own",
}
_FAMILIES = {"standard": "l1", "matryoshka_batchtopk": "matryoshka", "transcoder": "l1", "skip_transcoder": "l1"}
_NORMALISATION: dict[str, Normalisation] = {"layer_norm": "layer_norm", "constant_norm_rescale": "constant_norm"}
_SAID = {value: key for key, value in _NORMALISATION.items()} | {"none": "none"}

_BASE = ("architecture", "d_in", "d_sae", "dtype", "device", "apply_b_dec_to_input", "normalize_activations")
_TRAINING = (
    "reshape_activations", "metadata", "d_out", "k", "rescale_acts_by_decoder_norm", "decoder_init_norm",
    "l1_coefficient", "lp_norm", "l1_warm_up_steps", "use_sparse_activations", "aux_loss_coefficient",
    "topk_threshold_lr", "matryoshka_widths", "use_matryoshka_aux_loss", "jumprelu_init_threshold",
    "jumprelu_bandwidth", "jumprelu_sparsity_loss_mode", "jumprelu_tanh_scale", "jumprelu_ste_to_input", "target_l0",
    "l0_coefficient", "l0_warm_up_steps", "pre_act_loss_coefficient",
)  # fmt: skip
_ABOUT_MODEL = (
    "model_name", "model_class_name", "hook_name", "hook_layer", "hook_head_index", "hook_name_out", "hook_layer_out",
    "hook_head_index_out", "hf_hook_name", "hf_hook_name_out", "model_from_pretrained_kwargs", "prepend_bos",
    "exclude_special_tokens", "neuronpedia_id", "context_size", "seqpos_slice", "dataset_path", "sae_lens_version",
    "sae_lens_training_version", "dataset_trust_remote_code", "activation_fn", "activation_fn_kwargs",
    "finetuning_scaling_factor", "mse_loss_normalization", "noise", "l1_loss_type", "hook_point", "hook_point_layer",
    "hook_point_head_index", "activation_fn_str",
)  # fmt: skip
_RUNNER = (
    "tokens_per_buffer", "d_sae_out", "expansion_factor", "b_dec_init_method", "run_name", "from_pretrained_path",
    "verbose", "training_tokens", "finetuning_tokens", "store_batch_size_prompts", "n_batches_in_buffer",
    "train_batch_size_tokens", "train_batch_size", "store_batch_size", "total_training_tokens", "lr",
    "lr_scheduler_name", "lr_warm_up_steps", "lr_end", "lr_decay_steps", "n_restart_cycles", "adam_beta1", "adam_beta2",
    "use_ghost_grads", "feature_sampling_window", "dead_feature_window", "dead_feature_threshold", "n_eval_batches",
    "eval_batch_size_prompts", "log_to_wandb", "wandb_project", "wandb_id", "wandb_entity", "wandb_log_frequency",
    "eval_every_n_wandb_logs", "resume", "n_checkpoints", "checkpoint_path", "seed", "is_dataset_tokenized",
    "streaming", "use_cached_activations", "cached_activations_path", "hook_eval", "autocast", "autocast_lm",
    "compile_llm", "llm_compilation_mode", "compile_sae", "sae_compilation_mode", "act_store_device", "model_kwargs",
    "init_encoder_as_decoder_transpose", "decoder_heuristic_init", "decoder_heuristic_init_norm",
    "decoder_orthogonal_init", "normalize_sae_decoder", "scale_sparsity_penalty_by_decoder_norm", "ghost_grads_scaling",
    "finetuning_method", "normalize_during_training", "jumprelu_init_threshold", "logger", "wandb_log_optimizer",
    "tokens_per_step", "n_tokens_per_context", "n_contexts_per_buffer", "n_batches_for_norm_estimate",
    "total_training_steps", "disable_concat_sequences", "sequence_separator_token",
)  # fmt: skip
"""What flat configurations carried of the training run; none of it changes what the dictionary computes."""


def _recognises(path: Path) -> bool:
    folder = path.parent if path.name == _WEIGHTS else path
    return (folder / _JSON).is_file() and (folder / _WEIGHTS).is_file()


def _read(
    path: Path,
    site: str | None = None,
    writes: str | None = None,
    scaling_factor: float | None = None,
    ignore: Collection[str] = (),
) -> Dictionary:
    """Read one.

    Args:
        path: The folder, or the file of weights in it.
        site: Where it reads, instead of what the file says.
        writes: Where a transcoder writes, instead of what the file says.
        scaling_factor: What inputs are multiplied by, where the configuration says that and the file of it is absent.
        ignore: Names of the configuration to pass over.
    """
    folder = path.parent if path.name == _WEIGHTS else path
    said = read_json(folder / _JSON)
    config = _config(said, folder / _JSON, ignore)
    kind = config["architecture"]
    found = take(read_tensors(folder / _WEIGHTS), *_names(config, folder), where=folder / _WEIGHTS)
    _check(found, config, folder / _WEIGHTS)
    metadata = config["metadata"]
    read, written = _sites(config, site, writes)
    normalisation = config["normalize_activations"]
    if "transcoder" in kind and normalisation in _NORMALISATION:
        raise SpecError(
            f"{str(folder)!r} is a transcoder with normalize_activations={normalisation!r}, which SAELens applies to "
            "its input and never undoes; no dictionary here does that",
            "normalize_activations",
        )
    weights: dict[str, Any] = {"W_enc": found["W_enc"].T.contiguous(), "W_dec": found["W_dec"], "b_dec": found["b_dec"]}
    d_in, d_out = int(weights["W_enc"].shape[1]), int(weights["W_dec"].shape[1])
    source = {"format": "saelens", "version": str(metadata.get("sae_lens_version") or ""), "config": said}
    dictionary = Dictionary(
        **weights,
        **_encoder(kind, config, found),
        W_skip=found.get("W_skip"),
        card=Card(
            **card_sites(read, d_in, written, d_out),
            model=str(metadata.get("model_name") or ""),
            family=_family(kind, metadata),
            centred=bool(config["apply_b_dec_to_input"]) and "transcoder" not in kind,
            normalisation=_NORMALISATION.get(normalisation, "none"),
            source=source,
        ),
    )
    return _folded(dictionary, config, found, folder, scaling_factor)


def _config(said: Mapping[str, Any], where: Path, ignore: Collection[str]) -> dict[str, Any]:
    """A configuration as v6 has it."""
    inner = value(said, "metadata", dict, where=where, default={})
    version = re.match(r"\d+", str(said.get("sae_lens_version") or inner.get("sae_lens_version") or ""))
    old = version is None or int(version[0]) < 6
    known = (*_BASE, *_TRAINING, *_ABOUT_MODEL, *_RUNNER) if old else (*_BASE, *_TRAINING)
    check_keys(said, ("d_in", "d_sae"), known, where=where, ignore=ignore)
    config = dict(said)
    config["metadata"] = dict(inner)
    if old:
        _from_flat(config, where)
    config.setdefault("apply_b_dec_to_input", True)
    for name, usual in (("architecture", "standard"), ("normalize_activations", "none")):
        config[name] = value(config, name, str, where=where, default=usual)
    kind, normalisation = config["architecture"], config["normalize_activations"]
    if kind in _REFUSED:
        raise SpecError(
            f"{str(where)!r} is a {kind} dictionary, which is not read: {_REFUSED[kind]}. Use SAELens for it",
            "architecture",
        )
    if kind not in _OWN:
        raise SpecError(f"{str(where)!r} has architecture {kind!r}; read: {', '.join(_OWN)}", "architecture")
    known_normalisation = ("none", "expected_average_only_in", "covariance_whitening", *_NORMALISATION)
    if normalisation not in known_normalisation:
        raise SpecError(
            f"{str(where)!r} has normalize_activations {normalisation!r}; read: {', '.join(known_normalisation)}",
            "normalize_activations",
        )
    return config


def _from_flat(config: dict[str, Any], where: Path) -> None:
    """Bring a configuration from before v6 into today's form."""
    for old, new in {"hook_point": "hook_name", "hook_point_head_index": "hook_head_index"}.items():
        if old in config:
            config[new] = config.pop(old)
    function = config.get("activation_fn_str") or config.get("activation_fn") or "relu"
    arguments = value(config, "activation_fn_kwargs", dict, where=where, default={})
    if function == "topk":
        config["architecture"], config["k"] = "topk", arguments.get("k", config.get("k"))
        if arguments.get("signed"):
            raise SpecError(
                f"{str(where)!r} is a TopK that keeps negative activations (signed), which is not read", "signed"
            )
    elif function != "relu":
        raise SpecError(f"{str(where)!r} has the activation {function!r}; read: relu, topk", "activation_fn")
    if isinstance(config.get("normalize_activations"), bool):
        config["normalize_activations"] = "expected_average_only_in" if config["normalize_activations"] else "none"
    config["metadata"] |= {name: config[name] for name in _ABOUT_MODEL if name in config}


def _names(config: Mapping[str, Any], folder: Path) -> tuple[list[str], list[str]]:
    """The tensors that a file of this configuration has, and those it may have."""
    kind = config["architecture"]
    own = list(_OWN[kind])
    held: set[str] = set()
    if kind == "jumprelu":
        from assay.dictionaries.formats.format import tensor_keys

        held = set(tensor_keys(folder / _WEIGHTS))
        if "log_threshold" in held:  # training files of SAELens before 6.30 or so
            own = ["log_threshold"]
    needed = ["W_enc", "W_dec", "b_dec", *([] if kind == "gated" else ["b_enc"]), *own]
    return needed, ["scaling_factor"]


def _check(found: Mapping[str, Tensor], config: Mapping[str, Any], where: Path) -> None:
    writes = "d_out" if "d_out" in config and "transcoder" in config["architecture"] else "d_in"
    latent = "b_enc", "threshold", "log_threshold", "b_gate", "b_mag", "r_mag", "scaling_factor"
    wanted = {"W_enc": "d_in d_sae", "W_dec": f"d_sae {writes}", "b_dec": writes, "W_skip": f"{writes} d_in"}
    sizes = check_shapes(found, wanted | dict.fromkeys(latent, "d_sae"), where=where)
    for name, size in sizes.items():
        if value(config, name, int, where=where) != size:
            raise SpecError(f"{str(where)!r} has {name} = {size} and its configuration says {config[name]}", name)


def _sites(config: Mapping[str, Any], site: str | None, writes: str | None) -> tuple[str, str | None]:
    metadata = config["metadata"]
    if site is None:
        name = metadata.get("hook_name")
        if not name:
            raise SpecError(
                "the configuration names no hook_name; give site=..., such as 'blocks.3.resid_post'", "site"
            )
        site = _site(str(name), metadata, "hook_head_index")
    if "transcoder" in config["architecture"] and writes is None:
        name = metadata.get("hook_name_out")
        if not name:
            raise SpecError("the configuration names no hook_name_out; give writes=...", "writes")
        writes = _site(str(name), metadata, "hook_head_index_out")
    return site, writes


def _site(name: str, metadata: Mapping[str, Any], head: str) -> str:
    if str(metadata.get("model_class_name") or "HookedTransformer") not in {"HookedTransformer", "TransformerBridge"}:
        return f"module:{name}.out"
    if name.endswith(".hook_mlp_in") and "pre_feedforward_layernorm.output" in str(metadata.get("hf_hook_name")):
        return name.replace("hook_mlp_in", "mlp.in")  # what SAELens calls Gemma Scope 2's, after the norm as it is
    found, index = from_hook(name), value(metadata, head, int, where=Path(_JSON), default=-1)
    return found if index < 0 else f"{found}.{index}"


def _family(kind: str, metadata: Mapping[str, Any]) -> str:
    trained = str(metadata.get("training_architecture") or kind)
    return _FAMILIES.get(trained, trained.removesuffix("_transcoder").removesuffix("_skip"))


def _encoder(kind: str, config: Mapping[str, Any], found: Mapping[str, Tensor]) -> dict[str, Any]:
    """The encoder's bias and the nonlinearity."""
    activation: Activation = ReLU()
    if kind == "gated":
        bias, gain = found["b_gate"], found["r_mag"]
        return {"b_enc": bias, "activation": Gated(log_gain=gain, offset=found["b_mag"] - gain.exp() * bias)}
    if kind == "topk":
        if not isinstance(config.get("k"), int):
            raise SpecError(f"a topk dictionary says k = {config.get('k')!r}; it must be an int", "k")
        activation = TopK(k=config["k"])
    elif "threshold" in found:
        # a ReLU comes before the threshold there, so a negative one is the same as 0
        activation = JumpReLU(threshold=found["threshold"].clamp_min(0))
    elif "log_threshold" in found:
        activation = JumpReLU(threshold=found["log_threshold"].exp())
    elif "topk_threshold" in found:
        activation = JumpReLU(threshold=found["topk_threshold"].reshape(1).expand(len(found["b_enc"])).clone())
    return {"b_enc": found["b_enc"], "activation": activation}


def _folded(
    dictionary: Dictionary, config: Mapping[str, Any], found: Mapping[str, Tensor], folder: Path, factor: float | None
) -> Dictionary:
    """Fold what SAELens does on the fly, in the order in which it would."""
    scale = found.get("scaling_factor")
    if scale is not None and not torch.allclose(scale, torch.ones_like(scale)):
        if not config.get("finetuning_scaling_factor"):
            raise SpecError(
                f"{str(folder)!r} has a scaling_factor and says that it was not fine-tuned", "scaling_factor"
            )
        dictionary = replace(dictionary, W_dec=dictionary.W_dec * scale[:, None])
    if config.get("rescale_acts_by_decoder_norm"):
        norms = dictionary.W_dec.norm(dim=1)
        dictionary = replace(
            dictionary,
            W_enc=dictionary.W_enc * norms[:, None],
            b_enc=dictionary.b_enc * norms,
            W_dec=dictionary.W_dec / norms.clamp(min=1e-30)[:, None],
        )
    normalisation = config["normalize_activations"]
    if normalisation == "expected_average_only_in":
        if factor is None and (folder / _SCALER).is_file():
            factor = value(read_json(folder / _SCALER), "scaling_factor", float, where=folder / _SCALER, default=0.0)
        if not factor:
            raise SpecError(
                f"{str(folder)!r} is of inputs times a factor (normalize_activations='expected_average_only_in'), and "
                f"its {_SCALER} is not there; give scaling_factor=... (sqrt(d) over the mean length)",
                "scaling_factor",
            )
        mean = math.sqrt(dictionary.card.d_in) / float(factor)
        dictionary = dictionary.folded(float(factor))
        dictionary = replace(dictionary, card=replace(dictionary.card, mean_norm=mean))
    elif normalisation == "covariance_whitening":
        dictionary = _unwhitened(dictionary, folder)
    return dictionary


def _unwhitened(dictionary: Dictionary, folder: Path) -> Dictionary:
    """Fold `(x - mean) M` before and its inverse after into the weights."""
    where = folder / _WHITENING
    if not where.is_file():
        raise SpecError(
            f"{str(folder)!r} is for whitened inputs, and {_WHITENING} is not beside it", "normalize_activations"
        )
    held = read_tensors(where)
    take(held, ["mean", "matrix", "inverse_matrix"], where=where)
    check_shapes(held, {"mean": "d", "matrix": "d d", "inverse_matrix": "d d"}, where=where)
    mean, matrix, inverse = (held[name].double() for name in ("mean", "matrix", "inverse_matrix"))
    encoder = dictionary.W_enc.double() @ matrix.T
    bias = dictionary.b_enc if dictionary.card.centred else dictionary.b_enc.double() - encoder @ mean
    return replace(
        dictionary,
        W_enc=encoder.float(),
        b_enc=bias.float(),
        W_dec=(dictionary.W_dec.double() @ inverse).float(),
        b_dec=(dictionary.b_dec.double() @ inverse + mean).float(),
    )


def _write(dictionary: Any, path: Path, hook_name: str | None = None, hook_name_out: str | None = None) -> Path:
    """Write one as SAELens 6.54 does.

    Args:
        dictionary: Of one site.
        path: The folder.
        hook_name: What SAELens is to call the site it reads, where TransformerLens has no name for it.
        hook_name_out: The same for the site a transcoder writes.
    """
    if not isinstance(dictionary, Dictionary):
        raise SpecError(
            "saelens files hold no cross-layer transcoders; 'circuit-tracer', 'gemma-scope-2' and 'assay' do"
        )
    read, written = single(dictionary, "saelens")
    transcodes = dictionary.kind == "transcoder" or dictionary.W_skip is not None
    dictionary = centred(dictionary, False) if transcodes else dictionary
    architecture, tensors = _kind(dictionary, transcodes)
    card = dictionary.card
    if transcodes and card.normalisation != "none":
        raise SpecError(f"saelens transcoders do not undo {card.normalisation}, as this dictionary does", "format")
    metadata = _metadata(card, _hook(read.name, hook_name), _hook(written.name, hook_name_out) if transcodes else {})
    whole = str(metadata["hook_name"]).endswith("hook_z") and metadata["hook_head_index"] is None
    config: dict[str, Any] = {
        "d_in": card.d_in,
        "d_sae": dictionary.n_latents,
        "dtype": "float32",
        "device": "cpu",
        "apply_b_dec_to_input": card.centred,
        "normalize_activations": _SAID[card.normalisation],
        "reshape_activations": "hook_z" if whole and not transcodes else "none",
        "metadata": metadata,
        "architecture": architecture,
    }
    if isinstance(dictionary.activation, TopK):
        config |= {"k": dictionary.activation.k, "rescale_acts_by_decoder_norm": False}
    if transcodes:
        config["d_out"] = card.d_out
    return write_folder(path, {_WEIGHTS: tensors}, {_JSON: config})


def _kind(dictionary: Dictionary, transcodes: bool) -> tuple[str, dict[str, Tensor]]:
    """SAELens's name for the architecture, and its tensors."""
    tensors = {"W_enc": dictionary.W_enc.T, "W_dec": dictionary.W_dec, "b_dec": dictionary.b_dec}
    activation = dictionary.activation
    jump = isinstance(activation, JumpReLU)
    if transcodes:
        if not isinstance(activation, ReLU | JumpReLU):
            raise SpecError(f"saelens transcoders are ReLU or JumpReLU, and this one is {activation.name}", "format")
        if dictionary.W_skip is not None:
            tensors["W_skip"] = dictionary.W_skip
        name = "jumprelu_" * jump + "skip_" * ("W_skip" in tensors) + "transcoder"
    elif isinstance(activation, Gated):
        bias = activation.offset + activation.log_gain.exp() * dictionary.b_enc
        return "gated", tensors | {"b_gate": dictionary.b_enc, "r_mag": activation.log_gain, "b_mag": bias}
    elif isinstance(activation, ReLU | JumpReLU | TopK):
        name = {"relu": "standard"}.get(activation.name, activation.name)
    else:
        raise SpecError(f"saelens has no {activation.name} dictionaries; 'sparsify' and 'assay' do", "format")
    if isinstance(activation, JumpReLU):
        tensors["threshold"] = activation.threshold
    return name, tensors | {"b_enc": dictionary.b_enc}


def _hook(site: str, given: str | None) -> dict[str, Any]:
    if given is not None:
        return {"name": given, "head": None}
    if site.startswith("module:") and site.endswith(".out"):
        return {
            "name": site.removeprefix("module:").removesuffix(".out"),
            "head": None,
            "class": "AutoModelForCausalLM",
        }
    name, head = to_hook(site)
    return {"name": name, "head": head}


def _metadata(card: Card, read: Mapping[str, Any], written: Mapping[str, Any]) -> dict[str, Any]:
    """What SAELens's users look up: what a SAELens file said before, the sites, and how it was trained."""
    carried: dict[str, Any] = {}
    if card.source.get("format") == "saelens":
        carried = dict(card.source["config"].get("metadata") or {})
    metadata = {
        **carried,
        "sae_lens_version": _WRITTEN_AS,
        "sae_lens_training_version": carried.get("sae_lens_training_version"),
        "model_name": card.model or None,
        "hook_name": read["name"],
        "hook_head_index": read["head"],
        "training_architecture": {"l1": "standard", "matryoshka": "matryoshka_batchtopk"}.get(card.family, card.family),
        "written_by": "assay",
    }
    if written:
        metadata |= {"hook_name_out": written["name"], "hook_head_index_out": written["head"]}
    if "class" in read:
        metadata["model_class_name"] = read["class"]
    if card.training:
        metadata["training"] = dict(card.training)
    return metadata


FORMAT = Format(
    name="saelens",
    about="SAELens: a folder with cfg.json and sae_weights.safetensors, v6 and before",
    recognises=_recognises,
    read=_read,
    write=_write,
)
