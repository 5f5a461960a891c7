"""The kernels on plain PyTorch: any device, no `[rows, latent]` tensor beyond a bounded chunk.

Gathered sums (decoding, gradients) are `embedding_bag`s, which form no `[pairs, d]` tensor and add in a fixed order. On
a CPU, where more than an eighth of all latents are active, as in the first steps of an L1 or JumpReLU dictionary, a
matrix product over the zeros too is faster than gathering, and is taken, again in bounded chunks.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from jaxtyping import Float, Int
from torch import Tensor
from torch.nn.functional import embedding_bag

from assay.dictionaries.kernels import checks
from assay.dictionaries.kernels.backend import BackendName
from assay.dictionaries.kernels.values import AdamStep, ByLatent, Moments
from assay.dictionaries.latents import SparseLatents

CHUNK = 1 << 22
"""The largest number of entries of a temporary matrix (16 MiB)."""

CROWDED = 0.12
"""The share of active latents above which products with the zeros in them are faster on a CPU, as measured."""


@dataclass(frozen=True, slots=True)
class Plain:
    """The kernels on plain PyTorch; `backend.Backend` says what each method computes."""

    @property
    def name(self) -> BackendName:
        """Which path it is."""
        return "plain"

    @torch.no_grad()
    def select_rows(
        self, x: Float[Tensor, "rows d_in"], W: Float[Tensor, "latent d_in"], b: Float[Tensor, " latent"], k: int
    ) -> SparseLatents:
        """The `k` largest of h in each row that are above 0."""
        x = x.contiguous()
        checks.encoding(x, W, b)
        checks.count("k", k, len(W), "W")
        checks.finite_rows(x)
        parts = []
        for h in _encode(x, W, b):
            least = h.topk(k, dim=1).values[:, -1:].clamp_(min=0)
            keep = (h >= least) & (h > 0)
            crowded = keep.sum(dim=1) > k
            if bool(crowded.any()):  # ties at the k-th place: the lower latents
                some, bound = h[crowded], least[crowded]
                above, tied = some > bound, some == bound
                keep[crowded] = above | (tied & (tied.cumsum(1) <= k - above.sum(dim=1, keepdim=True)))
            parts.append(_chosen(h, keep))
        return _joined(parts, x, len(W))

    @torch.no_grad()
    def select_batch(
        self, x: Float[Tensor, "rows d_in"], W: Float[Tensor, "latent d_in"], b: Float[Tensor, " latent"], total: int
    ) -> tuple[SparseLatents, float]:
        """The `total` largest of h over all rows together that are above 0, and the smallest of them (or 0)."""
        x = x.contiguous()
        checks.encoding(x, W, b)
        checks.count("total", total, len(x) * len(W), "the batch")
        checks.finite_rows(x)
        values, cells = x.new_empty(0), torch.empty(0, dtype=torch.int64, device=x.device)
        bound = x.new_zeros(())
        row = 0
        for h in _encode(x, W, b):
            keep = (h >= bound) & (h > 0)
            values = torch.cat([values, h[keep]])
            cells = torch.cat([cells, keep.reshape(-1).nonzero().squeeze(1) + row * len(W)])
            row += len(h)
            if len(values) > 2 * total:
                values, cells = _largest(values, cells, total)
                bound = values.min()
        values, cells = _largest(values, cells, total)
        rows, latents = cells // len(W), cells % len(W)
        chosen = _joined([(latents.to(torch.int32), values, torch.bincount(rows, minlength=len(x)))], x, len(W))
        return chosen, float(values.min()) if len(values) else 0.0

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
        return _joined([_chosen(h, h > bound) for h in _encode(x, W, b)], x, len(W))

    @torch.no_grad()
    def decode(
        self, pairs: SparseLatents, W_dec: Float[Tensor, "latent d_out"], bias: Float[Tensor, " d_out"]
    ) -> Float[Tensor, "rows d_out"]:
        """`bias` plus each row's sum of value * W_dec[latent]."""
        checks.pairs(pairs, W_dec)
        checks.tensors(("W_dec", W_dec, (None, None)), ("bias", bias, (W_dec.shape[1],)))
        return _sums(W_dec, pairs.latents, pairs.values, pairs.offsets).add_(bias)

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
        checks.tensors(("W_dec", W_dec, (None, None)), ("R", R, (None, W_dec.shape[1])))
        at = pairs.rows if rows is None else rows
        checks.in_range("rows", at, len(R))
        out = torch.empty_like(pairs.values)
        if rows is None and crowded(pairs.values, len(R) * len(W_dec)):
            return _dense_slopes(pairs, R, W_dec, out)
        step = max(1, CHUNK // max(1, W_dec.shape[1]))
        for i in range(0, len(out), step):
            part = slice(i, i + step)
            torch.sum(R[at[part]].mul_(W_dec[pairs.latents[part]]), dim=1, out=out[part])
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
        checks.tensors(("values", values, (n,)), ("slopes", slopes, (n,)))
        checks.indices(values.device, n, ("rows", rows), ("latents", latents))
        checks.in_range("latents", latents, n_latents)
        order = torch.argsort(latents, stable=True)
        offsets = _offsets(torch.bincount(latents, minlength=n_latents))
        return ByLatent(offsets=offsets, rows=rows[order], values=values[order], slopes=slopes[order])

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
        return _block(grouped, 0, grouped.n_latents, R, X, W_dec, pull, shift)

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
        """A step of Adam on weights and moments in place, some thousand latents at a time."""
        checks.gradients(grouped, R, X, W_dec, pull, shift)
        checks.weights(R, X, W_dec, W_enc, b_enc, moments)
        g_b, pulled = torch.empty_like(b_enc), X.new_zeros(X.shape[1])
        step = max(1, CHUNK // max(1, W_dec.shape[1], W_enc.shape[1]))
        for start in range(0, len(W_dec), step):
            f = slice(start, min(start + step, len(W_dec)))
            g_dec, g_enc, g_b[f] = _block(grouped, f.start, f.stop, R, X, W_dec, pull, shift)
            pulled += g_b[f] @ W_enc[f]
            if unit_norm:
                g_dec -= (g_dec * W_dec[f]).sum(dim=1, keepdim=True) * W_dec[f]
            _adam(adam, W_dec[f], moments.m_dec[f], moments.v_dec[f], g_dec)
            if unit_norm:
                norms = torch.linalg.vector_norm(W_dec[f], dim=1, keepdim=True)
                W_dec[f] /= torch.where(norms > 0, norms, 1.0)
            _adam(adam, W_enc[f], moments.m_enc[f], moments.v_enc[f], g_enc)
            _adam(adam, b_enc[f], moments.m_b[f], moments.v_b[f], g_b[f])
        return g_b, pulled


def crowded(values: Tensor, cells: int) -> bool:
    """Whether so many of a matrix's cells hold a value that the matrix is better formed, on a CPU."""
    return values.device.type == "cpu" and len(values) > CROWDED * cells


def _encode(x: Tensor, W: Tensor, b: Tensor) -> Iterator[Tensor]:
    """The pre-activations of some rows at a time, in one buffer that the next ones overwrite."""
    step = max(1, min(CHUNK // max(1, len(W)), len(x)))
    buffer = x.new_empty(step * len(W))
    for i in range(0, len(x), step):
        rows = x[i : i + step]
        yield torch.addmm(b, rows, W.T, out=buffer[: len(rows) * len(W)].view(len(rows), len(W)))


def _chosen(h: Tensor, keep: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Latents and values where `keep` is true, row by row, and how many each row has."""
    return keep.nonzero()[:, 1].to(torch.int32), h[keep], keep.sum(dim=1)


def _joined(parts: list[tuple[Tensor, Tensor, Tensor]], x: Tensor, n_latents: int) -> SparseLatents:
    nothing = (x.new_empty(0, dtype=torch.int32), x.new_empty(0), x.new_empty(0, dtype=torch.int64))
    latents, values, counts = (torch.cat(each) for each in zip(nothing, *parts, strict=True))
    return SparseLatents(offsets=_offsets(counts), latents=latents, values=values, n_latents=n_latents, shape=(len(x),))


def _offsets(counts: Tensor) -> Tensor:
    offsets = torch.zeros(len(counts) + 1, dtype=torch.int64, device=counts.device)
    torch.cumsum(counts, 0, out=offsets[1:])
    return offsets


def _largest(values: Tensor, cells: Tensor, total: int) -> tuple[Tensor, Tensor]:
    """The `total` largest in their order, ties in favour of the earlier."""
    if len(values) <= total:
        return values, cells
    bound = values.topk(total, sorted=False).values.min()
    keep = values > bound
    tied = (values == bound).nonzero().squeeze(1)
    keep[tied[: total - int(keep.sum())]] = True
    return values[keep], cells[keep]


def _sums(table: Tensor, indices: Tensor, coefficients: Tensor, offsets: Tensor) -> Tensor:
    """For each stretch between two offsets, the sum of coefficient * table[index]."""
    if not len(indices) or not len(table):
        return table.new_zeros(len(offsets) - 1, table.shape[1])
    if crowded(coefficients, (len(offsets) - 1) * len(table)):
        return _dense_sums(table, indices, coefficients, offsets)
    return _gathered_sums(table, indices, coefficients, offsets)


def _gathered_sums(table: Tensor, indices: Tensor, coefficients: Tensor, offsets: Tensor) -> Tensor:
    return embedding_bag(
        indices.long(), table, offsets, mode="sum", per_sample_weights=coefficients, include_last_offset=True
    )


def _dense_sums(table: Tensor, indices: Tensor, coefficients: Tensor, offsets: Tensor) -> Tensor:
    """`_sums`, some stretches at a time as a matrix product."""
    out = table.new_empty(len(offsets) - 1, table.shape[1])
    step = max(1, CHUNK // len(table))
    for start in range(0, len(out), step):
        some = out[start : start + step]
        edges = offsets[start : start + len(some) + 1]
        part = slice(int(edges[0]), int(edges[-1]))
        cells = torch.repeat_interleave(torch.arange(len(some)), edges.diff()).mul_(len(table)).add_(indices[part])
        matrix = table.new_zeros(len(some) * len(table)).index_add_(0, cells, coefficients[part])
        torch.mm(matrix.view(len(some), len(table)), table, out=some)
    return out


def _dense_slopes(pairs: SparseLatents, R: Tensor, W_dec: Tensor, out: Tensor) -> Tensor:
    """R[row] . W_dec[latent] of each pair, read off R W_dec' some rows at a time."""
    step = max(1, CHUNK // len(W_dec))
    for start in range(0, len(R), step):
        some = R[start : start + step]
        edges = pairs.offsets[start : start + len(some) + 1]
        part = slice(int(edges[0]), int(edges[-1]))
        cells = torch.repeat_interleave(torch.arange(len(some)), edges.diff()).mul_(len(W_dec))
        torch.index_select(torch.mm(some, W_dec.T).view(-1), 0, cells.add_(pairs.latents[part]), out=out[part])
    return out


def _block(
    grouped: ByLatent,
    start: int,
    stop: int,
    R: Tensor,
    X: Tensor,
    W_dec: Tensor | None,
    pull: Tensor | None,
    shift: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor]:
    """The gradients of the latents from `start` to `stop`."""
    offsets = grouped.offsets[start : stop + 1]
    part = slice(int(offsets[0]), int(offsets[-1]))
    offsets = offsets - offsets[0]
    rows, slopes = grouped.rows[part], grouped.slopes[part]
    g_dec = _sums(R, rows, grouped.values[part], offsets)
    g_enc = _sums(X, rows % max(1, len(X)), slopes, offsets)
    g_b = slopes.new_zeros(stop - start)
    if len(slopes):
        each = torch.arange(len(slopes), device=slopes.device)
        g_b = _gathered_sums(slopes[:, None], each, torch.ones_like(slopes), offsets)[:, 0]
    if pull is not None and W_dec is not None:
        g_dec += pull[start:stop, None] * W_dec[start:stop]
    if shift is not None:
        g_enc -= g_b[:, None] * shift
    return g_dec, g_enc, g_b


def _adam(adam: AdamStep, w: Tensor, m: Tensor, v: Tensor, g: Tensor) -> None:
    m.mul_(adam.beta1).add_(g, alpha=1 - adam.beta1)
    v.mul_(adam.beta2).addcmul_(g, g, value=1 - adam.beta2)
    w.addcdiv_(m, v.sqrt().div_(adam.root).add_(adam.eps), value=-adam.rate)
