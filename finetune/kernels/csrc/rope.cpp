// Rotary position embedding (Su et al. 2021, arXiv:2104.09864), halves of a head rotated against each other, and its
// transpose, which is the backward.
//
// Shape legend: B rows, S positions, H heads, D features of a head, R of them rotated (the first; the rest is copied).
#include "elementwise.h"

namespace finetune {
namespace {

struct Problem {
  int64_t S, H, D, R, batch, position, head, table_batch;  // strides in elements; the table's is 0 for one batch row
  const void *x, *cos, *sin;
  void* out;
  bool transposed;
};

// One head's features at one position.
template <typename X>
FT_INLINE void rotate_one(const X* x, const X* cos, const X* sin, int64_t half, bool transposed, X* out) {
  for (int64_t i = 0; i < half; ++i) {
    const float a = load(x + i), c = load(x + half + i), s1 = load(sin + i), s2 = load(sin + half + i);
    store(out + i, a * load(cos + i) + c * (transposed ? s2 : -s1));
    store(out + half + i, c * load(cos + half + i) + a * (transposed ? -s1 : s2));
  }
}

#ifdef FT_X86
template <typename X>
FT_VECTOR void rotate_one_avx512(const X* x, const X* cos, const X* sin, int64_t half, bool transposed, X* out) {
  const __m512i sign = _mm512_set1_epi32(static_cast<int32_t>(0x80000000u));
  for (int64_t i = 0; i < half; i += 16) {
    const __mmask16 some = lanes(i, half);
    const __m512 a = load16(x + i, some), c = load16(x + half + i, some);
    const __m512 s2 = load16(sin + half + i, some);
    const __m512 minus_s1 = _mm512_castsi512_ps(_mm512_xor_si512(_mm512_castps_si512(load16(sin + i, some)), sign));
    const __m512 first = _mm512_fmadd_ps(c, transposed ? s2 : minus_s1, _mm512_mul_ps(a, load16(cos + i, some)));
    const __m512 second =
        _mm512_fmadd_ps(a, transposed ? minus_s1 : s2, _mm512_mul_ps(c, load16(cos + half + i, some)));
    store16(out + i, some, first);
    store16(out + half + i, some, second);
  }
}
#endif

// Rows (batch, position) first .. last, all heads of each.
#define FT_ROTATE_ROWS(one)                                                                       \
  for (int64_t row = first; row < last; ++row) {                                                  \
    const int64_t b = row / p.S, s = row % p.S;                                                   \
    const X *cos = static_cast<const X*>(p.cos) + b * p.table_batch + s * p.R;                    \
    const X *sin = static_cast<const X*>(p.sin) + b * p.table_batch + s * p.R;                    \
    for (int64_t h = 0; h < p.H; ++h) {                                                           \
      const X* x = static_cast<const X*>(p.x) + b * p.batch + s * p.position + h * p.head;        \
      X* out = static_cast<X*>(p.out) + (row * p.H + h) * p.D;                                    \
      one(x, cos, sin, p.R / 2, p.transposed, out);                                               \
      if (p.R < p.D) std::memcpy(out + p.R, x + p.R, (p.D - p.R) * sizeof(X));                    \
    }                                                                                             \
  }

template <typename X>
FT_INLINE void rotate_loop(const Problem& p, int64_t first, int64_t last) {
  FT_ROTATE_ROWS(rotate_one<X>)
}

#ifdef FT_X86
template <typename X>
FT_TARGET_AVX512 void rotate_avx512(const Problem& p, int64_t first, int64_t last) {
  FT_ROTATE_ROWS(rotate_one_avx512<X>)
}
#endif

FT_BY_LEVEL(rotate, Problem)

}  // namespace
}  // namespace finetune

// x [B, S, H, D] by its strides over batch, position and head; cos, sin: [1 or B, S, R] contiguous, of the same type
// (float32 or bf16), `table_batch` elements a row of B; out: contiguous. False, nothing written, for other types.
FT_API bool ft_rope(const int64_t* sizes, const int64_t* strides, int64_t table_batch, const void* x, const void* cos,
                    const void* sin, int dtype, bool transposed, void* out, int threads) {
  using namespace finetune;
  if (dtype != F32 && dtype != BF16) return false;
  const Problem problem{sizes[1],   sizes[2],    sizes[3], sizes[4], strides[0], strides[1],
                        strides[2], table_batch, x,        cos,      sin,        out,
                        transposed};
  const int64_t width = sizes[2] * sizes[3];
  over_rows(dtype == F32 ? rotate<float> : rotate<bf16>, problem, sizes[0] * sizes[1], (1 << 15) / (width + 1) + 1,
            threads);
  return true;
}
