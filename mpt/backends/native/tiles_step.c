/* One step of an MPT model for a few tokens on CPUs with AMX: everything from the embeddings to the logits in one
 * parallel region. Without AMX this file is empty, and rows.c does it.
 *
 *   inputs of products        `put` and `finish` lay them out as the weights take them; LayerNorm writes through them
 *   products                  `multiply`: 32 outputs of up to 32 tokens, by tiles
 *   adapters                  low-rank products beside each product
 *   products and their use    `product`: outputs over the threads, into rows, the residual stream, or through GELU
 *   the step                  memory, and `mpt_step`, which calls all of it, with attention.h, layer by layer
 *
 * Decoding reads each weight once and computes little with it, so memory sets its speed. Called layer by layer from
 * Python the same step spends a third of its time elsewhere: a thread barrier for each operation, kernels that read a
 * matrix at half the memory's speed for a few rows, one attention call for each row.
 *
 * Weights are bfloat16, or int8 with one scale for each output (weight = int8 * scale); biases, norms,
 * the residual stream and all sums are float32. Inputs of bfloat16 weights are rounded to bfloat16. Inputs of int8
 * weights become two int8 numbers, 15 bits of a token's largest value, which leaves enough of the others beside an
 * outlier (Dettmers et al. 2022). No bit of a token's result depends on which other tokens share the step: every sum
 * runs in its own fixed order.
 */
#include "common.h"

#if AMX
#include "layer.h"

/* -- inputs of products -------------------------------------------------------------------------------------------- */

/* Tokens are columns, PANEL of them to a cache line: the residual stream is (C, columns) float32. So everything that
 * works on all tokens of a step works on whole vectors, however few tokens there are. */
static inline int columns_of(int T) { return (T + PANEL - 1) / PANEL * PANEL; }

/* The inputs of a product, (K, T), as its weights take them; k counts inputs.
 *
 * For bfloat16 weights: bfloat16 in `packed`, by panels of 16 tokens, each of blocks of 32 k, each (16 pairs
 * of k, 16 tokens, 2).
 *
 * For int8 weights: first float32 in `staged` (K, columns), with each thread's largest |x| of a token in
 * `peaks` (threads, MAX_TOKENS). Then `finish` makes two int8 numbers in `packed`, x = step * (128 high + low), by
 * panels of 16 columns, each of blocks of 64 k, each (16 fours of k, 16 columns, 4). `high` fills one panel and `low`
 * the next; up to 8 tokens share one panel, `high` in its first half and `low` in its second. */
typedef struct {
    int K, columns, is_int8, thread;
    void *packed;
    float *staged, *peaks, *steps;
} Inputs;

/* Write the 16 tokens of a panel at two neighbouring k. */
static inline void put(const Inputs *inputs, int panel, int k, const float *even, const float *odd) {
    if (inputs->is_int8) {
        float *staged = inputs->staged + (size_t)k * inputs->columns + panel * PANEL;
        float *peaks = inputs->peaks + (size_t)inputs->thread * MAX_TOKENS + panel * PANEL;
        for (int c = 0; c < PANEL; c++) {
            const float a = __builtin_fabsf(even[c]), b = __builtin_fabsf(odd[c]), top = a > b ? a : b;
            staged[c] = even[c], staged[inputs->columns + c] = odd[c];
            peaks[c] = top > peaks[c] ? top : peaks[c];
        }
        return;
    }
    bf16 *at = (bf16 *)inputs->packed + (size_t)panel * inputs->K * PANEL + (size_t)(k / 32) * 512 + k % 32 / 2 * 32;
    uint32_t both[PANEL];
    for (int c = 0; c < PANEL; c++) both[c] = (uint32_t)narrow(even[c]) | (uint32_t)narrow(odd[c]) << 16;
    memcpy(at, both, sizeof both);
}

