"""Dose and response: what a direction does at each of several doses, to the behaviour and to everything else.

At every dose: the behaviour's metric on its prompts; a capability guard on unrelated text, `KL(base || steered)` and
the change of the next token's cross-entropy, in nats a token; and named side effects. The same for control vectors of
the same norm at the same doses, so that a curve is read beside those of directions that mean nothing, or something
else.

All vectors and doses are the cells of one sweep for each set of prompts. A dose of 0 is the base itself, not a cell.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np
import torch
from jaxtyping import Float, Shaped
from torch import Tensor

from assay.activations.edits import Add, Edit, Positions
from assay.activations.lazy import LazyLogits
from assay.activations.subject import Prompts, Subject
from assay.base.errors import NumericalError, SpecError
from assay.base.stats import Interval, Side, bootstrap_interval, permutation_p, spearman
from assay.controls.directions import (
    covariance_matched_directions,
    isotropic_directions,
    shuffled_difference_directions,
)
from assay.directions.steering.behaviour import Metric
from assay.directions.vectors import Direction
from assay.subjects.tokens import Batch

Progress = Callable[[int, int], object]
Values = Float[np.ndarray, "doses rows"]


@dataclass(frozen=True, slots=True, kw_only=True)
class SideEffect:
    """Something that steering should leave alone.

    Args:
        prompts: Where it shows.
        metric: From logits `[rows, pos, vocab]` to one value a row.
    """

    prompts: Prompts
    metric: Metric


@dataclass(frozen=True, slots=True, kw_only=True)
class Budget:
    """What steering may cost.

    Args:
        kl: The largest mean KL on unrelated text, in nats a token.
        ce: The largest rise of the mean cross-entropy there, in nats a token.
        sides: The largest absolute mean change of side effects, by name; those not named may change.
    """

    kl: float = 0.1
    ce: float = 0.05
    sides: Mapping[str, float] = field(default_factory=dict)


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Curve:
    """What one vector does, dose by dose.

    Args:
        doses: In rising order.
        behaviour: The metric of each prompt.
        base: The metric of each prompt without steering.
        kl: Divergence on each unrelated text, in nats a token.
        ce: Change of cross-entropy on each, in nats a token.
        sides: Change of each side effect, by name.
    """

    doses: tuple[float, ...]
    behaviour: Values
    base: Float[np.ndarray, " rows"]
    kl: Float[np.ndarray, "doses texts"]
    ce: Float[np.ndarray, "doses texts"]
    sides: Mapping[str, Float[np.ndarray, "doses _"]]

    @property
    def effects(self) -> Float[np.ndarray, " doses"]:
        """The mean change of the behaviour at each dose."""
        return np.asarray((self.behaviour - self.base).mean(1))

    @property
    def monotonicity(self) -> float:
        """Spearman's correlation of dose and mean behaviour; NaN where nothing changes."""
        return spearman(self.doses, self.behaviour.mean(1))

    @property
    def slopes(self) -> Float[np.ndarray, " rows"]:
        """Each prompt's slope of behaviour on dose, by least squares."""
        centred = np.asarray(self.doses) - np.mean(self.doses)
        return np.asarray(centred @ self.behaviour / (centred @ centred))

    @property
    def slope(self) -> float:
        """The mean slope: behaviour gained for each unit of dose."""
        return float(self.slopes.mean())

    @property
    def backfires(self) -> float:
        """The share of prompts whose slope has the other sign than the mean's."""
        return float(np.mean(self.slopes * np.sign(self.slope) < 0))

    def row(self, dose: float) -> int:
        """The row of a dose in `behaviour`, `kl`, `ce` and `sides`.

        Raises:
            SpecError: It was not measured.
        """
        if dose not in self.doses:
            raise SpecError(f"the dose {dose} was not measured; measured: {', '.join(map(str, self.doses))}", "dose")
        return self.doses.index(dose)

    def interval(self, dose: float, *, level: float = 0.95, seed: int = 0) -> Interval:
        """A bootstrap interval, over prompts, of the mean change at one dose."""
        row = self.row(dose)
        return bootstrap_interval(self.behaviour[row] - self.base, level=level, seed=seed)

    def within(self, budget: Budget) -> tuple[bool, ...]:
        """Which doses keep to a budget.

        Raises:
            SpecError: The budget names a side effect that was not measured.
        """
        unknown = sorted(set(budget.sides) - set(self.sides))
        if unknown:
            raise SpecError(f"the budget names {unknown[0]!r}; measured: {', '.join(self.sides) or 'none'}", "budget")
        good = (self.kl.mean(1) <= budget.kl) & (self.ce.mean(1) <= budget.ce)
        for name, most in budget.sides.items():
            good &= np.abs(self.sides[name].mean(1)) <= most
        return tuple(bool(value) for value in good)

    def largest_dose(self, budget: Budget, *, sign: int = 1) -> float:
        """The largest dose of one sign that keeps to a budget, as do all smaller ones that were measured; else 0."""
        good = self.within(budget)
        ordered = sorted((abs(dose), fine) for dose, fine in zip(self.doses, good, strict=True) if dose * sign > 0)
        best = 0.0
        for size, fine in ordered:
            if not fine:
                break
            best = size
        return best * sign if best else 0.0


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class DoseResponse:
    """A direction's curve beside those of its controls.

    Args:
        curve: The direction's.
        controls: By kind, one curve a vector.
        names: By kind, what each vector is called, where the caller named them.
        budget: What steering may cost.
    """

    curve: Curve
    controls: Mapping[str, tuple[Curve, ...]]
    names: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    budget: Budget = field(default_factory=Budget)

    @property
    def largest_dose(self) -> float:
        """The largest positive dose within the budget; see `Curve.largest_dose`."""
        return self.curve.largest_dose(self.budget)

    def null(self, kind: str, dose: float) -> Float[np.ndarray, " vectors"]:
        """The mean changes that the control vectors of a kind make at a dose."""
        row = self.curve.row(dose)
        return np.asarray([curve.effects[row] for curve in self._of(kind)])

    def p(self, kind: str, dose: float | None = None, *, side: Side = "two") -> float:
        """The place of the direction's effect among its controls': at one dose, or by slope over all.

        Raises:
            SpecError: There is no such kind.
        """
        if dose is None:
            return permutation_p(self.curve.slope, [curve.slope for curve in self._of(kind)], side)
        return permutation_p(float(self.curve.effects[self.curve.row(dose)]), self.null(kind, dose), side)

    def percentile(self, kind: str, dose: float) -> float:
        """The share of control vectors whose change at a dose is smaller in size than the direction's, in per cent."""
        own = abs(self.curve.effects[self.curve.row(dose)])
        return float(100 * np.mean(np.abs(self.null(kind, dose)) < own))

    def _of(self, kind: str) -> tuple[Curve, ...]:
        if kind not in self.controls:
            raise SpecError(f"there are no controls {kind!r}; there are: {', '.join(self.controls) or 'none'}", "kind")
        return self.controls[kind]


