/* Products with AVX2 and FMA: plain numbers in the compiler's vectors, codes by AVX-VNNI where there is it. */
#pragma once
#include <immintrin.h>
#include "kernels_lanes.h"

enum { DENSE_ROWS = 4, DENSE_TOKENS = 3 }; /* twelve sums, three inputs and a weight fill the 16 registers */
#define IN_A_REGISTER(lanes) __asm__("" : "+x"(lanes)) /* else gcc loads it anew for each product */

/* See `multiply_groups`. */
static inline Ints dot8(const uint8_t *codes, const int8_t *x) {
    const __m256i c = _mm256_loadu_si256((const __m256i *)codes), xs = _mm256_loadu_si256((const __m256i *)x);
#if AVX2_VNNI
    return (Ints)_mm256_dpbusd_avx_epi32(_mm256_setzero_si256(), c, xs);
#else /* codes are signed here; two products fit into 16 bits, as no input is -128 */
    const __m256i pairs = _mm256_maddubs_epi16(_mm256_abs_epi8(c), _mm256_sign_epi8(xs, c));
    return (Ints)_mm256_madd_epi16(pairs, _mm256_set1_epi16(1));
#endif
}

#include "kernels_vectors.h"
