/* Products of bfloat16 weights with many tokens, with AVX-512 BF16: two registers of sixteen rows side by side, twelve
 * tokens at a time. A pair of a token's inputs is then one operand for all lanes, and no sum has lanes to be added up.
 */
#pragma once

#define ROWS_SIDE_BY_SIDE 1

enum { SIDE_INPUTS = 512, SIDE_TOKENS = 12 }; /* of a strip that is laid out at once, 32 KB; and 24 sums in registers */

/* A strip of n inputs, a multiple of 32, of its rows, `stride` numbers apart: out (n / 2, STRIP / 16, 16, 2). */
static void lay_side_by_side(const bf16 *rows, size_t stride, int n, __m512i *out) {
    for (int panel = 0; panel < STRIP / 16; panel++)
        for (int k = 0; k < n; k += 32)
            turn(rows + panel * 16 * stride + k, stride * sizeof *rows, _mm512_setzero_si512(), out + k + panel, STRIP / 16);
}

/* A strip that is laid out times n_tokens tokens, a constant, x_stride apart: sums (tokens, STRIP). */
static inline __attribute__((always_inline)) void some_side_tokens(const __m512i *strip, const bf16 *x, size_t x_stride,
                                                                   int n, const int n_tokens, int is_first,
                                                                   float *sums) {
    __m512 first[SIDE_TOKENS], second[SIDE_TOKENS];
#pragma GCC unroll 12
    for (int t = 0; t < n_tokens; t++) {
        first[t] = is_first ? _mm512_setzero_ps() : _mm512_loadu_ps(sums + t * STRIP);
        second[t] = is_first ? _mm512_setzero_ps() : _mm512_loadu_ps(sums + t * STRIP + 16);
    }
    for (int k = 0; k < n; k += 2, strip += 2) {
        const __m512bh w0 = (__m512bh)_mm512_loadu_si512(strip), w1 = (__m512bh)_mm512_loadu_si512(strip + 1);
#pragma GCC unroll 12
        for (int t = 0; t < n_tokens; t++) {
            const __m512bh pair = (__m512bh)four_bytes(x + t * x_stride + k);
            first[t] = _mm512_dpbf16_ps(first[t], w0, pair), second[t] = _mm512_dpbf16_ps(second[t], w1, pair);
        }
    }
#pragma GCC unroll 12
    for (int t = 0; t < n_tokens; t++) {
        _mm512_storeu_ps(sums + t * STRIP, first[t]), _mm512_storeu_ps(sums + t * STRIP + 16, second[t]);
    }
}

/* The same times any number of tokens. */
static void multiply_strip(const __m512i *strip, const bf16 *x, size_t x_stride, int T, int n, int is_first,
                           float *sums) {
    int t = 0;
#define OF(n_tokens)                                                                                                   \
    for (; t + n_tokens <= T; t += n_tokens)                                                                           \
        some_side_tokens(strip, x + t * x_stride, x_stride, n, n_tokens, is_first, sums + (size_t)t * STRIP);
    OF(12) OF(6) OF(3) OF(1)
#undef OF
}

/* A whole strip of rows, `stride` numbers apart, times T tokens; n inputs, a multiple of 32. room: of SIDE_ROOM. */
static void multiply_side_by_side(const bf16 *rows, size_t stride, const bf16 *x, size_t x_stride, int T, int n,
                                  int is_first, void *room, float *sums) {
    for (int k = 0; k < n; k += SIDE_INPUTS) {
        const int here = n - k < SIDE_INPUTS ? n - k : SIDE_INPUTS;
        lay_side_by_side(rows + k, stride, here, room);
        multiply_strip(room, x + k, x_stride, T, here, is_first && !k, sums);
    }
}
