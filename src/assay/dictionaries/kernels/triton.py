"""The kernels on CUDA: PyTorch's matrix product, and Triton for all else.

These have run under Triton's interpreter only (`TRITON_INTERPRET=1`, which executes the same programs on a CPU): they
agree with the other paths there, and no speed was measured. What a GPU's compiler makes of them is not tested.

No program adds to what another one writes, so results are the same bits each time. A latent's pairs are added by one
program, in order: a latent that is active in most rows takes that long.
"""

from __future__ import annotations

import contextlib
import importlib
from collections.abc import Iterator
from typing import Any, final

import torch
from jaxtyping import Float, Int
from torch import Tensor

from assay.base.errors import AssayError, SpecError
from assay.dictionaries.kernels import checks
from assay.dictionaries.kernels.backend import BackendName
from assay.dictionaries.kernels.plain import Plain
from assay.dictionaries.kernels.values import AdamStep, ByLatent, Moments
from assay.dictionaries.latents import SparseLatents

CHUNK = 1 << 25
"""The largest number of pre-activations that are held at once (128 MiB)."""

WIDEST = 1 << 14
"""The widest row that one program can hold."""

_BLOCK = 1024


@final
class Triton:
    """The kernels in Triton; `backend.Backend` says what each method computes.

    Raises:
        AssayError: Triton is not installed.
    """

    __slots__ = ("_k", "_plain")

    def __init__(self) -> None:
        try:
            importlib.import_module("triton")
        except ImportError as error:
            raise AssayError(
                f"Triton cannot be imported ({error}): PyTorch for CUDA brings it on Linux, else pip install triton"
            ) from error
        self._k: Any = importlib.import_module("assay.dictionaries.kernels.triton_kernels")
        self._plain = Plain()

    @property
    def name(self) -> BackendName:
        """Which path it is."""
        return "triton"

    @torch.no_grad()
    def select_rows(
        self, x: Float[Tensor, "rows d_in"], W: Float[Tensor, "latent d_in"], b: Float[Tensor, " latent"], k: int
    ) -> SparseLatents:
        """The `k` largest of h in each row that are above 0."""
        x = x.contiguous()
        checks.encoding(x, W, b)
        checks.count("k", k, len(W), "W")
        checks.finite_rows(x)
        counts = x.new_empty(len(x), dtype=torch.int32)
        latents, values = x.new_empty(len(x), k, dtype=torch.int32), x.new_empty(len(x), k)
        with _on(x):
            for row, h in _products(x, W):
                to = latents[row:], values[row:], counts[row:]
                self._k.topk_rows[(len(h),)](h, b, *to, len(W), k, BLOCK=_block(len(W)))
        kept = torch.arange(k, device=x.device) < counts[:, None]
        return SparseLatents(
            offsets=_offsets(counts), latents=latents[kept], values=values[kept], n_latents=len(W), shape=(len(x),)
        )

    @torch.no_grad()
    def select_batch(
        self, x: Float[Tensor, "rows d_in"], W: Float[Tensor, "latent d_in"], b: Float[Tensor, " latent"], total: int
    ) -> tuple[SparseLatents, float]:
        """The `total` largest of h over all rows together that are above 0, and the smallest of them (or 0)."""
        x = x.contiguous()
        checks.encoding(x, W, b)
        checks.count("total", total, len(x) * len(W), "the batch")
        checks.finite_rows(x)
        pairs = self._above(x, W, b, torch.zeros_like(b), total)
        values, n = pairs.values, len(pairs.values)
        if n > total:
            least = values.topk(total, sorted=False).values.min()
            keep = values > least
            tied = (values == least).nonzero().squeeze(1)
            keep[tied[: total - int(keep.sum())]] = True
            counts = torch.bincount(pairs.rows[keep], minlength=len(x))
            pairs = SparseLatents(
                offsets=_offsets(counts),
                latents=pairs.latents[keep],
                values=values[keep],
                n_latents=len(W),
                shape=(len(x),),
            )
        return pairs, float(pairs.values.min()) if n else 0.0

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
        checks.encoding(x, W, b, bound)
        checks.finite_rows(x)
        return self._above(x, W, b, bound)

    @torch.no_grad()
    def decode(
        self, pairs: SparseLatents, W_dec: Float[Tensor, "latent d_out"], bias: Float[Tensor, " d_out"]
    ) -> Float[Tensor, "rows d_out"]:
        """`bias` plus each row's sum of value * W_dec[latent]."""
        checks.pairs(pairs, W_dec)
        m = W_dec.shape[1]
        checks.tensors(("W_dec", W_dec, (None, None)), ("bias", bias, (m,)))
        out = W_dec.new_empty(pairs.n_rows, m)
        if out.numel():
            with _on(W_dec):
                self._k.decode_rows[(len(out), -(-m // _block(m)))](
                    pairs.offsets, pairs.latents, pairs.values, W_dec, bias, out, len(W_dec), m, BLOCK=_block(m)
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
        checks.pairs(pairs, W_dec, len(target))
        checks.tensors(("W_dec", W_dec, (None, None)), ("target", target, (None, W_dec.shape[1])))
        R = self.decode(pairs, W_dec, bias).sub_(target)
        squares = torch.linalg.vector_norm(R, dim=1).square_()
        R.mul_(scale)
        return R, self.slopes(pairs, R, W_dec), squares

    @torch.no_grad()
    def slopes(
        self,
        pairs: SparseLatents,
        R: Float[Tensor, "stacked d_out"],
        W_dec: Float[Tensor, "latent d_out"],
        rows: Int[Tensor, " pairs"] | None = None,
    ) -> Float[Tensor, " pairs"]:
        """R[row] . W_dec[latent] for each pair."""
        checks.pairs(pairs, W_dec, len(R) if rows is None else None)
        m = W_dec.shape[1]
        checks.tensors(("W_dec", W_dec, (None, None)), ("R", R, (None, m)))
        at = (pairs.rows if rows is None else rows).to(torch.int32)
        out = torch.empty_like(pairs.values)
        checks.indices(out.device, len(out), ("rows", at))
        checks.in_range("rows", at, len(R))
        if len(out):
            with _on(R):
                self._k.pair_slopes[(len(out),)](at, pairs.latents, R, W_dec, out, m, BLOCK=_block(m))
        return out

    def by_latent(
        self,
        rows: Int[Tensor, " pairs"],
        latents: Int[Tensor, " pairs"],
        values: Float[Tensor, " pairs"],
        slopes: Float[Tensor, " pairs"],
        n_latents: int,
    ) -> ByLatent:
        """Sort pairs by latent; those of one latent keep their order."""
        return self._plain.by_latent(rows, latents, values, slopes, n_latents)

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
        checks.gradients(grouped, R, X, W_dec, pull, shift)
        F, m, d = grouped.n_latents, R.shape[1], X.shape[1]
        g_dec, g_enc, g_b = R.new_empty(F, m), R.new_empty(F, d), self._slope_sums(grouped)
        with _on(R):
            self._k.latent_gradients[(F,)](
                *_parts(grouped, R, X, pull, shift, g_b),
                *(g_b if W_dec is None else W_dec, g_dec, g_enc, m, d),
                **_shape(m, d, pull, shift),
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
        """A step of Adam on weights and moments in place, one program a latent."""
        checks.gradients(grouped, R, X, W_dec, pull, shift)
        checks.weights(R, X, W_dec, W_enc, b_enc, moments)
        shape = _shape(R.shape[1], X.shape[1], pull, shift)
        g_b = self._slope_sums(grouped)
        pulled = g_b @ W_enc
        m = moments
        with _on(R):
            self._k.latent_update[(len(W_dec),)](
                *_parts(grouped, R, X, pull, shift, g_b),
                *(W_dec, W_enc, b_enc, m.m_dec, m.v_dec, m.m_enc, m.v_enc, m.m_b, m.v_b, R.shape[1], X.shape[1]),
                *(adam.beta1, adam.beta2, 1 - adam.beta1, 1 - adam.beta2, adam.rate, adam.root, adam.eps),
                UNIT=unit_norm,
                **shape,
            )
        return g_b, pulled

    def _above(self, x: Tensor, W: Tensor, b: Tensor, bound: Tensor, total: int | None = None) -> SparseLatents:
        """What is above the bounds; with `total`, the bounds rise while that many stay at or above them."""
        counts = x.new_zeros(len(x), dtype=torch.int32)
        latents, values = [x.new_empty(0, dtype=torch.int32)], [x.new_empty(0)]
        held = 0
        with _on(x):
            for row, h in _products(x, W):
                cell, grid, block = counts[row : row + len(h)], (len(h),), _block(len(W))
                self._k.above_count[grid](h, b, bound, cell, len(W), BLOCK=block)
                starts = _offsets(cell)
                found = int(starts[-1])
                latents.append(x.new_empty(found, dtype=torch.int32))
                values.append(x.new_empty(found))
                self._k.above_fill[grid](h, b, bound, starts, latents[-1], values[-1], len(W), BLOCK=block)
                held += found
                if total is not None and held > 2 * total:
                    best = torch.cat(values).topk(total, sorted=False).values
                    bound = torch.nextafter(best.min(), best.new_zeros(())).expand(len(b)).contiguous()
        return SparseLatents(
            offsets=_offsets(counts),
            latents=torch.cat(latents),
            values=torch.cat(values),
            n_latents=len(W),
            shape=(len(x),),
        )

    def _slope_sums(self, grouped: ByLatent) -> Tensor:
        out = grouped.slopes.new_empty(grouped.n_latents)
        with _on(out):
            self._k.slope_sums[(len(out),)](grouped.offsets, grouped.slopes, out, BLOCK=128)
        return out


def _products(x: Tensor, W: Tensor) -> Iterator[tuple[int, Tensor]]:
    """First row and product x W' of some rows at a time, in a buffer that the next ones overwrite."""
    step = max(1, min(CHUNK // max(1, len(W)), len(x)))
    buffer = x.new_empty(step * len(W))
    for i in range(0, len(x), step):
        rows = x[i : i + step]
        yield i, torch.mm(rows, W.T, out=buffer[: len(rows) * len(W)].view(len(rows), len(W)))


def _parts(
    grouped: ByLatent, R: Tensor, X: Tensor, pull: Tensor | None, shift: Tensor | None, g_b: Tensor
) -> tuple[Tensor | int, ...]:
    """What both programs over latents read first; an absent tensor is stood in for by one that is not looked at."""
    pairs = (grouped.offsets, grouped.rows, grouped.values, grouped.slopes)
    absent = (g_b if pull is None else pull, g_b if shift is None else shift)
    return (*pairs, R, max(1, len(R)), X, max(1, len(X)), *absent, g_b)


def _shape(m: int, d: int, pull: Tensor | None, shift: Tensor | None) -> dict[str, Any]:
    if max(m, d) > WIDEST:
        raise SpecError(
            f"the Triton kernels hold rows of up to {WIDEST}, and there are {m} and {d}: use prefer='plain'"
        )
    sizes = {"BLOCK_M": _power(m), "BLOCK_D": _power(d), "num_warps": 8 if max(m, d) > 2048 else 4}
    return {"HAS_PULL": pull is not None, "HAS_SHIFT": shift is not None, **sizes}


def _power(size: int) -> int:
    """The smallest power of 2 that is at least `size`, and at least 16."""
    return max(16, 1 << max(0, size - 1).bit_length())


def _block(size: int) -> int:
    return min(_BLOCK, _power(size))


def _offsets(counts: Tensor) -> Tensor:
    offsets = torch.zeros(len(counts) + 1, dtype=torch.int64, device=counts.device)
    torch.cumsum(counts, 0, out=offsets[1:])
    return offsets


def _on(tensor: Tensor) -> contextlib.AbstractContextManager[object]:
    """Programs are launched on the current device, which need not be the tensor's."""
    return torch.cuda.device(tensor.device) if tensor.is_cuda else contextlib.nullcontext()
