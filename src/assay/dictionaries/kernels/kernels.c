/* The heavy parts of training a dictionary, for a CPU. Compiled on first use by building.py, called by compiled.py.

   Every result depends on its own row or its own latent alone, and the one sum over latents (`pulled`) is taken over
   blocks of fixed size in a fixed order: nothing here depends on the number of threads. */

#include <math.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>
#if defined(__AVX512F__) || defined(__AVX2__)
#include <immintrin.h>
#endif

#if defined(_WIN32)
#define EXPORT __declspec(dllexport)
#else
#define EXPORT __attribute__((visibility("default")))
#endif

#define SPAN 64   /* columns looked at together by `take` */
#define BLOCK 128 /* latents of one part of `pulled` */

typedef int32_t i32;
typedef int64_t i64;

/* Threads for so many multiplications or comparisons: waking others takes longer than a little work. */
static inline int crew(i64 work, int threads) { return work < 32768 ? 1 : threads; }

/* ---- selection ---------------------------------------------------------------------------------------------------

   `take` appends the columns of one span with h + b > bound: their values to `values`, their indices to `latents`.
   It may write up to 15 places past what it appends. `bounds` holds a bound a column, or is NULL for one `bound`. */

#if defined(__AVX512F__)

static inline i64 take(const float *h, const float *b, const float *bounds, float bound, i64 start, i64 width, i32 first,
                       float *values, i32 *latents) {
    __m512 v[4];
    __mmask16 hit[4];
    const __m512i lanes = _mm512_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15);
    for (int q = 0; q < 4; q++) {
        const i64 j = start + 16 * q, left = width - j;
        const __mmask16 in = left >= 16 ? 0xFFFF : left > 0 ? (__mmask16)((1u << left) - 1) : 0;
        v[q] = _mm512_add_ps(_mm512_maskz_loadu_ps(in, h + j), _mm512_maskz_loadu_ps(in, b + j));
        const __m512 least = bounds ? _mm512_maskz_loadu_ps(in, bounds + j) : _mm512_set1_ps(bound);
        hit[q] = _mm512_mask_cmp_ps_mask(in, v[q], least, _CMP_GT_OQ);
    }
    if (!(hit[0] | hit[1] | hit[2] | hit[3])) return 0;
    i64 n = 0;
    for (int q = 0; q < 4; q++) {
        const __m512i index = _mm512_add_epi32(lanes, _mm512_set1_epi32(first + (i32)start + 16 * q));
        _mm512_storeu_ps(values + n, _mm512_maskz_compress_ps(hit[q], v[q]));
        _mm512_storeu_si512(latents + n, _mm512_maskz_compress_epi32(hit[q], index));
        n += __builtin_popcount(hit[q]);
    }
    return n;
}

#else

static inline i64 take(const float *h, const float *b, const float *bounds, float bound, i64 start, i64 width, i32 first,
                       float *values, i32 *latents) {
    const i64 end = start + SPAN < width ? start + SPAN : width;
    int any = 0;
    if (bounds) {
#pragma omp simd reduction(| : any)
        for (i64 j = start; j < end; j++) any |= h[j] + b[j] > bounds[j];
    } else {
#pragma omp simd reduction(| : any)
        for (i64 j = start; j < end; j++) any |= h[j] + b[j] > bound;
    }
    if (!any) return 0;
    i64 n = 0;
    for (i64 j = start; j < end; j++) {
        const float v = h[j] + b[j];
        values[n] = v;
        latents[n] = first + (i32)j;
        n += v > (bounds ? bounds[j] : bound);
    }
    return n;
}

#endif

/* A lower bound of the k-th largest of n >= k positive floats: the k-th largest itself, or, where exactly k reach it,
   a smaller one. Positive floats are ordered as their bits are, so the bound is built bit by bit from the top. */
