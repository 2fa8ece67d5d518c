/* One step of an MPT model for many tokens, as in prompts, on CPUs with AMX: embeddings to logits in one parallel
 * region. Without AMX this file is empty, and rows.c does it.
 *
 *   vectors                   transposing, exp, GELU in 16 lanes of AVX-512; `tile_of`, the layout of inputs; LayerNorm
 *   products                  weights packed into tiles, `multiply`: 32 outputs of 32 tokens; keys and values stored
 *   adapters                  low-rank products beside each product
 *   products and their use    `product`: outputs over the threads; `write_out`: to where they are read next
 *   attention                 `attend`: one head of up to 512 queries of a row, over blocks of 128 keys
 *   the step                  memory, and `mpt_prompt`, which calls all of it layer by layer
 *
 * Here the tiles of AMX set the speed, and what feeds them. They multiply three times as fast as torch's products of
 * the same size if weights are in the first-level cache and inputs in the second, and if every result is written as the
 * next product reads it. So tokens are columns, in panels of 16, in everything between two products: that is how a tile
 * takes its second operand and stores its sums. Weights and keys are first operands, as they lie in memory.
 *
 * Weights are bfloat16, or int8 with one scale for each output; int8 is widened to bfloat16 when it is packed. Inputs
 * of products are rounded to bfloat16; the residual stream and all sums are float32. No bit of a token's result depends
 * on the tokens beside it, on the chunks in which a prompt is read, or on other rows.
 *
 * Keys and values are stored in bfloat16, or in int8 with one scale for each head and position. int8 numbers are
 * bfloat16 numbers too, so tiles take them without rounding; their scales multiply the scores of keys and the weights
 * of values.
 *
 * Attention is FlashAttention's online softmax (Dao 2023) over blocks of keys, from the newest to the oldest. It ends
 * where ALiBi leaves less than `drop` to the rest: see `attend` in attention.h.
 */
#include "common.h"

#if AMX

enum {
    STEP = N_IN_MULTIPLE, /* inputs k that one tile product adds up */
    GROUP = 32,   /* tokens multiplied at once: two panels */
    STRIP = 32,   /* outputs multiplied at once */
    CHUNK = 256,  /* inputs k of a strip's weights that are packed at once: 16 KB, in the first-level cache */
    MOST_GROUPS = 16, /* tokens that share a strip: 512 */
    TILE = 512,   /* numbers of a tile of bfloat16 */
    BLOCK = 128,  /* keys weighed at once */
    QUERIES = 512 /* of one head and row that share each block of keys */
};
static const int INPUT_BYTES = 1 << 20; /* inputs multiplied with all weights in turn: half of the second-level cache */

typedef struct { /* up to 16 tokens of one row */
    int row, n;   /* n: how many */
    int first;    /* the first one's index in the step */
    int position; /* and in its row */
} Panel;

typedef struct { /* one thread's memory */
    bf16 *strip; /* (CHUNK / STEP, 2 tiles) */
    float *sums; /* (groups, 4 tiles): outputs 0-15 of both panels, outputs 16-31 of both */
    bf16 *keys, *values, *weights;
    float *key_scales, *value_scales; /* (BLOCK) */
    float *scores, *mixed, *best, *total, *bound;
} Own;

typedef struct {
    const Model *model;
    const Step *step;
    const Panel *panels;
    int n_panels, head_room; /* head_room: D rounded up to a STEP */
    float *x;                /* (panels, C, 16) the residual stream */
    bf16 *inputs, *inner;    /* inputs of products, laid out by `tile_of`: C wide, and as wide as the MLP inside */
    bf16 *queries;           /* (panels, H * head_room / STEP, tile) */
    float *fresh;            /* (2, KV heads, panels * 16, D) new keys and values before they are quantized */
    float *wanted;           /* (panels, C, 16) the residual stream of the tokens that want logits */
    Own *own;                /* (threads) */
    atomic_int *queues;
} Pass;

/* -- vectors ------------------------------------------------------------------------------------------------------- */

/* 16 x 16 numbers of 32 bits, rows to columns. */
static inline void transpose(__m512 *r) {
    __m512 t[16];
    for (int i = 0; i < 16; i += 2)
        t[i] = _mm512_unpacklo_ps(r[i], r[i + 1]), t[i + 1] = _mm512_unpackhi_ps(r[i], r[i + 1]);
    for (int i = 0; i < 16; i += 4)
        for (int k = 0; k < 2; k++) {
            const __m512d a = _mm512_castps_pd(t[i + k]), b = _mm512_castps_pd(t[i + k + 2]);
            r[i + 2 * k] = _mm512_castpd_ps(_mm512_unpacklo_pd(a, b));
            r[i + 2 * k + 1] = _mm512_castpd_ps(_mm512_unpackhi_pd(a, b));
        }
    for (int i = 0; i < 16; i += 8)
        for (int k = 0; k < 4; k++) {
            t[i + k] = _mm512_shuffle_f32x4(r[i + k], r[i + k + 4], 0x88);
            t[i + k + 4] = _mm512_shuffle_f32x4(r[i + k], r[i + k + 4], 0xdd);
        }
    for (int k = 0; k < 8; k++) {
        r[k] = _mm512_shuffle_f32x4(t[k], t[k + 8], 0x88);
        r[k + 8] = _mm512_shuffle_f32x4(t[k], t[k + 8], 0xdd);
    }
}

/* e^x, relative error 2e-7; 0 below -80 and where `open` has no bit. */
static inline __m512 exp_16(__mmask16 open, __m512 x) {
    const __m512 n = _mm512_roundscale_ps(_mm512_mul_ps(x, _mm512_set1_ps(1.44269504f)), _MM_FROUND_TO_NEAREST_INT);
    __m512 r = _mm512_fnmadd_ps(n, _mm512_set1_ps(0.693359375f), x);
    r = _mm512_fmadd_ps(n, _mm512_set1_ps(2.12194440e-4f), r);
    __m512 p = _mm512_set1_ps(1.9875691500e-4f);
    p = _mm512_fmadd_ps(p, r, _mm512_set1_ps(1.3981999507e-3f));
    p = _mm512_fmadd_ps(p, r, _mm512_set1_ps(8.3334519073e-3f));
    p = _mm512_fmadd_ps(p, r, _mm512_set1_ps(4.1665795894e-2f));
    p = _mm512_fmadd_ps(p, r, _mm512_set1_ps(1.6666665459e-1f));
    p = _mm512_fmadd_ps(p, r, _mm512_set1_ps(5.0000001201e-1f));
    p = _mm512_add_ps(_mm512_fmadd_ps(_mm512_mul_ps(p, r), r, r), _mm512_set1_ps(1.0f));
    return _mm512_maskz_scalef_ps(_mm512_mask_cmp_ps_mask(open, x, _mm512_set1_ps(-80.0f), _CMP_GT_OQ), p, n);
}

