# mypy: ignore-errors
"""The Triton programs that `triton.py` launches. One program is one row, one pair or one latent; none adds atomically.

`no_type_check` keeps run-time shape checks off what Triton compiles from its source.
"""

from __future__ import annotations

from typing import no_type_check

import triton
import triton.language as tl


@triton.jit
@no_type_check
def topk_rows(h, b, latents, values, counts, F, k, BLOCK: tl.constexpr):
    """Row's k largest of h + b that are above 0, latents ascending, to its k places; how many to `counts`.

    The k-th largest is found 8 bits at a time: positive floats are ordered as their bits are.
    """
    row = tl.program_id(0).to(tl.int64)
    bins = tl.arange(0, 512)
    found, need, few = 0, k, 0
    for part in tl.static_range(4):
        shift: tl.constexpr = 24 - 8 * part
        hist = tl.zeros([512], tl.int32)
        for start in range(0, F, BLOCK):
            j = start + tl.arange(0, BLOCK)
            inside = j < F
            v = tl.load(h + row * F + j, mask=inside, other=0.0) + tl.load(b + j, mask=inside, other=0.0)
            bits = v.to(tl.int32, bitcast=True)
            counted = inside & (v > 0)
            if part > 0:
                counted = counted & ((bits >> (shift + 8)) == (found >> (shift + 8)))
            hist += tl.histogram(tl.where(counted, (bits >> shift) & 255, 256), 512)
        hist = tl.where(bins < 256, hist, 0)
        reach = tl.sum(hist, axis=0) - tl.cumsum(hist, axis=0) + hist  # how many have this digit or a higher one
        digit = tl.max(tl.where((reach >= need) & (bins < 256), bins, -1), axis=0)
        if part == 0:
            few = (digit < 0).to(tl.int32)
        digit = tl.maximum(digit, 0)
        need = need - tl.sum(tl.where(bins > digit, hist, 0), axis=0)
        found = found | (digit << shift)
    found = tl.where(few == 1, 0, found)
    kept, ties = 0, 0
    for start in range(0, F, BLOCK):
        j = start + tl.arange(0, BLOCK)
        inside = j < F
        v = tl.load(h + row * F + j, mask=inside, other=0.0) + tl.load(b + j, mask=inside, other=0.0)
        bits = v.to(tl.int32, bitcast=True)
        tied = (inside & (v > 0) & (bits == found)).to(tl.int32)
        rank = ties + tl.cumsum(tied, axis=0)
        keep = inside & (v > 0) & ((bits > found) | ((tied == 1) & (rank <= need)))
        at = row * k + kept + tl.cumsum(keep.to(tl.int32), axis=0) - 1
        tl.store(latents + at, j, mask=keep)
        tl.store(values + at, v, mask=keep)
        kept += tl.sum(keep.to(tl.int32), axis=0)
        ties += tl.sum(tied, axis=0)
    tl.store(counts + row, kept)


@triton.jit
@no_type_check
def above_count(h, b, bound, counts, F, BLOCK: tl.constexpr):
    """How many of the row's h + b are above their bounds."""
    row = tl.program_id(0).to(tl.int64)
    n = 0
    for start in range(0, F, BLOCK):
        j = start + tl.arange(0, BLOCK)
        inside = j < F
        v = tl.load(h + row * F + j, mask=inside, other=0.0) + tl.load(b + j, mask=inside, other=0.0)
        n += tl.sum((inside & (v > tl.load(bound + j, mask=inside, other=0.0))).to(tl.int32), axis=0)
    tl.store(counts + row, n)


@triton.jit
@no_type_check
def above_fill(h, b, bound, starts, latents, values, F, BLOCK: tl.constexpr):
    """Those of the row's h + b that are above their bounds, from the row's start on."""
    row = tl.program_id(0).to(tl.int64)
    to = tl.load(starts + row)
    for start in range(0, F, BLOCK):
        j = start + tl.arange(0, BLOCK)
        inside = j < F
        v = tl.load(h + row * F + j, mask=inside, other=0.0) + tl.load(b + j, mask=inside, other=0.0)
        keep = (inside & (v > tl.load(bound + j, mask=inside, other=0.0))).to(tl.int32)
        at = to + tl.cumsum(keep, axis=0) - 1
        tl.store(latents + at, j, mask=keep == 1)
        tl.store(values + at, v, mask=keep == 1)
        to += tl.sum(keep, axis=0)


@triton.jit
@no_type_check
def _gather(table, index, coefficient, start, end, rows, width, columns, inside):
    """The sum over a stretch of coefficient * table[index mod rows], in order."""
    total = tl.zeros_like(columns).to(tl.float32)
    for p in range(start, end):
        at = (tl.load(index + p) % rows).to(tl.int64) * width
        total += tl.load(coefficient + p) * tl.load(table + at + columns, mask=inside, other=0.0)
    return total


@triton.jit
@no_type_check
def decode_rows(offsets, latents, values, W, bias, out, F, m, BLOCK: tl.constexpr):
    """One row's bias + sum of value * W[latent], some columns."""
    row = tl.program_id(0).to(tl.int64)
    columns = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = columns < m
    start, end = tl.load(offsets + row), tl.load(offsets + row + 1)
    total = _gather(W, latents, values, start, end, F, m, columns, inside)
    tl.store(out + row * m + columns, total + tl.load(bias + columns, mask=inside, other=0.0), mask=inside)


