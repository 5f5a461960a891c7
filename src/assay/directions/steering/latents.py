"""Steering by a dictionary's latents, with what the dictionary cannot say left in place.

    steer    x <- x + alpha * max_act_j * D_j
    clamp    x <- x + decode(z') - decode(z),    z = encode(x),  z' = z with some latents set

A clamp puts `x = decode(z) + error` back as `decode(z') + error`: what the dictionary misses stays, and latents clamped
to what they are change nothing.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from assay.activations.edits import Add, Apply, Positions, Set
from assay.activations.lazy import LazyLogits
from assay.activations.subject import Subject
from assay.base.errors import NumericalError, SpecError
from assay.base.protocols import Dictionary
from assay.directions.steering.behaviour import Ends, answer_ids
from assay.directions.steering.functions import Questions
from assay.directions.vectors import Direction, Origin


def steer_latent(
    dictionary: Dictionary, latent: int, max_activation: float, dose: float = 1.0, *, positions: Positions = None
) -> Add:
    """The edit `x + dose * max_activation * D_j`: a dose of 1 adds as much as the latent ever says.

    Args:
        dictionary: The dictionary.
        latent: Which latent, j.
        max_activation: Its largest activation on some data; see `max_activations`.
        dose: How much.
        positions: Where.

    Raises:
        SpecError: There is no such latent; or the dictionary writes another site, or normalises each row.
        NumericalError: It never fires, so there is nothing to measure doses in.
    """
    _check(dictionary, [latent])
    if not 0 < max_activation < float("inf"):
        raise NumericalError(
            f"latent {latent} has the largest activation {max_activation}: it does not fire on that data; give more "
            "data, or use assay.Add with a scale of your own"
        )
    row = torch.as_tensor(dictionary.decoder)[latent].detach()
    return Add(dictionary.site, row, scale=float(dose) * float(max_activation), positions=positions)


def clamp_latents(dictionary: Dictionary, values: Mapping[int, float], *, positions: Positions = None) -> Apply:
    """The edit that sets some latents and keeps the reconstruction error.

    Args:
        dictionary: A dictionary that reads and writes the same site (an SAE).
        values: For each latent what it is set to; 0 takes it out.
        positions: Where.

    Raises:
        SpecError: There is no such latent; or the dictionary writes another site, or normalises each row.
    """
    _check(dictionary, list(values))
    index, level = torch.tensor(list(values)), torch.tensor([float(value) for value in values.values()])

    def clamped(x: Tensor) -> Tensor:
        z = dense(dictionary.encode(x))
        other = z.clone()
        other[..., index.to(z.device)] = level.to(z)
        change: Tensor = dictionary.decode(other) - dictionary.decode(z)
        return x + change.to(x)

    return Apply(dictionary.site, clamped, positions=positions)


def max_activations(
    subject: Subject, dictionary: Dictionary, texts: Sequence[str], *, batch: int = 16
) -> Float[Tensor, " latent"]:
    """Each latent's largest activation over all tokens of some texts but the first (where streams are of another size).

    Raises:
        SpecError: There is no text with two tokens.
    """
    best: Tensor | None = None
    for start in range(0, len(texts), batch):
        rows = subject.batch(list(texts[start : start + batch]))
        held = subject.run(rows, capture=dictionary.site)[dictionary.site]
        real = rows.mask.bool() & (rows.positions > 0)
        if not bool(real.any()):
            continue
        found = dense(dictionary.encode(held[real])).float().amax(0).cpu()
        best = found if best is None else torch.maximum(best, found)
    if best is None:
        raise SpecError("there is no text with two tokens to see latents on", "texts")
    return best.clamp(min=0)


@dataclass(frozen=True, slots=True, kw_only=True)
class Cleaned:
    """A vector rewritten in few latents.

    Args:
        direction: What they decode to, at the dictionary's site.
        coefficients: By latent, those above the cut.
        loss: -log p(answer) with the vector itself, with what the encoder makes of it, and with the latents kept.
        latents: How many latents were active at the start, and how many are kept.
    """

    direction: Direction
    coefficients: Mapping[int, float]
    loss: tuple[float, float, float]
    latents: tuple[int, int]


def clean_task_vector(
    subject: Subject,
    dictionary: Dictionary,
    vector: Direction,
    prompts: Questions,
    *,
    penalty: float = 0.01,
    steps: int = 100,
    rate: float = 0.05,
    cut: float = 0.02,
) -> Cleaned:
    """Rewrite a task vector in few latents of a dictionary, by what it does rather than by how it looks.

        c_0 = encode(v);    minimise  -log p(answer | decode(c) in place) + penalty * sum(c) / sum(c_0),   c >= 0

    Args:
        subject: The subject.
        dictionary: A dictionary of the vector's site, differentiable by torch.
        vector: A task vector.
        prompts: Questions without examples to fit on; report on others.
        penalty: The price of activation, in nats for all that the encoder gave.
        steps: Steps of Adam, each followed by the projection on `c >= 0`.
        rate: Its step, as a share of the largest coefficient at the start.
        cut: Coefficients below this share of the largest one are dropped at the end.

    Raises:
        SpecError: The dictionary is of another site.
        NumericalError: It encodes the vector as nothing, or the loss is not finite.

    Source: Kharlapenko et al. 2024, "Extracting SAE task features for in-context learning".
    """
    if str(subject.site(dictionary.site)) != str(subject.site(vector.site)):
        raise SpecError(f"the vector lies at {vector.site}, the dictionary reads {dictionary.site}", "dictionary")
    start = dense(dictionary.encode(vector.vector.to(subject.device)[None]))[0].detach().float().clamp(min=0)
    start = torch.where(start > 1e-6 * start.max(), start, torch.zeros_like(start))  # what is left is rounding
    total, largest = float(start.sum()), float(start.max())
    if largest <= 0:
        raise NumericalError("the dictionary encodes the vector as nothing: no latent is active")
    loss = _Loss(subject, dictionary, prompts)
    c = start.clone().requires_grad_()
    optimiser = torch.optim.Adam([c], lr=rate * largest)
    for _ in range(steps):
        value, gradient = loss(c)
        if value != value:
            raise NumericalError("-log p(answer) is not finite while the coefficients are fitted; lower rate=")
        with torch.no_grad():
            c.grad = (gradient + penalty / total) * (start > 0)
            optimiser.step()
            c.clamp_(min=0)
    kept = torch.where(c.detach() >= cut * float(c.detach().max()), c.detach(), torch.zeros_like(c))
    final = dictionary.decode(kept[None])[0].detach().float().cpu()
    chosen = {int(j): float(kept[j]) for j in kept.nonzero().flatten()}
    losses = (loss.at(vector.vector), loss.at(dictionary.decode(start[None])[0]), loss.at(final))
    origin = Origin(
        method="cleaned task vector",
        subject=vector.origin.subject,
        data=vector.origin.data,
        detail={"latents": sorted(chosen), "penalty": penalty, "loss": list(losses), "from": vector.origin.to_dict()},
    )
    return Cleaned(
        direction=Direction(
            site=vector.site, vector=final, size=vector.size, writes=vector.writes, level=vector.level, origin=origin
        ),
        coefficients=chosen,
        loss=losses,
        latents=(int((start > 0).sum()), len(chosen)),
    )


class _Loss:
    """-log p(answer) with a vector in place at the separator, and its gradient by coefficients."""

    def __init__(self, subject: Subject, dictionary: Dictionary, prompts: Questions) -> None:
        self.subject, self.dictionary = subject, dictionary
        self.site = str(subject.site(dictionary.site))
        self.batch = subject.batch(list(prompts.texts))
        self.answers = answer_ids(subject, prompts.texts, prompts.answers)
        self.ends = Ends(self.batch)

    def metric(self, logits: Tensor | LazyLogits) -> Tensor:
        last = self.ends(logits).float().log_softmax(-1)
        return -last.gather(1, self.answers.to(last.device)[:, None])[:, 0]

    def __call__(self, c: Tensor) -> tuple[float, Tensor]:
        """The loss at coefficients, and its gradient: through the decoder by torch, through the model by a run."""
        with torch.enable_grad():
            leaf = c.detach().clone().requires_grad_()
            written: Any = self.dictionary.decode(leaf[None])[0]
            edit = Set(self.site, written.detach(), positions="last")
            run = self.subject.run(self.batch, capture=self.site, edits=[edit], grad=self.metric)
            assert run.grad is not None and run.value is not None
            at_end = self.batch.last(run.grad[self.site]).sum(0) / self.batch.size
            written.backward(at_end.to(written))
        assert leaf.grad is not None
        return float(run.value.mean()), leaf.grad

    def at(self, vector: Tensor) -> float:
        """The loss with any vector in place."""
        edit = Set(self.site, vector.detach(), positions="last")
        return float(self.metric(self.subject.run(self.batch, edits=[edit]).logits).mean())


def dense(z: Any) -> Tensor:
    """A dictionary's answer as an ordinary tensor, if it is a sparse value."""
    made: Tensor = z.to_dense() if not isinstance(z, Tensor) or z.is_sparse else z
    return made


def _check(dictionary: Dictionary, latents: Sequence[int]) -> None:
    if getattr(dictionary, "kind", "sae") != "sae":  # its rows belong to another site than the one it reads
        raise SpecError(
            f"a {getattr(dictionary, 'kind', '')} writes elsewhere than it reads; steer with a dictionary of one site, "
            "or add its decoder's rows with assay.Add where they are written",
            "dictionary",
        )
    normalised = getattr(getattr(dictionary, "card", None), "normalisation", "none")
    if normalised != "none":  # decode() answers in units of rows that were normalised one by one
        raise SpecError(
            f"this dictionary normalises each row ({normalised}), so that a latent has no size of its own to set",
            "dictionary",
        )
    wrong = [latent for latent in latents if not 0 <= int(latent) < dictionary.n_latents]
    if wrong or not latents:
        said = f"{wrong[0]} is not one of them" if wrong else "none was given"
        raise SpecError(f"the dictionary has latents 0 to {dictionary.n_latents - 1}; {said}", "latents")
