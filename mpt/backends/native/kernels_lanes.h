/* The compiler's own vectors of eight lanes, which it makes of what the processor has. */
#pragma once
#include <stdint.h>

typedef float Lanes __attribute__((vector_size(32)));
typedef uint32_t Bits __attribute__((vector_size(32)));
typedef int32_t Ints __attribute__((vector_size(32)));
typedef uint16_t Narrow __attribute__((vector_size(16)));
