"""One training step, in closed form over the selected pairs: forward, gradients, and what applies them.

    y_hat = sum_parts z W_dec + b_dec + W_skip x        L = mean_b w_b |y_hat - y|^2 + the family's penalty

The weights `w` hold outliers back (`training.weights`). With `relative` the gradients are those of `d log L`: all are
divided by `L / d`, a number.

Of nested groups (Matryoshka) the loss is the mean over the prefixes `1..g` of their own reconstructions. A latent of
group `g` is in the prefixes from `g` on, so its gradients see the sum of their errors: the errors are stacked, group
after group, and each pair points at its own group's. The auxiliary loss stacks its errors below those.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from assay.base.errors import NumericalError
from assay.dictionaries.families import FAMILIES, Part
from assay.dictionaries.families.family import Asked, Moment, Selected
from assay.dictionaries.kernels.values import AdamStep, Moments
from assay.dictionaries.latents import SparseLatents
from assay.dictionaries.settings import Training
from assay.dictionaries.training.dead import Extra, auxiliary, count, ghost, variance
from assay.dictionaries.training.mesh import Mesh
from assay.dictionaries.training.state import State
from assay.dictionaries.training.weights import row_weights

_ALONE = Mesh()
_TINY = 1e-30


@dataclass(frozen=True, slots=True, kw_only=True)
class Report:
    """What a step saw, for the curves.

    Attributes:
        squared_error: `mean_b |y_hat - y|^2`, in units of the scaled rows.
        fvu: The same over `mean_b |y - mean y|^2` of this batch.
        l0: Mean number of active latents a row.
        dead: Share of latents silent for `dead_after` rows.
        penalty: The family's penalty.
    """

    squared_error: float
    fvu: float
    l0: float
    dead: float
    penalty: float


@dataclass(frozen=True, slots=True, kw_only=True)
class Gradient:
    """What one part gets from one step: sums over pairs, and what is no such sum.

    Attributes:
        pairs: `z`, over the rows of `errors`.
        slopes: `dLoss / dh` of each pair.
        errors: What each pair's row says of the output, `[stacked, d_out]`.
        x: Rows read; pair row `r` reads row `r mod rows`.
        asked: What the family asked.
        extra: Dense gradients of some latents, or None.
    """

    pairs: SparseLatents
    slopes: Float[Tensor, " pairs"]
    errors: Float[Tensor, "stacked d_out"]
    x: Float[Tensor, "rows d_in"]
    asked: Asked
    extra: Extra | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Gradients:
    """What the whole state gets from one step.

    Attributes:
        parts: For each part.
        b_dec: Through the output alone; what reaches it through a centred input is added when it is applied.
        W_skip: `[d_out, d_in]`, or None.
    """

    parts: tuple[Gradient, ...]
    b_dec: Float[Tensor, " d_out"]
    W_skip: Float[Tensor, "d_out d_in"] | None


def forward_backward(
    state: State,
    settings: Training,
    kernels: Any,
    x: Float[Tensor, "rows d_in"],
    y: Float[Tensor, "rows d_out"],
    mesh: Mesh = _ALONE,
) -> tuple[Gradients, Report, Float[Tensor, "rows d_out"]]:
    """The gradients of one batch, what was seen, and the error `y_hat - y`.

    Args:
        state: Its counters, and a family's memory, are brought up to date; weights stay.
        settings: How the dictionary is trained.
        kernels: The kernels.
        x: Scaled rows read.
        y: Scaled rows to reconstruct.
        mesh: Where this process is among those that train together; `x` and `y` are its own rows.

    Raises:
        NumericalError: The loss is not finite.
    """
    family = FAMILIES[settings.family]
    moments, biases, selected = [], [], []
    for part in state.parts:
        now = _moment(state, settings, kernels, mesh, x[:, part.reads], y)
        bias = part.b_enc - part.W_enc @ state.b_dec if state.centred else part.b_enc
        moments.append(now)
        biases.append(bias)
        selected.append(family.select(part, bias, now))
    R, error, squared, dz = _errors(state, settings, kernels, mesh, selected, x, y)
    weights = row_weights(settings, x, error, mesh)
    if bool((weights < 1).any()):
        R *= weights.repeat(len(R) // len(x))[:, None]
        dz = None if dz is None else dz * weights[selected[0].pairs.rows]
    if not squared < float("inf"):
        raise NumericalError(
            f"the loss is {squared} at step {state.step + 1}: the rate {settings.rate_at(state.step):.2g} is too high, "
            "or a row is not finite; give a smaller lr, or look at the rows"
        )
    dead = count(state, settings, selected, mesh)
    parts = []
    for index, part in enumerate(state.parts):
        now = replace(
            moments[index],
            error=error[:, part.writes],
            shares=weights / moments[index].rows,
            target=y[:, part.writes] - state.b_dec[part.writes],
        )
        errors = R[:, part.writes].contiguous()
        chosen = _stacked_pairs(selected[index], settings)
        asked = family.ask(part, chosen, kernels.slopes(chosen.pairs, errors, part.W_dec) if dz is None else dz, now)
        gradient = Gradient(pairs=chosen.pairs, slopes=asked.slopes, errors=errors, x=now.x, asked=asked)
        shift = state.b_dec if state.centred else None
        parts.append(_with_dead(gradient, part, biases[index], shift, dead[index], now))
    gradients = Gradients(
        parts=tuple(parts),
        b_dec=R[: len(x)].sum(0),
        W_skip=None if state.W_skip is None else R[: len(x)].T @ x,
    )
    spread = variance(y, mesh)
    report = Report(
        squared_error=squared,
        fvu=squared / max(spread, 1e-30),
        l0=mesh.number(float(sum(int(chosen.pairs.values.count_nonzero()) for chosen in selected))) / now.rows,
        dead=mesh.number(float(sum(int(d.count_nonzero()) for d in dead))) / mesh.number(float(sum(map(len, dead)))),
        penalty=mesh.number(sum(gradient.asked.penalty for gradient in parts)),
    )
    if settings.relative:
        counted = mesh.number_over_data(float(weights @ error.square().sum(1))) / (len(x) * mesh.data)
        _divide(gradients, max(counted + report.penalty, _TINY) / y.shape[1])
    return gradients, report, error


def _divide(gradients: Gradients, by: float) -> None:
    """Divide everything, in place: with the loss per column, these are the gradients of `d log L`."""
    for part in gradients.parts:
        extra = () if part.extra is None else (part.extra.W_enc, part.extra.b_enc, part.extra.W_dec)
        pull = () if part.asked.pull is None else (part.asked.pull,)
        for tensor in (part.slopes, part.errors, *pull, *part.asked.own.values(), *extra):
            tensor /= by
    for tensor in (gradients.b_dec, *(() if gradients.W_skip is None else (gradients.W_skip,))):
        tensor /= by


def apply(state: State, settings: Training, kernels: Any, gradients: Gradients, mesh: Mesh = _ALONE) -> None:
    """Take Adam's step with these gradients; the fused kernel where nothing but sums over pairs is asked."""
    if mesh.data == 1 and all(_fusable(settings, gradient) for gradient in gradients.parts):
        b_dec = gradients.b_dec.clone()
        shift = state.b_dec.clone() if state.centred else None
        for index, gradient in enumerate(gradients.parts):
            pulled = _fused(state, settings, kernels, index, gradient, shift)
            if shift is not None:
                b_dec -= mesh.over_latents(pulled)
        named = {"b_dec": b_dec} | _small(gradients)
    else:
        named = dense_gradients(state, settings, kernels, gradients, mesh)
    if settings.clip is not None:
        shared = {name: float(value.double().square().sum()) for name, value in named.items()}
        alone = sum(shared.pop(name) for name in ("b_dec", "W_skip") if name in shared)
        norm = math.sqrt(alone + float(mesh.over_latents(torch.tensor(sum(shared.values()), dtype=torch.float64))))
        named = {name: value * min(1.0, settings.clip / max(norm, 1e-30)) for name, value in named.items()}
    _adam(state, settings, named)
    for part in state.parts:
        FAMILIES[settings.family].settle(part)
    state.step += 1


