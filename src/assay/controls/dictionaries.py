"""Nulls for a dictionary: what random directions explain at the same size, and what random errors of its size do.

A dictionary of many more latents than dimensions explains much of anything: the best few of thousands of *random*
directions come near any vector. And a reconstruction that is off by some length does some harm whatever is lost. Both
have to be known before a share of variance, or a loss in the model, says anything of what was learned.

These functions take arrays and draw; they know no dictionary.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from jaxtyping import Float
from torch import Tensor

from assay.base.errors import NumericalError, SpecError
from assay.base.method import Progress
from assay.base.rng import torch_stream


def random_dictionaries(
    rows: Float[Tensor, "rows d"],
    n_latents: int,
    k: int,
    *,
    draws: int = 19,
    seed: int = 0,
    progress: Progress | None = None,
) -> list[float]:
    """The share of variance that `k` of `n_latents` random directions a row explain, for each of some draws.

        1 - sum_b min_z |x_b - mean - sum_{f in S_b} z_f v_f|^2 / sum_b |x_b - mean|^2        |S_b| = k

    with directions `v` uniform on the sphere. Rows are centred; each row's `k` are chosen greedily (matching pursuit)
    and then fitted together by least squares. A trained encoder is not given that: the null is generous.

    Args:
        rows: Held-out rows; some hundreds are enough.
        n_latents: Size of the dictionary under test.
        k: Its mean number of active latents, rounded.
        draws: How many random dictionaries.
        seed: Of the draws.
        progress: Told after each draw.

    Raises:
        SpecError: k is below 1 or above the number of directions.
        NumericalError: The rows do not vary.

    Source: Mallat and Zhang 1993 (matching pursuit); the need for such a baseline after Heap et al. 2025 (arXiv
    2501.17727), who find that dictionaries of untrained models look good too.

    Example:
        >>> rows = torch.randn(64, 16, generator=torch.manual_seed(0))
        >>> few, many = random_dictionaries(rows, 64, 2, draws=1)[0], random_dictionaries(rows, 64, 8, draws=1)[0]
        >>> 0 < few < many < 1
        True
    """
    if not 1 <= k <= n_latents:
        raise SpecError(f"k is {k} and there are {n_latents} directions; give a k from 1 to that", "k")
    centred = rows - rows.mean(0)
    total = float(centred.double().square().sum())
    if not total > 0:
        raise NumericalError("every row is the same: there is no variance to explain")
    k = min(k, rows.shape[1])
    shares = []
    for draw in range(draws):
        stream = torch_stream(seed, "random dictionary", draw)
        directions = torch.nn.functional.normalize(torch.randn(n_latents, rows.shape[1], generator=stream), dim=1)
        shares.append(1 - float(_pursuit_error(centred, directions.to(rows.device), k)) / total)
        if progress is not None:
            progress(draw + 1, draws)
    return shares


def random_errors(error: Float[Tensor, "*rows d"], *, draws: int = 19, seed: int = 0, of: str = "") -> Iterator[Tensor]:
    """Yield errors that point anywhere, each row as long as the given one.

    Args:
        error: The error.
        draws: How many.
        seed: Of the draws.
        of: What the error is of, where those of several sites or batches are drawn with one seed.

    Source: Gurnee 2024, "SAE reconstruction errors are (empirically) pathological".

    Example:
        >>> error = torch.tensor([[3.0, 4.0], [0.0, 0.0]])
        >>> [round(float(drawn.norm(dim=1)[0]), 4) for drawn in random_errors(error, draws=2)]
        [5.0, 5.0]
    """
    lengths = error.norm(dim=-1, keepdim=True)
    for draw in range(draws):
        direction = torch.randn(error.shape, generator=torch_stream(seed, "random error", of, draw)).to(error.device)
        yield torch.nn.functional.normalize(direction, dim=-1) * lengths


def _pursuit_error(rows: Tensor, directions: Tensor, k: int) -> Tensor:
    """The squared error of the best fit of `k` directions a row, chosen greedily."""
    left, chosen = rows.clone(), []
    for _ in range(k):
        match = left @ directions.T
        best = match.abs().argmax(1)
        chosen.append(best)
        left -= match.gather(1, best[:, None]) * directions[best]
    basis = directions[torch.stack(chosen, dim=1)].double()
    gram = basis @ basis.transpose(1, 2) + 1e-9 * torch.eye(k, dtype=torch.float64, device=rows.device)
    weights = torch.linalg.solve(gram, (basis @ rows.double()[:, :, None]))
    return torch.as_tensor((rows.double() - (basis * weights).sum(1)).square().sum())
