"""What each step of `explain` measures, as arrays: the one pipeline that the model and its controls both go through."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, cast

import numpy as np
import torch
from torch import Tensor

from assay.activations.subject import Subject
from assay.base.errors import NumericalError
from assay.base.rng import numpy_stream
from assay.circuits import Component, Task, ablate_sets, attribute, patch_components, patch_grid
from assay.circuits.patching import Direction, Effects
from assay.directions import decompose, logit_lens

Values = Mapping[str, Any]
Report = Callable[[int, int], None]
TOP_TOKENS = 10
PAIRS = 999
"""How many random pairs of tokens the answer and the foil are held against."""


def baseline(subject: Subject, task: Task) -> Values:
    """Next-token distributions and the logit difference, clean and corrupt, averaged over rows.

    `scale` is the standard deviation of the logit difference over random pairs of tokens, clean; `spread` is that of
    its change from corrupt to clean. With independent pairs both are `sqrt(2)` times the standard deviation over the
    vocabulary.
    """
    found: dict[str, Any] = {}
    last: dict[str, Tensor] = {}
    answer, foil = pair(task)
    for side in ("clean", "corrupt"):
        logits = finite_logits(task.run(subject, side).logits[:, -1], side)
        probabilities = logits.softmax(-1).mean(0)
        best = probabilities.topk(min(TOP_TOKENS, len(probabilities)))
        found[f"{side}_top"] = best.indices.tolist()
        found[f"{side}_probability"] = _numbers(best.values)
        found[f"{side}_pair"] = _numbers(probabilities[list(pair(task))])
        found[f"{side}_difference"] = float((logits[:, answer] - logits[:, foil]).mean())
        last[side] = logits.mean(0)
    change = last["clean"] - last["corrupt"]
    found["scale"] = float(last["clean"].std()) * 2**0.5
    found["spread"] = float(change.std()) * 2**0.5
    found["pairs"] = random_pairs(change)
    return found


def random_pairs(change: Tensor) -> np.ndarray[Any, Any]:
    """The change of the logit difference from corrupt to clean for random pairs of tokens, `[PAIRS]`."""
    pairs = numpy_stream(0, "random pairs").integers(0, len(change), size=(PAIRS, 2))
    values = change.cpu().numpy().astype(np.float64)
    return np.asarray(values[pairs[:, 0]] - values[pairs[:, 1]])


def finite_logits(logits: Tensor, side: str) -> Tensor:
    """The logits as float32.

    Raises:
        NumericalError: If one is NaN or infinite.
    """
    bad = int((~torch.isfinite(logits)).sum())
    if bad:
        raise NumericalError(
            f"{bad} of {logits.numel()} next-token logits of the {side} prompt are NaN or infinite: the weights "
            f"are damaged, "
            "or the precision too low for this model (try float32)"
        )
    return logits.float()


def pair(task: Task) -> tuple[int, int]:
    """The answer and the foil, which are the same in every row here."""
    return int(task.answer[0]), int(task.foil[0])


def likeliest(subject: Subject, ids: Sequence[int], answer: int | None, foil: int | None) -> tuple[int, int]:
    """Fill in the answer (the likeliest token) and the foil (the likeliest other) where they were not given."""
    if answer is not None and foil is not None:
        return answer, foil
    logits = finite_logits(subject.run(torch.tensor([list(ids)])).logits[0, -1], "clean")
    order = logits.topk(3).indices.tolist()
    answer = answer if answer is not None else next(t for t in order if t != foil)
    foil = foil if foil is not None else next(t for t in order if t != answer)
    return answer, foil


def lens(subject: Subject, task: Task) -> Values:
    """The logit lens, clean and corrupt."""
    found: dict[str, Any] = {}
    for side in ("clean", "corrupt"):
        batch, edits = task.base(side)
        readings = logit_lens(subject, batch, *pair(task), edits)
        found[f"{side}_difference"] = readings.difference.cpu().numpy()
        found[f"{side}_probability"] = readings.probability.cpu().numpy()
        found[f"{side}_rank"] = readings.rank.cpu().numpy()
        found[f"{side}_top"] = readings.top.tolist()
    return found


def decomposition(subject: Subject, task: Task) -> Values:
    """Direct logit attribution on the clean prompt."""
    parts = decompose(subject, task.clean.ids[:1], *pair(task))
    return {"names": list(parts.names), "parts": parts.parts.numpy(), "total": parts.total, "error": parts.error}


def grid(subject: Subject, task: Task, point: str, direction: str, progress: Report) -> Values:
    """Exact patching of a point by block and position."""
    return effects(patch_grid(subject, task, point, cast(Direction, direction), progress=progress))


def component_effects(
    subject: Subject, task: Task, parts: Sequence[Component], direction: str, progress: Report
) -> Values:
    """Exact patching of every head and MLP."""
    return effects(patch_components(subject, task, parts, cast(Direction, direction), progress=progress))


def arrival(subject: Subject, task: Task, progress: Report) -> np.ndarray[Any, Any]:
    """Normalised denoising effect of the residual stream at the last position, by block."""
    last = [task.clean.width - 1]
    found = patch_grid(subject, task, "resid_pre", "denoising", positions=last, progress=progress)
    return found.normalised[:, 0].cpu().numpy()


def effects(found: Effects) -> Values:
    """Effects as arrays."""
    return {"values": found.values.cpu().numpy(), "base": found.base, "donor": found.donor}


def attribution(subject: Subject, task: Task, parts: Sequence[Component]) -> Values:
    """Attribution patching in both directions."""
    found: dict[str, Any] = {}
    for direction in ("denoising", "noising"):
        estimate = attribute(subject, task, parts, direction)
        found[direction] = estimate.components.cpu().numpy()
        found[f"{direction}_residual"] = estimate.residual.cpu().numpy()
    return found


def sets(
    subject: Subject,
    task: Task,
    parts: Sequence[Component],
    chosen: Sequence[Sequence[Component] | frozenset[Component]],
    progress: Report,
) -> Values:
    """Sufficiency and necessity of sets of components."""
    found = ablate_sets(subject, task, parts, chosen, progress=progress)
    if found.clean == found.none:
        raise NumericalError(
            f"with every component corrupted the logit difference is as it was ({found.clean:.4g}): there is no "
            "preference of which components could keep or lose a share"
        )
    return {
        "kept": found.kept.numpy(),
        "lost": found.lost.numpy(),
        "clean": found.clean,
        "none": found.none,
    }


def untrained(
    subject: Subject, task: Task, parts: Sequence[Component], grids: Sequence[str], progress: Report
) -> Values:
    """The pipeline on untrained weights: everything a claim is made about, and the grids where asked."""
    work = len(parts) * (2 if grids else 1) + subject.n_blocks
    rows = task.clean.width * subject.n_blocks
    total = work + 2 * len(grids) * rows
    done = 0

    def part(n: int, _: int) -> None:
        progress(min(done + n, total), total)

    difference = {name: value for name, value in baseline(subject, task).items() if name != "pairs"}
    found: dict[str, Any] = {"difference": difference}
    found["arrival"] = arrival(subject, task, part)
    done += subject.n_blocks
    found["lens"] = logit_lens(subject, task.clean, *pair(task)).difference[:, -1].cpu().numpy()
    found["direct"] = decomposition(subject, task)["parts"]
    for direction in ("noising", "denoising") if grids else ("noising",):
        found[f"components_{direction}"] = component_effects(subject, task, parts, direction, part)["values"]
        done += len(parts)
        for point in grids:
            found[f"{point}_{direction}"] = grid(subject, task, point, direction, part)["values"]
            done += rows
    return found


def _numbers(values: Tensor) -> list[float]:
    return [float(value) for value in np.asarray(values.detach().cpu(), dtype=np.float64)]