static void start(Inputs *inputs, int K, const Linear *linear) {
    inputs->K = K, inputs->is_int8 = linear->scale != NULL;
    if (inputs->is_int8)
        for (int c = 0; c < MAX_TOKENS; c++) inputs->peaks[(size_t)inputs->thread * MAX_TOKENS + c] = 0;
}

/* Quantize inputs of int8 weights, after all of them are written and the threads have waited for each other; bfloat16
 * needs nothing more. Every thread calls it. */
static void finish(Inputs *inputs, int T, Worker *worker) {
    if (!inputs->is_int8) return;
    const int K = inputs->K, columns = inputs->columns, shares_panel = T <= 8;
    if (worker->thread == 0)
        for (int c = 0; c < columns; c++) {
            float top = 1e-30f;
            for (int thread = 0; thread < worker->n; thread++) {
                const float peak = inputs->peaks[(size_t)thread * MAX_TOKENS + c];
                top = peak > top ? peak : top;
            }
            inputs->steps[c] = top / (127 * 128);
        }
    wait_for_all(worker);
    float inverse[MAX_TOKENS];
    for (int c = 0; c < columns; c++) inverse[c] = 1.0f / inputs->steps[c];
    for (int k = part(worker, K, 4, 0); k < part(worker, K, 4, 1); k += 4) {
        for (int first = 0; first < columns; first += PANEL) {
            const int used = T - first < PANEL ? T - first : PANEL;
            int8_t high[PANEL * 4] = {0}, low[PANEL * 4] = {0};
            for (int i = 0; i < 4; i++)
                for (int c = 0; c < used; c++) {
                    const float x = inputs->staged[(size_t)(k + i) * columns + first + c] * inverse[first + c];
                    const int32_t q = (int32_t)__builtin_rintf(x), h = (q + 64) >> 7;
                    high[c * 4 + i] = h, low[c * 4 + i] = q - (h << 7);
                }
            int8_t *panel = (int8_t *)inputs->packed + (size_t)first * 2 * K + (size_t)(k / 64) * 1024 + k % 64 / 4 * 64;
            if (shares_panel) {
                memcpy(panel, high, 32), memcpy(panel + 32, low, 32);
            } else {
                memcpy(panel, high, 64), memcpy(panel + (size_t)PANEL * K, low, 64);
            }
        }
    }
    wait_for_all(worker);
}

/* LayerNorm of one panel of the residual stream (C, columns), into the inputs of a product. */
static void normalize(const float *x, int columns, int panel, Norm norm, float eps, const Inputs *inputs) {
    const int C = inputs->K;
    float mean[PANEL] = {0}, factor[PANEL] = {0}, pair[2][PANEL];
    x += panel * PANEL;
    for (int k = 0; k < C; k++)
        for (int c = 0; c < PANEL; c++) mean[c] += x[(size_t)k * columns + c];
    for (int c = 0; c < PANEL; c++) mean[c] /= C;
    for (int k = 0; k < C; k++)
        for (int c = 0; c < PANEL; c++) {
            const float off = x[(size_t)k * columns + c] - mean[c];
            factor[c] += off * off;
        }
    for (int c = 0; c < PANEL; c++) factor[c] = 1.0f / sqrtf(factor[c] / C + eps);
    for (int k = 0; k < C; k += 2) {
        for (int i = 0; i < 2; i++) {
            const float weight = norm.weight[k + i], bias = norm.bias ? norm.bias[k + i] : 0.0f;
            for (int c = 0; c < PANEL; c++)
                pair[i][c] = (x[(size_t)(k + i) * columns + c] - mean[c]) * factor[c] * weight + bias;
        }
        put(inputs, panel, k, pair[0], pair[1]);
    }
}

/* -- products ------------------------------------------------------------------------------------------------------ */

/* Prefetch the beginning of 32 rows of weights, while sums are stored and memory would be idle: the processor
 * prefetches the rest of a row by itself, but not where the next begins. One token: 6 to 9 % faster at 125M, 2 % at
 * 1B. */
