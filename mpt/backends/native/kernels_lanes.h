/* The compiler's own vectors of eight lanes, which it makes of what the processor has. */
#pragma once
#include <stdint.h>

typedef float Lanes __attribute__((vector_size(32)));
typedef uint32_t Bits __attribute__((vector_size(32)));
typedef int32_t Ints __attribute__((vector_size(32)));
typedef uint16_t Narrow __attribute__((vector_size(16)));

/* The lanes of v in another order. */
#if defined(__clang__)
#define IN_ORDER(v, ...) __builtin_shufflevector(v, v, __VA_ARGS__)
#else
#define IN_ORDER(v, ...) __builtin_shuffle(v, (Ints){__VA_ARGS__})
#endif