/* 2^x, relative error 1e-7 (a polynomial of least relative error on [0, 1), times 2^floor(x)); 0 below -120, where
 * results would soon be subnormal, and where `open` has no bit. */
static inline __m512 exp2_16(__mmask16 open, __m512 x) {
    const __m512 r = _mm512_reduce_ps(x, _MM_FROUND_TO_NEG_INF);
    __m512 p = _mm512_set1_ps(1.8775766e-3f);
    p = _mm512_fmadd_ps(p, r, _mm512_set1_ps(8.98934063e-3f));
    p = _mm512_fmadd_ps(p, r, _mm512_set1_ps(5.58263175e-2f));
    p = _mm512_fmadd_ps(p, r, _mm512_set1_ps(2.40153611e-1f));
    p = _mm512_fmadd_ps(p, r, _mm512_set1_ps(6.93153083e-1f));
    p = _mm512_fmadd_ps(p, r, _mm512_set1_ps(0.99999994f));
    return _mm512_maskz_scalef_ps(_mm512_mask_cmp_ps_mask(open, x, _mm512_set1_ps(-120.0f), _CMP_GT_OQ), p, x);
}

/* GELU in its erf form, as in common.h. */
static inline __m512 gelu_16(__m512 x) {
    const __m512 z = _mm512_mul_ps(_mm512_abs_ps(x), _mm512_set1_ps(0.70710678f)), one = _mm512_set1_ps(1.0f);
    const __m512 t = _mm512_div_ps(one, _mm512_fmadd_ps(z, _mm512_set1_ps(0.3275911f), one));
    __m512 poly = _mm512_set1_ps(1.061405429f);
    poly = _mm512_fmadd_ps(poly, t, _mm512_set1_ps(-1.453152027f));
    poly = _mm512_fmadd_ps(poly, t, _mm512_set1_ps(1.421413741f));
    poly = _mm512_fmadd_ps(poly, t, _mm512_set1_ps(-0.284496736f));
    poly = _mm512_fmadd_ps(poly, t, _mm512_set1_ps(0.254829592f));
    poly = _mm512_mul_ps(_mm512_mul_ps(poly, t), _mm512_set1_ps(0.5f));
    const __m512 tail = _mm512_mul_ps(poly, exp_16(0xffff, _mm512_fnmadd_ps(z, z, _mm512_setzero_ps())));
    const __mmask16 above = _mm512_cmp_ps_mask(x, _mm512_setzero_ps(), _CMP_GT_OQ);
    return _mm512_mul_ps(x, _mm512_mask_sub_ps(tail, above, one, tail));
}

/* 16 pairs of bfloat16: two neighbouring numbers of each of 16 tokens. */
static inline __m512i pairs(__m512 even, __m512 odd) {
    const __m512i order = _mm512_set_epi16(31, 15, 30, 14, 29, 13, 28, 12, 27, 11, 26, 10, 25, 9, 24, 8, 23, 7, 22, 6,
                                           21, 5, 20, 4, 19, 3, 18, 2, 17, 1, 16, 0);
    return _mm512_permutexvar_epi16(order, (__m512i)_mm512_cvtne2ps_pbh(odd, even));
}

/* Where inputs k and k + 1 of a panel lie: by groups of two panels, each of steps of 32 k, each of two tiles, one for
 * each panel, each (16 pairs of k, 16 tokens, 2). */
static inline bf16 *tile_of(bf16 *inputs, int K, int panel, int k) {
    return inputs + ((size_t)(panel / 2) * (K / STEP) + k / STEP) * (2 * TILE) + panel % 2 * TILE + k % STEP / 2 * 32;
}

static inline __m512 sum_of_4(const __m512 *x) {
    return _mm512_add_ps(_mm512_add_ps(x[0], x[1]), _mm512_add_ps(x[2], x[3]));
}

/* LayerNorm of a panel x (C, 16), into the inputs of a product. */
static void normalize(const float *x, int C, Norm norm, float eps, bf16 *inputs, int panel) {
    __m512 sums[4] = {0};
    for (int k = 0; k < C; k += 4)
        for (int i = 0; i < 4; i++) sums[i] = _mm512_add_ps(sums[i], _mm512_load_ps(x + (k + i) * PANEL));
    const __m512 share = _mm512_set1_ps(1.0f / C);
    const __m512 mean = _mm512_mul_ps(sum_of_4(sums), share);
    for (int i = 0; i < 4; i++) sums[i] = _mm512_setzero_ps();
    for (int k = 0; k < C; k += 4)
        for (int i = 0; i < 4; i++) {
            const __m512 off = _mm512_sub_ps(_mm512_load_ps(x + (k + i) * PANEL), mean);
            sums[i] = _mm512_fmadd_ps(off, off, sums[i]);
        }
    const __m512 square = _mm512_fmadd_ps(sum_of_4(sums), share, _mm512_set1_ps(eps));
    const __m512 factor = _mm512_div_ps(_mm512_set1_ps(1.0f), _mm512_sqrt_ps(square));
    for (int k = 0; k < C; k += 2) {
        __m512 pair[2];
        for (int i = 0; i < 2; i++) {
            const __m512 off = _mm512_mul_ps(_mm512_sub_ps(_mm512_load_ps(x + (k + i) * PANEL), mean), factor);
            const __m512 bias = _mm512_set1_ps(norm.bias ? norm.bias[k + i] : 0.0f);
            pair[i] = _mm512_fmadd_ps(off, _mm512_set1_ps(norm.weight[k + i]), bias);
        }
        _mm512_store_si512(tile_of(inputs, C, panel, k), pairs(pair[0], pair[1]));
    }
}

/* -- products ------------------------------------------------------------------------------------------------------ */

typedef enum { TO_RESIDUAL, TO_GELU, TO_ATTENTION, TO_LOGITS } Target;

/* Weights of n_outputs outputs from n0 and n inputs from k0, as tiles. */
static void pack_strip(const Linear *linear, int n0, int n_outputs, int k0, int n, bf16 *strip) {
    for (int r = 0; r < STRIP; r++) {
        bf16 *to = strip + r * STEP;
        const size_t at = (size_t)(n0 + r) * linear->n_in + k0;
        for (int k = 0; k < n; k += STEP, to += 2 * TILE) {
            __m512i row = _mm512_setzero_si512();
            if (r < n_outputs && linear->scale) {
                const __m128i *from = (const __m128i *)((const int8_t *)linear->weight + at + k);
                const __m512 low = _mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(_mm_loadu_si128(from)));
                const __m512 high = _mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(_mm_loadu_si128(from + 1)));
                row = (__m512i)_mm512_cvtne2ps_pbh(high, low); /* exact */
            } else if (r < n_outputs) {
                row = _mm512_loadu_si512((const bf16 *)linear->weight + at + k);
            }
            _mm512_store_si512(to, row);
        }
    }
}