def dense_gradients(
    state: State, settings: Training, kernels: Any, gradients: Gradients, mesh: Mesh = _ALONE
) -> dict[str, Tensor]:
    """The gradient of every weight as a tensor: for tests, clipping, sums over processes, and dense extras."""
    b_dec, named = gradients.b_dec.clone(), _small(gradients)
    for index, (part, gradient) in enumerate(zip(state.parts, gradients.parts, strict=True)):
        own = _dense(part, gradient, kernels, state.b_dec if state.centred else None)
        if state.centred:
            b_dec -= mesh.over_latents(own["b_enc"] @ part.W_enc)
        named |= {f"{index}.{name}": value for name, value in own.items()}
    return {name: mesh.over_data(value) for name, value in (named | {"b_dec": b_dec}).items()}


def _small(gradients: Gradients) -> dict[str, Tensor]:
    """Gradients of a family's own weights and of the skip."""
    named = {} if gradients.W_skip is None else {"W_skip": gradients.W_skip}
    for index, gradient in enumerate(gradients.parts):
        named |= {f"{index}.{name}": value for name, value in gradient.asked.own.items()}
    return named


def _moment(state: State, settings: Training, kernels: Any, mesh: Mesh, x: Tensor, y: Tensor) -> Moment:
    return Moment(
        settings=settings,
        step=state.step,
        rows=len(x) * mesh.data,
        mesh=mesh,
        weight=settings.sparsity_at(state.step),
        kernels=kernels,
        x=x.contiguous(),
        error=y,  # this and the next two are replaced once there is a reconstruction
        shares=x.new_zeros(0),
        target=y,
        memory=state.memory,
    )


