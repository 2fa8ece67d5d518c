/* Products with AVX2 and FMA: plain numbers in the compiler's vectors, codes by AVX-VNNI where there is it. */
#pragma once
#include <immintrin.h>
#include "kernels_lanes.h"

enum { DENSE_ROWS = 4, DENSE_TOKENS = 3 }; /* twelve sums, three inputs and a weight fill the 16 registers */
#define IN_A_REGISTER(lanes) __asm__("" : "+x"(lanes)) /* else gcc loads it anew for each product */

/* 32 products into 8 sums; exact. */
static inline __m256i dot_codes(__m256i c, __m256i v) {
#if defined(__AVXVNNI__)
    return _mm256_dpbusd_avx_epi32(_mm256_setzero_si256(), c, v);
#else
    const __m256i ones = _mm256_set1_epi16(1), four = _mm256_set1_epi8(15);
    const __m256i first = _mm256_madd_epi16(_mm256_maddubs_epi16(_mm256_and_si256(c, four), v), ones);
    const __m256i high_codes = _mm256_and_si256(_mm256_srli_epi16(c, 4), four);
    const __m256i second = _mm256_madd_epi16(_mm256_maddubs_epi16(high_codes, v), ones);
    return _mm256_add_epi32(first, _mm256_slli_epi32(second, 4)); /* of four bits: nothing saturates */
#endif
}

/* See `multiply_groups`. */
static inline Ints dot8(const uint8_t *codes, const int8_t *high, const int8_t *low) {
    const __m256i c = _mm256_loadu_si256((const __m256i *)codes);
    const __m256i of_high = dot_codes(c, _mm256_loadu_si256((const __m256i *)high));
    const __m256i of_low = dot_codes(c, _mm256_loadu_si256((const __m256i *)low));
    return (Ints)_mm256_add_epi32(_mm256_slli_epi32(of_high, 7), of_low);
}

#include "kernels_vectors.h"