@triton.jit
@no_type_check
def pair_slopes(rows, latents, R, W, out, m, BLOCK: tl.constexpr):
    """One pair's R[row] . W[latent]."""
    pair = tl.program_id(0).to(tl.int64)
    r = tl.load(rows + pair).to(tl.int64) * m
    f = tl.load(latents + pair).to(tl.int64) * m
    total = tl.zeros([BLOCK], tl.float32)
    for start in range(0, m, BLOCK):
        j = start + tl.arange(0, BLOCK)
        total += tl.load(R + r + j, mask=j < m, other=0.0) * tl.load(W + f + j, mask=j < m, other=0.0)
    tl.store(out + pair, tl.sum(total, axis=0))


@triton.jit
@no_type_check
def slope_sums(offsets, slopes, out, BLOCK: tl.constexpr):
    """One latent's sum of slopes: the gradient of its encoder bias."""
    f = tl.program_id(0).to(tl.int64)
    start, end = tl.load(offsets + f), tl.load(offsets + f + 1)
    total = tl.zeros([BLOCK], tl.float32)
    for at in range(start, end, BLOCK):
        j = at + tl.arange(0, BLOCK)
        total += tl.load(slopes + j, mask=j < end, other=0.0)
    tl.store(out + f, tl.sum(total, axis=0))


@triton.jit
@no_type_check
def _decoder_gradient(f, start, end, rows, values, R, n, pull, W, m, columns, inside, HAS_PULL: tl.constexpr):
    g = _gather(R, rows, values, start, end, n, m, columns, inside)
    if HAS_PULL:
        g += tl.load(pull + f) * tl.load(W + f * m + columns, mask=inside, other=0.0)
    return g


@triton.jit
@no_type_check
def _encoder_gradient(f, start, end, rows, slopes, X, n_x, g_b, shift, d, columns, inside, HAS_SHIFT: tl.constexpr):
    g = _gather(X, rows, slopes, start, end, n_x, d, columns, inside)
    if HAS_SHIFT:
        g -= tl.load(g_b + f) * tl.load(shift + columns, mask=inside, other=0.0)
    return g


@triton.jit
@no_type_check
def latent_gradients(
    offsets, rows, values, slopes, R, n, X, n_x, pull, shift, g_b, W_dec, g_dec, g_enc, m, d,
    HAS_PULL: tl.constexpr, HAS_SHIFT: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """One latent's gradients, written out."""
    f = tl.program_id(0).to(tl.int64)
    start, end = tl.load(offsets + f), tl.load(offsets + f + 1)
    j = tl.arange(0, BLOCK_M)
    g = _decoder_gradient(f, start, end, rows, values, R, n, pull, W_dec, m, j, j < m, HAS_PULL)
    tl.store(g_dec + f * m + j, g, mask=j < m)
    j = tl.arange(0, BLOCK_D)
    g = _encoder_gradient(f, start, end, rows, slopes, X, n_x, g_b, shift, d, j, j < d, HAS_SHIFT)
    tl.store(g_enc + f * d + j, g, mask=j < d)


@triton.jit
@no_type_check
def _adam(w, m, v, at, inside, old, g, keep1, keep2, add1, add2, rate, root, eps):
    """A step of Adam on the moments; returns what the weights become."""
    first = keep1 * tl.load(m + at, mask=inside, other=0.0) + add1 * g
    second = keep2 * tl.load(v + at, mask=inside, other=0.0) + add2 * g * g
    tl.store(m + at, first, mask=inside)
    tl.store(v + at, second, mask=inside)
    return old - rate * first / (tl.sqrt(second) / root + eps)


@triton.jit
@no_type_check
def latent_update(
    offsets, rows, values, slopes, R, n, X, n_x, pull, shift, g_b, W_dec, W_enc, b_enc,
    m_dec, v_dec, m_enc, v_enc, m_b, v_b, m, d, keep1, keep2, add1, add2, rate, root, eps,
    HAS_PULL: tl.constexpr, HAS_SHIFT: tl.constexpr, UNIT: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """One latent's gradients and step of Adam; its gradient is never in memory."""
    f = tl.program_id(0).to(tl.int64)
    start, end = tl.load(offsets + f), tl.load(offsets + f + 1)
    j = tl.arange(0, BLOCK_M)
    inside, at = j < m, f * m + j
    w = tl.load(W_dec + at, mask=inside, other=0.0)
    g = _decoder_gradient(f, start, end, rows, values, R, n, pull, W_dec, m, j, inside, HAS_PULL)
    if UNIT:
        g -= tl.sum(g * w, axis=0) * w
    w = _adam(W_dec, m_dec, v_dec, at, inside, w, g, keep1, keep2, add1, add2, rate, root, eps)
    if UNIT:
        norm = tl.sqrt(tl.sum(tl.where(inside, w * w, 0.0), axis=0))
        w = w / tl.where(norm > 0, norm, 1.0)
    tl.store(W_dec + at, w, mask=inside)
    j = tl.arange(0, BLOCK_D)
    inside, at = j < d, f * d + j
    w = tl.load(W_enc + at, mask=inside, other=0.0)
    g = _encoder_gradient(f, start, end, rows, slopes, X, n_x, g_b, shift, d, j, inside, HAS_SHIFT)
    w = _adam(W_enc, m_enc, v_enc, at, inside, w, g, keep1, keep2, add1, add2, rate, root, eps)
    tl.store(W_enc + at, w, mask=inside)
    one = tl.arange(0, 2)  # a block of the smallest size, of which one place counts
    at, inside = f + one, one < 1
    g = tl.load(g_b + at, mask=inside, other=0.0)
    w = tl.load(b_enc + at, mask=inside, other=0.0)
    w = _adam(b_enc, m_b, v_b, at, inside, w, g, keep1, keep2, add1, add2, rate, root, eps)
    tl.store(b_enc + at, w, mask=inside)
