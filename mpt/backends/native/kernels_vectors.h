/* Products of float32, float16 and bfloat16 weights in the compiler's own vectors, for every instruction set that has no
 * file of its own for them: 8 lanes of float32, which the compiler makes of what the processor has.
 *
 * A file says before it includes this one how many rows (DENSE_ROWS) and tokens (DENSE_TOKENS, at most 4) are multiplied
 * at once, as its registers allow, and what keeps a vector in one (IN_A_REGISTER). */
#pragma once
#include "kernels_lanes.h"

enum { TOKENS_AT_ONCE = 4, CODE_TOKENS = 4 };
typedef float Dense;
static const Format DENSE = FLOAT32;

static inline Lanes eight(const float *from) {
    Lanes found;
    memcpy(&found, from, sizeof found);
    return found;
}

static inline Lanes eight_halves(const fp16 *from) {
#if defined(__F16C__)
    return (Lanes)_mm256_cvtph_ps(_mm_loadu_si128((const __m128i *)from));
#elif defined(__ARM_NEON)
    const float32x4_t both[2] = {vcvt_f32_f16(vld1_f16((const __fp16 *)from)),
                                 vcvt_f32_f16(vld1_f16((const __fp16 *)from + 4))};
    Lanes found;
    memcpy(&found, both, sizeof found);
    return found;
#else /* as in `half` */
    Narrow narrow_;
    memcpy(&narrow_, from, sizeof narrow_);
    const Bits bits = __builtin_convertvector(narrow_, Bits), size = (bits & 0x7fff) << 13;
    const Bits large = (Bits)(size >= 0x0f800000) & 0x7f800000;
    return (Lanes)((Bits)((Lanes)size * 0x1p112f) | large | (bits & 0x8000) << 16);
#endif
}

static inline __attribute__((always_inline)) Lanes eight_weights(const Format format, const void *row, int k) {
    if (format == FLOAT32) return eight((const float *)row + k);
    if (format == FLOAT16) return eight_halves((const fp16 *)row + k);
    Narrow bits;
    memcpy(&bits, (const bf16 *)row + k, sizeof bits);
    return (Lanes)(__builtin_convertvector(bits, Bits) << 16);
}

static inline float one_weight(Format format, const void *row, int k) {
    if (format == FLOAT32) return ((const float *)row)[k];
    return format == FLOAT16 ? half((const fp16 *)row + k) : wide(((const bf16 *)row)[k]);
}

/* Halves are added to halves: one addition at each step, whose order the compiler cannot change. */
static inline float sum_of_eight(Lanes s) {
    s += IN_ORDER(s, 4, 5, 6, 7, 0, 1, 2, 3);
    s += IN_ORDER(s, 2, 3, 0, 1, 6, 7, 4, 5);
    return s[0] + s[1];
}

/* A sum and n < 8 products more. Never inlined, so that it rounds in one way for all callers: the compiler may reorder
 * sums. */
static __attribute__((noinline)) float with_the_rest(float sum, const float *w, const float *x, int n) {
    for (int i = 0; i < n; i++) sum += w[i] * x[i];
    return sum;
}

/* DENSE_ROWS rows times n_tokens tokens, a constant; only the sums of the first n_rows rows are kept. */
static inline __attribute__((always_inline)) void some_rows(const Format format, const char *const *rows, int n_rows,
                                                            const float *x, size_t x_stride, int K, const int n_tokens,
                                                            int is_first, float *sums) {
    Lanes s[DENSE_ROWS][DENSE_TOKENS] = {0};
    int k = 0;
    for (; k + 8 <= K; k += 8) {
        Lanes xs[DENSE_TOKENS];
        for (int t = 0; t < n_tokens; t++) {
            xs[t] = eight(x + t * x_stride + k);
            IN_A_REGISTER(xs[t]);
        }
        for (int r = 0; r < DENSE_ROWS; r++) {
            Lanes w = eight_weights(format, rows[r], k);
            IN_A_REGISTER(w);
            for (int t = 0; t < n_tokens; t++) s[r][t] += w * xs[t];
        }
    }
    for (int r = 0; r < DENSE_ROWS; r++) {
        float rest[8];
        for (int i = k; i < K; i++) rest[i - k] = one_weight(format, rows[r], i);
        for (int t = 0; t < n_tokens && r < n_rows; t++) {
            float found = sum_of_eight(s[r][t]), *to = sums + t * STRIP + r;
            if (k < K) found = with_the_rest(found, rest, x + t * x_stride + k, K - k);
            *to = is_first ? found : *to + found;
        }
    }
}

