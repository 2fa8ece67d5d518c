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
#if defined(__AVX512VNNI__)
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

enum { SPAN_CODES = 256 }; /* codes of a row whose scales are loaded together */

/* The scales of one span, and its codes in four registers. */
typedef struct {
    __m512i codes[4];
    __m512 scales, offsets; /* (groups) */
} Span;

/* Up to 256 codes of one row times n_tokens tokens, a constant, added to two sums a token. is_whole: none is missing. */
static inline __attribute__((always_inline)) void one_span(const Span *span, const int group, const Coded *tokens, int at,
                                                           int left, const int is_whole, const int n_tokens,
                                                           __m512 *even, __m512 *odd) {
    const __m512i lanes = _mm512_set_epi32(15, 14, 13, 12, 11, 10, 9, 8, 7, 6, 5, 4, 3, 2, 1, 0);
    const __m512i first = _mm512_srli_epi32(lanes, group == 32 ? 3 : 2); /* the group of each lane of 64 codes */
    const __mmask16 mask = (1u << left / group) - 1;
    for (int t = 0; t < n_tokens; t++) {
        const float *sums = group == 32 ? tokens[t].sums32 + at / 32 : tokens[t].sums16 + at / 16;
        odd[t] = _mm512_fnmadd_ps(span->offsets, _mm512_maskz_loadu_ps(mask, sums), odd[t]);
    }
#pragma GCC unroll 4
    for (int i = 0; i < SPAN_CODES; i += 64) {
        if (!is_whole && left <= i) break;
        const __mmask64 bytes = left - i >= 64 ? ~(__mmask64)0 : ((__mmask64)1 << (left - i)) - 1;
        const __m512i which = _mm512_add_epi32(first, _mm512_set1_epi32(i / group));
        const __m512 factor = _mm512_permutexvar_ps(which, span->scales);
        for (int t = 0; t < n_tokens; t++) {
#define LOAD(from) (is_whole ? _mm512_loadu_si512(from) : _mm512_maskz_loadu_epi8(bytes, from))
            const __m512i high = LOAD(tokens[t].high + at + i), low = LOAD(tokens[t].low + at + i);
#undef LOAD
            const __m512i of_high = _mm512_slli_epi32(dot_codes(_mm512_setzero_si512(), span->codes[i / 64], high), 7);
            const __m512 dots = _mm512_cvtepi32_ps(dot_codes(of_high, span->codes[i / 64], low));
            if (i & 64)
                odd[t] = _mm512_fmadd_ps(dots, factor, odd[t]);
            else
                even[t] = _mm512_fmadd_ps(dots, factor, even[t]);
        }
    }
}

/* A span out of memory; `left` codes of it are there. */
static inline __attribute__((always_inline)) Span span_at(const uint8_t *codes, const float *a, const float *b,
                                                          const int group, int left, const int is_whole) {
    const __mmask16 mask = (1u << left / group) - 1;
    Span span = {.scales = _mm512_maskz_loadu_ps(mask, a), .offsets = _mm512_maskz_loadu_ps(mask, b)};
    for (int i = 0; i < 4; i++) {
        const int here = left - 64 * i;
        const __mmask64 bytes = here >= 64 ? ~(__mmask64)0 : here > 0 ? ((__mmask64)1 << here) - 1 : 0;
        span.codes[i] = is_whole ? _mm512_loadu_si512(codes + 64 * i) : _mm512_maskz_loadu_epi8(bytes, codes + 64 * i);
    }
    return span;
}

