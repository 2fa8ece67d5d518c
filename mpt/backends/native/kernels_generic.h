/* Products on any processor: all in plain C and the compiler's vectors. */
#pragma once
#include "kernels_lanes.h"

enum { DENSE_ROWS = 2, DENSE_TOKENS = 4 };
#define IN_A_REGISTER(lanes) (void)(lanes)

/* See `multiply_groups`. */
static inline Ints dot8(const uint8_t *codes, const int8_t *x) {
    Ints sums = {0};
    for (int i = 0; i < 32; i += 4)
        for (int k = i; k < i + 4; k++) sums[i / 4] += codes[k] * x[k];
    return sums;
}

#include "kernels_vectors.h"
