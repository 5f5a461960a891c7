"""A trained dictionary: its weights, its nonlinearity, and a card that says what it belongs to.

With `a` 1 where the card says `centred` and 0 elsewhere, for an activation `x` of the sites it reads,

    h = W_enc (x - a b_dec) + b_enc        z = activation(h)        x_hat = sum_f z_f W_dec[f] + b_dec + W_skip x

An SAE reads and writes the same site. A transcoder writes another. A crosscoder reads and writes several, which lie
side by side in `d_in` and `d_out`: it is the same value with more than one `Site`.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal, get_args

import torch
from jaxtyping import Float
from torch import Tensor

from assay.base.errors import NumericalError, SpecError
from assay.dictionaries.activations import Activation, Gated, JumpReLU, ReLU, TopK
from assay.dictionaries.latents import SparseLatents

Normalisation = Literal["none", "layer_norm", "constant_norm"]
"""What is done to each input row before encoding and undone after decoding, where it cannot be folded into weights."""


@dataclass(frozen=True, slots=True)
class Site:
    """A site and how wide it is there; heads are concatenated.

    Example:
        >>> Site("blocks.3.resid_post", 576).width
        576
    """

    name: str
    width: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Card:
    """What a dictionary belongs to, and the conventions it was trained with.

    Attributes:
        reads: The sites it encodes, side by side in this order.
        writes: The sites it reconstructs; the same as `reads` for an SAE or a crosscoder.
        model: What names the model in the file it came from.
        family: What trained it: "topk", "batchtopk", "jumprelu", "l1", "gated", "matryoshka" and so on.
        centred: The decoder bias is subtracted before encoding.
        normalisation: What is done to each row before encoding, and undone after decoding. A constant factor is folded
            into the weights when a file is read and does not appear here.
        mean_norm: The mean length of the rows it was trained on, None where the file does not say.
        training: JSON values about how it was trained: data, steps, seed, measured L0 and the rest.
        source: The format of the file it came from, and what that file said that has no place above.
    """

    reads: tuple[Site, ...]
    writes: tuple[Site, ...] = ()
    model: str = ""
    family: str = ""
    centred: bool = False
    normalisation: Normalisation = "none"
    mean_norm: float | None = None
    training: Mapping[str, Any] = field(default_factory=dict)
    source: Mapping[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if not self.reads:
            raise SpecError("a dictionary's card names no site that it reads", "reads")
        if not self.writes:
            object.__setattr__(self, "writes", self.reads)
        if self.normalisation not in get_args(Normalisation):
            raise SpecError(
                f"normalisation is {self.normalisation!r}; valid: {', '.join(get_args(Normalisation))}", "normalisation"
            )
        if self.centred and self.d_in != self.d_out:
            raise SpecError(
                f"the decoder bias has {self.d_out} numbers and the input {self.d_in}: it cannot be subtracted before "
                "encoding; give centred=False",
                "centred",
            )

    @property
    def d_in(self) -> int:
        """The width of what it reads, over all sites."""
        return sum(site.width for site in self.reads)

    @property
    def d_out(self) -> int:
        """The width of what it writes, over all sites."""
        return sum(site.width for site in self.writes)

    @property
    def kind(self) -> Literal["sae", "transcoder", "crosscoder"]:
        """What such a dictionary is called."""
        if self.reads != self.writes:
            return "transcoder"
        return "sae" if len(self.reads) == 1 else "crosscoder"


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Dictionary:
    """A trained dictionary; its units are latents.

    Args:
        W_enc: One row a latent, what it reads, `[latent, d_in]`.
        b_enc: `[latent]`.
        W_dec: One row a latent, what it writes, `[latent, d_out]`.
        b_dec: `[d_out]`.
        activation: The nonlinearity.
        card: What it belongs to.
        W_skip: A linear map beside the latents, `[d_out, d_in]`.

    Raises:
        SpecError: Shapes do not fit each other or the card.
        NumericalError: A weight is not finite.

    Example:
        >>> eye = torch.eye(3)
        >>> d = Dictionary(
        ...     W_enc=eye,
        ...     b_enc=torch.zeros(3),
        ...     W_dec=eye,
        ...     b_dec=torch.zeros(3),
        ...     activation=TopK(k=1),
        ...     card=Card(reads=(Site("blocks.0.resid_post", 3),)),
        ... )
        >>> d(torch.tensor([[1.0, 4.0, 2.0]])).tolist(), d.kind
        ([[0.0, 4.0, 0.0]], 'sae')
    """

    W_enc: Float[Tensor, "latent d_in"]
    b_enc: Float[Tensor, " latent"]
    W_dec: Float[Tensor, "latent d_out"]
    b_dec: Float[Tensor, " d_out"]
    activation: Activation = field(default_factory=ReLU)
    card: Card
    W_skip: Float[Tensor, "d_out d_in"] | None = None

    def __post_init__(self) -> None:
        latents, d_in, d_out = len(self.W_enc), self.card.d_in, self.card.d_out
        wanted = {
            "W_enc": (latents, d_in),
            "b_enc": (latents,),
            "W_dec": (latents, d_out),
            "b_dec": (d_out,),
            "W_skip": (d_out, d_in),
            **{name: (latents,) for name in self.activation.tensors()},
        }
        if self.W_skip is not None and self.card.normalisation != "none":
            raise SpecError(
                f"rows are normalised ({self.card.normalisation}) and there is a skip: whether it acts on rows as they "
                "are or as normalised is not settled; use one of the two",
                "W_skip",
            )
        for name, tensor in self.tensors().items():
            if tuple(tensor.shape) != wanted[name]:
                raise SpecError(
                    f"{name} has shape {tuple(tensor.shape)} and should have {wanted[name]}: {latents} latents, "
                    f"{d_in} inputs, {d_out} outputs",
                    name,
                )
            if not bool(torch.isfinite(tensor).all()):
                raise NumericalError(f"{name} holds NaN or infinite numbers")

    @property
    def site(self) -> str:
        """Where it reads: one site, or several joined by `+`."""
        return "+".join(site.name for site in self.card.reads)

    @property
    def kind(self) -> str:
        """`sae`, `transcoder` or `crosscoder`."""
        return self.card.kind

    @property
    def n_latents(self) -> int:
        """How many latents it has."""
        return len(self.W_enc)

    @property
    def decoder(self) -> Float[Tensor, "latent d_out"]:
        """What each latent writes."""
        return self.W_dec

    def tensors(self) -> dict[str, Tensor]:
        """Every weight, by name."""
        named = {"W_enc": self.W_enc, "b_enc": self.b_enc, "W_dec": self.W_dec, "b_dec": self.b_dec}
        if self.W_skip is not None:
            named["W_skip"] = self.W_skip
        return named | self.activation.tensors()

    def to(self, where: Any) -> Dictionary:
        """The same on another device or in another float type, as `Tensor.to` takes it."""
        return _mapped(self, lambda tensor: tensor.to(where))

    def pre_activations(self, x: Float[Tensor, "*rows d_in"]) -> Float[Tensor, "*rows latent"]:
        """The encoder's affine map `h`, before the nonlinearity."""
        return self._inputs(x) @ self.W_enc.T + self._bias()

    def encode(self, x: Float[Tensor, "*rows d_in"]) -> Float[Tensor, "*rows latent"]:
        """Activations of latents, with their zeros.

        Args:
            x: Activations of the sites, side by side; computed in the weights' float type.

        Raises:
            SpecError: The last dimension is not `d_in`.
        """
        return self.activation(self.pre_activations(x))

    def encode_sparse(self, x: Float[Tensor, "*rows d_in"]) -> SparseLatents:
        """The same as pairs, without `[rows, latent]` numbers at once for TopK, ReLU and JumpReLU.

        Of pre-activations that are equal to the last float, TopK keeps the first here and in `encode`.

        Raises:
            SpecError: The last dimension is not `d_in`.
        """
        from assay.dictionaries.kernels.backend import backend

        rows = self._inputs(x).reshape(-1, self.card.d_in).contiguous()
        bias = self._bias().contiguous()
        kernels = backend(rows.device)
        if rows.dtype != torch.float32 or not isinstance(self.activation, TopK | ReLU | JumpReLU):
            return SparseLatents.from_dense(self.encode(x))
        weights = self.W_enc.contiguous()
        if isinstance(self.activation, TopK):
            pairs = kernels.select_rows(rows, weights, bias, self.activation.k)
        else:
            bound = torch.zeros_like(bias) if isinstance(self.activation, ReLU) else self.activation.threshold
            pairs = kernels.select_above(rows, weights, bias, bound)
        return replace(pairs, shape=tuple(x.shape[:-1]))

    def decode(self, z: Float[Tensor, "*rows latent"] | SparseLatents) -> Float[Tensor, "*rows d_out"]:
        """What the latents write, `sum_f z_f W_dec[f] + b_dec`: without the skip, and in units of normalised rows.

        `d(x)` adds the skip and undoes the normalisation, which need `x`.
        """
        if not isinstance(z, SparseLatents):
            return z.to(self.W_dec.dtype) @ self.W_dec + self.b_dec
        if z.values.dtype != torch.float32 or self.W_dec.dtype != torch.float32:
            return self.decode(z.to_dense())
        from assay.dictionaries.kernels.backend import backend

        flat = backend(z.values.device).decode(z, self.W_dec.contiguous(), self.b_dec.contiguous())
        return flat.reshape(*z.shape, self.W_dec.shape[1])

    def __call__(self, x: Float[Tensor, "*rows d_in"]) -> Float[Tensor, "*rows d_out"]:
        """The reconstruction: of `x` itself for an SAE or a crosscoder, of what `x` leads to for a transcoder."""
        out = self.decode(self.encode(x))
        if self.W_skip is not None:
            out = out + x.to(self.W_skip.dtype) @ self.W_skip.T
        if self.card.normalisation == "none":
            return out
        shift, _, scale = _row_scale(x.to(out.dtype), self.card.normalisation)
        return out * scale + shift

    def split(self, out: Float[Tensor, "*rows d_out"]) -> dict[str, Tensor]:
        """Cut a reconstruction into the sites it writes, by name; a site that is written twice keeps its last part."""
        parts = torch.split(out, [site.width for site in self.card.writes], dim=-1)
        return {site.name: part for site, part in zip(self.card.writes, parts, strict=True)}

    def folded(self, factor: float | Tensor, factor_out: float | Tensor | None = None) -> Dictionary:
        """The dictionary of raw activations, where this one is of activations times a factor.

            W_enc <- W_enc factor    W_dec <- W_dec / factor_out    b_dec <- b_dec / factor_out

        Activations of latents, thresholds and the encoder's bias stay. The card's mean length becomes that of raw rows,
        or None where columns have factors of their own.

        Args:
            factor: Of what it reads: one number, or one a column `[d_in]`.
            factor_out: Of what it writes, `[d_out]`; the same where not given.

        Raises:
            SpecError: A factor is not positive, rows are normalised one by one, or a centred dictionary is to have two.
        """
        given = [torch.as_tensor(f).to(self.W_enc) for f in (factor, factor if factor_out is None else factor_out)]
        for one, width in zip(given, (self.card.d_in, self.card.d_out), strict=True):
            if one.ndim and tuple(one.shape) != (width,):
                raise SpecError(f"a factor has shape {list(one.shape)}; give one number, or [{width}]", "factor")
        if not all(bool((torch.isfinite(f) & (f > 0)).all()) for f in given):
            raise SpecError(f"a factor of the input is {factor!r}; it must be positive", "factor")
        if self.card.normalisation != "none":
            raise SpecError(f"rows are normalised by {self.card.normalisation!r}: a factor before that does nothing")
        into, out = given
        if self.card.centred and not torch.equal(into, out):
            raise SpecError("a centred dictionary has one factor for what it reads and what it writes", "factor_out")
        skip = self.W_skip
        if skip is not None:
            skip = skip * into / (out[:, None] if out.ndim else out)
        mean = self.card.mean_norm
        if mean is not None:  # of rows that are now longer by one number, or by more than one
            mean = mean / float(into.flatten()[0]) if bool((into == into.flatten()[0]).all()) else None
        card = replace(self.card, mean_norm=mean)
        return replace(
            self, W_enc=self.W_enc * into, W_dec=self.W_dec / out, b_dec=self.b_dec / out, W_skip=skip, card=card
        )

    def with_unit_decoder(self) -> Dictionary:
        """The same dictionary with decoder rows of length 1: lengths move into the encoder, biases and thresholds.

        `z` is multiplied by each row's length; reconstructions stay. A row of zeros stays as it is.

        Raises:
            SpecError: The nonlinearity compares latents with each other (TopK, GroupMax), so that scaling them one by
                one would choose others.
        """
        norms = self.W_dec.norm(dim=1)
        if isinstance(self.activation, ReLU | JumpReLU | Gated):
            scale = torch.where(norms > 0, norms, 1.0)
        else:
            raise SpecError(
                f"{self.activation.name} cannot be rescaled latent by latent without changing which are active"
            )
        activation = self.activation
        if isinstance(activation, JumpReLU):
            activation = JumpReLU(threshold=activation.threshold * scale)
        if isinstance(activation, Gated):
            activation = replace(activation, offset=activation.offset * scale)
        return replace(
            self,
            W_enc=self.W_enc * scale[:, None],
            b_enc=self.b_enc * scale,
            W_dec=self.W_dec / scale[:, None],
            activation=activation,
        )

    def check_inputs(self, x: Float[Tensor, "*rows d_in"], factor: float = 3.0) -> str:
        """Warn where the mean length of rows is not near what the card says; returns the warning, or nothing.

        Args:
            x: Some rows.
            factor: How many times longer or shorter they may be.
        """
        if self.card.mean_norm is None:
            return ""
        found = float(x.reshape(-1, x.shape[-1]).float().norm(dim=1).mean())
        ratio = found / max(self.card.mean_norm, 1e-30)
        if 1 / factor <= ratio <= factor:
            return ""
        text = (
            f"rows of {self.site} have mean length {found:.3g} and this dictionary was trained on "
            f"{self.card.mean_norm:.3g}: another site, another model, or a factor that was not folded"
        )
        warnings.warn(text, stacklevel=2)
        return text

    def save(self, path: str | Path, format: str = "assay", **options: Any) -> Path:
        """Write the dictionary, whole or not at all.

        Args:
            path: A folder, or a file where the format is one file.
            format: A name that `assay.dictionaries.formats.names()` lists.
            options: What the format needs and the card does not hold.

        Returns:
            Where it was written.

        Raises:
            SpecError: There is no such format, or it cannot hold this dictionary; the message says what it lacks.
            OutputError: It cannot be written there.
        """
        from assay.dictionaries.formats import save

        return save(self, path, format, **options)

    def __repr__(self) -> str:
        where = self.site if self.kind != "transcoder" else f"{self.site} -> {self.card.writes[0].name}"
        return f"Dictionary({self.kind} {self.card.family or self.activation.name}, {self.n_latents} latents, {where})"

    def _bias(self) -> Tensor:
        """The encoder's bias with the centring folded in, `b_enc - a W_enc b_dec`."""
        return self.b_enc - self.W_enc @ self.b_dec if self.card.centred else self.b_enc

    def _inputs(self, x: Tensor) -> Tensor:
        if x.shape[-1] != self.card.d_in:
            sites = ", ".join(f"{site.name} ({site.width})" for site in self.card.reads)
            raise SpecError(f"rows have {x.shape[-1]} numbers and this dictionary reads {self.card.d_in}: {sites}")
        x = x.to(self.W_enc.dtype)
        if self.card.normalisation == "none":
            return x
        shift, divisor, _ = _row_scale(x, self.card.normalisation)
        return (x - shift) / divisor


def _row_scale(x: Tensor, kind: Normalisation) -> tuple[Tensor, Tensor, Tensor]:
    """What is subtracted from each row, what it is then divided by, and what its reconstruction is multiplied by.

    As in OpenAI's and SAELens's layer norm, 1e-5 is added to the divisor alone.
    """
    if kind == "layer_norm":
        deviation = x.std(-1, keepdim=True)
        return x.mean(-1, keepdim=True), deviation + 1e-5, deviation
    scale = x.norm(dim=-1, keepdim=True) / math.sqrt(x.shape[-1])
    return torch.zeros_like(scale), scale, scale


def _mapped(dictionary: Dictionary, change: Any) -> Dictionary:
    own = {name: change(tensor) for name, tensor in dictionary.activation.tensors().items()}
    activation: Any = dictionary.activation
    named = {name: change(tensor) for name, tensor in dictionary.tensors().items() if name not in own}
    return replace(dictionary, **named, activation=replace(activation, **own) if own else activation)
