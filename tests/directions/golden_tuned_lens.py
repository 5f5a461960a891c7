"""Write golden_tuned_lens.json: what the package tuned-lens trains on a model that a formula makes.

Run it where that package is installed (0.2.0 was used; it is no dependency of assay):

    python tests/directions/golden_tuned_lens.py

Its lens module and the steps of its training loop: KL to the final logits, SGD with Nesterov momentum .9 at
1 - momentum, weight decay 1e-3, gradients clipped at norm 1, a rate that falls linearly to 0. float32, CPU, one thread.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np

STEPS = 6


def model() -> Any:
    """A GPT-2 of two blocks, width 16 and 40 tokens, every parameter drawn by PCG64 from a fixed seed."""
    import torch
    from transformers import GPT2Config, GPT2LMHeadModel

    config = GPT2Config(n_embd=16, n_layer=2, n_head=2, vocab_size=40, n_positions=12, bos_token_id=1, eos_token_id=2)
    module = GPT2LMHeadModel(config).eval()
    rng = np.random.Generator(np.random.PCG64(0))
    with torch.no_grad():
        for name, parameter in sorted(module.named_parameters()):
            size = 0.3 if parameter.ndim > 1 else 0.1
            values = torch.from_numpy(rng.standard_normal(tuple(parameter.shape))).float() * size
            parameter.copy_(values + (1.0 if ".ln_" in f".{name}" and name.endswith("weight") else 0.0))
    return module


def rows() -> np.ndarray:
    """Token ids."""
    return np.random.Generator(np.random.PCG64(1)).integers(3, 40, size=(8, 10))


def main() -> None:
    import importlib.metadata

    import torch
    from tuned_lens.nn.lenses import TunedLens
    from tuned_lens.nn.unembed import Unembed

    torch.set_num_threads(1)
    module = model()
    lens = TunedLens.from_model(module)
    assert isinstance(lens.unembed, Unembed)
    parameters = [p for p in lens.parameters() if p.requires_grad]
    momentum = 0.9
    optimiser = torch.optim.SGD(parameters, lr=1 - momentum, momentum=momentum, nesterov=True, weight_decay=1e-3)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimiser, lambda step: 1 - step / STEPS)
    with torch.no_grad():
        output = module(torch.from_numpy(rows()), output_hidden_states=True)
    final = output.logits.log_softmax(-1)
    losses = []
    for _ in range(STEPS):
        optimiser.zero_grad()
        total = 0.0
        for i, hidden in enumerate(output.hidden_states[:-1]):
            loss = (final.exp() * (final - lens(hidden, idx=i).log_softmax(-1))).sum(-1).mean()
            loss.backward()
            total += float(loss.detach())
        torch.nn.utils.clip_grad_norm_(lens.parameters(), 1.0)
        optimiser.step()
        schedule.step()
        losses.append(total / len(lens))
    found = {
        "origin": {
            "package": f"tuned-lens {importlib.metadata.version('tuned-lens')}",
            "torch": torch.__version__,
            "script": Path(__file__).name,
        },
        "losses": losses,
        "weight": [translator.weight.tolist() for translator in lens],
        "bias": [translator.bias.tolist() for translator in lens],
    }
    Path(__file__).with_suffix(".json").write_text(json.dumps(found) + "\n")


if __name__ == "__main__":
    main()
