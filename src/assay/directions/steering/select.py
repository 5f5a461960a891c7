"""The direction that a behaviour goes through, chosen among all positions and layers by what it does.

1. At each block's input and each of the last tokens of a prompt: the difference of means, float64.
2. *bypass*: the mean behaviour score where it is shown, the direction ablated everywhere. *induce*: the mean score
   where it is not shown, the raw vector added at that block's input at every position. *kl*: what ablating does to the
   next token where the behaviour is not shown.
3. Left out: what is not finite, the last fifth of the blocks, `kl > 0.1`, `induce < 0`. Of the rest the one whose
   ablation leaves least of the behaviour.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from assay.activations.edits import Add, Edit
from assay.activations.subject import Subject
from assay.base.errors import NumericalError, SpecError
from assay.base.hashing import digest
from assay.directions.data import read_sites
from assay.directions.steering.behaviour import Ends, behaves, divergence, opener_score
from assay.directions.steering.weights import ablate_everywhere
from assay.directions.vectors import Direction, Origin

Progress = Callable[[int, int], object]


@dataclass(frozen=True, slots=True, kw_only=True)
class Candidate:
    """A difference of means at one position and block, and what it does.

    Args:
        position: Which token, counted from the prompt's end.
        block: At which block's input.
        bypass: The mean score with the direction ablated, where the behaviour is shown.
        induce: The mean score with it added, where it is not shown.
        kl: The divergence that ablating makes where it is not shown, in nats.
        dropped: Why it was left out; empty if it was not.
    """

    position: int
    block: int
    bypass: float
    induce: float
    kl: float
    dropped: str = ""


@dataclass(frozen=True, slots=True, kw_only=True)
class Selection:
    """The chosen direction among all candidates.

    Args:
        direction: The raw difference of means, at its block's `resid_pre`.
        chosen: Its row of the table.
        candidates: All of them, by block and position.
        base: Mean scores without edits, of the validation prompts that show the behaviour and that do not.
    """

    direction: Direction
    chosen: Candidate
    candidates: tuple[Candidate, ...]
    base: tuple[float, float]


@dataclass(frozen=True, slots=True, kw_only=True)
class Filters:
    """What is left out before the choice.

    Args:
        last: The share of blocks at the end that are not looked at: those from `int((1 - last) * n)` on.
        kl: The largest divergence on prompts without the behaviour.
        induce: The least score that adding must give.
    """

    last: float = 0.2
    kl: float = 0.1
    induce: float = 0.0

    def why(self, candidate: Candidate, n_blocks: int) -> str:
        """Why a candidate is left out; empty if it is not.

        Example:
            >>> Filters().why(Candidate(position=-1, block=3, bypass=-1.0, induce=-2.0, kl=0.01), 10)
            'induce < 0'
        """
        if candidate.block >= self.first_late(n_blocks):
            return f"the last {self.last:.0%} of blocks"
        if not np.isfinite([candidate.bypass, candidate.induce, candidate.kl]).all():
            return "not finite"
        if candidate.kl > self.kl:
            return f"kl > {self.kl:g}"
        return f"induce < {self.induce:g}" if candidate.induce < self.induce else ""

    def first_late(self, n_blocks: int) -> int:
        """The first block that is too late."""
        return int(n_blocks * (1 - self.last) + 1e-9)


def select_direction(
    subject: Subject,
    shown: Sequence[str],
    absent: Sequence[str],
    *,
    validation: tuple[Sequence[str], Sequence[str]],
    openers: Sequence[int],
    positions: Sequence[int] = (-1,),
    filters: Filters | None = None,
    only_clear: bool = True,
    writes: str = "the behaviour",
    progress: Progress | None = None,
) -> Selection:
    """Choose the direction through which a behaviour goes, among positions and blocks.

    Args:
        subject: The subject.
        shown: Prompts to which it shows the behaviour, to fit on.
        absent: Prompts to which it does not.
        validation: Two more such sets, to choose by. They share no prompt with those to fit on.
        openers: Token ids that open the behaviour; see `opener_score`.
        positions: Which tokens, counted from the end: those of the template after the instruction.
        filters: What is left out.
        only_clear: Keep only prompts that the subject answers as their set says (score above zero, below zero).
        writes: The behaviour's name.
        progress: Told how many candidates are measured, of how many, once for each of the three measures.

    Returns:
        The selection. Its direction was chosen on the validation prompts: report what it does on others.

    Raises:
        SpecError: A set is empty or becomes so, sets overlap, a prompt is shorter than a position, or nothing survives.
        NumericalError: The means are not finite.

    Source: Arditi et al. 2024, section 2.3 and appendix C.
    """
    sets = _clear(subject, (tuple(shown), tuple(absent), *map(tuple, validation)), openers, only_clear)
    filters = filters or Filters()
    n_blocks = subject.n_blocks
    blocks = range(filters.first_late(n_blocks))
    vectors = mean_differences(subject, sets[0], sets[1], positions, blocks)
    grid = [(b, p) for b in range(len(blocks)) for p in range(len(positions))]
    raws = [vectors[b, p].float() for b, p in grid]
    bypass, induce, kl, base = _measures(subject, sets[2], sets[3], raws, [b for b, _ in grid], openers, progress)
    table: list[Candidate] = []
    for k, (b, p) in enumerate(grid):
        row = Candidate(position=positions[p], block=blocks[b], bypass=bypass[k], induce=induce[k], kl=kl[k])
        table.append(_judged(row, filters, n_blocks))
    for block in range(len(blocks), n_blocks):  # too late to be measured at all
        late = [Candidate(position=p, block=block, bypass=np.nan, induce=np.nan, kl=np.nan) for p in positions]
        table += [_judged(row, filters, n_blocks) for row in late]
    left = [(row.bypass, k) for k, row in enumerate(table) if not row.dropped]
    if not left:
        raise SpecError(_nothing(table, base), "shown")
    best = min(left)[1]
    origin = Origin(
        method="selected difference of means",
        subject=subject.fingerprint,
        data=digest(list(sets)),
        detail={
            "position": table[best].position,
            "openers": list(openers),
            "candidates": len(table),
            "survived": len(left),
            "fitted on": [len(sets[0]), len(sets[1])],
            "chosen on": [len(sets[2]), len(sets[3])],
            "bypass": table[best].bypass,
            "induce": table[best].induce,
            "kl": table[best].kl,
        },
    )
    direction = _direction(subject, sets, table[best], raws[best], writes, origin)
    return Selection(direction=direction, chosen=table[best], candidates=tuple(table), base=base)


def mean_differences(
    subject: Subject,
    shown: Sequence[str],
    absent: Sequence[str],
    positions: Sequence[int],
    blocks: Sequence[int],
    *,
    batch: int = 32,
) -> Float[Tensor, "blocks positions d"]:
    """Differences of means at block inputs, float64.

    Args:
        subject: The subject.
        shown: Prompts of the first class.
        absent: Prompts of the second.
        positions: Tokens, counted from the end.
        blocks: Which blocks.
        batch: How many prompts are run together.

    Raises:
        SpecError: A prompt is shorter than a position asks for.
    """
    first, second = (_mean(subject, texts, positions, blocks, batch) for texts in (shown, absent))
    return first - second


def _mean(subject: Subject, texts: Sequence[str], positions: Sequence[int], blocks: Sequence[int], size: int) -> Tensor:
    names = [f"blocks.{block}.resid_pre" for block in blocks]
    total = torch.zeros(len(names), len(positions), subject.parts.d_model, dtype=torch.float64)
    for start in range(0, len(texts), size):
        batch = subject.batch(list(texts[start : start + size]))
        try:
            columns = batch.columns(tuple(positions)) or []
        except IndexError as error:
            raise SpecError(f"a prompt is too short: {error}", "positions") from None
        run = subject.run(batch, capture=names)
        for row, picked in enumerate(columns):
            for k, name in enumerate(names):
                total[k] += run[name][row, picked].double().cpu()
    return total / len(texts)


def _clear(
    subject: Subject, sets: tuple[tuple[str, ...], ...], openers: Sequence[int], only_clear: bool
) -> tuple[tuple[str, ...], ...]:
    """The four sets, of disjoint prompts, and of those only what the subject answers as the set says."""
    names = ("shown", "absent", "validation shown", "validation absent")
    both = (set(sets[0]) | set(sets[1])) & (set(sets[2]) | set(sets[3]))
    if both:
        raise SpecError(f"{sorted(both)[0]!r:.60} is fitted on and chosen by; the sets must be disjoint", "validation")
    kept = []
    for name, texts, sign in zip(names, sets, (1, -1, 1, -1), strict=True):
        if not texts:
            raise SpecError(f"there are no prompts of the set {name!r}", name)
        if only_clear:
            scores = torch.cat(
                [behaves(subject, list(texts[i : i + 32]), openers) for i in range(0, len(texts), 32)]
            ).tolist()
            clear = tuple(text for text, score in zip(texts, scores, strict=True) if sign * score > 0)
            if not clear:
                raise SpecError(
                    f"of {len(texts)} prompts of the set {name!r} the subject answers none so: mean score "
                    f"{float(np.mean(scores)):.2f}. Look at the openers, or set only_clear=False",
                    name,
                )
            texts = clear
        kept.append(texts)
    return tuple(kept)


def _measures(
    subject: Subject,
    shown: Sequence[str],
    absent: Sequence[str],
    raws: Sequence[Tensor],
    blocks: Sequence[int],
    openers: Sequence[int],
    progress: Progress | None,
) -> tuple[list[float], list[float], list[float], tuple[float, float]]:
    """bypass, induce and kl of every candidate, and the mean scores without edits."""
    usable = [bool(torch.isfinite(raw).all()) and bool(raw.any()) for raw in raws]
    place = [k for k, good in enumerate(usable) if good]
    if not place:
        raise NumericalError("no candidate is finite: the two sets hold the same, or the activations overflow")
    ablations: list[Sequence[Edit]] = [ablate_everywhere(subject, raws[k]) for k in place]
    additions: list[Sequence[Edit]] = [[Add(f"blocks.{blocks[k]}.resid_pre", raws[k])] for k in place]
    with_it, without = subject.batch(list(shown)), subject.batch(list(absent))
    ends, other = Ends(with_it), Ends(without)
    base = subject.run(with_it).logits, subject.run(without).logits
    before = other(base[1])
    sweeps = (
        (with_it, ablations, lambda logits: opener_score(ends(logits), openers)),
        (without, additions, lambda logits: opener_score(other(logits), openers)),
        (without, ablations, lambda logits: divergence(before.expand_as(last := other(logits)), last)),
    )
    found = []
    for batch, cells, metric in sweeps:
        values = np.full(len(raws), np.nan)
        values[place] = subject.sweep(batch, cells, metric, progress=progress).double().cpu().numpy()
        found.append([float(value) for value in values])
    scores = [float(opener_score(at(logits), openers).mean()) for at, logits in zip((ends, other), base, strict=True)]
    return found[0], found[1], found[2], (scores[0], scores[1])


def _judged(row: Candidate, filters: Filters, n_blocks: int) -> Candidate:
    why = filters.why(row, n_blocks)
    return Candidate(
        position=row.position, block=row.block, bypass=row.bypass, induce=row.induce, kl=row.kl, dropped=why
    )


def _nothing(table: Sequence[Candidate], base: tuple[float, float]) -> str:
    counts = ", ".join(f"{n} by {why!r}" for why, n in Counter(row.dropped for row in table).most_common())
    return (
        f"no candidate survives: of {len(table)}, {counts}. Scores without edits are {base[0]:.2f} where the behaviour "
        f"is shown and {base[1]:.2f} where it is not. The subject may not have the behaviour; or try other positions, "
        "openers, or filters"
    )


def _direction(
    subject: Subject,
    sets: Sequence[Sequence[str]],
    chosen: Candidate,
    raw: Tensor,
    writes: str,
    origin: Origin,
) -> Direction:
    """The chosen candidate as a direction, with the scale of its site."""
    site = f"blocks.{chosen.block}.resid_pre"
    first, second = (
        read_sites(subject, texts, site, positions=chosen.position)[site].astype(np.float64) for texts in sets[:2]
    )
    unit = (raw / raw.norm()).double().numpy()
    return Direction(
        site=site,
        vector=raw,
        size=float(np.linalg.norm(np.concatenate([first, second]), axis=1).mean()),
        level=float(second.mean(0) @ unit),
        writes=f"towards {writes}",
        origin=origin,
    )
