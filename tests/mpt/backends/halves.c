/* float16 as common.h rounds and widens it, for tests. In: n (int32) and n float32 numbers. Out: them in float16, then
 * all 65,536 float16 numbers in float32. */
#include "common.h"
#include <stdio.h>

int main(void) {
    int32_t n;
    if (fread(&n, sizeof n, 1, stdin) != 1) return 1;
    float *given = malloc(n * sizeof *given), *wide_ = malloc(65536 * sizeof *wide_);
    fp16 *found = malloc(n * sizeof *found), *all = malloc(65536 * sizeof *all);
    if (fread(given, sizeof *given, n, stdin) != (size_t)n) return 1;
    narrow_to(FLOAT16, given, n, found);
    for (int i = 0; i < 65536; i++) all[i] = (fp16)i;
    widen_halves(all, 65535, wide_); /* an odd number: the last ones fill no vector */
    widen_halves(all + 65535, 1, wide_ + 65535);
    return fwrite(found, sizeof *found, n, stdout) != (size_t)n || fwrite(wide_, sizeof *wide_, 65536, stdout) != 65536;
}
