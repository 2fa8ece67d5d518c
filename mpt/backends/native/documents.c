/* Attention within packed documents, forward and backward: what training on a CPU spends most of its time in.
 *
 *   products           small matrices in float32, in registers
 *   packing            numbers of one head of one document, widened, and transposed where products want it
 *   forward, backward  one head of one document
 *   entries            all of them, over the threads
 *
 * Softmax is computed online and the backward pass computes its probabilities again, block by block, from the
 * log-sum-exp of each query (FlashAttention-2, Dao 2023): memory grows with the length, not with its square. All sums
 * are float32, whatever the format. A head of a document is one thread's, whole, so that no bit of a result depends on
 * how many threads there are: a resumed run is equal to the bit.
 *
 * ALiBi makes old keys count less. As |q.k| <= |q| max|k|, no key at distance d or more scores above |q| max|k| scale -
 * slope d. Blocks in which no key weighs more than e^NOTHING of the heaviest one are left out: all keys of 65,536
 * together weigh less there than float32's rounding.
 */
#include "documents.h"

#if AVX512
enum { LANES = 16, ROWS = 8 };
#elif AVX2
enum { LANES = 8, ROWS = 4 };
#else
enum { LANES = 4, ROWS = 4 };
#endif
enum {
    VECTORS = 2,  /* a product's sums in registers: ROWS times so many vectors, which hide the latency of each */
    QUERIES = 32, /* of a block of scores */
    BLOCK = 64,   /* keys of a block; a multiple of QUERIES */
};
static const float NOTHING = -32.0f;

typedef float Vector __attribute__((vector_size(4 * LANES)));

static inline int up_to(int n, int multiple) { return (n + multiple - 1) / multiple * multiple; }

/* -- products ------------------------------------------------------------------------------------------------------ */

/* ROWS rows and n_vectors vectors of c (+)= a b, a constant number; a(i, k) lies at a[i * a_row + k * a_column]. */
static inline __attribute__((always_inline)) void tile(const int n_vectors, const float *a, size_t a_row,
                                                       size_t a_column, const float *b, size_t b_row, int K, float *c,
                                                       size_t c_row, const int adds) {
    Vector s[ROWS][VECTORS] = {0};
    if (adds)
#pragma GCC unroll 8
        for (int r = 0; r < ROWS; r++)
#pragma GCC unroll 2
            for (int v = 0; v < n_vectors; v++) memcpy(&s[r][v], c + r * c_row + v * LANES, sizeof(Vector));
    for (int k = 0; k < K; k++) {
        Vector bs[VECTORS];
#pragma GCC unroll 2
        for (int v = 0; v < n_vectors; v++) memcpy(&bs[v], b + k * b_row + v * LANES, sizeof(Vector));
#pragma GCC unroll 8
        for (int r = 0; r < ROWS; r++) {
            const float x = a[r * a_row + k * a_column];
#pragma GCC unroll 2
            for (int v = 0; v < n_vectors; v++) s[r][v] += x * bs[v];
        }
    }
#pragma GCC unroll 8
    for (int r = 0; r < ROWS; r++)
#pragma GCC unroll 2
        for (int v = 0; v < n_vectors; v++) memcpy(c + r * c_row + v * LANES, &s[r][v], sizeof(Vector));
}

/* c (M, N) (+)= a (M, K) b (K, N); M a multiple of ROWS, N of LANES. */
static inline __attribute__((always_inline)) void product(int M, int N, int K, const float *a, size_t a_row,
                                                          size_t a_column, const float *b, size_t b_row, float *c,
                                                          size_t c_row, const int adds) {
    int n = 0;
    for (; n + VECTORS * LANES <= N; n += VECTORS * LANES)
        for (int m = 0; m < M; m += ROWS)
            tile(VECTORS, a + m * a_row, a_row, a_column, b + n, b_row, K, c + m * c_row + n, c_row, adds);
    for (; n < N; n += LANES)
        for (int m = 0; m < M; m += ROWS)
            tile(1, a + m * a_row, a_row, a_column, b + n, b_row, K, c + m * c_row + n, c_row, adds);
}