static float kth_bound(const float *values, i64 n, i64 k) {
    const i32 *bits = (const i32 *)values;
    i32 found = 0;
    for (int bit = 30; bit >= 0; bit--) {
        const i32 tried = found | (i32)(1u << bit);
        i64 reach = 0;
        for (i64 from = 0; from < n; from += 1 << 16) {
            const i64 to = from + (1 << 16) < n ? from + (1 << 16) : n;
            i32 some = 0;
#pragma omp simd reduction(+ : some)
            for (i64 i = from; i < to; i++) some += bits[i] >= tried;
            reach += some;
        }
        if (reach >= k) found = tried;
        if (reach == k) break;
    }
    float bound;
    memcpy(&bound, &found, sizeof bound);
    return bound;
}

/* Keep the k largest of n candidates in their order, ties in favour of the earlier; returns a bound none is below. */
static float keep_largest(float *values, i32 *latents, i64 n, i64 k) {
    const float bound = kth_bound(values, n, k);
    i64 above = 0, kept = 0;
    for (i64 i = 0; i < n; i++) above += values[i] > bound;
    i64 ties = k - above;
    for (i64 i = 0; i < n; i++) {
        const float v = values[i];
        const i32 f = latents[i];
        const int tie = v == bound && ties > 0;
        values[kept] = v;
        latents[kept] = f;
        kept += v > bound || tie;
        ties -= tie;
    }
    return bound;
}

/* One tile [n, width] of h joins each row's candidates: at most `room` a row, always with its k largest so far. */
EXPORT void assay_topk_tile(const float *h, i64 n, i64 width, i32 first, const float *b, i64 k, i64 room, float *bound,
                            i64 *count, float *values, i32 *latents, int threads) {
#pragma omp parallel for schedule(static) num_threads(crew(n * width, threads))
    for (i64 r = 0; r < n; r++) {
        float *v = values + r * room;
        i32 *f = latents + r * room;
        i64 c = count[r];
        float least = bound[r];
        for (i64 j = 0; j < width; j += SPAN) {
            if (c > room - SPAN - 16) {
                least = keep_largest(v, f, c, k);
                c = k;
            }
            c += take(h + r * width, b, NULL, least, j, width, first, v + c, f + c);
        }
        count[r] = c;
        bound[r] = least;
    }
}

EXPORT void assay_topk_end(i64 n, i64 k, i64 room, i64 *count, float *values, i32 *latents, int threads) {
#pragma omp parallel for schedule(static) num_threads(crew(n * k, threads))
    for (i64 r = 0; r < n; r++)
        if (count[r] > k) {
            keep_largest(values + r * room, latents + r * room, count[r], k);
            count[r] = k;
        }
}

/* The rows' candidates, `room` places a row, one after the other. */
EXPORT void assay_pack(i64 n, i64 room, const i64 *offsets, const float *values, const i32 *latents, float *to_values,
                       i32 *to_latents, int threads) {
#pragma omp parallel for schedule(static) num_threads(crew(offsets[n], threads))
    for (i64 r = 0; r < n; r++) {
        const size_t bytes = 4 * (size_t)(offsets[r + 1] - offsets[r]);
        memcpy(to_values + offsets[r], values + r * room, bytes);
        memcpy(to_latents + offsets[r], latents + r * room, bytes);
    }
}

EXPORT void assay_above_count(const float *h, i64 n, i64 width, const float *b, const float *bounds, i64 *count,
                              int threads) {
#pragma omp parallel for schedule(static) num_threads(crew(n * width, threads))
    for (i64 r = 0; r < n; r++) {
        const float *row = h + r * width;
        i32 c = 0;
#pragma omp simd reduction(+ : c)
        for (i64 j = 0; j < width; j++) c += row[j] + b[j] > bounds[j];
        count[r] = c;
    }
}

