/* Attention of one head of one row for few queries, of up to MAX_TOKENS; tiles_prompt.c has its own for many, in tiles.
 *
 *   dots, dots_float, dots_int8    scores: a query times keys
 *   add, add_float, add_int8       weights times values
 *   attend                         both, block by block, from the newest key to the oldest
 *
 * Keys and values are stored in the model's format, or in int8 with one scale for each head and position. Queries are
 * rounded beside bfloat16 alone, weights never. float16 becomes float32 by blocks, once for all queries.
 */
#pragma once
#include "common.h"

enum { KEYS = 64 }; /* weighed at once */

#if AVX512
static inline __m512 widened(const int8_t *from) { /* 16 of them */
    return _mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(_mm_loadu_si128((const __m128i *)from)));
}
#endif

/* q.k of one query and n <= KEYS keys (n, D); `out` has room for a multiple of four. */
static inline void dots(const bf16 *query, const bf16 *keys, int n, int D, float *out) {
#if AVX512_BF16
    for (int j = 0; j < n; j += 4) { /* four sums at a time hide the latency of each */
        const bf16 *k0 = keys + (size_t)j * D, *k1 = j + 1 < n ? k0 + D : k0, *k2 = j + 2 < n ? k1 + D : k0,
                   *k3 = j + 3 < n ? k2 + D : k0;
        __m512 s0 = _mm512_setzero_ps(), s1 = s0, s2 = s0, s3 = s0;
        for (int d = 0; d < D; d += 32) {
            const __mmask32 mask = D - d >= 32 ? 0xffffffff : ((__mmask32)1 << (D - d)) - 1;
            const int is_whole = D - d >= 32; /* nothing is fetched ahead of loads under a mask */
#define LOAD(from) ((__m512bh)(is_whole ? _mm512_loadu_si512(from) : _mm512_maskz_loadu_epi16(mask, from)))
            const __m512bh q = LOAD(query + d);
            s0 = _mm512_dpbf16_ps(s0, LOAD(k0 + d), q), s1 = _mm512_dpbf16_ps(s1, LOAD(k1 + d), q);
            s2 = _mm512_dpbf16_ps(s2, LOAD(k2 + d), q), s3 = _mm512_dpbf16_ps(s3, LOAD(k3 + d), q);
#undef LOAD
        }
        _mm_storeu_ps(out + j, sums_of(s0, s1, s2, s3));
    }
#else
    for (int j = 0; j < n; j++) {
        float dot = 0;
        for (int d = 0; d < D; d++) dot += wide(query[d]) * wide(keys[(size_t)j * D + d]);
        out[j] = dot;
    }
#endif
}

/* The same for float32. */
static inline void dots_float(const float *query, const float *keys, int n, int D, float *out) {
    for (int j = 0; j < n; j += 4) {
        const float *k0 = keys + (size_t)j * D, *k1 = j + 1 < n ? k0 + D : k0, *k2 = j + 2 < n ? k1 + D : k0,
                    *k3 = j + 3 < n ? k2 + D : k0;
#if AVX512
        __m512 s0 = _mm512_setzero_ps(), s1 = s0, s2 = s0, s3 = s0;
        for (int d = 0; d < D; d += 16) {
            const __mmask16 mask = D - d >= 16 ? 0xffff : ((__mmask16)1 << (D - d)) - 1;
            const int is_whole = D - d >= 16;
#define LOAD(from) (is_whole ? _mm512_loadu_ps(from) : _mm512_maskz_loadu_ps(mask, from))
            const __m512 q = LOAD(query + d);
            s0 = _mm512_fmadd_ps(LOAD(k0 + d), q, s0), s1 = _mm512_fmadd_ps(LOAD(k1 + d), q, s1);
            s2 = _mm512_fmadd_ps(LOAD(k2 + d), q, s2), s3 = _mm512_fmadd_ps(LOAD(k3 + d), q, s3);
#undef LOAD
        }
        _mm_storeu_ps(out + j, sums_of(s0, s1, s2, s3));
#else
        float s0 = 0, s1 = 0, s2 = 0, s3 = 0;
        for (int d = 0; d < D; d++)
            s0 += query[d] * k0[d], s1 += query[d] * k1[d], s2 += query[d] * k2[d], s3 += query[d] * k3[d];
        out[j] = s0, out[j + 1] = s1, out[j + 2] = s2, out[j + 3] = s3;
#endif
    }
}

