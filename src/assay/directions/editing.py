"""ROME: rewrite one fact in one MLP's output matrix, on a copy of the model.

    W' = W + (v* - W k* - b) (C^-1 k*)' / (k*' C^-1 k*)

k* is the mean input of the matrix at the subject's last token, over prefixes; C the second moment of its inputs over
text; v* an output that makes the model say the new object, found by gradient descent. W' k* + b = v*, and of all
matrices with that property W' moves the outputs of typical inputs least. The user's module is never written to.
"""

from __future__ import annotations

import contextlib
import copy
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from assay.activations.edits import Add
from assay.activations.subject import Subject, load
from assay.activations.values import Run
from assay.base.errors import NumericalError, SpecError
from assay.directions.data import several
from assay.subjects.block_points import linear_bias
from assay.subjects.positions import At, Span
from assay.subjects.tokens import Batch

PREFIXES = ("", "In fact, ", "Yesterday, ", "As everybody knows, ", "The book says that ", "I was told: ", "However, ")
"""Openings under which the subject's key is averaged, so that it does not depend on where a sentence starts."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Fact:
    """A fact to rewrite, and what is asked afterwards.

    Args:
        prompt: A prompt with `{}` where the subject goes, that ends where the object begins: "{} is the capital of".
        subject: The subject.
        target: The new object, with its leading space.
        original: The true object, with its leading space.
        paraphrases: Other prompts with `{}` that ask the same.
        neighbours: Whole prompts about other subjects, whose object is the original and must stay.
        essence: A prompt with `{}` whose continuation must not change: what the subject is.

    Raises:
        SpecError: A prompt has not exactly one `{}`, or something is empty.
    """

    prompt: str
    subject: str
    target: str
    original: str
    paraphrases: tuple[str, ...] = ()
    neighbours: tuple[str, ...] = ()
    essence: str = "{} is a"

    def __post_init__(self) -> None:
        given = (self.prompt, self.subject, self.target, self.original, *self.paraphrases, self.essence)
        if not all(isinstance(text, str) for text in given):
            raise SpecError(f"a fact is made of texts; got {given}", "fact")
        for text in (self.prompt, *self.paraphrases, self.essence):
            if text.count("{}") != 1:
                raise SpecError(f"{text!r} must have one {{}} where the subject goes", "prompt")
        if not (self.subject.strip() and self.target.strip() and self.original.strip()):
            raise SpecError("a fact needs a subject, a target and an original object", "fact")

    def asked(self, prompt: str) -> str:
        """A prompt about the subject."""
        return prompt.replace("{}", self.subject)


@dataclass(frozen=True, slots=True, kw_only=True)
class Answers:
    """How a model completes prompts, one number a prompt.

    Args:
        target: The log-probability of the new object.
        original: That of the true one.
    """

    target: tuple[float, ...]
    original: tuple[float, ...]

    @property
    def rewritten(self) -> float:
        """The share of prompts where the new object is likelier; NaN without prompts."""
        won = [a > b for a, b in zip(self.target, self.original, strict=True)]
        return sum(won) / len(won) if won else math.nan


@dataclass(frozen=True, slots=True, kw_only=True)
class EditScore:
    """What an edit changed, before and after.

    Args:
        efficacy: The prompt itself.
        generalisation: The paraphrases.
        specificity: The neighbours: the share that still prefers the original is `1 - rewritten`.
        drift: `KL(before || after)` of the next token on the neighbours, in nats; NaN without neighbours.
    """

    efficacy: tuple[Answers, Answers]
    generalisation: tuple[Answers, Answers]
    specificity: tuple[Answers, Answers]
    drift: float

    def numbers(self) -> dict[str, float]:
        """After the edit: the shares of success, and the drift."""
        return {
            "efficacy": self.efficacy[1].rewritten,
            "generalisation": self.generalisation[1].rewritten,
            "specificity": 1 - self.specificity[1].rewritten,
            "specificity before": 1 - self.specificity[0].rewritten,
            "drift": self.drift,
        }


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Rewritten:
    """An edited copy of a model.

    Args:
        subject: The copy, ready to run.
        fact: What was rewritten.
        block: The block whose MLP was.
        key: k*, `[d_mlp]`.
        value: v*, `[d_model]`.
        change: `W' - W` as `[d_model, d_mlp]`; of rank one.
        losses: The loss of each step of the search for v*, in nats.
        score: What changed.
    """

    subject: Subject
    fact: Fact
    block: int
    key: Float[Tensor, " d_mlp"]
    value: Float[Tensor, " d_model"]
    change: Float[Tensor, "d_model d_mlp"]
    losses: tuple[float, ...]
    score: EditScore


@torch.no_grad()
def key_covariance(
    subject: Subject,
    texts: Sequence[str] | Tensor,
    block: int,
    *,
    batch: int = 8,
    progress: Callable[[int, int], object] | None = None,
) -> Float[Tensor, "d_mlp d_mlp"]:
    """The second moment of an MLP's output matrix's inputs over the tokens of text: `C = mean k k'`, in float64.

    Args:
        subject: The subject.
        texts: Ordinary text; several times as many tokens as the MLP is wide, or the edit will be coarse.
        block: The block.
        batch: How many texts go through the model at once.
        progress: Told how many texts are done, of how many.

    Raises:
        SpecError: Texts are no list of one or more.
        UnknownSite: The block's MLP has no such input (a mixture of experts).
    """
    several(texts)
    site = f"blocks.{block}.mlp.post"
    total, n = None, 0
    for start in range(0, len(texts), batch):
        run = subject.run(texts[start : start + batch], capture=site)
        for row, (first, length) in enumerate(zip(run.batch.starts, run.batch.lengths, strict=True)):
            keys = run[site][row, first : first + length].double()
            total = keys.T @ keys if total is None else total + keys.T @ keys
            n += length
        if progress is not None:
            progress(min(start + batch, len(texts)), len(texts))
    assert total is not None
    return total.cpu() / n


def rome(
    subject: Subject,
    fact: Fact,
    block: int,
    covariance: Float[Tensor, "d_mlp d_mlp"],
    *,
    prefixes: Sequence[str] = PREFIXES,
    steps: int = 25,
    lr: float = 0.5,
    kl: float = 0.0625,
    decay: float = 0.5,
    reach: float = 4.0,
    ridge: float = 1e-2,
) -> Rewritten:
    """Rewrite a fact in a copy of the model.

    Args:
        subject: The subject, with its tokenizer. Its module stays as it is.
        fact: What to rewrite, and what to ask afterwards.
        block: The block whose MLP is rewritten; middle blocks are where subjects are looked up.
        covariance: C; see `key_covariance`.
        prefixes: What the prompt is set behind.
        steps: Steps of Adam in the search for v*.
        lr: Its learning rate.
        kl: The weight of `KL` on the essence prompt.
        decay: The weight of `|delta|^2 / |v|^2`.
        reach: The largest `|delta| / |v|`.
        ridge: Added to C, as a share of the mean of its diagonal.

    Returns:
        The copy, the pieces of the edit, and efficacy, generalisation and specificity before and after.

    Raises:
        SpecError: There is no tokenizer, the subject is not in the prompt as tokens, or the MLP's output passes a norm
            or a factor before the stream.
        NumericalError: The loss or the edit is not finite.

    Source: Meng et al. 2022, "Locating and editing factual associations in GPT", section 3.1, equations 2 to 4.
    """
    if subject.tokenizer is None:
        raise SpecError("rewriting a fact needs a tokenizer; load the model with one", "subject")
    site = f"blocks.{block}.mlp.post"
    point = subject.point(subject.site(site))
    out = subject.point(subject.site(f"blocks.{block}.mlp.out"))
    if subject.parts.factor != 1.0 or out.path != point.path:
        raise SpecError(f"{subject.name} norms or scales what its MLPs write; ROME is for MLPs that write it as it is")
    key, old = _key_and_value(subject, fact, block, prefixes)
    delta, losses = _search(subject, fact, block, prefixes, old, steps, lr, kl, decay, reach)
    wide = key.double()
    matrix = covariance.double()
    matrix = matrix + ridge * float(torch.diagonal(matrix).mean()) * torch.eye(len(matrix), dtype=torch.float64)
    if matrix.shape != (len(wide), len(wide)):
        raise SpecError(f"the covariance is {tuple(matrix.shape)}; {site} has {len(wide)} dimensions", "covariance")
    try:
        solved = torch.linalg.solve(matrix, wide)
    except RuntimeError as error:  # torch's LinAlgError
        raise NumericalError(f"the covariance is singular: give more text, or ridge= ({error})") from error
    edited = copy.deepcopy(subject.module)
    module = edited.get_submodule(point.path)
    conv = type(module).__name__ == "Conv1D"
    weight: Any = module.weight
    bias = linear_bias(module)
    rows = (weight.detach().T if conv else weight.detach()).double().cpu()
    target = old.double() + delta.double()
    now = rows @ wide + (0.0 if bias is None else bias.detach().double().cpu())
    change = torch.outer(target - now, solved) / (wide @ solved)
    if not bool(torch.isfinite(change).all()):
        raise NumericalError("the edit is not finite: the covariance may be degenerate; give more text, or ridge=")
    with torch.no_grad():
        weight.add_((change.T if conv else change).to(weight))
    after = load(edited, tokenizer=subject.tokenizer)
    return Rewritten(
        subject=after,
        fact=fact,
        block=block,
        key=key,
        value=target.to(key.dtype),
        change=change.to(key.dtype),
        losses=losses,
        score=score_edit(subject, after, fact),
    )


def score_edit(before: Subject, after: Subject, fact: Fact) -> EditScore:
    """Ask a fact, its paraphrases and its neighbours of a model before and after."""

    def both(prompts: Sequence[str]) -> tuple[Answers, Answers]:
        return (_answers(before, prompts, fact), _answers(after, prompts, fact))

    drift = math.nan
    if fact.neighbours:
        old, new = (_last(s.run(list(fact.neighbours))).log_softmax(-1) for s in (before, after))
        drift = float((old.exp() * (old - new)).sum(-1).mean())
    return EditScore(
        efficacy=both([fact.asked(fact.prompt)]),
        generalisation=both([fact.asked(prompt) for prompt in fact.paraphrases]),
        specificity=both(fact.neighbours),
        drift=drift,
    )


@torch.no_grad()
def continuation(subject: Subject, prompts: Sequence[str], text: str) -> list[float]:
    """The log-probability of a text of one token or more after each prompt, in nats.

    Raises:
        SpecError: The text adds no token to a prompt, or changes those that the prompt has.
    """
    if not prompts:
        return []
    alone = subject.batch(list(prompts))
    run = subject.run([prompt + text for prompt in prompts])
    found = []
    _adds(alone, run.batch, prompts, text)
    for row, (start, whole, prompt) in enumerate(zip(run.batch.starts, run.batch.lengths, alone.lengths, strict=True)):
        logs = run.logits[row, start + prompt - 1 : start + whole - 1].float().log_softmax(-1)
        ids = run.batch.ids[row, start + prompt : start + whole].to(logs.device)
        found.append(float(logs[torch.arange(len(ids)), ids].sum()))
    return found


def _adds(alone: Batch, longer: Batch, prompts: Sequence[str], text: str) -> None:
    """See that prompts with a text behind them have their own tokens, and then more."""
    for row, prompt in enumerate(prompts):
        before, after = alone.prompt(row), longer.prompt(row)
        if len(after) <= len(before):
            raise SpecError(f"{text!r} adds no token to {prompt!r}; give it with its leading space", "target")
        if list(after[: len(before)]) != list(before):
            raise SpecError(
                f"{text!r} changes the tokens of {prompt!r}: end prompts before a space, and begin the text with it",
                "target",
            )


def _answers(subject: Subject, prompts: Sequence[str], fact: Fact) -> Answers:
    return Answers(
        target=tuple(continuation(subject, prompts, fact.target)),
        original=tuple(continuation(subject, prompts, fact.original)),
    )


def _last(run: Run) -> Tensor:
    ends = [start + length - 1 for start, length in zip(run.batch.starts, run.batch.lengths, strict=True)]
    return run.logits[torch.arange(len(ends)), torch.tensor(ends)].float()


def _columns(batch: Batch, fact: Fact, openings: Sequence[str]) -> list[int]:
    """The column of the last token of the subject where the prompt asks for it, after an opening text in each prompt.

    The subject may be said before, in the opening too. Its first token has a leading space or not.
    """
    found = []
    for row, opening in enumerate(openings):
        start = len(opening) + len(fact.subject) - len(fact.subject.lstrip())
        spelled = set()
        for text in (fact.subject, " " + fact.subject):
            with contextlib.suppress(IndexError):
                spelled |= set((batch.columns(At(text, occurrence="all", tokens="last"), [row]) or [])[row])
        here = batch.columns(Span(start, start + len(fact.subject.strip())), [row]) if spelled else None
        if here is None or here[row][-1] not in spelled:
            raise SpecError(f"the tokens of prompt {row} do not spell the subject {fact.subject!r}", "subject")
        found.append(here[row][-1])
    return found


def _openings(fact: Fact, prefixes: Sequence[str]) -> list[str]:
    """What stands before the subject in each prompt."""
    return [prefix + fact.prompt.partition("{}")[0] for prefix in prefixes]


@torch.no_grad()
def _key_and_value(subject: Subject, fact: Fact, block: int, prefixes: Sequence[str]) -> tuple[Tensor, Tensor]:
    """k* over the prompts, and what the MLP gives there on average of them."""
    site, out = f"blocks.{block}.mlp.post", f"blocks.{block}.mlp.out"
    run = subject.run([prefix + fact.asked(fact.prompt) for prefix in prefixes], capture=[site, out])
    columns = _columns(run.batch, fact, _openings(fact, prefixes))
    keys = torch.stack([run[site][row, column] for row, column in enumerate(columns)]).float()
    values = torch.stack([run[out][row, column] for row, column in enumerate(columns)]).float()
    return keys.mean(0).cpu(), values.mean(0).cpu()


def _search(
    subject: Subject,
    fact: Fact,
    block: int,
    prefixes: Sequence[str],
    old: Tensor,
    steps: int,
    lr: float,
    kl: float,
    decay: float,
    reach: float,
) -> tuple[Tensor, tuple[float, ...]]:
    """The delta at the MLP's output that makes the model say the target after every prompt."""
    site = f"blocks.{block}.mlp.out"
    prompts = [prefix + fact.asked(fact.prompt) for prefix in prefixes]
    n = len(prompts)
    essence = fact.asked(fact.essence)
    alone = subject.batch(prompts)
    batch = subject.batch([*(prompt + fact.target for prompt in prompts), essence])
    columns = _columns(batch, fact, [*_openings(fact, prefixes), fact.essence.partition("{}")[0]])
    where = [[column - start] for column, start in zip(columns, batch.starts, strict=True)]
    _adds(alone, batch, prompts, fact.target)
    spans = [
        (batch.starts[row] + alone.lengths[row] - 1, batch.starts[row] + batch.lengths[row] - 1) for row in range(n)
    ]
    end = batch.starts[n] + batch.lengths[n] - 1
    with torch.no_grad():
        before = subject.run(batch).logits[n, end].float().log_softmax(-1)

    def metric(logits: Tensor) -> Tensor:
        parts = []
        for row, (first, last) in enumerate(spans):
            ids = batch.ids[row, first + 1 : last + 1].to(logits.device)
            parts.append(torch.nn.functional.cross_entropy(logits[row, first:last].float(), ids) / n)
        now = logits[n, end].float().log_softmax(-1)
        return torch.stack([*parts, kl * (before.exp() * (before - now)).sum()])

    size = float(old.norm())
    delta = torch.zeros_like(old)
    optimiser = torch.optim.Adam([delta], lr=lr)
    losses = []
    for _ in range(steps):
        run = subject.run(batch, capture=site, edits=[Add(site, delta, positions=where)], grad=metric)
        assert run.grad is not None and run.value is not None
        slope = torch.stack([run.grad[site][row, column] for row, column in enumerate(columns)]).sum(0).cpu()
        losses.append(float(run.value.sum()) + decay * float(delta.norm() / size) ** 2)
        if not math.isfinite(losses[-1]):
            raise NumericalError(f"the loss is {losses[-1]} at step {len(losses) - 1}; lower lr")
        delta.grad = slope.to(delta) + 2 * decay * delta / size**2
        optimiser.step()
        if float(delta.norm()) > reach * size:
            delta.mul_(reach * size / float(delta.norm()))
    return delta, tuple(losses)


def facts(rows: Sequence[Mapping[str, Any]]) -> tuple[Fact, ...]:
    """Facts from JSON rows with the fields of `Fact`.

    Raises:
        SpecError: A row has an unknown field or lacks one.
    """
    found = []
    for number, row in enumerate(rows):
        values: Any = {name: tuple(value) if isinstance(value, list) else value for name, value in row.items()}
        try:
            found.append(Fact(**values))
        except TypeError as error:
            raise SpecError(f"fact {number}: {error}", "facts") from error
    return tuple(found)