/* Prefetch rows `from` to `to` of the next strip. */
static inline void fetch(const Linear *linear, int n0, int k0, int n, int from, int to) {
    const size_t size = linear->scale ? 1 : 2;
    for (int r = from; r < to; r++) {
        const char *row = (const char *)linear->weight + ((size_t)(n0 + r) * linear->n_in + k0) * size;
        for (size_t i = 0; i < n * size; i += 64) _mm_prefetch(row + i, _MM_HINT_T0);
    }
}

/* Sums of a strip and a group over n inputs. They are added to `sums`, unless these inputs are the first. */
static inline void multiply(const bf16 *strip, const bf16 *inputs, int n, int is_first, float *sums) {
    if (is_first) {
        _tile_zero(0);
        _tile_zero(1);
        _tile_zero(2);
        _tile_zero(3);
    } else {
        _tile_loadd(0, sums, 64);
        _tile_loadd(1, sums + 256, 64);
        _tile_loadd(2, sums + 512, 64);
        _tile_loadd(3, sums + 768, 64);
    }
    for (int k = 0; k < n; k += STEP, strip += 2 * TILE, inputs += 2 * TILE) {
        _tile_loadd(4, strip, 64);
        _tile_loadd(6, inputs, 64);
        _tile_dpbf16ps(0, 4, 6);
        _tile_loadd(7, inputs + TILE, 64);
        _tile_dpbf16ps(1, 4, 7);
        _tile_loadd(5, strip + TILE, 64);
        _tile_dpbf16ps(2, 5, 6);
        _tile_dpbf16ps(3, 5, 7);
    }
    _tile_stored(0, sums, 64);
    _tile_stored(1, sums + 256, 64);
    _tile_stored(2, sums + 512, 64);
    _tile_stored(3, sums + 768, 64);
}

/* Store keys or values, outputs n0 to n0 + 15 of Wqkv for a panel: in the row's cache, or in `fresh` where they become
 * int8, as the scale of a head needs all its D numbers. */
static void store(const Pass *pass, int layer, int panel, int n0, __m512 *values) {
    const Model *model = pass->model;
    const Step *step = pass->step;
    const Panel *place = pass->panels + panel;
    const int D = model->d_head, G = model->n_kv_heads, at = n0 - model->d_model;
    const int is_value = at >= G * D, g = at % (G * D) / D, d = at % D;
    transpose(values);
    if (step->kv_scale) {
        float *to = pass->fresh + ((size_t)(is_value * G + g) * pass->n_panels + panel) * PANEL * D + d;
        for (int token = 0; token < place->n; token++) _mm512_storeu_ps(to + (size_t)token * D, values[token]);
        return;
    }
    const Stored stored = stored_of(model, step, layer, place->row, g);
    bf16 *to = (bf16 *)(is_value ? stored.values : stored.keys) + (size_t)place->position * D + d;
    for (int token = 0; token < place->n; token++)
        _mm256_storeu_si256((__m256i *)(to + (size_t)token * D), (__m256i)_mm512_cvtneps_pbh(values[token]));
}

/* -- adapters ------------------------------------------------------------------------------------------------------ */

/* The part of one projection of a layer in the adapter of a panel's row, or NULL. */
static inline const Lora *lora_of(const Pass *pass, int layer, int projection, int panel) {
    const Step *step = pass->step;
    if (!step->n_adapters || projection < 0) return NULL;
    const int which = step->row_adapter[pass->panels[panel].row];
    if (which < 0) return NULL;
    const Lora *lora = step->adapters + ((size_t)which * pass->model->n_layers + layer) * N_PROJECTIONS + projection;
    return lora->rank ? lora : NULL;
}

/* low = a x (panels, max_rank, 16), each panel by its row's adapter. */
static void multiply_by_a(const Pass *pass, int layer, int projection, bf16 *inputs, int K, Worker *worker) {
    if (!pass->step->n_adapters) return;
    enum { AT_ONCE = 8 };
    for (int panel = worker->thread; panel < pass->n_panels; panel += worker->n) {
        const Lora *lora = lora_of(pass, layer, projection, panel);
        float *low = pass->step->low + (size_t)panel * pass->step->max_rank * PANEL;
        for (int r = 0; lora && r < lora->rank; r += AT_ONCE) {
            const int n = lora->rank - r < AT_ONCE ? lora->rank - r : AT_ONCE;
            __m512 sums[AT_ONCE] = {0};
            for (int k = 0; k < K; k += 2) {
                const __m512bh x = (__m512bh)_mm512_load_si512(tile_of(inputs, K, panel, k));
                for (int i = 0; i < AT_ONCE; i++) {
                    int32_t both;
                    memcpy(&both, (const bf16 *)lora->a + (size_t)(r + (i < n ? i : 0)) * K + k, 4);
                    sums[i] = _mm512_dpbf16_ps(sums[i], (__m512bh)_mm512_set1_epi32(both), x);
                }
            }
            for (int i = 0; i < n; i++) _mm512_storeu_ps(low + (r + i) * PANEL, sums[i]);
        }
    }
    wait_for_all(worker);
}

/* -- products and their use ---------------------------------------------------------------------------------------- */

/* Scale 16 outputs of a panel, sums (16 outputs, 16 tokens), add bias and adapter, and write them to where they are
 * read next. */