static inline void begin_to_fetch(const char *rows, size_t stride) {
    for (int i = 0; i < 32; i++)
        for (int line = 0; line < 2; line++) _mm_prefetch(rows + i * stride + 64 * line, _MM_HINT_T1);
}

/* Sums (32 outputs, 32 tokens), float32 or with int8 weights int32, of two blocks of 16 rows of weights, `stride` bytes
 * each, and one or two panels of inputs. Where there is one block, `more` is the first again. */
static inline __attribute__((always_inline)) void multiply_tiles(const char *rows, const char *more, size_t stride,
                                                                 const char *panel, const char *next, int has_next,
                                                                 int soon, void *sums, const int is_int8) {
    _tile_zero(0);
    _tile_zero(1);
    _tile_zero(2);
    _tile_zero(3);
    for (size_t k = 0; k < stride; k += 64) { /* bytes: 32 inputs of bfloat16, 64 of int8 */
        _tile_loadd(4, rows + k, stride);
        _tile_loadd(5, more + k, stride);
        _tile_loadd(6, panel + k * PANEL, 64);
        if (is_int8) {
            _tile_dpbssd(0, 4, 6);
            _tile_dpbssd(2, 5, 6);
        } else {
            _tile_dpbf16ps(0, 4, 6);
            _tile_dpbf16ps(2, 5, 6);
        }
        if (has_next) {
            _tile_loadd(7, next + k * PANEL, 64);
            if (is_int8) {
                _tile_dpbssd(1, 4, 7);
                _tile_dpbssd(3, 5, 7);
            } else {
                _tile_dpbf16ps(1, 4, 7);
                _tile_dpbf16ps(3, 5, 7);
            }
        }
    }
    begin_to_fetch(rows + soon * stride, stride);
    _tile_stored(0, (float *)sums, 128); /* numbers of four bytes, whichever */
    _tile_stored(1, (float *)sums + 16, 128);
    _tile_stored(2, (float *)sums + 512, 128);
    _tile_stored(3, (float *)sums + 528, 128);
}

/* Sums (32 outputs, 32 tokens): n_blocks blocks of 16 outputs from n0, of n_here tokens from `first`. soon: how many
 * outputs further this thread's next turn most likely is. */
static void multiply(const Linear *linear, int n0, int n_blocks, int soon, const Inputs *inputs, int first, int n_here,
                     float *sums) {
    const size_t stride = (size_t)linear->n_in * 2;
    const char *rows = (const char *)linear->weight + n0 * stride, *more = rows + (n_blocks > 1 ? 16 * stride : 0);
    const char *panel = (const char *)inputs->packed + first * stride, *next = panel + PANEL * stride;
    multiply_tiles(rows, more, stride, panel, next, n_here > PANEL, soon, sums, 0);
}

/* The same with int8 weights, for up to 16 tokens. The sums of int8 products are exact. */
static void multiply_int8(const Linear *linear, int n0, int n_blocks, int soon, const Inputs *inputs, int first,
                          int n_here, float *sums) {
    const size_t stride = linear->n_in;
    const char *rows = (const char *)linear->weight + n0 * stride, *more = rows + (n_blocks > 1 ? 16 * stride : 0);
    const char *panel = (const char *)inputs->packed + first * 2 * stride, *next = panel + PANEL * stride;
    const int n_panels = inputs->columns > PANEL || n_here > 8 ? 2 : 1;
    int32_t exact[1024];
    multiply_tiles(rows, more, stride, panel, next, n_panels > 1, soon, exact, 1);
    const int to_low = n_panels > 1 ? PANEL : 8;
    for (int r = 0; r < 16 * n_blocks; r++)
        for (int c = 0; c < to_low; c++) {
            const int32_t high = exact[r * 32 + c], low = exact[r * 32 + to_low + c];
            sums[r * 32 + c] = ((float)high * 128 + (float)low) * inputs->steps[first + c];
        }
}

/* -- adapters ------------------------------------------------------------------------------------------------------ */