def _errors(
    state: State, settings: Training, kernels: Any, mesh: Mesh, selected: list[Selected], x: Tensor, y: Tensor
) -> tuple[Tensor, Tensor, float, Tensor | None]:
    """`R` of every nested group (the first on top), `y_hat - y`, its mean square, and the pairs' `R . d` if at hand.

    The `R` of a group is `2 / (B G)` times the sum of the errors of the prefixes that it is in.
    """
    rows = len(x) * mesh.data
    if len(state.parts) == 1 and settings.family != "matryoshka" and state.W_skip is None:
        W_dec = state.parts[0].W_dec
        R, dz, squares = kernels.residual(selected[0].pairs, W_dec, state.b_dec, y, 2 / rows)
        return R, R * (rows / 2), mesh.number_over_data(float(squares.double().sum())) / rows, dz
    out = state.b_dec.expand(len(x), -1).clone()
    if state.W_skip is not None:
        out += x @ state.W_skip.T
    if settings.family != "matryoshka":
        for part, chosen in zip(state.parts, selected, strict=True):
            out[:, part.writes] += kernels.decode(chosen.pairs, part.W_dec, torch.zeros_like(part.W_dec[0]))
        error = out.sub_(y)
        return error * (2 / rows), error, mesh.number_over_data(float(error.square().sum())) / rows, None
    levels = []
    for pairs in _groups(selected[0].pairs, settings):
        out = out + kernels.decode(pairs, state.parts[0].W_dec, torch.zeros_like(state.b_dec))
        levels.append(out - y)
    error = levels[-1].clone()
    for group in range(len(levels) - 2, -1, -1):
        levels[group] += levels[group + 1]
    R = torch.cat(levels).mul_(2 / (rows * len(levels)))
    return R, error, mesh.number_over_data(float(error.square().sum())) / rows, None


def _groups(pairs: SparseLatents, settings: Training) -> list[SparseLatents]:
    """The pairs of each nested group, every one over all rows."""
    found, start, rows = [], 0, pairs.rows
    for size in settings.sizes():
        inside = (pairs.latents >= start) & (pairs.latents < start + size)
        offsets = torch.zeros_like(pairs.offsets)
        offsets[1:] = torch.bincount(rows[inside], minlength=pairs.n_rows).cumsum(0)
        found.append(
            SparseLatents(
                offsets=offsets,
                latents=pairs.latents[inside],
                values=pairs.values[inside],
                n_latents=pairs.n_latents,
            )
        )
        start += size
    return found


def joined(first: SparseLatents, second: SparseLatents) -> SparseLatents:
    """The rows of one above the rows of the other."""
    return SparseLatents(
        offsets=torch.cat([first.offsets, second.offsets[1:] + first.offsets[-1]]),
        latents=torch.cat([first.latents, second.latents]),
        values=torch.cat([first.values, second.values]),
        n_latents=first.n_latents,
    )


def _stacked_pairs(selected: Selected, settings: Training) -> Selected:
    """The pairs, those of each nested group over its own rows of the stacked errors."""
    if settings.family != "matryoshka":
        return selected
    first, *others = _groups(selected.pairs, settings)
    for group in others:
        first = joined(first, group)
    return Selected(pairs=first, h=first.values)  # of the families that nest, h is z wherever a pair is selected


