// RMSNorm (Zhang and Sennrich 2019, arXiv:1910.07467), forward and backward.
//
// y = x r (w + offset) with r = 1 / sqrt(mean(x^2) + eps), rounded once. The backward: with g' = g (w + offset),
// gx = r g' - x r^3 mean(g' x) and gw = sum over rows of g x r. Shape legend: M rows, N features.
#include "elementwise.h"

namespace finetune {
namespace {

struct Forward {
  int64_t N;
  const void *x, *weight;
  float eps, offset;
  void* out;
  float* inverse_M;
};

struct Backward {
  int64_t M, N, parts;
  const void *grad, *x, *weight;
  const float* inverse_M;
  float offset;
  void* grad_x;
  float* sums;  // of gradients of the weight, a row of N for each part; null where not wanted
};

template <typename X, typename W>
FT_INLINE void forward_loop(const Forward& p, int64_t first, int64_t last) {
  const W* w = static_cast<const W*>(p.weight);
  for (int64_t m = first; m < last; ++m) {
    const X* x = static_cast<const X*>(p.x) + m * p.N;
    X* y = static_cast<X*>(p.out) + m * p.N;
    float sums[8] = {}, sum = 0;  // eight of them, for compilers turn no single sum into vectors
    const int64_t whole = p.N / 8 * 8;
    for (int64_t n = 0; n < whole; n += 8)
      for (int i = 0; i < 8; ++i) sums[i] += load(x + n + i) * load(x + n + i);
    for (int64_t n = whole; n < p.N; ++n) sum += load(x + n) * load(x + n);
    for (float part : sums) sum += part;
    const float inverse = 1.0f / std::sqrt(sum / static_cast<float>(p.N) + p.eps);
    p.inverse_M[m] = inverse;
    for (int64_t n = 0; n < p.N; ++n) store(y + n, load(x + n) * inverse * (load(w + n) + p.offset));
  }
}

// Row m of the backward; `sums` is null or gets the row's part of the weight's gradient.
template <typename X, typename W>
FT_INLINE void backward_row(const Backward& p, int64_t m, float* sums) {
  const W* w = static_cast<const W*>(p.weight);
  const X *x = static_cast<const X*>(p.x) + m * p.N, *g = static_cast<const X*>(p.grad) + m * p.N;
  X* to = static_cast<X*>(p.grad_x) + m * p.N;
  float dots[8] = {}, dot = 0;
  const int64_t whole = p.N / 8 * 8;
  for (int64_t n = 0; n < whole; n += 8)
    for (int i = 0; i < 8; ++i) dots[i] += load(g + n + i) * (load(w + n + i) + p.offset) * load(x + n + i);
  for (int64_t n = whole; n < p.N; ++n) dot += load(g + n) * (load(w + n) + p.offset) * load(x + n);
  for (float part : dots) dot += part;
  const float r = p.inverse_M[m], mean = dot / static_cast<float>(p.N) * r * r;
  for (int64_t n = 0; n < p.N; ++n) store(to + n, r * (load(g + n) * (load(w + n) + p.offset) - load(x + n) * mean));
  if (sums)
    for (int64_t n = 0; n < p.N; ++n) sums[n] += load(g + n) * load(x + n) * r;
}

template <typename X, typename W>
FT_INLINE void backward_loop(const Backward& p, int64_t first, int64_t last) {
  for (int64_t part = first; part < last; ++part)
    for (int64_t m = p.M * part / p.parts; m < p.M * (part + 1) / p.parts; ++m)
      backward_row<X, W>(p, m, p.sums ? p.sums + part * p.N : nullptr);
}

#ifdef FT_X86
template <typename X, typename W>
FT_TARGET_AVX512 void forward_avx512(const Forward& p, int64_t first, int64_t last) {
  const W* w = static_cast<const W*>(p.weight);
  const __m512 offset = _mm512_set1_ps(p.offset);
  for (int64_t m = first; m < last; ++m) {
    const X* x = static_cast<const X*>(p.x) + m * p.N;
    X* y = static_cast<X*>(p.out) + m * p.N;
    __m512 even = _mm512_setzero_ps(), odd = even;
    for (int64_t n = 0; n < p.N; n += 32) {
      const __m512 a = load16(x + n, lanes(n, p.N));
      even = _mm512_fmadd_ps(a, a, even);
      if (n + 16 >= p.N) break;
      const __m512 b = load16(x + n + 16, lanes(n + 16, p.N));
      odd = _mm512_fmadd_ps(b, b, odd);
    }
    const float mean = _mm512_reduce_add_ps(_mm512_add_ps(even, odd)) / static_cast<float>(p.N);
    p.inverse_M[m] = 1.0f / std::sqrt(mean + p.eps);
    const __m512 inverse = _mm512_set1_ps(p.inverse_M[m]);
    for (int64_t n = 0; n < p.N; n += 16) {
      const __mmask16 some = lanes(n, p.N);
      const __m512 weight = _mm512_add_ps(load16(w + n, some), offset);
      store16(y + n, some, _mm512_mul_ps(_mm512_mul_ps(load16(x + n, some), inverse), weight));
    }
  }
}

template <typename X, typename W>
FT_TARGET_AVX512 void backward_row_avx512(const Backward& p, int64_t m, float* sums) {
  const W* w = static_cast<const W*>(p.weight);
  const X *x = static_cast<const X*>(p.x) + m * p.N, *g = static_cast<const X*>(p.grad) + m * p.N;
  X* to = static_cast<X*>(p.grad_x) + m * p.N;
  const __m512 offset = _mm512_set1_ps(p.offset), r = _mm512_set1_ps(p.inverse_M[m]);
  __m512 dot = _mm512_setzero_ps();
  for (int64_t n = 0; n < p.N; n += 16) {
    const __mmask16 some = lanes(n, p.N);
    const __m512 through = _mm512_mul_ps(load16(g + n, some), _mm512_add_ps(load16(w + n, some), offset));
    dot = _mm512_fmadd_ps(through, load16(x + n, some), dot);
  }
  const float inverse = p.inverse_M[m];
  const __m512 mean = _mm512_set1_ps(_mm512_reduce_add_ps(dot) / static_cast<float>(p.N) * inverse * inverse);
  for (int64_t n = 0; n < p.N; n += 16) {
    const __mmask16 some = lanes(n, p.N);
    const __m512 grad = load16(g + n, some), in = load16(x + n, some);
    const __m512 through = _mm512_mul_ps(grad, _mm512_add_ps(load16(w + n, some), offset));
    store16(to + n, some, _mm512_mul_ps(r, _mm512_fnmadd_ps(in, mean, through)));
    if (sums) store16(sums + n, some, _mm512_fmadd_ps(_mm512_mul_ps(grad, in), r, load16(sums + n, some)));
  }
}

template <typename X, typename W>
void backward_avx512(const Backward& p, int64_t first, int64_t last) {
  for (int64_t part = first; part < last; ++part)
    for (int64_t m = p.M * part / p.parts; m < p.M * (part + 1) / p.parts; ++m)
      backward_row_avx512<X, W>(p, m, p.sums ? p.sums + part * p.N : nullptr);
}
#endif

FT_BY_LEVEL(forward, Forward)
FT_BY_LEVEL(backward, Backward)

// Rows that are worth a thread of their own.
int64_t least_rows(int64_t N) { return (1 << 16) / (N + 1) + 1; }

// The function for a pair of types, null where there is none.
template <typename Function>
Function choose(int dtype, int weight_dtype, Function f32, Function bf, Function mixed) {
  if (dtype == F32 && weight_dtype == F32) return f32;
  if (dtype == BF16 && weight_dtype == BF16) return bf;
  return dtype == BF16 && weight_dtype == F32 ? mixed : nullptr;
}

}  // namespace
}  // namespace finetune

