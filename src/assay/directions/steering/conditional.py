"""Conditional steering: look at the prompt once, then steer or do not.

    s = cos(mean over the prompt's tokens of h, c);    steer the row iff  s > threshold  (or s < threshold)

The condition is decided for each prompt by itself when it is read, before the first new token, and holds for all that
is generated: what steering makes of later tokens cannot switch it on or off.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal, get_args

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from assay.activations.edits import Edit, Positions
from assay.activations.generation import ApplyTo
from assay.activations.subject import Prompts, Subject
from assay.activations.values import Run
from assay.base.errors import InvalidEdit, NumericalError, SpecError
from assay.directions.data import columns_of, read_sites
from assay.directions.steering.extract import direction_of
from assay.directions.vectors import Direction, Origin

When = Literal["above", "below"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Condition:
    """When to steer.

    Args:
        direction: What a prompt is compared with, at its site.
        threshold: The similarity at which it changes.
        when: "above": steer where `similarity > threshold`. "below": where `similarity < threshold`. At the threshold
            itself neither fires.
        positions: Which tokens of the prompt are averaged; all when None.

    Raises:
        SpecError: `when` is neither word, or the threshold is no cosine.
    """

    direction: Direction
    threshold: float
    when: When = "above"
    positions: Positions = None

    def __post_init__(self) -> None:
        if self.when not in get_args(When):
            raise SpecError(f"when is {self.when!r}; valid: 'above', 'below'", "when")
        if not -1 <= self.threshold <= 1:
            raise SpecError(f"threshold is {self.threshold}; a cosine lies between -1 and 1", "threshold")

    def fires(self, similarity: Float[Tensor, " rows"]) -> tuple[bool, ...]:
        """Which similarities meet the condition.

        Example:
            >>> at = Condition(direction=Direction(site="embed", vector=torch.ones(2)), threshold=0.5)
            >>> at.fires(torch.tensor([0.6, 0.5, 0.4]))
            (True, False, False)
        """
        met = similarity > self.threshold if self.when == "above" else similarity < self.threshold
        return tuple(bool(value) for value in met.tolist())

    def similarity(self, subject: Subject, prompts: Prompts) -> Float[Tensor, " rows"]:
        """How each prompt compares, unedited: the cosine of its mean activation with the direction."""
        self.direction.check(subject)
        batch, site = subject.batch(prompts), self.direction.site
        held = subject.run(batch, capture=site)[site]
        columns = columns_of(batch, self.positions)
        unit = self.direction.unit.double()
        found = []
        for row, picked in enumerate(columns):
            mean = held[row, picked].double().cpu().reshape(len(picked), -1).mean(0)
            found.append(float(mean @ unit / mean.norm()))
        if not np.isfinite(found).all():
            raise NumericalError(f"a prompt's activation at {site} is zero or not finite")
        return torch.tensor(found, dtype=torch.float64)


@dataclass(frozen=True, slots=True, kw_only=True)
class Steered:
    """A generation that was steered where its prompt met the condition.

    Args:
        run: The generation.
        fired: Which prompts met it.
        similarity: How they compared.
    """

    run: Run
    fired: tuple[bool, ...]
    similarity: Float[Tensor, " rows"]


def steer_if(
    subject: Subject,
    prompts: Prompts,
    condition: Condition,
    edits: Sequence[Edit],
    *,
    apply_to: ApplyTo = "all",
    **options: Any,
) -> Steered:
    """Generate, with edits on the prompts that meet a condition and on no others.

    Args:
        subject: The subject.
        prompts: The prompts; each is decided for itself.
        condition: When to steer.
        edits: What to do then. They name no rows.
        apply_to: "prompt", "new" or "all".
        options: Passed on to `Subject.generate`.

    Raises:
        InvalidEdit: An edit names rows.

    Source: Lee et al. 2024 (CAST), section 3. Theirs compares with `tanh` of the projection, which loses its sign; the
        released code fires below the threshold where it says above, and asks the first row of a batch for all.
    """
    for edit in edits:
        if getattr(edit, "rows", None) is not None:
            raise InvalidEdit(f"{type(edit).__name__}({edit.site!r}): the condition chooses the rows; leave rows= out")
    batch = subject.batch(prompts)
    similarity = condition.similarity(subject, batch)
    fired = condition.fires(similarity)
    rows = tuple(row for row, yes in enumerate(fired) if yes)
    chosen: list[Any] = [replace(edit, rows=rows) for edit in edits] if rows else []  # type: ignore[call-arg]
    where = apply_to if chosen or options.get("capture") else None  # only edits and captures have a where
    run = subject.generate(batch, chosen, apply_to=where, **options)
    return Steered(run=run, fired=fired, similarity=similarity)


def fit_condition(
    subject: Subject,
    meets: Sequence[str],
    others: Sequence[str],
    site: str,
    *,
    validation: tuple[Sequence[str], Sequence[str]],
) -> Condition:
    """A condition that tells two sets of prompts apart: a difference of means, and the best threshold on other prompts.

    Args:
        subject: The subject.
        meets: Prompts that are to be steered.
        others: Prompts that are not.
        site: Where to look.
        validation: Two more such sets, to choose the threshold by: the middle of the widest gap of best balanced
            accuracy, which is in the direction's origin.

    Raises:
        SpecError: A set is empty, or the sets overlap.
    """
    shared = (set(meets) | set(others)) & (set(validation[0]) | set(validation[1]))
    if shared or not meets or not others or not validation[0] or not validation[1]:
        raise SpecError(
            f"a condition needs prompts of both kinds to fit on and others to choose by; shared: {sorted(shared)[:2]}",
            "validation",
        )
    found = read_sites(subject, [*meets, *others], site, positions=slice(None))
    (name, rows), n = next(iter(found.items())), len(meets)
    vector = torch.from_numpy(direction_of(rows[:n], rows[n:])).float()
    direction = Direction(site=name, vector=vector, origin=Origin(method="difference of means"))
    probe = Condition(direction=direction, threshold=0.0)
    yes, no = (probe.similarity(subject, list(texts)).numpy() for texts in validation)
    threshold, accuracy = _threshold(yes, no)
    origin = Origin(
        method="difference of means",
        subject=subject.fingerprint,
        detail={"balanced accuracy": accuracy, "chosen on": [len(yes), len(no)]},
    )
    return Condition(direction=replace(direction, origin=origin), threshold=threshold)


def _threshold(yes: Float[np.ndarray, " n"], no: Float[np.ndarray, " m"]) -> tuple[float, float]:
    """The cut with the best balanced accuracy; of equals the middle of the widest gap between neighbours."""
    values = np.unique(np.concatenate([yes, no, [-1.0, 1.0]]))
    cuts, gaps = (values[1:] + values[:-1]) / 2, np.diff(values)
    accuracy = np.array([((yes > cut).mean() + (no < cut).mean()) / 2 for cut in cuts])
    ties = [k for k in range(len(cuts)) if math.isclose(accuracy[k], accuracy.max())]
    k = max(ties, key=lambda k: gaps[k])
    return float(cuts[k]), float(accuracy[k])