static inline void write_out(const Pass *pass, int layer, const Linear *linear, Target target, int with_bias,
                         const Lora *lora, int n0, int panel, const float *sums) {
    const Model *model = pass->model;
    const int C = model->d_model, D = model->d_head;
    __m512 values[PANEL];
    for (int r = 0; r < PANEL; r++) {
        values[r] = _mm512_load_ps(sums + r * PANEL);
        if (linear->scale) values[r] = _mm512_mul_ps(values[r], _mm512_set1_ps(linear->scale[n0 + r]));
        if (with_bias) values[r] = _mm512_add_ps(values[r], _mm512_set1_ps(linear->bias[n0 + r]));
    }
    for (int i = 0; lora && i < lora->rank; i++) {
        const __m512 low = _mm512_loadu_ps(pass->step->low + ((size_t)panel * pass->step->max_rank + i) * PANEL);
        const bf16 *b = (const bf16 *)lora->b + (size_t)i * linear->n_out + n0;
        _Alignas(64) float factors[PANEL];
        for (int r = 0; r < PANEL; r++) factors[r] = wide(b[r]);
        for (int r = 0; r < PANEL; r++) values[r] = _mm512_fmadd_ps(_mm512_set1_ps(factors[r]), low, values[r]);
    }
    if (target == TO_RESIDUAL) {
        float *x = pass->x + ((size_t)panel * C + n0) * PANEL;
        for (int r = 0; r < PANEL; r++, x += PANEL) _mm512_store_ps(x, _mm512_add_ps(_mm512_load_ps(x), values[r]));
    } else if (target == TO_GELU) {
        bf16 *to = tile_of(pass->inner, model->d_ffn, panel, n0);
        for (int r = 0; r < PANEL; r += 2, to += 2 * PANEL)
            _mm512_store_si512(to, pairs(gelu_16(values[r]), gelu_16(values[r + 1])));
    } else if (target == TO_LOGITS) {
        const int first = panel * PANEL, n_here = pass->step->n_logits - first;
        transpose(values);
        for (int token = 0; token < PANEL && token < n_here; token++)
            _mm512_storeu_ps(pass->step->logits + (size_t)(first + token) * linear->n_out + n0, values[token]);
    } else {
        const __m512 limit = _mm512_set1_ps(model->clip_qkv), lower = _mm512_sub_ps(_mm512_setzero_ps(), limit);
        for (int r = 0; r < PANEL && model->clip_qkv > 0; r++)
            values[r] = _mm512_max_ps(_mm512_min_ps(values[r], limit), lower);
        if (n0 >= C) {
            store(pass, layer, panel, n0, values);
            return;
        }
        const int k = n0 / D * pass->head_room + n0 % D, n_tiles = model->n_heads * pass->head_room / STEP;
        bf16 *to = pass->queries + ((size_t)panel * n_tiles + k / STEP) * TILE + k % STEP * PANEL;
        for (int r = 0; r < PANEL; r += 2, to += 2 * PANEL) _mm512_store_si512(to, pairs(values[r], values[r + 1]));
    }
}

/* All outputs of n_panels panels, from inputs k `from` to `to`, over the threads by strips. A block of tokens is
 * multiplied with all weights before the next block is, so its inputs stay in the second-level cache. */
static void product(const Pass *pass, int layer, int projection, const Linear *linear, const bf16 *inputs, int n_panels,
                    int from, int to, Target target, Worker *worker) {
    const int K = linear->n_in, N = linear->n_out, n_strips = (N + STRIP - 1) / STRIP, n_groups = (n_panels + 1) / 2;
    const int fit = INPUT_BYTES / (2 * GROUP * (to - from)), most = fit < 2 ? 2 : fit > MOST_GROUPS ? MOST_GROUPS : fit;
    const int n_blocks = (n_groups + most - 1) / most, n_tasks = n_strips * n_blocks;
    const int with_bias = linear->bias && from == 0;
    const Own *own = pass->own + worker->thread;
    for (int task = take(worker, 1), next; task < n_tasks; task = next) {
        const int block = task / n_strips, n0 = task % n_strips * STRIP, n_outputs = N - n0 < STRIP ? N - n0 : STRIP;
        const int first = block * n_groups / n_blocks, end = (block + 1) * n_groups / n_blocks, turns = end - first;
        next = take(worker, 1);
        for (int k = from, n; k < to; k += n) {
            n = to - k < CHUNK ? to - k : CHUNK;
            const int is_last = k + n == to; /* the next chunk is then of this thread's next strip, if it has one */
            const int soon_n0 = is_last ? next % n_strips * STRIP : n0, soon = is_last ? from : k + n;
            const int n_soon = is_last && next >= n_tasks ? 0 : N - soon_n0 < STRIP ? N - soon_n0 : STRIP;
            pack_strip(linear, n0, n_outputs, k, n, own->strip);
            for (int turn = 0; turn < turns; turn++) {
                const int group = first + turn;
                float *sums = own->sums + turn * 4 * 256;
                fetch(linear, soon_n0, soon, to - soon < CHUNK ? to - soon : CHUNK, n_soon * turn / turns,
                      n_soon * (turn + 1) / turns);
                multiply(own->strip, inputs + ((size_t)group * K + k) * GROUP, n, k == from, sums);
                for (int i = 0; is_last && i < 4; i++) {
                    const int panel = 2 * group + i % 2, output = i / 2 * 16;
                    if (panel >= n_panels || output >= n_outputs) continue;
                    const Lora *lora = from == 0 ? lora_of(pass, layer, projection, panel) : NULL;
                    write_out(pass, layer, linear, target, with_bias, lora, n0 + output, panel, sums + i * 256);
                }
            }
        }
    }
    end_loop(worker);
    wait_for_all(worker);
}

/* -- attention ----------------------------------------------------------------------------------------------------- */

/* 32 numbers of int8 in bfloat16, which holds them exactly. */
static inline __m512i widened_32(__mmask32 mask, const int8_t *from) {
    const __m256i all = _mm256_maskz_loadu_epi8(mask, from);
    const __m512 low = _mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(_mm256_castsi256_si128(all)));
    const __m512 high = _mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(_mm256_extracti128_si256(all, 1)));
    return (__m512i)_mm512_cvtne2ps_pbh(high, low);
}

/* Numbers d to d + 15 of a value and of the next one, in pairs. there: how many of the two are stored; the others are
 * 0. */
static inline __m512i two_values(Stored from, size_t at, int D, int there) {
    if (from.value_scales) {
        const int8_t *values = (const int8_t *)from.values + at;
        const __m128i zero = _mm_setzero_si128();
        const __m128i even = there > 0 ? _mm_loadu_si128((const __m128i *)values) : zero;
        const __m128i odd = there > 1 ? _mm_loadu_si128((const __m128i *)(values + D)) : zero;
        return pairs(_mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(even)), _mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(odd)));
    }
    const bf16 *values = (const bf16 *)from.values + at;
    const __m256i zero = _mm256_setzero_si256();
    const __m256i even = there > 0 ? _mm256_loadu_si256((const __m256i *)values) : zero;
    const __m256i odd = there > 1 ? _mm256_loadu_si256((const __m256i *)(values + D)) : zero;
    return _mm512_or_si512(_mm512_cvtepu16_epi32(even), _mm512_slli_epi32(_mm512_cvtepu16_epi32(odd), 16));
}

