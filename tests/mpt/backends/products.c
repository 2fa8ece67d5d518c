/* Products of one matrix, for tests: what rows.c computes, read from stdin and written to stdout.
 *
 * In: five int32 (format, outputs N, inputs K, tokens T, whether as a prompt), the matrix as it is stored, N scales and
 * T rows of K in float32. Out: T rows of N float32. */
#include "rows.c"
#include <stdio.h>

static void *filled(size_t n_bytes) {
    void *memory = aligned_alloc(64, (n_bytes + 127) / 64 * 64);
    if (fread(memory, 1, n_bytes, stdin) != n_bytes) exit(1);
    return memory;
}

static void *empty(size_t n_bytes) { return aligned_alloc(64, (n_bytes + 127) / 64 * 64); }

int main(void) {
    int32_t asked[5];
    if (fread(asked, sizeof asked, 1, stdin) != 1) return 1;
    const int N = asked[1], K = asked[2], T = asked[3], is_prompt = asked[4];
    Linear linear = {.n_out = N, .n_in = K, .format = asked[0]};
    linear.weight = filled(N * row_bytes(&linear)), linear.scale = filled(N * sizeof(float));
    Inputs inputs = {.plain = filled((size_t)T * K * 4), .dense = empty((size_t)T * K * sizeof(Dense)),
                     .codes = empty((size_t)T * K), .steps = empty(T * K / 8), .totals = empty(T * K / 4),
                     .sums32 = empty(T * K / 8), .sums16 = empty(T * K / 4)};
    Own own = {.sums = empty(T * STRIP * 4), .strip = empty(STRIP * CHUNK * 4), .room = empty(SIDE_ROOM * 4)};
    atomic_int *queue = calloc(32, sizeof *queue);
    Team team = {0};
    Worker worker = {&team, queue, 0, 1};
    float *out = empty((size_t)T * N * 4);
    start(&inputs, &linear, is_prompt);
    for (int token = 0; token < T; token++) encode(&inputs, token, 0, K, inputs.plain + (size_t)token * K);
    product(&linear, &inputs, (Adapted){0}, T, TO_ROWS, out, NULL, &own, &worker);
    return fwrite(out, 4, (size_t)T * N, stdout) != (size_t)T * N;
}
