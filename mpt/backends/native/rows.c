/* One step of an MPT model for any number of tokens, on CPUs without AMX: embeddings to logits in one parallel region.
 * With AMX, whose tiles want another layout, tiles_step.c and tiles_prompt.c do the same.
 *
 *   inputs of products        what a token's inputs are made into for the weights that they meet
 *   adapters                  low-rank products beside each product
 *   products and their use    `product`: outputs over the threads, into rows, the residual stream, or through GELU
 *   attention                 keys and values stored; heads and spans of queries over the threads (attention.h)
 *   the step                  memory, and `mpt_step` and `mpt_prompt`, which call all of it layer by layer
 *
 * Everything lies row by row, a token's numbers side by side, as the weights do: a product is then dot products of rows
 * with rows, whose kernels (kernels.h) need no layout of their own. Decoding reads each weight once and computes little
 * with it, so memory sets its speed. In prompts a strip of weights stays in the second-level cache and four tokens'
 * inputs in the first.
 *
 * Weights are float32, float16, bfloat16, or blocks of small integers (formats.h). The residual stream and all sums are
 * float32. Beside float32 and float16, inputs stay float32; beside bfloat16, they are rounded to bfloat16. Beside codes,
 * int8 or blocks, each input becomes an int8 number with a step for each 32 of them, as ggml's Q8_0 does, and integers
 * are multiplied. No bit of a token's result depends on which other tokens share the step: every sum runs in its own
 * fixed order.
 */
#include "common.h"

#if !AMX
#include "layer.h"
#include "kernels.h"
#include "attention_prompt.h"

enum {
    SPAN = MAX_TOKENS,     /* queries of a row that share each block of keys */
    FEW = 2 * TOKENS_AT_ONCE, /* tokens for which nothing is widened beforehand */
    LOOPS_PER_LAYER = 5 + N_PROJECTIONS,
};

/* -- inputs of products -------------------------------------------------------------------------------------------- */

typedef enum { AS_THEY_ARE, ROUNDED, CODED } Kind;

typedef struct {
    int K, side_by_side; /* side_by_side: multiplied by `multiply_side_by_side`, where there is one */
    Kind kind;
    float *plain;   /* (T, K) as they are, beside float32 and float16, and of whole tokens until they are rounded */
    Dense *dense;   /* (T, K) rounded, for bfloat16 weights and for strips of blocks widened */
    int8_t *codes;  /* (T, K), for weights in codes, with what belongs to them (`Coded` in kernels.h): */
    float *steps, *sums32, *sums16;
    int32_t *totals;
} Inputs;

static inline void to_dense(const float *x, int n, Dense *out) {
#if AVX512_BF16
    narrow_all(x, n, out);
#else
    for (int i = 0; i < n; i++) out[i] = wide(narrow(x[i]));
#endif
}

/* Round n inputs of one token from k0 on, whole groups of 32, for weights in codes. */
static void to_codes(const Inputs *inputs, size_t token, int k0, int n, const float *x) {
    const size_t at = token * inputs->K + k0;
    int8_t *codes = inputs->codes + at;
    for (int k = 0; k < n; k += 32) {
        const float step = largest_size(x + k, 32) / 127, inverse = 1 / step;
        inputs->steps[(at + k) / 32] = step; /* NaN or infinite where an input is: damage is not hidden */
        for (int i = k; i < k + 32; i++) codes[i] = (int8_t)(int32_t)__builtin_rintf(x[i] * inverse);
        for (int part = 0; part < 2; part++) {
            int32_t total = 0;
            for (int i = k + 16 * part; i < k + 16 * part + 16; i++) total += codes[i];
            inputs->totals[(at + k) / 16 + part] = total, inputs->sums16[(at + k) / 16 + part] = step * total;
        }
        inputs->sums32[(at + k) / 32] = inputs->sums16[(at + k) / 16] + inputs->sums16[(at + k) / 16 + 1];
    }
}