/* scores (M, N) = rows (M, D) times columns (D, BLOCK). */
static __attribute__((noinline)) void score(int M, int N, int D, const float *rows, const float *columns, float *scores) {
    product(M, N, D, rows, D, 1, columns, BLOCK, scores, BLOCK, 0);
}

/* sums (M, D) += weights (M, K) times rows (K, D). */
static __attribute__((noinline)) void weigh(int M, int D, int K, const float *weights, const float *rows, float *sums) {
    product(M, D, K, weights, BLOCK, 1, rows, D, sums, D, 1);
}

/* The same with weights (K, M). */
static __attribute__((noinline)) void weigh_turned(int M, int D, int K, const float *weights, const float *rows,
                                                   float *sums) {
    product(M, D, K, weights, 1, BLOCK, rows, D, sums, D, 1);
}

/* -- packing ------------------------------------------------------------------------------------------------------- */

/* Where a head of one position lies. `at`: that position, rows laid end to end. */
static inline char *place(const Documents *call, const Heads *heads, int head, int64_t at) {
    const int64_t row = at / call->row_length, position = at % call->row_length;
    return (char *)heads->numbers
           + (row * heads->row + head * heads->head + position * heads->position) * number_bytes(call->format);
}

/* n positions from `at` on, (n, D) times `factor`, and zeros up to n_all positions. */
static void pack(const Documents *call, const Heads *heads, int head, int64_t at, int n, int n_all, float factor,
                 float *out) {
    const int D = call->d_head;
    const char *from = place(call, heads, head, at);
    const int64_t step = heads->position * number_bytes(call->format);
    for (int i = 0; i < n; i++, from += step, out += D) {
        widen_numbers(call->format, from, D, out);
        for (int d = 0; d < D; d++) out[d] *= factor;
    }
    memset(out, 0, sizeof(float) * (n_all - n) * D);
}

/* The way back. */
static void store(const Documents *call, const Heads *heads, int head, int64_t at, int n, float factor,
                         float *from) {
    const int D = call->d_head;
    char *out = place(call, heads, head, at);
    const int64_t step = heads->position * number_bytes(call->format);
    for (int i = 0; i < n; i++, out += step, from += D) {
        for (int d = 0; d < D; d++) from[d] *= factor;
        narrow_to(call->format, from, D, out);
    }
}

/* (BLOCK, D) to (D, BLOCK), squares of four numbers at a time. */
static void turn(const float *from, int D, float *out) {
    for (int j = 0; j < BLOCK; j += 4)
        for (int d = 0; d < D; d += 4) {
            float square[4][4];
            for (int i = 0; i < 4; i++)
                for (int e = 0; e < 4; e++) square[e][i] = from[(j + i) * D + d + e];
            for (int e = 0; e < 4; e++) memcpy(out + (d + e) * BLOCK + j, square[e], sizeof square[e]);
        }
}

/* The largest |x|^2 of n rows (n, D); NaN where one of them is: nothing is left out then, and damage is not hidden. */
static float largest_square(const float *x, int n, int D) {
    float largest = 0, sum = 0;
    for (int i = 0; i < n; i++) {
        float square = 0;
        for (int d = 0; d < D; d++) square += x[i * D + d] * x[i * D + d];
        largest = square > largest ? square : largest, sum += square;
    }
    return largest + 0 * sum;
}

/* -- scores to weights --------------------------------------------------------------------------------------------- */

/* Add ALiBi's bias to a query's scores with n keys, and hide those from n_seen on. ramp: slope * j of key j. `before`: how
 * many positions before the query the first key is. */
static inline void add_bias(float *scores, int n, int n_seen, const float *ramp, float slope, int64_t before) {
    const float most = slope * before;
    for (int j = 0; j < n; j++) scores[j] += ramp[j] - most;
    for (int j = n_seen; j < n; j++) scores[j] = -1e30f;
}

/* Whether no key of the block from `first` on weighs anything to the queries from q on. bound: the largest |q| |k| scale.
 * least: of all these queries the smallest best score so far, or the smallest log-sum-exp. */
