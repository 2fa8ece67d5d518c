/* Products with AVX-512: of bfloat16 by its own instruction where there is one, else in float32 as those of float32 and
 * float16; of codes by VNNI where there is it. */
#pragma once

enum { TOKENS_AT_ONCE = 4 };

#if AVX512_BF16
typedef bf16 Dense;
static const Format DENSE = BFLOAT16;
#else
typedef float Dense;
static const Format DENSE = FLOAT32;
#endif

/* Up to 16 weights of a row from k on. is_whole: none is missing. Loads under a mask are for the end alone: the
 * processor fetches nothing ahead of them, and a matrix was read at half the speed. */
static inline __attribute__((always_inline)) __m512 weights_at(const Format format, const void *row, int k,
                                                               __mmask16 mask, const int is_whole) {
    if (format == FLOAT32) {
        const float *from = (const float *)row + k;
        return is_whole ? _mm512_loadu_ps(from) : _mm512_maskz_loadu_ps(mask, from);
    }
    const uint16_t *from = (const uint16_t *)row + k;
    const __m256i bits = is_whole ? _mm256_loadu_si256((const __m256i *)from) : _mm256_maskz_loadu_epi16(mask, from);
    if (format == FLOAT16) return _mm512_cvtph_ps(bits);
    return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(bits), 16));
}

/* The products of four rows and n_tokens tokens, a constant, at 16 inputs in float32 from k on, `left` of which are
 * there. */
static inline __attribute__((always_inline)) void float_lanes(const Format format, const void *const *rows,
                                                              const float *x, size_t x_stride, int k, int left,
                                                              const int is_whole, const int n_tokens,
                                                              __m512 (*s)[TOKENS_AT_ONCE]) {
    const __mmask16 mask = is_whole ? 0xffff : ((__mmask16)1 << left) - 1;
    __m512 w[4];
    for (int r = 0; r < 4; r++) w[r] = weights_at(format, rows[r], k, mask, is_whole);
    for (int t = 0; t < n_tokens; t++) {
        const float *from = x + t * x_stride + k;
        const __m512 xs = is_whole ? _mm512_loadu_ps(from) : _mm512_maskz_loadu_ps(mask, from);
        for (int r = 0; r < 4; r++) s[r][t] = _mm512_fmadd_ps(w[r], xs, s[r][t]);
    }
}

#if AVX512_BF16
/* The same at 32 inputs in bfloat16, of bfloat16 weights. */
static inline __attribute__((always_inline)) void bf16_lanes(const void *const *rows, const bf16 *x, size_t x_stride,
                                                             int k, int left, const int is_whole, const int n_tokens,
                                                             __m512 (*s)[TOKENS_AT_ONCE]) {
    const __mmask32 mask = is_whole ? 0xffffffff : ((__mmask32)1 << left) - 1;
#define LOAD(from) ((__m512bh)(is_whole ? _mm512_loadu_si512(from) : _mm512_maskz_loadu_epi16(mask, from)))
    __m512bh w[4];
    for (int r = 0; r < 4; r++) w[r] = LOAD((const bf16 *)rows[r] + k);
    for (int t = 0; t < n_tokens; t++) {
        const __m512bh xs = LOAD(x + t * x_stride + k);
        for (int r = 0; r < 4; r++) s[r][t] = _mm512_dpbf16_ps(s[r][t], w[r], xs);
    }
#undef LOAD
}
#endif

/* Four rows (K) times n_tokens tokens, a constant. */
static inline __attribute__((always_inline)) void four_rows(const Format format, const void *const *rows, const void *x,
                                                            size_t x_stride, int K, const int n_tokens, int is_first,
                                                            float *sums) {
    __m512 s[4][TOKENS_AT_ONCE];
    for (int r = 0; r < 4; r++)
        for (int t = 0; t < n_tokens; t++) s[r][t] = _mm512_setzero_ps();
    int k = 0;
#if AVX512_BF16
    if (format == BFLOAT16) {
        for (; k + 32 <= K; k += 32) bf16_lanes(rows, x, x_stride, k, 0, 1, n_tokens, s);
        if (k < K) bf16_lanes(rows, x, x_stride, k, K - k, 0, n_tokens, s);
        k = K;
    }
#endif
    for (; k + 16 <= K; k += 16) float_lanes(format, rows, x, x_stride, k, 0, 1, n_tokens, s);
    if (k < K) float_lanes(format, rows, x, x_stride, k, K - k, 0, n_tokens, s);
    for (int t = 0; t < n_tokens; t++) {
        const __m128 found = sums_of(s[0][t], s[1][t], s[2][t], s[3][t]);
        float *to = sums + t * STRIP;
        _mm_storeu_ps(to, is_first ? found : _mm_add_ps(_mm_loadu_ps(to), found));
    }
}

