"""Mean and covariance of activations of any number, in one pass and constant memory.

Blocks of rows are folded in one after the other (Chan's update): with `n, m` rows so far and in the block, `S` the sum
of outer products about the mean, and `delta` the difference of the two means,

    mean <- mean + delta m / (n + m)        S <- S + S_block + delta delta' n m / (n + m)

in float64. Two numbers more than the mean and `S` are kept, the sums of `|x|^2 x` and `|x|^4` about the mean: with them
the Ledoit-Wolf shrinkage, which asks how much each row's own outer product differs from `S / n`, is exact too.
"""

from __future__ import annotations

from collections.abc import Hashable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, get_args

import numpy as np
from jaxtyping import Float

from assay.base.artifacts import user_path
from assay.base.errors import DamagedFile, NumericalError, SpecError, nearest

Shrinkage = Literal["ledoit-wolf", "oas"]
"""Rules that choose how far a covariance is shrunk from the data alone."""


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Moments:
    """What is left of many rows: enough for their mean, their covariance and its shrinkage.

    Args:
        n: Number of rows.
        mean: Their mean, `[d]`.
        scatter: `sum (x - mean)(x - mean)'`, `[d, d]`.
        third: `sum |x - mean|^2 (x - mean)`, `[d]`.
        fourth: `sum |x - mean|^4`.

    Example:
        >>> rows = np.array([[1.0, 0.0], [3.0, 2.0], [2.0, 4.0]])
        >>> moments = Moments.of(rows[:1]).merge(Moments.of(rows[1:]))
        >>> moments.n, moments.mean.tolist(), moments.covariance().tolist()
        (3, [2.0, 2.0], [[1.0, 1.0], [1.0, 4.0]])
    """

    n: int
    mean: Float[np.ndarray, " d"]
    scatter: Float[np.ndarray, "d d"]
    third: Float[np.ndarray, " d"]
    fourth: float

    @classmethod
    def of(cls, rows: Any) -> Moments:
        """The moments of one block of rows `[rows, d]`, an array or a tensor.

        Raises:
            SpecError: It is no such block, or it is empty.
            NumericalError: A number is not finite.
        """
        stream = _Stream()
        stream.add(rows)
        return stream.moments()

    @property
    def d(self) -> int:
        """The width of a row."""
        return len(self.mean)

    def covariance(self, ddof: int = 1) -> Float[np.ndarray, "d d"]:
        """The covariance, `scatter / (n - ddof)`; `ddof=0` is what shrinkage starts from.

        Raises:
            SpecError: There are no more rows than `ddof`.
        """
        if self.n <= ddof:
            raise SpecError(f"a covariance with ddof={ddof} needs more than {ddof} rows, got {self.n}", "rows")
        return np.asarray(self.scatter / (self.n - ddof))

    def merge(self, other: Moments) -> Moments:
        """The moments of both sets of rows together.

        Raises:
            SpecError: Their widths differ.
        """
        stream = _Stream()
        stream.fold(self)
        stream.fold(other)
        return stream.moments()

    def shrinkage(self, rule: Shrinkage = "ledoit-wolf") -> float:
        """How far to shrink the covariance towards a sphere, from 0 (not at all) to 1.

        With `C = scatter / n` and `m = tr C / d`,

            ledoit-wolf   min(1, (sum |x|^4 / n - |C|^2) / (n |C - m I|^2))
            oas           min(1, (|C|^2 + d^2 m^2) / ((n + 1) (|C|^2 - d m^2)))

        both as scikit-learn computes them from the rows.

        Raises:
            SpecError: The rule is unknown, or there are fewer than two rows.
            NumericalError: The rows do not vary.

        Source: Ledoit and Wolf 2004, "A well-conditioned estimator for large-dimensional covariance matrices", section
        3; Chen et al. 2010, "Shrinkage algorithms for MMSE covariance estimation", section III.
        """
        if rule not in get_args(Shrinkage):
            raise SpecError(
                f"rule is {rule!r}{nearest(rule, get_args(Shrinkage))}; valid: 'ledoit-wolf', 'oas'", "rule"
            )
        if self.n < 2:
            raise SpecError(f"shrinkage needs at least two rows, got {self.n}", "rows")
        sample, d = self.covariance(ddof=0), self.d
        size, level = float(np.sum(sample**2)), float(np.trace(sample)) / d
        if level <= 0:
            raise NumericalError("the rows do not vary, so there is no covariance to shrink")
        distance = max(size - d * level**2, 0.0)
        if rule == "ledoit-wolf":
            above, below = (self.fourth / self.n - size) / self.n, distance
        else:
            above, below = size + (d * level) ** 2, (self.n + 1) * distance
        return 1.0 if below <= 0 else float(np.clip(above / below, 0.0, 1.0))

    def shrunk(self, by: Shrinkage | float = "ledoit-wolf") -> Float[np.ndarray, "d d"]:
        """The covariance `(1 - a) C + a m I` with `C = scatter / n`, `m = tr C / d`, and `a` given or chosen by a rule.

        Raises:
            SpecError: `by` is neither a rule nor between 0 and 1.
        """
        amount = self.shrinkage(by) if isinstance(by, str) else float(by)
        if not 0 <= amount <= 1:
            raise SpecError(f"by is {by!r}; a covariance is shrunk by 0 to 1, or by a rule", "by")
        sample = (1 - amount) * self.covariance(ddof=0)
        sample.flat[:: self.d + 1] += amount * float(np.trace(self.scatter)) / self.n / self.d
        return np.asarray(sample)