def control_vectors(
    direction: Direction,
    *,
    activations: Float[np.ndarray, "rows d"] | None = None,
    labels: Shaped[np.ndarray, " rows"] | None = None,
    semantic: Mapping[str, Direction] | None = None,
    n: int = 20,
    seed: int = 0,
) -> dict[str, Float[Tensor, "n d"]]:
    """Vectors of norm 1 to hold a direction against, by kind.

    Args:
        direction: The direction.
        activations: Those it was fitted on, for "covariance-matched".
        labels: Their two classes, for "label-shuffled".
        semantic: Directions of other meanings, fitted alike, by name.
        n: How many of each drawn kind.
        seed: Seed of the draws.

    Returns:
        "isotropic" always, the others where their data are given.

    Raises:
        SpecError: The shapes do not fit, or a semantic control lies at another site.

    Example:
        >>> made = control_vectors(Direction(site="blocks.1.resid_post", vector=torch.ones(8)), n=5)
        >>> {kind: tuple(rows.shape) for kind, rows in made.items()}
        {'isotropic': (5, 8)}
    """
    unit = direction.unit
    made = {"isotropic": isotropic_directions(unit, n, seed)}
    if activations is not None:
        made["covariance-matched"] = covariance_matched_directions(unit, activations, n, seed)
    if labels is not None:
        if activations is None:
            raise SpecError("label-shuffled vectors need the activations that the labels belong to", "activations")
        made["label-shuffled"] = shuffled_difference_directions(unit, activations, labels, n, seed)
    if semantic:
        elsewhere = [name for name, other in semantic.items() if other.site != direction.site]
        if elsewhere:
            raise SpecError(
                f"the control {elsewhere[0]!r} lies at {semantic[elsewhere[0]].site}, not at {direction.site}",
                "semantic",
            )
        made["semantic"] = torch.stack([other.unit for other in semantic.values()])
    return made


