/* The formats of weights that are no plain numbers (those are in common.h), and their numbers: as codes with scales.
 *
 * Blocks are ggml's (Source: ggml-common.h and dequantize_row_* of ggml-quants.c). Every block format comes down to one
 * form: a code of up to eight bits for each weight, and for each group of 16 or 32 weights a scale a and an offset b,
 * with weight = a code - b. Products take the codes (kernels.h), so a new format needs `unpack` here and nothing there.
 */
#pragma once
#include "common.h"

typedef struct { /* a format that is no plain number */
    int values, bytes; /* of a block */
    int group;         /* weights that share a scale */
} BlockFormat;

static const BlockFormat BLOCK_FORMATS[N_FORMATS] = {
    [INT8_ROWS] = {32, 32, 32}, [Q4_0] = {32, 18, 32}, [Q4_1] = {32, 20, 32}, [Q5_0] = {32, 22, 32},
    [Q5_1] = {32, 24, 32},      [Q8_0] = {32, 34, 32}, [Q2_K] = {256, 84, 16}, [Q3_K] = {256, 110, 16},
    [Q4_K] = {256, 144, 32},    [Q5_K] = {256, 176, 32}, [Q6_K] = {256, 210, 16}, [IQ4_NL] = {32, 18, 32},
};

/* Bytes of one row of a matrix. */
static inline size_t row_bytes(const Linear *linear) {
    if (number_bytes(linear->format)) return (size_t)linear->n_in * number_bytes(linear->format);
    const BlockFormat *format = BLOCK_FORMATS + linear->format;
    return (size_t)linear->n_in / format->values * format->bytes;
}

/* Products take signed numbers as codes + 128 where the processor multiplies unsigned by signed ones, and as they are
 * elsewhere. */
#ifdef SIGNED_CODES
enum { ADDED = 0 };
#else
enum { ADDED = 128 };
#endif

/* The code of the weight 0, where a format's groups have no minimum. */
static inline int zero_of(Format format) {
    switch (format) {
    case Q4_0: return 8;
    case Q5_0: return 16;
    case Q3_K: return 4;
    case Q6_K: return 32;
    case INT8_ROWS: case Q8_0: case IQ4_NL: return ADDED;
    default: return 0;
    }
}

typedef uint8_t Bytes __attribute__((vector_size(16)));

static inline Bytes bytes_at(const uint8_t *from) {
    Bytes found;
    memcpy(&found, from, sizeof found);
    return found;
}

/* The bytes of a table at 16 places, each below 16. */
static inline Bytes looked_up(const int8_t *table, Bytes places) {
#if defined(__SSSE3__)
    return (Bytes)_mm_shuffle_epi8((__m128i)bytes_at((const uint8_t *)table), (__m128i)places);
#elif defined(__aarch64__)
    return (Bytes)vqtbl1q_u8((uint8x16_t)bytes_at((const uint8_t *)table), (uint8x16_t)places);
#else
    Bytes found;
    for (int i = 0; i < 16; i++) found[i] = (uint8_t)table[places[i]];
    return found;
#endif
}

/* Four bits each of 16 bytes: the low ones to codes, the high ones `apart` codes further. */
static inline void low_then_high(const uint8_t *from, int apart, uint8_t *codes) {
    const Bytes both = bytes_at(from), low = both & 15, high = both >> 4;
    memcpy(codes, &low, 16), memcpy(codes + apart, &high, 16);
}

/* The eight bits of a byte as eight bytes of 0 or 16, the lowest bit first. */
static inline uint64_t fifth_bits(uint8_t byte) {
    const uint64_t spread = byte * 0x0101010101010101u & 0x8040201008040201u; /* a bit in each byte, at its own place */
    return ((spread + 0x00406070787c7e7fu) >> 7 & 0x0101010101010101u) * 16; /* the sum carries it to the highest */
}

