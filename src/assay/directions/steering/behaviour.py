"""Behaviour as numbers of the logits at each prompt's end: openers against all else, divergences, probabilities."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from jaxtyping import Float, Int
from torch import Tensor

from assay.activations.lazy import LazyLogits
from assay.activations.subject import Prompts, Subject
from assay.base.errors import SpecError, TokenError
from assay.subjects.tokens import Batch

EPS = 1e-8

Metric = Callable[[Tensor], Tensor]


class Ends:
    """The logits at each prompt's last token, in the order of a batch, for as many cells as there are rows.

    Args:
        batch: The prompts.

    Example:
        >>> batch = subject.batch(["When Mary", "When Mary went"])
        >>> Ends(batch)(subject.run(batch).logits).shape
        torch.Size([2, 128])
    """

    def __init__(self, batch: Batch) -> None:
        self._columns = [start + length - 1 for start, length in zip(batch.starts, batch.lengths, strict=True)]

    def __call__(self, logits: Tensor | LazyLogits) -> Tensor:
        """`[rows, pos, vocab]` to `[rows, vocab]`; a sweep over one prompt has several cells as rows."""
        if len(set(self._columns)) == 1:
            return logits[:, self._columns[0]]
        return logits[torch.arange(len(self._columns)), torch.tensor(self._columns)]


def opener_score(last: Float[Tensor, "rows vocab"], openers: Sequence[int]) -> Float[Tensor, " rows"]:
    """How much a prompt's end leans to a behaviour that shows in the first token: log odds of its openers, float64.

        log(p + eps) - log(1 - p + eps),    p = sum of the openers' probabilities,  eps = 1e-8

    Args:
        last: Logits at the last token.
        openers: Token ids that open the behaviour, such as those of "I" and "As" for a refusal.

    Raises:
        SpecError: There are no openers, or one is no token.

    Source: Arditi et al. 2024, appendix B.

    Example:
        >>> opener_score(torch.zeros(1, 4), [0, 1]).tolist()
        [0.0]
    """
    ids = _ids(openers, last.shape[-1])
    probability = last.double().softmax(-1)[:, ids.to(last.device)].sum(-1)
    return torch.log(probability + EPS) - torch.log(1 - probability + EPS)


def divergence(base: Float[Tensor, "*any vocab"], other: Float[Tensor, "*any vocab"]) -> Float[Tensor, "*any"]:
    """`KL(base || other)` of two sets of logits, in nats, float64."""
    p, q = base.double().log_softmax(-1), other.double().log_softmax(-1)
    kl: Tensor = (p.exp() * (p - q)).sum(-1)
    return kl


def behaves(subject: Subject, prompts: Prompts, openers: Sequence[int]) -> Float[Tensor, " rows"]:
    """The opener score of each prompt, unedited: above zero where the behaviour is likelier than not."""
    batch = subject.batch(prompts)
    return opener_score(Ends(batch)(subject.run(batch).logits), openers).cpu()


def opener_ids(subject: Subject, openers: Sequence[str]) -> tuple[int, ...]:
    """The first token of each opener, spelled as it would follow the prompt (with its space, if it has one).

    Raises:
        TokenError: An opener has no tokens.
    """
    found = []
    for text in openers:
        ids = subject.tokenizer(text, add_special_tokens=False)["input_ids"]
        if not ids:
            raise TokenError(f"the opener {text!r} has no tokens", "openers")
        found.append(int(ids[0]))
    return tuple(dict.fromkeys(found))


def answer_ids(subject: Subject, prompts: Sequence[str], answers: Sequence[str]) -> Int[Tensor, " rows"]:
    """The token that each answer begins with, after its prompt.

    Raises:
        TokenError: An answer joins its prompt's last token, or adds no token.

    Example:
        >>> answer_ids(subject, ["When Mary"], [" went"]).shape
        torch.Size([1])
    """
    found = []
    for prompt, answer in zip(prompts, answers, strict=True):
        before = subject.tokenizer(prompt)["input_ids"]
        after = subject.tokenizer(prompt + answer)["input_ids"]
        if after[: len(before)] != before or len(after) <= len(before):
            raise TokenError(
                f"{answer!r} after {prompt[-20:]!r} does not begin with a token of its own; let prompts end before a "
                "space and answers begin with it",
                "answers",
            )
        found.append(int(after[len(before)]))
    return torch.tensor(found)


def answer_probability(batch: Batch, answers: Int[Tensor, " rows"]) -> Metric:
    """A metric for sweeps: the probability of each prompt's answer at its end."""
    ends = Ends(batch)

    def metric(logits: Tensor | LazyLogits) -> Tensor:
        last = ends(logits).double().softmax(-1)
        ids = answers.to(last.device).expand(len(last))  # several cells of one prompt
        return last.gather(1, ids[:, None])[:, 0]

    return metric


def _ids(openers: Sequence[int], size: int) -> Tensor:
    ids = torch.tensor(sorted(set(openers)), dtype=torch.long)
    if not len(ids) or int(ids.min()) < 0 or int(ids.max()) >= size:
        raise SpecError(
            f"openers are token ids between 0 and {size - 1}, at least one; got {list(openers)!r:.60}", "openers"
        )
    return ids