/* Row r's columns above their bounds, from place starts[r]; the output has room for 15 more at its end. */
EXPORT void assay_above_fill(const float *h, i64 n, i64 width, i32 first, const float *b, const float *bounds,
                             const i64 *starts, const i64 *count, float *values, i32 *latents, int threads) {
#pragma omp parallel for schedule(static) num_threads(crew(n * width, threads))
    for (i64 r = 0; r < n; r++) {
        /* `take` writes past its end, where another thread's row begins: the last span goes through a buffer. */
        float v[SPAN + 16];
        i32 f[SPAN + 16];
        i64 at = starts[r];
        const i64 end = at + count[r];
        for (i64 j = 0; j < width && at < end; j += SPAN) {
            if (end - at >= SPAN + 16) {
                at += take(h + r * width, b, bounds, 0, j, width, first, values + at, latents + at);
            } else {
                const i64 got = take(h + r * width, b, bounds, 0, j, width, first, v, f);
                memcpy(values + at, v, 4 * (size_t)got);
                memcpy(latents + at, f, 4 * (size_t)got);
                at += got;
            }
        }
    }
}

/* Pairs that lie tile by tile, put row by row: row r of tile t is count[t n + r] pairs from starts[t n + r]. */
EXPORT void assay_merge(i64 n, i64 tiles, const i64 *starts, const i64 *count, const i64 *offsets, const float *values,
                        const i32 *latents, float *to_values, i32 *to_latents, int threads) {
#pragma omp parallel for schedule(static) num_threads(crew(offsets[n], threads))
    for (i64 r = 0; r < n; r++) {
        i64 at = offsets[r];
        for (i64 t = 0; t < tiles; t++) {
            const i64 c = count[t * n + r], from = starts[t * n + r];
            memcpy(to_values + at, values + from, 4 * (size_t)c);
            memcpy(to_latents + at, latents + from, 4 * (size_t)c);
            at += c;
        }
    }
}

/* Every `stride`-th positive h + b of a tile; returns how many. */
EXPORT i64 assay_sample(const float *h, i64 size, i64 width, const float *b, i64 stride, float *values) {
    i64 n = 0;
    for (i64 i = 0; i < size; i += stride) {
        const float v = h[i] + b[i % width];
        values[n] = v;
        n += v > 0;
    }
    return n;
}

EXPORT float assay_kth_bound(const float *values, i64 n, i64 k) { return kth_bound(values, n, k); }

/* Keep the `total` largest pairs of all rows in place, ties in favour of the earlier; offsets follow. */
EXPORT void assay_keep_total(i64 n, i64 total, i64 *offsets, float *values, i32 *latents) {
    const i64 pairs = offsets[n];
    if (pairs <= total) return;
    const float bound = kth_bound(values, pairs, total);
    i64 ties = total, kept = 0, from = 0;
    for (i64 i = 0; i < pairs; i++) ties -= values[i] > bound;
    for (i64 r = 0; r < n; r++) {
        const i64 to = offsets[r + 1];
        for (i64 i = from; i < to; i++) {
            const float v = values[i];
            const i32 f = latents[i];
            const int tie = v == bound && ties > 0;
            values[kept] = v;
            latents[kept] = f;
            kept += v > bound || tie;
            ties -= tie;
        }
        from = to;
        offsets[r + 1] = kept;
    }
}

/* The first row with a NaN or an infinity, or -1. */
EXPORT i64 assay_first_bad_row(const float *x, i64 n, i64 d) {
    for (i64 r = 0; r < n; r++) {
        float s = 0;
#pragma omp simd reduction(+ : s)
        for (i64 j = 0; j < d; j++) s += x[r * d + j] * 0.0f;
        if (s != 0) return r;
    }
    return -1;
}

/* ---- decoding ----------------------------------------------------------------------------------------------------*/