/* Round inputs k0 to k0 + n of one token to what its weights are multiplied with. */
static void encode(const Inputs *inputs, size_t token, int k0, int n, const float *x) {
    if (inputs->kind == ROUNDED) to_dense(x, n, inputs->dense + token * inputs->K + k0);
    if (inputs->kind == CODED) to_codes(inputs, token, k0, n, x);
}

/* For which weights inputs are made. is_prompt: many tokens. */
static void start(Inputs *inputs, const Linear *linear, int is_prompt) {
    inputs->K = linear->n_in, inputs->side_by_side = is_prompt && linear->n_in % 32 == 0;
    inputs->kind = is_float(linear->format) ? AS_THEY_ARE : linear->format == BFLOAT16 ? ROUNDED : CODED;
}

/* LayerNorm of tokens' residual streams (C) into the inputs of a product. which: (n) the tokens, or NULL for all. */
static void normalize_all(const float *x, Norm norm, float eps, Inputs *inputs, const Linear *linear, int is_prompt,
                          int n, const int32_t *which, Worker *worker) {
    start(inputs, linear, is_prompt);
    const size_t C = inputs->K;
    for (int at = worker->thread; at < n; at += worker->n) {
        normalize_one(x + (which ? which[at] : at) * C, norm, eps, inputs->K, inputs->plain + at * C);
        encode(inputs, at, 0, inputs->K, inputs->plain + at * C);
    }
    wait_for_all(worker);
}

/* -- adapters ------------------------------------------------------------------------------------------------------ */

static float dot_narrow(const bf16 *a, const Dense *x, int n) {
    float sum = 0;
#if AVX512_BF16
    for (int i = 0; i < n; i++) sum += wide(a[i]) * wide(x[i]);
#else
    for (int i = 0; i < n; i++) sum += wide(a[i]) * x[i];
#endif
    return sum;
}

static float dot_float(const float *a, const float *x, int n) {
    float sum = 0;
    for (int i = 0; i < n; i++) sum += a[i] * x[i];
    return sum;
}

/* The inputs are those that weights in codes meet. */
static float dot_coded(const bf16 *a, const Inputs *inputs, size_t token) {
    const int8_t *codes = inputs->codes + token * inputs->K;
    const float *steps = inputs->steps + token * inputs->K / 32;
    float sum = 0;
    for (int g = 0; g < inputs->K / 32; g++) {
        float own = 0;
        for (int i = 32 * g; i < 32 * g + 32; i++) own += wide(a[i]) * codes[i];
        sum += own * steps[g];
    }
    return sum;
}

/* One row of a matrix a times the inputs of a token. */
static float dot_row(Format format, const Lora *lora, int r, const Inputs *inputs, size_t token) {
    const size_t K = inputs->K;
    if (is_float(format)) return dot_float((const float *)lora->a + r * K, inputs->plain + token * K, inputs->K);
    const bf16 *a = (const bf16 *)lora->a + r * K;
    return inputs->kind == CODED ? dot_coded(a, inputs, token) : dot_narrow(a, inputs->dense + token * K, inputs->K);
}

/* low = a x for the tokens of each adapter. */
static void multiply_by_a(Adapted adapted, const Inputs *inputs, Worker *worker) {
    if (!adapted.n) return;
    for (int task; (task = take(worker, 1)) < adapted.n * adapted.max_rank;) {
        const int which = task / adapted.max_rank, r = task % adapted.max_rank;
        const Lora *lora = adapted.loras + (size_t)which * adapted.stride;
        float *low = adapted.low + (size_t)task * adapted.columns;
        if (r >= lora->rank) continue;
        for (int token = 0; token < adapted.columns; token++)
            if (adapted.adapter_of[token] == which) low[token] = dot_row(adapted.format, lora, r, inputs, token);
    }
    end_loop(worker);
    wait_for_all(worker);
}

