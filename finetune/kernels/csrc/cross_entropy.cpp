// Cross entropy of a chunk of logits, and its gradient in the place of the logits.
//
// One body is written in plain loops and compiled once for each instruction set: the compiler makes vectors of it where
// the wrapper has them. The logits of a row, then their exponentials, wait in scratch memory for what is known at
// the row's end; they stay in the second-level cache meanwhile.
//
// Shape suffixes: C rows of the chunk, V vocabulary.
#include <cmath>

#include "native.h"

#ifdef __GNUC__
// Without the first, a comparison counts as a side effect, and gcc makes no vectors of a loop that has one.
#pragma GCC optimize("no-trapping-math", "fp-contract=fast")
#endif

namespace finetune {
namespace {

#define FT_INLINE inline __attribute__((always_inline))

FT_INLINE float bits_to_float(int32_t bits) {
  float value;
  std::memcpy(&value, &bits, 4);
  return value;
}

FT_INLINE int32_t float_to_bits(float value) {
  int32_t bits;
  std::memcpy(&bits, &value, 4);
  return bits;
}

FT_INLINE float load(const float* z) { return *z; }
FT_INLINE float load(const bf16* z) { return bits_to_float(static_cast<int32_t>(static_cast<uint32_t>(*z) << 16)); }
FT_INLINE void store(float* z, float value) { *z = value; }
FT_INLINE void store(bf16* z, float value) {
  uint32_t bits = static_cast<uint32_t>(float_to_bits(value));
  uint32_t rounded = bits + 0x7fffu + ((bits >> 16) & 1u);
  *z = static_cast<bf16>((value == value ? rounded : bits | 0x400000u) >> 16);
}

// exp(x) for x <= 0, to 2e-7; below -87 that of -87, which is 1e-38. A NaN stays one.
// x = n ln 2 + r with |r| <= ln 2 / 2, and Taylor's polynomial of the sixth degree; adding 1.5 * 2^23 rounds to n.
FT_INLINE float exponential(float x) {
  constexpr float ROUND = 12582912.0f, LOG2_E = 1.44269504f, LN2_HIGH = 0.693359375f, LN2_LOW = -2.12194440e-4f;
  x = x < -87.0f ? -87.0f : x;
  float shifted = x * LOG2_E + ROUND;
  float n = shifted - ROUND;
  float r = x - n * LN2_HIGH - n * LN2_LOW;
  float p = 1.0f / 720;
  p = p * r + 1.0f / 120;
  p = p * r + 1.0f / 24;
  p = p * r + 1.0f / 6;
  p = p * r + 0.5f;
  p = p * r + 1.0f;
  p = p * r + 1.0f;
  return p * bits_to_float(static_cast<int32_t>(static_cast<uint32_t>(float_to_bits(shifted)) << 23) + 0x3f800000);
}

// c tanh(x / c), by exp of what is not positive.
FT_INLINE float capped(float x, float cap) {
  float u = x / cap;
  float decay = exponential(-2.0f * __builtin_fabsf(u));
  float magnitude = cap * (1.0f - decay) / (1.0f + decay);
  return __builtin_copysignf(magnitude, u);
}

// The derivative of `capped` where it gave l.
FT_INLINE float slope_of(float l, float cap) { return 1.0f - (l / cap) * (l / cap); }

template <bool CAP>
FT_INLINE float logit(float z, float scale, float cap) {
  return CAP ? capped(z * scale, cap) : z * scale;
}

// The loss; with `gradient` its derivative replaces z_V. kept_V is scratch: first the logits, then their exponentials.
template <typename T, bool CAP>
FT_INLINE float row_body(T* z_V, int64_t V, int64_t label, float scale, float cap, bool gradient, float* kept_V) {
  float high = -INFINITY, sum = 0.0f;
#pragma omp simd reduction(max : high)
  for (int64_t v = 0; v < V; ++v) {
    float l = logit<CAP>(load(z_V + v), scale, cap);
    kept_V[v] = l;
    high = l > high ? l : high;
  }
  float own = kept_V[label];
#pragma omp simd reduction(+ : sum)
  for (int64_t v = 0; v < V; ++v) {
    float e = exponential(kept_V[v] - high);
    kept_V[v] = e;
    sum += e;
  }
  if (gradient) {
    float share = scale / sum;
    kept_V[label] -= sum;
#pragma omp simd
    for (int64_t v = 0; v < V; ++v) {
      float slope = CAP ? slope_of(logit<CAP>(load(z_V + v), scale, cap), cap) * share : share;
      store(z_V + v, kept_V[v] * slope);
    }
  }
  return std::log(sum) + high - own;
}

struct Work {
  void* z_CV;
  const int64_t* labels_C;
  int64_t V;
  float scale, cap;
  bool gradient;
  float* losses_C;
};

template <typename T>
FT_INLINE void one_row(const Work& work, int64_t row) {
  T* z_V = static_cast<T*>(work.z_CV) + row * work.V;
  int64_t label = work.labels_C[row];
  float* kept_V = static_cast<float*>(scratch(SLOT_EXTRA, work.V * sizeof(float)));
  if (!kept_V)  // memory ran out: a loss that is not finite is never learnt from
    work.losses_C[row] = NAN;
  else if (work.cap > 0)
    work.losses_C[row] = row_body<T, true>(z_V, work.V, label, work.scale, work.cap, work.gradient, kept_V);
  else
    work.losses_C[row] = row_body<T, false>(z_V, work.V, label, work.scale, work.cap, work.gradient, kept_V);
}

void scalar_f32(const Work& work, int64_t row) { one_row<float>(work, row); }
void scalar_bf16(const Work& work, int64_t row) { one_row<bf16>(work, row); }
#ifdef FT_X86
FT_TARGET_AVX2 void avx2_f32(const Work& work, int64_t row) { one_row<float>(work, row); }
FT_TARGET_AVX2 void avx2_bf16(const Work& work, int64_t row) { one_row<bf16>(work, row); }
FT_TARGET_AVX512 void avx512_f32(const Work& work, int64_t row) { one_row<float>(work, row); }
FT_TARGET_AVX512 void avx512_bf16(const Work& work, int64_t row) { one_row<bf16>(work, row); }
#endif

using RowFunction = void (*)(const Work&, int64_t);

RowFunction choose(bool half) {
#ifdef FT_X86
  if (level() >= AVX512) return half ? avx512_bf16 : avx512_f32;
  if (level() >= AVX2) return half ? avx2_bf16 : avx2_f32;
#endif
  return half ? scalar_bf16 : scalar_f32;
}

}  // namespace
}  // namespace finetune

// losses[c] = logsumexp(l) - l[label] with l = cap tanh(scale z / cap), or scale z where cap is 0; with `gradient` the
// derivative with respect to z replaces z_CV. Returns the first row whose label is none of the V, before anything is
// written, or -1. dtype is F32 or BF16.
FT_API int64_t ft_cross_entropy(int32_t dtype, void* z_CV, const int64_t* labels_C, int64_t C, int64_t V, float scale,
                                float cap, int32_t gradient, float* losses_C, int32_t threads) {
  for (int64_t c = 0; c < C; ++c)
    if (labels_C[c] < 0 || labels_C[c] >= V) return c;
  finetune::Work work{z_CV, labels_C, V, scale, cap, gradient != 0, losses_C};
  finetune::RowFunction row = finetune::choose(dtype == finetune::BF16);
#pragma omp parallel for num_threads(threads) schedule(static)
  for (int64_t c = 0; c < C; ++c) row(work, c);
  return -1;
}
