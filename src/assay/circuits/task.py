"""A task: a clean prompt, a corruption of it, and the answer and foil whose logit difference tells them apart."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Float, Int
from torch import Tensor

from assay.activations.edits import Add, Edit
from assay.activations.lazy import LazyLogits
from assay.activations.subject import Subject
from assay.activations.values import Run
from assay.base.errors import SpecError
from assay.base.rng import torch_stream
from assay.subjects.tokens import Batch, from_ids

Ids = Tensor | Sequence[int] | Sequence[Sequence[int]]


@dataclass(frozen=True, slots=True, kw_only=True)
class Task:
    """A clean input and a corrupted one of the same shape, with an answer and a foil for each row.

    The metric is the logit difference at the last position, `logits[answer] - logits[foil]`.

    Args:
        clean: Token ids, `[rows, pos]`; row k belongs with row k of `corrupt`.
        corrupt: Token ids, `[rows, pos]`.
        answer: The answer's token id, one a row.
        foil: The foil's token id, one a row.
        noise: Edits on the embeddings that make the corruption, where the tokens themselves do not.

    Raises:
        SpecError: If the inputs do not line up.
    """

    clean: Batch
    corrupt: Batch
    answer: Int[Tensor, " rows"]
    foil: Int[Tensor, " rows"]
    noise: tuple[Edit, ...] = ()

    def __post_init__(self) -> None:
        """Refuse inputs that do not line up."""
        if self.clean.ids.shape != self.corrupt.ids.shape:
            raise SpecError(
                f"clean is {tuple(self.clean.ids.shape)} and corrupt {tuple(self.corrupt.ids.shape)}: they must align",
                "corrupt",
            )
        if len(self.answer) != self.clean.size or len(self.foil) != self.clean.size:
            raise SpecError(
                f"{self.clean.size} rows need as many answers and foils, not {len(self.answer)} and {len(self.foil)}",
                "answer",
            )

    @classmethod
    def from_tokens(cls, clean: Ids, corrupt: Ids, answer: Ids | int, foil: Ids | int) -> Task:
        """A task of prompts given as token ids.

        Args:
            clean: `[rows, pos]`, or one prompt `[pos]`.
            corrupt: The same shape.
            answer: Token ids, one a row, or one for all.
            foil: Token ids, one a row, or one for all.

        Example:
            >>> task = Task.from_tokens(clean=[[5, 6, 7]], corrupt=[[5, 8, 7]], answer=9, foil=10)
            >>> task.clean.width
            3
        """
        batch = from_ids(torch.as_tensor(clean))
        rows = batch.size
        return cls(
            clean=batch,
            corrupt=from_ids(torch.as_tensor(corrupt)),
            answer=torch.as_tensor(answer).reshape(-1).expand(rows if isinstance(answer, int) else -1),
            foil=torch.as_tensor(foil).reshape(-1).expand(rows if isinstance(foil, int) else -1),
        )

    @classmethod
    def from_noise(
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
    ) -> Task:
        """A task of a prompt and itself under noise: causal tracing (Meng et al. 2022, section 2.1).

        Gaussian noise of `sigmas` standard deviations of the token embeddings is added to the embeddings at
        `positions`. Each draw is a row.

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
        size = int(subject.config.vocab_size)
        sample = torch.arange(0, size, max(1, size // 4096), device=embedded.device)
        with torch.no_grad():
            sigma = float(vocabulary(sample).float().std())
        noise = []
        for draw in range(draws):
            generator = torch_stream(seed, "embedding noise", draw)
            value = torch.randn(len(positions), embedded.shape[-1], generator=generator) * sigmas * sigma
            noise.append(Add("embed", value, positions=tuple(positions), rows=draw))
        return cls(
            clean=rows,
            corrupt=rows,
            answer=torch.tensor([answer] * draws),
            foil=torch.tensor([foil] * draws),
            noise=tuple(noise),
        )

    def metric(self, logits: Float[Tensor, "rows pos vocab"] | LazyLogits) -> Float[Tensor, " rows"]:
        """The logit difference at the last position, one value a row; a task of one row serves any number of rows."""
        last = logits[:, -1]
        answer, foil = (ids.to(last.device).expand(len(last))[:, None] for ids in (self.answer, self.foil))
        return (last.gather(1, answer) - last.gather(1, foil))[:, 0]

    def run(self, subject: Subject, side: str, capture: str | Sequence[str] = (), grad: bool = False) -> Run:
        """Run the clean or the corrupt side."""
        batch, edits = self.base(side)
        return subject.run(batch, capture=capture, edits=edits, grad=self.metric if grad else None)

    def base(self, side: str) -> tuple[Batch, tuple[Edit, ...]]:
        """The batch of one side, "clean" or "corrupt", and the edits that belong to it."""
        if side not in ("clean", "corrupt"):
            raise SpecError(f"side={side!r}: 'clean' or 'corrupt'", "side")
        return (self.clean, ()) if side == "clean" else (self.corrupt, self.noise)
