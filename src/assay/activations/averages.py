"""Means of sites over a set of prompts: what a mean ablation puts in."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any, Literal

import torch
from torch import Tensor

from assay.activations.forward import forward
from assay.activations.values import Captured, named
from assay.base.errors import InvalidEdit, SpecError
from assay.subjects.model import Model
from assay.subjects.tokens import Batch


def means(
    model: Model,
    batches: Iterable[Batch],
    sites: str | Sequence[str],
    *,
    positions: Any = None,
    by: Literal["token", "position"] = "token",
) -> Captured:
    """The mean of each site over all real tokens of many prompts; see `Subject.mean`.

    Sums are kept in float64, so the order of the prompts and their batches do not matter.

    Args:
        model: The subject.
        batches: The prompts.
        sites: Site names and patterns.
        positions: Which tokens count.
        by: "token" or "position".

    Returns:
        Means by site, float32.

    Raises:
        SpecError: If an option is unknown, there is nothing to average, or a site has keys or no rows.
    """
    if by not in ("token", "position"):
        raise SpecError(f"by={by!r}: 'token' or 'position'", "by")
    sums: dict[str, Tensor] = {}
    counts: dict[str, Tensor] = {}
    dims: dict[str, tuple[str, ...]] = {}
    heads: dict[str, int | None] = {}
    for batch in batches:
        run = forward(model, batch, capture=sites)
        for name, tensor in run.captured.tensors.items():
            names: tuple[str, ...] = tensor.dims  # type: ignore[attr-defined]
            part, count = _sum(name, tensor, names, batch.of(run.captured.resolve(name).stack), positions, by)
            sums[name], counts[name] = _grown(sums.get(name), part), _grown(counts.get(name), count)
            left = [dim for dim in names if dim not in ("batch", "pos")]
            dims[name] = ("pos", *left) if by == "position" and "pos" in names else tuple(left)
            heads[name] = dims[name].index("head") if "head" in dims[name] else None
    if not sums:
        raise SpecError("there are no prompts or no sites to take means over", "x")
    found = {}
    for name, total in sums.items():
        count = counts[name].reshape(-1, *[1] * (total.ndim - 1))
        mean = (total / count.clamp(min=1)).float()
        found[name] = named(mean if dims[name][:1] == ("pos",) else mean[0], dims[name])
    return Captured(tensors=found, head_dims=heads, resolve=model.site, what="averaged")


def _sum(name: str, x: Tensor, dims: tuple[str, ...], batch: Batch, positions: Any, by: str) -> tuple[Tensor, Tensor]:
    """The sum over rows, one entry for each position or one for all, and how many tokens each holds."""
    if "batch" not in dims or "key" in dims:
        raise SpecError(f"{name!r} has the dimensions {dims}; a mean is taken at sites [batch, pos, features]", "sites")
    if "pos" not in dims:
        rows = x.movedim(dims.index("batch"), 0).double()
        return rows.sum(0, keepdim=True), torch.tensor([float(len(rows))], dtype=torch.float64, device=x.device)
    x = x.movedim((dims.index("batch"), dims.index("pos")), (0, 1)).double()
    batch = batch.sized(x.shape[1])
    try:
        columns = batch.columns(slice(None) if positions is None else positions)
    except (IndexError, TypeError) as error:
        raise InvalidEdit(f"mean of {name!r}: positions={positions!r}: {error}") from None
    assert columns is not None
    picked = [row[chosen] for row, chosen in zip(x, columns, strict=True)]
    if by == "token":
        return torch.cat(picked).sum(0, keepdim=True), x.new_tensor([float(sum(map(len, picked)))])
    total, count = x.new_zeros(max(batch.lengths), *x.shape[2:]), x.new_zeros(max(batch.lengths))
    for row, chosen, start in zip(picked, columns, batch.starts, strict=True):
        at = torch.tensor([column - start for column in chosen], dtype=torch.long, device=x.device)
        total.index_add_(0, at, row)
        count.index_add_(0, at, torch.ones(len(at), dtype=torch.float64, device=x.device))
    return total, count


def _grown(so_far: Tensor | None, part: Tensor) -> Tensor:
    """A sum of two, the shorter of which has nothing at the positions that it lacks."""
    if so_far is None:
        return part
    longer, shorter = (so_far, part) if len(so_far) >= len(part) else (part, so_far)
    out = longer.clone()
    out[: len(shorter)] += shorter.to(out.device)
    return out