/* One row of n codes times n_tokens tokens, a constant; `at`: the first input. */
static inline __attribute__((always_inline)) void one_row(const uint8_t *codes, const float *a, const float *b, int n,
                                                          const int group, const Coded *tokens, int at,
                                                          const int n_tokens, float *out) {
    __m512 even[TOKENS_AT_ONCE], odd[TOKENS_AT_ONCE];
    for (int t = 0; t < n_tokens; t++) even[t] = odd[t] = _mm512_setzero_ps();
    int k = 0;
    for (; k + SPAN_CODES <= n; k += SPAN_CODES) {
        const Span span = span_at(codes + k, a + k / group, b + k / group, group, SPAN_CODES, 1);
        one_span(&span, group, tokens, at + k, SPAN_CODES, 1, n_tokens, even, odd);
    }
    if (k < n) {
        const Span span = span_at(codes + k, a + k / group, b + k / group, group, n - k, 0);
        one_span(&span, group, tokens, at + k, n - k, 0, n_tokens, even, odd);
    }
    for (int t = 0; t < n_tokens; t++)
        out[t * STRIP] = _mm512_reduce_add_ps(_mm512_add_ps(even[t], odd[t])) * tokens[t].step;
}

/* A row of n codes with its scales a and offsets b, from input `at` on, times T tokens; sums to out[token * STRIP]. */
static void multiply_codes(const uint8_t *codes, const float *a, const float *b, int n, int group, const Coded *tokens,
                           int at, int T, int is_first, float *out) {
    float found[TOKENS_AT_ONCE * STRIP];
    for (int t = 0; t < T; t += TOKENS_AT_ONCE) {
        const int here = T - t < TOKENS_AT_ONCE ? T - t : TOKENS_AT_ONCE;
#define OF_GROUP(group)                                                             \
    if (here == 4) one_row(codes, a, b, n, group, tokens + t, at, 4, found);        \
    if (here == 3) one_row(codes, a, b, n, group, tokens + t, at, 3, found);        \
    if (here == 2) one_row(codes, a, b, n, group, tokens + t, at, 2, found);        \
    if (here == 1) one_row(codes, a, b, n, group, tokens + t, at, 1, found)
        if (group == 32) {
            OF_GROUP(32);
        } else {
            OF_GROUP(16);
        }
#undef OF_GROUP
        for (int i = 0; i < here; i++) {
            float *to = out + (size_t)(t + i) * STRIP;
            *to = is_first ? found[i * STRIP] : *to + found[i * STRIP];
        }
    }
}

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

#define BLOCKS_AS_THEY_ARE 1 /* most formats go from their blocks to registers, for few tokens */

static inline __m512i two_halves(__m256i low, __m256i high) {
    return _mm512_inserti64x4(_mm512_castsi256_si512(low), high, 1);
}

static inline __m256i at_256(const uint8_t *from) { return _mm256_loadu_si256((const __m256i *)from); }

/* 16 bytes each of two places. */
static inline __m256i two_places(const uint8_t *one, const uint8_t *other) {
    const __m256i first = _mm256_castsi128_si256(_mm_loadu_si128((const __m128i *)one));
    return _mm256_inserti128_si256(first, _mm_loadu_si128((const __m128i *)other), 1);
}

/* The numbers at the beginning of eight blocks. */
static inline __m512 eight_scales(const uint8_t *block, int stride) {
    uint16_t eight[8];
    for (int i = 0; i < 8; i++) memcpy(eight + i, block + i * stride, 2);
    return _mm512_castps256_ps512(_mm256_cvtph_ps(_mm_loadu_si128((const __m128i *)eight)));
}

/* The bits of 32 bytes shifted right by two numbers, one after the other, under a mask. */
static inline __m512i shifted(__m256i bytes, int one, int other, int mask) {
    const __m512i both = two_halves(_mm256_srli_epi16(bytes, one), _mm256_srli_epi16(bytes, other));
    return _mm512_and_si512(both, _mm512_set1_epi8((char)mask));
}

static inline __m512 scaled_bytes(__m128i bytes, float factor) { /* 16 signed ones */
    const __m512i wide_ = _mm512_cvtepi8_epi32(bytes);
    return _mm512_mul_ps(_mm512_cvtepi32_ps(wide_), _mm512_set1_ps(factor));
}

