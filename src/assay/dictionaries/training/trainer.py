"""One dictionary in training: batches in, steps and curves, and a finished dictionary out."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor

from assay.base.errors import SpecError
from assay.dictionaries.crosslayer import CrossLayer
from assay.dictionaries.dictionary import Card, Dictionary, Site
from assay.dictionaries.families import FAMILIES, Part
from assay.dictionaries.settings import Training
from assay.dictionaries.training.begin import begin
from assay.dictionaries.training.dead import resample
from assay.dictionaries.training.mesh import Merged, Mesh
from assay.dictionaries.training.source import mean_length, side_by_side
from assay.dictionaries.training.step import Report, apply, forward_backward

_ALONE = Mesh()
CURVES = ("step", "squared_error", "fvu", "l0", "dead", "penalty")


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Trained:
    """A finished run.

    Attributes:
        dictionary: What was learned, of raw activations.
        curves: A column for each of step, squared_error, fvu, l0, dead and penalty.
        steps: Steps done, over all sessions.
        resumed_at: The step this session went on from, 0 for a fresh run.
    """

    dictionary: Dictionary | CrossLayer
    curves: Mapping[str, np.ndarray]
    steps: int
    resumed_at: int


class Trainer:
    """One dictionary in training, fed batch by batch.

    Args:
        settings: How it is trained.
        first: The first batch, which sets scales and the decoder's bias.
        reads: The sites it reads.
        writes: The sites it writes; the same where not given.
        cross_layer: Latents of each site it reads write from that layer on.
        model: Goes onto the card.
        mesh: Where this process is among those that train the dictionary together.

    Raises:
        SpecError: What is asked cannot be divided among the processes.
    """

    def __init__(
        self,
        settings: Training,
        first: Mapping[str, Tensor],
        reads: Sequence[str],
        writes: Sequence[str] | None = None,
        *,
        cross_layer: bool = False,
        model: str = "",
        mesh: Mesh = _ALONE,
    ) -> None:
        from assay.dictionaries.kernels.backend import backend

        whole = settings.family if settings.family == "matryoshka" else f"dead={settings.dead!r}"
        if mesh.latent > 1 and whole in ("matryoshka", "dead='ghost'", "dead='ghost-scaled'"):
            raise SpecError(f"{whole} needs all latents in one process: divide the rows instead", "share_latents")
        self.settings, self.mesh = settings, mesh
        self.reads = tuple(Site(name, first[name].shape[1]) for name in reads)
        self.writes = tuple(Site(name, first[name].shape[1]) for name in writes) if writes else self.reads
        self.cross_layer, self.model = cross_layer, model
        x, y = side_by_side(first, self.reads), side_by_side(first, self.writes)
        self.mean_norm = mean_length(x)
        self.state = begin(settings, x, y, self.reads, self.writes, cross_layer=cross_layer, mesh=mesh)
        own = backend(x.device)
        self._kernels = own if mesh.size == 1 else Merged(own, mesh)
        self.curves: list[tuple[float, ...]] = []

    @property
    def done(self) -> bool:
        """Whether every step has been taken."""
        return self.state.step >= self.settings.steps

    def step(self, batch: Mapping[str, Tensor]) -> Report:
        """Take one step on a batch.

        Raises:
            NumericalError: The loss is not finite; the state is as it was before.
        """
        state, settings = self.state, self.settings
        mine = {name: self.mesh.rows(rows) for name, rows in batch.items()}
        x = side_by_side(mine, self.reads) * state.scale_in
        y = x if self.writes == self.reads else side_by_side(mine, self.writes) * state.scale_out
        gradients, report, error = forward_backward(state, settings, self._kernels, x, y, self.mesh)
        apply(state, settings, self._kernels, gradients, self.mesh)
        if settings.dead == "resample" and state.step % settings.resample_every == 0 and not self._settling():
            resample(state, settings, x, error, self.mesh)
        self.curves.append((float(state.step), *(float(getattr(report, name)) for name in CURVES[1:])))
        return report

    def finished(self) -> Dictionary | CrossLayer:
        """The dictionary of raw activations: the rows' scale is folded into the weights."""
        state, settings = self.state, self.settings
        family = FAMILIES[settings.family]
        layers = []
        for index, part in enumerate(state.parts):
            reads = (self.reads[index],) if self.cross_layer else self.reads
            writes = self.writes[index:] if self.cross_layer else self.writes
            whole = self._whole(part)
            bias = state.b_dec[part.writes].clone()
            if self.cross_layer:
                bias[self.writes[0].width :] = 0
            card = Card(
                reads=reads,
                writes=writes,
                model=self.model,
                family=settings.family,
                centred=state.centred,
                training={"settings": settings.model_dump(mode="json"), "steps": state.step},
            )
            made = Dictionary(
                W_enc=whole.W_enc,
                b_enc=whole.b_enc,
                W_dec=whole.W_dec,
                b_dec=bias,
                activation=family.activation(whole, settings, state.memory),
                card=card,
                W_skip=None if state.W_skip is None else state.W_skip.clone(),
            )
            made = made.folded(state.scale_in[part.reads], state.scale_out[part.writes])
            mean = self.mean_norm
            if self.cross_layer:  # a layer's card is of its own site, whose rows were scaled to the root of its width
                mean = math.sqrt(made.card.d_in) / float(state.scale_in[part.reads][0])
            layers.append(replace(made, card=replace(made.card, mean_norm=mean)))
        return CrossLayer(layers=tuple(layers)) if self.cross_layer else layers[0]

    def arrays(self) -> dict[str, np.ndarray]:
        """Everything a checkpoint needs."""
        curves = np.asarray(self.curves, dtype=np.float64).reshape(-1, len(CURVES))
        return self.state.arrays() | {"curves": curves, "mean_norm": np.asarray(self.mean_norm)}

    def restore(self, arrays: dict[str, np.ndarray]) -> None:
        """Go on from a checkpoint of the same run."""
        arrays = dict(arrays)
        self.curves = [tuple(row) for row in arrays.pop("curves").tolist()]
        self.mean_norm = float(arrays.pop("mean_norm"))
        self.state.restore(arrays)

    def _whole(self, part: Part) -> Part:
        """A copy of a part with the latents of all processes."""

        def joined(tensor: Tensor) -> Tensor:
            return torch.cat(self.mesh.gathered(tensor.clone(), along="latent"))

        own = {name: joined(tensor) for name, tensor in part.own.items()}
        encoder, bias, decoder = joined(part.W_enc), joined(part.b_enc), joined(part.W_dec)
        return replace(part, W_enc=encoder, b_enc=bias, W_dec=decoder, own=own)

    def _settling(self) -> bool:
        """Whether the rate is already falling: a latent that starts again then has no time to learn."""
        return self.state.step >= self.settings.steps * (1 - self.settings.decay)