/* Where the lowest bit of four bytes is that of code 0, and the highest that of code 31. */
static inline void add_fifth_bits(const uint8_t *from, uint8_t *codes) {
    for (int i = 0; i < 4; i++) {
        uint64_t eight;
        memcpy(&eight, codes + 8 * i, 8);
        eight |= fifth_bits(from[i]);
        memcpy(codes + 8 * i, &eight, 8);
    }
}

/* The scales and minimums of Q4_K and Q5_K, of six bits each, of eight groups, a byte each. */
static inline void six_bits(const uint8_t *from, uint64_t *scales, uint64_t *minimums) {
    uint32_t low, middle, high; /* four bytes at a time */
    memcpy(&low, from, 4), memcpy(&middle, from + 4, 4), memcpy(&high, from + 8, 4);
    const uint32_t of_scales[2] = {low & 0x3f3f3f3f, (high & 0x0f0f0f0f) | (low >> 6 & 0x03030303) << 4};
    const uint32_t of_minimums[2] = {middle & 0x3f3f3f3f, (high >> 4 & 0x0f0f0f0f) | (middle >> 6 & 0x03030303) << 4};
    memcpy(scales, of_scales, 8), memcpy(minimums, of_minimums, 8);
}

static inline void unpack_k(Format format, const uint8_t *block, uint8_t *codes, float *a, float *b) {
    if (format == Q4_K || format == Q5_K) {
        const float d = half(block), least = half(block + 2);
        uint64_t both[2];
        six_bits(block + 4, both, both + 1);
        const uint8_t *scales = (const uint8_t *)both, *minimums = (const uint8_t *)(both + 1);
        const uint8_t *quarters = block + (format == Q4_K ? 16 : 48), *fifths = block + 16;
        for (int i = 0; i < 8; i++) low_then_high(quarters + 16 * i, 32, codes + 64 * (i / 2) + 16 * (i % 2));
        if (format == Q5_K)
            for (int g = 0; g < 8; g++)
                for (int i = 0; i < 32; i++) codes[32 * g + i] |= (uint8_t)((fifths[i] >> g & 1) << 4);
        for (int g = 0; g < 8; g++) a[g] = d * scales[g], b[g] = least * minimums[g];
        return;
    }
    if (format == Q6_K) {
        const float d = half(block + 208);
        for (int h = 0; h < 2; h++)
            for (int i = 0; i < 32; i++) {
                const uint8_t low = block[64 * h + i], next = block[64 * h + 32 + i], high = block[128 + 32 * h + i];
                codes[128 * h + i] = (low & 15) | (high & 3) << 4;
                codes[128 * h + 32 + i] = (next & 15) | (high >> 2 & 3) << 4;
                codes[128 * h + 64 + i] = low >> 4 | (high >> 4 & 3) << 4;
                codes[128 * h + 96 + i] = next >> 4 | (high >> 6) << 4;
            }
        for (int g = 0; g < 16; g++) a[g] = d * (int8_t)block[192 + g], b[g] = zero_of(Q6_K) * a[g];
        return;
    }
    const uint8_t *pairs = block + (format == Q2_K ? 16 : 32); /* two bits each */
    for (int h = 0; h < 2; h++)
        for (int part = 0; part < 4; part++)
            for (int i = 0; i < 32; i++) codes[128 * h + 32 * part + i] = pairs[32 * h + i] >> 2 * part & 3;
    if (format == Q2_K) {
        const float d = half(block + 80), least = half(block + 82);
        for (int g = 0; g < 16; g++) a[g] = d * (block[g] & 15), b[g] = least * (block[g] >> 4);
        return;
    }
    const float d = half(block + 108); /* Q3_K */
    for (int part = 0; part < 8; part++)
        for (int i = 0; i < 32; i++) codes[32 * part + i] |= (uint8_t)((block[i] >> part & 1) << 2);
    for (int g = 0; g < 16; g++) {
        const int low = block[96 + g % 8] >> 4 * (g / 8) & 15, high = block[104 + g % 4] >> 2 * (g / 4) & 3;
        a[g] = d * ((low | high << 4) - 32), b[g] = zero_of(Q3_K) * a[g];
    }
}

