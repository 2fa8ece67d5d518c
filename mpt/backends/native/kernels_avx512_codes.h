/* Products with AVX-512 of weights in codes: int8 with a scale for each row, and blocks.
 *
 *   spans    256 weights of a row, out of their blocks into registers
 *   rows     one token: spans one after the other, as they come out of memory
 *   strips   more tokens: a span of 32 rows side by side in registers
 *
 * Of a token and a row both add the same numbers in the same order, one group of codes after the other: an exact sum
 * of integers, times the group's scale, times the step of its inputs.
 */
#pragma once

enum { SPAN_CODES = 256, MOST_GROUPS = 16, CODE_TOKENS = 6 }; /* codes of a row that are multiplied together; groups among them */

/* -- spans --------------------------------------------------------------------------------------------------------- */

typedef struct { /* codes in four registers; the scales of their groups, and the minimums where the format has them */
    __m512i codes[4];
    __m512 scales, minimums;
} Span;

static inline __m512i two_halves(__m256i low, __m256i high) {
    return _mm512_inserti64x4(_mm512_castsi256_si512(low), high, 1);
}

static inline __m256i at_256(const uint8_t *from) { return _mm256_loadu_si256((const __m256i *)from); }

/* 16 bytes each of two places. */
static inline __m256i two_places(const uint8_t *one, const uint8_t *other) {
    const __m256i first = _mm256_castsi128_si256(_mm_loadu_si128((const __m128i *)one));
    return _mm256_inserti128_si256(first, _mm_loadu_si128((const __m128i *)other), 1);
}

/* The numbers at the beginning of n blocks and of n more, a constant, of at most 64 bytes; one after the other. */
static inline __attribute__((always_inline)) __m128i numbers_at(const uint8_t *block, const int stride, const int n) {
    int16_t places[32] = {0};
    for (int i = 0; i < n; i++) places[i] = i * stride / 2, places[n + i] = 32 + i * stride / 2;
    const __m512i first = _mm512_loadu_si512(block), second = _mm512_loadu_si512(block + n * stride);
    return _mm512_castsi512_si128(_mm512_permutex2var_epi16(first, _mm512_loadu_si512(places), second));
}

