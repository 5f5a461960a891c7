"""How many bytes a run will keep, before it runs: from one token of it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from assay.activations.forward import forward
from assay.activations.serving import any_size, guard
from assay.base.errors import AssayError, Cancelled
from assay.subjects.model import Model
from assay.subjects.tokens import Batch, from_ids


def planned_bytes(
    model: Model,
    batch: Batch,
    capture: str | Sequence[str],
    *,
    grad: bool = False,
    captured: int | None = None,
    n: int = 0,
) -> int | None:
    """The bytes of the captures and logits of a run.

    One token is run with the same captures; what they take grows with rows and positions, and with the square of the
    positions for scores and patterns.

    Args:
        model: The subject.
        batch: The prompts.
        capture: What is to be captured.
        grad: Whether gradients of the same size come back too.
        captured: With generation: how many positions are captured.
        n: With generation: how many tokens are generated; logits are kept for these alone, in float32.

    Returns:
        The bytes, or None where one token does not tell (inputs that are not tokens, a site that did not fire).
    """
    if batch.inputs is not None or batch.args:
        return None
    with torch.no_grad(), any_size():
        try:
            run = forward(model, from_ids(batch.ids[:1, :1]), capture=capture)
        except Cancelled:
            raise
        except (AssayError, RuntimeError):
            return None
    width = batch.width if captured is None else captured
    keys = batch.width + max(0, n - 1)
    found: dict[int, int] = {}
    for tensor in run.captured.tensors.values():
        dims: tuple[str, ...] = tensor.dims  # type: ignore[attr-defined]
        storage = tensor.untyped_storage()
        found[storage.data_ptr()] = storage.nbytes() * width * (keys if "key" in dims else 1)
    logits = _bytes(run.logits) * batch.width if not n else run.logits[0, 0].numel() * 4 * n
    return batch.size * (sum(found.values()) * (2 if grad else 1) + logits)


def _bytes(tensor: Tensor) -> int:
    return tensor.numel() * tensor.element_size()


def refuse_too_much(model: Model, batch: Batch, capture: str | Sequence[str], **options: Any) -> None:
    """Hold a run that has not begun to the limits of this thread; see `planned_bytes` for the options.

    Raises:
        SpecError: If it is known to keep more than it may.
        Cancelled: If it was cancelled or its time is up.
    """
    found = guard()
    if found is None:
        return
    found.check()
    if found.limits.max_bytes is not None:
        found.plan(planned_bytes(model, batch, capture, **options))
