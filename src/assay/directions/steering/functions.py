"""What a few examples in a prompt leave behind: function vectors (heads) and task vectors (the residual stream).

    function vector    v = sum over the top heads (l, h) of  z_mean[l, h] W_O[l, h],   added to the stream
    task vector        h_l at the separator of a prompt with examples, put in place of what a prompt without has there

`z_mean` is the mean of a head's output at the last token of prompts with examples. Heads are ranked by their indirect
effect: what the mean does to the answer's probability where the examples' answers are shuffled.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from assay.activations.edits import Edit, Set
from assay.activations.subject import Subject
from assay.base.errors import NumericalError, SpecError, UnsupportedArchitecture
from assay.base.hashing import digest
from assay.base.rng import numpy_stream
from assay.directions.data import mean_norms, read_sites
from assay.directions.steering.behaviour import Ends, answer_ids, answer_probability
from assay.directions.vectors import Direction, Origin

Progress = Callable[[int, int], object]


@dataclass(frozen=True, slots=True, kw_only=True)
class Questions:
    """Questions with the answer that each should have.

    Args:
        texts: They end where the answer begins, at the separator.
        answers: Each begins with the space that separates it.
    """

    texts: tuple[str, ...]
    answers: tuple[str, ...]

    def __post_init__(self) -> None:
        if len(self.texts) != len(self.answers) or not self.texts:
            raise SpecError(f"{len(self.texts)} prompts with {len(self.answers)} answers; give one each", "answers")


@dataclass(frozen=True, slots=True, kw_only=True)
class InContextTask:
    """A task as a list of questions and answers, and how they are laid out in a prompt.

    Args:
        items: Questions and answers.
        question: The layout of a question, up to the separator that the answer follows.
        between: What stands between examples.

    Raises:
        SpecError: There are no items, or a question occurs twice.

    Example:
        >>> task = InContextTask(items=(("hot", "cold"), ("big", "small"), ("up", "down")))
        >>> print(task.prompts((2,), shots=1, pool=(0,)).texts[0])
        Q: hot
        A: cold
        <BLANKLINE>
        Q: up
        A:
    """

    items: tuple[tuple[str, str], ...]
    question: str = "Q: {}\nA:"
    between: str = "\n\n"

    def __post_init__(self) -> None:
        questions = [question for question, _ in self.items]
        if not questions or len(set(questions)) < len(questions):
            raise SpecError(f"a task needs items, no question twice; got {len(questions)} questions", "items")
        if "{}" not in self.question:
            raise SpecError(f"question={self.question!r} has no place for the question: write {{}} there", "question")

    def split(self, held_out: float = 0.3, seed: int = 0) -> tuple[tuple[int, ...], tuple[int, ...]]:
        """Numbers of items to show as examples, and of items to ask for.

        Raises:
            SpecError: There are fewer than two items, or the share is none.
        """
        if len(self.items) < 2 or not 0 < held_out < 1:
            raise SpecError(
                f"{len(self.items)} items cannot be split with held_out={held_out}: two items, a share within 0..1",
                "held_out",
            )
        order = numpy_stream(seed, "task", "split").permutation(len(self.items)).tolist()
        n = min(len(order) - 1, max(1, round(held_out * len(order))))
        return tuple(sorted(order[n:])), tuple(sorted(order[:n]))

    def prompts(
        self,
        asked: Sequence[int],
        *,
        shots: int = 0,
        pool: Sequence[int] | None = None,
        shuffled: bool = False,
        seed: int = 0,
    ) -> Questions:
        """A prompt for each item asked, after examples drawn from a pool.

        Args:
            asked: Numbers of items.
            shots: How many examples.
            pool: Items to draw examples from; all when None. What is asked is never among its own examples.
            shuffled: Give every example the answer of another one: the layout and both vocabularies stay, the task
                is gone.
            seed: Seed of the draws.

        Raises:
            SpecError: The pool is too small, or an item is none.
        """
        outside = [item for item in (*asked, *(() if pool is None else pool)) if not 0 <= item < len(self.items)]
        if outside or shots < 0:
            said = f"item {outside[0]}" if outside else f"shots={shots}"
            raise SpecError(f"{said}: there are items 0 to {len(self.items) - 1}, and 0 shots or more", "asked")
        texts, answers = [], []
        for k, item in enumerate(asked):
            rng = numpy_stream(seed, "task", "examples", k)
            there = [i for i in (range(len(self.items)) if pool is None else pool) if i != item]
            if len(there) < shots or (shuffled and shots < 2):
                raise SpecError(
                    f"{shots} examples cannot be drawn from {len(there)} items"
                    + ("; shuffling needs two or more" if shuffled else ""),
                    "shots",
                )
            drawn = [there[i] for i in rng.permutation(len(there))[:shots]]
            given = [drawn[(i + 1) % shots] for i in range(shots)] if shuffled else drawn  # a cycle: none keeps its own
            lines = [f"{self._ask(a)} {self.items[b][1]}" for a, b in zip(drawn, given, strict=True)]
            texts.append(self.between.join([*lines, self._ask(item)]))
            answers.append(f" {self.items[item][1]}")
        return Questions(texts=tuple(texts), answers=tuple(answers))

    def _ask(self, item: int) -> str:
        return self.question.replace("{}", self.items[item][0])

    @property
    def digest(self) -> str:
        """The hash of items and layout."""
        return digest([self.items, self.question, self.between])


def mean_heads(subject: Subject, prompts: Questions, *, batch: int = 16) -> Float[Tensor, "blocks heads d_head"]:
    """Each head's mean output at the last token of prompts with examples."""
    names = [f"blocks.{block}.attn.z" for block in range(subject.n_blocks)]
    found = subject.mean(list(prompts.texts), names, positions="last", max_rows=batch)
    return torch.stack([found[name].cpu() for name in names])


