"""Time or train a dictionary with one library; run in that library's own environment.

    python dictionary_worker.py time  '{"library": ..., "family": ..., "latents": ..., "rows": FILE, "k": ...}'
    python dictionary_worker.py train '{..., "steps": ..., "batch": ..., "lr": ..., "seed": ..., "out": FOLDER}'

`time`: steps and products [rows x d] x [d x latents] alternate on one thread; a step's cost is the least thread CPU
time over the repeats, and so is the product's. Prints one JSON object.

`train`: the same rows in the same order for every library (a permutation of each epoch, drawn from the seed), the same
rate at each step (a rise over 2% of the steps, a fall to 0 over the last 20%), and otherwise what the library does. The
result is saved as the library saves it.
"""

from __future__ import annotations

import json
import sys
import time
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

warnings.filterwarnings("ignore")
torch.set_num_threads(1)
torch.manual_seed(0)


@dataclass
class Asked:
    """What a library is to train.

    Attributes:
        family: topk, batchtopk, jumprelu or l1.
        d: Width.
        latents: Latents.
        k: Active latents, where the family is told.
        strength: The sparsity penalty's weight, where it has one; 0 for the library's own.
        threshold: Where JumpReLU's thresholds start in assay; None for its own choice.
        target_l0: What a JumpReLU of assay is to reach; None for `k`.
        steps: Steps of the whole run.
        lr: The rate at its highest.
        seed: Of the first weights.
        site: Goes onto assay's card.
    """

    family: str
    d: int
    latents: int
    k: int
    strength: float = 0.0
    threshold: float | None = None
    target_l0: float | None = None
    steps: int = 10_000
    lr: float = 3e-4
    seed: int = 0
    site: str = "blocks.0.resid_post"

    def rate(self, step: int) -> float:
        """The rate at a step, as a share of the highest."""
        return min(
            1.0, (step + 1) / max(1, round(0.02 * self.steps)), (self.steps - step) / max(1, round(0.2 * self.steps))
        )


Step = Callable[[int, torch.Tensor], object]
Save = Callable[[Path], object]