/* out += sum over i of coefficient[i] * row index[i] of `rows` (modulo n_rows), four rows at a time. */
static inline void add_rows(float *restrict out, const float *restrict rows, i64 d, const i32 *index, const float *c,
                            i64 n, i32 n_rows) {
    i64 i = 0;
    for (; i + 4 <= n; i += 4) {
        const float *restrict p[4];
        for (int q = 0; q < 4; q++) p[q] = rows + (i64)(index[i + q] < n_rows ? index[i + q] : index[i + q] % n_rows) * d;
        const float *restrict p0 = p[0], *restrict p1 = p[1], *restrict p2 = p[2], *restrict p3 = p[3];
        const float c0 = c[i], c1 = c[i + 1], c2 = c[i + 2], c3 = c[i + 3];
#pragma omp simd
        for (i64 j = 0; j < d; j++) out[j] += (c0 * p0[j] + c1 * p1[j]) + (c2 * p2[j] + c3 * p3[j]);
    }
    for (; i < n; i++) {
        const float *restrict p = rows + (i64)(index[i] < n_rows ? index[i] : index[i] % n_rows) * d;
        const float c0 = c[i];
#pragma omp simd
        for (i64 j = 0; j < d; j++) out[j] += c0 * p[j];
    }
}

/* out[i] = y . row index[i] of W, four at a time. */
static inline void dot_rows(float *restrict out, const float *restrict y, const float *restrict W, i64 m,
                            const i32 *index, i64 n) {
    i64 i = 0;
    for (; i + 4 <= n; i += 4) {
        const float *restrict p0 = W + index[i] * m, *restrict p1 = W + index[i + 1] * m;
        const float *restrict p2 = W + index[i + 2] * m, *restrict p3 = W + index[i + 3] * m;
        float s0 = 0, s1 = 0, s2 = 0, s3 = 0;
#pragma omp simd reduction(+ : s0, s1, s2, s3)
        for (i64 j = 0; j < m; j++) {
            s0 += y[j] * p0[j];
            s1 += y[j] * p1[j];
            s2 += y[j] * p2[j];
            s3 += y[j] * p3[j];
        }
        out[i] = s0, out[i + 1] = s1, out[i + 2] = s2, out[i + 3] = s3;
    }
    for (; i < n; i++) {
        const float *restrict p = W + index[i] * m;
        float s = 0;
#pragma omp simd reduction(+ : s)
        for (i64 j = 0; j < m; j++) s += y[j] * p[j];
        out[i] = s;
    }
}

EXPORT void assay_decode(const i64 *offsets, const i32 *latents, const float *values, i64 n, const float *W, i64 m,
                         const float *bias, float *out, int threads) {
#pragma omp parallel for schedule(static) num_threads(crew(offsets[n] * m, threads))
    for (i64 r = 0; r < n; r++) {
        const i64 from = offsets[r];
        memcpy(out + r * m, bias, 4 * (size_t)m);
        add_rows(out + r * m, W, m, latents + from, values + from, offsets[r + 1] - from, INT32_MAX);
    }
}

/* out[p] = R[rows[p]] . W[latents[p]]; rows that follow each other and are equal share their row of R. */
EXPORT void assay_slopes(const i32 *rows, const i32 *latents, i64 pairs, const float *R, i64 m, const float *W,
                         float *out, int threads) {
    const i64 part = 1024, parts = (pairs + part - 1) / part;
#pragma omp parallel for schedule(static) num_threads(crew(pairs * m, threads))
    for (i64 t = 0; t < parts; t++) {
        const i64 end = (t + 1) * part < pairs ? (t + 1) * part : pairs;
        for (i64 i = t * part; i < end;) {
            i64 to = i + 1;
            while (to < end && rows[to] == rows[i]) to++;
            dot_rows(out + i, R + (i64)rows[i] * m, W, m, latents + i, to - i);
            i = to;
        }
    }
}

