/* Draws of tokens from rows of logits: what `sample` of mpt/sampling.py gives, where the order of filters is said.
 *
 *   limit_of   where top-k or top-p ends
 *   keep_to    sets to 0 what lies beyond
 *   crossing   the token at which the cumulative distribution passes the row's uniform number
 *   draw       one row: weights, filters, crossing
 *   mpt_draw   all rows, over the threads
 *
 * top-k and top-p keep the first tokens in the order of their logits, equal ones in the order of their ids. Where they
 * end is found without sorting, which takes torch 4 ms for 50,432 probabilities: the tokens are grouped by the leading
 * bits of their logits, each group's weights are added up, and the group in which the end lies is grouped by the bits
 * that follow. A plain draw reads a row once, one with a filter four times. All sums are in double precision: 50,432
 * float32 terms do not add up to 1 closely enough.
 */
#include "common.h"

enum {
    PART = 512,    /* tokens whose weights `crossing` adds up at once */
    LEVELS = 3,    /* a logit's 32 bits in groups of 11, 11 and 10 */
    BINS = 1 << 11
};

/* What a row asks of its draw, each a column of float64 in this order. Python asks for the names, so a new one is added
 * here, where it is used, and in mpt/sampling.py. */
#define WISHES(WISH) WISH(temperature) WISH(top_p) WISH(top_k) WISH(min_p) WISH(uniform)
typedef struct {
#define FIELD(name) double name;
    WISHES(FIELD)
#undef FIELD
} Wish;

const char *mpt_wish_names(void) {
#define NAME(name) #name " "
    return WISHES(NAME);
#undef NAME
}

/* A filter keeps the tokens with a larger key, and of the n_equal tokens that have this key the first n_stay. */
typedef struct {
    uint32_t key;
    int64_t n_equal, n_stay;
} Limit;

/* e^x for x <= 0, relative error 3e-16, without a call so that loops over it become vectors; 0 below -700. */
static inline double exp_double(double given) {
    const double x = given < -700.0 ? -700.0 : given, n = __builtin_rint(x * 1.4426950408889634);
    const double r = __builtin_fma(n, -1.90821492927058770002e-10, __builtin_fma(n, -6.93147180369123816490e-01, x));
    double p = 1.0 / 479001600; /* Taylor's terms; the next is 2e-16 at most, r being within ln(2) / 2 */
    p = p * r + 1.0 / 39916800;
    p = p * r + 1.0 / 3628800;
    p = p * r + 1.0 / 362880;
    p = p * r + 1.0 / 40320;
    p = p * r + 1.0 / 5040;
    p = p * r + 1.0 / 720;
    p = p * r + 1.0 / 120;
    p = p * r + 1.0 / 24;
    p = p * r + 1.0 / 6;
    p = p * r + 1.0 / 2;
    p = p * r + 1.0;
    p = p * r + 1.0;
    const int64_t bits = ((int64_t)n + 1023) << 52;
    double power;
    memcpy(&power, &bits, 8);
    return given < -700.0 ? 0.0 : p * power;
}

/* A logit as an unsigned number; these are in the order of the logits. */
static inline uint32_t key_of(float logit) {
    int32_t bits;
    memcpy(&bits, &logit, 4);
    if (bits == INT32_MIN) bits = 0; /* -0 is 0 */
    return (uint32_t)bits ^ ((uint32_t)(bits >> 31) | 0x80000000u);
}

/* The limit at which the tokens kept first reach `most`: in weight, or in number where `weights` is NULL. At least one
 * token is kept. */
static Limit limit_of(const float *logits, const double *weights, int64_t V, double most) {
    static const int shifts[LEVELS] = {21, 10, 0};
    Limit found = {0};
    double before = 0; /* of all with larger keys */
    for (int level = 0; level < LEVELS; level++) {
        const int shift = shifts[level], n_bins = level == 2 ? 1 << 10 : BINS;
        double mass[BINS] = {0};
        int32_t count[BINS] = {0};
        const int above = level == 0 ? 31 : shifts[level - 1]; /* bits that are known; a shift by 32 is none */
        for (int64_t v = 0; v < V; v++) {
            const uint32_t key = key_of(logits[v]);
            if (level && key >> above != found.key >> above) continue;
            const uint32_t bin = key >> shift & (n_bins - 1);
            mass[bin] += weights ? weights[v] : 1.0;
            count[bin]++;
        }
        int bin = n_bins - 1, lowest = 0;
        while (!count[lowest]) lowest++;
        for (; bin > lowest && (!count[bin] || before + mass[bin] < most); bin--) before += mass[bin];
        found.key |= (uint32_t)bin << shift;
        found.n_equal = count[bin];
    }
    double each = 1.0; /* tokens with the same logit have the same weight */
    for (int64_t v = 0; weights && v < V; v++)
        if (key_of(logits[v]) == found.key) {
            each = weights[v];
            break;
        }
    found.n_stay = 1;
    while (found.n_stay < found.n_equal && before + found.n_stay * each < most) found.n_stay++;
    return found;
}

