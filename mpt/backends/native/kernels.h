/* Products of weights with tokens, one file for each instruction set; rows.c calls them.
 *
 *   Dense                   what inputs beside bfloat16 weights are stored as: numbers rounded to bfloat16; DENSE is its Format
 *   TOKENS_AT_ONCE          tokens that share what is read of the weights
 *   multiply_dense          bfloat16 weights with Dense inputs; float32 and float16 weights with those in float32
 *   multiply_codes          weights as codes with scales (formats.h), inputs as one int8 number each; any number of tokens
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
    SIDE_ROOM = 8192,   /* floats that `multiply_side_by_side` needs */
};

typedef struct { /* inputs of all tokens beside codes: x = step * code */
    int K;
    const int8_t *codes;   /* (T, K), none of them -128 */
    const float *steps;    /* (T, K / 32) */
    const int32_t *totals; /* (T, K / 16) the sums of 16 codes */
    const float *sums32, *sums16; /* (T, K / 32), (T, K / 16) the sums of 32 and of 16 inputs */
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
