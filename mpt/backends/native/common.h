/* What the C files of this folder share.
 *
 *   variants      which instructions the code is written for, by what the compiler predefines
 *   structures    what Python fills in: a model, a step (structures.py declares the same for ctypes)
 *   numbers       rounding to bfloat16 and float16, and back; exp, GELU
 *   KV cache      where a key lies, how it is quantized and stored
 *   tiles         how AMX is set up
 *
 * Letters as in mpt/model.py: T tokens of the step, H heads, D head size, C d_model, S stored positions; besides them
 * G KV heads, F the inner width of the MLP, K the inputs and N the outputs of a product. The C code checks nothing:
 * its callers, the Python files of this folder, check shapes.
 */
#pragma once
#include <math.h>
#include <stddef.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>
#include "threads.h"

/* The variants of this code, by what the compiler predefines; VARIANTS in build.py says the same in Python, and the
 * loader compares. */
#if defined(__AVX512BW__) && defined(__AVX512DQ__)
#define AVX512 1
#else
#define AVX512 0
#endif
#if AVX512 && defined(__AVX512VNNI__)
#define AVX512_VNNI 1 /* and dot products of int8 */
#else
#define AVX512_VNNI 0
#endif
#if AVX512_VNNI && defined(__AVX512BF16__)
#define AVX512_BF16 1 /* and of bfloat16 */
#else
#define AVX512_BF16 0
#endif
#if !AVX512 && defined(__AVX2__) && defined(__FMA__) && defined(__F16C__)
#define AVX2 1
#else
#define AVX2 0
#endif
#if AVX2 && defined(__AVXVNNI__)
#define AVX2_VNNI 1
#else
#define AVX2_VNNI 0
#endif
#if defined(__x86_64__)
#include <immintrin.h>
#elif defined(__ARM_NEON)
#include <arm_neon.h>
#endif
#if defined(__ARM_NEON) && defined(__ARM_FEATURE_DOTPROD)
#define NEON 1 /* with the dot products of int8 */
#else
#define NEON 0
#endif
#if defined(__ARM_NEON) || (AVX2 && !AVX2_VNNI) || (AVX512 && !AVX512_VNNI)
#define SIGNED_CODES 1 /* products are of signed numbers; elsewhere of unsigned ones by signed ones */
#endif
#if AVX512_BF16 && defined(__AMX_TILE__) && defined(__AMX_BF16__) && defined(__AMX_INT8__)
#define AMX 1 /* and products with weights are made of tiles: tiles_step.c, tiles_prompt.c */
#else
#define AMX 0
#endif

/* `structures.py` has the same numbers, and the loader compares. */
enum {
    PANEL = 16,              /* tokens side by side: a cache line of float32, the width of a tile */
    MAX_TOKENS = 64,         /* of one call of mpt_step */
    MAX_HEAD = 256,          /* of D in mpt_step */
    N_OUT_MULTIPLE = 16,     /* of each Linear's n_out: the outputs of a tile */
    N_IN_MULTIPLE = 32,      /* of its n_in, where weights are bfloat16: the inputs a tile adds up */
    N_IN_MULTIPLE_INT8 = 64, /* where they are int8 */
};

typedef uint16_t bf16;
typedef uint16_t fp16; /* IEEE float16 */

/* What a matrix is stored in; FORMATS in structures.py has the same order. Ggml's blocks are in formats.h. */
typedef enum {
    FLOAT32, FLOAT16, BFLOAT16,
    INT8_ROWS, /* int8 with a scale for each output */
    Q4_0, Q4_1, Q5_0, Q5_1, Q8_0, Q2_K, Q3_K, Q4_K, Q5_K, Q6_K, IQ4_NL, N_FORMATS
} Format;

typedef struct {
    const void *weight; /* (n_out, n_in) row-major, in the format */
    const float *scale; /* (n_out) of INT8_ROWS, else NULL */
    const float *bias;  /* (n_out) or NULL */
    int32_t n_out, n_in, format;
} Linear;

typedef struct {
    const float *weight, *bias; /* (C) each; bias may be NULL; weight is NULL where the model has no such norm */
} Norm;

typedef struct { /* an adapter's part of one projection: y += b a x */
    const void *a, *b; /* (rank, n_in) and, transposed and with the scale in it, (rank, n_out); float32 in a model of
                        * float32 or float16, else bfloat16 */
    int32_t rank;      /* 0: the adapter has no part of this projection */
} Lora;

/* In the order of `PROJECTIONS` in structures.py. */
enum { WQKV, OUT_PROJ, UP_PROJ, DOWN_PROJ, N_PROJECTIONS };

typedef struct {
    Norm norm_1, norm_2, q_ln, k_ln;
    Linear wqkv, out_proj, up_proj, down_proj;
} Layer;

