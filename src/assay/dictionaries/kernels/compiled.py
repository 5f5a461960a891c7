"""The kernels for a CPU: PyTorch's matrix product, and C for all else (kernels.c).

Encoding goes tile by tile: the product of some rows and some latents lands in a buffer that stays in the cache, and is
looked through before the next one overwrites it. Row selection keeps a few candidates a row and a bound that rises as
they are pruned; batch selection keeps one bound for all rows. Both are exact whatever the order of the tiles.

Where most latents are active the matrix products of the plain path are faster, and are taken (`plain.CROWDED`).

An update forms the gradient of one latent's decoder and encoder row in the L1 cache and applies Adam at once.

Why C and not numba: the same loops on one core of a Sapphire Rapids processor (AVX-512), batch 2048, d = 576, k = 32,
milliseconds of CPU at F = 4608 / 18432: selection C 7 / 17, numba 65 / 91; decoding 6.7 / 9.0 and 7.5 / 8.4; gradients
with Adam 18 / 35 and 27 / 65. benchmarks/dictionary_kernels.py measures whole steps.
"""

from __future__ import annotations

import ctypes
import threading
from collections.abc import Iterator
from typing import final

import torch
from jaxtyping import Float, Int
from torch import Tensor

from assay.base.errors import AssayError, SpecError
from assay.dictionaries.kernels import checks
from assay.dictionaries.kernels.backend import BackendName
from assay.dictionaries.kernels.building import library
from assay.dictionaries.kernels.plain import Plain, crowded
from assay.dictionaries.kernels.values import AdamStep, ByLatent, Moments
from assay.dictionaries.latents import SparseLatents

ROWS, LATENTS = 2048, 768
"""The largest tile: 6 MiB. Fewer latents or rows cost the product its speed, more cost the cache."""

_SPARE = 16
"""Places that the C code may write past the end of a list."""