/* Eight blocks of 32 weights. */
static inline __attribute__((always_inline)) Span span_of_32(const Format format, const uint8_t *block) {
    const int bytes = format == Q8_0 ? 34 : format == Q4_1 ? 20 : 18, from = format == Q4_1 ? 4 : 2;
    Span span = {.scales = eight_scales(block, bytes)};
    span.offsets = format == Q4_1 ? _mm512_sub_ps(_mm512_setzero_ps(), eight_scales(block + 2, bytes))
                                  : _mm512_mul_ps(span.scales, _mm512_set1_ps(format == Q8_0 ? 128 : 8));
    for (int i = 0; i < 4; i++) {
        const uint8_t *one = block + 2 * i * bytes + from, *other = one + bytes;
        if (format == Q8_0) {
            span.codes[i] = _mm512_xor_si512(two_halves(at_256(one), at_256(other)), _mm512_set1_epi8((char)0x80));
        } else {
            const __m512i apart = shifted(two_places(one, other), 0, 4, 15);
            span.codes[i] = _mm512_shuffle_i64x2(apart, apart, 0xd8); /* each block's low ones before its high ones */
        }
    }
    return span;
}

/* A block of Q4_K or Q5_K. */
static inline __attribute__((always_inline)) Span span_of_six_bits(const Format format, const uint8_t *block) {
    uint64_t scales, minimums;
    six_bits(block + 4, &scales, &minimums);
    Span span = {.scales = scaled_bytes(_mm_cvtsi64_si128((int64_t)scales), half(block)),
                 .offsets = scaled_bytes(_mm_cvtsi64_si128((int64_t)minimums), half(block + 2))};
    const uint8_t *fours = block + (format == Q5_K ? 48 : 16);
    for (int i = 0; i < 4; i++) {
        span.codes[i] = shifted(at_256(fours + 32 * i), 0, 4, 15);
        if (format == Q5_K) {
            const __m512i fifth = shifted(at_256(block + 16), 2 * i, 2 * i + 1, 1);
            span.codes[i] = _mm512_or_si512(span.codes[i], _mm512_slli_epi16(fifth, 4));
        }
    }
    return span;
}

/* A block of Q2_K, Q3_K or Q6_K, whose sixteen groups have scales of their own. */
static inline __attribute__((always_inline)) Span span_of_sixteen(const Format format, const uint8_t *block) {
    Span span;
    if (format == Q6_K) {
        span.scales = scaled_bytes(_mm_loadu_si128((const __m128i *)(block + 192)), half(block + 208));
        span.offsets = _mm512_mul_ps(span.scales, _mm512_set1_ps(32));
        for (int i = 0; i < 4; i++) {
            const uint8_t *fours = block + 64 * (i / 2), *pairs = block + 128 + 32 * (i / 2);
            const __m512i both = _mm512_srli_epi16(_mm512_loadu_si512(fours), i % 2 * 4);
            const __m512i high = _mm512_slli_epi16(shifted(at_256(pairs), i % 2 * 4, i % 2 * 4 + 2, 3), 4);
            span.codes[i] = _mm512_or_si512(_mm512_and_si512(both, _mm512_set1_epi8(15)), high);
        }
        return span;
    }
    if (format == Q3_K) {
        uint32_t low, next, high; /* four bytes at a time */
        memcpy(&low, block + 96, 4), memcpy(&next, block + 100, 4), memcpy(&high, block + 104, 4);
        const uint32_t four = 0x0f0f0f0f, two = 0x03030303;
        const __m128i scales = _mm_set_epi32(
            (int)((next >> 4 & four) | (high >> 6 & two) << 4), (int)((low >> 4 & four) | (high >> 4 & two) << 4),
            (int)((next & four) | (high >> 2 & two) << 4), (int)((low & four) | (high & two) << 4));
        span.scales = scaled_bytes(_mm_sub_epi8(scales, _mm_set1_epi8(32)), half(block + 108));
        span.offsets = _mm512_mul_ps(span.scales, _mm512_set1_ps(4));
    } else {
        const __m128i both = _mm_loadu_si128((const __m128i *)block), four = _mm_set1_epi8(15);
        span.scales = scaled_bytes(_mm_and_si128(both, four), half(block + 80));
        span.offsets = scaled_bytes(_mm_and_si128(_mm_srli_epi16(both, 4), four), half(block + 82));
    }
    for (int i = 0; i < 4; i++) {
        const __m256i pairs = at_256(block + (format == Q3_K ? 32 : 16) + 32 * (i / 2));
        span.codes[i] = shifted(pairs, i % 2 * 4, i % 2 * 4 + 2, 3);
        if (format == Q3_K) {
            const __m512i third = shifted(at_256(block), 2 * i, 2 * i + 1, 1);
            span.codes[i] = _mm512_or_si512(span.codes[i], _mm512_slli_epi16(third, 2));
        }
    }
    return span;
}