/* The same for int8 keys without their scales; the query as it is. */
static inline void dots_int8(const float *query, const int8_t *keys, int n, int D, float *out) {
#if AVX512
    if (D % 16 == 0) {
        for (int j = 0; j < n; j += 4) {
            const int8_t *k0 = keys + (size_t)j * D, *k1 = j + 1 < n ? k0 + D : k0, *k2 = j + 2 < n ? k1 + D : k0,
                         *k3 = j + 3 < n ? k2 + D : k0;
            __m512 s0 = _mm512_setzero_ps(), s1 = s0, s2 = s0, s3 = s0;
            for (int d = 0; d < D; d += 16) {
                const __m512 q = _mm512_loadu_ps(query + d);
                s0 = _mm512_fmadd_ps(widened(k0 + d), q, s0), s1 = _mm512_fmadd_ps(widened(k1 + d), q, s1);
                s2 = _mm512_fmadd_ps(widened(k2 + d), q, s2), s3 = _mm512_fmadd_ps(widened(k3 + d), q, s3);
            }
            _mm_storeu_ps(out + j, sums_of(s0, s1, s2, s3));
        }
        return;
    }
#endif
    for (int j = 0; j < n; j++) {
        float dot = 0;
        for (int d = 0; d < D; d++) dot += query[d] * keys[(size_t)j * D + d];
        out[j] = dot;
    }
}

/* acc (D) += weights (n) times values (n, D), four values for each pass over acc. The weights that fill up the last
 * four are 0. */
static inline void add(const float *weights, const bf16 *values, int n, int D, float *acc) {
    for (int j = 0; j < n; j += 4) {
        const bf16 *v0 = values + (size_t)j * D, *v1 = j + 1 < n ? v0 + D : v0, *v2 = j + 2 < n ? v1 + D : v0,
                   *v3 = j + 3 < n ? v2 + D : v0;
        const float w0 = weights[j], w1 = weights[j + 1], w2 = weights[j + 2], w3 = weights[j + 3];
        for (int d = 0; d < D; d++) acc[d] += w0 * wide(v0[d]) + w1 * wide(v1[d]) + w2 * wide(v2[d]) + w3 * wide(v3[d]);
    }
}

static inline void add_float(const float *weights, const float *values, int n, int D, float *acc) {
    for (int j = 0; j < n; j += 4) {
        const float *v0 = values + (size_t)j * D, *v1 = j + 1 < n ? v0 + D : v0, *v2 = j + 2 < n ? v1 + D : v0,
                    *v3 = j + 3 < n ? v2 + D : v0;
        const float w0 = weights[j], w1 = weights[j + 1], w2 = weights[j + 2], w3 = weights[j + 3];
        for (int d = 0; d < D; d++) acc[d] += w0 * v0[d] + w1 * v1[d] + w2 * v2[d] + w3 * v3[d];
    }
}

static inline void add_int8(const float *weights, const int8_t *values, int n, int D, float *acc) {
    for (int j = 0; j < n; j += 4) {
        const int8_t *v0 = values + (size_t)j * D, *v1 = j + 1 < n ? v0 + D : v0, *v2 = j + 2 < n ? v1 + D : v0,
                     *v3 = j + 3 < n ? v2 + D : v0;
        const float w0 = weights[j], w1 = weights[j + 1], w2 = weights[j + 2], w3 = weights[j + 3];
        int d = 0;
#if AVX512
        for (; d + 16 <= D; d += 16) {
            __m512 sum = _mm512_mul_ps(_mm512_set1_ps(w0), widened(v0 + d));
            sum = _mm512_fmadd_ps(_mm512_set1_ps(w1), widened(v1 + d), sum);
            sum = _mm512_fmadd_ps(_mm512_set1_ps(w2), widened(v2 + d), sum);
            sum = _mm512_fmadd_ps(_mm512_set1_ps(w3), widened(v3 + d), sum);
            _mm512_storeu_ps(acc + d, _mm512_add_ps(_mm512_loadu_ps(acc + d), sum));
        }
#endif
        for (; d < D; d++) acc[d] += w0 * v0[d] + w1 * v1[d] + w2 * v2[d] + w3 * v3[d];
    }
}

/* Prefetch what is read next: the pieces of a row's cache are too short for the processor to prefetch them by
 * itself. */
static inline void prefetch(const void *from, size_t n_bytes) {
    for (size_t i = 0; i < n_bytes; i += 64) __builtin_prefetch((const char *)from + i);
}

/* One head of one row: T queries (T, D), those of the last T of `stored` positions, each over the keys up to its own.
 * Returns how many keys were read, added up over the queries.
 *
 * Softmax is computed online (Dao et al. 2022): `best` is the best score so far, `total` the sum of e^(score - best),
 * `acc` that of the weighted values; a better score scales both sums down. Blocks of keys are read from the newest to
 * the oldest and begin at multiples of KEYS, so that a query's sums do not depend on how many other queries come with
 * it.
 *
 * ALiBi makes old keys count less. As |q.k| <= |q| max|k|, no key at distance d or more scores above |q| max|k| scale -
 * slope d, and all of them together weigh less than e^(that - best) / (1 - e^-slope). Once that is under `drop` times
 * `total`, the remaining keys are left out.
 *
 * format: that of `from`, a constant. Queries are bf16 beside BFLOAT16, else float. */