def stream_moments(blocks: Iterable[Any]) -> Moments:
    """Return the moments of all rows of many blocks, each `[rows, d]`, seen once and never held together.

    Memory is that of one block and of two `[d, d]` matrices in float64, however many rows there are.

    Raises:
        SpecError: There are no rows, or a block is not `[rows, d]` with the d of the first.
        NumericalError: A number is not finite; its block and row are named.

    Source: Chan, Golub and LeVeque 1979, "Updating formulae and a pairwise algorithm for computing sample variances".

    Example:
        >>> rows = np.arange(12.0).reshape(6, 2) ** 2
        >>> moments = stream_moments(rows[i : i + 2] for i in range(0, 6, 2))
        >>> bool(np.allclose(moments.covariance(), np.cov(rows.T)))
        True
    """
    stream = _Stream()
    for block in blocks:
        stream.add(block)
    return stream.moments()


def class_moments(blocks: Iterable[tuple[Any, Iterable[Hashable]]]) -> dict[Hashable, Moments]:
    """Return the moments of each class of rows, streamed: for class means and the covariance within classes.

    Args:
        blocks: Pairs of a block `[rows, d]` and the labels of its rows.

    Raises:
        SpecError: There are no rows, or a block has not one label a row.
        NumericalError: A number is not finite.

    Example:
        >>> found = class_moments([(np.eye(2), [0, 1]), (np.ones((1, 2)), [0])])
        >>> sorted(found), found[0].n, found[0].mean.tolist()
        ([0, 1], 2, [1.0, 0.5])
    """
    streams: dict[Hashable, _Stream] = {}
    for block, labels in blocks:
        rows = _block(block)
        kinds: list[Hashable] = [kind.item() if isinstance(kind, np.generic) else kind for kind in labels]
        if len(kinds) != len(rows):
            raise SpecError(f"a block has {len(rows)} rows and {len(kinds)} labels; it needs one a row", "labels")
        numbers: dict[Hashable, list[int]] = {}
        for number, kind in enumerate(kinds):
            numbers.setdefault(kind, []).append(number)
        for kind, picked in numbers.items():
            streams.setdefault(kind, _Stream()).add(rows[picked])
    if not streams:
        raise SpecError("moments need at least one row, got none", "blocks")
    return {kind: stream.moments() for kind, stream in streams.items()}


def read_blocks(path: str | Path, key: str | None = None, size: int = 4096) -> Iterator[np.ndarray]:
    """Yield the rows of a stored matrix `[rows, d]` a block at a time, without reading the rest.

    Args:
        path: A `.npy` file, which is mapped into memory, or a `.safetensors` file, of which slices are read.
        key: The tensor's name in a safetensors file; not needed where it holds one.
        size: Rows in a block.

    Raises:
        SpecError: The file holds no such matrix, or `size` is not positive.
        DamagedFile: It cannot be read.
    """
    if size < 1:
        raise SpecError(f"size is {size}; a block has at least one row", "size")
    file = user_path(path)
    if file.suffix == ".npy":
        try:
            stored = np.load(file, mmap_mode="r", allow_pickle=False)
        except (OSError, ValueError) as error:
            raise DamagedFile(f"{file} is no array that numpy can map: {error}") from error
        yield from _slices(stored, stored.shape, size, file)
    elif file.suffix == ".safetensors":
        from safetensors import SafetensorError, safe_open

        try:
            with safe_open(file, framework="pt") as opened:
                names = list(opened.keys())
                name = names[0] if key is None and len(names) == 1 else key
                if name not in names:
                    close = nearest(str(key), names)
                    raise SpecError(f"{file} has no tensor {key!r}{close}; it holds {', '.join(names[:5])}", "key")
                part = opened.get_slice(name)
                yield from _slices(part, tuple(part.get_shape()), size, file)
        except (SafetensorError, OSError) as error:
            raise DamagedFile(f"{file} is no safetensors file: {error}") from error
    else:
        raise SpecError(f"{file} is neither .npy nor .safetensors; stored rows are read from these", "path")


