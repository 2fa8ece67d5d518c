/* Products with AVX-512 of weights in codes: blocks and whatever else comes down to codes with scales.
 *
 *   row by row         few tokens: a row's codes, or blocks from where they lie, with up to four tokens at once
 *   sixteen rows       more tokens: the same sums, of rows side by side in a register
 *
 * Of a token and a row the same numbers are added in the same order by both: of each group of codes an exact sum of
 * integers, times its scale, to one of sixteen sums, that of the group's place in its span.
 */
#pragma once

enum { SPAN_CODES = 256, PLACES = 16 }; /* codes of a row that are multiplied together, and at most so many groups */

/* Keeps the compiler from adding in another order than is written. */
#define AS_WRITTEN(x) __asm__("" : "+v"(x))

/* -- row by row ---------------------------------------------------------------------------------------------------- */

/* The scales of one span, and its codes in four registers. */
typedef struct {
    __m512i codes[4];
    __m512 scales, offsets; /* (groups), 0 behind them */
} Span;

/* 64 codes times the two numbers of 64 inputs: 16 exact sums of four products each. */
static inline __m512i fours_of(__m512i codes, __m512i high, __m512i low) {
    return dot_codes(_mm512_slli_epi32(dot_codes(_mm512_setzero_si512(), codes, high), 7), codes, low);
}

/* 64 sums of fours to sums of groups, in their order. */
static inline __attribute__((always_inline)) __m512 group_sums(const __m512i *fours, const int group) {
    const __m512i a = _mm512_add_epi32(_mm512_unpacklo_epi32(fours[0], fours[1]), _mm512_unpackhi_epi32(fours[0], fours[1]));
    const __m512i b = _mm512_add_epi32(_mm512_unpacklo_epi32(fours[2], fours[3]), _mm512_unpackhi_epi32(fours[2], fours[3]));
    /* Of 16 codes each: quarter q of register r is at 4 q + r. */
    const __m512i ab = _mm512_add_epi32(_mm512_unpacklo_epi64(a, b), _mm512_unpackhi_epi64(a, b));
    if (group == 16) {
        const __m512i order = _mm512_set_epi32(15, 11, 7, 3, 14, 10, 6, 2, 13, 9, 5, 1, 12, 8, 4, 0);
        return _mm512_cvtepi32_ps(_mm512_permutexvar_epi32(order, ab));
    }
    const __m512i halves_ = _mm512_add_epi32(_mm512_shuffle_i32x4(ab, ab, 0x08), _mm512_shuffle_i32x4(ab, ab, 0x0d));
    const __m256i order = _mm256_set_epi32(7, 3, 6, 2, 5, 1, 4, 0);
    return _mm512_zextps256_ps512(_mm256_cvtepi32_ps(_mm256_permutevar8x32_epi32(_mm512_castsi512_si256(halves_), order)));
}

/* Up to 256 codes of one row times n_tokens tokens, a constant, added to each one's sums. is_whole: none is missing. */
static inline __attribute__((always_inline)) void one_span(const Span *span, const int group, const Coded *tokens, int at,
                                                           int left, const int is_whole, const int n_tokens,
                                                           __m512 *sums) {
    const __mmask16 mask = (1u << left / group) - 1;
    for (int t = 0; t < n_tokens; t++) {
        __m512i fours[4];
#pragma GCC unroll 4
        for (int i = 0; i < 4; i++) {
            const int here = left - 64 * i;
            const __mmask64 bytes = here >= 64 ? ~(__mmask64)0 : here > 0 ? ((__mmask64)1 << here) - 1 : 0;
#define LOAD(from) (is_whole ? _mm512_loadu_si512(from) : _mm512_maskz_loadu_epi8(bytes, from))
            fours[i] = fours_of(span->codes[i], LOAD(tokens[t].high + at + 64 * i), LOAD(tokens[t].low + at + 64 * i));
#undef LOAD
        }
        const float *inputs = group == 32 ? tokens[t].sums32 + at / 32 : tokens[t].sums16 + at / 16;
        sums[t] = _mm512_fmadd_ps(group_sums(fours, group), span->scales, sums[t]);
        sums[t] = _mm512_fnmadd_ps(span->offsets, _mm512_maskz_loadu_ps(mask, inputs), sums[t]);
    }
}

