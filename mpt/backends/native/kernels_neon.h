/* Products with NEON and its dot products of int8: plain numbers in the compiler's vectors, codes by `sdot`. */
#pragma once
#include "kernels_lanes.h"

enum { DENSE_ROWS = 2, DENSE_TOKENS = 4 };
#define IN_A_REGISTER(lanes) (void)(lanes)

/* 16 products of codes, here signed, and inputs 128 high + low into four sums; exact. */
static inline int32x4_t dot4(const uint8_t *codes, const int8_t *high, const int8_t *low) {
    const int8x16_t c = vld1q_s8((const int8_t *)codes);
    const int32x4_t of_high = vshlq_n_s32(vdotq_s32(vdupq_n_s32(0), c, vld1q_s8(high)), 7);
    return vdotq_s32(of_high, c, vld1q_s8(low));
}

/* See `multiply_groups`. */
static inline Ints dot8(const uint8_t *codes, const int8_t *high, const int8_t *low) {
    const int32x4_t sums[2] = {dot4(codes, high, low), dot4(codes + 16, high + 16, low + 16)};
    Ints found;
    memcpy(&found, sums, sizeof found);
    return found;
}

#include "kernels_vectors.h"
