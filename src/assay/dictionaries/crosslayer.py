"""Cross-layer transcoders: latents of each layer read that layer and write to it and to every later one.

For layers `0 .. L-1` with inputs `x_l` and outputs `y_m`,

    z_l = activation_l(W_enc_l x_l + b_enc_l)        y_hat_m = sum_{l <= m} z_l W_dec_l[:, m - l] + b_dec_m

Source: Ameisen et al. 2025, "Circuit Tracing: Revealing Computational Graphs in Language Models", section "Building an
interpretable replacement model".
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from assay.base.errors import SpecError
from assay.dictionaries.dictionary import Dictionary


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class CrossLayer:
    """A cross-layer transcoder: one transcoder a layer, each writing that layer and all later ones side by side.

    Args:
        layers: In order. Layer `l` of `L` reads one site and writes `L - l` sites of one width; its decoder bias is
            zero but for its first part, which is the bias of its own layer.

    Raises:
        SpecError: A layer does not write what the layers from it on read to.

    Example:
        >>> from assay.dictionaries import Card, Dictionary, ReLU, Site
        >>> def layer(i):
        ...     writes = tuple(Site(f"blocks.{m}.mlp.out", 2) for m in range(i, 2))
        ...     return Dictionary(
        ...         W_enc=torch.eye(2),
        ...         b_enc=torch.zeros(2),
        ...         W_dec=torch.ones(2, 2 * (2 - i)),
        ...         b_dec=torch.zeros(2 * (2 - i)),
        ...         activation=ReLU(),
        ...         card=Card(reads=(Site(f"blocks.{i}.mlp.in", 2),), writes=writes),
        ...     )
        >>> clt = CrossLayer(layers=(layer(0), layer(1)))
        >>> clt(torch.ones(1, 2, 2)).tolist()
        [[[2.0, 2.0], [4.0, 4.0]]]
    """

    layers: tuple[Dictionary, ...]

    def __post_init__(self) -> None:
        if not self.layers:
            raise SpecError("a cross-layer transcoder has no layers", "layers")
        outputs = self.layers[0].card.writes
        if len(outputs) != len(self.layers):
            raise SpecError(
                f"the first of {len(self.layers)} layers writes {len(outputs)} sites; it writes one for each layer",
                "layers",
            )
        for index, layer in enumerate(self.layers):
            if layer.card.writes != outputs[index:]:
                said = ", ".join(site.name for site in layer.card.writes)
                wanted = ", ".join(site.name for site in outputs[index:])
                raise SpecError(f"layer {index} writes {said} and should write {wanted}", "layers")
            if len(layer.card.reads) != 1 or layer.card.d_in != self.layers[0].card.d_in:
                raise SpecError(f"layer {index} must read one site of {self.layers[0].card.d_in} numbers", "layers")
            if layer.card.normalisation != "none":
                raise SpecError(
                    f"layer {index} normalises its rows ({layer.card.normalisation}): a sum over layers cannot undo it",
                    "layers",
                )
            if bool(layer.b_dec[outputs[index].width :].any()):
                raise SpecError(f"layer {index} has a decoder bias for a later layer; each layer's bias is its own")
        if len({site.width for site in outputs}) != 1:
            raise SpecError("the sites a cross-layer transcoder writes have one width", "layers")

    @property
    def site(self) -> str:
        """Where it reads, joined by `+`."""
        return "+".join(layer.site for layer in self.layers)

    @property
    def n_latents(self) -> int:
        """How many latents there are over all layers."""
        return sum(layer.n_latents for layer in self.layers)

    @property
    def decoder(self) -> Float[Tensor, "latent d_out"]:
        """What each latent writes to every layer, layer after layer, zeros before its own."""
        width = self.layers[0].card.d_out
        rows = [torch.nn.functional.pad(layer.W_dec, (width - layer.W_dec.shape[1], 0)) for layer in self.layers]
        return torch.cat(rows)

    def encode(self, x: Float[Tensor, "*rows layer d"]) -> Float[Tensor, "*rows latent"]:
        """Activations of the latents of every layer, layer after layer."""
        self._check(x)
        return torch.cat([layer.encode(x[..., index, :]) for index, layer in enumerate(self.layers)], dim=-1)

    def decode(self, z: Float[Tensor, "*rows latent"]) -> Float[Tensor, "*rows layer d_out"]:
        """What the latents write to each layer."""
        width = self.layers[0].card.writes[0].width
        out = self.layers[0].W_dec.new_zeros(*z.shape[:-1], len(self.layers), width)
        for index, part in enumerate(torch.split(z, [layer.n_latents for layer in self.layers], dim=-1)):
            out[..., index:, :] += torch.unflatten(self.layers[index].decode(part), -1, (-1, width))
        return out

    def __call__(self, x: Float[Tensor, "*rows layer d"]) -> Float[Tensor, "*rows layer d_out"]:
        """The outputs of every layer, reconstructed."""
        out = self.decode(self.encode(x))
        for index, layer in enumerate(self.layers):
            if layer.W_skip is not None:
                out[..., index:, :] += torch.unflatten(
                    x[..., index, :].to(layer.W_skip.dtype) @ layer.W_skip.T, -1, (-1, out.shape[-1])
                )
        return out

    def save(self, path: str | Path, format: str = "assay", **options: Any) -> Path:
        """Write it, whole or not at all, as `Dictionary.save` does."""
        from assay.dictionaries.formats import save

        return save(self, path, format, **options)

    def __repr__(self) -> str:
        return f"CrossLayer({len(self.layers)} layers, {self.n_latents} latents, {self.layers[0].site} ...)"

    def _check(self, x: Tensor) -> None:
        wanted = (len(self.layers), self.layers[0].card.d_in)
        if tuple(x.shape[-2:]) != wanted:
            raise SpecError(f"x has shape {tuple(x.shape)}; its last two dimensions must be [layer, d] = {wanted}")
