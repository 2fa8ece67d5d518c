/* What rows.c and tiles_step.c share of a step: its tokens' places, and of a layer: its adapters, queries
 * prepared, keys and values stored, one head of some queries attended.
 */
#pragma once
#include "attention.h"

/* Each row's first token in the step, (rows), and each token's adapter, (T). */
static void place_tokens(const Step *step, int32_t *first, int32_t *adapter_of) {
    for (int row = 0, token = 0; row < step->n_rows; row++) {
        first[row] = token;
        for (int t = 0; t < step->row_tokens[row]; t++) adapter_of[token++] = step->row_adapter[row];
    }
}

/* The adapters of one projection: y += b (a x), with low = a x (adapters, max_rank, columns). */
typedef struct {
    int n, max_rank, columns, stride; /* columns: at least the tokens of the step */
    Format format;                    /* of the model */
    const Lora *loras;                /* of the first adapter; the next adapter's is `stride` further */
    const int32_t *adapter_of;        /* (T) the index of each token's adapter, or -1 */
    float *low;
} Adapted;

static Adapted adapted_at(const Model *model, const Step *step, const int32_t *adapter_of, int columns, int layer,
                          int projection) {
    return (Adapted){.n = step->n_adapters, .max_rank = step->max_rank, .columns = columns,
                     .stride = model->n_layers * N_PROJECTIONS, .format = model->format,
                     .adapter_of = adapter_of, .low = step->low,
                     .loras = step->n_adapters ? step->adapters + layer * N_PROJECTIONS + projection : NULL};
}

/* LayerNorm of n numbers; `out` may be where they are. */
static void normalize_one(const float *x, Norm norm, float eps, int n, float *out) {
    float sum = 0, squares = 0;
    for (int i = 0; i < n; i++) sum += x[i];
    const float mean = sum / n;
    for (int i = 0; i < n; i++) squares += (x[i] - mean) * (x[i] - mean);
    const float factor = 1.0f / sqrtf(squares / n + eps);
    if (norm.bias)
        for (int i = 0; i < n; i++) out[i] = (x[i] - mean) * factor * norm.weight[i] + norm.bias[i];
    else
        for (int i = 0; i < n; i++) out[i] = (x[i] - mean) * factor * norm.weight[i];
}

typedef struct { /* of one layer, for the functions below */
    const Model *model;
    const Step *step;
    int layer, width;     /* of qkv: C queries, then keys, then values */
    const int32_t *first; /* (rows) their first token in the step */
    float *qkv, *mixed;   /* (T, width); (T, C), gets the results */
    int is_prompt;        /* a step of many tokens */
} Place;

/* Clip the queries, keys and values of one token and normalise its queries and keys, where the model does so. */
static void prepare_token(const Place *at, int token) {
    const Model *model = at->model;
    const Layer *layer = model->layers + at->layer;
    float *own = at->qkv + (size_t)token * at->width, *keys = own + model->d_model;
    const float limit = model->clip_qkv;
    if (limit > 0)
        for (int i = 0; i < at->width; i++) own[i] = own[i] > limit ? limit : own[i] < -limit ? -limit : own[i];
    if (layer->q_ln.weight) {
        normalize_one(own, layer->q_ln, model->eps, model->d_model, own);
        normalize_one(keys, layer->k_ln, model->eps, model->n_kv_heads * model->d_head, keys);
    }
}

/* Store the new keys and values of one head of one row after those stored before. */
static void store(const Place *at, int row, int g) {
    const Model *model = at->model;
    const Step *step = at->step;
    const int D = model->d_head, G = model->n_kv_heads;
    const Stored to = stored_of(model, step, at->layer, row, g);
    float *largest = step->key_norm[row] + at->layer * G + g;
    for (int t = 0; t < step->row_tokens[row]; t++) {
        const float *key = at->qkv + (size_t)(at->first[row] + t) * at->width + model->d_model + g * D;
        const size_t position = step->row_length[row] + t;
        store_at(to, position, key, key + G * D, D);
        const float length = length_of_key(to, position, D);
        if (length > *largest) *largest = length;
    }
}

/* Attention of one query head of T new tokens of one row from its t0-th on, into `mixed`. Returns the keys read. */
static int64_t attend_head(const Place *at, int row, int head, int t0, int T) {
    const Model *model = at->model;
    const Step *step = at->step;
    const int D = model->d_head, G = model->n_kv_heads, g = head * G / model->n_heads, C = model->d_model;
    const int stored = step->row_length[row] + t0 + T, token = at->first[row] + t0;
    const float *q = at->qkv + (size_t)token * at->width + head * D;
    const float slope = model->slopes ? model->slopes[head] : 0, key_norm = step->key_norm[row][at->layer * G + g];
    const Stored from = stored_of(model, step, at->layer, row, g);
    float *out = at->mixed + (size_t)token * C + head * D;
#define ATTEND(format) \
    attend(queries, T, from, stored, D, model->softmax_scale, slope, key_norm, step->drop, out, C, format)
    if (from.format == BFLOAT16) {
        _Alignas(64) bf16 queries[T * D];
        for (int t = 0; t < T; t++) narrow_all(q + (size_t)t * at->width, D, queries + t * D);
        return ATTEND(BFLOAT16);
    }
    _Alignas(64) float queries[T * D];
    for (int t = 0; t < T; t++) memcpy(queries + t * D, q + (size_t)t * at->width, D * sizeof *q);
    if (from.format == INT8_ROWS) return ATTEND(INT8_ROWS);
    return from.format == FLOAT16 ? ATTEND(FLOAT16) : ATTEND(FLOAT32);
#undef ATTEND
}