def _with_dead(
    gradient: Gradient, part: Part, bias: Tensor, shift: Tensor | None, dead: Tensor, now: Moment
) -> Gradient:
    """Add what is done in every step about dead latents."""
    if now.settings.dead in ("ghost", "ghost-scaled"):
        return replace(gradient, extra=ghost(part, bias, shift, dead, now))
    found = auxiliary(part, bias, dead, now) if now.settings.dead == "aux" else None
    if found is None:
        return gradient
    return replace(
        gradient,
        pairs=joined(gradient.pairs, found.pairs),
        slopes=torch.cat([gradient.slopes, found.slopes]),
        errors=torch.cat([gradient.errors, found.errors]),
    )


def _fusable(settings: Training, gradient: Gradient) -> bool:
    one_site = gradient.asked.pull is None or gradient.asked.pull.shape[1] == 1
    return settings.clip is None and settings.frozen == "none" and gradient.extra is None and one_site


def _fused(
    state: State, settings: Training, kernels: Any, index: int, gradient: Gradient, shift: Tensor | None
) -> Tensor:
    """Gradients and Adam in one pass over the latents; returns what the encoder asks of the input's shift."""
    part, pull = state.parts[index], gradient.asked.pull
    (m_enc, v_enc), (m_b, v_b), (m_dec, v_dec) = (
        state.moments[f"{index}.{name}"] for name in ("W_enc", "b_enc", "W_dec")
    )
    _, pulled = kernels.update(
        _by_latent(kernels, gradient),
        gradient.errors,
        gradient.x,
        part.W_dec,
        part.W_enc,
        part.b_enc,
        Moments(m_dec=m_dec, v_dec=v_dec, m_enc=m_enc, v_enc=v_enc, m_b=m_b, v_b=v_b),
        AdamStep(
            lr=settings.rate_at(state.step),
            step=state.step + 1,
            beta1=settings.betas[0],
            beta2=settings.betas[1],
            eps=settings.eps,
        ),
        pull=None if pull is None else pull[:, 0].contiguous(),
        shift=shift,
        unit_norm=FAMILIES[settings.family].unit_norm,
    )
    return torch.as_tensor(pulled)


def _by_latent(kernels: Any, gradient: Gradient) -> Any:
    pairs = gradient.pairs
    return kernels.by_latent(
        pairs.rows.to(torch.int32), pairs.latents, pairs.values, gradient.slopes.contiguous(), pairs.n_latents
    )


def _dense(part: Part, gradient: Gradient, kernels: Any, shift: Tensor | None) -> dict[str, Tensor]:
    """The same gradients as tensors."""
    W_dec, W_enc, b_enc = kernels.gradients(_by_latent(kernels, gradient), gradient.errors, gradient.x, shift=shift)
    if gradient.asked.pull is not None:
        widths = list(part.widths) if gradient.asked.pull.shape[1] > 1 else [part.W_dec.shape[1]]
        pieces = zip(torch.split(part.W_dec, widths, dim=1), gradient.asked.pull.unbind(1), strict=True)
        W_dec += torch.cat([piece * pull[:, None] for piece, pull in pieces], dim=1)
    if gradient.extra is not None:
        which = gradient.extra.latents
        W_enc[which] += gradient.extra.W_enc
        b_enc[which] += gradient.extra.b_enc
        W_dec[which] += gradient.extra.W_dec
    return {"W_enc": W_enc, "b_enc": b_enc, "W_dec": W_dec}


def _adam(state: State, settings: Training, gradients: dict[str, Tensor]) -> None:
    """Adam for every weight that has a gradient, with unit decoder rows and frozen parts where asked."""
    unit, t, rate = FAMILIES[settings.family].unit_norm, state.step + 1, settings.rate_at(state.step)
    frozen = {"decoder": ("W_dec",), "encoder": ("W_enc", "b_enc"), "none": ()}[settings.frozen]
    for name, weight in state.weights():
        kind = name.rpartition(".")[2]
        if name not in gradients or kind in frozen:
            continue
        gradient = gradients[name]
        if kind == "W_dec" and unit:
            gradient = gradient - (gradient * weight).sum(1, keepdim=True) * weight
        first, second = state.moments[name]
        first.lerp_(gradient, 1 - settings.betas[0])
        second.mul_(settings.betas[1]).addcmul_(gradient, gradient, value=1 - settings.betas[1])
        size = (second / (1 - settings.betas[1] ** t)).sqrt_().add_(settings.eps)
        weight.addcdiv_(first, size, value=-rate / (1 - settings.betas[0] ** t))
        if kind == "W_dec" and unit:
            weight /= weight.norm(dim=1, keepdim=True).clamp_min(1e-30)