// x, y: [M, N] of `dtype` (float32 or bf16); weight: [N] of `weight_dtype` (the same, or float32); inverse: float32
// [M]. Returns false, nothing written, for other types.
FT_API bool ft_rms_norm(int64_t M, int64_t N, const void* x, int dtype, const void* weight, int weight_dtype, float eps,
                        float offset, void* y, float* inverse, int threads) {
  using namespace finetune;
  const auto work = choose(dtype, weight_dtype, forward<float, float>, forward<bf16, bf16>, forward<bf16, float>);
  if (!work) return false;
  over_rows(work, Forward{N, x, weight, eps, offset, y, inverse}, M, least_rows(N), threads);
  return true;
}

// grad, grad_x: [M, N] of `dtype`; inverse: of the forward; grad_weight: float32 [N] or null. The partial sums depend
// on the number of threads alone, so that the same run gives the same bits.
FT_API bool ft_rms_norm_backward(int64_t M, int64_t N, const void* grad, const void* x, int dtype, const void* weight,
                                 int weight_dtype, const float* inverse, float offset, void* grad_x, float* grad_weight,
                                 int threads) {
  using namespace finetune;
  const auto work = choose(dtype, weight_dtype, backward<float, float>, backward<bf16, bf16>, backward<bf16, float>);
  if (!work) return false;
  const int64_t parts = parts_of(M, least_rows(N), threads);
  float* sums = nullptr;
  if (grad_weight) {
    sums = static_cast<float*>(scratch(SLOT_EXTRA, parts * N * sizeof(float)));
    if (!sums) return false;
    std::memset(sums, 0, parts * N * sizeof(float));
  }
  over_rows(work, Backward{M, N, parts, grad, x, weight, inverse, offset, grad_x, sums}, parts, 1, threads);
  if (!grad_weight) return true;
  std::memcpy(grad_weight, sums, N * sizeof(float));
  for (int64_t part = 1; part < parts; ++part)
    for (int64_t n = 0; n < N; ++n) grad_weight[n] += sums[part * N + n];
  return true;
}