def _slices(stored: Any, shape: tuple[int, ...], size: int, file: Path) -> Iterator[np.ndarray]:
    if len(shape) != 2:
        raise SpecError(f"{file} has the shape {shape}; moments are taken of a matrix [rows, d]", "path")
    for start in range(0, shape[0], size):
        yield _block(stored[start : min(start + size, shape[0])])


class _Stream:
    """Moments that grow in place."""

    def __init__(self) -> None:
        self.n = 0
        self.blocks = 0
        self.mean = self.third = np.zeros(0)
        self.scatter = np.zeros((0, 0))
        self.fourth = 0.0

    def add(self, block: Any) -> None:
        """Fold in a block of rows."""
        rows = _block(block)
        self.blocks += 1
        if not len(rows):
            return
        mean = rows.mean(axis=0)
        if not np.isfinite(mean).all():
            bad = np.flatnonzero(~np.isfinite(rows).all(axis=1))
            which = f"row {bad[0]} first" if bad.size else "their sum overflows"
            raise NumericalError(f"block {self.blocks - 1} has {bad.size} rows that are not finite, {which}")
        rows -= mean
        squares = np.einsum("rd,rd->r", rows, rows)
        moments = Moments(
            n=len(rows), mean=mean, scatter=rows.T @ rows, third=squares @ rows, fourth=float(squares @ squares)
        )
        self.fold(moments)

    def fold(self, other: Moments) -> None:
        """Fold in what is known of other rows; `other` is left as it is."""
        if not self.n:
            self.n, self.mean, self.scatter = other.n, other.mean.copy(), other.scatter.copy()
            self.third, self.fourth = other.third.copy(), other.fourth
            return
        if other.mean.shape != self.mean.shape:
            raise SpecError(f"rows of width {len(other.mean)} after rows of width {len(self.mean)}; give one", "blocks")
        n = self.n + other.n
        delta = other.mean - self.mean
        third, fourth = _about(other, delta * (self.n / n))
        self.third, self.fourth = _about(self, delta * (-other.n / n))
        self.third, self.fourth = self.third + third, self.fourth + fourth
        self.scatter += other.scatter
        self.scatter += np.outer(delta, delta * (self.n * other.n / n))
        self.mean = self.mean + delta * (other.n / n)
        self.n = n

    def moments(self) -> Moments:
        """What was seen so far."""
        if not self.n:
            raise SpecError("moments need at least one row, got none", "blocks")
        return Moments(n=self.n, mean=self.mean, scatter=self.scatter, third=self.third, fourth=self.fourth)


def _about(part: Any, shift: np.ndarray) -> tuple[np.ndarray, float]:
    """The third and fourth moment of rows that are moved by `shift` from where they have mean zero."""
    trace, pull, size = float(np.trace(part.scatter)), part.scatter @ shift, float(shift @ shift)
    third = part.third + (trace + part.n * size) * shift + 2 * pull
    fourth = part.fourth + 4 * float(shift @ pull) + part.n * size**2
    return third, float(fourth + 4 * float(part.third @ shift) + 2 * size * trace)


def _block(block: Any) -> np.ndarray:
    """A block of rows as a float64 array of its own."""
    if hasattr(block, "detach"):  # a torch tensor, in any precision, on any device
        block = block.detach().to("cpu").double().numpy()
    try:
        rows = np.array(block, dtype=np.float64)
    except (TypeError, ValueError) as error:
        raise SpecError(f"a block of rows is an array of numbers [rows, d]: {error}", "blocks") from error
    if rows.ndim != 2 or not rows.shape[1]:
        raise SpecError(f"a block has the shape {rows.shape}; it must be [rows, d]", "blocks")
    return rows
