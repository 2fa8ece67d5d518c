/* Products of bfloat16 weights in the compiler's own vectors, for every instruction set that has no file of its own for
 * them: 8 lanes of float32, which the compiler makes of what the processor has. */
#pragma once
#include "kernels_lanes.h"

enum { TOKENS_AT_ONCE = 4 };
typedef float Dense;
static inline Lanes eight(const float *from) {
    Lanes found;
    memcpy(&found, from, sizeof found);
    return found;
}

static inline Lanes eight_wide(const bf16 *from) {
    Narrow narrow_;
    memcpy(&narrow_, from, sizeof narrow_);
    return (Lanes)(__builtin_convertvector(narrow_, Bits) << 16);
}

static inline float sum_of_eight(Lanes s) { return ((s[0] + s[4]) + (s[1] + s[5])) + ((s[2] + s[6]) + (s[3] + s[7])); }

/* The sum of eight lanes and of what is left of a row from k on. Never inlined, so that it rounds in one way for all
 * callers: the compiler may reorder sums. */
static __attribute__((noinline)) float with_the_rest(const Lanes *lanes, const bf16 *w, const float *x, int k, int K) {
    float sum = sum_of_eight(*lanes);
    for (; k < K; k++) sum += wide(w[k]) * x[k];
    return sum;
}

/* Two rows times n_tokens tokens, a constant. */
static inline __attribute__((always_inline)) void two_rows(const bf16 *w0, const bf16 *w1, const Dense *x,
                                                           size_t x_stride, int K, const int n_tokens, int is_first,
                                                           float *sums, float *more) {
    Lanes s0[TOKENS_AT_ONCE] = {0}, s1[TOKENS_AT_ONCE] = {0};
    int k = 0;
    for (; k + 8 <= K; k += 8) {
        const Lanes v0 = eight_wide(w0 + k), v1 = eight_wide(w1 + k);
        for (int t = 0; t < n_tokens; t++) {
            const Lanes xs = eight(x + t * x_stride + k);
            s0[t] += v0 * xs, s1[t] += v1 * xs;
        }
    }
    for (int t = 0; t < n_tokens; t++) {
        const float a = with_the_rest(s0 + t, w0, x + t * x_stride, k, K);
        const float b = with_the_rest(s1 + t, w1, x + t * x_stride, k, K);
        sums[t * STRIP] = is_first ? a : sums[t * STRIP] + a;
        more[t * STRIP] = is_first ? b : more[t * STRIP] + b;
    }
}

/* As said in kernels_avx512.h. */
static void multiply_dense(const bf16 *rows, size_t stride, int n_rows, const Dense *x, size_t x_stride, int T, int K,
                           int is_first, float *sums) {
    float unused[TOKENS_AT_ONCE * STRIP];
    for (int t = 0; t < T; t += TOKENS_AT_ONCE) {
        const Dense *tokens = x + t * x_stride;
        const int n = T - t < TOKENS_AT_ONCE ? T - t : TOKENS_AT_ONCE;
        for (int r = 0; r < n_rows; r += 2) {
            const bf16 *w0 = rows + r * stride, *w1 = r + 1 < n_rows ? w0 + stride : w0;
            float *to = sums + t * STRIP + r, *more = r + 1 < n_rows ? to + 1 : unused;
            if (n == 4) two_rows(w0, w1, tokens, x_stride, K, 4, is_first, to, more);
            if (n == 3) two_rows(w0, w1, tokens, x_stride, K, 3, is_first, to, more);
            if (n == 2) two_rows(w0, w1, tokens, x_stride, K, 2, is_first, to, more);
            if (n == 1) two_rows(w0, w1, tokens, x_stride, K, 1, is_first, to, more);
        }
    }
}

/* A row of codes times T tokens through `dot8`, which each file brings: 32 products of codes and inputs 128 high + low
 * into 8 sums, the first 16 products into the first four of them; exact. */
static inline __attribute__((always_inline)) void multiply_groups(const uint8_t *codes, const float *a, const float *b,
                                                                  int n, const int group, const Coded *tokens, int at,
                                                                  int T, int is_first, float *out) {
    for (int t = 0; t < T; t++) {
        const int8_t *high = tokens[t].high + at, *low = tokens[t].low + at;
        const float *sums = (group == 32 ? tokens[t].sums32 : tokens[t].sums16) + at / group;
        Lanes even = {0}, odd = {0}; /* a sum waits for the one before it */
        for (int k = 0, i = 0; k < n; k += 32, i++) {
            const Lanes dots = __builtin_convertvector(dot8(codes + k, high + k, low + k), Lanes);
            const float a0 = group == 32 ? a[i] : a[2 * i], a1 = group == 32 ? a0 : a[2 * i + 1];
            const Lanes scale = {a0, a0, a0, a0, a1, a1, a1, a1};
            if (i & 1) odd += dots * scale; else even += dots * scale;
        }
        float offset = 0;
        for (int i = 0; i < n / group; i++) offset += b[i] * sums[i];
        const float found = (sum_of_eight(even + odd) - offset) * tokens[t].step;
        float *to = out + (size_t)t * STRIP;
        *to = is_first ? found : *to + found;
    }
}

static void multiply_codes(const uint8_t *codes, const float *a, const float *b, int n, int group, const Coded *tokens,
                           int at, int T, int is_first, float *out) {
    if (group == 32)
        multiply_groups(codes, a, b, n, 32, tokens, at, T, is_first, out);
    else
        multiply_groups(codes, a, b, n, 16, tokens, at, T, is_first, out);
}
