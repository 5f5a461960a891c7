"""Dead latents: which are dead, and the three things that are done about them.

    aux           the k_aux largest dead latents of each row reconstruct what the living left over; they get a gradient
    ghost         every dead latent, through exp(h), points at what is left over (as published)
    ghost-scaled  the same times the share of latents that are dead
    resample      now and then, dead latents start again from rows that are badly reconstructed

Sources: Gao et al. 2024 (arXiv 2406.04093), section 2.4 for aux; Jermyn and Templeton, January 2024 update, for ghost
gradients, and Rajamanoharan et al. 2024 (arXiv 2404.16014) for their scaling; Bricken et al. 2023 for resampling.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from assay.base.rng import torch_stream
from assay.dictionaries.families import FAMILIES, Part
from assay.dictionaries.families.family import Moment, Selected
from assay.dictionaries.latents import SparseLatents
from assay.dictionaries.settings import Training
from assay.dictionaries.training.mesh import Mesh
from assay.dictionaries.training.state import State
from assay.dictionaries.training.weights import row_weights

_TINY = 1e-30
_ALONE = Mesh()
_ENCODER_SHARE = 0.2
"""Length of a resampled encoder row, of the mean length of the living ones."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Extra:
    """Dense gradients of a few latents.

    Attributes:
        latents: Which.
        W_enc: `[latents, d_in]`.
        b_enc: `[latents]`.
        W_dec: `[latents, d_out]`.
    """

    latents: Int[Tensor, " some"]
    W_enc: Float[Tensor, "some d_in"]
    b_enc: Float[Tensor, " some"]
    W_dec: Float[Tensor, "some d_out"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Auxiliary:
    """What the auxiliary loss adds to a step: pairs of dead latents, and errors of their own.

    Attributes:
        pairs: Dead latents and their activations.
        slopes: `dLoss / dh` of each.
        errors: `(2 c w_b / B)(e_hat - e)`, `[rows, d_out]`.
    """

    pairs: SparseLatents
    slopes: Float[Tensor, " pairs"]
    errors: Float[Tensor, "rows d_out"]


def variance(rows: Float[Tensor, "rows d"], mesh: Mesh) -> float:
    """`mean_b |x_b - mean x|^2` over the rows of all processes."""
    n = len(rows) * mesh.data
    length = mesh.number_over_data(float(torch.linalg.vector_norm(rows, dtype=torch.float64)) ** 2) / n
    mean = mesh.over_data(rows.sum(0)) / n
    return length - float(torch.linalg.vector_norm(mean, dtype=torch.float64)) ** 2


def count(state: State, settings: Training, selected: Sequence[Selected], mesh: Mesh) -> list[Bool[Tensor, " latent"]]:
    """Count the rows for which each latent has been silent, and say which are dead, part by part."""
    dead = []
    for silent, chosen in zip(state.silent, selected, strict=True):
        active = torch.zeros(len(silent), dtype=torch.int32)
        active[chosen.pairs.latents[chosen.pairs.values > 0].long().cpu()] = 1
        silent += chosen.pairs.n_rows * mesh.data
        silent[mesh.over_data(active) > 0] = 0
        dead.append(silent >= settings.dead_after)
    return dead


def auxiliary(part: Part, bias: Tensor, dead: Bool[Tensor, " latent"], now: Moment) -> Auxiliary | None:
    """The loss by which dead latents learn what the living leave over.

        e = y - y_hat        L_aux = c mean_b w_b |e_hat - e|^2        c = aux * mean |y - mean|^2 / mean |e - mean|^2

    where `e_hat` decodes the `min(d / 2, dead)` largest dead latents of each row, without the decoder's bias, and `c`
    and `e` are constants: both losses count as shares of what they are to explain. A latent whose h is
    above 0 in no row gets nothing: the remedy is for latents that others crowd out, not for those that a penalty shut.
    """
    which = dead.nonzero()[:, 0].to(part.W_enc.device)
    everywhere = round(float(now.mesh.over_latents(torch.tensor(float(len(which))))))
    if not everywhere or not now.settings.aux:
        return None
    k = max(1, min(part.W_dec.shape[1] // 2, everywhere))
    few = _selected(part, bias, which, k, now)
    pairs = SparseLatents(
        offsets=few.offsets,
        latents=which.to(torch.int32)[few.latents.long()] if len(which) else few.latents,
        values=few.values,
        n_latents=part.n_latents,
    )
    guess = now.kernels.decode(pairs, part.W_dec, torch.zeros_like(part.W_dec[0]))
    left, target = -now.error, now.target
    spread = variance(target, now.mesh) / max(variance(left, now.mesh), _TINY)
    errors = (guess - left).mul_(2 * now.settings.aux * spread * now.shares[:, None])
    return Auxiliary(pairs=pairs, slopes=now.kernels.slopes(pairs, errors, part.W_dec), errors=errors)


def _selected(part: Part, bias: Tensor, which: Tensor, k: int, now: Moment) -> SparseLatents:
    """The k largest of the latents `which`; a process whose latents all live takes part with a silent one."""
    some = len(which) > 0
    weights, biases = (part.W_enc[which], bias[which]) if some else (part.W_enc[:1] * 0, bias[:1] * 0 - 1)
    found: SparseLatents = now.kernels.select_rows(now.x, weights.contiguous(), biases.contiguous(), k)
    return found


def ghost(part: Part, bias: Tensor, shift: Tensor | None, dead: Bool[Tensor, " latent"], now: Moment) -> Extra | None:
    """Ghost gradients: `exp(h)` of every dead latent points at the residual.

        g_b = sum_dead exp(h) W_dec[f]        s_b = |e_b| / (2 |g_b|)        L = kappa mean_b w_b |s_b g_b - e_b|^2

    with `s`, `e` and `kappa` constants; `kappa` makes the loss as large as the reconstruction's, and for "ghost-scaled"
    is multiplied by the share of latents that are dead.
    """
    which = dead.nonzero()[:, 0].to(part.W_enc.device)
    if not len(which):
        return None
    encoder, decoder = part.W_enc[which], part.W_dec[which]
    active = torch.exp(now.x @ encoder.T + bias[which])
    written, left = active @ decoder, -now.error
    scale = left.norm(dim=1, keepdim=True) / (2 * written.norm(dim=1, keepdim=True) + 1e-6)
    miss = scale * written - left
    kappa = now.mesh.number_over_data(float(now.shares @ left.square().sum(1)))
    kappa /= max(now.mesh.number_over_data(float(now.shares @ miss.square().sum(1))), _TINY)
    if now.settings.dead == "ghost-scaled":
        kappa *= len(which) / part.n_latents
    errors = miss * scale * (2 * kappa * now.shares[:, None])
    slopes = (errors @ decoder.T) * active
    rows = now.x if shift is None else now.x - shift
    return Extra(latents=which, W_enc=slopes.T @ rows, b_enc=slopes.sum(0), W_dec=active.T @ errors)


def resample(
    state: State,
    settings: Training,
    x: Float[Tensor, "rows d_in"],
    error: Float[Tensor, "rows d_out"],
    mesh: Mesh = _ALONE,
) -> int:
    """Start dead latents again from badly reconstructed rows; returns how many of this process's.

    Rows are drawn with probability proportional to the square of their squared error, as it counts in the loss. A
    latent's decoder row becomes the row's error, and its encoder row the centred row, at 0.2 of the living encoder
    rows' mean length; its bias is 0, and a threshold or gain of its own and its moments start again; what is frozen
    stays. (The decoder points at the error, since what is already explained needs no latent; an SAE's published form
    takes the row itself for both.)

    Args:
        state: Changed in place.
        settings: How the dictionary is trained.
        x: Scaled rows read, this process's.
        error: `y_hat - y` of the same rows.
        mesh: Where this process is: rows are drawn from all processes', and each gets the same for the same latent.
    """
    total = 0
    losses = (row_weights(settings, x, error, mesh) * error.square().sum(1)).double().cpu()
    weights = torch.cat(mesh.gathered(losses, along="all")[:: mesh.latent]).square()
    first = mesh.data_index * len(x)
    batch = torch.cat(mesh.gathered(x, along="all")[:: mesh.latent])
    for index, (part, silent) in enumerate(zip(state.parts, state.silent, strict=True)):
        which = (silent >= settings.dead_after).nonzero()[:, 0]
        counts = [int(n) for n in mesh.gathered(torch.tensor([len(which)]), along="latent")]
        alive = part.W_enc[silent < settings.dead_after]
        sums = mesh.over_latents(torch.tensor([float(alive.norm(dim=1).sum()), float(len(alive))]))
        if not sum(counts) or not bool(weights.sum() > 0):
            continue
        stream = torch_stream(settings.seed, "resample", state.step, index)
        drawn = torch.multinomial(weights, sum(counts), replacement=True, generator=stream)
        start = sum(counts[: mesh.latent_index])
        rows = drawn[start : start + len(which)] - first
        own = ((rows >= 0) & (rows < len(x))).to(x)[:, None]  # another process has the other rows
        rows = rows.clamp(0, len(x) - 1)
        mean = mesh.over_data(x[:, part.reads].sum(0)) / len(weights)
        inputs = mesh.over_data(x[rows][:, part.reads] * own) - mean
        outputs = mesh.over_data(-error[rows][:, part.writes] * own)
        length = _ENCODER_SHARE * float(sums[0] / sums[1]) if sums[1] else 1.0
        if settings.frozen != "encoder":
            part.W_enc[which] = length * torch.nn.functional.normalize(inputs, dim=1)
            part.b_enc[which] = 0
        if settings.frozen != "decoder":
            part.W_dec[which] = torch.nn.functional.normalize(outputs, dim=1)
        _begin_again(state, settings, index, which, batch)
        silent[which] = 0
        total += len(which)
    return total


def _begin_again(state: State, settings: Training, index: int, which: Tensor, x: Tensor) -> None:
    """A family's own weights as at the start, and no moments, for some latents of a part that reads rows like `x`."""
    part = state.parts[index]
    fresh = Part(W_enc=part.W_enc[which], b_enc=part.b_enc[which], W_dec=part.W_dec[which])
    FAMILIES[settings.family].begin(fresh, settings, (x - state.b_dec if state.centred else x)[:, part.reads])
    for name, weight in part.own.items():
        weight[which] = fresh.own[name]
    for name in ("W_enc", "b_enc", "W_dec", *part.own):
        for moment in state.moments[f"{index}.{name}"]:
            moment[which] = 0