/* One row of a matrix a (K) times the inputs of a panel. */
static void dot_panel(const bf16 *a, const Inputs *inputs, int panel, float *out) {
    const int K = inputs->K;
    if (inputs->is_int8) {
        for (int c = 0; c < PANEL; c++) out[c] = 0;
        for (int k = 0; k < K; k++) {
            const float weight = wide(a[k]), *x = inputs->staged + (size_t)k * inputs->columns + panel * PANEL;
            for (int c = 0; c < PANEL; c++) out[c] += weight * x[c];
        }
        return;
    }
    const bf16 *x = (const bf16 *)inputs->packed + (size_t)panel * K * PANEL;
    __m512 sums[4] = {0};
    for (int k = 0; k < K; k += 8, x += 8 * PANEL)
        for (int i = 0; i < 4; i++) {
            int32_t both;
            memcpy(&both, a + k + 2 * i, 4);
            sums[i] = _mm512_dpbf16_ps(sums[i], (__m512bh)_mm512_set1_epi32(both),
                                       (__m512bh)_mm512_loadu_si512(x + 2 * i * PANEL));
        }
    _mm512_storeu_ps(out, _mm512_add_ps(_mm512_add_ps(sums[0], sums[1]), _mm512_add_ps(sums[2], sums[3])));
}

/* low = a x for all adapters and all tokens, also for tokens of other adapters, whose results are not used. */
static void multiply_by_a(Adapted adapted, const Inputs *inputs, Worker *worker) {
    if (!adapted.n) return;
    for (int task; (task = take(worker, 1)) < adapted.n * adapted.max_rank;) {
        const int which = task / adapted.max_rank, r = task % adapted.max_rank;
        const Lora *lora = adapted.loras + (size_t)which * adapted.stride;
        float *low = adapted.low + (size_t)task * adapted.columns;
        if (r >= lora->rank) continue;
        for (int panel = 0; panel < adapted.columns / PANEL; panel++)
            dot_panel((const bf16 *)lora->a + (size_t)r * inputs->K, inputs, panel, low + panel * PANEL);
    }
    end_loop(worker);
    wait_for_all(worker);
}

/* Add b low to one token's outputs n0 to n0 + 15, which are 32 numbers apart in sums. Never inlined, so that the
 * compiler orders its sums in one way for all callers. */
static __attribute__((noinline)) void add_adapted(const Adapted *adapted, const Lora *lora, const float *low, int N, int n0,
                                                  float *sums) {
    float values[PANEL] = {0};
    const bf16 *b = (const bf16 *)lora->b + n0;
    for (int r = 0; r < lora->rank; r++, low += adapted->columns, b += N)
        for (int i = 0; i < PANEL; i++) values[i] += *low * wide(b[i]);
    for (int i = 0; i < PANEL; i++) sums[i * 32] += values[i];
}

/* -- products and their use ---------------------------------------------------------------------------------------- */

typedef enum { TO_ROWS, TO_RESIDUAL, TO_GELU } Target;

/* GELU of 16 values, in place. Never inlined, so that it rounds in one way for all callers. */
static __attribute__((noinline)) void gelu(float *x) {
    for (int i = 0; i < PANEL; i++) x[i] = gelu_(x[i]);
}

/* All outputs for T tokens, over the threads. TO_RESIDUAL adds them to the residual stream `out` (N, columns). TO_GELU
 * makes them, through GELU, the inputs `next` of another product. TO_ROWS writes token t's to out + row_of[t] * N,
 * nothing where row_of[t] is negative; without row_of, to out + t * N. */
