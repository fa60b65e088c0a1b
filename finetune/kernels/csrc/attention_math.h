// Vector arithmetic that the two directions of attention share.
#pragma once

#include <cmath>

#include "vector512.h"

namespace finetune {

// `count` elements of an arena, 64-byte aligned; with a null arena it only counts.
template <typename T>
inline T* take(char** next, int64_t count) {
  char* found = *next;
  *next = reinterpret_cast<char*>((reinterpret_cast<uintptr_t>(found) + count * sizeof(T) + 63) & ~uintptr_t{63});
  return reinterpret_cast<T*>(found);
}

#ifdef FT_X86

// Stands for minus infinity among scores: its exponential is zero, and differences of two of it are no NaN.
constexpr float NEVER = -1e30f;

// Two vectors rounded to bf16, the even one in the low half.
FT_TARGET_AVX512_BF16 inline __attribute__((always_inline)) __m512i halves(__m512 even, __m512 odd) {
  return (__m512i)_mm512_cvtne2ps_pbh(odd, even);
}

// The same as words, the even one's value in the low half of each.
FT_TARGET_AVX512_BF16 inline __attribute__((always_inline)) __m512i words(__m512i even_odd) {
  const __m512i order = _mm512_set_epi16(31, 15, 30, 14, 29, 13, 28, 12, 27, 11, 26, 10, 25, 9, 24, 8, 23, 7, 22, 6, 21,
                                         5, 20, 4, 19, 3, 18, 2, 17, 1, 16, 0);
  return _mm512_permutexvar_epi16(order, even_odd);
}

// The same as two rows of memory.
FT_TARGET_AVX512_BF16 inline __attribute__((always_inline)) void store_halves(__m512i even_odd, bf16* even, bf16* odd) {
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(even), _mm512_castsi512_si256(even_odd));
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(odd), _mm512_extracti64x4_epi64(even_odd, 1));
}

#endif
}  // namespace finetune