typedef struct {
    int32_t format; /* FLOAT32, FLOAT16 or BFLOAT16: of weights that are not quantized, and of the KV cache */
    int32_t n_layers, d_model, n_heads, n_kv_heads, d_head, d_ffn;
    float eps, softmax_scale, clip_qkv; /* clip_qkv 0: none */
    const float *slopes;                /* (H) ALiBi, or NULL */
    const Layer *layers;
    Norm norm_f;
    Linear head;
} Model;

typedef struct {
    int32_t n_tokens, n_rows, n_logits, n_threads;
    int32_t n_adapters, max_rank;
    const float *x;             /* (T, C) embeddings */
    const int32_t *row_tokens;  /* (rows) tokens of each row, in the order of x */
    const int32_t *row_length;  /* (rows) positions stored before this step */
    const int32_t *row_capacity;
    void *const *kv;            /* (rows, layers) each (2, KV heads, capacity, D) in the model's format, or int8 with scales */
    float *const *kv_scale;     /* (rows, layers) each (2, KV heads, capacity): value = int8 * scale; NULL: no int8 */
    float *const *key_norm;     /* (rows) each (layers, KV heads): largest |k| stored; updated */
    const Lora *adapters;       /* (adapters, layers, N_PROJECTIONS) of all adapters that rows of this step use */
    const int32_t *row_adapter; /* (rows) the index of each row's adapter, or -1 */
    float *low;                 /* memory for a x of one projection: its shape is each file's own */
    const int32_t *logit_tokens; /* (n_logits) which tokens want logits */
    float *logits;              /* (n_logits, V) */
    float *scratch;             /* mpt_scratch_floats() */
    int64_t *keys_read;         /* total of keys attended over, all heads; NULL: not counted */
    float drop;                 /* old keys may be left out where all together weigh less than this share; 0: never */
} Step;

/* -- numbers ------------------------------------------------------------------------------------------------------- */

/* Whether products multiply these weights with inputs in float32, as they are. */
static inline int is_float(Format format) { return format == FLOAT32 || format == FLOAT16; }

/* Bytes of one number; 0 where a format is no plain number. */
static inline int number_bytes(Format format) { return format == FLOAT32 ? 4 : format <= BFLOAT16 ? 2 : 0; }

static inline float wide(bf16 x) {
    uint32_t bits = (uint32_t)x << 16;
    float out;
    memcpy(&out, &bits, 4);
    return out;
}

static inline bf16 narrow(float x) { /* to nearest, ties to even; NaN stays NaN */
    uint32_t bits;
    memcpy(&bits, &x, 4);
    if ((bits & 0x7fffffff) > 0x7f800000) return (bf16)((bits >> 16) | 0x40);
    return (bf16)((bits + 0x7fff + ((bits >> 16) & 1)) >> 16);
}

#if AVX512
/* Four sums, each over 16 lanes, into four lanes. */
static inline __m128 sums_of(__m512 s0, __m512 s1, __m512 s2, __m512 s3) {
    const __m512 a = _mm512_add_ps(_mm512_unpacklo_ps(s0, s1), _mm512_unpackhi_ps(s0, s1));
    const __m512 b = _mm512_add_ps(_mm512_unpacklo_ps(s2, s3), _mm512_unpackhi_ps(s2, s3));
    const __m512 low = _mm512_shuffle_ps(a, b, 0x44), high = _mm512_shuffle_ps(a, b, 0xee);
    const __m512 ab = _mm512_add_ps(low, high);
    const __m256 half = _mm256_add_ps(_mm512_castps512_ps256(ab), _mm512_extractf32x8_ps(ab, 1));
    return _mm_add_ps(_mm256_castps256_ps128(half), _mm256_extractf128_ps(half, 1));
}
#endif

/* n numbers rounded. */
static inline void narrow_all(const float *x, int n, bf16 *out) {
    int i = 0;
#if AVX512_BF16
    for (; i + 16 <= n; i += 16)
        _mm256_storeu_si256((__m256i *)(out + i), (__m256i)_mm512_cvtneps_pbh(_mm512_loadu_ps(x + i)));
#endif
    for (; i < n; i++) out[i] = narrow(x[i]);
}

static inline float half(const void *at) { /* a float16 number */
    fp16 bits;
    memcpy(&bits, at, 2);
#if defined(__F16C__)
    return _cvtsh_ss(bits);
#elif defined(__ARM_FP16_FORMAT_IEEE)
    __fp16 value;
    memcpy(&value, &bits, 2);
    return value;
#else /* without a branch, so that loops over it become vectors */
    const uint32_t sign = (uint32_t)(bits & 0x8000) << 16, size = (uint32_t)(bits & 0x7fff) << 13;
    float value;
    memcpy(&value, &size, 4);
    value *= 0x1p112f; /* the exponents begin 112 apart */
    uint32_t found;
    memcpy(&found, &value, 4);
    found |= sign | (size >= 0x0f800000 ? 0x7f800000 : 0); /* infinite or NaN */
    memcpy(&value, &found, 4);
    return value;
#endif
}