/* The numbers at the beginning of eight blocks. Out of whole registers: one by one they took as long as the products. */
static inline __attribute__((always_inline)) __m512 eight_scales(const uint8_t *block, const int stride) {
    const __m128i found = stride <= 20 ? numbers_at(block, stride, 4)
                                       : _mm_unpacklo_epi64(numbers_at(block, stride, 2), numbers_at(block + 4 * stride, stride, 2));
    return _mm512_zextps256_ps512(_mm256_cvtph_ps(found));
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
    if (format == Q4_1) span.minimums = _mm512_sub_ps(_mm512_setzero_ps(), eight_scales(block + 2, bytes));
    for (int i = 0; i < 4; i++) {
        const uint8_t *one = block + 2 * i * bytes + from, *other = one + bytes;
        if (format == Q8_0) {
            span.codes[i] = _mm512_xor_si512(two_halves(at_256(one), at_256(other)), _mm512_set1_epi8((char)ADDED));
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
                 .minimums = scaled_bytes(_mm_cvtsi64_si128((int64_t)minimums), half(block + 2))};
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
    } else {
        const __m128i both = _mm_loadu_si128((const __m128i *)block), four = _mm_set1_epi8(15);
        span.scales = scaled_bytes(_mm_and_si128(both, four), half(block + 80));
        span.minimums = scaled_bytes(_mm_and_si128(_mm_srli_epi16(both, 4), four), half(block + 82));
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
    if (format == INT8_ROWS) {
        Span span;
        for (int i = 0; i < 4; i++)
            span.codes[i] = _mm512_xor_si512(_mm512_loadu_si512(block + 64 * i), _mm512_set1_epi8((char)ADDED));
        return span;
    }
    if (format == Q8_0 || format == Q4_0 || format == Q4_1) return span_of_32(format, block);
    if (format == Q4_K || format == Q5_K) return span_of_six_bits(format, block);
    return span_of_sixteen(format, block);
}

/* What scales a row has. */
typedef enum { ONE, ONE_A_GROUP, AND_MINIMUMS } Scales;

static inline Scales scales_of(Format format) {
    const int has_minimums = format == Q4_1 || format == Q5_1 || format == Q2_K || format == Q4_K || format == Q5_K;
    return format == INT8_ROWS ? ONE : has_minimums ? AND_MINIMUMS : ONE_A_GROUP;
}

/* n codes of a row, 256 or fewer, by way of memory. */
static Span unpacked_span(const Linear *linear, int row, int k, int n) {
    _Alignas(64) uint8_t codes[SPAN_CODES] = {0};
    _Alignas(64) float a[MOST_GROUPS] = {0}, b[MOST_GROUPS] = {0};
    unpack(linear, row, k, n, codes, a, b);
    Span span = {.scales = _mm512_load_ps(a), .minimums = _mm512_load_ps(b)};
    for (int i = 0; i < 4; i++) span.codes[i] = _mm512_load_si512(codes + 64 * i);
    return span;
}

/* n codes of a row, 256 or fewer, from input k on; `format`, the matrix's, is a constant. */
static inline __attribute__((always_inline)) Span span_at(const Format format, const Linear *linear, int row, int k,
                                                          int n) {
    if (n < SPAN_CODES || format == Q5_0 || format == Q5_1 || format == IQ4_NL) return unpacked_span(linear, row, k, n);
    return span_of(format, block_at(linear, row, k));
}

/* With the format of a matrix as a constant. */
#define WITH_FORMAT(of, call)                                                                           \
    switch (of) {                                                                                       \
        CASE(INT8_ROWS, call) CASE(Q4_0, call) CASE(Q4_1, call) CASE(Q5_0, call) CASE(Q5_1, call)       \
        CASE(Q8_0, call) CASE(Q2_K, call) CASE(Q3_K, call) CASE(Q4_K, call) CASE(Q5_K, call)            \
        CASE(Q6_K, call) CASE(IQ4_NL, call)                                                             \
    default:;                                                                                           \
    }
#define CASE(constant, call) case constant: { enum { FORMAT = constant }; call; break; }
#define GROUP_OF(format) ((format) == Q2_K || (format) == Q3_K || (format) == Q6_K ? 16 : 32)

/* -- rows ---------------------------------------------------------------------------------------------------------- */

/* 64 sums of four products each to sums of groups, in their order. */
static inline __attribute__((always_inline)) __m512i group_sums(const __m512i *fours, const int group) {
    const __m512i a = _mm512_add_epi32(_mm512_unpacklo_epi32(fours[0], fours[1]), _mm512_unpackhi_epi32(fours[0], fours[1]));
    const __m512i b = _mm512_add_epi32(_mm512_unpacklo_epi32(fours[2], fours[3]), _mm512_unpackhi_epi32(fours[2], fours[3]));
    /* Of 16 codes each: quarter q of register r is at 4 q + r. */
    const __m512i ab = _mm512_add_epi32(_mm512_unpacklo_epi64(a, b), _mm512_unpackhi_epi64(a, b));
    if (group == 16)
        return _mm512_permutexvar_epi32(_mm512_set_epi32(15, 11, 7, 3, 14, 10, 6, 2, 13, 9, 5, 1, 12, 8, 4, 0), ab);
    const __m512i halves_ = _mm512_add_epi32(_mm512_shuffle_i32x4(ab, ab, 0x08), _mm512_shuffle_i32x4(ab, ab, 0x0d));
    const __m256i order = _mm256_set_epi32(7, 3, 6, 2, 5, 1, 4, 0);
    return _mm512_zextsi256_si512(_mm256_permutevar8x32_epi32(_mm512_castsi512_si256(halves_), order));
}

/* n inputs of one token, 256 or fewer, from k on, and the sums of their groups. */
typedef struct {
    __m512i codes[4], totals;
} SpanInputs;

static inline __attribute__((always_inline)) SpanInputs inputs_at(const Coded *inputs, int k, int n, const int group) {
    SpanInputs found;
    for (int i = 0; i < 4; i++) {
        const int here = n - 64 * i;
        const __mmask64 mask = here >= 64 ? ~(__mmask64)0 : here > 0 ? ((__mmask64)1 << here) - 1 : 0;
        found.codes[i] = _mm512_maskz_loadu_epi8(mask, inputs->codes + k + 64 * i);
    }
    found.totals = _mm512_maskz_loadu_epi32((__mmask16)((1u << n / 16) - 1), inputs->totals + k / 16);
    if (group == 32) {
        const __m512i pairs = _mm512_add_epi32(found.totals, _mm512_srli_epi64(found.totals, 32));
        found.totals = _mm512_zextsi256_si512(_mm512_cvtepi64_epi32(pairs));
    }
    return found;
}

/* The sums of a span's groups, times their scales. */
static inline __attribute__((always_inline)) __m512 span_sums(const Format format, const Span *span,
                                                              const SpanInputs *x) {
    const Scales scales = scales_of(format);
    __m512i fours[4];
    for (int i = 0; i < 4; i++) fours[i] = dot_codes(_mm512_setzero_si512(), span->codes[i], x->codes[i]);
    __m512i dots = group_sums(fours, GROUP_OF(format));
    if (zero_of(format)) dots = _mm512_sub_epi32(dots, _mm512_mullo_epi32(x->totals, _mm512_set1_epi32(zero_of(format))));
    __m512 found = _mm512_cvtepi32_ps(dots);
    if (scales != ONE) found = _mm512_mul_ps(found, span->scales);
    if (scales == AND_MINIMUMS) found = _mm512_fnmadd_ps(span->minimums, _mm512_cvtepi32_ps(x->totals), found);
    return found;
}

/* Of eight blocks of 32 inputs the first halves and the second ones, four blocks side by side; and eight times the sums
 * of the blocks, twice. */
typedef struct {
    __m512i first[2], second[2], offsets;
} HalvedInputs;

static inline __attribute__((always_inline)) HalvedInputs in_halves(const SpanInputs *x) {
    HalvedInputs found;
    for (int i = 0; i < 2; i++) {
        found.first[i] = _mm512_shuffle_i64x2(x->codes[2 * i], x->codes[2 * i + 1], 0x88);
        found.second[i] = _mm512_shuffle_i64x2(x->codes[2 * i], x->codes[2 * i + 1], 0xdd);
    }
    found.offsets = _mm512_slli_epi32(_mm512_inserti64x4(x->totals, _mm512_castsi512_si256(x->totals), 1), 3);
    return found;
}

/* The 16 bytes of four blocks of Q4_0 side by side, times the inputs: four sums for each block. */
static inline __attribute__((always_inline)) __m512i four_blocks(const uint8_t *block, __m512i first, __m512i second) {
    __m512i bytes = _mm512_broadcast_i32x4(_mm_loadu_si128((const __m128i *)(block + 2)));
    bytes = _mm512_mask_broadcast_i32x4(bytes, 0x00f0, _mm_loadu_si128((const __m128i *)(block + 20)));
    bytes = _mm512_mask_broadcast_i32x4(bytes, 0x0f00, _mm_loadu_si128((const __m128i *)(block + 38)));
    bytes = _mm512_mask_broadcast_i32x4(bytes, 0xf000, _mm_loadu_si128((const __m128i *)(block + 56)));
    const __m512i low = _mm512_set1_epi8(15);
    const __m512i sums = dot_codes(_mm512_setzero_si512(), _mm512_and_si512(bytes, low), first);
    return dot_codes(sums, _mm512_and_si512(_mm512_srli_epi16(bytes, 4), low), second);
}

/* Eight blocks of Q4_0 of two rows: the sums of `span_sums`, one row's after the other's. Half of its instructions:
 * no code changes its place within a block, and both rows share what follows the products. */
static inline __attribute__((always_inline)) __m512 two_rows(const uint8_t *one, const uint8_t *other,
                                                             const HalvedInputs *x) {
    const __m512i a = four_blocks(one, x->first[0], x->second[0]), b = four_blocks(one + 72, x->first[1], x->second[1]);
    const __m512i c = four_blocks(other, x->first[0], x->second[0]), d = four_blocks(other + 72, x->first[1], x->second[1]);
    const __m512i ab = _mm512_add_epi32(_mm512_unpacklo_epi32(a, b), _mm512_unpackhi_epi32(a, b));
    const __m512i cd = _mm512_add_epi32(_mm512_unpacklo_epi32(c, d), _mm512_unpackhi_epi32(c, d));
    /* Block i of a, b, c and d is at 4 i, 4 i + 1, 4 i + 2 and 4 i + 3. */
    const __m512i mixed = _mm512_add_epi32(_mm512_unpacklo_epi64(ab, cd), _mm512_unpackhi_epi64(ab, cd));
    const __m512i order = _mm512_set_epi32(15, 11, 7, 3, 14, 10, 6, 2, 13, 9, 5, 1, 12, 8, 4, 0);
    const __m512i dots = _mm512_sub_epi32(_mm512_permutexvar_epi32(order, mixed), x->offsets);
    const __m256i scales = _mm256_inserti128_si256(_mm256_castsi128_si256(numbers_at(one, 18, 4)), numbers_at(other, 18, 4), 1);
    return _mm512_mul_ps(_mm512_cvtepi32_ps(dots), _mm512_cvtph_ps(scales));
}

/* A row that is asked for, or the last of n_rows. */
static inline int row_of(int n0, int r, int n_rows) { return n0 + (r < n_rows ? r : n_rows - 1); }

static inline __attribute__((always_inline)) void fetch_row(const uint8_t *from, size_t n) {
    for (size_t i = 0; i < n; i += 64) _mm_prefetch((const char *)from + i, _MM_HINT_T0);
}

/* The sums of the groups of n codes, 256 or fewer, from input k on, of sixteen rows from n0 on: (16, MOST_GROUPS). */
static inline __attribute__((always_inline)) void sixteen_spans(const Format format, const Linear *linear, int n0,
                                                                int n_rows, int k, int n, const Coded *inputs,
                                                                float (*values)[MOST_GROUPS]) {
    const size_t bytes = row_bytes(linear), here = bytes * n / linear->n_in;
    const SpanInputs x = inputs_at(inputs, k, n, GROUP_OF(format));
    if (format == Q4_0 && n == SPAN_CODES) {
        const HalvedInputs apart = in_halves(&x);
        for (int r = 0; r < 16; r += 2) {
            const uint8_t *one = block_at(linear, row_of(n0, r, n_rows), k);
            const uint8_t *other = block_at(linear, row_of(n0, r + 1, n_rows), k);
            fetch_row(one + STRIP * bytes, here), fetch_row(other + STRIP * bytes, here);
            const __m512 both = two_rows(one, other, &apart);
            _mm256_store_ps(values[r], _mm512_castps512_ps256(both));
            _mm256_store_ps(values[r + 1], _mm512_extractf32x8_ps(both, 1));
        }
        return;
    }
    for (int r = 0; r < 16; r++) {
        const int row = row_of(n0, r, n_rows);
        fetch_row((const uint8_t *)block_at(linear, row, k) + STRIP * bytes, here);
        const Span span = span_at(format, linear, row, k, n);
        _mm512_store_ps(values[r], span_sums(format, &span, &x));
    }
}

/* Sixteen rows from n0 on, n_rows of which are there, times one token. */
static inline __attribute__((always_inline)) void sixteen_rows(const Format format, const Linear *linear, int n0,
                                                               int n_rows, const Coded *inputs, float *sums) {
    const int K = linear->n_in, group = GROUP_OF(format);
    __m512 found = _mm512_setzero_ps();
    for (int k = 0; k < K; k += SPAN_CODES) {
        const int n = K - k < SPAN_CODES ? K - k : SPAN_CODES;
        _Alignas(64) float values[16][MOST_GROUPS];
        sixteen_spans(format, linear, n0, n_rows, k, n, inputs, values);
        __m512i columns[16];
        turn(values, sizeof values[0], _mm512_setzero_si512(), columns, 1);
        for (int g = 0; g < n / group; g++) {
            const __m512 step = _mm512_set1_ps(inputs->steps[(k + g * group) / 32]);
            found = _mm512_fmadd_ps(_mm512_castsi512_ps(columns[g]), step, found);
        }
    }
    _mm512_storeu_ps(sums, found);
}

/* -- strips -------------------------------------------------------------------------------------------------------- */

typedef struct { /* a span of each of 32 rows: two registers of sixteen rows side by side */
    __m512i codes[SPAN_CODES / 4][2];                        /* (fours of codes, 2) */
    __m512 scales[MOST_GROUPS][2], minimums[MOST_GROUPS][2]; /* (groups, 2) */
} Strip;

typedef struct { /* spans of sixteen rows as they come out of memory */
    _Alignas(64) uint8_t codes[16][SPAN_CODES];
    _Alignas(64) float scales[16][MOST_GROUPS], minimums[16][MOST_GROUPS];
} Sixteen;

/* The spans of sixteen rows from n0 on, n_rows of which are there, as they come out of memory. */
static inline __attribute__((always_inline)) void fetch_sixteen(const Format format, const Linear *linear, int n0,
                                                                int n_rows, int k, int n, Sixteen *to) {
    for (int r = 0; r < 16; r++) { /* rows that are not there: the last one, whose sums nobody reads */
        const Span span = span_at(format, linear, n0 + (r < n_rows ? r : n_rows - 1), k, n);
        for (int i = 0; i < 4; i++) _mm512_store_si512(to->codes[r] + 64 * i, span.codes[i]);
        if (scales_of(format) != ONE) _mm512_store_ps(to->scales[r], span.scales);
        if (scales_of(format) == AND_MINIMUMS) _mm512_store_ps(to->minimums[r], span.minimums);
    }
}

/* A span of n_rows rows, 32 or fewer, from row n0 and input k on; of n codes, 256 or fewer. */
static void lay_strip(const Linear *linear, int n0, int n_rows, int k, int n, Sixteen *sixteen, Strip *strip) {
    const Scales scales = scales_of(linear->format);
    const __m512i none = _mm512_setzero_si512(), added = _mm512_set1_epi8((char)ADDED); /* its bit: changed is added */
    for (int panel = 0; panel < 2; panel++) {
        const int first = n0 + 16 * panel, last = n0 + n_rows - 1, here = last - first + 1;
        const int is_whole = scales == ONE && n == SPAN_CODES && here >= 16;
        const void *from = is_whole ? block_at(linear, first, k) : sixteen->codes[0];
        const size_t stride = is_whole ? row_bytes(linear) : SPAN_CODES;
        if (!is_whole)
            WITH_FORMAT(linear->format,
                        fetch_sixteen((Format)FORMAT, linear, here > 0 ? first : last, here > 0 ? here : 1, k, n, sixteen))
        for (int i = 0; i < (n + 63) / 64; i++)
            turn((const char *)from + 64 * i, stride, is_whole ? added : none, &strip->codes[16 * i][panel], 2);
        if (scales != ONE) turn(sixteen->scales, 64, none, (__m512i *)&strip->scales[0][panel], 2);
        if (scales == AND_MINIMUMS) turn(sixteen->minimums, 64, none, (__m512i *)&strip->minimums[0][panel], 2);
    }
}

typedef struct { /* what is fetched meanwhile: so many bytes of each of 32 rows, `stride` bytes apart */
    const char *first;
    size_t stride, bytes;
} Next;

/* The first n_groups groups of a strip times n_tokens tokens from token t0 and input `at` on, added to their sums
 * (tokens, STRIP). group, scales, n_tokens: constants. zero: the code of 0. */
static inline __attribute__((always_inline)) void some_code_tokens(const Strip *strip, const int group,
                                                                   const Scales scales, int zero, int n_groups,
                                                                   const Coded *inputs, int t0, int at,
                                                                   const int n_tokens, const Next *next, float *sums) {
    const size_t K = inputs->K;
    const int8_t *x = inputs->codes + t0 * K + at;
    const float *steps = inputs->steps + (t0 * K + at) / 32;
    const int32_t *totals = inputs->totals + (t0 * K + at) / 16;
    __m512 found[CODE_TOKENS][2];
#pragma GCC unroll 6
    for (int t = 0; t < n_tokens; t++)
        for (int p = 0; p < 2; p++) found[t][p] = at ? _mm512_loadu_ps(sums + t * STRIP + 16 * p) : _mm512_setzero_ps();
    for (int g = 0; g < n_groups; g++) {
        __m512i dots[CODE_TOKENS][2];
        int32_t total[CODE_TOKENS];
#pragma GCC unroll 6
        for (int t = 0; t < n_tokens; t++) {
            const int32_t *own = totals + t * (K / 16) + (group == 32 ? 2 * g : g);
            total[t] = group == 32 ? own[0] + own[1] : own[0];
            dots[t][0] = dots[t][1] = _mm512_set1_epi32(-zero * total[t]);
        }
#pragma GCC unroll 8
        for (int i = 0; i < group / 4; i++) {
            const int four = g * group / 4 + i; /* two of them go with each row */
            const __m512i first = strip->codes[four][0], second = strip->codes[four][1];
            for (int line = 0; line < 128 && !t0; line += 64)
                if (four % 2 * 128 + line < (int)next->bytes)
                    _mm_prefetch(next->first + four / 2 * next->stride + four % 2 * 128 + line, _MM_HINT_T0);
#pragma GCC unroll 6
            for (int t = 0; t < n_tokens; t++) {
                const __m512i four_inputs = four_bytes(x + t * K + g * group + 4 * i);
                dots[t][0] = dot_codes(dots[t][0], first, four_inputs), dots[t][1] = dot_codes(dots[t][1], second, four_inputs);
            }
        }
#pragma GCC unroll 6
        for (int t = 0; t < n_tokens; t++) {
            const __m512 step = _mm512_set1_ps(steps[t * (K / 32) + g * group / 32]);
            for (int p = 0; p < 2; p++) {
                __m512 values = _mm512_cvtepi32_ps(dots[t][p]);
                if (scales != ONE) values = _mm512_mul_ps(values, strip->scales[g][p]);
                if (scales == AND_MINIMUMS)
                    values = _mm512_fnmadd_ps(strip->minimums[g][p], _mm512_set1_ps((float)total[t]), values);
                found[t][p] = _mm512_fmadd_ps(values, step, found[t][p]);
            }
        }
    }
#pragma GCC unroll 6
    for (int t = 0; t < n_tokens; t++)
        for (int p = 0; p < 2; p++) _mm512_storeu_ps(sums + t * STRIP + 16 * p, found[t][p]);
}

/* The same with any number of tokens. */
static inline __attribute__((always_inline)) void multiply_laid(const Strip *strip, const int group,
                                                                    const Scales scales, int zero, int n,
                                                                    const Coded *inputs, int T, int at, const Next *next,
                                                                    float *sums) {
    int t = 0;
#define OF(n_tokens)                                                                                              \
    for (; t + n_tokens <= T; t += n_tokens)                                                                      \
        some_code_tokens(strip, group, scales, zero, n / group, inputs, t, at, n_tokens, next,                 \
                         sums + (size_t)t * STRIP);
    OF(6) OF(4) OF(2) OF(1)
#undef OF
}

/* The same as `sixteen_rows`, of n_rows rows, STRIP or fewer, times T tokens. */
static void multiply_by_strips(const Linear *linear, int n0, int n_rows, const Coded *inputs, int T, float *sums) {
    const Scales scales = scales_of(linear->format);
    const int K = linear->n_in, zero = zero_of(linear->format), group = BLOCK_FORMATS[linear->format].group;
    const size_t bytes = row_bytes(linear);
    Strip strip;
    Sixteen sixteen;
    for (int k = 0; k < K; k += SPAN_CODES) {
        const int n = K - k < SPAN_CODES ? K - k : SPAN_CODES;
        const Next next = {(const char *)block_at(linear, n0, k) + STRIP * bytes, bytes, bytes * n / K};
        lay_strip(linear, n0, n_rows, k, n, &sixteen, &strip);
#define OF(of_group, of_scales)                                                       \
    if (group == of_group && scales == of_scales)                                     \
        multiply_laid(&strip, of_group, of_scales, zero, n, inputs, T, k, &next, sums);
        OF(32, ONE) OF(32, ONE_A_GROUP) OF(32, AND_MINIMUMS) OF(16, ONE_A_GROUP) OF(16, AND_MINIMUMS)
#undef OF
    }
}

/* n_rows rows of weights in codes, STRIP or fewer, from n0 on, times T tokens: sums (T, STRIP). The next strip is fetched
 * meanwhile: a file's pages are small, and the processor by itself stops at the end of each. */
static void multiply_codes(const Linear *linear, int n0, int n_rows, const Coded *inputs, int T, float *sums) {
    for (int r = 0; r < n_rows && T == 1; r += 16) {
        const int here = n_rows - r < 16 ? n_rows - r : 16;
        WITH_FORMAT(linear->format, sixteen_rows((Format)FORMAT, linear, n0 + r, here, inputs, sums + r))
    }
    if (T > 1) multiply_by_strips(linear, n0, n_rows, inputs, T, sums);
    for (int t = 0; t < T && linear->format == INT8_ROWS; t++)
        for (int r = 0; r < n_rows; r++) sums[(size_t)t * STRIP + r] *= linear->scale[n0 + r];
}
