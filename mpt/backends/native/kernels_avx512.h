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
static inline __m512i dot_codes(__m512i sums, __m512i codes, __m512i x) { /* by way of int16 */
    const __m512i ones = _mm512_set1_epi16(1), low_codes = _mm512_and_si512(codes, _mm512_set1_epi8(15));
    const __m512i high_codes = _mm512_and_si512(_mm512_srli_epi16(codes, 4), _mm512_set1_epi8(15));
    const __m512i low = _mm512_madd_epi16(_mm512_maddubs_epi16(low_codes, x), ones);
    const __m512i high = _mm512_madd_epi16(_mm512_maddubs_epi16(high_codes, x), ones);
    const __m512i found = _mm512_add_epi32(low, _mm512_slli_epi32(high, 4)); /* no sum passes 15 * 127 * 2 */
    return _mm512_add_epi32(sums, found);
}
#endif

#define INT8_AS_IT_IS 1

/* Four sums of int32, each over 16 lanes. */
static inline __m128i four_totals(__m512i s0, __m512i s1, __m512i s2, __m512i s3) {
    const __m512i a = _mm512_add_epi32(_mm512_unpacklo_epi32(s0, s1), _mm512_unpackhi_epi32(s0, s1));
    const __m512i b = _mm512_add_epi32(_mm512_unpacklo_epi32(s2, s3), _mm512_unpackhi_epi32(s2, s3));
    const __m512i ab = _mm512_add_epi32(_mm512_unpacklo_epi64(a, b), _mm512_unpackhi_epi64(a, b));
    const __m256i part = _mm256_add_epi32(_mm512_castsi512_si256(ab), _mm512_extracti64x4_epi64(ab, 1));
    return _mm_add_epi32(_mm256_castsi256_si128(part), _mm256_extracti128_si256(part, 1));
}

/* 64 inputs of four rows of int8 weights and n_tokens tokens, 1 or 2, added to exact sums of both of their numbers. */
static inline __attribute__((always_inline)) void int8_lanes(const int8_t *const *rows, const Coded *tokens, int at, int k,
                                                             int left, const int is_whole, const int n_tokens,
                                                             __m512i (*high)[2], __m512i (*low)[2]) {
    const __mmask64 mask = is_whole ? ~(__mmask64)0 : ((__mmask64)1 << left) - 1;
#define LOAD(from) (is_whole ? _mm512_loadu_si512(from) : _mm512_maskz_loadu_epi8(mask, from))
    __m512i codes[4]; /* + 128 */
    for (int r = 0; r < 4; r++) codes[r] = _mm512_xor_si512(LOAD(rows[r] + k), _mm512_set1_epi8((char)0x80));
    for (int t = 0; t < n_tokens; t++) {
        const __m512i h = LOAD(tokens[t].high + at + k), l = LOAD(tokens[t].low + at + k);
        for (int r = 0; r < 4; r++) {
            high[r][t] = dot_codes(high[r][t], codes[r], h);
            low[r][t] = dot_codes(low[r][t], codes[r], l);
        }
    }
#undef LOAD
}

/* Four rows of int8 weights times n_tokens tokens, 1 or 2; exact up to the last rounding. next: what is fetched
 * meanwhile, or NULL. */
static inline __attribute__((always_inline)) void four_int8_rows(const int8_t *const *rows, int n, const Coded *tokens,
                                                                 int at, __m128 scales, const char *next,
                                                                 const int n_tokens, int is_first, float *sums) {
    __m512i h[4][2], l[4][2];
    for (int r = 0; r < 4; r++)
        for (int t = 0; t < n_tokens; t++) h[r][t] = l[r][t] = _mm512_setzero_si512();
    int k = 0;
    for (; k + 64 <= n; k += 64) {
        for (int i = 0; i < 256 && next; i += 64) _mm_prefetch(next + 4 * k + i, _MM_HINT_T0);
        int8_lanes(rows, tokens, at, k, 0, 1, n_tokens, h, l);
    }
    if (k < n) int8_lanes(rows, tokens, at, k, n - k, 0, n_tokens, h, l);
    for (int t = 0; t < n_tokens; t++) {
        const int32_t *totals = tokens[t].totals + at / CHUNK * 2;
        __m128i high = four_totals(h[0][t], h[1][t], h[2][t], h[3][t]);
        __m128i low = four_totals(l[0][t], l[1][t], l[2][t], l[3][t]);
        high = _mm_sub_epi32(high, _mm_set1_epi32(totals[0] * 128)); /* what the 128 of each code added */
        low = _mm_sub_epi32(low, _mm_set1_epi32(totals[1] * 128));
        const __m128 dots = _mm_fmadd_ps(_mm_cvtepi32_ps(high), _mm_set1_ps(128), _mm_cvtepi32_ps(low));
        const __m128 found = _mm_mul_ps(_mm_mul_ps(dots, scales), _mm_set1_ps(tokens[t].step));
        float *to = sums + t * STRIP;
        _mm_storeu_ps(to, is_first ? found : _mm_add_ps(_mm_loadu_ps(to), found));
    }
}

/* n_rows rows of n int8 weights, `stride` apart, with a scale each, from input `at` on, times T tokens. */
static void multiply_int8(const int8_t *rows, size_t stride, int n_rows, const float *scales, int n, size_t ahead,
                          const Coded *tokens, int at, int T, int is_first, float *sums) {
    for (int r = 0; r < n_rows; r += 4) {
        const int8_t *four[4];
        float own[4];
        for (int i = 0; i < 4; i++) {
            const int row = r + i < n_rows ? r + i : r;
            four[i] = rows + row * stride, own[i] = scales[row];
        }
        const __m128 s = _mm_loadu_ps(own);
        const char *next = (const char *)four[0] + ahead;
        int t = 0;
        for (; t + 2 <= T; t += 2)
            four_int8_rows(four, n, tokens + t, at, s, t ? NULL : next, 2, is_first, sums + t * STRIP + r);
        if (t < T) four_int8_rows(four, n, tokens + t, at, s, t ? NULL : next, 1, is_first, sums + t * STRIP + r);
    }
}

/* 16 x 16 numbers of four bytes with their rows, `stride` bytes apart, made columns, `apart` registers apart. */
static inline void turn(const void *from, size_t stride, __m512i *to, int apart) {
    __m512i r[16], s[16];
    for (int i = 0; i < 16; i++) r[i] = _mm512_loadu_si512((const char *)from + i * stride);
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