@final
class Compiled:
    """The kernels in C; `backend.Backend` says what each method computes. Buffers are kept, one set a thread.

    Raises:
        CannotCompile: There is no C compiler, or it could not build them.
    """

    __slots__ = ("_c", "_kept", "_plain")

    def __init__(self) -> None:
        self._c = library()
        self._kept = threading.local()
        self._plain = Plain()

    @property
    def name(self) -> BackendName:
        """Which path it is."""
        return "compiled"

    @torch.no_grad()
    def select_rows(
        self, x: Float[Tensor, "rows d_in"], W: Float[Tensor, "latent d_in"], b: Float[Tensor, " latent"], k: int
    ) -> SparseLatents:
        """The `k` largest of h in each row that are above 0."""
        x = x.contiguous()
        self._check_encoding(x, W, b)
        checks.count("k", k, len(W), "W")
        n, room = len(x), max(2 * k, k + 96) + 64 + _SPARE
        count = torch.zeros(n, dtype=torch.int64)
        bound = torch.zeros(n)
        values, latents = self._buffer("values", n * room), self._indices("latents", n * room)
        for row, first, h in self._tiles(x, W):
            rows, width = h.shape
            at = row * room
            self._c.assay_topk_tile(
                *(h.data_ptr(), rows, width, first, b[first:].data_ptr(), k, room, bound[row:].data_ptr()),
                *(count[row:].data_ptr(), values[at:].data_ptr(), latents[at:].data_ptr(), _threads()),
            )
        self._c.assay_topk_end(n, k, room, _at(count), _at(values), _at(latents), _threads())
        offsets, chosen, kept = _room_for(count)
        self._c.assay_pack(n, room, *map(_at, (offsets, values, latents, kept, chosen)), _threads())
        return SparseLatents(offsets=offsets, latents=chosen, values=kept, n_latents=len(W), shape=(n,))

    @torch.no_grad()
    def select_batch(
        self, x: Float[Tensor, "rows d_in"], W: Float[Tensor, "latent d_in"], b: Float[Tensor, " latent"], total: int
    ) -> tuple[SparseLatents, float]:
        """The `total` largest of h over all rows together that are above 0, and the smallest of them (or 0)."""
        x = x.contiguous()
        self._check_encoding(x, W, b)
        checks.count("total", total, len(x) * len(W), "the batch")
        pairs = self._collect(x, W, b, torch.zeros_like(b), total)
        offsets, latents, values = pairs.offsets, pairs.latents, pairs.values
        self._c.assay_keep_total(len(x), total, _at(offsets), _at(values), _at(latents))
        kept = int(offsets[-1])
        # Copies: a view would keep what was not chosen in memory.
        chosen, values = latents[:kept].clone(), values[:kept].clone()
        bound = float(values.min()) if kept else 0.0
        return SparseLatents(offsets=offsets, latents=chosen, values=values, n_latents=len(W), shape=(len(x),)), bound

    @torch.no_grad()
    def select_above(
        self,
        x: Float[Tensor, "rows d_in"],
        W: Float[Tensor, "latent d_in"],
        b: Float[Tensor, " latent"],
        bound: Float[Tensor, " latent"],
    ) -> SparseLatents:
        """Every h above its latent's bound."""
        x = x.contiguous()
        self._check_encoding(x, W, b, bound)
        return self._collect(x, W, b, bound)

    @torch.no_grad()
    def decode(
        self, pairs: SparseLatents, W_dec: Float[Tensor, "latent d_out"], bias: Float[Tensor, " d_out"]
    ) -> Float[Tensor, "rows d_out"]:
        """`bias` plus each row's sum of value * W_dec[latent]."""
        _check_pairs(pairs, W_dec)
        checks.tensors(("W_dec", W_dec, (None, None)), ("bias", bias, (W_dec.shape[1],)))
        if crowded(pairs.values, pairs.n_rows * len(W_dec)):
            return self._plain.decode(pairs, W_dec, bias)
        out = torch.empty(pairs.n_rows, W_dec.shape[1])
        self._c.assay_decode(
            *map(_at, (pairs.offsets, pairs.latents, pairs.values)),
            *(len(out), _at(W_dec), W_dec.shape[1], _at(bias), _at(out), _threads()),
        )
        return out

    @torch.no_grad()
    def residual(
        self,
        pairs: SparseLatents,
        W_dec: Float[Tensor, "latent d_out"],
        bias: Float[Tensor, " d_out"],
        target: Float[Tensor, "rows d_out"],
        scale: float,
    ) -> tuple[Float[Tensor, "rows d_out"], Float[Tensor, " pairs"], Float[Tensor, " rows"]]:
        """R = scale (decode - target), the pairs' slopes under R, and each row's squared error."""
        _check_pairs(pairs, W_dec, len(target))
        m = W_dec.shape[1]
        checks.tensors(("W_dec", W_dec, (None, None)), ("bias", bias, (m,)), ("target", target, (None, m)))
        if crowded(pairs.values, pairs.n_rows * len(W_dec)):
            return self._plain.residual(pairs, W_dec, bias, target, scale)
        R, slopes, squares = torch.empty_like(target), torch.empty_like(pairs.values), torch.empty(len(target))
        self._c.assay_residual(
            *map(_at, (pairs.offsets, pairs.latents, pairs.values)),
            *(len(R), _at(W_dec), m, _at(bias), _at(target), scale, _at(R), _at(slopes), _at(squares), _threads()),
        )
        return R, slopes, squares

    @torch.no_grad()
    def slopes(
        self,
        pairs: SparseLatents,
        R: Float[Tensor, "stacked d_out"],
        W_dec: Float[Tensor, "latent d_out"],
        rows: Int[Tensor, " pairs"] | None = None,
    ) -> Float[Tensor, " pairs"]:
        """R[row] . W_dec[latent] for each pair."""
        _check_pairs(pairs, W_dec, len(R) if rows is None else None)
        checks.tensors(("W_dec", W_dec, (None, None)), ("R", R, (None, W_dec.shape[1])))
        if rows is None and crowded(pairs.values, len(R) * len(W_dec)):
            return self._plain.slopes(pairs, R, W_dec)
        at = (pairs.rows if rows is None else rows).to(torch.int32)
        out = torch.empty_like(pairs.values)
        checks.indices(out.device, len(out), ("rows", at))
        checks.in_range("rows", at, len(R))
        self._c.assay_slopes(
            *(_at(at), _at(pairs.latents), len(out), _at(R), R.shape[1], _at(W_dec), _at(out), _threads())
        )
        return out

    @torch.no_grad()
    def by_latent(
        self,
        rows: Int[Tensor, " pairs"],
        latents: Int[Tensor, " pairs"],
        values: Float[Tensor, " pairs"],
        slopes: Float[Tensor, " pairs"],
        n_latents: int,
    ) -> ByLatent:
        """Sort pairs by latent; those of one latent keep their order."""
        n = len(latents)
        _on_cpu(values)
        checks.tensors(("values", values, (n,)), ("slopes", slopes, (n,)))
        checks.indices(values.device, n, ("rows", rows), ("latents", latents))
        checks.in_range("latents", latents, n_latents)
        offsets = torch.empty(n_latents + 1, dtype=torch.int64)
        outputs = (offsets, torch.empty_like(rows), torch.empty_like(values), torch.empty_like(slopes))
        self._c.assay_by_latent(*map(_at, (rows, latents, values, slopes)), n, n_latents, *map(_at, outputs))
        return ByLatent(offsets=offsets, rows=outputs[1], values=outputs[2], slopes=outputs[3])

    @torch.no_grad()
    def gradients(
        self,
        grouped: ByLatent,
        R: Float[Tensor, "stacked d_out"],
        X: Float[Tensor, "rows d_in"],
        *,
        W_dec: Float[Tensor, "latent d_out"] | None = None,
        pull: Float[Tensor, " latent"] | None = None,
        shift: Float[Tensor, " d_in"] | None = None,
    ) -> tuple[Float[Tensor, "latent d_out"], Float[Tensor, "latent d_in"], Float[Tensor, " latent"]]:
        """The gradients by W_dec, W_enc and b_enc."""
        _on_cpu(R)
        checks.gradients(grouped, R, X, W_dec, pull, shift)
        F = grouped.n_latents
        if crowded(grouped.values, F * len(R)):
            return self._plain.gradients(grouped, R, X, W_dec=W_dec, pull=pull, shift=shift)
        g_dec, g_enc, g_b = torch.empty(F, R.shape[1]), torch.empty(F, X.shape[1]), torch.empty(F)
        self._c.assay_gradients(
            *_grouped(grouped, R, X, pull, shift), *map(_at, (W_dec, g_dec, g_enc, g_b)), _threads()
        )
        return g_dec, g_enc, g_b

    @torch.no_grad()
    def update(
        self,
        grouped: ByLatent,
        R: Float[Tensor, "stacked d_out"],
        X: Float[Tensor, "rows d_in"],
        W_dec: Float[Tensor, "latent d_out"],
        W_enc: Float[Tensor, "latent d_in"],
        b_enc: Float[Tensor, " latent"],
        moments: Moments,
        adam: AdamStep,
        *,
        pull: Float[Tensor, " latent"] | None = None,
        shift: Float[Tensor, " d_in"] | None = None,
        unit_norm: bool = False,
    ) -> tuple[Float[Tensor, " latent"], Float[Tensor, " d_in"]]:
        """A step of Adam on weights and moments in place, latent by latent."""
        _on_cpu(R)
        checks.gradients(grouped, R, X, W_dec, pull, shift)
        checks.weights(R, X, W_dec, W_enc, b_enc, moments)
        if crowded(grouped.values, len(W_dec) * len(R)):
            return self._plain.update(
                *(grouped, R, X, W_dec, W_enc, b_enc, moments, adam), pull=pull, shift=shift, unit_norm=unit_norm
            )
        g_b, pulled = torch.empty(len(W_dec)), torch.empty(X.shape[1])
        parts = self._buffer("parts", -(-len(W_dec) // 128) * X.shape[1])
        settings = (ctypes.c_float * 7)(
            *(adam.beta1, adam.beta2, 1 - adam.beta1, 1 - adam.beta2, adam.rate, adam.root, adam.eps)
        )
        m = moments
        failed = self._c.assay_update(
            *_grouped(grouped, R, X, pull, shift),
            *(ctypes.addressof(settings), int(unit_norm)),
            *map(_at, (W_dec, W_enc, b_enc, m.m_dec, m.v_dec, m.m_enc, m.v_enc, m.m_b, m.v_b, g_b, parts, pulled)),
            _threads(),
        )
        if failed:
            raise AssayError("no memory left for the update of a dictionary; nothing was changed")
        return g_b, pulled

    def _check_encoding(self, x: Tensor, W: Tensor, b: Tensor, bound: Tensor | None = None) -> None:
        _on_cpu(W)
        checks.encoding(x, W, b, bound)
        if (row := self._c.assay_first_bad_row(_at(x), *x.shape)) >= 0:
            checks.refuse_row(row)

    def _tiles(self, x: Tensor, W: Tensor) -> Iterator[tuple[int, int, Tensor]]:
        """First row, first latent and product of each tile; the next one overwrites it."""
        buffer = self._buffer("tile", min(ROWS, len(x)) * min(LATENTS, len(W)))
        for i in range(0, len(x), ROWS):
            rows = x[i : i + ROWS]
            for f in range(0, len(W), LATENTS):
                some = W[f : f + LATENTS]
                tile = buffer[: len(rows) * len(some)].view(len(rows), len(some))
                yield i, f, torch.mm(rows, some.T, out=tile)

    def _collect(self, x: Tensor, W: Tensor, b: Tensor, bound: Tensor, total: int | None = None) -> SparseLatents:
        """What is above the bounds, row by row; with `total`, the bounds rise while that many stay above them."""
        n, tiles = len(x), -(-len(W) // LATENTS)
        count, starts = torch.zeros(tiles, n, dtype=torch.int64), torch.zeros(tiles, n, dtype=torch.int64)
        held, pruned = 0, 0
        for row, first, h in self._tiles(x, W):
            rows, width = h.shape
            if total is not None and held == 0:
                bound.fill_(self._guess(h, b[first:], total))
            cell = count[first // LATENTS, row : row + rows]
            at = starts[first // LATENTS, row : row + rows]
            tile = (_at(h), rows, width)
            limits = (b[first:].data_ptr(), bound[first:].data_ptr())
            self._c.assay_above_count(*tile, *limits, _at(cell), _threads())
            found = int(cell.sum())
            if total is not None and held == 0 and found < total and float(bound[0]) > 0:
                bound.zero_()  # the guess was too high
                self._c.assay_above_count(*tile, *limits, _at(cell), _threads())
                found = int(cell.sum())
            torch.cumsum(cell, 0, out=at)
            at += held - cell
            values, latents = self._grown("values", held, found), self._grown("latents", held, found)
            self._c.assay_above_fill(*tile, first, *limits, *map(_at, (at, cell, values, latents)), _threads())
            held += found
            if total is not None and held > total and held - pruned > total // 2:
                bound.fill_(_below(self._c.assay_kth_bound(_at(values), held, total)))
                pruned = held
        offsets, chosen, kept = _room_for(count.sum(dim=0))
        values, latents = self._grown("values", held, 0), self._grown("latents", held, 0)
        self._c.assay_merge(n, tiles, *map(_at, (starts, count, offsets, values, latents, kept, chosen)), _threads())
        return SparseLatents(offsets=offsets, latents=chosen, values=kept, n_latents=len(W), shape=(n,))

    def _guess(self, h: Tensor, b: Tensor, total: int) -> float:
        """A bound that more than `total` of a tile should be above, from a sample of it; 0 where few are."""
        size, stride = h.numel(), max(1, h.numel() // 32768)
        while h.shape[1] > 1 and stride > 1 and h.shape[1] % stride == 0:
            stride += 1  # a stride that divides the width would look at few latents
        sample = self._buffer("sample", size // stride + 1 + _SPARE)
        n = self._c.assay_sample(_at(h), size, h.shape[1], _at(b), stride, _at(sample))
        rank = int(1.1 * total / stride) + 64
        return _below(self._c.assay_kth_bound(_at(sample), n, rank)) if n > rank else 0.0

    def _buffer(self, name: str, size: int, dtype: torch.dtype = torch.float32) -> Tensor:
        """At least `size` places that keep what was last written to them; fresh ones cost a page fault each 4 KiB."""
        kept: dict[str, Tensor] = self._kept.__dict__
        if name not in kept or kept[name].numel() < size:
            kept[name] = torch.empty(size, dtype=dtype)
        return kept[name]

    def _indices(self, name: str, size: int) -> Tensor:
        return self._buffer(name, size, torch.int32)

    def _grown(self, name: str, held: int, more: int) -> Tensor:
        """The buffer with room for `more`, its first `held` places kept."""
        dtype = torch.int32 if name == "latents" else torch.float32
        old = self._buffer(name, _SPARE, dtype)
        if old.numel() >= held + more + _SPARE:
            return old
        self._kept.__dict__[name] = new = torch.empty(2 * (held + more) + _SPARE, dtype=dtype)
        new[:held] = old[:held]
        return new


def _at(tensor: Tensor | None) -> int | None:
    return None if tensor is None else tensor.data_ptr()


def _threads() -> int:
    return torch.get_num_threads()


def _below(bound: float) -> float:
    """The next smaller float32, or 0: what is above it is at least `bound`."""
    return max(0.0, float(torch.nextafter(torch.tensor(bound), torch.tensor(-1.0))))


def _room_for(count: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Offsets, and empty latents and values, for rows with so many pairs."""
    offsets = torch.zeros(len(count) + 1, dtype=torch.int64)
    torch.cumsum(count, 0, out=offsets[1:])
    pairs = int(offsets[-1])
    return offsets, torch.empty(pairs, dtype=torch.int32), torch.empty(pairs)


def _on_cpu(tensor: Tensor) -> None:
    if tensor.device.type != "cpu":
        raise SpecError(f"the compiled kernels run on the CPU, and the tensors are on {tensor.device}", "backend")


def _check_pairs(pairs: SparseLatents, W_dec: Tensor, rows: int | None = None) -> None:
    """C follows the indices it is given, so they are looked at first."""
    _on_cpu(W_dec)
    checks.pairs(pairs, W_dec, rows)
    checks.offsets("pairs.offsets", pairs.offsets, len(pairs.latents))
    checks.in_range("pairs.latents", pairs.latents, len(W_dec))


def _grouped(
    grouped: ByLatent, R: Tensor, X: Tensor, pull: Tensor | None, shift: Tensor | None
) -> tuple[int | None, ...]:
    g = grouped
    return (
        *map(_at, (g.offsets, g.rows, g.values, g.slopes)),
        *(g.n_latents, _at(R), R.shape[1], _at(X), X.shape[1], max(1, len(X)), _at(pull), _at(shift)),
    )