static void product(const Linear *linear, const Inputs *inputs, Adapted adapted, int T, Target target, float *out,
                    Inputs *next, const int32_t *row_of, Worker *worker) {
    const int N = linear->n_out, n_pairs = (N + 31) / 32, columns = inputs->columns;
    const int soon = 32 * worker->n; /* as each of the other threads takes one pair meanwhile */
    const int at_once = !inputs->is_int8 ? 32 : T > 8 ? 16 : 8;
    for (int pair; (pair = take(worker, 1)) < n_pairs;) {
        const int n0 = pair * 32, n_outputs = N - n0 >= 32 ? 32 : 16;
        _Alignas(64) float sums[1024]; /* (32 outputs, 32 tokens) */
        for (int first = 0; first < T; first += at_once) {
            const int n_here = T - first < at_once ? T - first : at_once, n_columns = columns_of(n_here);
            if (linear->scale)
                multiply_int8(linear, n0, n_outputs / 16, soon, inputs, first, n_here, sums);
            else
                multiply(linear, n0, n_outputs / 16, soon, inputs, first, n_here, sums);
            for (int r = 0; r < n_outputs; r++) {
                const float scale = linear->scale ? linear->scale[n0 + r] : 1.0f;
                const float bias = linear->bias ? linear->bias[n0 + r] : 0.0f;
                float *values = sums + r * 32;
                for (int c = 0; c < n_columns; c++) values[c] = values[c] * scale + bias;
            }
            for (int c = 0; c < n_here && adapted.n; c++) {
                const int which = adapted.adapter_of[first + c];
                if (which < 0) continue;
                const Lora *lora = adapted.loras + (size_t)which * adapted.stride;
                const float *low = adapted.low + (size_t)which * adapted.max_rank * adapted.columns + first + c;
                for (int r = 0; r < n_outputs; r += PANEL) add_adapted(&adapted, lora, low, N, n0 + r, sums + r * 32 + c);
            }
            for (int r = 0; r < n_outputs; r++) {
                float *values = sums + r * 32;
                if (target == TO_GELU && n_here > 4)
                    for (int c = 0; c < n_columns; c += PANEL) gelu(values + c);
                if (target == TO_RESIDUAL) {
                    float *x = out + (size_t)(n0 + r) * columns + first;
                    for (int c = 0; c < n_columns; c++) x[c] += values[c];
                }
            }
            if (target == TO_GELU && n_here <= 4) /* vectors of 16 outputs of a token: fewer than one for each output */
                for (int token = 0; token < n_here; token++)
                    for (int r = 0; r < n_outputs; r += PANEL) {
                        float column[PANEL];
                        for (int i = 0; i < PANEL; i++) column[i] = sums[(r + i) * 32 + token];
                        gelu(column);
                        for (int i = 0; i < PANEL; i++) sums[(r + i) * 32 + token] = column[i];
                    }
            if (target == TO_GELU)
                for (int c = 0; c < n_columns; c += PANEL)
                    for (int r = 0; r < n_outputs; r += 2)
                        put(next, (first + c) / PANEL, n0 + r, sums + r * 32 + c, sums + (r + 1) * 32 + c);
            if (target == TO_ROWS)
                for (int token = first; token < first + n_here; token++) {
                    const int row = row_of ? row_of[token] : token;
                    if (row < 0) continue;
                    float *to = out + (size_t)row * N + n0;
                    for (int r = 0; r < n_outputs; r++) to[r] = sums[r * 32 + token - first];
                }
        }
    }
    end_loop(worker);
    wait_for_all(worker);
}

/* -- the step ------------------------------------------------------------------------------------------------------ */

/* The step's memory: parts of one block of floats that Python allocates. */
typedef struct {
    float *x, *qkv, *mixed, *staged, *peaks, *steps; /* x: (C, columns); qkv, mixed: (T, ...) */
    void *packed, *inner;                            /* inputs: of C, and of the MLP's inner width */
    atomic_int *queues;                              /* one for each loop that is shared out, a cache line each */
} Scratch;

enum { LOOPS_PER_LAYER = 5 + N_PROJECTIONS };

