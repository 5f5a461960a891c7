"""DAS and boundless DAS: find the subspace whose interchange makes the model answer as a causal model says.

DAS fits k orthonormal rows; boundless DAS fits a rotation of the whole space and how many of its first rows count, by

    mask_i = sigmoid(i / T) sigmoid((b d - i) / T)

with a boundary b that is trained and a temperature T that falls. The parametrisation is orthogonal throughout (a QR
retraction): a free matrix undone by its transpose would change what lies outside the subspace.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from assay.activations.edits import Set
from assay.activations.subject import Subject
from assay.base.errors import NumericalError, SpecError
from assay.base.rng import torch_stream
from assay.directions.subspaces.interchange import Interchanges, Subspace, interchange_accuracy
from assay.directions.vectors import Origin

_Swap = Callable[[Tensor, Tensor], Tensor]


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class DasFit:
    """A fitted subspace and how it came about.

    Args:
        subspace: The subspace; for boundless DAS the rows whose mask ended up above one half of its largest value.
        losses: The cross-entropy of each step, in nats (boundless DAS: without the boundary's penalty).
        boundary: Boundless DAS: the trained share of dimensions; the share that was asked for in DAS.
        mask: The weight of each row of the rotation at the end, `[d]`; ones for DAS.
    """

    subspace: Subspace
    losses: tuple[float, ...]
    boundary: float
    mask: Float[Tensor, " rows"]


def das(
    subject: Subject,
    site: str,
    data: Interchanges,
    k: int,
    *,
    epochs: int = 3,
    batch: int = 16,
    lr: float = 1e-3,
    seed: int = 0,
) -> DasFit:
    """Fit a subspace of k dimensions by distributed alignment search.

    Args:
        subject: The subject.
        site: Where; `[batch, pos, features]`.
        data: Interchanges to fit on; score it on others (`interchange_accuracy`).
        k: Its dimension.
        epochs: Passes over the data.
        batch: Interchanges a step.
        lr: Adam's learning rate, reached after a tenth of the steps.
        seed: Seed of the first rotation and of the order.

    Raises:
        SpecError: k does not fit the site, or the data do not.
        NumericalError: The loss is not finite.

    Source: Geiger et al. 2023, "Finding alignments between interpretable causal variables and distributed neural
        representations", section 3.
    """
    base, source = data.read(subject, site)
    d = base.shape[1]
    if not 1 <= k <= d:
        raise SpecError(f"k is {k}; {site} has {d} dimensions", "k")
    weight = _start(d, k, seed).requires_grad_()

    def swap(b: Tensor, s: Tensor) -> Tensor:
        basis = retracted(weight).to(b)
        return b + ((s - b) @ basis.T) @ basis

    losses = _train(subject, site, data, base, source, swap, [weight], epochs, batch, lr, seed, lambda _: None)
    detail = {"k": k, "epochs": epochs, "batch": batch, "lr": lr}
    origin = Origin(method="DAS", subject=subject.fingerprint, seed=seed, detail=detail)
    subspace = Subspace(site=site, basis=retracted(weight.detach()), origin=origin)
    return DasFit(subspace=subspace, losses=losses, boundary=k / d, mask=torch.ones(k))


def boundless_das(
    subject: Subject,
    site: str,
    data: Interchanges,
    *,
    penalty: float = 1.0,
    temperature: tuple[float, float] = (50.0, 0.1),
    epochs: int = 3,
    batch: int = 16,
    lr: float = 1e-3,
    boundary_lr: float = 1e-2,
    seed: int = 0,
) -> DasFit:
    """Fit a subspace and its dimension by boundless DAS.

    Args:
        subject: The subject.
        site: Where; `[batch, pos, features]`.
        data: Interchanges to fit on.
        penalty: What the share of dimensions costs in the loss, in nats.
        temperature: T at the first and the last step; it falls linearly.
        epochs: Passes over the data.
        batch: Interchanges a step.
        lr: Adam's learning rate of the rotation.
        boundary_lr: The same of the boundary, which starts at one half and stays within 0.001 and 1.
        seed: Seed of the first rotation and of the order.

    Raises:
        SpecError: The data do not fit the site.
        NumericalError: The loss is not finite.

    Source: Wu et al. 2023, "Interpretability at scale: identifying causal mechanisms in Alpaca", section 3.
    """
    if not min(temperature) > 0:
        raise SpecError(f"temperature is {temperature}; both ends are above 0", "temperature")
    base, source = data.read(subject, site)
    d = base.shape[1]
    weight = _start(d, d, seed).requires_grad_()
    boundary = torch.tensor(0.5, requires_grad=True)
    state = {"T": temperature[0]}

    def swap(b: Tensor, s: Tensor) -> Tensor:
        basis = retracted(weight).to(b)
        return b + (((s - b) @ basis.T) * boundary_mask(boundary, d, state["T"]).to(b)) @ basis

    def anneal(share: float) -> Tensor | None:
        state["T"] = temperature[0] + (temperature[1] - temperature[0]) * share
        with torch.no_grad():
            boundary.clamp_(1e-3, 1.0)
        return penalty * boundary

    groups = [{"params": [weight], "lr": lr}, {"params": [boundary], "lr": boundary_lr}]
    losses = _train(subject, site, data, base, source, swap, groups, epochs, batch, lr, seed, anneal)
    end = float(boundary.detach().clamp(1e-3, 1.0))
    mask = boundary_mask(torch.tensor(end), d, temperature[1])
    kept = max(1, int((mask >= mask.max() / 2).sum()))
    detail = {"penalty": penalty, "epochs": epochs, "batch": batch, "lr": lr, "boundary": end}
    origin = Origin(method="boundless DAS", subject=subject.fingerprint, seed=seed, detail=detail)
    subspace = Subspace(site=site, basis=retracted(weight.detach())[:kept], origin=origin)
    return DasFit(subspace=subspace, losses=losses, boundary=end, mask=mask)


def boundary_mask(boundary: Float[Tensor, ""], d: int, temperature: float) -> Float[Tensor, " d"]:
    """`sigmoid(i / T) sigmoid((b d - i) / T)` for i = 0 .. d - 1: how much of each rotated dimension is swapped.

    Example:
        >>> boundary_mask(torch.tensor(0.5), 6, 0.1).round(decimals=2).tolist()
        [0.5, 1.0, 1.0, 0.5, 0.0, 0.0]
    """
    i = torch.arange(d, dtype=torch.float32)
    return torch.sigmoid(i / temperature) * torch.sigmoid((boundary * d - i) / temperature)


def retracted(weight: Float[Tensor, "d k"]) -> Float[Tensor, "k d"]:
    """Orthonormal rows with the span of the columns of a matrix: Q of its QR, R's diagonal made positive."""
    q, r = torch.linalg.qr(weight)
    rows: Tensor = (q * torch.diagonal(r).sign().detach()).T
    return rows


def _start(d: int, k: int, seed: int) -> Tensor:
    draws = torch.randn(d, k, generator=torch_stream(seed, "DAS", "start"))
    start: Tensor = torch.linalg.qr(draws)[0]
    return start


def _train(
    subject: Subject,
    site: str,
    data: Interchanges,
    base: Tensor,
    source: Tensor,
    swap: _Swap,
    parameters: list[Tensor] | list[dict[str, object]],
    epochs: int,
    batch: int,
    lr: float,
    seed: int,
    before: Callable[[float], Tensor | None],
) -> tuple[float, ...]:
    """Adam on the cross-entropy of the counterfactual answer; `before(share done)` may return a penalty."""
    if epochs < 1 or batch < 1:
        raise SpecError(f"epochs={epochs}, batch={batch}: at least one of each", "epochs")
    outside = [i for i in (*data.answer, *data.choices) if not 0 <= i < len(subject.parts.unembedding()[0])]
    if outside:
        raise SpecError(f"the token id {outside[0]} is outside the vocabulary of {subject.name}", "answer")
    optimiser = torch.optim.Adam(parameters, lr=lr)
    per_epoch = math.ceil(len(data) / batch)
    total = epochs * per_epoch
    warm = max(1, total // 10)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimiser, lambda step: min(1.0, (step + 1) / warm))
    generator = torch_stream(seed, "DAS", "order")
    losses: list[float] = []
    for _ in range(epochs):
        order = torch.randperm(len(data), generator=generator).tolist()
        for rows in (order[at : at + batch] for at in range(0, len(data), batch)):
            with torch.inference_mode(False), torch.enable_grad():
                penalty = before(len(losses) / max(1, total - 1))
                changed = swap(base[rows], source[rows])
                loss, slope = _loss(subject, site, data.rows(rows), changed.detach())
                optimiser.zero_grad()
                changed.backward(slope, retain_graph=penalty is not None)  # type: ignore[no-untyped-call]
                if penalty is not None:
                    penalty.backward()  # type: ignore[no-untyped-call]
                optimiser.step()
                schedule.step()
            if not math.isfinite(loss):
                raise NumericalError(f"the loss is {loss} at step {len(losses)}; lower lr")
            losses.append(loss)
    return tuple(losses)


def _loss(subject: Subject, site: str, data: Interchanges, changed: Tensor) -> tuple[float, Tensor]:
    """The mean cross-entropy with changed activations in place, and its gradient with respect to them, `[rows, d]`.

    The gradient is read at the site, so no graph is kept over the user's parameters and none of them gets a gradient.
    """
    batch = subject.batch(data.base)
    answer = torch.tensor(data.answer)
    options = torch.tensor(data.choices) if data.choices else None
    ends = torch.tensor([start + length - 1 for start, length in zip(batch.starts, batch.lengths, strict=True)])

    def metric(logits: Tensor) -> Tensor:
        last = logits[torch.arange(len(ends)), ends].float()
        if options is None:
            return torch.nn.functional.cross_entropy(last, answer.to(last.device), reduction="none") / len(ends)
        right = (options[None] == answer[:, None]).long().argmax(1).to(last.device)
        chosen = last[:, options.to(last.device)]
        return torch.nn.functional.cross_entropy(chosen, right, reduction="none") / len(ends)

    edit = Set(site, changed[:, None, :], positions=data.positions)
    run = subject.run(batch, capture=site, edits=[edit], grad=metric)
    assert run.grad is not None and run.value is not None
    columns = run.batch.columns(data.positions) or []
    slope = torch.stack([run.grad[site][row, picked[0]] for row, picked in enumerate(columns)])
    return float(run.value.sum()), slope.to(changed)


@dataclass(frozen=True, slots=True, kw_only=True)
class Alignment:
    """How well a subspace carries a variable, on interchanges it was not fitted on.

    Args:
        accuracy: The share of interchanges answered as the causal model says.
        null: The same of random subspaces of its dimension.
        whole: The same with the whole site exchanged: what is there to be found.
        n: Interchanges.
    """

    accuracy: float
    null: tuple[float, ...]
    whole: float
    n: int


def align(subject: Subject, subspace: Subspace, data: Interchanges, *, controls: int = 10, seed: int = 0) -> Alignment:
    """Score a subspace beside random ones of its dimension and the exchange of the whole site."""
    d = subspace.basis.shape[1]
    null = [
        interchange_accuracy(subject, Subspace.random(subspace.site, subspace.k, d, seed=seed * 1000 + i), data)
        for i in range(controls)
    ]
    whole = Subspace(site=subspace.site, basis=torch.eye(d))
    return Alignment(
        accuracy=interchange_accuracy(subject, subspace, data),
        null=tuple(null),
        whole=interchange_accuracy(subject, whole, data),
        n=len(data),
    )