/* Add b low to n outputs of one token, from n0 on. */
static void add_adapted(const Adapted *adapted, int token, int N, int n0, int n, float *out) {
    const int which = adapted->adapter_of[token];
    if (which < 0) return;
    const Lora *lora = adapted->loras + (size_t)which * adapted->stride;
    const float *low = adapted->low + (size_t)which * adapted->max_rank * adapted->columns + token;
    for (int r = 0; r < lora->rank; r++, low += adapted->columns) {
        const size_t at = (size_t)r * N + n0;
        const float *plain = (const float *)lora->b + at;
        const bf16 *rounded = (const bf16 *)lora->b + at;
        if (is_float(adapted->format))
            for (int i = 0; i < n; i++) out[i] += *low * plain[i];
        else
            for (int i = 0; i < n; i++) out[i] += *low * wide(rounded[i]);
    }
}

/* -- products and their use ---------------------------------------------------------------------------------------- */

typedef struct { /* one thread's memory */
    float *sums;    /* (T, STRIP) */
    float *strip;   /* (STRIP, CHUNK) widened weights */
    void *room;     /* SIDE_ROOM floats, in prompts */
} Own;

/* Sums (T, STRIP) of n_rows outputs from n0 on, in float32, or in bfloat16 where it has instructions of its own: of n
 * inputs from k0 on, added to those of inputs before. */
static void multiply_wide(const Linear *linear, int n0, int n_rows, const Inputs *inputs, int T, int k0, int n,
                          const Own *own, float *sums) {
    const size_t K = linear->n_in, bytes = number_bytes(linear->format);
    const char *rows = (const char *)linear->weight + (n0 * K + k0) * bytes;
    const void *x = inputs->kind == AS_THEY_ARE ? (const void *)(inputs->plain + k0) : inputs->dense + k0;
#ifdef ROWS_SIDE_BY_SIDE
    if (inputs->side_by_side && n_rows == STRIP && inputs->kind == ROUNDED) {
        multiply_side_by_side((const void *)rows, K, x, K, T, n, !k0, own->room, sums);
        return;
    }
#endif
    if (T > FEW && !(linear->format == BFLOAT16 && DENSE == BFLOAT16)) {
        /* The same bits. float32 gains too, 1.4 times with AVX-512: rows side by side are read faster from the cache. */
        for (int r = 0; r < n_rows; r++)
            widen_numbers(linear->format, rows + r * K * bytes, n, own->strip + (size_t)r * n);
        multiply_dense(FLOAT32, own->strip, n, n_rows, x, K, T, n, !k0, sums);
    } else {
        multiply_dense(linear->format, rows, K, n_rows, x, K, T, n, !k0, sums);
    }
}

/* Sums (T, STRIP) of n_rows outputs from n0 on. With few tokens memory sets the speed, and a row is read to its end; with
 * many a strip stays in the second-level cache until all of them have met it. */
static void multiply(const Linear *linear, int n0, int n_rows, const Inputs *inputs, int T, const Own *own) {
    const int K = linear->n_in, at_once = T > TOKENS_AT_ONCE || inputs->side_by_side ? n_rows : 4;
    if (inputs->kind == CODED) {
        const Coded coded = {K, inputs->codes, inputs->steps, inputs->totals, inputs->sums32, inputs->sums16};
        multiply_codes(linear, n0, n_rows, &coded, T, own->sums);
        return;
    }
    for (int r = 0; r < n_rows; r += at_once)
        for (int k0 = 0; k0 < K; k0 += CHUNK) {
            const int n = K - k0 < CHUNK ? K - k0 : CHUNK, here = n_rows - r < at_once ? n_rows - r : at_once;
            multiply_wide(linear, n0 + r, here, inputs, T, k0, n, own, own->sums + r);
        }
}

typedef enum { TO_ROWS, TO_RESIDUAL, TO_GELU } Target;

/* GELU of n numbers, in place. Never inlined, so that it rounds in one way for all callers. */
static __attribute__((noinline)) void gelu(float *x, int n) {
    for (int i = 0; i < n; i++) x[i] = gelu_(x[i]);
}

/* All outputs for T tokens, over the threads. TO_ROWS writes token t's to out + t * N; TO_RESIDUAL adds them there.
 * TO_GELU makes them, through GELU, the inputs `next` of another product. */
