/* AMX's tiles in plain C, for tests: included before tiles_step.c and tiles_prompt.c on a processor without AMX.
 *
 * What each does is said in Intel's Architecture Instruction Set Extensions Programming Reference. All tiles are whole:
 * 16 rows of 64 bytes, as the code configures them. */
#pragma once
#include <immintrin.h>
#include <stdint.h>
#include <string.h>

static _Thread_local struct { uint8_t rows[16][64]; } soft_tiles[8];

static inline float soft_wide(const uint8_t *at) {
    uint16_t half;
    memcpy(&half, at, 2);
    const uint32_t bits = (uint32_t)half << 16;
    float number;
    memcpy(&number, &bits, 4);
    return number;
}

static inline void soft_load(int tile, const void *from, size_t stride) {
    for (int m = 0; m < 16; m++) memcpy(soft_tiles[tile].rows[m], (const char *)from + m * stride, 64);
}

static inline void soft_store(int tile, void *to, size_t stride) {
    for (int m = 0; m < 16; m++) memcpy((char *)to + m * stride, soft_tiles[tile].rows[m], 64);
}

static inline void soft_bf16(int c, int a, int b) { /* pairs of bfloat16 into float32 */
    for (int m = 0; m < 16; m++)
        for (int n = 0; n < 16; n++) {
            float sum;
            memcpy(&sum, soft_tiles[c].rows[m] + 4 * n, 4);
            for (int k = 0; k < 16; k++)
                for (int i = 0; i < 4; i += 2)
                    sum += soft_wide(soft_tiles[a].rows[m] + 4 * k + i) * soft_wide(soft_tiles[b].rows[k] + 4 * n + i);
            memcpy(soft_tiles[c].rows[m] + 4 * n, &sum, 4);
        }
}

static inline void soft_int8(int c, int a, int b) { /* fours of int8 into int32 */
    for (int m = 0; m < 16; m++)
        for (int n = 0; n < 16; n++) {
            int32_t sum;
            memcpy(&sum, soft_tiles[c].rows[m] + 4 * n, 4);
            for (int k = 0; k < 16; k++)
                for (int i = 0; i < 4; i++)
                    sum += (int8_t)soft_tiles[a].rows[m][4 * k + i] * (int8_t)soft_tiles[b].rows[k][4 * n + i];
            memcpy(soft_tiles[c].rows[m] + 4 * n, &sum, 4);
        }
}

#undef _tile_loadd
#undef _tile_stored
#undef _tile_zero
#undef _tile_dpbf16ps
#undef _tile_dpbssd
#define _tile_loadconfig(config) ((void)(config))
#define _tile_release() ((void)0)
#define _tile_zero(tile) memset(soft_tiles + (tile), 0, sizeof *soft_tiles)
#define _tile_loadd(tile, from, stride) soft_load(tile, from, stride)
#define _tile_stored(tile, to, stride) soft_store(tile, to, stride)
#define _tile_dpbf16ps(c, a, b) soft_bf16(c, a, b)
#define _tile_dpbssd(c, a, b) soft_int8(c, a, b)
