"""Everything that a training run is between two steps: weights, moments, counters; nothing else decides the next."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor

from assay.base.errors import SpecError
from assay.dictionaries.families.family import Part


@dataclass(slots=True, kw_only=True)
class State:
    """A run between two steps.

    Attributes:
        parts: One encoder and decoder; a cross-layer transcoder has one for each layer.
        b_dec: What is written where no latent is active, `[d_out]`.
        W_skip: The map beside the latents, `[d_out, d_in]`, or None.
        scale_in: The input is multiplied by this, `[d_in]`.
        scale_out: The target is multiplied by this, `[d_out]`.
        centred: The decoder's bias is subtracted before encoding.
        silent: Rows since each latent was last active, int64 `[latent]`, for each part.
        moments: Adam's two moments of each weight, by the weight's name.
        memory: Numbers that last (a running threshold), float64 scalars.
        step: Steps done.
    """

    parts: list[Part]
    b_dec: Float[Tensor, " d_out"]
    scale_in: Float[Tensor, " d_in"]
    scale_out: Float[Tensor, " d_out"]
    centred: bool
    W_skip: Float[Tensor, "d_out d_in"] | None = None
    silent: list[Int[Tensor, " latent"]] = field(default_factory=list)
    moments: dict[str, tuple[Tensor, Tensor]] = field(default_factory=dict)
    memory: dict[str, Tensor] = field(default_factory=dict)
    step: int = 0

    def __post_init__(self) -> None:
        if not self.silent:
            self.silent = [torch.zeros(part.n_latents, dtype=torch.int64) for part in self.parts]
        if not self.moments:
            self.moments = {name: (torch.zeros_like(w), torch.zeros_like(w)) for name, w in self.weights()}

    def weights(self) -> Iterator[tuple[str, Tensor]]:
        """Every trained tensor, by name."""
        for index, part in enumerate(self.parts):
            for name in ("W_enc", "b_enc", "W_dec"):
                yield f"{index}.{name}", getattr(part, name)
            for name, tensor in part.own.items():
                yield f"{index}.{name}", tensor
        yield "b_dec", self.b_dec
        if self.W_skip is not None:
            yield "W_skip", self.W_skip

    def arrays(self) -> dict[str, np.ndarray]:
        """Everything, as named arrays for a checkpoint."""
        named = {f"weight/{name}": tensor for name, tensor in self.weights()}
        for name, (first, second) in self.moments.items():
            named |= {f"first/{name}": first, f"second/{name}": second}
        named |= {f"silent/{index}": tensor for index, tensor in enumerate(self.silent)}
        named |= {f"memory/{name}": tensor for name, tensor in self.memory.items()}
        named |= {"scale_in": self.scale_in, "scale_out": self.scale_out, "step": torch.tensor(self.step)}
        return {name: tensor.detach().cpu().numpy() for name, tensor in named.items()}

    def restore(self, arrays: dict[str, np.ndarray]) -> None:
        """Take over everything from a checkpoint of a run of the same shape.

        Raises:
            SpecError: It is of another shape.
        """
        own = self.arrays()
        fixed = {name for name in own if not name.startswith("memory/")}
        if fixed != {name for name in arrays if not name.startswith("memory/")}:
            raise SpecError("the checkpoint is of another kind of dictionary: its tensors have other names")
        for name in fixed:
            if own[name].shape != arrays[name].shape:
                raise SpecError(f"{name} has shape {arrays[name].shape} in the checkpoint and {own[name].shape} here")
        take = {name: torch.from_numpy(np.array(array)) for name, array in arrays.items()}
        for name, tensor in self.weights():
            tensor.copy_(take[f"weight/{name}"])
            for moment, kind in zip(self.moments[name], ("first", "second"), strict=True):
                moment.copy_(take[f"{kind}/{name}"])
        for index, counter in enumerate(self.silent):
            counter.copy_(take[f"silent/{index}"])
        self.scale_in.copy_(take["scale_in"])
        self.scale_out.copy_(take["scale_out"])
        self.memory = {name.removeprefix("memory/"): take[name] for name in take if name.startswith("memory/")}
        self.step = int(take["step"])
