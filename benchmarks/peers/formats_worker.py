"""Runs in a peer's own environment: has the peer write dictionaries, or read those that assay wrote.

    python formats_worker.py write PEER FOLDER    one folder a case, with the dictionary and `io.safetensors` (x, z, y)
    python formats_worker.py read PEER FOLDER     reads `case.json`, `x.safetensors` and the dictionary of each case,
                                                  writes `out.safetensors` (z, y) or `error.txt`

`z` is the peer's own encoding of `x` and `y` its own reconstruction. The header of `io.safetensors` says where the
dictionary is in the folder; `case.json` says that too, and which of the peer's loaders reads it.
"""

from __future__ import annotations

import json
import sys
import traceback
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file

D, F, OUT, ROWS, LAYERS = 8, 16, 6, 8, 3


def fill(module: torch.nn.Module) -> None:
    """Random weights and biases, thresholds of usual size."""
    for name, parameter in module.named_parameters():
        scale = 0.3 if parameter.ndim == 1 else 1.0
        parameter.data = torch.randn_like(parameter) * scale
        if "threshold" in name:
            parameter.data = torch.rand_like(parameter) * 0.8


def keep(folder: Path, x: torch.Tensor, z: torch.Tensor, y: torch.Tensor, path: str = ".") -> None:
    """Keep what the peer computes, and where in the folder the dictionary is."""
    tensors = {name: t.detach().float().contiguous() for name, t in {"x": x, "z": z, "y": y}.items()}
    save_file(tensors, folder / "io.safetensors", metadata={"path": path})


def dump(path: Path, tensors: dict[str, torch.Tensor]) -> None:
    """Write safetensors as published files have them."""
    path.parent.mkdir(parents=True, exist_ok=True)
    save_file({name: t.contiguous() for name, t in tensors.items()}, path)


# sae-lens


def saelens_meta(hook: str = "blocks.3.hook_resid_post", **more: Any) -> Any:
    """SAELens's metadata of a site of GPT-2."""
    from sae_lens.saes.sae import SAEMetadata

    return SAEMetadata(model_name="gpt2-small", hook_name=hook, hook_head_index=None, **more)