static inline int weighs_nothing(float bound, float slope, int q, int first, float least) {
    return bound - slope * (q - first - BLOCK + 1) - least < NOTHING;
}

/* -- one head of one document -------------------------------------------------------------------------------------- */

typedef struct {
    int64_t at; /* the document's first position, rows laid end to end */
    int n, head;
} Task;

/* Floats that a thread needs: one document's numbers and blocks of them, as `backward` has them, which needs the most.
 * A multiple of a cache line. */
size_t mpt_documents_scratch_floats(int64_t longest, int32_t d_head) {
    const size_t n = (longest + BLOCK) / BLOCK * BLOCK, D = d_head;
    return BLOCK + 3 * n * D + 2 * n + 5 * BLOCK * D + 2 * QUERIES * BLOCK;
}

/* slope * j for each key of a block. */
static void fill_ramp(float slope, float *ramp) {
    for (int j = 0; j < BLOCK; j++) ramp[j] = slope * j;
}

/* One block of scores (rows, n_keys of BLOCK) to weights, relative to the best score of each query so far; what is
 * summed up already shrinks where that rises. Returns the least of the best scores. */
static float soften(float *scores, int rows, int n_keys, int n_columns, const float *ramp, float slope, int64_t before,
                    int D, float *best, float *total, float *acc) {
    float least = 1e30f;
    for (int r = 0; r < rows; r++) {
        float *const weights = scores + r * BLOCK;
        float sum = 0;
        const int64_t own = before + r; /* how many positions the first key is before the query */
        add_bias(weights, n_columns, own + 1 < n_keys ? (int)own + 1 : n_keys, ramp, slope, own);
        const float top = largest_of(weights, n_columns, best[r]);
        if (top > best[r]) {
            const float shrink = exp_(best[r] - top);
            best[r] = top, total[r] *= shrink;
            for (int d = 0; d < D; d++) acc[r * D + d] *= shrink;
        }
        for (int j = 0; j < n_columns; j++) weights[j] = exp_(weights[j] - top), sum += weights[j];
        total[r] += sum;
        least = best[r] < least ? best[r] : least;
    }
    return least;
}

static void forward(const Documents *call, Task task, float *scratch) {
    const int D = call->d_head, n = task.n;
    const float slope = call->slopes ? call->slopes[task.head] : 0;
    float *const ramp = scratch, *const columns = ramp + BLOCK; /* columns: the keys, (blocks, D, BLOCK) */
    float *const values = columns + (size_t)up_to(n, BLOCK) * D, *const queries = values + (size_t)up_to(n, BLOCK) * D;
    float *const acc = queries + QUERIES * D, *const scores = acc + QUERIES * D;
    float best[QUERIES], total[QUERIES], key_square = 0;
    fill_ramp(slope, ramp);
    for (int first = 0; first < n; first += BLOCK) {
        const int n_keys = n - first < BLOCK ? n - first : BLOCK;
        float *const keys = values + (size_t)first * D; /* until the values come */
        pack(call, &call->k, task.head, task.at + first, n_keys, BLOCK, 1, keys);
        const float square = largest_square(keys, n_keys, D);
        key_square = square <= key_square ? key_square : square + 0 * key_square; /* NaN stays */
        turn(keys, D, columns + (size_t)first * D);
        pack(call, &call->v, task.head, task.at + first, n_keys, BLOCK, 1, keys);
    }
    for (int q = 0; q < n; q += QUERIES) {
        const int rows = n - q < QUERIES ? n - q : QUERIES, M = up_to(rows, ROWS);
        pack(call, &call->q, task.head, task.at + q, rows, M, call->scale, queries);
        const float bound = sqrtf(largest_square(queries, rows, D) * key_square) * 1.0001f;
        float least = -1e30f;
        memset(acc, 0, sizeof(float) * M * D);
        for (int r = 0; r < rows; r++) best[r] = -1e30f, total[r] = 0;
        for (int first = (q + rows - 1) / BLOCK * BLOCK; first >= 0; first -= BLOCK) {
            const int is_past = first + BLOCK <= q;
            if (is_past && weighs_nothing(bound, slope, q, first, least)) break;
            const int n_keys = is_past ? BLOCK : q + rows - first, n_columns = up_to(n_keys, LANES);
            score(M, n_columns, D, queries, columns + (size_t)first * D, scores);
            least = soften(scores, rows, n_keys, n_columns, ramp, slope, q - first, D, best, total, acc);
            weigh(M, D, n_keys, scores, values + (size_t)first * D, acc);
        }
        float *const lse = call->lse + task.head * call->n_positions + task.at + q;
        for (int r = 0; r < rows; r++) {
            const float factor = 1.0f / total[r];
            for (int d = 0; d < D; d++) acc[r * D + d] *= factor;
            lse[r] = best[r] + logf(total[r]);
        }
        store(call, &call->out, task.head, task.at + q, rows, 1, acc);
    }
}

