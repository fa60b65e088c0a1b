// What the kernels between the products share: loads and stores of either type, threads, and functions for each level.
//
// Each kernel exists twice: by AVX512 in vectors (vector512.h), and as a plain loop for everything else, compiled for
// AVX2, where compilers turn it into vectors, and for the baseline.
#pragma once

#include <cmath>

#include "vector512.h"

namespace finetune {

#define FT_INLINE inline __attribute__((always_inline))

FT_INLINE float load(const float* at) { return *at; }
FT_INLINE float load(const bf16* at) { return from_bf16(*at); }
FT_INLINE void store(float* at, float value) { *at = value; }
FT_INLINE void store(bf16* at, float value) { *at = to_bf16(value); }

// How many parts of at least `least` items to make of a loop, one a thread.
inline int64_t parts_of(int64_t items, int64_t least, int threads) {
  const int64_t most = items / (least > 0 ? least : 1);
  return most < 1 ? 1 : most < threads ? most : threads;
}

// A function NAME<types> over a range of rows that runs NAME_loop<types>, or NAME_avx512<types> where there is AVX512.
#ifdef FT_X86
#define FT_BY_LEVEL(name, Argument)                                                               \
  template <typename... Types>                                                                    \
  FT_TARGET_AVX2 void name##_avx2(const Argument& argument, int64_t first, int64_t last) {        \
    name##_loop<Types...>(argument, first, last);                                                 \
  }                                                                                               \
  template <typename... Types>                                                                    \
  void name(const Argument& argument, int64_t first, int64_t last) {                              \
    if (level() >= AVX512) return name##_avx512<Types...>(argument, first, last);                 \
    if (level() >= AVX2) return name##_avx2<Types...>(argument, first, last);                     \
    name##_loop<Types...>(argument, first, last);                                                 \
  }
#else
#define FT_BY_LEVEL(name, Argument)                                           \
  template <typename... Types>                                                \
  void name(const Argument& argument, int64_t first, int64_t last) {          \
    name##_loop<Types...>(argument, first, last);                             \
  }
#endif

// Runs work(argument, first, last) over `rows`, at least `least` of them a thread.
template <typename Argument>
void over_rows(void (*work)(const Argument&, int64_t, int64_t), const Argument& argument, int64_t rows, int64_t least,
               int threads) {
  const int64_t parts = parts_of(rows, least, threads);
#pragma omp parallel for num_threads(static_cast<int>(parts)) if (parts > 1)
  for (int64_t part = 0; part < parts; ++part) work(argument, rows * part / parts, rows * (part + 1) / parts);
}

}  // namespace finetune