def sae_lens(asked: Asked) -> tuple[Step, Save]:
    """SAELens' training step, as its trainer takes it."""
    import sae_lens as lib
    from sae_lens.saes.sae import TrainStepInput

    weight = asked.strength or 1.0
    kinds = {
        "topk": (lib.TopKTrainingSAE, lib.TopKTrainingSAEConfig, {"k": asked.k}),
        "batchtopk": (lib.BatchTopKTrainingSAE, lib.BatchTopKTrainingSAEConfig, {"k": asked.k}),
        "jumprelu": (lib.JumpReLUTrainingSAE, lib.JumpReLUTrainingSAEConfig, {"l0_coefficient": weight}),
        "l1": (lib.StandardTrainingSAE, lib.StandardTrainingSAEConfig, {"l1_coefficient": weight}),
    }
    made, config, own = kinds[asked.family]
    sae = made(config(d_in=asked.d, d_sae=asked.latents, dtype="float32", device="cpu", **own))
    optimiser = torch.optim.Adam(sae.parameters(), lr=asked.lr)
    silent = torch.zeros(asked.latents)
    coefficients = {name: c.value for name, c in sae.get_coefficients().items()}

    def step(number: int, x: torch.Tensor) -> None:
        optimiser.param_groups[0]["lr"] = asked.lr * asked.rate(number)
        out = sae.training_forward_pass(
            TrainStepInput(
                sae_in=x,
                coefficients={n: c * min(1.0, (number + 1) / (0.1 * asked.steps)) for n, c in coefficients.items()},
                dead_neuron_mask=silent > 1000,
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

    return step, lambda folder: sae.save_inference_model(str(folder))


def dictionary_learning(asked: Asked) -> tuple[Step, Save]:
    """dictionary_learning's trainers."""
    from dictionary_learning.trainers.batch_top_k import BatchTopKTrainer
    from dictionary_learning.trainers.jumprelu import JumpReluTrainer
    from dictionary_learning.trainers.standard import StandardTrainer
    from dictionary_learning.trainers.top_k import TopKTrainer

    shared = {
        "steps": asked.steps,
        "activation_dim": asked.d,
        "dict_size": asked.latents,
        "layer": 0,
        "lm_name": "none",
        "device": "cpu",
        "lr": asked.lr,
        "seed": asked.seed,
        "warmup_steps": max(1, round(0.02 * asked.steps)),
        "decay_start": round(0.8 * asked.steps),
    }
    early = {"threshold_start_step": asked.steps // 2}
    warm = {"sparsity_warmup_steps": max(1, asked.steps // 10)}
    kinds = {
        "topk": (TopKTrainer, {"k": asked.k, **early}),
        "batchtopk": (BatchTopKTrainer, {"k": asked.k, **early}),
        "jumprelu": (JumpReluTrainer, {"target_l0": float(asked.k), **warm}),
        "l1": (StandardTrainer, {"l1_penalty": asked.strength or 1.0, **warm}),
    }
    made, own = kinds[asked.family]
    trainer = made(**shared, **own)

    def save(folder: Path) -> None:
        folder.mkdir(parents=True)
        torch.save(trainer.ae.state_dict(), folder / "ae.pt")
        (folder / "config.json").write_text(json.dumps({"trainer": trainer.config}, default=str))

    return lambda number, x: trainer.update(number, x), save


def sparsify(asked: Asked) -> tuple[Step, Save]:
    """Forward and backward of sparsify with Adam, and its unit decoder."""
    from sparsify import SparseCoder
    from sparsify.config import SparseCoderConfig

    if asked.family != "topk":
        raise SystemExit(3)
    coder = SparseCoder(asked.d, SparseCoderConfig(num_latents=asked.latents, k=asked.k))
    optimiser = torch.optim.Adam(coder.parameters(), lr=asked.lr)

    def step(number: int, x: torch.Tensor) -> None:
        if number == 0:
            coder.b_dec.data = x.mean(0)
        optimiser.param_groups[0]["lr"] = asked.lr * asked.rate(number)
        coder.set_decoder_norm_to_unit_norm()
        coder(x).fvu.backward()
        coder.remove_gradient_parallel_to_decoder_directions()
        optimiser.step()
        optimiser.zero_grad()

    return step, lambda folder: coder.save_to_disk(folder)


def assay(asked: Asked) -> tuple[Step, Save]:
    """Assay's trainer."""
    from assay.dictionaries.settings import Training
    from assay.dictionaries.training.trainer import Trainer

    own = {"k": asked.k} if asked.family in ("topk", "batchtopk") else {}
    if asked.family == "jumprelu":
        own = {"penalty": "target", "target_l0": asked.target_l0 or float(asked.k), "threshold": asked.threshold}
    if asked.strength:
        own["sparsity"] = asked.strength
    settings = Training(
        family=asked.family, latents=asked.latents, steps=asked.steps, lr=asked.lr, seed=asked.seed, **own
    )
    held: list[Trainer] = []

    def step(number: int, x: torch.Tensor) -> None:
        batch = {asked.site: x}
        if not held:
            held.append(Trainer(settings, batch, [asked.site]))
            if asked.steps == TIMED and asked.family in ("jumprelu", "l1"):
                _settle(held[0], x, asked.k)
        held[0].step(batch)

    return step, lambda folder: held[0].finished().save(folder)


def _settle(trainer: object, x: torch.Tensor, k: int) -> None:
    """Give a family without a k the thresholds or biases with which k latents a row are active, as after training."""
    part = trainer.state.parts[0]
    rows = x * trainer.state.scale_in - trainer.state.b_dec
    h = rows[:256] @ part.W_enc.T
    bound = h.flatten().kthvalue(h.numel() - k * len(h)).values
    if "threshold" in part.own:
        part.own["threshold"].fill_(float(bound))
    else:
        part.b_enc -= bound


TIMED = 10_000
LIBRARIES = {
    "assay": assay,
    "sae-lens": sae_lens,
    "dictionary-learning": dictionary_learning,
    "eai-sparsify": sparsify,
}


def timed(library: str, asked: Asked, rows: torch.Tensor, repeats: int) -> dict[str, float]:
    """The least cost of a step and of a product."""
    batches = rows.split(2048)
    step, _ = LIBRARIES[library](asked)
    weights, out = torch.randn(asked.latents, asked.d), torch.empty(2048, asked.latents)
    for number in range(2):
        step(number, batches[number % len(batches)].clone())
    steps, products = [], []
    for number in range(repeats):
        begun = time.thread_time()
        torch.mm(batches[0], weights.T, out=out)
        products.append(time.thread_time() - begun)
        x = batches[number % len(batches)].clone()
        begun = time.thread_time()
        step(number + 2, x)
        steps.append(time.thread_time() - begun)
    return {"gemms": min(steps) / min(products), "tokens_per_second": 2048 / min(steps)}


def trained(library: str, asked: Asked, rows: torch.Tensor, batch: int, out: Path) -> dict[str, float]:
    """Train on the rows and save."""
    step, save = LIBRARIES[library](asked)
    per_epoch = len(rows) // batch
    begun = time.process_time()
    for number in range(asked.steps):
        epoch, place = divmod(number, per_epoch)
        if place == 0:
            order = torch.from_numpy(np.random.default_rng([asked.seed, epoch]).permutation(len(rows)))
        step(number, rows[order[place * batch : (place + 1) * batch]])
    save(out)
    return {"cpu_seconds": time.process_time() - begun}


def main() -> None:
    """Do what is asked and print."""
    what, given = sys.argv[1], json.loads(sys.argv[2])
    rows = torch.from_numpy(np.load(given.pop("rows")))
    library, repeats = given.pop("library"), given.pop("repeats", 6)
    batch, out = given.pop("batch", 2048), Path(given.pop("out", "."))
    asked = Asked(d=rows.shape[1], **given)
    torch.manual_seed(asked.seed)
    found = timed(library, asked, rows, repeats) if what == "time" else trained(library, asked, rows, batch, out)
    print(json.dumps(found))


if __name__ == "__main__":
    main()