/* n float16 numbers, `stride` bytes apart. */
static inline void halves(const uint8_t *at, int stride, int n, float *out) {
    int i = 0;
#ifdef __F16C__
    for (; i + 8 <= n; i += 8) {
        uint16_t eight[8];
        for (int k = 0; k < 8; k++) memcpy(eight + k, at + (i + k) * stride, 2);
        _mm256_storeu_ps(out + i, _mm256_cvtph_ps(_mm_loadu_si128((const __m128i *)eight)));
    }
#endif
    for (; i < n; i++) out[i] = half(at + i * stride);
}

/* n blocks of 32 weights. */
static inline void unpack_32(Format format, const uint8_t *block, int n, uint8_t *codes, float *a, float *b) {
    static const int8_t MEANT[16] = {-127, -104, -83, -65, -49, -35, -22, -10, 1, 13, 25, 38, 53, 69, 89, 113};
    const int bytes = BLOCK_FORMATS[format].bytes, has_minimum = format == Q4_1 || format == Q5_1;
    const int is_fifth = format == Q5_0 || format == Q5_1, from = 2 + 2 * has_minimum + 4 * is_fifth;
    const float zero = zero_of(format);
    halves(block, bytes, n, a);
    if (has_minimum) {
        halves(block + 2, bytes, n, b);
        for (int i = 0; i < n; i++) b[i] = -b[i];
    } else {
        for (int i = 0; i < n; i++) b[i] = zero * a[i];
    }
    for (int i = 0; i < n; i++, block += bytes, codes += 32) {
        if (format == Q8_0) {
            const Bytes first = bytes_at(block + 2) + ADDED, second = bytes_at(block + 18) + ADDED;
            memcpy(codes, &first, 16), memcpy(codes + 16, &second, 16);
            continue;
        }
        low_then_high(block + from, 16, codes);
        if (is_fifth) add_fifth_bits(block + from - 4, codes);
        for (int k = 0; k < 32 && format == IQ4_NL; k += 16) {
            const Bytes meant = looked_up(MEANT, bytes_at(codes + k)) + ADDED;
            memcpy(codes + k, &meant, 16);
        }
    }
}

/* Where a row's block of weight k0 begins. */
static inline const uint8_t *block_at(const Linear *linear, size_t row, int k0) {
    const BlockFormat *format = BLOCK_FORMATS + linear->format;
    return (const uint8_t *)linear->weight + row * row_bytes(linear) + (size_t)k0 / format->values * format->bytes;
}

/* n weights of a row of a matrix from k0 on, whole blocks: their codes, and each group's a and b. `row`: the row. */
static inline void unpack(const Linear *linear, size_t row, int k0, int n, uint8_t *codes, float *a, float *b) {
    const BlockFormat *format = BLOCK_FORMATS + linear->format;
    const uint8_t *block = block_at(linear, row, k0);
    if (linear->format == INT8_ROWS) {
        const float scale = linear->scale[row];
        for (int i = 0; i < n; i++) codes[i] = (uint8_t)(block[i] + ADDED);
        for (int g = 0; g < n / 32; g++) a[g] = scale, b[g] = ADDED * scale;
        return;
    }
    if (format->values == 32) {
        switch (linear->format) { /* a constant for the compiler, which leaves out what it does not ask for */
#define OF(format) case format: unpack_32(format, block, n / 32, codes, a, b); return
            OF(Q4_0); OF(Q4_1); OF(Q5_0); OF(Q5_1); OF(Q8_0); OF(IQ4_NL);
#undef OF
        default: return;
        }
    }
    const int groups = 256 / format->group;
    for (int i = 0; i < n; i += 256, block += format->bytes, a += groups, b += groups)
        unpack_k(linear->format, block, codes + i, a, b);
}