/* Scores (rows, BLOCK) to probabilities, and the gradients of probabilities to those of scores. */
static void derive(float *scores, float *gradients, int rows, int n_keys, int n_columns, const float *ramp, float slope,
                   int64_t before, const float *lse, const float *delta) {
    for (int r = 0; r < rows; r++) {
        float *const weights = scores + r * BLOCK, *const gradient = gradients + r * BLOCK;
        const int64_t own = before + r;
        const float log_total = lse[r], mean = delta[r];
        add_bias(weights, n_columns, own + 1 < n_keys ? (int)own + 1 : n_keys, ramp, slope, own);
        for (int j = 0; j < n_columns; j++) {
            weights[j] = exp_(weights[j] - log_total);
            gradient[j] = weights[j] * (gradient[j] - mean);
        }
    }
}

/* delta (n): each query's output times its gradient. `out`: memory for a block. */
static void multiply_outputs(const Documents *call, Task task, const float *gradients, float *out, float *delta) {
    const int D = call->d_head;
    for (int q = 0; q < task.n; q += QUERIES) {
        const int rows = task.n - q < QUERIES ? task.n - q : QUERIES;
        pack(call, &call->out, task.head, task.at + q, rows, rows, 1, out);
        for (int r = 0; r < rows; r++) {
            float sum = 0;
            for (int d = 0; d < D; d++) sum += out[r * D + d] * gradients[(size_t)(q + r) * D + d];
            delta[q + r] = sum;
        }
    }
}