def indirect_effects(
    subject: Subject,
    means: Float[Tensor, "blocks heads d_head"],
    shuffled: Questions,
    *,
    progress: Progress | None = None,
) -> Float[Tensor, "blocks heads"]:
    """What each head's mean does to prompts whose examples say nothing.

        IE[l, h] = mean over prompts of  P(answer | z[l, h] <- z_mean[l, h] at the last token) - P(answer)

    Args:
        subject: The subject.
        means: From `mean_heads`.
        shuffled: Questions with shuffled examples.
        progress: Told how many heads are measured, of how many.

    Raises:
        SpecError: The means are of another subject.

    Source: Todd et al. 2024, section 2.3.
    """
    blocks, heads = subject.n_blocks, subject.parts.n_heads
    if means.shape[:2] != (blocks, heads):
        raise SpecError(
            f"means have the shape {tuple(means.shape)}; {subject.name} has {blocks} x {heads} heads", "means"
        )
    batch = subject.batch(list(shuffled.texts))
    metric = answer_probability(batch, answer_ids(subject, shuffled.texts, shuffled.answers))
    cells = [
        Set(f"blocks.{block}.attn.z.{head}", means[block, head], positions="last")
        for block in range(blocks)
        for head in range(heads)
    ]
    base = metric(subject.run(batch).logits).mean()
    values = subject.sweep(batch, cells, metric, progress=progress)
    return (values - base).float().reshape(blocks, heads).cpu()


def function_vector(
    subject: Subject,
    means: Float[Tensor, "blocks heads d_head"],
    effects: Float[Tensor, "blocks heads"],
    *,
    site: str | None = None,
    n_heads: int = 10,
    size: float = float("nan"),
    data: str = "",
    writes: str = "the task",
) -> Direction:
    """The sum of what the heads with the largest effects write, on average, with examples.

    Args:
        subject: The subject.
        means: From `mean_heads`.
        effects: From `indirect_effects`.
        site: Where it is to be added: `resid_post` of the block a third of the way up by default. Sweep it.
        n_heads: How many heads.
        size: The mean norm at the site, if doses are to be measured in it.
        data: Digest of the task.
        writes: The task's name.

    Returns:
        The direction; `add_raw(1.0, positions="last")` is the edit of the source.

    Raises:
        SpecError: There are not so many heads, or effects and means are not one a head of the subject.
        UnsupportedArchitecture: A norm stands between heads and stream, so that a head writes no vector of its own.

    Source: Todd et al. 2024, section 2.3.
    """
    parts, total = subject.parts, effects.numel()
    if not 1 <= n_heads <= total:
        raise SpecError(f"n_heads={n_heads}; {subject.name} has {total} heads", "n_heads")
    if effects.shape != means.shape[:2] or means.shape[:2] != (subject.n_blocks, parts.n_heads):
        raise SpecError(
            f"effects have the shape {tuple(effects.shape)}, means {tuple(means.shape)}; {subject.name} has "
            f"{subject.n_blocks} x {parts.n_heads} heads",
            "effects",
        )
    if not bool(torch.isfinite(effects).all()) or not bool(torch.isfinite(means).all()):
        raise NumericalError("the effects or the heads' means are not finite")
    if parts.post_norm or any(parts.attention_post(block) is not None for block in range(subject.n_blocks)):
        raise UnsupportedArchitecture(
            f"{type(subject.module).__name__} applies a norm to what its heads write together, so a head adds no "
            "vector of its own; use a task vector"
        )
    order = effects.flatten().argsort(descending=True)[:n_heads].tolist()
    heads = [divmod(index, effects.shape[1]) for index in order]
    vector = torch.zeros(parts.d_model, dtype=torch.float64)
    for block, head in heads:
        mean = means[block, head].double()
        matrix = parts.output_matrix(block).detach().double().cpu()
        vector += mean @ matrix[head * len(mean) : (head + 1) * len(mean)]
    detail = {"heads": [list(pair) for pair in heads], "effects": [float(effects[b, h]) for b, h in heads]}
    return Direction(
        site=site or f"blocks.{subject.n_blocks // 3}.resid_post",
        vector=vector.float(),
        size=size,
        writes=writes,
        origin=Origin(method="function vector", subject=subject.fingerprint, data=data, detail=detail),
    )