def saelens_write(root: Path) -> None:
    """Every architecture of SAELens, for inference and as training leaves it."""
    import sae_lens as s
    from sae_lens.training.activation_scaler import ActivationScaler, ActivationWhitening

    x = torch.randn(ROWS, D) + 0.3
    shared = {"d_in": D, "d_sae": F}

    def inference(name: str, cls: Any, config: Any, x: torch.Tensor = x) -> None:
        sae, folder = cls(config), root / name
        fill(sae)
        sae.save_model(folder)
        keep(folder, x.flatten(1) if x.ndim == 3 else x, sae.encode(x), sae(x).flatten(1) if x.ndim == 3 else sae(x))

    def training(name: str, cls: Any, config: Any, reads: str) -> None:
        sae = cls(config)
        fill(sae)
        if hasattr(sae, "topk_threshold"):
            sae.topk_threshold = torch.tensor(1.1, dtype=torch.double)
        sae.save_inference_model(root / f"{name}_inference")
        trained = s.SAE.load_from_disk(root / f"{name}_inference")
        for kind in ("inference", "training"):
            folder = root / f"{name}_{kind}"
            if kind == "training":
                sae.save_model(folder)
            keep(folder, x, trained.encode(x), trained(x))
        assert reads == trained.cfg.architecture()

    for normalisation in ("none", "layer_norm", "constant_norm_rescale"):
        for centred in (True, False):
            name = f"standard_{normalisation}_{'' if centred else 'un'}centred"
            config = s.StandardSAEConfig(
                **shared, normalize_activations=normalisation, apply_b_dec_to_input=centred, metadata=saelens_meta()
            )
            inference(name, s.StandardSAE, config)
    inference("topk", s.TopKSAE, s.TopKSAEConfig(**shared, k=4, metadata=saelens_meta()))
    rescaled = s.TopKSAEConfig(**shared, k=4, rescale_acts_by_decoder_norm=True, metadata=saelens_meta())
    inference("topk_rescaled", s.TopKSAE, rescaled)
    inference("jumprelu", s.JumpReLUSAE, s.JumpReLUSAEConfig(**shared, metadata=saelens_meta("blocks.2.hook_mlp_out")))
    inference("gated", s.GatedSAE, s.GatedSAEConfig(**shared, metadata=saelens_meta("blocks.0.hook_attn_out")))
    heads = s.StandardSAEConfig(**shared, reshape_activations="hook_z", metadata=saelens_meta("blocks.1.attn.hook_z"))
    inference("hook_z", s.StandardSAE, heads, x.reshape(ROWS, 2, D // 2))
    out = saelens_meta("blocks.1.hook_resid_mid", hook_name_out="blocks.1.hook_mlp_out")
    wide = {**shared, "d_out": OUT, "apply_b_dec_to_input": False, "metadata": out}
    for name, cls, kind in (
        ("transcoder", s.Transcoder, s.TranscoderConfig),
        ("skip_transcoder", s.SkipTranscoder, s.SkipTranscoderConfig),
        ("jumprelu_transcoder", s.JumpReLUTranscoder, s.JumpReLUTranscoderConfig),
    ):
        inference(name, cls, kind(**wide))
    from sae_lens.saes.transcoder import JumpReLUSkipTranscoder, JumpReLUSkipTranscoderConfig

    inference("jumprelu_skip_transcoder", JumpReLUSkipTranscoder, JumpReLUSkipTranscoderConfig(**wide))
    meta = saelens_meta()
    training("topk_trained", s.TopKTrainingSAE, s.TopKTrainingSAEConfig(**shared, k=4, metadata=meta), "topk")
    batch = s.BatchTopKTrainingSAEConfig(**shared, k=4, metadata=meta)
    training("batchtopk", s.BatchTopKTrainingSAE, batch, "jumprelu")
    nested = s.MatryoshkaBatchTopKTrainingSAEConfig(**shared, k=4, matryoshka_widths=[4, 16], metadata=meta)
    training("matryoshka", s.MatryoshkaBatchTopKTrainingSAE, nested, "jumprelu")
    jump = s.JumpReLUTrainingSAEConfig(**shared, metadata=meta)
    training("jumprelu_trained", s.JumpReLUTrainingSAE, jump, "jumprelu")
    saelens_folded(root, x, shared, ActivationScaler, ActivationWhitening)
    saelens_old(root, x)
    saelens_published(root, x)


def saelens_folded(root: Path, x: torch.Tensor, shared: Any, scaler: Any, whitening: Any) -> None:
    """Checkpoints whose input factor or whitening is beside them: what SAELens gives once it has folded that."""
    import sae_lens as s

    for name, kind in (("factor", "expected_average_only_in"), ("whitened", "covariance_whitening")):
        for centred in (True, False):
            config = s.JumpReLUSAEConfig(
                **shared, normalize_activations=kind, apply_b_dec_to_input=centred, metadata=saelens_meta()
            )
            sae, folder = s.JumpReLUSAE(config), root / f"{name}_{'' if centred else 'un'}centred"
            fill(sae)
            sae.save_model(folder)
            held = scaler()
            if name == "factor":
                held.scaling_factor = 0.4
                sae.fold_activation_norm_scaling_factor(0.4)
            else:
                matrix = 0.2 * torch.randn(D, D, dtype=torch.float64) + torch.eye(D, dtype=torch.float64)
                mean = torch.randn(D, dtype=torch.float64)
                held.whitening = whitening(mean=mean, matrix=matrix, inverse_matrix=matrix.inverse().contiguous())
                sae.fold_activation_whitening(mean, matrix, held.whitening.inverse_matrix)
            held.save(str(folder / "activation_scaler.json"))
            keep(folder, x, sae.encode(x), sae(x))


def saelens_old(root: Path, x: torch.Tensor) -> None:
    """Flat configurations as versions before 6 wrote them, read by 6."""
    import sae_lens as s

    flat = {
        "d_in": D,
        "d_sae": F,
        "dtype": "torch.float32",
        "device": "cpu",
        "model_name": "gpt2-small",
        "hook_name": "blocks.8.hook_resid_pre",
        "hook_layer": 8,
        "hook_head_index": None,
        "activation_fn_str": "relu",
        "activation_fn_kwargs": {},
        "apply_b_dec_to_input": True,
        "finetuning_scaling_factor": False,
        "normalize_activations": "none",
        "prepend_bos": True,
        "context_size": 128,
        "dataset_path": "text",
        "dataset_trust_remote_code": True,
        "sae_lens_training_version": "5.10.0",
        "neuronpedia_id": None,
        "model_from_pretrained_kwargs": {},
        "seqpos_slice": [None],
    }
    weights = {"W_enc": torch.randn(D, F), "W_dec": torch.randn(F, D), "b_enc": torch.randn(F), "b_dec": torch.randn(D)}
    topk = {"activation_fn_str": "topk", "activation_fn_kwargs": {"k": 4}}
    old = {key: value for key, value in flat.items() if key not in {"hook_name", "hook_layer", "normalize_activations"}}
    older = old | {"hook_point": "blocks.8.hook_resid_pre", "hook_point_layer": 8, "normalize_activations": False}
    cases = {
        "v5_standard": (flat | {"architecture": "standard"}, {}),
        "v5_topk": (flat | {"architecture": "standard"} | topk, {}),
        "v5_jumprelu": (
            flat | {"architecture": "jumprelu", "apply_b_dec_to_input": False},
            {"threshold": torch.rand(F)},
        ),
        "v3_standard": (older, {"scaling_factor": torch.ones(F)}),
    }
    for name, (config, more) in cases.items():
        dump(root / name / "sae_weights.safetensors", weights | more)
        (root / name / "cfg.json").write_text(json.dumps(config))
        sae = s.SAE.load_from_disk(root / name)
        keep(root / name, x, sae.encode(x), sae(x))
    gated = {"b_gate": torch.randn(F) * 0.3, "b_mag": torch.randn(F) * 0.3, "r_mag": torch.randn(F) * 0.3}
    del weights["b_enc"]
    dump(root / "v5_gated" / "sae_weights.safetensors", weights | gated)
    (root / "v5_gated" / "cfg.json").write_text(json.dumps(flat | {"architecture": "gated"}))
    sae = s.SAE.load_from_disk(root / "v5_gated")
    keep(root / "v5_gated", x, sae.encode(x), sae(x))
    log = {**load_file(root / "v5_jumprelu" / "sae_weights.safetensors")}
    log["log_threshold"] = log.pop("threshold").log()
    config = json.loads((root / "v5_jumprelu" / "cfg.json").read_text())
    dump(root / "v5_log_threshold" / "sae_weights.safetensors", log)
    (root / "v5_log_threshold" / "cfg.json").write_text(json.dumps(config))
    sae = s.TrainingSAE.load_from_disk(root / "v5_log_threshold")
    keep(root / "v5_log_threshold", x, sae.encode(x), sae(x))


def saelens_hub(kind: str, folder: Path, repo: str, name: str) -> Any:
    """A published layout through SAELens's own converter, with the hub's download replaced by a look into a folder."""
    import sae_lens as s
    from sae_lens.loading import pretrained_sae_loaders as loaders

    def local(repo_id: str, filename: str, subfolder: str = "", **_: Any) -> str:
        found = folder / subfolder / filename
        if not found.exists():
            raise loaders.EntryNotFoundError(f"no {found}", response=type("R", (), {"headers": {}, "request": None})())
        return str(found)

    def shapes(repo_id: str, filename: str) -> dict[str, list[int]]:
        return {key: list(value.shape) for key, value in load_file(folder / filename).items()}

    kept = loaders.hf_hub_download, loaders.get_safetensors_tensor_shapes
    loaders.hf_hub_download, loaders.get_safetensors_tensor_shapes = local, shapes
    try:
        config, state, _ = loaders.NAMED_PRETRAINED_SAE_LOADERS[kind](
            repo_id=repo, folder_name=name, device="cpu", force_download=False,
            cfg_overrides={"dtype": "float32", "device": "cpu", **SIZES.get(kind, {})},
        )  # fmt: skip
    finally:
        loaders.hf_hub_download, loaders.get_safetensors_tensor_shapes = kept
    config = loaders.handle_config_defaulting(config)
    cls = s.SAE.get_sae_class_for_architecture(config["architecture"])
    parsed = s.SAE.get_sae_config_class_for_architecture(config["architecture"]).from_dict(config)
    parsed.reshape_activations = "none"
    sae = cls(parsed)
    sae.process_state_dict_for_loading(state)
    sae.load_state_dict({key: value.float() for key, value in state.items()})
    return sae


SIZES: dict[str, dict[str, int]] = {
    "gemma_2": {"d_in": D, "d_sae": F},
    "gemma_2_transcoder": {"d_in": D, "d_out": D, "d_sae": F},
    "goodfire": {"d_in": D, "d_sae": F},
    "qwen_scope": {"d_in": D, "d_sae": F},
}
PUBLISHED = {
    "gemma_scope_res": ("gemma_2", "google/gemma-scope-2b-pt-res", "layer_12/width_16k/average_l0_82"),
    "gemma_scope_att": ("gemma_2", "google/gemma-scope-9b-pt-att", "layer_3/width_16k/average_l0_40"),
    "gemma_scope_transcoder": (
        "gemma_2_transcoder", "google/gemma-scope-2b-pt-transcoders", "layer_4/width_16k/average_l0_50",
    ),
    "gemma_scope_2_res": ("gemma_3", "google/gemma-scope-2-1b-pt", "resid_post/layer_7_width_16k_l0_small"),
    "gemma_scope_2_transcoder": ("gemma_3", "google/gemma-scope-2-1b-pt", "transcoder/layer_7_width_16k_l0_small"),
    "goodfire": ("goodfire", "Goodfire/Llama-3.1-8B-Instruct-SAE-l19", "Llama-3.1-8B-Instruct-SAE-l19.pth"),
    "qwen_scope": ("qwen_scope", "Qwen/SAE-Res-Qwen3-8B-Base-W64K-L0_4", "layer5.sae.pt"),
    "llama_scope": ("llama_scope", "fnlp/Llama3_1-8B-Base-LXR-8x", "Llama3_1-8B-Base-L9R-8x"),
}  # fmt: skip


def saelens_published(root: Path, x: torch.Tensor) -> None:
    """Files in the layouts that others publish, as SAELens's own converters read them."""
    import numpy as np

    for case, (kind, repo, name) in PUBLISHED.items():
        base = root / case / repo.split("/")[1]
        enc, dec, b_enc, b_dec = torch.randn(D, F), torch.randn(F, D), torch.randn(F) * 0.3, torch.randn(D) * 0.3
        threshold = torch.rand(F)
        target = base / name
        if kind.startswith("gemma_2"):
            target.mkdir(parents=True)
            arrays = {"W_enc": enc, "W_dec": dec, "b_enc": b_enc, "b_dec": b_dec, "threshold": threshold}
            np.savez(target / "params.npz", **{key: value.numpy() for key, value in arrays.items()})
        elif kind == "gemma_3":
            arrays = {"w_enc": enc, "w_dec": dec, "b_enc": b_enc, "b_dec": b_dec, "threshold": threshold}
            dump(target / "params.safetensors", arrays)
            transcodes = "transcoder" in name
            ends = (
                ("pre_feedforward_layernorm.output", "post_feedforward_layernorm.output")
                if transcodes
                else ("output",) * 2
            )
            config = {"architecture": "jump_relu", "model_name": "gemma-v3-1b-pt"}
            config |= {
                "hf_hook_point_in": f"model.layers.7.{ends[0]}",
                "hf_hook_point_out": f"model.layers.7.{ends[1]}",
            }
            (target / "config.json").write_text(json.dumps(config | {"affine_connection": False}))
        elif kind == "goodfire":
            base.mkdir(parents=True)
            arrays = {"encoder_linear.weight": enc.T, "encoder_linear.bias": b_enc}
            arrays |= {"decoder_linear.weight": dec.T, "decoder_linear.bias": b_dec}
            torch.save({key: value.contiguous() for key, value in arrays.items()}, target)
        elif kind == "qwen_scope":
            base.mkdir(parents=True)
            arrays = {"W_enc": enc.T, "W_dec": dec.T, "b_enc": b_enc, "b_dec": b_dec}
            torch.save({key: value.contiguous() for key, value in arrays.items()}, target)
        else:
            unit = dec / dec.norm(dim=1, keepdim=True)
            arrays = {"encoder.weight": enc.T, "decoder.weight": unit.T, "encoder.bias": b_enc, "decoder.bias": b_dec}
            dump(target / "checkpoints" / "final.safetensors", arrays)
            norm = {"in": 2.0, "out": 2.0}
            config = {"d_model": D, "d_sae": F, "jump_relu_threshold": 0.4, "dataset_average_activation_norm": norm}
            config |= {"hook_point_in": "blocks.9.hook_resid_post", "hook_point_out": "blocks.9.hook_resid_post"}
            more = {"act_fn": "jumprelu", "norm_activation": "dataset-wise", "top_k": 50, "expansion_factor": 8}
            (target / "hyperparams.json").write_text(json.dumps(config | more))
        sae = saelens_hub(kind, base, repo, name)
        z, y = sae.encode(x), sae(x)
        if kind == "llama_scope":  # SAELens folds the factor from a table by release; its latents are larger by it
            factor = D**0.5 / 2.0
            sae.fold_activation_norm_scaling_factor(factor)
            z, y = sae.encode(x) / factor, sae(x)
        keep(root / case, x, z, y, (base / name).relative_to(root / case).as_posix())


def saelens_read(folder: Path, case: dict[str, Any], x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """A file of SAELens's own, or of another project's through its converter."""
    import sae_lens as s

    loader = case["loader"]
    if loader == "saelens":
        sae = s.SAE.load_from_disk(folder / case["path"])
        if sae.hook_z_reshaping_mode:
            x = x.reshape(len(x), 2, -1)
        return sae.encode(x), sae(x).flatten(1)
    if loader == "sparsify":
        from sae_lens.loading.pretrained_sae_loaders import sparsify_disk_loader

        sae = s.SAE.load_from_disk(folder / case["path"], converter=sparsify_disk_loader, dtype="float32")
        return sae.encode(x), sae(x)
    sae = saelens_hub(loader, folder / case["base"], case["repo"], case["name"])
    return sae.encode(x), sae(x)


# dictionary-learning


def d_l_write(root: Path) -> None:
    """Every class of dictionary_learning."""
    from dictionary_learning.dictionary import AutoEncoder, AutoEncoderNew, GatedAutoEncoder, JumpReluAutoEncoder
    from dictionary_learning.trainers.batch_top_k import BatchTopKSAE
    from dictionary_learning.trainers.matryoshka_batch_top_k import MatryoshkaBatchTopKSAE
    from dictionary_learning.trainers.top_k import AutoEncoderTopK

    x = torch.randn(ROWS, D) + 0.3
    cases = {
        "AutoEncoder": AutoEncoder(D, F),
        "AutoEncoderNew": AutoEncoderNew(D, F),
        "GatedAutoEncoder": GatedAutoEncoder(D, F),
        "AutoEncoderTopK": AutoEncoderTopK(D, F, 4),
        "BatchTopKSAE": BatchTopKSAE(D, F, 4),
        "MatryoshkaBatchTopKSAE": MatryoshkaBatchTopKSAE(D, F, 4, [4, 12]),
        "JumpReluAutoEncoder": JumpReluAutoEncoder(D, F),
    }
    for name, made in cases.items():
        fill(made)
        if hasattr(made, "k"):
            made.threshold = torch.tensor(0.7)
        folder = root / name
        folder.mkdir(parents=True)
        torch.save({key: value.cpu() for key, value in made.state_dict().items()}, folder / "ae.pt")
        trainer = {
            "dict_class": name,
            "activation_dim": D,
            "dict_size": F,
            "layer": 4,
            "lm_name": "EleutherAI/pythia-70m",
        }
        trainer |= {"submodule_name": "resid_post_layer_4", "k": 4, "trainer_class": "Trainer", "wandb_name": "run"}
        buffer = {"d_submodule": D, "io": "out", "n_ctxs": 8, "ctx_len": 128, "device": "cpu"}
        (folder / "config.json").write_text(json.dumps({"trainer": trainer, "buffer": buffer}, indent=1))
        keep(folder, x, made.encode(x), made(x))


def d_l_read(folder: Path, case: dict[str, Any], x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """A dictionary as `load_dictionary` gives it."""
    from dictionary_learning.dictionary import AutoEncoder
    from dictionary_learning.utils import load_dictionary

    path = folder / case["path"]
    made, config = load_dictionary(str(path), device="cpu")
    if config["trainer"]["dict_class"] == "AutoEncoder":  # as saved: load_dictionary gives decoder rows length 1
        made = AutoEncoder.from_pretrained(str(path / "ae.pt"), normalize_decoder=False)
    return made.encode(x), made(x)


# eai-sparsify


def dense(top: Any, width: int) -> torch.Tensor:
    """Activations with their zeros."""
    return torch.zeros(len(top.top_acts), width).scatter(1, top.top_indices, top.top_acts.detach())


def reconstruction(coder: Any, x: torch.Tensor) -> torch.Tensor:
    """What its k latents write: its forward gives that of 4 k latents where multi_topk is set."""
    top = coder.encode(x)
    y = coder.decode(top.top_acts, top.top_indices)
    return y if coder.W_skip is None else y + x @ coder.W_skip.mT


def sparsify_write(root: Path) -> None:
    """Each activation of sparsify, with and without a skip, as an autoencoder and as a transcoder."""
    from sparsify import SparseCoder
    from sparsify.config import SparseCoderConfig

    x = torch.randn(ROWS, D) + 0.3
    cases = {
        "topk": ("layers.5", {}),
        "topk_multi": ("layers.5.mlp", {"multi_topk": True, "normalize_decoder": False}),
        "groupmax": ("h.2", {"activation": "groupmax"}),
        "skip": ("layers.5", {"skip_connection": True}),
        "transcoder": ("layers.1.mlp", {"transcode": True}),
        "skip_transcoder": ("layers.1.mlp", {"transcode": True, "skip_connection": True}),
    }
    for name, (hookpoint, more) in cases.items():
        coder = SparseCoder(D, SparseCoderConfig(num_latents=F, k=4, **more))
        fill(coder)
        coder.save_to_disk(root / name / hookpoint)
        keep(root / name, x, dense(coder.encode(x), F), reconstruction(coder, x), hookpoint)


def sparsify_read(folder: Path, case: dict[str, Any], x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """A coder as `load_from_disk` gives it."""
    from sparsify import SparseCoder

    coder = SparseCoder.load_from_disk(folder / case["path"])
    return dense(coder.encode(x), coder.num_latents), reconstruction(coder, x)


# circuit-tracer


def circuit_tracer_write(root: Path) -> None:
    """Transcoders of each activation, with and without a skip, and cross-layer transcoders."""
    from circuit_tracer.transcoder.activation_functions import JumpReLU, TopK
    from circuit_tracer.transcoder.cross_layer_transcoder import CrossLayerTranscoder
    from circuit_tracer.transcoder.single_layer_transcoder import SingleLayerTranscoder

    x = torch.randn(ROWS, D) + 0.3
    activations: dict[str, Callable[[], Any]] = {
        "relu": lambda: torch.nn.functional.relu,
        "jumprelu": lambda: JumpReLU(torch.rand(F), 0.1),
        "topk": lambda: TopK(4),
    }
    for name, make in activations.items():
        for skip in (False, True):
            folder = root / f"{name}{'_skip' if skip else ''}"
            made = SingleLayerTranscoder(D, F, make(), 2, skip, device=torch.device("cpu"), dtype=torch.float32)
            fill(made)
            if name == "topk":
                made.b_enc.data += 6.0  # its TopK keeps negative values, which no other does: there are none here
            folder.mkdir(parents=True)
            made.to_safetensors(str(folder / "layer_2.safetensors"))
            config = (
                "model_kind: transcoder_set\nfeature_input_hook: hook_resid_mid\nfeature_output_hook: hook_mlp_out\n"
            )
            told = {"relu": "activation: relu\n", "topk": "activation: topk\nk: 4\n"}.get(name, "")
            (folder / "config.yaml").write_text(f"{config}{told}model_name: gpt2\n")
            keep(folder, x, made.encode(x), made(x))
    for name in ("relu", "jump_relu"):
        made = CrossLayerTranscoder(
            LAYERS, F, D, name, lazy_decoder=False, device=torch.device("cpu"), dtype=torch.float32
        )
        fill(made)
        folder = root / f"clt_{name}"
        made.to_safetensors(str(folder))
        config = "model_kind: cross_layer_transcoder\n"
        config += "feature_input_hook: hook_resid_mid\nfeature_output_hook: hook_mlp_out\n"
        (folder / "config.yaml").write_text(config)
        stacked = torch.randn(LAYERS, ROWS, D)
        z = made.encode(stacked)
        keep(folder, stacked.transpose(0, 1), z.transpose(0, 1).flatten(1), made(stacked).transpose(0, 1))
    circuit_tracer_published(root, x)


def circuit_tracer_published(root: Path, x: torch.Tensor) -> None:
    """Gemma Scope's files as circuit-tracer's own converters read them."""
    import numpy as np
    from circuit_tracer.transcoder.single_layer_transcoder import (
        load_gemma_scope_2_transcoder,
        load_gemma_scope_transcoder,
    )

    weights = {"enc": torch.randn(D, F), "dec": torch.randn(F, D), "b_enc": torch.randn(F) * 0.3}
    weights |= {"b_dec": torch.randn(D) * 0.3, "threshold": torch.rand(F), "affine": torch.randn(D, D)}
    folder = root / "gemma_scope_transcoder" / "gemma-scope-2b-pt-transcoders" / "layer_4"
    folder.mkdir(parents=True)
    biases = ("b_enc", "b_dec", "threshold")
    arrays = {"W_enc": weights["enc"], "W_dec": weights["dec"], **{name: weights[name] for name in biases}}
    np.savez(folder / "params.npz", **{key: value.numpy() for key, value in arrays.items()})
    made = load_gemma_scope_transcoder(str(folder / "params.npz"), 4, device=torch.device("cpu"))
    keep(root / "gemma_scope_transcoder", x, made.encode(x), made(x), "gemma-scope-2b-pt-transcoders/layer_4")
    folder = root / "gemma_scope_2_affine" / "layer_7"
    arrays = {"w_enc": weights["enc"], "w_dec": weights["dec"], **{name: weights[name] for name in biases}}
    dump(folder / "params.safetensors", arrays | {"affine_skip_connection": weights["affine"]})
    config = {"architecture": "jump_relu", "model_name": "gemma-v3-1b-pt", "affine_connection": True}
    config |= {"hf_hook_point_in": "model.layers.7.pre_feedforward_layernorm.output"}
    config |= {"hf_hook_point_out": "model.layers.7.post_feedforward_layernorm.output"}
    (folder / "config.json").write_text(json.dumps(config))
    made = load_gemma_scope_2_transcoder(str(folder / "params.safetensors"), 7, device=torch.device("cpu"))
    keep(root / "gemma_scope_2_affine", x, made.encode(x), made(x), "layer_7")


def circuit_tracer_read(folder: Path, case: dict[str, Any], x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """A transcoder of circuit-tracer's own, or Gemma Scope's through its converters."""
    from circuit_tracer.transcoder import cross_layer_transcoder as cross
    from circuit_tracer.transcoder import single_layer_transcoder as one

    cpu, path = torch.device("cpu"), folder / case["path"]
    if case["loader"] in {"clt", "gemma-scope-2-clt"}:
        if case["loader"] == "clt":
            made = cross.load_clt(str(path), device=cpu, dtype=torch.float32, lazy_decoder=False)
        else:
            paths = {i: str(path / f"params_layer_{i}.safetensors") for i in range(LAYERS)}
            # It counts up to its largest key, which leaves the last layer out: one key more gives it all of them.
            made = cross.load_gemma_scope_2_clt(paths | {LAYERS: ""}, device=cpu, dtype=torch.float32)
        stacked = x.transpose(0, 1)
        z = made.encode(stacked)
        sparse = z.to_sparse()
        y = made.decode(sparse, stacked)
        return z.transpose(0, 1).flatten(1), y.transpose(0, 1)
    if case["loader"] == "gemma-scope":
        made = one.load_gemma_scope_transcoder(str(path / "params.npz"), 0, device=cpu)
    elif case["loader"] == "gemma-scope-2":
        made = one.load_gemma_scope_2_transcoder(str(path / "params.safetensors"), 0, device=cpu)
    else:
        from circuit_tracer.transcoder.activation_functions import TopK

        made = one.load_relu_transcoder(str(path / case["file"]), 0, cpu, lazy_encoder=False, lazy_decoder=False)
        if "k" in case:  # 0.5.0 has the activation, and its loader takes a file without thresholds as ReLU
            made.activation_function = TopK(case["k"])
    return made.encode(x), made(x)


# openai/sparse_autoencoder: no package; its model.py is imported from a checkout


def openai_write(root: Path) -> None:
    """The two kinds that OpenAI published: ReLU, and TopK of normalised rows."""
    from model import Autoencoder, TopK

    x = torch.randn(ROWS, D) + 0.3
    for name, made in {
        "v1_relu": Autoencoder(F, D),
        "v5_topk": Autoencoder(F, D, activation=TopK(4), normalize=True),
    }.items():
        fill(made)
        path = "resid_post_mlp_v5_32k/autoencoders/8.pt" if name == "v5_topk" else "resid_delta_mlp/autoencoders/2.pt"
        (root / name / path).parent.mkdir(parents=True)
        torch.save(made.state_dict(), root / name / path)
        z, info = made.encode(x)
        keep(root / name, x, z, made.decode(z, info), path)


def openai_read(folder: Path, case: dict[str, Any], x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """An autoencoder as `from_state_dict` gives it."""
    from model import Autoencoder

    made = Autoencoder.from_state_dict(torch.load(folder / case["path"]))
    z, info = made.encode(x)
    return z, made.decode(z, info)


WRITERS = {
    "sae-lens": saelens_write,
    "dictionary-learning": d_l_write,
    "eai-sparsify": sparsify_write,
    "circuit-tracer": circuit_tracer_write,
    "openai": openai_write,
}
READERS = {
    "sae-lens": saelens_read,
    "dictionary-learning": d_l_read,
    "eai-sparsify": sparsify_read,
    "circuit-tracer": circuit_tracer_read,
    "openai": openai_read,
}


def main() -> None:
    """Write or read, as the command line says."""
    what, peer, root = sys.argv[1], sys.argv[2], Path(sys.argv[3])
    warnings.simplefilter("ignore")
    torch.manual_seed(0)
    torch.set_num_threads(1)
    with torch.no_grad():
        if what == "write":
            WRITERS[peer](root)
            return
        for folder in sorted(root.iterdir()):
            case = json.loads((folder / "case.json").read_text())
            try:
                z, y = READERS[peer](folder, case, load_file(folder / "x.safetensors")["x"])
                kept = {"z": z.detach().float().contiguous(), "y": y.detach().float().contiguous()}
                save_file(kept, folder / "out.safetensors")
            except Exception as error:
                (folder / "error.txt").write_text(f"{type(error).__name__}: {error}\n{traceback.format_exc()}")


if __name__ == "__main__":
    main()
