// Gated activations: y = act(gate) * up (Shazeer 2020, arXiv:2002.05202), forward and backward, rounded once.
//
// Shape legend: M rows, N features. Rows of gate and up may lie apart (halves of one projection).
#include "elementwise.h"

namespace finetune {
namespace {

struct Rows {
  int64_t N, gate_stride, up_stride;
  const void *gate, *up, *grad;
  void *out, *grad_gate, *grad_up;
};

// The error function to 5e-7 (Abramowitz and Stegun, Handbook of Mathematical Functions, 7.1.26): for x >= 0 it is
// 1 - t (C1 + t (C2 + ...)) e^(-x^2), t = 1 / (1 + P x).
constexpr float P = 0.3275911f;
constexpr float C1 = 0.254829592f, C2 = -0.284496736f, C3 = 1.421413741f, C4 = -1.453152027f, C5 = 1.061405429f;
constexpr float ROOT_HALF = 0.70710678f, BELL = 0.39894228f;   // 1 / sqrt(2), 1 / sqrt(2 pi)
constexpr float TANH_A = 1.5957691f, TANH_B = 0.044715f;       // 2 sqrt(2 / pi); tanh(u) = 2 sigmoid(2 u) - 1

struct Silu {
  static void at(float x, float* value, float* slope) {
    const float s = 1.0f / (1.0f + std::exp(-x));
    *value = x * s;
    *slope = s * (1.0f + x * (1.0f - s));
  }
#ifdef FT_X86
  FT_VECTOR static void at16(__m512 x, __m512* value, __m512* slope) {
    const __m512 one = _mm512_set1_ps(1.0f), s = sigmoid16(x);
    *value = _mm512_mul_ps(x, s);
    *slope = _mm512_mul_ps(s, _mm512_fmadd_ps(x, _mm512_sub_ps(one, s), one));
  }
#endif
};

struct Gelu {
  static void at(float x, float* value, float* slope) {
    const float cdf = 0.5f * (1.0f + std::erf(x * ROOT_HALF));
    *value = x * cdf;
    *slope = cdf + x * BELL * std::exp(-0.5f * x * x);
  }
#ifdef FT_X86
  FT_VECTOR static void at16(__m512 x, __m512* value, __m512* slope) {
    const __m512 one = _mm512_set1_ps(1.0f), half = _mm512_set1_ps(0.5f);
    const __m512 bell = exp2_16(_mm512_mul_ps(_mm512_mul_ps(x, x), _mm512_set1_ps(-0.5f * 1.44269504f)));
    const __m512 size = _mm512_mul_ps(_mm512_abs_ps(x), _mm512_set1_ps(ROOT_HALF));
    const __m512 t = inverse16(_mm512_fmadd_ps(size, _mm512_set1_ps(P), one));
    __m512 p = _mm512_fmadd_ps(t, _mm512_set1_ps(C5), _mm512_set1_ps(C4));
    p = _mm512_fmadd_ps(t, p, _mm512_set1_ps(C3));
    p = _mm512_fmadd_ps(t, p, _mm512_set1_ps(C2));
    p = _mm512_mul_ps(t, _mm512_fmadd_ps(t, p, _mm512_set1_ps(C1)));
    const __m512 above = _mm512_mul_ps(_mm512_mul_ps(half, p), bell);  // 1 - cdf(|x|)
    const __mmask16 negative = _mm512_cmp_ps_mask(x, _mm512_setzero_ps(), _CMP_LT_OQ);
    const __m512 cdf = _mm512_mask_mov_ps(_mm512_sub_ps(one, above), negative, above);
    *value = _mm512_mul_ps(x, cdf);
    *slope = _mm512_fmadd_ps(_mm512_mul_ps(x, _mm512_set1_ps(BELL)), bell, cdf);
  }
#endif
};

struct GeluTanh {
  static void at(float x, float* value, float* slope) {
    const float s = 1.0f / (1.0f + std::exp(-TANH_A * (x + TANH_B * x * x * x)));
    *value = x * s;
    *slope = s + x * s * (1.0f - s) * TANH_A * (1.0f + 3.0f * TANH_B * x * x);
  }
#ifdef FT_X86
  FT_VECTOR static void at16(__m512 x, __m512* value, __m512* slope) {
    const __m512 one = _mm512_set1_ps(1.0f), a = _mm512_set1_ps(TANH_A), square = _mm512_mul_ps(x, x);
    const __m512 inner = _mm512_mul_ps(x, _mm512_fmadd_ps(square, _mm512_set1_ps(TANH_B), one));
    const __m512 s = sigmoid16(_mm512_mul_ps(a, inner));
    const __m512 steep = _mm512_mul_ps(a, _mm512_fmadd_ps(square, _mm512_set1_ps(3.0f * TANH_B), one));
    *value = _mm512_mul_ps(x, s);
    *slope = _mm512_fmadd_ps(_mm512_mul_ps(*value, _mm512_sub_ps(one, s)), steep, s);
  }
#endif
};

template <typename X, typename Activation>
FT_INLINE void forward_loop(const Rows& p, int64_t first, int64_t last) {
  for (int64_t m = first; m < last; ++m) {
    const X* gate = static_cast<const X*>(p.gate) + m * p.gate_stride;
    const X* up = static_cast<const X*>(p.up) + m * p.up_stride;
    X* out = static_cast<X*>(p.out) + m * p.N;
    for (int64_t n = 0; n < p.N; ++n) {
      float value, slope;
      Activation::at(load(gate + n), &value, &slope);
      store(out + n, value * load(up + n));
    }
  }
}

template <typename X, typename Activation>
FT_INLINE void backward_loop(const Rows& p, int64_t first, int64_t last) {
  for (int64_t m = first; m < last; ++m) {
    const X* gate = static_cast<const X*>(p.gate) + m * p.gate_stride;
    const X* up = static_cast<const X*>(p.up) + m * p.up_stride;
    const X* grad = static_cast<const X*>(p.grad) + m * p.N;
    X *grad_gate = static_cast<X*>(p.grad_gate) + m * p.N, *grad_up = static_cast<X*>(p.grad_up) + m * p.N;
    for (int64_t n = 0; n < p.N; ++n) {
      float value, slope;
      Activation::at(load(gate + n), &value, &slope);
      store(grad_gate + n, load(grad + n) * load(up + n) * slope);
      store(grad_up + n, load(grad + n) * value);
    }
  }
}

#ifdef FT_X86
template <typename X, typename Activation>
FT_TARGET_AVX512 void forward_avx512(const Rows& p, int64_t first, int64_t last) {
  for (int64_t m = first; m < last; ++m) {
    const X* gate = static_cast<const X*>(p.gate) + m * p.gate_stride;
    const X* up = static_cast<const X*>(p.up) + m * p.up_stride;
    X* out = static_cast<X*>(p.out) + m * p.N;
    for (int64_t n = 0; n < p.N; n += 16) {
      const __mmask16 some = lanes(n, p.N);
      __m512 value, slope;
      Activation::at16(load16(gate + n, some), &value, &slope);
      store16(out + n, some, _mm512_mul_ps(value, load16(up + n, some)));
    }
  }
}

template <typename X, typename Activation>
FT_TARGET_AVX512 void backward_avx512(const Rows& p, int64_t first, int64_t last) {
  for (int64_t m = first; m < last; ++m) {
    const X* gate = static_cast<const X*>(p.gate) + m * p.gate_stride;
    const X* up = static_cast<const X*>(p.up) + m * p.up_stride;
    const X* grad = static_cast<const X*>(p.grad) + m * p.N;
    X *grad_gate = static_cast<X*>(p.grad_gate) + m * p.N, *grad_up = static_cast<X*>(p.grad_up) + m * p.N;
    for (int64_t n = 0; n < p.N; n += 16) {
      const __mmask16 some = lanes(n, p.N);
      const __m512 g = load16(grad + n, some);
      __m512 value, slope;
      Activation::at16(load16(gate + n, some), &value, &slope);
      store16(grad_gate + n, some, _mm512_mul_ps(_mm512_mul_ps(g, load16(up + n, some)), slope));
      store16(grad_up + n, some, _mm512_mul_ps(g, value));
    }
  }
}
#endif

FT_BY_LEVEL(forward, Rows)
FT_BY_LEVEL(backward, Rows)

// As finetune/kernels/activation.py numbers the activations, float32 and bf16.
using Work = void (*)(const Rows&, int64_t, int64_t);
constexpr int ACTIVATIONS = 3;
const Work FORWARD[ACTIVATIONS][2] = {{forward<float, Silu>, forward<bf16, Silu>},
                                      {forward<float, Gelu>, forward<bf16, Gelu>},
                                      {forward<float, GeluTanh>, forward<bf16, GeluTanh>}};
const Work BACKWARD[ACTIVATIONS][2] = {{backward<float, Silu>, backward<bf16, Silu>},
                                       {backward<float, Gelu>, backward<bf16, Gelu>},
                                       {backward<float, GeluTanh>, backward<bf16, GeluTanh>}};

bool run(const Work table[][2], const Rows& rows, int64_t M, int dtype, int activation, int threads) {
  if (activation < 0 || activation >= ACTIVATIONS || (dtype != F32 && dtype != BF16)) return false;
  over_rows(table[activation][dtype], rows, M, (1 << 14) / (rows.N + 1) + 1, threads);
  return true;
}

}  // namespace
}  // namespace finetune

// out[M, N] = act(gate) * up, of float32 or bf16; rows of gate and up the strides apart. False, nothing written, for
// other types.
FT_API bool ft_act_mul(int64_t M, int64_t N, const void* gate, int64_t gate_stride, const void* up, int64_t up_stride,
                       int dtype, int activation, void* out, int threads) {
  const finetune::Rows rows{N, gate_stride, up_stride, gate, up, nullptr, out, nullptr, nullptr};
  return finetune::run(finetune::FORWARD, rows, M, dtype, activation, threads);
}

// grad_gate, grad_up: [M, N], from grad [M, N].
FT_API bool ft_act_mul_backward(int64_t M, int64_t N, const void* grad, const void* gate, int64_t gate_stride,
                                const void* up, int64_t up_stride, int dtype, int activation, void* grad_gate,
                                void* grad_up, int threads) {
  const finetune::Rows rows{N, gate_stride, up_stride, gate, up, grad, nullptr, grad_gate, grad_up};
  return finetune::run(finetune::BACKWARD, rows, M, dtype, activation, threads);
}