/* n <= BLOCK keys and values from position `start` as tiles: keys as (16 keys, 32 d), values as (16 d, 32 keys). */
static inline void load_block(Stored from, int start, int n, int D, const Own *own) {
    const int n_steps = (D + STEP - 1) / STEP, n_whole = (n + 31) / 32 * 32;
    for (int key = 0; key < n_whole; key++)
        for (int s = 0; s < n_steps; s++) {
            const int d = s * STEP;
            const __mmask32 mask = key >= n ? 0 : D - d >= 32 ? 0xffffffff : 0xffff;
            const size_t at = (size_t)(start + key) * D + d;
            bf16 *to = own->keys + ((size_t)(key / 16) * n_steps + s) * TILE + key % 16 * STEP;
            _mm512_store_si512(to, from.key_scales ? widened_32(mask, (const int8_t *)from.keys + at)
                                                   : _mm512_maskz_loadu_epi16(mask, (const bf16 *)from.keys + at));
        }
    for (int key = 0; key < n; key += 32)
        for (int d = 0; d < D; d += 16) {
            __m512 rows[16];
            for (int i = 0; i < 16; i++) {
                const int even = key + 2 * i;
                rows[i] = (__m512)two_values(from, (size_t)(start + even) * D + d, D, n - even);
            }
            transpose(rows);
            bf16 *to = own->values + ((size_t)(d / 16) * (BLOCK / 32) + key / 32) * TILE;
            for (int i = 0; i < 16; i++) _mm512_store_ps((float *)(to + i * STEP), rows[i]);
        }
    for (int key = 0; from.key_scales && key < n_whole; key++) {
        own->key_scales[key] = key < n ? from.key_scales[start + key] : 0;
        own->value_scales[key] = key < n ? from.value_scales[start + key] : 0;
    }
}

/* Scores of n keys (a multiple of 32) for two panels of queries: (n, 32). */
static inline void score(const bf16 *keys, int n, int n_steps, const bf16 *panel, const bf16 *next, float *scores) {
    for (int key = 0; key < n; key += 32, keys += 2 * n_steps * TILE) {
        _tile_zero(0);
        _tile_zero(1);
        _tile_zero(2);
        _tile_zero(3);
        for (int s = 0; s < n_steps; s++) {
            _tile_loadd(4, keys + s * TILE, 64);
            _tile_loadd(6, panel + s * TILE, 64);
            _tile_dpbf16ps(0, 4, 6);
            _tile_loadd(7, next + s * TILE, 64);
            _tile_dpbf16ps(1, 4, 7);
            _tile_loadd(5, keys + (n_steps + s) * TILE, 64);
            _tile_dpbf16ps(2, 5, 6);
            _tile_dpbf16ps(3, 5, 7);
        }
        _tile_stored(0, scores + key * 32, 128);
        _tile_stored(1, scores + key * 32 + 16, 128);
        _tile_stored(2, scores + (key + 16) * 32, 128);
        _tile_stored(3, scores + (key + 16) * 32 + 16, 128);
    }
}

typedef struct { /* how one head's scores become weights; in powers of 2 */
    float scale, slope, rise[BLOCK]; /* rise: what ALiBi gives each key of a block over the first */
    const float *key_scales, *value_scales; /* (BLOCK) or NULL */
} Scoring;

/* Online softmax of one panel over a block, in powers of 2. scores: (n, 32), of which 16 columns are this panel's. They
 * become weights, tiles (16 pairs of keys, 16 tokens, 2), every other of which is this panel's. Where a score is better
 * than the best so far, the sums so far are scaled down. ahead: how far each query is from the block's first key.
 * Scores are computed without ALiBi's bias of that key, which is the same for the whole block and is added to the best
 * one. */
static inline void weigh(const Scoring *how, float *scores, int n, int is_diagonal, __mmask16 open, __m512 ahead, int D,
                         float *best, float *total, float *mixed, bf16 *weights) {
    const __m512 first = _mm512_mul_ps(_mm512_set1_ps(-how->slope), ahead);
    const __m512 old = _mm512_load_ps(best);
    __m512 top = _mm512_sub_ps(old, first), distance = ahead, sum = _mm512_setzero_ps();
    for (int key = 0; key < n; key++) {
        const float scale = how->key_scales ? how->scale * how->key_scales[key] : how->scale;
        __m512 x = _mm512_load_ps(scores + key * 32);
        x = _mm512_fmadd_ps(x, _mm512_set1_ps(scale), _mm512_set1_ps(how->rise[key]));
        if (is_diagonal) {
            const __mmask16 later = _mm512_cmp_ps_mask(distance, _mm512_setzero_ps(), _CMP_LT_OQ);
            x = _mm512_mask_mov_ps(x, later, _mm512_set1_ps(-__builtin_inff()));
            distance = _mm512_sub_ps(distance, _mm512_set1_ps(1.0f));
        }
        top = _mm512_max_ps(top, x);
        _mm512_store_ps(scores + key * 32, x);
    }
    const __m512 found = _mm512_add_ps(top, first);
    const __mmask16 better = _mm512_mask_cmp_ps_mask(open, found, old, _CMP_GT_OQ);
    if (better) {
        const __m512 worth = exp2_16(better, _mm512_sub_ps(old, found));
        const __m512 shrink = _mm512_mask_mov_ps(_mm512_set1_ps(1.0f), better, worth);
        _mm512_mask_store_ps(best, better, found);
        _mm512_store_ps(total, _mm512_mul_ps(_mm512_load_ps(total), shrink));
        for (int d = 0; d < D; d++)
            _mm512_store_ps(mixed + d * PANEL, _mm512_mul_ps(_mm512_load_ps(mixed + d * PANEL), shrink));
    }
    top = _mm512_sub_ps(_mm512_load_ps(best), first);
    for (int key = 0; key < n; key += 2) {
        __m512 even = exp2_16(open, _mm512_sub_ps(_mm512_load_ps(scores + key * 32), top));
        __m512 odd = exp2_16(open, _mm512_sub_ps(_mm512_load_ps(scores + key * 32 + 32), top));
        sum = _mm512_add_ps(sum, _mm512_add_ps(even, odd));
        if (how->value_scales) {
            even = _mm512_mul_ps(even, _mm512_set1_ps(how->value_scales[key]));
            odd = _mm512_mul_ps(odd, _mm512_set1_ps(how->value_scales[key + 1]));
        }
        _mm512_store_si512(weights + key / 32 * 2 * TILE + key % 32 * PANEL, pairs(even, odd));
    }
    _mm512_store_ps(total, _mm512_add_ps(_mm512_load_ps(total), sum));
}