/* Set the weights of tokens beyond a limit to 0. */
static void keep_to(const float *logits, double *weights, int64_t V, Limit limit) {
    for (int64_t v = 0; v < V; v++) weights[v] = key_of(logits[v]) < limit.key ? 0 : weights[v];
    int64_t n_equal = 0;
    for (int64_t v = 0; v < V && n_equal < limit.n_equal && limit.n_stay < limit.n_equal; v++)
        if (key_of(logits[v]) == limit.key && n_equal++ >= limit.n_stay) weights[v] = 0;
}

/* The first token at which the cumulative sum of the weights is above `uniform` times their total. */
static int64_t crossing(const double *weights, int64_t V, double uniform, double *parts) {
    const int64_t n_parts = (V + PART - 1) / PART;
    double total = 0, before = 0;
    for (int64_t i = 0; i < n_parts; i++) {
        const int64_t end = (i + 1) * PART < V ? (i + 1) * PART : V;
        double sum = 0;
        for (int64_t v = i * PART; v < end; v++) sum += weights[v];
        parts[i] = sum;
        total += sum;
    }
    const double target = uniform * total;
    int64_t i = 0, last = 0;
    while (i < n_parts && before + parts[i] <= target) before += parts[i++];
    for (int64_t v = i * PART; v < V; v++) { /* one part, or a little more by rounding */
        if (weights[v] > 0 && (before += weights[v]) > target) return v;
    }
    for (int64_t v = 0; v < V; v++) /* by rounding, no sum was above: the last token that is kept */
        if (weights[v] > 0) last = v;
    return last;
}

static int64_t draw(const float *logits, int64_t V, const Wish *wish, double *weights, double *parts) {
    const float best = largest_of(logits, V, logits[0]);
    int64_t token = 0;
    if (wish->temperature <= 0) {
        while (logits[token] != best) token++;
        return token;
    }
    const double inverse = 1.0 / wish->temperature, top = best;
    for (int64_t v = 0; v < V; v++) weights[v] = logits[v] == best ? 1.0 : exp_double((logits[v] - top) * inverse);
    if (wish->top_k > 0 && wish->top_k < V)
        keep_to(logits, weights, V, limit_of(logits, NULL, V, wish->top_k));
    if (wish->top_p < 1) {
        double total = 0;
        for (int64_t v = 0; v < V; v++) total += weights[v];
        keep_to(logits, weights, V, limit_of(logits, weights, V, wish->top_p * total));
    }
    if (wish->min_p > 0)
        for (int64_t v = 0; v < V; v++) weights[v] = weights[v] < wish->min_p ? 0 : weights[v];
    return crossing(weights, V, wish->uniform, parts);
}

size_t mpt_draw_scratch_doubles(int64_t V, int32_t n_threads) {
    return ((size_t)V + (V + PART - 1) / PART + 16) * n_threads;
}

typedef struct { /* of one call, for all its threads */
    const float *logits;
    int64_t n_rows, V, *tokens;
    const Wish *wishes;
    double *scratch;
    _Atomic int64_t next;
} Draws;

static void draw_rows(void *context, int thread, int n) {
    (void)n;
    Draws *all = context;
    double *weights = all->scratch + mpt_draw_scratch_doubles(all->V, 1) * thread, *parts = weights + all->V;
    for (int64_t row; (row = all->next++) < all->n_rows;)
        all->tokens[row] = draw(all->logits + row * all->V, all->V, all->wishes + row, weights, parts);
}

/* One token of each row of logits (rows, V); scratch: mpt_draw_scratch_doubles(). */
void mpt_draw(const float *logits, int64_t n_rows, int64_t V, const Wish *wishes, int64_t *tokens, double *scratch,
              int32_t n_threads) {
    Draws all = {.logits = logits, .n_rows = n_rows, .V = V, .tokens = tokens, .wishes = wishes, .scratch = scratch};
    on_threads(n_threads, draw_rows, &all);
}
