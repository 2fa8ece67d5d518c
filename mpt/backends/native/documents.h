/* What Python hands to the attention of training (documents.c); structures.py declares the same. */
#pragma once
#include "common.h"

typedef struct { /* (B, H, T, D) in the call's format, the D numbers of a head side by side; the steps are in numbers */
    void *numbers;
    int64_t row, head, position;
} Heads;

typedef struct {
    int32_t format;             /* FLOAT32, FLOAT16 or BFLOAT16: of all Heads */
    int32_t n_heads, d_head, n_threads;
    int64_t row_length;         /* T */
    int64_t n_positions;        /* B * T */
    int64_t n_pieces, longest;  /* longest: the positions of the longest one that is no padding, at least 1 */
    const int64_t *pieces;      /* (pieces, 2) first position, rows laid end to end, and length; below 0: padding */
    const float *slopes;        /* (H) ALiBi, or NULL */
    float scale;
    Heads q, k, v, out;
    float *lse;                 /* (H, B * T) log of the sum of e^score */
    Heads out_gradient, q_gradient, k_gradient, v_gradient; /* of the backward pass */
    float *scratch;             /* n_threads times mpt_documents_scratch_floats() */
} Documents;