/* Add values (D, n) times weights (n, 32) to the sums of two panels, (D, 16) each. */
static inline void mix(const bf16 *values, const bf16 *weights, int n, int D, float *panel, float *next) {
    for (int d = 0; d < D; d += 16, values += BLOCK / 32 * TILE) {
        _tile_loadd(0, panel + d * PANEL, 64);
        _tile_loadd(1, next + d * PANEL, 64);
        for (int s = 0; s < n / 32; s++) {
            _tile_loadd(4, values + s * TILE, 64);
            _tile_loadd(6, weights + s * 2 * TILE, 64);
            _tile_dpbf16ps(0, 4, 6);
            _tile_loadd(7, weights + s * 2 * TILE + TILE, 64);
            _tile_dpbf16ps(1, 4, 7);
        }
        _tile_stored(0, panel + d * PANEL, 64);
        _tile_stored(1, next + d * PANEL, 64);
    }
}

/* Attention of one head for up to QUERIES queries of one row, panels `first` to `end`, into the inputs of out_proj.
 * Returns the keys read. */
static int64_t attend(const Pass *pass, int layer, int head, int first, int end, const Own *own) {
    const Model *model = pass->model;
    const Step *step = pass->step;
    const int D = model->d_head, G = model->n_kv_heads, H = model->n_heads, g = head * G / H;
    const int n_steps = pass->head_room / STEP, row = pass->panels[first].row, n_panels = end - first;
    const size_t panel_size = (size_t)H * n_steps * TILE;
    const Stored from = stored_of(model, step, layer, row, g);
    const bf16 *queries = pass->queries + first * panel_size + (size_t)head * n_steps * TILE;
    const int stored = pass->panels[end - 1].position + pass->panels[end - 1].n;
    const float log2_e = 1.44269504f, natural = model->slopes ? model->slopes[head] : 0;
    const float slope = natural * log2_e, scale = model->softmax_scale * log2_e;
    Scoring how = {.scale = scale, .slope = slope};
    for (int key = 0; key < BLOCK; key++) how.rise[key] = slope * key;
    if (from.key_scales) how.key_scales = own->key_scales, how.value_scales = own->value_scales;
    const float tail = slope > 0 ? 1.0f / (1.0f - exp_(-natural)) : 0;
    const __m512 lanes = _mm512_setr_ps(0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15);
    __mmask16 open[QUERIES / PANEL + 1];
    int64_t n_read = 0;
    int n_open = 0;
    for (int i = 0; i < n_panels; i++) {
        const bf16 *query = queries + i * panel_size;
        __m512 square = _mm512_setzero_ps();
        for (int pair = 0; pair < n_steps * 16; pair++) {
            const __m512i both = _mm512_load_si512(query + pair * 32);
            const __m512 even = (__m512)_mm512_slli_epi32(both, 16);
            const __m512 odd = (__m512)_mm512_and_si512(both, _mm512_set1_epi32(0xffff0000));
            square = _mm512_fmadd_ps(odd, odd, _mm512_fmadd_ps(even, even, square));
        }
        const float factor = 1.0001f * step->key_norm[row][layer * G + g] * scale;
        _mm512_store_ps(own->bound + i * PANEL, _mm512_mul_ps(_mm512_sqrt_ps(square), _mm512_set1_ps(factor)));
        _mm512_store_ps(own->best + i * PANEL, _mm512_set1_ps(-1e30f));
        _mm512_store_ps(own->total + i * PANEL, _mm512_setzero_ps());
        open[i] = (1 << pass->panels[first + i].n) - 1;
        n_open++;
    }
    open[n_panels] = 0;
    memset(own->mixed, 0, (size_t)(n_panels + 1) * D * PANEL * 4);
    for (int start = (stored - 1) / BLOCK * BLOCK; start >= 0 && n_open; start -= BLOCK) {
        const int n = stored - start < BLOCK ? stored - start : BLOCK;
        int is_loaded = 0;
        for (int pair = 0; pair < n_panels; pair += 2) {
            const int two = pair + 1 < n_panels, last = pass->panels[first + pair + two].position + 15;
            if (!(open[pair] | open[pair + 1]) || last < start) continue;
            if (!is_loaded) load_block(from, start, n, D, own);
            is_loaded = 1;
            const int here = last + 1 - start < n ? last + 1 - start : n, whole = (here + 31) / 32 * 32;
            const bf16 *query = queries + pair * panel_size;
            score(own->keys, whole, n_steps, query, query + two * panel_size, own->scores);
            for (int i = pair; i < pair + 2; i++) {
                const int at = i - pair, position = pass->panels[first + (i < n_panels ? i : pair)].position;
                float *best = own->best + i * PANEL, *total = own->total + i * PANEL;
                float *mixed = own->mixed + (size_t)i * D * PANEL;
                const __m512 ahead = _mm512_add_ps(lanes, _mm512_set1_ps(position - start));
                float *scores = own->scores + at * PANEL;
                bf16 *weights = own->weights + at * TILE;
                if (!open[i]) {
                    for (int key = 0; key < whole; key += 2)
                        _mm512_store_si512(weights + key / 32 * 2 * TILE + key % 32 * PANEL, _mm512_setzero_si512());
                    continue;
                }
                if (position < start + whole - 1)
                    weigh(&how, scores, whole, 1, open[i], ahead, D, best, total, mixed, weights);
                else
                    weigh(&how, scores, whole, 0, open[i], ahead, D, best, total, mixed, weights);
                const __m512 seen = _mm512_min_ps(_mm512_add_ps(ahead, _mm512_set1_ps(1.0f)), _mm512_set1_ps(n));
                n_read += (int64_t)_mm512_mask_reduce_add_ps(open[i], _mm512_max_ps(seen, _mm512_setzero_ps()));
                if (slope > 0) { /* the most that all older keys can weigh together, by |q.k| <= |q| max|k| */
                    const __m512 distance = _mm512_add_ps(ahead, _mm512_set1_ps(1.0f));
                    const __m512 bound = _mm512_load_ps(own->bound + i * PANEL);
                    const __m512 far = _mm512_fnmadd_ps(distance, _mm512_set1_ps(slope), bound);
                    const __m512 rest = _mm512_sub_ps(far, _mm512_load_ps(best)), zero = _mm512_setzero_ps();
                    const __mmask16 below = _mm512_mask_cmp_ps_mask(open[i], rest, zero, _CMP_LT_OQ);
                    const __m512 left = _mm512_mul_ps(exp2_16(below, rest), _mm512_set1_ps(tail));
                    const __m512 limit = _mm512_mul_ps(_mm512_load_ps(total), _mm512_set1_ps(step->drop));
                    open[i] &= ~_mm512_mask_cmp_ps_mask(below, left, limit, _CMP_LT_OQ);
                    n_open -= !open[i];
                }
            }
            mix(own->values, own->weights, whole, D, own->mixed + (size_t)pair * D * PANEL,
                own->mixed + (size_t)(pair + 1) * D * PANEL);
        }
    }
    for (int i = 0; i < n_panels; i++) {
        const __m512 total = _mm512_load_ps(own->total + i * PANEL), one = _mm512_set1_ps(1.0f);
        const __mmask16 none = _mm512_cmp_ps_mask(total, _mm512_setzero_ps(), _CMP_EQ_OQ); /* columns without a token */
        const __m512 factor = _mm512_div_ps(one, _mm512_mask_mov_ps(total, none, one));
        const float *mixed = own->mixed + (size_t)i * D * PANEL;
        for (int d = 0; d < D; d += 2) {
            const __m512 even = _mm512_mul_ps(_mm512_load_ps(mixed + d * PANEL), factor);
            const __m512 odd = _mm512_mul_ps(_mm512_load_ps(mixed + d * PANEL + PANEL), factor);
            _mm512_store_si512(tile_of(pass->inputs, model->d_model, first + i, head * D + d), pairs(even, odd));
        }
    }
    return n_read;
}