/* The sums of a token and a row: those of places 8 apart, then 4, 2 and 1. */
static inline float total_of(__m512 sums) {
    __m256 eight = _mm256_add_ps(_mm512_castps512_ps256(sums), _mm512_extractf32x8_ps(sums, 1));
    AS_WRITTEN(eight);
    __m128 four = _mm_add_ps(_mm256_castps256_ps128(eight), _mm256_extractf128_ps(eight, 1));
    AS_WRITTEN(four);
    __m128 two = _mm_add_ps(four, _mm_movehl_ps(four, four));
    AS_WRITTEN(two);
    __m128 one = _mm_add_ss(two, _mm_movehdup_ps(two));
    AS_WRITTEN(one);
    return _mm_cvtss_f32(one);
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
    __m512 sums[TOKENS_AT_ONCE];
    for (int t = 0; t < n_tokens; t++) sums[t] = _mm512_setzero_ps();
    int k = 0;
    for (; k + SPAN_CODES <= n; k += SPAN_CODES) {
        const Span span = span_at(codes + k, a + k / group, b + k / group, group, SPAN_CODES, 1);
        one_span(&span, group, tokens, at + k, SPAN_CODES, 1, n_tokens, sums);
    }
    if (k < n) {
        const Span span = span_at(codes + k, a + k / group, b + k / group, group, n - k, 0);
        one_span(&span, group, tokens, at + k, n - k, 0, n_tokens, sums);
    }
    for (int t = 0; t < n_tokens; t++) out[t * STRIP] = total_of(sums[t]) * tokens[t].step;
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
    return _mm512_zextps256_ps512(_mm256_cvtph_ps(_mm_loadu_si128((const __m128i *)eight)));
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
    __m512 sums[TOKENS_AT_ONCE];
    for (int t = 0; t < n_tokens; t++) sums[t] = _mm512_setzero_ps();
    for (int k = 0; k < n; k += SPAN_CODES, row += bytes) {
        for (int i = 0; i < bytes; i += 64) _mm_prefetch((const char *)row + ahead + i, _MM_HINT_T0);
        const Span span = span_of(format, row);
        one_span(&span, group, tokens, at + k, SPAN_CODES, 1, n_tokens, sums);
    }
    for (int t = 0; t < n_tokens; t++) out[t * STRIP] = total_of(sums[t]) * tokens[t].step;
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

/* -- sixteen rows -------------------------------------------------------------------------------------------------- */

#define CODES_OF_SIXTEEN_ROWS 1

typedef struct { /* a span of each of sixteen rows */
    uint32_t codes[SPAN_CODES / 4][16];                                  /* (fours of codes, rows) */
    _Alignas(64) float scales[PLACES][16], offsets[PLACES][16]; /* (groups, rows) */
} Sixteen;

/* A span of sixteen rows times n_tokens tokens, a constant, added to sums (tokens, PLACES, 16). */
static inline __attribute__((always_inline)) void sixteen_rows(const Sixteen *rows, const int group, int n_groups,
                                                               const Coded *tokens, int at, const int n_tokens,
                                                               float *sums) {
    for (int g = 0; g < n_groups; g++) {
        __m512i codes[8], high[4], low[4];
#pragma GCC unroll 8
        for (int i = 0; i < group / 4; i++) codes[i] = _mm512_loadu_si512(rows->codes[g * group / 4 + i]);
#pragma GCC unroll 4
        for (int t = 0; t < n_tokens; t++) high[t] = low[t] = _mm512_setzero_si512();
#pragma GCC unroll 8
        for (int i = 0; i < group / 4; i++)
#pragma GCC unroll 4
            for (int t = 0; t < n_tokens; t++) {
                const int k = at + g * group + 4 * i;
                high[t] = dot_codes(high[t], codes[i], four_bytes(tokens[t].high + k));
                low[t] = dot_codes(low[t], codes[i], four_bytes(tokens[t].low + k));
            }
        const __m512 scales = _mm512_load_ps(rows->scales[g]), offsets = _mm512_load_ps(rows->offsets[g]);
#pragma GCC unroll 4
        for (int t = 0; t < n_tokens; t++) {
            const float input = group == 32 ? tokens[t].sums32[at / 32 + g] : tokens[t].sums16[at / 16 + g];
            float *to = sums + (t * PLACES + g) * 16;
            const __m512 found = _mm512_cvtepi32_ps(_mm512_add_epi32(_mm512_slli_epi32(high[t], 7), low[t]));
            const __m512 sum = _mm512_fmadd_ps(found, scales, _mm512_loadu_ps(to));
            _mm512_storeu_ps(to, _mm512_fnmadd_ps(offsets, _mm512_set1_ps(input), sum));
        }
    }
}

/* The sums (PLACES, 16) of a token and sixteen rows, in the order of `total_of`. */
static inline __m512 totals_of(const float *sums) {
    __m512 s[PLACES];
    for (int i = 0; i < PLACES; i++) s[i] = _mm512_loadu_ps(sums + i * 16);
    for (int apart = PLACES / 2; apart; apart /= 2)
        for (int i = 0; i < apart; i++) {
            s[i] = _mm512_add_ps(s[i], s[i + apart]);
            AS_WRITTEN(s[i]);
        }
    return s[0];
}

/* Sixteen rows of n weights in codes, from row n0 and input k0 on, times T tokens; sums (T, STRIP). room: floats, of
 * T * PLACES * 16. */
static void multiply_sixteen(const Linear *linear, int n0, int k0, int n, const Coded *tokens, int T, float *room,
                             float *sums) {
    const int group = BLOCK_FORMATS[linear->format].group;
    Sixteen rows;
    uint8_t codes[16][SPAN_CODES];
    float a[16][16] = {{0}}, b[16][16] = {{0}};
    memset(room, 0, sizeof(float) * T * PLACES * 16);
    for (int k = 0; k < n; k += SPAN_CODES) {
        const int here = n - k < SPAN_CODES ? n - k : SPAN_CODES;
        for (int r = 0; r < 16; r++) unpack(linear, n0 + r, k0 + k, here, codes[r], a[r], b[r]);
        for (int i = 0; i < SPAN_CODES / 64; i++) turn(codes[0] + 64 * i, SPAN_CODES, (__m512i *)rows.codes[16 * i], 1);
        turn(a, sizeof a[0], (__m512i *)rows.scales, 1), turn(b, sizeof b[0], (__m512i *)rows.offsets, 1);
        for (int t = 0; t < T; t += 4) {
            float *to = room + (size_t)t * PLACES * 16;
            const int n_groups = here / group, at = k0 + k;
#define OF(n)                                                                            \
    if (T - t >= 4 ? n == 4 : n == T - t) {                                              \
        if (group == 32) sixteen_rows(&rows, 32, n_groups, tokens + t, at, n, to);       \
        if (group == 16) sixteen_rows(&rows, 16, n_groups, tokens + t, at, n, to);       \
    }
            OF(4) OF(3) OF(2) OF(1)
#undef OF
        }
    }
    for (int t = 0; t < T; t++) {
        const __m512 found = _mm512_mul_ps(totals_of(room + (size_t)t * PLACES * 16), _mm512_set1_ps(tokens[t].step));
        float *to = sums + (size_t)t * STRIP;
        _mm512_storeu_ps(to, k0 ? _mm512_add_ps(_mm512_loadu_ps(to), found) : found);
    }
}