static inline fp16 halved(float x) { /* to nearest, ties to even */
#if defined(__F16C__)
    return _cvtss_sh(x, 0);
#elif defined(__ARM_FP16_FORMAT_IEEE)
    const __fp16 value = (__fp16)x;
    fp16 found;
    memcpy(&found, &value, 2);
    return found;
#else
    uint32_t bits;
    memcpy(&bits, &x, 4);
    const uint32_t sign = bits >> 16 & 0x8000, size = bits & 0x7fffffff;
    if (size > 0x7f800000) return (fp16)(sign | 0x7e00);
    if (size >= 0x477ff000) return (fp16)(sign | 0x7c00); /* from 65520 on */
    if (size < 0x38800000) return (fp16)(sign | (uint32_t)__builtin_rintf(__builtin_fabsf(x) * 0x1p24f)); /* subnormal */
    return (fp16)(sign | (size - 0x38000000 + 0xfff + (size >> 13 & 1)) >> 13);
#endif
}

/* n float16 numbers in float32. */
static inline void widen_halves(const fp16 *x, int n, float *out) {
    int i = 0;
#if AVX512
    for (; i + 16 <= n; i += 16)
        _mm512_storeu_ps(out + i, _mm512_cvtph_ps(_mm256_loadu_si256((const __m256i *)(x + i))));
#elif defined(__F16C__)
    for (; i + 8 <= n; i += 8) _mm256_storeu_ps(out + i, _mm256_cvtph_ps(_mm_loadu_si128((const __m128i *)(x + i))));
#elif defined(__ARM_NEON)
    for (; i + 4 <= n; i += 4) vst1q_f32(out + i, vcvt_f32_f16(vld1_f16((const __fp16 *)(x + i))));
#endif
    for (; i < n; i++) out[i] = half(x + i);
}

static inline void widen_numbers(Format format, const void *x, int n, float *out) {
    if (format == FLOAT32) memcpy(out, x, n * sizeof *out);
    if (format == FLOAT16) widen_halves(x, n, out);
    for (int i = 0; i < n && format == BFLOAT16; i++) out[i] = wide(((const bf16 *)x)[i]);
}

/* n numbers stored in a model's format. */
static inline void narrow_to(Format format, const float *x, int n, void *out) {
    if (format == FLOAT32) memcpy(out, x, n * sizeof *x);
    if (format == BFLOAT16) narrow_all(x, n, out);
    for (int i = 0; i < n && format == FLOAT16; i++) ((fp16 *)out)[i] = halved(x[i]);
}

/* The largest of n numbers and `most`. In 16 lanes: gcc makes no vectors of a single running maximum, and the scalar
 * loop took as long as the products. */
static inline float largest_of(const float *x, int n, float most) {
    float lanes[PANEL];
    int j = 0;
    for (int c = 0; c < PANEL; c++) lanes[c] = most;
    for (; j + PANEL <= n; j += PANEL)
        for (int c = 0; c < PANEL; c++) lanes[c] = x[j + c] > lanes[c] ? x[j + c] : lanes[c];
    for (; j < n; j++) lanes[0] = x[j] > lanes[0] ? x[j] : lanes[0];
    for (int half = PANEL / 2; half; half /= 2)
        for (int c = 0; c < half; c++) lanes[c] = lanes[c + half] > lanes[c] ? lanes[c + half] : lanes[c];
    return lanes[0];
}

/* The largest |x| of n numbers, at least 1e-30; NaN if one of them is. */
static inline float largest_size(const float *x, int n) {
    const float least = 1e-30f;
    int32_t largest; /* as bits: they are in the order of the numbers, and NaN is above all */
    float found;
    memcpy(&largest, &least, 4);
    for (int i = 0; i < n; i++) {
        int32_t bits;
        memcpy(&bits, x + i, 4);
        bits &= 0x7fffffff;
        largest = bits > largest ? bits : largest;
    }
    memcpy(&found, &largest, 4);
    return found;
}

/* e^x for x <= 88, relative error 2e-7: 2^n times a polynomial, without a call so that loops over it become vectors.
 * Below -80 it is 0: products with smaller numbers would be subnormal, and those took ten times as long. */
static inline float exp_(float given) {
    float x = given < -80.0f ? -80.0f : given;
    float n = __builtin_rintf(x * 1.44269504f);
    float r = x - n * 0.693359375f + n * 2.12194440e-4f;
    float p = 1.9875691500e-4f;
    p = p * r + 1.3981999507e-3f;
    p = p * r + 8.3334519073e-3f;
    p = p * r + 4.1665795894e-2f;
    p = p * r + 1.6666665459e-1f;
    p = p * r + 5.0000001201e-1f;
    p = p * r * r + r + 1.0f;
    int32_t bits = ((int32_t)n + 127) << 23;
    float power;
    memcpy(&power, &bits, 4);
    return given < -80.0f ? 0.0f : p * power;
}