static void product(const Linear *linear, const Inputs *inputs, Adapted adapted, int T, Target target, float *out,
                    const Inputs *next, Own *own, Worker *worker) {
    const int N = linear->n_out, n_strips = (N + STRIP - 1) / STRIP;
    const int at_once = n_strips / (8 * worker->n) + 1; /* neighbours, as memory is fetched ahead */
    for (int strip = 0, end = 0;; strip++) {
        if (strip == end) strip = take(worker, at_once), end = strip + at_once;
        if (strip >= n_strips) break;
        const int n0 = strip * STRIP, n = N - n0 < STRIP ? N - n0 : STRIP;
        multiply(linear, n0, n, inputs, T, own);
        for (int token = 0; token < T; token++) {
            float *values = own->sums + (size_t)token * STRIP;
            if (linear->bias)
                for (int i = 0; i < n; i++) values[i] += linear->bias[n0 + i];
            if (adapted.n) add_adapted(&adapted, token, N, n0, n, values);
            if (target == TO_GELU) {
                gelu(values, n);
                if (next->kind == AS_THEY_ARE) memcpy(next->plain + (size_t)token * N + n0, values, n * sizeof *values);
                encode(next, token, n0, n, values);
                continue;
            }
            float *to = out + (size_t)token * N + n0;
            if (target == TO_RESIDUAL)
                for (int i = 0; i < n; i++) to[i] += values[i];
            else
                memcpy(to, values, n * sizeof *to);
        }
    }
    end_loop(worker);
    wait_for_all(worker);
}

/* -- attention ----------------------------------------------------------------------------------------------------- */

/* One head of T queries of one row from its t0-th on; which way is up to the model and the kind of step, not to T. */
static int64_t attend_some(const Place *at, int row, int head, int t0, int T) {
#ifdef ROWS_SIDE_BY_SIDE
    if (at->is_prompt && takes_many_queries(at->model, stored_of(at->model, at->step, at->layer, row, 0)))
        return attend_many(at, row, head, t0, T);
#endif
    return attend_head(at, row, head, t0, T);
}

/* Store all new keys and values and attend over them; the results are the inputs `next` of a product. Returns the keys
 * read by this thread. */
static int64_t attend_all(const Place *at, const Inputs *next, Worker *worker) {
    const Model *model = at->model;
    const Step *step = at->step;
    const int H = model->n_heads, G = model->n_kv_heads;
    const int encodes_heads = next->kind != CODED || model->d_head % 32 == 0; /* which are whole groups */
    const int stores_alone = G != H || step->n_tokens > MAX_TOKENS; /* who shares keys waits until all are stored */
    int64_t n_read = 0;
    if (model->clip_qkv > 0 || model->layers[at->layer].q_ln.weight) {
        for (int token = worker->thread; token < step->n_tokens; token += worker->n) prepare_token(at, token);
        wait_for_all(worker);
    }
    if (stores_alone) {
        for (int task = worker->thread; task < step->n_rows * G; task += worker->n) store(at, task / G, task % G);
        wait_for_all(worker);
    }
    /* Turns are counted from the last row's last span to the first, as those see the most keys. */
    int n_spans = 0;
    for (int row = 0; row < step->n_rows; row++) n_spans += (step->row_tokens[row] + SPAN - 1) / SPAN;
    for (int task, row = step->n_rows - 1, before = 0; (task = take(worker, 1)) < n_spans * H;) {
        const int turn = task / H, head = task % H;
        int spans = (step->row_tokens[row] + SPAN - 1) / SPAN;
        while (turn >= before + spans) before += spans, row--, spans = (step->row_tokens[row] + SPAN - 1) / SPAN;
        if (!stores_alone) store(at, row, head);
        const int t0 = (spans - 1 - (turn - before)) * SPAN, left = step->row_tokens[row] - t0;
        const int T = left < SPAN ? left : SPAN;
        n_read += attend_some(at, row, head, t0, T);
        const int D = model->d_head;
        for (int token = at->first[row] + t0; token < at->first[row] + t0 + T && encodes_heads; token++)
            encode(next, token, head * D, D, next->plain + (size_t)token * next->K + head * D);
    }
    end_loop(worker);
    wait_for_all(worker);
    if (encodes_heads) return n_read;
    for (int token = worker->thread; token < step->n_tokens; token += worker->n)
        encode(next, token, 0, next->K, next->plain + (size_t)token * next->K);
    wait_for_all(worker);
    return n_read;
}