/* R = scale (decode - target), the slopes of the pairs under R, and each row's sum of squares of decode - target. */
EXPORT void assay_residual(const i64 *offsets, const i32 *latents, const float *values, i64 n, const float *W, i64 m,
                           const float *bias, const float *target, float scale, float *R, float *slopes, float *squares,
                           int threads) {
#pragma omp parallel for schedule(static) num_threads(crew(offsets[n] * m, threads))
    for (i64 r = 0; r < n; r++) {
        const i64 from = offsets[r], c = offsets[r + 1] - from;
        float *restrict row = R + r * m;
        const float *restrict y = target + r * m;
        float s = 0;
#pragma omp simd
        for (i64 j = 0; j < m; j++) row[j] = bias[j] - y[j];
        add_rows(row, W, m, latents + from, values + from, c, INT32_MAX);
#pragma omp simd reduction(+ : s)
        for (i64 j = 0; j < m; j++) {
            s += row[j] * row[j];
            row[j] *= scale;
        }
        squares[r] = s;
        dot_rows(slopes + from, row, W, m, latents + from, c);
    }
}

/* ---- gradients and update ----------------------------------------------------------------------------------------*/

/* Counting sort of pairs by latent, stable. offsets has F + 1 places. */
EXPORT void assay_by_latent(const i32 *rows, const i32 *latents, const float *values, const float *slopes, i64 pairs,
                            i64 F, i64 *offsets, i32 *to_rows, float *to_values, float *to_slopes) {
    memset(offsets, 0, sizeof(i64) * (size_t)(F + 1));
    for (i64 p = 0; p < pairs; p++) offsets[latents[p]]++;
    i64 sum = 0;
    for (i64 f = 0; f <= F; f++) {
        const i64 c = offsets[f];
        offsets[f] = sum;
        sum += c;
    }
    for (i64 p = 0; p < pairs; p++) {
        const i64 at = offsets[latents[p]]++;
        to_rows[at] = rows[p];
        to_values[at] = values[p];
        to_slopes[at] = slopes[p];
    }
    memmove(offsets + 1, offsets, sizeof(i64) * (size_t)F);
    offsets[0] = 0;
}

typedef struct {
    const i64 *offsets;
    const i32 *rows;
    const float *values, *slopes, *R, *X, *pull, *shift;
    i64 F, m, d;
    i32 n_x;
} Grouped;

/* The gradients of latent f from its pairs; returns that of the encoder's bias. */
static inline float form(const Grouped *g, i64 f, const float *w_dec, float *restrict dec, float *restrict enc) {
    const i64 from = g->offsets[f], c = g->offsets[f + 1] - from, m = g->m, d = g->d;
    const float pull = g->pull ? g->pull[f] : 0;
    float bias = 0;
    for (i64 i = from; i < from + c; i++) bias += g->slopes[i];
    if (pull != 0)
        for (i64 j = 0; j < m; j++) dec[j] = pull * w_dec[j];
    else
        memset(dec, 0, 4 * (size_t)m);
    if (g->shift && bias != 0)
        for (i64 j = 0; j < d; j++) enc[j] = -bias * g->shift[j];
    else
        memset(enc, 0, 4 * (size_t)d);
    add_rows(dec, g->R, m, g->rows + from, g->values + from, c, INT32_MAX);
    add_rows(enc, g->X, d, g->rows + from, g->slopes + from, c, g->n_x);
    return bias;
}

EXPORT void assay_gradients(const i64 *offsets, const i32 *rows, const float *values, const float *slopes, i64 F,
                            const float *R, i64 m, const float *X, i64 d, i64 n_x, const float *pull, const float *shift,
                            const float *W_dec, float *g_dec, float *g_enc, float *g_b, int threads) {
    const Grouped g = {offsets, rows, values, slopes, R, X, pull, shift, F, m, d, (i32)n_x};
#pragma omp parallel for schedule(dynamic, 32) num_threads(crew(offsets[F] * (m + d), threads))
    for (i64 f = 0; f < F; f++) g_b[f] = form(&g, f, pull ? W_dec + f * m : NULL, g_dec + f * m, g_enc + f * d);
}

typedef struct {
    float keep1, keep2, add1, add2, rate, root2, eps; /* beta1, beta2, 1 - beta1, 1 - beta2, lr / (1 - beta1^t), ... */
} Adam;