/* Store one head's new keys and values of one row, panels `first` to `end`, in int8 (in bfloat16 `store` has done it),
 * and update the largest |k|, by which queries know when to stop. */
static void store_fresh(const Pass *pass, int layer, int first, int end, int g) {
    const Model *model = pass->model;
    const Step *step = pass->step;
    const int D = model->d_head, G = model->n_kv_heads, row = pass->panels[first].row;
    const Stored to = stored_of(model, step, layer, row, g);
    float most = 0;
    for (int panel = first; panel < end; panel++) {
        const size_t position = pass->panels[panel].position;
        const float *key = pass->fresh + ((size_t)g * pass->n_panels + panel) * PANEL * D;
        const float *value = key + (size_t)G * pass->n_panels * PANEL * D;
        for (int token = 0; token < pass->panels[panel].n; token++) {
            if (step->kv_scale) store_at(to, position + token, key + token * D, value + token * D, D);
            const float length = length_of_key(to, position + token, D);
            most = length > most ? length : most;
        }
    }
    float *largest = step->key_norm[row] + layer * G + g;
    if (most > *largest) *largest = most;
}

/* Attention of all heads of all rows. Returns the keys read by this thread. The heads that see farthest and the last
 * queries come first, as they take longest. */
static int64_t attend_all(const Pass *pass, int layer, Worker *worker) {
    const Model *model = pass->model;
    const Step *step = pass->step;
    const int H = model->n_heads, G = model->n_kv_heads;
    int64_t n_read = 0;
    for (int task = worker->thread, row = 0, first = 0; task < step->n_rows * G; task += worker->n) {
        for (; row < task / G; row++) first += (step->row_tokens[row] + PANEL - 1) / PANEL;
        store_fresh(pass, layer, first, first + (step->row_tokens[row] + PANEL - 1) / PANEL, task % G);
    }
    wait_for_all(worker);
    const int at_once = QUERIES / PANEL;
    int n_spans = 0, spans[pass->n_panels][2];
    for (int panel = 0; panel < pass->n_panels; panel = spans[n_spans - 1][1]) {
        int end = panel + 1;
        while (end < pass->n_panels && end - panel < at_once && pass->panels[end].row == pass->panels[panel].row) end++;
        spans[n_spans][0] = panel, spans[n_spans++][1] = end;
    }
    for (int task; (task = take(worker, 1)) < n_spans * H;) {
        const int *span = spans[n_spans - 1 - task / H];
        n_read += attend(pass, layer, H - 1 - task % H, span[0], span[1], pass->own + worker->thread);
    }
    end_loop(worker);
    wait_for_all(worker);
    return n_read;
}

/* -- the step ------------------------------------------------------------------------------------------------------ */

enum { LOOPS_PER_LAYER = 4, MOST_RANGES = 64 };

/* The floats that a step needs. With a block of so many, `pass` and `own` get their parts, each on a cache line. */
static size_t carve(const Model *model, int n_panels, int n_logits, int n_threads, int is_int8, float *block, Pass *pass,
                    Own *own) {
    const size_t C = model->d_model, F = model->d_ffn, D = model->d_head, H = model->n_heads, G = model->n_kv_heads;
    const size_t columns = ((size_t)n_panels + 1) / 2 * GROUP, head_room = (D + STEP - 1) / STEP * STEP;
    const size_t wanted = ((size_t)n_logits + GROUP - 1) / GROUP * GROUP, most = wanted > columns ? wanted : columns;
    size_t used = 0;
    float *at = block ? (float *)(((uintptr_t)block + 63) & ~(uintptr_t)63) : NULL;
#define TAKE(name, floats) name = at ? (void *)(at + used) : NULL, used += ((floats) + 15) / 16 * 16
    TAKE(pass->x, C * columns);
    TAKE(pass->inputs, C * most / 2);
    TAKE(pass->inner, F * columns / 2);
    TAKE(pass->queries, H * head_room * columns / 2);
    TAKE(pass->fresh, is_int8 ? 2 * G * D * n_panels * PANEL : 0);
    TAKE(pass->wanted, C * wanted);
    TAKE(pass->queues, 16 * ((size_t)model->n_layers * (LOOPS_PER_LAYER + MOST_RANGES) + 1));
    for (int thread = 0; thread < n_threads; thread++) {
        Own *mine = own ? own + thread : &(Own){0};
        TAKE(mine->strip, CHUNK * STRIP / 2);
        TAKE(mine->sums, MOST_GROUPS * GROUP * STRIP);
        TAKE(mine->keys, BLOCK * head_room / 2);
        TAKE(mine->values, BLOCK * D / 2);
        TAKE(mine->weights, BLOCK * GROUP / 2);
        TAKE(mine->key_scales, BLOCK);
        TAKE(mine->value_scales, BLOCK);
        TAKE(mine->scores, BLOCK * GROUP);
        TAKE(mine->mixed, (QUERIES + PANEL) * D);
        TAKE(mine->best, QUERIES + PANEL);
        TAKE(mine->total, QUERIES + PANEL);
        TAKE(mine->bound, QUERIES + PANEL);
    }
#undef TAKE
    return used + 16;
}

/* The floats that `mpt_prompt` needs. n_panels: of 16 tokens, each of one row. is_int8: whether the cache is. */
size_t mpt_prompt_scratch_floats(const Model *model, int32_t n_panels, int32_t n_logits, int32_t n_threads,
                                 int32_t is_int8) {
    Pass pass;
    return carve(model, n_panels, n_logits, n_threads, is_int8, NULL, &pass, NULL);
}

