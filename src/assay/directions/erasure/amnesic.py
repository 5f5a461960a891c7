"""Amnesic probing: what a model loses when a property is erased, against erasing as many random dimensions.

Taking any k dimensions out costs something. What the property is worth to the model is what its erasure costs beyond
random erasures of the same rank: isotropic ones, which mostly point where activations do not go, and ones matched to
the covariance of the activations, which do not have that excuse.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from assay.activations.edits import Edit, Positions
from assay.activations.subject import Subject
from assay.activations.values import Run
from assay.base.errors import NumericalError, SpecError
from assay.base.rng import numpy_stream
from assay.base.stats import Interval, bootstrap_interval, permutation_p
from assay.directions.data import several
from assay.directions.erasure.eraser import Eraser, activation_rows
from assay.directions.erasure.leace import LabelledMoments
from assay.directions.vectors import Origin

Kind = Literal["isotropic", "covariance-matched"]


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Arm:
    """What random erasures of one kind cost the model, one entry an erasure.

    Args:
        name: Their kind.
        loss: The change of the next-token loss, in nats, averaged over prompts.
        kl: `KL(model || erased model)` of the next token, in nats.
        p_loss: The place of the true erasure's loss among them, `(1 + #{null >= value}) / (n + 1)`.
        p_kl: The same of its KL.
    """

    name: str
    loss: Float[np.ndarray, " erasers"]
    kl: Float[np.ndarray, " erasers"]
    p_loss: float
    p_kl: float


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Amnesic:
    """What an erasure costs the model, beside random erasures of its rank.

    Args:
        base_loss: The next-token loss without erasure, in nats.
        loss: The change of it, averaged over prompts.
        loss_interval: Its bootstrap interval over prompts; None for one prompt.
        kl: `KL(model || erased model)` of the next token, averaged over prompts.
        by_prompt: The change of the loss of each prompt.
        arms: The random erasures, by kind.
        rank: How many dimensions went.
    """

    base_loss: float
    loss: float
    loss_interval: Interval | None
    kl: float
    by_prompt: Float[np.ndarray, " prompts"]
    arms: Mapping[str, Arm]
    rank: int


def random_erasers(
    eraser: Eraser, n: int, kind: Kind, activations: Any = None, *, seed: int = 0, shrinkage: bool = True
) -> tuple[Eraser, ...]:
    """Erasers of random dimensions, with the rank, the site and the mean of the one given.

    - "isotropic": an orthogonal projection along uniformly random dimensions.
    - "covariance-matched": the dimensions written are draws v from N(0, S). They are read as the given eraser reads
      its own: along themselves where it is orthogonal, else by `(V S^-1 V')^-1 V S^-1`, as LEACE does.

    Args:
        eraser: The eraser to be held against them.
        n: How many.
        kind: Which.
        activations: Activations at the site, `[rows, d]`, for their covariance.
        seed: Seed of the stream.
        shrinkage: Shrink the covariance that an oblique eraser inverts.

    Raises:
        SpecError: The kind is unknown, its activations are missing or too few for the rank, or the eraser erases
            nothing.

    Example:
        >>> axis = np.eye(6)[:2]
        >>> true = Eraser(site="blocks.0.resid_post", read=axis, write=axis, mean=np.zeros(6))
        >>> [other.rank for other in random_erasers(true, 3, "isotropic")]
        [2, 2, 2]
    """
    k, d = eraser.read.shape
    if n < 1:
        raise SpecError(f"n is {n}; at least one eraser is drawn", "n")
    if not k:
        raise SpecError("the eraser takes nothing out, so there is no rank to match", "eraser")
    if kind not in ("isotropic", "covariance-matched"):
        raise SpecError(f"kind is {kind!r}; valid: 'isotropic', 'covariance-matched'", "kind")
    rng = numpy_stream(seed, "random erasers", kind)
    rows = inverse = None
    if kind == "covariance-matched":
        if activations is None:
            raise SpecError("erasers matched to a covariance need activations=", "activations")
        rows = activation_rows(activations, "activations")
        if rows.shape[1] != d or len(rows) <= k:
            raise SpecError(f"activations are {rows.shape}; they must be [more than {k} rows, {d}]", "activations")
        if np.ptp(rows, axis=0).max() <= 1e-14 * np.abs(rows).max():
            raise NumericalError("the activations do not vary, so no direction can be drawn from them")
        rows = rows - rows.mean(axis=0)
        if not eraser.orthogonal:
            moments = LabelledMoments.of(rows, np.zeros((len(rows), 1)))
            inverse = np.linalg.pinv(moments.covariance(shrinkage=shrinkage), hermitian=True)
    origin = Origin(method=f"{kind} random erasure", seed=seed, detail={"like": eraser.origin.to_dict()})
    found = []
    for _ in range(n):
        draws = rng.standard_normal((k, d)) if rows is None else rng.standard_normal((k, len(rows))) @ rows
        basis = np.linalg.qr(draws.T)[0].T
        read = basis if inverse is None else np.linalg.solve(basis @ inverse @ basis.T, basis @ inverse)
        found.append(Eraser(site=eraser.site, read=read, write=basis, mean=eraser.mean, origin=origin))
    return tuple(found)


def amnesic(
    subject: Subject,
    texts: Sequence[str] | Tensor,
    eraser: Eraser,
    arms: Mapping[str, Sequence[Eraser]],
    *,
    positions: Positions = None,
    batch: int = 8,
    seed: int = 0,
) -> Amnesic:
    """Erase at the eraser's site while the model reads text, and measure what that costs.

    Args:
        subject: The subject.
        texts: Texts, or token ids `[rows, pos]`, of two tokens or more.
        eraser: The erasure under test.
        arms: Random erasures to hold it against, by name, of the same rank; see `random_erasers`.
        positions: Where to erase; at all tokens when None.
        batch: How many texts go through the model at once; changes nothing else.
        seed: Seed of the bootstrap.

    Raises:
        SpecError: There is no text or no arm, an arm has another rank, or the eraser belongs to other weights.

    Source: Elazar et al. 2021, "Amnesic probing", with random erasures of the same rank as the control.
    """
    eraser.check(subject)
    several(texts)
    if not arms or not all(arms.values()):
        raise SpecError("amnesic probing needs at least one arm of random erasers", "arms")
    wrong = {name: other.rank for name, many in arms.items() for other in many if other.rank != eraser.rank}
    if wrong:
        raise SpecError(f"the eraser takes out {eraser.rank} dimensions, arms take out {wrong}", "arms")
    order = [eraser, *(other for many in arms.values() for other in many)]
    base: list[float] = []
    losses: list[list[float]] = [[] for _ in order]
    kls: list[list[float]] = [[] for _ in order]
    for start in range(0, len(texts), batch):
        piece: Any = texts[start : start + batch]
        plain = subject.run(piece)
        base += next_token_losses(plain)
        for i, one in enumerate(order):
            edits: list[Edit] = one.edits(positions=positions, site=eraser.site)
            run = subject.run(piece, edits=edits)
            losses[i] += next_token_losses(run)
            kls[i] += divergences(plain, run)
    change = np.asarray(losses) - np.asarray(base)
    cost, far = change.mean(axis=1), np.asarray(kls).mean(axis=1)
    held, at = {}, 1
    for name, many in arms.items():
        span = slice(at, at + len(many))
        at += len(many)
        held[name] = Arm(
            name=name,
            loss=cost[span],
            kl=far[span],
            p_loss=permutation_p(float(cost[0]), cost[span]),
            p_kl=permutation_p(float(far[0]), far[span]),
        )
    return Amnesic(
        base_loss=float(np.mean(base)),
        loss=float(cost[0]),
        loss_interval=bootstrap_interval(change[0], seed=seed) if len(base) > 1 else None,
        kl=float(far[0]),
        by_prompt=change[0],
        arms=held,
        rank=eraser.rank,
    )


def next_token_losses(run: Run) -> list[float]:
    """The mean next-token loss of each prompt, in nats.

    Raises:
        SpecError: A prompt is a single token, which has nothing to predict.
    """
    found = []
    for row, (start, length) in enumerate(zip(run.batch.starts, run.batch.lengths, strict=True)):
        if length < 2:
            raise SpecError(f"prompt {row} is one token; a next-token loss needs two or more", "texts")
        logits = run.logits[row, start : start + length - 1].float()
        targets = run.batch.ids[row, start + 1 : start + length].to(logits.device)
        found.append(float(torch.nn.functional.cross_entropy(logits, targets)))
    return found


def divergences(base: Run, other: Run) -> list[float]:
    """The mean over tokens of `KL(base || other)` of the next token, of each prompt, in nats."""
    found = []
    for row, (start, length) in enumerate(zip(base.batch.starts, base.batch.lengths, strict=True)):
        p = base.logits[row, start : start + length].float().log_softmax(-1)
        q = other.logits[row, start : start + length].float().log_softmax(-1)
        found.append(max(0.0, float((p.exp() * (p - q)).sum(-1).mean())))
    return found
