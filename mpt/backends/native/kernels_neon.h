/* Products with NEON and its dot products of int8: plain numbers in the compiler's vectors, codes by `sdot`. */
#pragma once
#include "kernels_lanes.h"

enum { DENSE_ROWS = 2, DENSE_TOKENS = 4 };
#define IN_A_REGISTER(lanes) (void)(lanes)

/* See `multiply_groups`; codes are signed here. */
static inline Ints dot8(const uint8_t *codes, const int8_t *x) {
    int32x4_t sums[2];
    for (int i = 0; i < 2; i++)
        sums[i] = vdotq_s32(vdupq_n_s32(0), vld1q_s8((const int8_t *)codes + 16 * i), vld1q_s8(x + 16 * i));
    Ints found;
    memcpy(&found, sums, sizeof found);
    return found;
}

#include "kernels_vectors.h"
