"""What the tests of files share: random dictionaries, and the files that the peers' own packages wrote."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from assay.dictionaries import Card, CrossLayer, Dictionary, Gated, GroupMax, JumpReLU, ReLU, Site, TopK
from assay.dictionaries.activations import Activation

GOLDEN = Path(__file__).parent / "formats" / "golden"
D, F = 8, 16


@dataclass(frozen=True, slots=True, kw_only=True)
class Golden:
    """A dictionary that a peer wrote: where it is, some rows, and the peer's own encoding and reconstruction."""

    name: str
    folder: Path
    path: str

    def __str__(self) -> str:
        return self.name

    @property
    def where(self) -> Path:
        return self.folder / self.path

    @property
    def held(self) -> dict[str, torch.Tensor]:
        return load_file(self.folder / "io.safetensors")

    def copied(self, target: Path) -> Golden:
        """The same in a folder that may be spoilt."""
        shutil.copytree(self.folder, target / self.folder.name)
        return Golden(name=self.name, folder=target / self.folder.name, path=self.path)

    @property
    def weights(self) -> Path:
        """The file of its first tensors."""
        found = [p for p in sorted(self.folder.rglob("*")) if p.suffix in {".safetensors", ".npz", ".pt", ".pth"}]
        return next(
            p for p in found if p.name != "io.safetensors" and "whitening" not in p.name and "W_dec" not in p.name
        )


def golden() -> list[Golden]:
    """Every case, in order."""
    found = []
    for io in sorted(GOLDEN.rglob("io.safetensors")):
        with safe_open(io, framework="pt") as file:
            path = file.metadata()["path"]
        found.append(Golden(name="/".join(io.parts[-3:-1]), folder=io.parent, path=path))
    return found


def named(name: str) -> Golden:
    return next(case for case in golden() if case.name == name)


def change(path: Path, how: Callable[[dict[str, Any]], dict[str, Any]]) -> None:
    """Change the tensors of a file of weights."""
    if path.suffix == ".npz":
        with np.load(path) as held:
            arrays = {name: torch.from_numpy(held[name]) for name in held.files}
        np.savez(path, **{name: tensor.numpy() for name, tensor in how(arrays).items()})
    elif path.suffix == ".safetensors":
        save_file({name: tensor.contiguous() for name, tensor in how(load_file(path)).items()}, path)
    else:
        torch.save(how(dict(torch.load(path, weights_only=True))), path)


def activations(latents: int = F) -> dict[str, Activation]:
    """One of each nonlinearity."""
    return {
        "relu": ReLU(),
        "topk": TopK(k=3),
        "jumprelu": JumpReLU(threshold=torch.rand(latents)),
        "one threshold": JumpReLU(threshold=torch.full((latents,), 0.3)),
        "gated": Gated(log_gain=torch.randn(latents) * 0.1, offset=torch.randn(latents) * 0.1),
        "groupmax": GroupMax(k=4),
    }


def made(activation: Activation, *, d: int = D, latents: int = F, **more: Any) -> Dictionary:
    """A random dictionary: an SAE of `blocks.3.resid_post`, or a transcoder of the MLP there."""
    transcodes = more.pop("transcodes", False)
    reads = more.pop("reads", "blocks.3.mlp.in" if transcodes else "blocks.3.resid_post")
    writes = more.pop("writes", "blocks.3.mlp.out")
    skip = torch.randn(d, d) if more.pop("skip", False) else None
    return Dictionary(
        W_enc=torch.randn(latents, d),
        b_enc=torch.randn(latents) * 0.1,
        W_dec=torch.randn(latents, d),
        b_dec=torch.randn(d) * 0.3,
        W_skip=skip,
        activation=activation,
        card=Card(
            reads=(Site(reads, d),),
            writes=(Site(writes, d),) if transcodes else (),
            model="gpt2",
            **more,
        ),
    )


def cross_layer(jump: bool = True, reads: str = "mlp.in", skip: bool = False, layers: int = 3) -> CrossLayer:
    """A random cross-layer transcoder, 4 wide, 6 latents a layer."""
    parts = []
    for index in range(layers):
        later = 4 * (layers - index)
        affine = torch.cat([torch.randn(4, 4), torch.zeros(later - 4, 4)]) if skip else None
        parts.append(
            Dictionary(
                W_enc=torch.randn(6, 4),
                b_enc=torch.randn(6),
                W_dec=torch.randn(6, later),
                b_dec=torch.cat([torch.randn(4), torch.zeros(later - 4)]),
                W_skip=affine,
                activation=JumpReLU(threshold=torch.rand(6)) if jump else ReLU(),
                card=Card(
                    reads=(Site(f"blocks.{index}.{reads}", 4),),
                    writes=tuple(Site(f"blocks.{m}.mlp.out", 4) for m in range(index, layers)),
                ),
            )
        )
    return CrossLayer(layers=tuple(parts))