static inline __attribute__((always_inline)) void multiply_format(const Format format, const void *rows, size_t stride,
                                                                  int n_rows, const void *x, size_t x_stride, int T,
                                                                  int K, int is_first, float *sums) {
    const size_t bytes = number_bytes(format), x_bytes = format == BFLOAT16 ? sizeof(Dense) : sizeof(float);
    for (int t = 0; t < T; t += TOKENS_AT_ONCE) {
        const void *tokens = (const char *)x + t * x_stride * x_bytes;
        const int n = T - t < TOKENS_AT_ONCE ? T - t : TOKENS_AT_ONCE;
        for (int r = 0; r < n_rows; r += 4) {
            const void *four[4];
            for (int i = 0; i < 4; i++) four[i] = (const char *)rows + (r + i < n_rows ? r + i : r) * stride * bytes;
            float *to = sums + t * STRIP + r;
            if (n == 4) four_rows(format, four, tokens, x_stride, K, 4, is_first, to);
            if (n == 3) four_rows(format, four, tokens, x_stride, K, 3, is_first, to);
            if (n == 2) four_rows(format, four, tokens, x_stride, K, 2, is_first, to);
            if (n == 1) four_rows(format, four, tokens, x_stride, K, 1, is_first, to);
        }
    }
}

/* n_rows rows of weights, `stride` numbers apart, times T tokens, `x_stride` apart; K inputs: Dense beside bfloat16,
 * float32 beside float32 and float16. is_first: overwrite the sums, else add to them. */
static void multiply_dense(Format format, const void *rows, size_t stride, int n_rows, const void *x, size_t x_stride,
                           int T, int K, int is_first, float *sums) {
    if (format == FLOAT32) multiply_format(FLOAT32, rows, stride, n_rows, x, x_stride, T, K, is_first, sums);
    if (format == FLOAT16) multiply_format(FLOAT16, rows, stride, n_rows, x, x_stride, T, K, is_first, sums);
    if (format == BFLOAT16) multiply_format(BFLOAT16, rows, stride, n_rows, x, x_stride, T, K, is_first, sums);
}

/* 64 products into 16 sums, added to `sums`; exact. */
#if AVX512_VNNI
static inline __m512i dot_codes(__m512i sums, __m512i codes, __m512i x) { return _mm512_dpbusd_epi32(sums, codes, x); }
#else
static inline __m512i dot_codes(__m512i sums, __m512i codes, __m512i x) { /* codes are signed here */
    const __m512i signed_ = _mm512_mask_sub_epi8(x, _mm512_movepi8_mask(codes), _mm512_setzero_si512(), x);
    const __m512i pairs = _mm512_maddubs_epi16(_mm512_abs_epi8(codes), signed_); /* at most 128 * 127 * 2 */
    return _mm512_add_epi32(sums, _mm512_madd_epi16(pairs, _mm512_set1_epi16(1)));
}
#endif

/* 16 x 16 numbers of four bytes with their rows, `stride` bytes apart, made columns, `apart` registers apart; the bits of
 * `flipped` are changed. */
static inline void turn(const void *from, size_t stride, __m512i flipped, __m512i *to, int apart) {
    __m512i r[16], s[16];
    for (int i = 0; i < 16; i++) r[i] = _mm512_xor_si512(_mm512_loadu_si512((const char *)from + i * stride), flipped);
    for (int i = 0; i < 16; i += 2) s[i] = _mm512_unpacklo_epi32(r[i], r[i + 1]), s[i + 1] = _mm512_unpackhi_epi32(r[i], r[i + 1]);
    for (int i = 0; i < 16; i += 4)
        for (int k = 0; k < 2; k++) {
            r[i + 2 * k] = _mm512_unpacklo_epi64(s[i + k], s[i + k + 2]);
            r[i + 2 * k + 1] = _mm512_unpackhi_epi64(s[i + k], s[i + k + 2]);
        }
    /* r[4 a + c]: of rows 4 a to 4 a + 3, columns c, 4 + c, 8 + c and 12 + c. */
    for (int c = 0; c < 4; c++) {
        const __m512i a = _mm512_shuffle_i32x4(r[c], r[4 + c], 0x88), b = _mm512_shuffle_i32x4(r[8 + c], r[12 + c], 0x88);
        const __m512i d = _mm512_shuffle_i32x4(r[c], r[4 + c], 0xdd), e = _mm512_shuffle_i32x4(r[8 + c], r[12 + c], 0xdd);
        _mm512_storeu_si512(to + c * apart, _mm512_shuffle_i32x4(a, b, 0x88));
        _mm512_storeu_si512(to + (4 + c) * apart, _mm512_shuffle_i32x4(d, e, 0x88));
        _mm512_storeu_si512(to + (8 + c) * apart, _mm512_shuffle_i32x4(a, b, 0xdd));
        _mm512_storeu_si512(to + (12 + c) * apart, _mm512_shuffle_i32x4(d, e, 0xdd));
    }
}

/* Four bytes in all lanes. */
static inline __m512i four_bytes(const void *from) {
    int32_t four;
    memcpy(&four, from, 4);
    return _mm512_set1_epi32(four);
}

#include "kernels_avx512_codes.h"
#if AVX512_BF16
#include "kernels_avx512_prompt.h"
#endif
