/* Attention of many queries with AVX-512 BF16, for bfloat16 keys and values: as `attend` (attention.h), with products of
 * rows side by side. Sums run in another order than there, but in the same one for any number of queries.
 */
#pragma once
#include "layer.h"
#include "kernels.h"

#ifdef ROWS_SIDE_BY_SIDE

/* Whether heads and cache are made for it. */
static inline int takes_many_queries(const Model *model, Stored from) {
    return from.format == BFLOAT16 && model->d_head % STRIP == 0;
}

/* Values (KEYS, D) of 32 numbers from d on, pairs of keys side by side: out (KEYS / 2, 2, 16, 2). */
static inline void lay_values(const bf16 *values, int D, int d, __m512i *out) {
    const __m512i steps = _mm512_set_epi32(15, 14, 13, 12, 11, 10, 9, 8, 7, 6, 5, 4, 3, 2, 1, 0);
    const __m512i first = _mm512_or_si512(steps, _mm512_slli_epi32(_mm512_add_epi32(steps, _mm512_set1_epi32(32)), 16));
    const __m512i second = _mm512_add_epi16(first, _mm512_set1_epi16(16));
    for (int k = 0; k < KEYS; k += 2, out += 2) {
        const __m512i even = _mm512_loadu_si512(values + k * D + d), odd = _mm512_loadu_si512(values + (k + 1) * D + d);
        _mm512_storeu_si512(out, _mm512_permutex2var_epi16(even, first, odd));
        _mm512_storeu_si512(out + 1, _mm512_permutex2var_epi16(even, second, odd));
    }
}

/* As `attend_head` (layer.h). */
static int64_t attend_many(const Place *at, int row, int head, int t0, int T) {
    const Model *model = at->model;
    const Step *step = at->step;
    const int D = model->d_head, G = model->n_kv_heads, g = head * G / model->n_heads, C = model->d_model;
    const int stored = step->row_length[row] + t0 + T, token = at->first[row] + t0, n_slices = D / STRIP;
    const float slope = model->slopes ? model->slopes[head] : 0, scale = model->softmax_scale;
    const float key_norm = step->key_norm[row][at->layer * G + g], tail = slope > 0 ? 1.0f / (1.0f - exp_(-slope)) : 0;
    const Stored from = stored_of(model, step, at->layer, row, g);
    _Alignas(64) bf16 queries[T * D], shares[T * KEYS], end[2][KEYS * D];
    _Alignas(64) float scores[KEYS / STRIP][T * STRIP], acc[n_slices][T * STRIP];
    __m512i laid[D > KEYS ? D : KEYS];
    float best[T], total[T], bound[T];
    int64_t n_read = 0;
    int n_open = T;
    memset(acc, 0, sizeof(float) * n_slices * T * STRIP);
    for (int t = 0; t < T; t++) {
        narrow_all(at->qkv + (size_t)(token + t) * at->width + head * D, D, queries + t * D);
        float square = 0;
        for (int d = 0; d < D; d++) square += wide(queries[t * D + d]) * wide(queries[t * D + d]);
        best[t] = -1e30f, total[t] = 0, bound[t] = sqrtf(square) * 1.0001f * key_norm * scale;
    }
    for (int start = (stored - 1) / KEYS * KEYS; start >= 0 && n_open; start -= KEYS) {
        const bf16 *keys = (const bf16 *)from.keys + (size_t)start * D, *values = (const bf16 *)from.values + (size_t)start * D;
        if (stored - start < KEYS) { /* behind the last key there is anything */
            memset(end, 0, sizeof *end * 2);
            memcpy(end[0], keys, (size_t)(stored - start) * D * 2), memcpy(end[1], values, (size_t)(stored - start) * D * 2);
            keys = end[0], values = end[1];
        }
        for (int i = 0; i < KEYS / STRIP; i++) {
            lay_side_by_side(keys + i * STRIP * D, D, D, laid);
            multiply_strip(laid, queries, D, T, D, 1, scores[i]);
        }
        for (int t = 0; t < T; t++) {
            const int own = stored - T + t; /* the query's position, and the last key that it may see */
            const int n = own + 1 - start < KEYS ? own + 1 - start : KEYS;
            if (n <= 0 || total[t] < 0) {
                memset(shares + t * KEYS, 0, KEYS * sizeof *shares);
                continue;
            }
            _Alignas(64) float weights[KEYS];
            for (int i = 0; i < KEYS / STRIP; i++) memcpy(weights + i * STRIP, scores[i] + t * STRIP, sizeof(float) * STRIP);
            for (int j = 0; j < KEYS; j++) {
                const float score = weights[j] * scale - slope * (own - start - j);
                weights[j] = j < n ? score : -1e30f;
            }
            const float top = largest_of(weights, KEYS, best[t]);
            float sum = 0;
            if (top > best[t]) {
                const float shrink = exp_(best[t] - top);
                best[t] = top, total[t] *= shrink;
                for (int i = 0; i < n_slices; i++)
                    for (int d = 0; d < STRIP; d++) acc[i][t * STRIP + d] *= shrink;
            }
            for (int j = 0; j < KEYS; j++) weights[j] = exp_(weights[j] - top), sum += weights[j];
            total[t] += sum;
            narrow_all(weights, KEYS, shares + t * KEYS);
            n_read += n;
        }
        for (int i = 0; i < n_slices; i++) {
            lay_values(values, D, i * STRIP, laid);
            multiply_strip(laid, shares, KEYS, T, KEYS, 0, acc[i]);
        }
        for (int t = 0; t < T; t++) {
            const int own = stored - T + t;
            if (own < start || total[t] < 0) continue;
            const float rest = bound[t] - slope * (own - start + 1) - best[t];
            if (slope > 0 && rest < 0 && exp_(rest) * tail < step->drop * total[t]) {
                total[t] = -total[t]; /* the sign says that this query is finished */
                n_open--;
            }
        }
    }
    for (int t = 0; t < T; t++) {
        const float factor = 1.0f / __builtin_fabsf(total[t]);
        float *out = at->mixed + (size_t)(token + t) * C + head * D;
        for (int d = 0; d < D; d++) out[d] = acc[d / STRIP][t * STRIP + d % STRIP] * factor;
    }
    return n_read;
}

#endif