/* GELU in its erf form; erf to 1.5e-7 (Abramowitz and Stegun 7.1.26). */
static inline float gelu_(float x) {
    float z = __builtin_fabsf(x) * 0.70710678f;
    float t = 1.0f / (1.0f + 0.3275911f * z);
    float poly = t * (0.254829592f + t * (-0.284496736f + t * (1.421413741f + t * (-1.453152027f + t * 1.061405429f))));
    float tail = 0.5f * poly * exp_(-z * z); /* Phi(-|x|) */
    return x * (x > 0 ? 1.0f - tail : tail);
}

/* -- the KV cache -------------------------------------------------------------------------------------------------- */

/* What is stored of one key head of one row: keys and values, (positions, D) each. */
typedef struct {
    void *keys, *values;
    float *key_scales, *value_scales; /* (positions) of int8, else NULL */
    Format format;                    /* the model's, where it is not int8 */
} Stored;

static inline Stored stored_of(const Model *model, const Step *step, int layer, int row, int g) {
    const size_t capacity = step->row_capacity[row], at = (size_t)row * model->n_layers + layer, D = model->d_head;
    const size_t keys = g * capacity, values = keys + model->n_kv_heads * capacity; /* in positions */
    if (step->kv_scale) {
        int8_t *numbers = step->kv[at];
        float *scales = step->kv_scale[at];
        return (Stored){numbers + keys * D, numbers + values * D, scales + keys, scales + values, INT8_ROWS};
    }
    char *numbers = step->kv[at];
    const size_t bytes = D * number_bytes(model->format);
    return (Stored){numbers + keys * bytes, numbers + values * bytes, NULL, NULL, model->format};
}

/* D numbers of one head, at one position, as int8 to nearest; returns their scale: x = int8 * scale. If all are zero,
 * they are stored as zero. If one of them is NaN or infinite, so is the scale, and all of them are NaN when they are
 * read: damage is not hidden. The same bits as `Int8Layer.write` in mpt/backends/int8_cache.py. */
static inline float quantize_head(const float *x, int D, int8_t *out) {
    const float scale = largest_size(x, D) / 127;
    for (int d = 0; d < D; d++) out[d] = (int8_t)(int32_t)__builtin_rintf(x[d] / scale);
    return scale;
}

/* Store a key and a value, (D) each, at a position. */
static inline void store_at(Stored to, size_t position, const float *key, const float *value, int D) {
    if (to.key_scales) {
        to.key_scales[position] = quantize_head(key, D, (int8_t *)to.keys + position * D);
        to.value_scales[position] = quantize_head(value, D, (int8_t *)to.values + position * D);
        return;
    }
    const size_t at = position * D * number_bytes(to.format);
    narrow_to(to.format, key, D, (char *)to.keys + at), narrow_to(to.format, value, D, (char *)to.values + at);
}

/* An upper bound of |k| of the key at a position, as it is stored. */
static inline float length_of_key(Stored from, size_t position, int D) {
    float square = 0;
    if (from.key_scales) {
        const int8_t *key = (const int8_t *)from.keys + position * D;
        int32_t sum = 0;
        for (int d = 0; d < D; d++) sum += key[d] * key[d];
        square = (float)sum * from.key_scales[position] * from.key_scales[position];
    } else if (from.format == BFLOAT16) {
        const bf16 *key = (const bf16 *)from.keys + position * D;
        for (int d = 0; d < D; d++) square += wide(key[d]) * wide(key[d]);
    } else if (from.format == FLOAT16) {
        const fp16 *key = (const fp16 *)from.keys + position * D;
        for (int d = 0; d < D; d++) square += half(key + d) * half(key + d);
    } else {
        const float *key = (const float *)from.keys + position * D;
        for (int d = 0; d < D; d++) square += key[d] * key[d];
    }
    return sqrtf(square) * 1.0001f; /* more than the rounding error of the sum */
}

/* -- tiles --------------------------------------------------------------------------------------------------------- */

#if AMX
typedef struct {
    uint8_t palette, start_row, reserved[14];
    uint16_t bytes[16];
    uint8_t rows[16];
} TileConfig;

/* Static: with a local variable gcc 12 leaves out the stores to most of it, believing that only its first bytes are
 * read. */
static const TileConfig TILES = {
    .palette = 1,
    .bytes = {64, 64, 64, 64, 64, 64, 64, 64},
    .rows = {16, 16, 16, 16, 16, 16, 16, 16},
};

static inline void configure_tiles(void) { _tile_loadconfig(&TILES); }
#else
static inline void configure_tiles(void) {}
#endif
