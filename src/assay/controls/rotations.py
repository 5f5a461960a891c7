"""Random orthogonal matrices that are applied fast: what a spectrum-matched null multiplies weights with.

A Haar-distributed d x d matrix costs a QR of d^3 and d products for each number it is applied to. Here a side of length
d = a b is laid out as an a x b grid, its coordinates shuffled, and Haar blocks are applied along both axes of the grid:

    Q = (an a x a Haar block for each of the b columns) (a b x b Haar block for each of the a rows) (permutation)

which is exactly orthogonal, mixes every coordinate with every other, and costs a + b products for each number.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from jaxtyping import Float, Int

from assay.base.rng import torch_stream

DENSE_UP_TO = 96
"""Sides up to this length get one Haar matrix."""

MIXED_UP_TO = 16384
"""Longer sides, which are vocabularies, are shuffled and flipped in sign: orthogonal too, but not mixed."""

_POOL = 128


def haar(n: int, size: int, generator: torch.Generator) -> Float[torch.Tensor, "n size size"]:
    """Return n independent Haar-distributed orthogonal matrices: QR of a Gaussian with R's diagonal made positive.

    Source: Mezzadri 2007, "How to generate random matrices from the classical compact groups", section 5.
    """
    q, r = torch.linalg.qr(torch.randn(n, size, size, generator=generator, dtype=torch.float64))
    fixed: torch.Tensor = q * torch.sign(torch.diagonal(r, dim1=-2, dim2=-1))[:, None, :]
    return fixed


@dataclass(frozen=True, slots=True)
class SignedPermutation:
    """An orthogonal matrix with one +1 or -1 in each row and column."""

    order: Int[torch.Tensor, " d"]
    signs: Float[torch.Tensor, " d"]

    def __call__(self, x: Float[torch.Tensor, "d columns"]) -> Float[torch.Tensor, "d columns"]:
        """Return Q x."""
        return self.rows(x, 0, len(self.order))

    def rows(self, x: Float[torch.Tensor, "d columns"], start: int, stop: int) -> Float[torch.Tensor, "rows columns"]:
        """Return rows start to stop of Q x without computing the others."""
        rows: torch.Tensor = _rows(x, self.order[start:stop]) * self.signs[start:stop, None].to(x)
        return rows


@dataclass(frozen=True, slots=True)
class Mixing:
    """An orthogonal matrix in factors; each layer is an order of the rows and the blocks for both axes of a grid."""

    layers: tuple[tuple[torch.Tensor, torch.Tensor, torch.Tensor], ...]

    def __call__(self, x: Float[torch.Tensor, "d columns"]) -> Float[torch.Tensor, "d columns"]:
        """Return Q x, computed in x's precision; `w.T` of a contiguous w is as fast as a contiguous x."""
        for order, inner, outer in self.layers:
            a, b = inner.shape[:2]
            x = _rows(x, order)
            y = torch.bmm(inner.to(x), x[: a * b].reshape(a, b, -1))
            y = torch.bmm(outer.to(x), y.transpose(0, 1)).flatten(0, 1)
            x = y if a * b == len(x) else torch.cat([y, x[a * b :]])
        return x


Rotation = SignedPermutation | Mixing


@dataclass(frozen=True, slots=True)
class Rotations:
    """A source of random orthogonal matrices.

    A side up to `DENSE_UP_TO` long gets a Haar matrix of its own. The blocks of a grid come from a pool of 128 Haar
    matrices of each size: a matrix takes a random choice of them without repetition, with random signs, over its own
    random order of the coordinates. So two matrices share a block in the same place with probability 1/128, and then
    act with it on different coordinates.

    Args:
        seed: Seed of the pool's streams.
        names: Their names.
    """

    seed: int
    names: Sequence[str | int]
    _pools: dict[int, torch.Tensor] = field(default_factory=dict)

    def draw(self, d: int, generator: torch.Generator) -> Rotation:
        """Return a random orthogonal d x d matrix; equal states of the CPU generator give equal matrices."""
        order = torch.randperm(d, generator=generator)
        if d > MIXED_UP_TO:
            return SignedPermutation(order, _signs((d,), generator))
        a, b = grid(d)
        layers = [(order, self._blocks(a, b, generator), self._blocks(b, a, generator))]
        if a * b < d:  # mix again, with the coordinates that were left over in front
            again = torch.cat([torch.arange(a * b, d), torch.randperm(a * b, generator=generator)])
            layers.append((again, self._blocks(a, b, generator), self._blocks(b, a, generator)))
        return Mixing(tuple(layers))

    def _blocks(self, n: int, size: int, generator: torch.Generator) -> Float[torch.Tensor, "n size size"]:
        if n == 1:
            return haar(1, size, generator)
        if size not in self._pools:
            self._pools[size] = haar(_POOL, size, torch_stream(self.seed, *self.names, "haar", size))
        chosen = torch.randperm(_POOL, generator=generator)[:n]
        return self._pools[size][chosen] * _signs((n, size, 1), generator)


def grid(d: int) -> tuple[int, int]:
    """Return the sides (a, b), a <= b <= 128, of the grid for d coordinates.

    a b = d where d is short (1 x d) or has two nearly equal factors. Where it has none (a prime, say) the grid is the
    largest square below d, and the few coordinates left over wait for the next layer.

    Example:
        >>> grid(64), grid(576), grid(1536), grid(577)
        ((1, 64), (24, 24), (32, 48), (24, 24))
    """
    if d <= DENSE_UP_TO:
        return 1, d
    root = math.isqrt(d)
    for a in range(root, 0, -1):
        if d % a == 0 and d // a <= min(_POOL, 4 * a):
            return a, d // a
    return root, root


def _signs(shape: tuple[int, ...], generator: torch.Generator) -> torch.Tensor:
    return 2.0 * torch.randint(0, 2, shape, generator=generator) - 1.0


def _rows(x: torch.Tensor, order: torch.Tensor) -> torch.Tensor:
    order = order.to(x.device)
    return x.index_select(0, order) if x.is_contiguous() else x.T.index_select(1, order).T
