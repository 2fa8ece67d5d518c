/* Products on any processor: all in plain C and the compiler's vectors. */
#pragma once
#include "kernels_lanes.h"

enum { DENSE_ROWS = 2, DENSE_TOKENS = 4 };
#define IN_A_REGISTER(lanes) (void)(lanes)

/* See `multiply_groups`. */
static inline Ints dot8(const uint8_t *codes, const int8_t *x) {
    Ints found = {0};
#if defined(__SSE2__)
    const __m128i none = _mm_setzero_si128();
    __m128i sums[2];
    for (int i = 0; i < 2; i++) {
        const __m128i c = _mm_loadu_si128((const __m128i *)(codes + 16 * i));
        const __m128i xs = _mm_loadu_si128((const __m128i *)(x + 16 * i)), sign = _mm_cmpgt_epi8(none, xs);
        const __m128i low = _mm_madd_epi16(_mm_unpacklo_epi8(c, none), _mm_unpacklo_epi8(xs, sign));
        const __m128i high = _mm_madd_epi16(_mm_unpackhi_epi8(c, none), _mm_unpackhi_epi8(xs, sign));
        sums[i] = _mm_add_epi32(low, high);
    }
    memcpy(&found, sums, sizeof found);
#elif defined(__ARM_NEON) /* codes are signed here */
    int32x4_t sums[2];
    for (int i = 0; i < 2; i++) {
        const int8x16_t c = vld1q_s8((const int8_t *)codes + 16 * i), xs = vld1q_s8(x + 16 * i);
        const int16x8_t low = vmull_s8(vget_low_s8(c), vget_low_s8(xs)), high = vmull_s8(vget_high_s8(c), vget_high_s8(xs));
        sums[i] = vpadalq_s16(vpaddlq_s16(low), high);
    }
    memcpy(&found, sums, sizeof found);
#else
    for (int i = 0; i < 32; i += 4)
        for (int k = i; k < i + 4; k++) found[i / 4] += codes[k] * x[k];
#endif
    return found;
}

#include "kernels_vectors.h"