static inline void adam(const Adam *a, float *restrict w, float *restrict first, float *restrict second,
                        const float *restrict g, i64 n) {
    const float keep1 = a->keep1, keep2 = a->keep2, add1 = a->add1, add2 = a->add2;
    const float rate = a->rate, root2 = 1 / a->root2, eps = a->eps;
#pragma omp simd
    for (i64 j = 0; j < n; j++) {
        const float u = keep1 * first[j] + add1 * g[j];
        const float v = keep2 * second[j] + add2 * g[j] * g[j];
        first[j] = u;
        second[j] = v;
        w[j] -= rate * u / (sqrtf(v) * root2 + eps);
    }
}

static inline float dot(const float *restrict a, const float *restrict b, i64 n) {
    float s = 0;
#pragma omp simd reduction(+ : s)
    for (i64 j = 0; j < n; j++) s += a[j] * b[j];
    return s;
}

/* Gradient and Adam for each latent in turn, in the L1 cache. `parts` has ceil(F / BLOCK) rows of d places.
   Returns 0, or 1 where memory ran out (before anything was written). */
EXPORT int assay_update(const i64 *offsets, const i32 *rows, const float *values, const float *slopes, i64 F,
                        const float *R, i64 m, const float *X, i64 d, i64 n_x, const float *pull, const float *shift,
                        const float *settings, int unit_norm, float *W_dec, float *W_enc, float *b_enc, float *m_dec,
                        float *v_dec, float *m_enc, float *v_enc, float *m_b, float *v_b, float *g_b, float *parts,
                        float *pulled, int threads) {
    const Grouped g = {offsets, rows, values, slopes, R, X, pull, shift, F, m, d, (i32)n_x};
    const Adam a = {settings[0], settings[1], settings[2], settings[3], settings[4], settings[5], settings[6]};
    const i64 blocks = (F + BLOCK - 1) / BLOCK, line = (m + d + 32) / 16 * 16;
    float *scratch = malloc(4 * (size_t)line * (size_t)threads);
    i64 next = 0;
    if (!scratch) return 1;
    memset(parts, 0, 4 * (size_t)(blocks * d));
#pragma omp parallel for schedule(static, 1) num_threads(crew((F + offsets[F]) * (m + d), threads))
    for (int t = 0; t < threads; t++) {
        float *dec = scratch + t * line, *enc = dec + (m + 15) / 16 * 16;
        for (;;) {
            i64 block; /* taken in turn: which thread does a block changes nothing in it */
#pragma omp atomic capture
            block = next++;
            if (block >= blocks) break;
            const i64 end = (block + 1) * BLOCK < F ? (block + 1) * BLOCK : F;
            for (i64 f = block * BLOCK; f < end; f++) {
                float *restrict w = W_dec + f * m, *restrict e = W_enc + f * d, *restrict part = parts + block * d;
                const float bias = form(&g, f, w, dec, enc);
                if (bias != 0)
                    for (i64 j = 0; j < d; j++) part[j] += bias * e[j];
                if (unit_norm) {
                    const float along = dot(dec, w, m);
                    for (i64 j = 0; j < m; j++) dec[j] -= along * w[j];
                }
                adam(&a, w, m_dec + f * m, v_dec + f * m, dec, m);
                if (unit_norm) {
                    const float norm = sqrtf(dot(w, w, m));
                    const float by = norm > 0 ? 1 / norm : 1;
                    for (i64 j = 0; j < m; j++) w[j] *= by;
                }
                adam(&a, e, m_enc + f * d, v_enc + f * d, enc, d);
                g_b[f] = bias;
                adam(&a, b_enc + f, m_b + f, v_b + f, &bias, 1);
            }
        }
    }
    free(scratch);
    memset(pulled, 0, 4 * (size_t)d);
    for (i64 block = 0; block < blocks; block++)
        for (i64 j = 0; j < d; j++) pulled[j] += parts[block * d + j];
    return 0;
}

EXPORT i32 assay_version(void) { return 1; }