static inline __attribute__((always_inline)) void multiply_format(const Format format, const void *rows, size_t stride,
                                                                  int n_rows, const float *x, size_t x_stride, int T,
                                                                  int K, int is_first, float *sums) {
    for (int t = 0; t < T; t += DENSE_TOKENS) {
        const float *tokens = x + t * x_stride;
        const int n = T - t < DENSE_TOKENS ? T - t : DENSE_TOKENS;
        for (int r = 0; r < n_rows; r += DENSE_ROWS) {
            const int here = n_rows - r < DENSE_ROWS ? n_rows - r : DENSE_ROWS;
            const char *some[DENSE_ROWS];
            for (int i = 0; i < DENSE_ROWS; i++)
                some[i] = (const char *)rows + (i < here ? r + i : r) * stride * number_bytes(format);
            float *to = sums + t * STRIP + r;
            if (n == DENSE_TOKENS)
                some_rows(format, some, here, tokens, x_stride, K, DENSE_TOKENS, is_first, to);
            else if (n == 3)
                some_rows(format, some, here, tokens, x_stride, K, 3, is_first, to);
            else if (n == 2)
                some_rows(format, some, here, tokens, x_stride, K, 2, is_first, to);
            else
                some_rows(format, some, here, tokens, x_stride, K, 1, is_first, to);
        }
    }
}

/* As said in kernels_avx512.h. */
static void multiply_dense(Format format, const void *rows, size_t stride, int n_rows, const void *x, size_t x_stride,
                           int T, int K, int is_first, float *sums) {
    if (format == FLOAT32) multiply_format(FLOAT32, rows, stride, n_rows, x, x_stride, T, K, is_first, sums);
    if (format == FLOAT16) multiply_format(FLOAT16, rows, stride, n_rows, x, x_stride, T, K, is_first, sums);
    if (format == BFLOAT16) multiply_format(BFLOAT16, rows, stride, n_rows, x, x_stride, T, K, is_first, sums);
}

/* What the offsets b of n groups take from a token's sum. Never inlined, so that it rounds in one way for all callers. */
static __attribute__((noinline)) float offset_of(const float *b, const float *sums, int n) {
    float found = 0;
    for (int i = 0; i < n; i++) found += b[i] * sums[i];
    return found;
}

/* A row of n codes with its scales a and offsets b times n_tokens tokens, a constant, from token t0 and input `at` on,
 * through `dot8`, which each file brings: 32 products of codes and inputs into 8 sums, the first 16 products into the
 * first four of them; exact. */
static inline __attribute__((always_inline)) void multiply_groups(const uint8_t *codes, const float *a, const float *b,
                                                                  int n, const int group, const Coded *inputs, int t0,
                                                                  int at, const int n_tokens, float *out) {
    const size_t K = inputs->K;
    const int8_t *x = inputs->codes + t0 * K + at;
    const float *steps = inputs->steps + (t0 * K + at) / 32;
    const float *inputs_sums = (group == 32 ? inputs->sums32 : inputs->sums16) + (t0 * K + at) / group;
    float scales[CODE_TOKENS][CHUNK / 16]; /* of the weights and of the inputs */
    Lanes sums[CODE_TOKENS] = {0};
    for (int t = 0; t < n_tokens; t++)
        for (int i = 0; i < n / group; i++) scales[t][i] = a[i] * steps[t * (K / 32) + i * group / 32];
    for (int k = 0, i = 0; k < n; k += 32, i++)
        for (int t = 0; t < n_tokens; t++) {
            const Lanes dots = __builtin_convertvector(dot8(codes + k, x + t * K + k), Lanes);
            const float s0 = scales[t][group == 32 ? i : 2 * i], s1 = group == 32 ? s0 : scales[t][2 * i + 1];
            sums[t] += dots * (Lanes){s0, s0, s0, s0, s1, s1, s1, s1};
        }
    for (int t = 0; t < n_tokens; t++) {
        const float offset = offset_of(b, inputs_sums + t * (K / group), n / group);
        const float found = sum_of_eight(sums[t]) - offset;
        float *to = out + (size_t)t * STRIP;
        *to = at ? *to + found : found;
    }
}

/* n_rows rows of weights in codes, STRIP or fewer, from n0 on, times T tokens: sums (T, STRIP). */
static void multiply_codes(const Linear *linear, int n0, int n_rows, const Coded *inputs, int T, float *sums) {
    const int K = linear->n_in, group = BLOCK_FORMATS[linear->format].group;
    uint8_t codes[CHUNK];
    float a[CHUNK / 16], b[CHUNK / 16];
    for (int k = 0; k < K; k += CHUNK)
        for (int r = 0; r < n_rows; r++) {
            const int n = K - k < CHUNK ? K - k : CHUNK;
            unpack(linear, n0 + r, k, n, codes, a, b);
            int t = 0;
#define OF(n_tokens)                                                                                            \
    for (; t + n_tokens <= T; t += n_tokens) {                                                                  \
        float *to = sums + (size_t)t * STRIP + r;                                                               \
        if (group == 32) multiply_groups(codes, a, b, n, 32, inputs, t, k, n_tokens, to);                       \
        else multiply_groups(codes, a, b, n, 16, inputs, t, k, n_tokens, to);                                   \
    }
            OF(4) OF(1)
#undef OF
        }
}