def dose_response(
    subject: Subject,
    direction: Direction,
    doses: Sequence[float],
    *,
    prompts: Prompts,
    metric: Metric,
    unrelated: Prompts,
    sides: Mapping[str, SideEffect] | None = None,
    controls: Mapping[str, Float[Tensor, "n d"]] | None = None,
    semantic: Mapping[str, Direction] | None = None,
    positions: Positions = None,
    guard_positions: Positions = None,
    budget: Budget | None = None,
    progress: Progress | None = None,
) -> DoseResponse:
    """Measure a direction and its controls at every dose.

    Args:
        subject: The subject.
        direction: The direction; doses are in units of its `size`, for the controls too.
        doses: Two or more, such as `(-2, -1, 0, 1, 2)`.
        prompts: Prompts on which the behaviour shows. None of them was fitted on.
        metric: From logits `[rows, pos, vocab]` to one value a row.
        unrelated: Text for the guard, of two tokens or more each.
        sides: Side effects by name.
        controls: Vectors by kind, from `control_vectors`; their norm does not matter.
        semantic: Directions of other meanings by name, as one more kind.
        positions: Which tokens of the prompts are steered; all when None.
        guard_positions: Which tokens of the unrelated text and of side effects; all when None, which is strict: many
            models rest their attention on the first token, and `slice(1, None)` leaves it alone.
        budget: What steering may cost.
        progress: Told how many cells are done, of how many, for each set of prompts.

    Returns:
        The curves.

    Raises:
        SpecError: The direction or a semantic one is of another subject, the direction knows no size, there are fewer
            than two doses, or a text has one token.
        NumericalError: A measure is not finite; the message says at which dose.
    """
    direction.check(subject)
    levels = tuple(sorted({float(dose) for dose in doses}))
    if len(levels) < 2 or not np.isfinite(levels).all():
        raise SpecError(f"doses are {list(doses)}; a curve needs two or more, all finite", "doses")
    kinds = {**(controls or {})}
    for other in (semantic or {}).values():
        other.check(subject)
    if semantic:
        kinds |= {"semantic": control_vectors(direction, semantic=semantic, n=1)["semantic"]}
    arms = [direction.unit, *(_unit(row, kind) for kind, rows in kinds.items() for row in rows)]
    direction.add(1.0)  # refuses a direction without a size before anything runs
    make = _Cells(direction, arms, levels)
    behaviour, base = make.measured(subject, prompts, metric, positions, "the behaviour", progress)
    kl, ce = make.guarded(subject, unrelated, guard_positions, progress)
    others: dict[str, np.ndarray] = {}
    for name, side in (sides or {}).items():
        values, before = make.measured(subject, side.prompts, side.metric, guard_positions, name, progress)
        others[name] = values - before
    curves = [
        Curve(
            doses=levels,
            behaviour=behaviour[arm],
            base=base,
            kl=kl[arm],
            ce=ce[arm],
            sides={name: values[arm] for name, values in others.items()},
        )
        for arm in range(len(arms))
    ]
    rest, found = curves[1:], {}
    for kind, rows in kinds.items():
        found[kind], rest = tuple(rest[: len(rows)]), rest[len(rows) :]
    names = {"semantic": tuple(semantic)} if semantic else {}
    return DoseResponse(curve=curves[0], controls=found, names=names, budget=budget or Budget())


