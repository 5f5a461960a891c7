"""The logit lens: what the model would say if it stopped after each block (nostalgebraist 2020).

    lens_l = unembed(final_norm(resid_l)),

with the model's own final norm and unembedding. Early layers need not be in the final basis: a lens that reads
nothing there is no evidence that nothing is there.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Float, Int
from torch import Tensor

from assay.activations.subject import Prompts, Subject
from assay.base.errors import SpecError


@dataclass(frozen=True, slots=True, kw_only=True)
class Lens:
    """Readings after the embedding and after each block, at the last position unless said otherwise.

    Args:
        difference: The answer's logit minus the foil's, `[blocks + 1, pos]`.
        probability: The answer's probability at the last position, `[blocks + 1]`.
        rank: The answer's rank at the last position (0 is best), `[blocks + 1]`.
        top: The id of the best token at the last position, `[blocks + 1]`.
    """

    difference: Float[Tensor, "readings pos"]
    probability: Float[Tensor, " readings"]
    rank: Float[Tensor, " readings"]
    top: Int[Tensor, " readings"]


@torch.no_grad()
def logit_lens(subject: Subject, prompt: Prompts, answer: int, foil: int, edits: Sequence[object] = ()) -> Lens:
    """Read the stream after every block through the model's own final norm and unembedding.

    Args:
        subject: The subject.
        prompt: One prompt (or several rows, which are averaged for the difference).
        answer: The answer's token id.
        foil: The foil's token id.
        edits: Edits of the run, if any.

    Returns:
        The readings; row 0 is the embedding, row l + 1 is after block l.
    """
    n = subject.n_blocks
    sites = ["blocks.0.resid_pre", *(f"blocks.{block}.resid_post" for block in range(n))]
    run = subject.run(prompt, capture=sites, edits=edits)  # type: ignore[arg-type]
    if run.batch.padded:
        raise SpecError("the lens reads positions side by side: give prompts of one length", "prompt")
    parts = subject.parts

    def read(stream: Tensor) -> Tensor:
        return parts.logits(stream).float()

    differences, probabilities, ranks, tops = [], [], [], []
    for site in sites:
        logits = read(run[site])
        differences.append((logits[..., answer] - logits[..., foil]).mean(0))
        last = logits[:, -1]
        probabilities.append(last.softmax(-1)[:, answer].mean())
        ranks.append((last > last[:, answer : answer + 1]).sum(-1).float().mean())
        tops.append(last[0].argmax())
    return Lens(
        difference=torch.stack(differences),
        probability=torch.stack(probabilities),
        rank=torch.stack(ranks),
        top=torch.stack(tops),
    )