/* The floats that a step of T tokens needs. With a block of so many, `out` gets its parts, each on a cache line. */
static size_t carve(const Model *model, int T, int n_threads, float *block, Scratch *out) {
    const size_t columns = columns_of(T), C = model->d_model, F = model->d_ffn, most = C > F ? C : F;
    const size_t width = C + 2 * (size_t)model->n_kv_heads * model->d_head;
    const size_t padded = columns + PANEL; /* products read whole panels, two at a time */
    size_t used = 0;
    float *at = block ? (float *)(((uintptr_t)block + 63) & ~(uintptr_t)63) : NULL;
#define TAKE(name, floats) out->name = at ? (void *)(at + used) : NULL, used += ((floats) + 15) / 16 * 16
    TAKE(x, C * columns);
    TAKE(qkv, columns * width);
    TAKE(mixed, columns * C);
    TAKE(staged, most * columns);
    TAKE(peaks, (size_t)n_threads * MAX_TOKENS);
    TAKE(steps, columns);
    TAKE(packed, padded * C / 2);
    TAKE(inner, padded * F / 2);
    TAKE(queues, 16 * ((size_t)model->n_layers * LOOPS_PER_LAYER + 1));
#undef TAKE
    return used + 16;
}

size_t mpt_scratch_floats(const Model *model, int32_t n_tokens, int32_t n_threads) {
    Scratch scratch;
    return carve(model, n_tokens, n_threads, NULL, &scratch);
}

/* LayerNorm of the residual stream into the inputs of a product. */
static void normalize_all(const float *x, Norm norm, float eps, Inputs *inputs, const Linear *linear, int T,
                          Worker *worker) {
    start(inputs, linear->n_in, linear);
    for (int panel = worker->thread; panel < inputs->columns / PANEL; panel += worker->n)
        normalize(x, inputs->columns, panel, norm, eps, inputs);
    wait_for_all(worker);
    finish(inputs, T, worker);
}

/* Store all new keys and values and attend over them, head by head. Returns the keys read by this thread. */
static int64_t attend_all(const Place *at, Worker *worker) {
    const Model *model = at->model;
    const Step *step = at->step;
    const int H = model->n_heads, G = model->n_kv_heads, n_tasks = step->n_rows * H;
    const int stores_alone = G != H; /* query heads that share keys wait until all keys are stored */
    int64_t n_read = 0;
    if (model->clip_qkv > 0 || model->layers[at->layer].q_ln.weight) {
        for (int token = worker->thread; token < step->n_tokens; token += worker->n) prepare_token(at, token);
        wait_for_all(worker);
    }
    if (stores_alone) {
        for (int task = worker->thread; task < step->n_rows * G; task += worker->n) store(at, task / G, task % G);
        wait_for_all(worker);
    }
    for (int task; (task = take(worker, 1)) < n_tasks;) {
        if (!stores_alone) store(at, task / H, task % H);
        n_read += attend_head(at, task / H, task % H, 0, step->row_tokens[task / H]);
    }
    end_loop(worker);
    wait_for_all(worker);
    return n_read;
}

/* The results of attention, (T, C), as the inputs of a product. */
static void pack(const float *mixed, Inputs *inputs, const Linear *linear, int T, Worker *worker) {
    const int C = linear->n_in;
    start(inputs, C, linear);
    for (int k = part(worker, C, 2, 0); k < part(worker, C, 2, 1); k += 2)
        for (int panel = 0; panel < inputs->columns / PANEL; panel++) {
            float pair[2][PANEL];
            for (int c = 0; c < PANEL; c++) {
                const int token = panel * PANEL + c;
                const float *from = mixed + (size_t)token * C + k;
                pair[0][c] = token < T ? from[0] : 0, pair[1][c] = token < T ? from[1] : 0;
            }
            put(inputs, panel, k, pair[0], pair[1]);
        }
    wait_for_all(worker);
    finish(inputs, T, worker);
}

typedef struct { /* of one step, for all its threads */
    const Model *model;
    const Step *step;
    const int32_t *first, *logits_of, *adapter_of;
    Scratch scratch;
    Team team;
    _Atomic int64_t n_read;
} Pass;