/* 256 weights of a format, a constant; the same numbers as by way of `unpack`. */
static inline __attribute__((always_inline)) Span span_of(const Format format, const uint8_t *block) {
    if (format == Q8_0 || format == Q4_0 || format == Q4_1) return span_of_32(format, block);
    if (format == Q4_K || format == Q5_K) return span_of_six_bits(format, block);
    return span_of_sixteen(format, block);
}

static inline __attribute__((always_inline)) void row_of_blocks(const Format format, const uint8_t *row, int n,
                                                                size_t ahead, const Coded *tokens, int at,
                                                                const int n_tokens, float *out) {
    const int bytes = BLOCK_FORMATS[format].bytes * (SPAN_CODES / BLOCK_FORMATS[format].values);
    const int group = format == Q6_K || format == Q3_K || format == Q2_K ? 16 : 32;
    __m512 even[TOKENS_AT_ONCE], odd[TOKENS_AT_ONCE];
    for (int t = 0; t < n_tokens; t++) even[t] = odd[t] = _mm512_setzero_ps();
    for (int k = 0; k < n; k += SPAN_CODES, row += bytes) {
        for (int i = 0; i < bytes; i += 64) _mm_prefetch((const char *)row + ahead + i, _MM_HINT_T0);
        const Span span = span_of(format, row);
        one_span(&span, group, tokens, at + k, SPAN_CODES, 1, n_tokens, even, odd);
    }
    for (int t = 0; t < n_tokens; t++)
        out[t * STRIP] = _mm512_reduce_add_ps(_mm512_add_ps(even[t], odd[t])) * tokens[t].step;
}

/* Whether `multiply_blocks` takes n weights of a format for T tokens. */
static inline int takes_blocks(Format format, int n, int T) {
    const int is_known = format != INT8_ROWS && format != Q5_0 && format != Q5_1 && format != IQ4_NL;
    return T <= TOKENS_AT_ONCE && n % SPAN_CODES == 0 && is_known;
}

/* A row of n weights in blocks, from input `at` on, times T tokens; the same bits as by way of `multiply_codes`. Memory is
 * fetched `ahead` bytes ahead: a file's pages are small, and the processor by itself stops at the end of each. */
static void multiply_blocks(Format format, const uint8_t *row, int n, size_t ahead, const Coded *tokens, int at, int T,
                            int is_first, float *out) {
    float found[TOKENS_AT_ONCE * STRIP] = {0};
#define OF(format)                                                     \
    case format:                                                       \
        if (T == 1) row_of_blocks(format, row, n, ahead, tokens, at, 1, found); \
        if (T == 2) row_of_blocks(format, row, n, ahead, tokens, at, 2, found); \
        if (T == 3) row_of_blocks(format, row, n, ahead, tokens, at, 3, found); \
        if (T == 4) row_of_blocks(format, row, n, ahead, tokens, at, 4, found); \
        break
    switch (format) {
        OF(Q8_0);
        OF(Q4_0);
        OF(Q4_1);
        OF(Q2_K);
        OF(Q3_K);
        OF(Q4_K);
        OF(Q5_K);
        OF(Q6_K);
    default:;
    }
#undef OF
    for (int t = 0; t < T; t++) out[t * STRIP] = is_first ? found[t * STRIP] : out[t * STRIP] + found[t * STRIP];
}