/* -- the step ------------------------------------------------------------------------------------------------------ */

typedef struct {
    float *x, *qkv;     /* (T, C) residual stream; (T, ...) */
    Inputs inputs, inner; /* as wide as C, and as the MLP inside */
    atomic_int *queues; /* one for each loop that is shared out, a cache line each */
} Scratch;

/* The floats that a step of T tokens needs. With a block of so many, `out` and `own` get their parts, each on a cache
 * line. */
static size_t carve(const Model *model, size_t T, int is_prompt, int n_threads, float *block, Scratch *out, Own *own) {
    const size_t C = model->d_model, F = model->d_ffn;
    const size_t width = C + 2 * (size_t)model->n_kv_heads * model->d_head;
    const int has_floats = is_float(model->format);
    size_t used = 0;
    float *at = block ? (float *)(((uintptr_t)block + 63) & ~(uintptr_t)63) : NULL;
#define TAKE(name, floats) name = at ? (void *)(at + used) : NULL, used += ((floats) + 15) / 16 * 16
    TAKE(out->x, T * C);
    TAKE(out->qkv, T * width);
    for (int i = 0; i < 2; i++) {
        Inputs *inputs = i ? &out->inner : &out->inputs;
        const size_t K = i ? F : C;
        TAKE(inputs->plain, i && !has_floats ? 0 : T * K);
        TAKE(inputs->dense, has_floats ? 0 : T * K * sizeof(Dense) / sizeof(float) + 1);
        TAKE(inputs->codes, has_floats ? 0 : T * K / 4 + 1);
        TAKE(inputs->steps, has_floats ? 0 : T * K / 32 + 1);
        TAKE(inputs->sums32, has_floats ? 0 : T * K / 32 + 1);
        TAKE(inputs->sums16, has_floats ? 0 : T * K / 16 + 1);
        TAKE(inputs->totals, has_floats ? 0 : T * K / 16 + 1);
    }
    TAKE(out->queues, 16 * ((size_t)model->n_layers * LOOPS_PER_LAYER + 1));
    for (int thread = 0; thread < n_threads; thread++) {
        Own *mine = own ? own + thread : &(Own){0};
        TAKE(mine->sums, T * STRIP);
        TAKE(mine->strip, STRIP * CHUNK);
        TAKE(mine->room, is_prompt ? SIDE_ROOM : 0);
    }
#undef TAKE
    return used + 16;
}

size_t mpt_scratch_floats(const Model *model, int32_t n_tokens, int32_t n_threads) {
    Scratch scratch;
    return carve(model, n_tokens, 0, n_threads, NULL, &scratch, NULL);
}

/* n_panels: of 16 tokens. */
size_t mpt_prompt_scratch_floats(const Model *model, int32_t n_panels, int32_t n_logits, int32_t n_threads,
                                 int32_t is_int8) {
    (void)n_logits, (void)is_int8;
    Scratch scratch;
    return carve(model, (size_t)n_panels * PANEL, 1, n_threads, NULL, &scratch, NULL);
}

