/* Products of weights with tokens, one file for each instruction set; rows.c calls them.
 *
 *   Dense                   what inputs beside bfloat16 weights are stored as: numbers rounded to bfloat16; DENSE is its Format
 *   TOKENS_AT_ONCE          tokens that share what is read of the weights
 *   multiply_dense          bfloat16 weights with Dense inputs; float32 and float16 weights with those in float32
 *   multiply_int8           int8 weights with a scale for each row, where this is faster than as codes (INT8_AS_IT_IS)
 *   multiply_blocks         ggml's blocks from their place, where a file has it (BLOCKS_AS_THEY_ARE): few tokens, the
 *                           same bits as by way of codes
 *   multiply_codes          weights as codes with scales (formats.h), inputs as two int8 numbers each
 *   multiply_sixteen        the same of sixteen rows at once, where a file has it (CODES_OF_SIXTEEN_ROWS): for more
 *                           tokens, the same bits
 *   multiply_side_by_side   bfloat16 weights and the many tokens of prompts, where a file has it (ROWS_SIDE_BY_SIDE);
 *                           sums in another order than those of `multiply_dense`
 *
 * Sums go to (tokens, STRIP): a token's sum with row r is at sums[token * STRIP + r]. Of a token and a row the same
 * numbers are added in the same order however many rows and tokens there are, so that no bit of a result depends on
 * its company.
 */
#pragma once
#include "formats.h"

enum {
    STRIP = 32,   /* outputs that are multiplied together */
    CHUNK = 2048, /* and inputs: four tokens' stay in the first-level cache */
    SIXTEEN_ROOM = 256, /* floats for each token that `multiply_sixteen` needs */
    SIDE_ROOM = 8192,   /* floats that `multiply_side_by_side` needs */
};

typedef struct { /* the inputs of one token as two int8 numbers each: x = step * (128 high + low) */
    const int8_t *high, *low;
    const float *sums32, *sums16; /* of the numbers (128 high + low) of 32, and of 16, inputs */
    const int32_t *totals;        /* of each CHUNK of inputs: the sum of `high`, and that of `low` */
    float step;
} Coded;

#if AVX512
#include "kernels_avx512.h"
#elif AVX2
#include "kernels_avx2.h"
#elif NEON
#include "kernels_neon.h"
#else
#include "kernels_generic.h"
#endif
