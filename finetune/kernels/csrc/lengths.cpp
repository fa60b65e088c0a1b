// Outputs at learnt lengths, as DoRA takes them: y m / n, and backward the gradients of y and m, in one pass over memory
// each.
//
// Columns are shared out among threads in panels, so that a sum over rows is one thread's and its order does not hang on
// their number. A panel is a kilobyte of bf16 a row, and its sums stay in the first cache.
//
// Shape suffixes: M rows, N outputs.
#include "elementwise.h"

namespace finetune {
namespace {

constexpr int64_t PANEL = 512;
constexpr float SHORTEST = 1e-6f;  // share of a row's length below which it has none

// Lengths wanted and found, and the bias, which keeps its own; it may be null.
struct Lengths {
  const float *magnitude, *norm, *bias;
};

struct Scale {
  int64_t M, N;
  void* y;
  Lengths lengths;
};

struct Gradients {
  int64_t M, N;
  const void *grad, *scaled;
  Lengths lengths;
  void* out;
  float* grad_magnitude;
};

struct Panel {
  int64_t begin, end;
  float excess[PANEL];  // m / n - 1
  float other[PANEL];   // of the bias: what it has too much, or its share of the sums
};

inline Panel panel_of(int64_t panel, int64_t N, const Lengths& lengths) {
  Panel p;
  p.begin = panel * PANEL;
  p.end = p.begin + PANEL < N ? p.begin + PANEL : N;
  for (int64_t n = p.begin; n < p.end; ++n) {
    p.excess[n - p.begin] = (lengths.magnitude[n] - lengths.norm[n]) / lengths.norm[n];
    p.other[n - p.begin] = lengths.bias ? lengths.bias[n] * p.excess[n - p.begin] : 0.0f;
  }
  return p;
}

// What was scaled is found again from the result: sum grad y / n = sum grad (y m / n) / m. A row of length zero has lost
// it, and learns nothing.
inline void finish(const Panel& p, const Lengths& lengths, const float* along, const float* sums, float* out) {
  for (int64_t n = p.begin; n < p.end; ++n) {
    const float m = lengths.magnitude[n], least = SHORTEST * lengths.norm[n];
    const float scaled = lengths.bias ? along[n - p.begin] - lengths.bias[n] * sums[n - p.begin] : along[n - p.begin];
    out[n] = m < least && m > -least ? 0.0f : scaled / m;
  }
}

template <typename T>
FT_INLINE void scale_loop(const Scale& a, int64_t first, int64_t last) {
  for (int64_t panel = first; panel < last; ++panel) {
    const Panel p = panel_of(panel, a.N, a.lengths);
    for (int64_t m = 0; m < a.M; ++m) {
      T* y = static_cast<T*>(a.y) + m * a.N + p.begin;
      for (int64_t n = 0; n < p.end - p.begin; ++n) {
        const float value = load(y + n);
        store(y + n, value + value * p.excess[n] - p.other[n]);
      }
    }
  }
}

template <typename T>
FT_INLINE void gradients_loop(const Gradients& a, int64_t first, int64_t last) {
  for (int64_t panel = first; panel < last; ++panel) {
    const Panel p = panel_of(panel, a.N, a.lengths);
    float along[PANEL] = {}, sums[PANEL] = {};
    for (int64_t m = 0; m < a.M; ++m) {
      const int64_t at = m * a.N + p.begin;
      const T *grad = static_cast<const T*>(a.grad) + at, *scaled = static_cast<const T*>(a.scaled) + at;
      T* out = static_cast<T*>(a.out) + at;
      for (int64_t n = 0; n < p.end - p.begin; ++n) {
        const float g = load(grad + n);
        along[n] += g * load(scaled + n);
        sums[n] += g;
        store(out + n, g + g * p.excess[n]);
      }
    }
    finish(p, a.lengths, along, sums, a.grad_magnitude);
  }
}

#ifdef FT_X86
template <typename T>
FT_TARGET_AVX512 void scale_avx512(const Scale& a, int64_t first, int64_t last) {
  for (int64_t panel = first; panel < last; ++panel) {
    const Panel p = panel_of(panel, a.N, a.lengths);
    for (int64_t m = 0; m < a.M; ++m) {
      T* y = static_cast<T*>(a.y) + m * a.N + p.begin;
      for (int64_t n = 0; n < p.end - p.begin; n += 16) {
        const __mmask16 live = lanes(n, p.end - p.begin);
        const __m512 value = load16(y + n, live);
        const __m512 scaled = _mm512_add_ps(value, _mm512_mul_ps(value, load16(p.excess + n, live)));
        store16(y + n, live, _mm512_sub_ps(scaled, load16(p.other + n, live)));
      }
    }
  }
}

template <typename T>
FT_TARGET_AVX512 void gradients_avx512(const Gradients& a, int64_t first, int64_t last) {
  for (int64_t panel = first; panel < last; ++panel) {
    const Panel p = panel_of(panel, a.N, a.lengths);
    float along[PANEL] = {}, sums[PANEL] = {};
    for (int64_t m = 0; m < a.M; ++m) {
      const int64_t at = m * a.N + p.begin;
      const T *grad = static_cast<const T*>(a.grad) + at, *scaled = static_cast<const T*>(a.scaled) + at;
      T* out = static_cast<T*>(a.out) + at;
      for (int64_t n = 0; n < p.end - p.begin; n += 16) {
        const __mmask16 live = lanes(n, p.end - p.begin);
        const __m512 g = load16(grad + n, live);
        store16(along + n, live, _mm512_fmadd_ps(g, load16(scaled + n, live), load16(along + n, live)));
        if (a.lengths.bias) store16(sums + n, live, _mm512_add_ps(g, load16(sums + n, live)));
        store16(out + n, live, _mm512_add_ps(g, _mm512_mul_ps(g, load16(p.excess + n, live))));
      }
    }
    finish(p, a.lengths, along, sums, a.grad_magnitude);
  }
}
#endif

FT_BY_LEVEL(scale, Scale)
FT_BY_LEVEL(gradients, Gradients)

inline int64_t panels_of(int64_t N) { return (N + PANEL - 1) / PANEL; }

}  // namespace
}  // namespace finetune

// y = y + (y - bias) (magnitude / norm - 1), in place; bias may be null.
FT_API bool ft_scale_outputs(int64_t M, int64_t N, void* y, int32_t dtype, const float* magnitude, const float* norm,
                             const float* bias, int32_t threads) {
  using namespace finetune;
  const Scale argument{M, N, y, {magnitude, norm, bias}};
  over_rows(dtype == F32 ? scale<float> : scale<bf16>, argument, panels_of(N), 1, threads);
  return true;
}

// out = grad magnitude / norm, and grad_magnitude the sum over rows of grad (scaled - bias) / magnitude.
FT_API bool ft_scale_outputs_backward(int64_t M, int64_t N, const void* grad, const void* scaled, int32_t dtype,
                                      const float* magnitude, const float* norm, const float* bias, void* out,
                                      float* grad_magnitude, int32_t threads) {
  using namespace finetune;
  const Gradients argument{M, N, grad, scaled, {magnitude, norm, bias}, out, grad_magnitude};
  over_rows(dtype == F32 ? gradients<float> : gradients<bf16>, argument, panels_of(N), 1, threads);
  return true;
}
