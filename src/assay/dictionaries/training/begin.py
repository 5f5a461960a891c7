"""First weights: where a run starts from the first rows it sees."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from jaxtyping import Float
from torch import Tensor

from assay.base.errors import NumericalError, SpecError
from assay.base.rng import torch_stream
from assay.dictionaries.dictionary import Site
from assay.dictionaries.families import FAMILIES, Part
from assay.dictionaries.settings import Training
from assay.dictionaries.training.mesh import Mesh
from assay.dictionaries.training.state import State

_ALONE = Mesh()
_ROUNDS = 100
_CLOSE = 1e-5


def begin(
    settings: Training,
    x: Float[Tensor, "rows d_in"],
    y: Float[Tensor, "rows d_out"],
    reads: Sequence[Site],
    writes: Sequence[Site],
    *,
    cross_layer: bool = False,
    mesh: Mesh = _ALONE,
) -> State:
    """The state before the first step.

    Decoder rows are random directions of length 1 at each site they write; where a latent reads what it writes, its
    encoder row is its decoder row, and elsewhere another random direction. The decoder's bias is the centre of the
    rows, as `settings.bias` says.

    Args:
        settings: How the dictionary is trained.
        x: First rows of what is read, sites side by side.
        y: The same rows of what is written.
        reads: The sites of `x`.
        writes: The sites of `y`.
        cross_layer: A part for each site that is read, writing from its own layer on.
        mesh: Which latents are this process's; `x` and `y` are whole batches.

    Raises:
        NumericalError: A row is not finite, or a site is zero everywhere.
        SpecError: A cross-layer transcoder was asked of sites that do not pair up, with a skip or with nested groups;
            the decoder's bias was to be subtracted from another site.
    """
    if cross_layer and settings.family == "matryoshka":
        raise SpecError("nested groups of a cross-layer transcoder are not trained; use batchtopk", "family")
    if cross_layer and settings.skip:
        raise SpecError("a cross-layer transcoder has no skip: its layers share their outputs; leave skip out", "skip")
    scale_in, scale_out = _scales(x, reads), _scales(y, writes)
    d_in, d_out = x.shape[1], y.shape[1]
    tied = tuple(reads) == tuple(writes)
    centred = settings.centred if settings.centred is not None else tied and not cross_layer
    if centred and (not tied or cross_layer):
        raise SpecError(
            "the decoder's bias cannot be subtracted from an input of another site; leave centred out", "centred"
        )
    b_dec = centre(y * scale_out, settings.bias)
    seen = x * scale_in - (b_dec if centred else 0)
    parts = []
    for index in range(len(reads) if cross_layer else 1):
        rows, columns, widths = slice(0, d_in), slice(0, d_out), tuple(site.width for site in writes)
        if cross_layer:
            if len(reads) != len(writes) or len({s.width for s in writes}) != 1 or len({s.width for s in reads}) != 1:
                raise SpecError("a cross-layer transcoder reads and writes as many sites, all of one width")
            rows = slice(index * reads[0].width, (index + 1) * reads[0].width)
            columns, widths = slice(index * writes[0].width, d_out), widths[index:]
        part = _part(settings, index, rows, columns, widths, tied, mesh.share(settings.latents))
        FAMILIES[settings.family].begin(part, settings, seen[:, rows].to(part.W_enc))
        parts.append(part)
    return State(
        parts=parts,
        b_dec=b_dec,
        W_skip=torch.zeros(d_out, d_in) if settings.skip else None,
        scale_in=scale_in,
        scale_out=scale_out,
        centred=centred,
    )


def _part(
    settings: Training, index: int, reads: slice, writes: slice, widths: tuple[int, ...], tied: bool, share: slice
) -> Part:
    stream = torch_stream(settings.seed, "dictionary", index)
    d_in, d_out = reads.stop - reads.start, writes.stop - writes.start
    decoder = torch.randn(settings.latents, d_out, generator=stream)
    sites = torch.split(decoder, list(widths), dim=1)
    decoder = torch.cat([torch.nn.functional.normalize(site, dim=1) for site in sites], dim=1)
    decoder /= math.sqrt(len(widths))
    if tied:
        encoder = decoder.clone()
    else:
        encoder = torch.nn.functional.normalize(torch.randn(settings.latents, d_in, generator=stream), dim=1)
    return Part(
        W_enc=encoder[share].clone(),
        b_enc=torch.zeros(share.stop - share.start),
        W_dec=decoder[share].clone(),
        reads=reads,
        writes=writes,
        widths=widths,
    )


def _scales(rows: Tensor, sites: Sequence[Site]) -> Tensor:
    """One factor a site, repeated over its columns, that makes its rows' mean length the root of its width."""
    if not bool(torch.isfinite(rows).all()):
        raise NumericalError(
            "a row of activations holds NaN or infinite numbers; harvest them again, in float32 or bfloat16"
        )
    scales = []
    for site, part in zip(sites, torch.split(rows, [site.width for site in sites], dim=1), strict=True):
        length = float(part.double().norm(dim=1).mean())
        if length == 0:
            raise NumericalError(f"every row of {site.name} is 0")
        scales.append(torch.full((site.width,), math.sqrt(site.width) / length))
    return torch.cat(scales)


def centre(rows: Float[Tensor, "rows d"], kind: str) -> Float[Tensor, " d"]:
    """The zero vector, the mean, or the geometric median of rows.

    The median minimises `sum_b |x_b - m|`. It is found from the mean by Weiszfeld's rounds: `m` becomes the mean of
    the rows weighted by `1 / |x_b - m|`, until a round moves it by less than 1e-5 of its length.

    Source: Weiszfeld 1937; for dictionaries Bricken et al. 2023.

    Example:
        >>> rows = torch.tensor([[0.0], [1.0], [100.0]])
        >>> float(centre(rows, "mean")), round(float(centre(rows, "median")), 1)
        (33.66666793823242, 1.0)
    """
    if kind == "zero":
        return torch.zeros_like(rows[0])
    wide = rows.double()
    found = wide.mean(0)
    for _ in range(_ROUNDS if kind == "median" else 0):
        weights = 1 / (wide - found).norm(dim=1).clamp_min(1e-12)
        after = (weights[:, None] * wide).sum(0) / weights.sum()
        moved = float((after - found).norm())
        found = after
        if moved <= _CLOSE * float(found.norm()):
            break
    return found.float()