static int64_t run_layer(const Model *model, const Step *step, int layer, int is_prompt, const int32_t *first,
                         const int32_t *adapter_of, Scratch *scratch, Own *own, Worker *worker) {
    const Layer *now = model->layers + layer;
    const int T = step->n_tokens;
    Inputs inputs = scratch->inputs, inner = scratch->inner, mixed = scratch->inputs;
    Adapted adapted[N_PROJECTIONS];
    for (int i = 0; i < N_PROJECTIONS; i++) adapted[i] = adapted_at(model, step, adapter_of, T, layer, i);
    normalize_all(scratch->x, now->norm_1, model->eps, &inputs, &now->wqkv, is_prompt, T, NULL, worker);
    multiply_by_a(adapted[WQKV], &inputs, worker);
    product(&now->wqkv, &inputs, adapted[WQKV], T, TO_ROWS, scratch->qkv, NULL, own, worker);
    start(&mixed, &now->out_proj, is_prompt);
    const Place at = {model, step, layer, now->wqkv.n_out, first, scratch->qkv, mixed.plain, is_prompt};
    const int64_t n_read = attend_all(&at, &mixed, worker);
    multiply_by_a(adapted[OUT_PROJ], &mixed, worker);
    product(&now->out_proj, &mixed, adapted[OUT_PROJ], T, TO_RESIDUAL, scratch->x, NULL, own, worker);
    normalize_all(scratch->x, now->norm_2, model->eps, &inputs, &now->up_proj, is_prompt, T, NULL, worker);
    multiply_by_a(adapted[UP_PROJ], &inputs, worker);
    start(&inner, &now->down_proj, is_prompt);
    product(&now->up_proj, &inputs, adapted[UP_PROJ], T, TO_GELU, NULL, &inner, own, worker);
    multiply_by_a(adapted[DOWN_PROJ], &inner, worker);
    product(&now->down_proj, &inner, adapted[DOWN_PROJ], T, TO_RESIDUAL, scratch->x, NULL, own, worker);
    return n_read;
}

typedef struct { /* of one step, for all its threads */
    const Model *model;
    const Step *step;
    int is_prompt;
    const int32_t *first, *adapter_of;
    Scratch scratch;
    Own *own;
    Team team;
    _Atomic int64_t n_read;
} Pass;

static void run_thread(void *context, int thread, int n) {
    Pass *pass = context;
    const Model *model = pass->model;
    const Step *step = pass->step;
    Scratch *scratch = &pass->scratch;
    Worker worker = {&pass->team, scratch->queues, thread, n};
    Own *own = pass->own + thread;
    for (int layer = 0; layer < model->n_layers; layer++)
        pass->n_read += run_layer(model, step, layer, pass->is_prompt, pass->first, pass->adapter_of, scratch, own,
                                  &worker);
    if (!step->n_logits) return;
    Inputs inputs = scratch->inputs;
    normalize_all(scratch->x, model->norm_f, model->eps, &inputs, &model->head, pass->is_prompt, step->n_logits,
                  step->logit_tokens, &worker);
    inputs.side_by_side = 0; /* most prompts want one token's logits, and what they are may not depend on the others' */
    product(&model->head, &inputs, (Adapted){0}, step->n_logits, TO_ROWS, step->logits, NULL, own, &worker);
}

static void run(const Model *model, const Step *step, int is_prompt) {
    const int T = step->n_tokens, C = model->d_model;
    int32_t first[step->n_rows], adapter_of[T];
    Own own[step->n_threads];
    Pass pass = {.model = model, .step = step, .is_prompt = is_prompt, .first = first, .adapter_of = adapter_of,
                 .own = own};
    carve(model, is_prompt ? (T + PANEL - 1) / PANEL * PANEL : T, is_prompt, step->n_threads, step->scratch,
          &pass.scratch, own);
    memset(pass.scratch.queues, 0, 64 * ((size_t)model->n_layers * LOOPS_PER_LAYER + 1));
    memcpy(pass.scratch.x, step->x, (size_t)T * C * sizeof(float));
    place_tokens(step, first, adapter_of);
    on_threads(step->n_threads, run_thread, &pass);
    if (step->keys_read) *step->keys_read += pass.n_read;
}

/* One step: keys and values of all its tokens are stored in their rows, logits are written for those that want them.
 * At most MAX_TOKENS. */
void mpt_step(const Model *model, const Step *step) { run(model, step, 0); }

/* The same for any number of tokens. */
void mpt_prompt(const Model *model, const Step *step) { run(model, step, 1); }

#endif