/* Embeddings (T, C) to the residual stream (panels, C, 16); columns without a token are 0. */
static void embeddings_to_panels(const Pass *pass, Worker *worker) {
    const int C = pass->model->d_model;
    for (int panel = worker->thread; panel < pass->n_panels; panel += worker->n)
        for (int k = 0; k < C; k += 16) {
            __m512 rows[16];
            for (int token = 0; token < 16; token++) {
                const float *from = pass->step->x + (size_t)(pass->panels[panel].first + token) * C + k;
                rows[token] = token < pass->panels[panel].n ? _mm512_loadu_ps(from) : _mm512_setzero_ps();
            }
            transpose(rows);
            for (int i = 0; i < 16; i++) _mm512_store_ps(pass->x + ((size_t)panel * C + k + i) * PANEL, rows[i]);
        }
    wait_for_all(worker);
}

/* LayerNorm of panels x (panels, C, 16) into the inputs of a product. */
static void normalize_all(const Pass *pass, const float *x, int n_panels, Norm norm, Worker *worker) {
    const int C = pass->model->d_model;
    for (int panel = worker->thread; panel < n_panels; panel += worker->n)
        normalize(x + (size_t)panel * C * PANEL, C, norm, pass->model->eps, pass->inputs, panel);
    wait_for_all(worker);
}

/* The product with down_proj, over ranges of inputs: so many at once that those of enough tokens fit into the second-
 * level cache. */
static void product_in_ranges(const Pass *pass, int layer, const Linear *linear, const bf16 *inputs, Worker *worker) {
    const int K = linear->n_in, n = (K + 2047) / 2048 < MOST_RANGES ? (K + 2047) / 2048 : MOST_RANGES;
    for (int i = 0; i < n; i++)
        product(pass, layer, DOWN_PROJ, linear, inputs, pass->n_panels, i * (K / STEP) / n * STEP,
                (i + 1) * (K / STEP) / n * STEP, TO_RESIDUAL, worker);
}

/* place: the column of each token of the step. */
static void give_logits(const Pass *pass, const int32_t *place, Worker *worker) {
    const Model *model = pass->model;
    const int C = model->d_model, n_panels = (pass->step->n_logits + PANEL - 1) / PANEL;
    for (int panel = worker->thread; panel < n_panels; panel += worker->n)
        for (int c = 0; c < PANEL; c++) {
            const int at = panel * PANEL + c;
            const int column = at < pass->step->n_logits ? place[pass->step->logit_tokens[at]] : 0;
            const float *from = pass->x + (size_t)(column / PANEL) * C * PANEL + column % PANEL;
            float *to = pass->wanted + (size_t)panel * C * PANEL + c;
            for (int k = 0; k < C; k++) to[k * PANEL] = from[k * PANEL];
        }
    wait_for_all(worker);
    normalize_all(pass, pass->wanted, n_panels, model->norm_f, worker);
    product(pass, 0, -1, &model->head, pass->inputs, n_panels, 0, C, TO_LOGITS, worker);
}

typedef struct { /* a pass, for all its threads */
    const Pass *pass;
    const int32_t *place; /* each token's column */
    Team team;
    _Atomic int64_t n_read;
} Running;

static void run_thread(void *context, int thread, int n) {
    Running *running = context;
    const Pass *pass = running->pass;
    const Model *model = pass->model;
    const int C = model->d_model;
    Worker worker = {&running->team, pass->queues, thread, n};
    configure_tiles();
    embeddings_to_panels(pass, &worker);
    for (int layer = 0; layer < model->n_layers; layer++) {
        const Layer *now = model->layers + layer;
        normalize_all(pass, pass->x, pass->n_panels, now->norm_1, &worker);
        multiply_by_a(pass, layer, WQKV, pass->inputs, C, &worker);
        product(pass, layer, WQKV, &now->wqkv, pass->inputs, pass->n_panels, 0, C, TO_ATTENTION, &worker);
        running->n_read += attend_all(pass, layer, &worker);
        multiply_by_a(pass, layer, OUT_PROJ, pass->inputs, C, &worker);
        product(pass, layer, OUT_PROJ, &now->out_proj, pass->inputs, pass->n_panels, 0, C, TO_RESIDUAL, &worker);
        normalize_all(pass, pass->x, pass->n_panels, now->norm_2, &worker);
        multiply_by_a(pass, layer, UP_PROJ, pass->inputs, C, &worker);
        product(pass, layer, UP_PROJ, &now->up_proj, pass->inputs, pass->n_panels, 0, C, TO_GELU, &worker);
        multiply_by_a(pass, layer, DOWN_PROJ, pass->inner, model->d_ffn, &worker);
        product_in_ranges(pass, layer, &now->down_proj, pass->inner, &worker);
    }
    if (pass->step->n_logits) give_logits(pass, running->place, &worker);
    _tile_release();
}

/* The same as `mpt_step` for any number of tokens. */
void mpt_prompt(const Model *model, const Step *step) {
    int n_panels = 0;
    for (int row = 0; row < step->n_rows; row++) n_panels += (step->row_tokens[row] + PANEL - 1) / PANEL;
    Panel panels[n_panels];
    int32_t place[step->n_tokens]; /* each token's column */
    for (int row = 0, panel = 0, token = 0; row < step->n_rows; row++)
        for (int at = 0; at < step->row_tokens[row]; at += PANEL, panel++) {
            const int left = step->row_tokens[row] - at, n = left < PANEL ? left : PANEL;
            panels[panel] = (Panel){row, n, token, step->row_length[row] + at};
            for (int c = 0; c < n; c++) place[token++] = panel * PANEL + c;
        }
    Own own[step->n_threads];
    Pass pass = {.model = model, .step = step, .panels = panels, .n_panels = n_panels, .own = own,
                 .head_room = (model->d_head + STEP - 1) / STEP * STEP};
    carve(model, n_panels, step->n_logits, step->n_threads, step->kv_scale != NULL, step->scratch, &pass, own);
    memset(pass.queues, 0, 64 * ((size_t)model->n_layers * (LOOPS_PER_LAYER + MOST_RANGES) + 1));
    if (pass.head_room != model->d_head)
        memset(pass.queries, 0, (size_t)n_panels * model->n_heads * pass.head_room * PANEL * sizeof(bf16));
    Running running = {.pass = &pass, .place = place};
    on_threads(step->n_threads, run_thread, &running);
    if (step->keys_read) *step->keys_read += running.n_read;
}

#endif