static inline __attribute__((always_inline)) int64_t attend(const void *queries, int T, Stored from, int stored, int D,
                                                            float scale, float slope, float key_norm, float drop,
                                                            float *out, int out_stride, const Format format) {
    const int is_int8 = format == INT8_ROWS, is_bf16 = format == BFLOAT16, widens = format == FLOAT16;
    const size_t size = is_int8 ? 1 : number_bytes(format);
    const char *keys = from.keys, *values = from.values;
    float best[MAX_TOKENS], total[MAX_TOKENS], bound[MAX_TOKENS];
    _Alignas(64) float acc[MAX_TOKENS][MAX_HEAD], weights[KEYS];
    _Alignas(64) float wide_keys[widens ? KEYS * D : 1], wide_values[widens ? KEYS * D : 1];
    int64_t n_read = 0;
    int n_open = T;
    for (int t = 0; t < T; t++) {
        float square = 0;
        for (int d = 0; d < D; d++) {
            const float q = is_bf16 ? wide(((const bf16 *)queries)[t * D + d]) : ((const float *)queries)[t * D + d];
            square += q * q, acc[t][d] = 0;
        }
        best[t] = -1e30f, total[t] = 0;
        bound[t] = sqrtf(square) * 1.0001f * key_norm * scale;
    }
    const float tail = slope > 0 ? 1.0f / (1.0f - exp_(-slope)) : 0;
    for (int start = (stored - 1) / KEYS * KEYS; start >= 0 && n_open; start -= KEYS) {
        const char *block_keys = keys + start * size * D, *block_values = values + start * size * D;
        const int n_block = stored - start < KEYS ? stored - start : KEYS;
        prefetch(block_values, n_block * size * D);
        if (is_int8) prefetch(from.value_scales + start, n_block * sizeof(float));
        if (start) prefetch(block_keys - KEYS * size * D, KEYS * size * D);
        if (is_int8 && start) prefetch(from.key_scales + start - KEYS, KEYS * sizeof(float));
        if (widens) {
            widen_halves((const fp16 *)block_keys, n_block * D, wide_keys);
            widen_halves((const fp16 *)block_values, n_block * D, wide_values);
        }
        const float *float_keys = widens ? wide_keys : (const float *)block_keys;
        const float *float_values = widens ? wide_values : (const float *)block_values;
        for (int t = 0; t < T; t++) {
            const int own = stored - T + t; /* the query's position, and the last key that it may see */
            const int n = (own + 1 < start + KEYS ? own + 1 : start + KEYS) - start;
            if (n <= 0 || total[t] < 0) continue;
            float top = best[t], sum = 0;
            if (is_int8) {
                dots_int8((const float *)queries + t * D, (const int8_t *)block_keys, n, D, weights);
                for (int j = 0; j < n; j++) weights[j] *= from.key_scales[start + j];
            } else if (is_bf16) {
                dots((const bf16 *)queries + t * D, (const bf16 *)block_keys, n, D, weights);
            } else {
                dots_float((const float *)queries + t * D, float_keys, n, D, weights);
            }
            for (int j = 0; j < n; j++) weights[j] = weights[j] * scale - slope * (own - start - j);
            top = largest_of(weights, n, top);
            if (top > best[t]) {
                const float shrink = exp_(best[t] - top);
                best[t] = top, total[t] *= shrink;
                for (int d = 0; d < D; d++) acc[t][d] *= shrink;
            }
            for (int j = 0; j < n; j++) weights[j] = exp_(weights[j] - top), sum += weights[j];
            total[t] += sum;
            for (int j = n; j < (n + 3) / 4 * 4; j++) weights[j] = 0;
            if (is_int8) {
                for (int j = 0; j < n; j++) weights[j] *= from.value_scales[start + j];
                add_int8(weights, (const int8_t *)block_values, n, D, acc[t]);
            } else if (is_bf16) {
                add(weights, (const bf16 *)block_values, n, D, acc[t]);
            } else {
                add_float(weights, float_values, n, D, acc[t]);
            }
            n_read += n;
            const float rest = bound[t] - slope * (own - start + 1) - top;
            if (slope > 0 && rest < 0 && exp_(rest) * tail < drop * total[t]) {
                total[t] = -total[t]; /* the sign says that this query is finished */
                n_open--;
            }
        }
    }
    for (int t = 0; t < T; t++) {
        const float factor = 1.0f / __builtin_fabsf(total[t]);
        for (int d = 0; d < D; d++) out[(size_t)t * out_stride + d] = acc[t][d] * factor;
    }
    return n_read;
}