def task_vectors(
    subject: Subject,
    prompts: Questions,
    sites: str | Sequence[str] = "blocks.*.resid_post",
    *,
    data: str = "",
    writes: str = "the task",
) -> dict[str, Direction]:
    """What the stream holds at the separator of prompts with examples, averaged over prompts, by site.

    Args:
        subject: The subject.
        prompts: Questions with examples, each asking for something else: the question should not stay in the vector.
        sites: Where; choose among them by `score` on items that are not reported.
        data: Digest of the task.
        writes: The task's name.

    Returns:
        By site. `patch_in` puts one in place; its size is the mean norm there.

    Source: Hendel et al. 2023, section 3.
    """
    found = read_sites(subject, prompts.texts, sites)
    sizes = mean_norms(found)
    return {
        site: Direction(
            site=site,
            vector=torch.from_numpy(rows.astype("float64").mean(0)).float(),
            size=sizes[site],
            writes=writes,
            origin=Origin(method="task vector", subject=subject.fingerprint, data=data, detail={"prompts": len(rows)}),
        )
        for site, rows in found.items()
    }


def patch_in(direction: Direction) -> Set:
    """The edit that puts a task vector in place of what the separator holds."""
    return Set(direction.site, direction.vector, positions="last")


@dataclass(frozen=True, slots=True, kw_only=True)
class Score:
    """How a subject answers prompts.

    Args:
        correct: Whether each answer's first token is the likeliest.
        probability: The probability of each answer's first token.
        answers: Those tokens.
    """

    correct: tuple[bool, ...]
    probability: tuple[float, ...]
    answers: tuple[int, ...]

    @property
    def accuracy(self) -> float:
        """The share of prompts answered right."""
        return sum(self.correct) / len(self.correct)

    @property
    def mean_probability(self) -> float:
        """The mean probability of the answers."""
        return sum(self.probability) / len(self.probability)


def score(subject: Subject, prompts: Questions, edits: Sequence[Edit] = (), *, batch: int = 32) -> Score:
    """Whether a subject answers prompts, edited or not.

    Args:
        subject: The subject.
        prompts: The prompts, with or without examples.
        edits: For instance a function vector's `add_raw(1.0, positions="last")`.
        batch: How many prompts are run together.
    """
    ids = answer_ids(subject, prompts.texts, prompts.answers)
    correct: list[bool] = []
    probability: list[float] = []
    for start in range(0, len(ids), batch):
        rows = subject.batch(list(prompts.texts[start : start + batch]))
        last = Ends(rows)(subject.run(rows, edits=edits).logits).double().cpu()
        wanted = ids[start : start + batch]
        correct += (last.argmax(-1) == wanted).tolist()
        probability += last.softmax(-1).gather(1, wanted[:, None])[:, 0].tolist()
    return Score(correct=tuple(correct), probability=tuple(probability), answers=tuple(ids.tolist()))


def score_arms(
    subject: Subject,
    task: InContextTask,
    edits: Sequence[Edit],
    *,
    asked: Sequence[int],
    pool: Sequence[int] | None = None,
    shots: int = 10,
    seed: int = 0,
) -> Mapping[str, Score]:
    """The same questions without examples, with shuffled ones and with true ones, without and with the edits.

    Args:
        subject: The subject.
        task: The task.
        edits: What is to stand in for examples.
        asked: Items that no vector was fitted or chosen on.
        pool: Items that examples are drawn from.
        shots: How many examples.
        seed: Seed of their draw.

    Returns:
        Scores of `zero-shot`, `zero-shot edited`, `shuffled`, `shuffled edited` and `few-shot`, which is what the edits
        should reach.
    """
    arms = {
        "zero-shot": task.prompts(asked),
        "shuffled": task.prompts(asked, shots=shots, pool=pool, shuffled=True, seed=seed),
        "few-shot": task.prompts(asked, shots=shots, pool=pool, seed=seed),
    }
    found = {name: score(subject, prompts) for name, prompts in arms.items()}
    for name in ("zero-shot", "shuffled"):
        found[f"{name} edited"] = score(subject, arms[name], edits)
    return found
