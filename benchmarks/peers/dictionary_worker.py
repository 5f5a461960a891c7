"""Time one library's training step of a dictionary, in matrix products; run in that library's own environment.

    python dictionary_worker.py LIBRARY FAMILY LATENTS ROWS.npy K REPEATS

One thread. Steps and products [rows x d] x [d x latents] alternate; a step's cost is the least thread CPU time over the
repeats, and so is the product's. Prints one JSON object.
"""

from __future__ import annotations

import json
import sys
import time
import warnings
from collections.abc import Callable

import numpy as np
import torch

warnings.filterwarnings("ignore")
torch.set_num_threads(1)
torch.manual_seed(0)


def sae_lens(family: str, d: int, latents: int, k: int) -> Callable[[int, torch.Tensor], object]:
    """SAELens' training step, as its trainer takes it."""
    import sae_lens as lib
    from sae_lens.saes.sae import TrainStepInput

    kinds = {
        "topk": (lib.TopKTrainingSAE, lib.TopKTrainingSAEConfig, {"k": k}),
        "batchtopk": (lib.BatchTopKTrainingSAE, lib.BatchTopKTrainingSAEConfig, {"k": k}),
        "jumprelu": (lib.JumpReLUTrainingSAE, lib.JumpReLUTrainingSAEConfig, {"l0_coefficient": 1.0}),
        "l1": (lib.StandardTrainingSAE, lib.StandardTrainingSAEConfig, {"l1_coefficient": 1.0}),
    }
    made, config, own = kinds[family]
    sae = made(config(d_in=d, d_sae=latents, dtype="float32", device="cpu", **own))
    optimiser = torch.optim.Adam(sae.parameters(), lr=3e-4)
    silent = torch.zeros(latents)
    coefficients = {name: c.value for name, c in sae.get_coefficients().items()}

    def step(number: int, x: torch.Tensor) -> None:
        out = sae.training_forward_pass(
            TrainStepInput(
                sae_in=x,
                coefficients=coefficients,
                dead_neuron_mask=silent > 1e9,
                n_training_steps=number,
                is_logging_step=False,
            )
        )
        with torch.no_grad():
            fired = out.feature_acts.bool().float().sum(-2).bool()
            silent.add_(1)
            silent[fired] = 0
        out.loss.backward()
        torch.nn.utils.clip_grad_norm_(sae.parameters(), 1.0)
        optimiser.step()
        optimiser.zero_grad()

    return step


def dictionary_learning(family: str, d: int, latents: int, k: int) -> Callable[[int, torch.Tensor], object]:
    """dictionary_learning's trainers."""
    from dictionary_learning.trainers.batch_top_k import BatchTopKTrainer
    from dictionary_learning.trainers.jumprelu import JumpReluTrainer
    from dictionary_learning.trainers.standard import StandardTrainer
    from dictionary_learning.trainers.top_k import TopKTrainer

    shared = {
        "steps": 10_000,
        "activation_dim": d,
        "dict_size": latents,
        "layer": 0,
        "lm_name": "none",
        "device": "cpu",
    }
    kinds = {
        "topk": (TopKTrainer, {"k": k}),
        "batchtopk": (BatchTopKTrainer, {"k": k}),
        "jumprelu": (JumpReluTrainer, {"target_l0": float(k)}),
        "l1": (StandardTrainer, {"l1_penalty": 1.0}),
    }
    made, own = kinds[family]
    trainer = made(**shared, **own)
    return lambda number, x: trainer.update(number + 1, x)


def sparsify(family: str, d: int, latents: int, k: int) -> Callable[[int, torch.Tensor], object]:
    """Sparsify's forward and backward with Adam, and its unit decoder."""
    from sparsify import SparseCoder
    from sparsify.config import SparseCoderConfig

    if family != "topk":
        raise SystemExit(3)
    coder = SparseCoder(d, SparseCoderConfig(num_latents=latents, k=k))
    optimiser = torch.optim.Adam(coder.parameters(), lr=3e-4)

    def step(number: int, x: torch.Tensor) -> None:
        coder.set_decoder_norm_to_unit_norm()
        coder(x).fvu.backward()
        coder.remove_gradient_parallel_to_decoder_directions()
        optimiser.step()
        optimiser.zero_grad()

    return step


def assay(family: str, d: int, latents: int, k: int) -> Callable[[int, torch.Tensor], object]:
    """Assay's trainer."""
    from assay.dictionaries.settings import Training
    from assay.dictionaries.training.trainer import Trainer

    own = {"k": k} if family in ("topk", "batchtopk") else {}
    if family == "jumprelu":
        own = {"penalty": "target", "target_l0": float(k)}
    settings = Training(family=family, latents=latents, steps=10_000, **own)
    held: list[Trainer] = []

    def step(number: int, x: torch.Tensor) -> None:
        batch = {"blocks.0.resid_post": x}
        if not held:
            held.append(Trainer(settings, batch, ["blocks.0.resid_post"]))
            if family in ("jumprelu", "l1"):
                _settle(held[0], x, k)
        held[0].step(batch)

    return step


def _settle(trainer: object, x: torch.Tensor, k: int) -> None:
    """Give a family without a k the biases with which k latents a row are active, as they are after training."""
    part = trainer.state.parts[0]
    rows = x * trainer.state.scale_in - trainer.state.b_dec
    h = rows[:256] @ part.W_enc.T
    part.b_enc -= h.flatten().kthvalue(h.numel() - k * len(h)).values


LIBRARIES = {
    "assay": assay,
    "sae-lens": sae_lens,
    "dictionary-learning": dictionary_learning,
    "eai-sparsify": sparsify,
}


def main() -> None:
    """Time and print."""
    library, family, latents, path, k, repeats = sys.argv[1:]
    rows = torch.from_numpy(np.load(path))
    batches = rows.split(2048)
    d, n = rows.shape[1], int(latents)
    step = LIBRARIES[library](family, d, n, int(k))
    weights, out = torch.randn(n, d), torch.empty(2048, n)
    for number in range(2):
        step(number, batches[number % len(batches)].clone())
    steps, products = [], []
    for number in range(int(repeats)):
        begun = time.thread_time()
        torch.mm(batches[0], weights.T, out=out)
        products.append(time.thread_time() - begun)
        x = batches[number % len(batches)].clone()
        begun = time.thread_time()
        step(number + 2, x)
        steps.append(time.thread_time() - begun)
    print(
        json.dumps(
            {
                "step_ms": 1e3 * min(steps),
                "product_ms": 1e3 * min(products),
                "gemms": min(steps) / min(products),
                "tokens_per_second": 2048 / min(steps),
            }
        )
    )


if __name__ == "__main__":
    main()