static void run_thread(void *context, int thread, int n) {
    Pass *pass = context;
    const Model *model = pass->model;
    const Step *step = pass->step;
    const Scratch *scratch = &pass->scratch;
    const int T = step->n_tokens, C = model->d_model, columns = columns_of(T);
    const int width = C + 2 * model->n_kv_heads * model->d_head;
    float *x = scratch->x;
    Worker worker = {&pass->team, scratch->queues, thread, n};
    Inputs inputs = {.columns = columns, .thread = worker.thread, .packed = scratch->packed,
                     .staged = scratch->staged, .peaks = scratch->peaks, .steps = scratch->steps};
    Inputs inner = inputs;
    inner.packed = scratch->inner;
    configure_tiles();
    for (int k = part(&worker, C, 1, 0); k < part(&worker, C, 1, 1); k++)
        for (int token = 0; token < columns; token++)
            x[(size_t)k * columns + token] = token < T ? step->x[(size_t)token * C + k] : 0;
    wait_for_all(&worker);
    for (int layer = 0; layer < model->n_layers; layer++) {
        const Layer *now = model->layers + layer;
        const Place at = {model, step, layer, width, pass->first, scratch->qkv, scratch->mixed};
        Adapted adapted[N_PROJECTIONS];
        for (int i = 0; i < N_PROJECTIONS; i++) adapted[i] = adapted_at(model, step, pass->adapter_of, columns, layer, i);
        normalize_all(x, now->norm_1, model->eps, &inputs, &now->wqkv, T, &worker);
        multiply_by_a(adapted[WQKV], &inputs, &worker);
        product(&now->wqkv, &inputs, adapted[WQKV], T, TO_ROWS, scratch->qkv, NULL, NULL, &worker);
        pass->n_read += attend_all(&at, &worker);
        pack(scratch->mixed, &inputs, &now->out_proj, T, &worker);
        multiply_by_a(adapted[OUT_PROJ], &inputs, &worker);
        product(&now->out_proj, &inputs, adapted[OUT_PROJ], T, TO_RESIDUAL, x, NULL, NULL, &worker);
        normalize_all(x, now->norm_2, model->eps, &inputs, &now->up_proj, T, &worker);
        multiply_by_a(adapted[UP_PROJ], &inputs, &worker);
        start(&inner, model->d_ffn, &now->down_proj);
        product(&now->up_proj, &inputs, adapted[UP_PROJ], T, TO_GELU, NULL, &inner, NULL, &worker);
        finish(&inner, T, &worker);
        multiply_by_a(adapted[DOWN_PROJ], &inner, &worker);
        product(&now->down_proj, &inner, adapted[DOWN_PROJ], T, TO_RESIDUAL, x, NULL, NULL, &worker);
    }
    if (step->n_logits) {
        normalize_all(x, model->norm_f, model->eps, &inputs, &model->head, T, &worker);
        product(&model->head, &inputs, (Adapted){0}, T, TO_ROWS, step->logits, NULL, pass->logits_of, &worker);
    }
    _tile_release();
}

/* One step: keys and values of all its tokens are stored in their rows, logits are written for those that want them. */
void mpt_step(const Model *model, const Step *step) {
    const int T = step->n_tokens;
    int32_t first[step->n_rows], logits_of[T], adapter_of[T];
    Pass pass = {.model = model, .step = step, .first = first, .logits_of = logits_of, .adapter_of = adapter_of};
    carve(model, T, step->n_threads, step->scratch, &pass.scratch);
    memset(pass.scratch.queues, 0, 64 * ((size_t)model->n_layers * LOOPS_PER_LAYER + 1));
    place_tokens(step, first, adapter_of);
    for (int token = 0; token < T; token++) logits_of[token] = -1;
    for (int at = 0; at < step->n_logits; at++) logits_of[step->logit_tokens[at]] = at;
    on_threads(step->n_threads, run_thread, &pass);
    if (step->keys_read) *step->keys_read += pass.n_read;
}

#endif
