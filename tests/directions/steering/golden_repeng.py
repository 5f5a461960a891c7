"""Write golden_repeng.json: the control vectors that the package repeng trains on a model that a formula makes.

Run it where that package is installed (0.4.0 was used; it is no dependency of assay):

    python tests/directions/steering/golden_repeng.py

Both of its PCA methods at every layer, on pairs of texts that are not all of one length; float32, CPU, one thread.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np

WORDS = "the film was dull fine grim warm cold a very and so book song bright".split()
METHODS = ("pca_diff", "pca_center")
LAYERS = 3


def model() -> Any:
    """A GPT-2 of three blocks and width 16, every parameter drawn by PCG64 from a fixed seed."""
    import torch
    from transformers import GPT2Config, GPT2LMHeadModel

    config = GPT2Config(
        n_embd=16, n_layer=LAYERS, n_head=2, vocab_size=len(WORDS) + 2, n_positions=12, bos_token_id=1, eos_token_id=1
    )
    module = GPT2LMHeadModel(config).eval()
    rng = np.random.Generator(np.random.PCG64(0))
    with torch.no_grad():
        for name, parameter in sorted(module.named_parameters()):
            size = 0.3 if parameter.ndim > 1 else 0.1
            values = torch.from_numpy(rng.standard_normal(tuple(parameter.shape))).float() * size
            parameter.copy_(values + (1.0 if ".ln_" in f".{name}" and name.endswith("weight") else 0.0))
    return module


def tokenizer(side: str = "right") -> Any:
    """Words are tokens."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    words = ["<pad>", "<unk>", *WORDS]
    made = Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)}, unk_token="<unk>"))
    made.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(tokenizer_object=made, pad_token="<pad>", unk_token="<unk>", padding_side=side)


def pairs() -> list[tuple[str, str]]:
    """Texts that differ in their last word, or in their last and their length."""
    heads = ("the film was", "a book was", "the song was very", "a film was so", "the book", "a song and the film was")
    return [
        (f"{head} {good}", f"{head} {more}{bad}")
        for head in heads
        for good, bad, more in (("fine", "dull", ""), ("warm", "cold", "very "), ("bright", "grim", ""))
    ]


def main() -> None:
    import importlib.metadata

    import torch
    from repeng import ControlVector, DatasetEntry

    torch.set_num_threads(1)
    data = [DatasetEntry(positive=a, negative=b) for a, b in pairs()]
    layers = list(range(LAYERS))
    made = {
        method: ControlVector.train(model(), tokenizer(), data, method=method, hidden_layers=layers)
        for method in METHODS
    }
    default = ControlVector.train(model(), tokenizer(), data)
    left = ControlVector.train(model(), tokenizer("left"), data, method="pca_center", hidden_layers=layers)
    golden = {
        "origin": {
            "package": f"repeng {importlib.metadata.version('repeng')}",
            "script": Path(__file__).name,
            "torch": torch.__version__,
            "layers by default": sorted(default.directions),
        },
        "directions": {
            method: {str(layer): vector.directions[layer].tolist() for layer in layers}
            for method, vector in {**made, "pca_center, padded on the left": left}.items()
        },
    }
    path = Path(__file__).with_suffix(".json")
    path.write_text(json.dumps(golden) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