static void backward(const Documents *call, Task task, float *scratch) {
    const int D = call->d_head, n = task.n, n_all = up_to(n, QUERIES);
    const float slope = call->slopes ? call->slopes[task.head] : 0;
    const float *const lse = call->lse + task.head * call->n_positions + task.at;
    float *const ramp = scratch, *const queries = ramp + BLOCK, *const gradients = queries + (size_t)n_all * D;
    float *const q_gradient = gradients + (size_t)n_all * D, *const delta = q_gradient + (size_t)n_all * D;
    float *const bounds = delta + n_all; /* of each block of queries two numbers: the largest |q|, the least of lse */
    float *const keys = bounds + n_all, *const key_columns = keys + BLOCK * D, *const columns = key_columns + BLOCK * D;
    float *const k_gradient = columns + BLOCK * D, *const v_gradient = k_gradient + BLOCK * D;
    float *const scores = v_gradient + BLOCK * D, *const score_gradients = scores + QUERIES * BLOCK;
    fill_ramp(slope, ramp);
    pack(call, &call->q, task.head, task.at, n, n_all, call->scale, queries);
    pack(call, &call->out_gradient, task.head, task.at, n, n_all, 1, gradients);
    multiply_outputs(call, task, gradients, keys, delta);
    memset(q_gradient, 0, sizeof(float) * n_all * D);
    for (int q = 0; q < n; q += QUERIES) {
        const int rows = n - q < QUERIES ? n - q : QUERIES;
        float least = lse[q], sum = 0;
        for (int r = 0; r < rows; r++) least = lse[q + r] < least ? lse[q + r] : least, sum += lse[q + r];
        bounds[q] = sqrtf(largest_square(queries + (size_t)q * D, rows, D)) * 1.0001f;
        bounds[q + 1] = least + 0 * sum;
    }
    for (int first = 0; first < n; first += BLOCK) {
        const int n_stored = n - first < BLOCK ? n - first : BLOCK;
        pack(call, &call->v, task.head, task.at + first, n_stored, BLOCK, 1, keys);
        turn(keys, D, columns);
        pack(call, &call->k, task.head, task.at + first, n_stored, BLOCK, 1, keys);
        turn(keys, D, key_columns);
        const float key_size = sqrtf(largest_square(keys, n_stored, D));
        memset(k_gradient, 0, sizeof(float) * 2 * BLOCK * D);
        for (int q = first; q < n; q += QUERIES) {
            const int rows = n - q < QUERIES ? n - q : QUERIES, M = up_to(rows, ROWS), is_past = first + BLOCK <= q;
            if (is_past && weighs_nothing(bounds[q] * key_size, slope, q, first, bounds[q + 1])) continue;
            const int n_keys = is_past ? BLOCK : q + rows - first, n_columns = up_to(n_keys, LANES);
            const float *const some = queries + (size_t)q * D, *const some_gradients = gradients + (size_t)q * D;
            score(M, n_columns, D, some, key_columns, scores);
            score(M, n_columns, D, some_gradients, columns, score_gradients);
            derive(scores, score_gradients, rows, n_keys, n_columns, ramp, slope, q - first, lse + q, delta + q);
            weigh_turned(up_to(n_keys, ROWS), D, rows, scores, some_gradients, v_gradient);
            weigh_turned(up_to(n_keys, ROWS), D, rows, score_gradients, some, k_gradient);
            weigh(M, D, n_keys, score_gradients, keys, q_gradient + (size_t)q * D);
        }
        store(call, &call->k_gradient, task.head, task.at + first, n_stored, 1, k_gradient);
        store(call, &call->v_gradient, task.head, task.at + first, n_stored, 1, v_gradient);
    }
    store(call, &call->q_gradient, task.head, task.at, n, call->scale, q_gradient);
}

/* -- entries ------------------------------------------------------------------------------------------------------- */

typedef struct {
    const Documents *call;
    atomic_llong taken; /* tasks */
    size_t scratch_floats;
    int is_backward;
} Run;

static void clear(const Documents *call, const Heads *heads, Task task) {
    const int64_t step = heads->position * number_bytes(call->format);
    char *at = place(call, heads, task.head, task.at);
    for (int i = 0; i < task.n; i++, at += step) memset(at, 0, (size_t)call->d_head * number_bytes(call->format));
}

static void run(void *context, int thread, int n) {
    Run *const run = context;
    const Documents *const call = run->call;
    float *const scratch = call->scratch + thread * run->scratch_floats;
    (void)n;
    for (int64_t i; (i = atomic_fetch_add(&run->taken, 1)) < call->n_pieces * call->n_heads;) {
        const int64_t *const piece = call->pieces + i / call->n_heads * 2;
        const Task task = {piece[0], (int)llabs(piece[1]), (int)(i % call->n_heads)};
        if (piece[1] > 0) {
            (run->is_backward ? backward : forward)(call, task, scratch);
        } else if (run->is_backward) {
            clear(call, &call->q_gradient, task), clear(call, &call->k_gradient, task), clear(call, &call->v_gradient, task);
        } else {
            clear(call, &call->out, task);
            memset(call->lse + task.head * call->n_positions + task.at, 0, sizeof(float) * task.n);
        }
    }
}

static void run_all(const Documents *call, int is_backward) {
    Run all = {.call = call, .is_backward = is_backward};
    all.scratch_floats = mpt_documents_scratch_floats(call->longest, call->d_head);
    on_threads(call->n_threads, run, &all);
}

/* Fills `out` and `lse`; those of padding are 0. */
void mpt_documents_forward(const Documents *call) { run_all(call, 0); }

/* Fills the gradients of q, k and v; those of padding are 0. */
void mpt_documents_backward(const Documents *call) { run_all(call, 1); }
