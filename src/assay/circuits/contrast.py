"""Two runs that differ in what matters: a clean prompt, a corruption of it, and the metric that tells them apart."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from assay.activations.edits import Add, Edit
from assay.activations.lazy import LazyLogits
from assay.activations.subject import Subject
from assay.activations.values import Run
from assay.base.errors import SpecError
from assay.base.rng import torch_stream
from assay.subjects.tokens import Batch, from_ids


@dataclass(frozen=True, slots=True, kw_only=True)
class Contrast:
    """A clean input and a corrupted one of the same length.

    The metric is the logit difference at the last position, `logits[answer] - logits[foil]`.

    Args:
        clean: Token ids, `[rows, pos]`; row k belongs with row k of `corrupt`.
        corrupt: Token ids, `[rows, pos]`.
        answer: The answer's token id.
        foil: The foil's token id.
        noise: Edits on the embeddings that make the corruption, where the tokens themselves do not.
    """

    clean: Batch
    corrupt: Batch
    answer: int
    foil: int
    noise: tuple[Edit, ...] = ()

    def __post_init__(self) -> None:
        """Refuse inputs that do not line up."""
        if self.clean.ids.shape != self.corrupt.ids.shape:
            raise SpecError(
                f"clean is {tuple(self.clean.ids.shape)} and corrupt {tuple(self.corrupt.ids.shape)}: they must align",
                "corrupt",
            )

    @classmethod
    def of_tokens(cls, clean: Sequence[int], corrupt: Sequence[int], answer: int, foil: int) -> Contrast:
        """A contrast of two prompts, given as token ids."""
        return cls(
            clean=from_ids(torch.tensor([list(clean)])),
            corrupt=from_ids(torch.tensor([list(corrupt)])),
            answer=answer,
            foil=foil,
        )

    @classmethod
    def of_noise(
        cls,
        subject: Subject,
        clean: Sequence[int],
        positions: Sequence[int],
        answer: int,
        foil: int,
        *,
        sigmas: float = 3.0,
        draws: int = 3,
        seed: int = 0,
    ) -> Contrast:
        """A contrast of a prompt with itself under noise: causal tracing (Meng et al. 2022, section 2.1).

        Gaussian noise of `sigmas` standard deviations of the token embeddings is added to the embeddings at
        `positions`.

        Args:
            subject: The subject, for its embeddings.
            clean: The prompt's token ids.
            positions: Which tokens are noised.
            answer: The answer's token id.
            foil: The foil's token id.
            sigmas: The noise in standard deviations of the embedding matrix (after any multiplier).
            draws: How many independent draws; effects are averaged over them.
            seed: The seed of the noise.
        """
        rows = from_ids(torch.tensor([list(clean)] * draws))
        embedded = subject.run(rows.ids[:1], capture="embed")["embed"]
        vocabulary = subject.point(subject.site("embed")).module
        sample = torch.arange(0, int(subject.config.vocab_size), max(1, int(subject.config.vocab_size) // 4096))
        with torch.no_grad():
            sigma = float(vocabulary(sample.to(embedded.device)).float().std())
        noise = []
        for draw in range(draws):
            generator = torch_stream(seed, "embedding noise", draw)
            value = torch.randn(len(positions), embedded.shape[-1], generator=generator) * sigmas * sigma
            noise.append(Add("embed", value, positions=tuple(positions), rows=draw))
        return cls(clean=rows, corrupt=rows, answer=answer, foil=foil, noise=tuple(noise))

    def metric(self, logits: Tensor | LazyLogits) -> Tensor:
        """The logit difference at the last position, one value a row."""
        return logits[:, -1, self.answer] - logits[:, -1, self.foil]

    def run(self, subject: Subject, side: str, capture: str | Sequence[str] = (), grad: bool = False) -> Run:
        """Run the clean or the corrupt side."""
        batch, edits = (self.clean, ()) if side == "clean" else (self.corrupt, self.noise)
        return subject.run(batch, capture=capture, edits=edits, grad=self.metric if grad else None)

    def base(self, side: str) -> tuple[Batch, tuple[Edit, ...]]:
        """The batch of one side and the edits that belong to it."""
        return (self.clean, ()) if side == "clean" else (self.corrupt, self.noise)