@dataclass(frozen=True, slots=True)
class _Cells:
    """Every vector at every dose but zero."""

    direction: Direction
    arms: Sequence[Tensor]
    doses: tuple[float, ...]

    def edits(self, positions: Positions) -> list[Edit]:
        """One edit a cell, vector by vector."""
        size, site = self.direction.size, self.direction.site
        return [
            Add(site, unit, scale=dose * size, positions=positions) for unit in self.arms for dose in self.doses if dose
        ]

    def table(self, cells: Tensor, base: Tensor) -> Shaped[np.ndarray, "arms doses rows"]:
        """Values of cells as `[arm, dose, row]`, a dose of zero being the base."""
        values = cells.cpu().numpy().reshape(len(self.arms), -1, cells.shape[1])
        zero = np.broadcast_to(base.cpu().numpy(), (len(self.arms), 1, cells.shape[1]))
        at = [k for k, dose in enumerate(self.doses) if dose == 0]
        return np.insert(values, at[0], zero[:, 0], axis=1) if at else values

    def measured(
        self,
        subject: Subject,
        prompts: Prompts,
        metric: Metric,
        positions: Positions,
        name: str,
        progress: Progress | None,
    ) -> tuple[Float[np.ndarray, "arms doses rows"], Float[np.ndarray, " rows"]]:
        """A metric in every cell, and without steering."""
        batch = subject.batch(prompts)
        base = metric(subject.run(batch).logits).double()
        cells = subject.sweep(batch, self.edits(positions), metric, reduce=None, progress=progress).double()
        table = self.table(cells, base)
        self.check(table, name)
        return table, base.cpu().numpy()

    def guarded(
        self, subject: Subject, unrelated: Prompts, positions: Positions, progress: Progress | None
    ) -> tuple[Float[np.ndarray, "arms doses texts"], Float[np.ndarray, "arms doses texts"]]:
        """KL and change of cross-entropy in every cell, both from one sweep: the metric is a complex number."""
        batch = subject.batch(unrelated)
        if min(batch.lengths) < 2:
            raise SpecError("an unrelated text has one token, and no next token to predict", "unrelated")
        guard = _Guard(subject, batch)
        cells = subject.sweep(batch, self.edits(positions), guard, reduce=None, progress=progress)
        table = self.table(cells, torch.zeros(batch.size, dtype=torch.complex128))
        kl, ce = np.ascontiguousarray(table.real), np.ascontiguousarray(table.imag)
        self.check(kl, "the KL on unrelated text")
        self.check(ce, "the cross-entropy on unrelated text")
        return kl, ce

    def check(self, table: Float[np.ndarray, "arms doses rows"], name: str) -> None:
        """Refuse values that are not finite."""
        bad = np.argwhere(~np.isfinite(table))
        if len(bad):
            arm, dose = bad[0][:2]
            which = "the direction" if arm == 0 else f"control vector {arm}"
            raise NumericalError(f"{name} is not finite under {which} at dose {self.doses[dose]:g}; use smaller doses")


class _Guard:
    """What steering does to unrelated text: `KL + i * change of CE`, each a mean over the text's tokens."""

    def __init__(self, subject: Subject, batch: Batch) -> None:
        self.spans = [slice(s, s + n) for s, n in zip(batch.starts, batch.lengths, strict=True)]
        self.ids = batch.ids
        logits = subject.run(batch).logits
        self.base = [logits[row, span].float().log_softmax(-1) for row, span in enumerate(self.spans)]
        self.ce = [self._ce(row, base) for row, base in enumerate(self.base)]

    def _ce(self, row: int, log_p: Tensor) -> Tensor:
        """The mean cross-entropy of a text's next tokens."""
        following = self.ids[row, self.spans[row]][1:, None].to(log_p.device)
        return -log_p[:-1].gather(1, following).double().mean()

    def __call__(self, logits: Tensor | LazyLogits) -> Tensor:
        """One complex number a row; a sweep over one text has several cells as rows. Row by row, to keep memory low."""
        found = []
        for at in range(logits.shape[0]):
            row = at % len(self.spans)
            log_q = logits[at, self.spans[row]].float().log_softmax(-1)
            base = self.base[row]
            kl = (base.exp() * (base - log_q)).sum(-1).double().mean()
            found.append(torch.complex(kl, self._ce(row, log_q) - self.ce[row]))
        return torch.stack(found)


def _unit(row: Tensor, kind: str) -> Tensor:
    norm = row.norm()
    if not bool(torch.isfinite(norm)) or not float(norm):
        raise NumericalError(f"a control vector of the kind {kind!r} is zero or not finite")
    unit: Tensor = row / norm
    return unit
