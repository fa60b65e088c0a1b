// LLM.int8(): rounding the input to int8 by rows, and scaling the int32 product back.
//
// Shape legend: M rows of the input, O out features, I in features. Bit for bit kernels/int8.py.
#include <algorithm>
#include <cmath>

#include "integer.h"

namespace finetune {
namespace {

constexpr float LEVELS = 127.0f;

inline float load(const void* x, DType type, int64_t at) {
  if (type == F32) return static_cast<const float*>(x)[at];
  uint16_t half = static_cast<const uint16_t*>(x)[at];
  return type == BF16 ? from_bf16(half) : from_f16(half);
}

struct Row {
  const void* x;
  DType type;
  int64_t columns;
  float threshold;  // NaN where there is none: nothing is above that
};

// The largest magnitude below the threshold, NaN where there is one; marks the columns of the others.
float measure_scalar(const Row& row, int64_t from, uint8_t* outlier) {
  float most = 0.0f;
  for (int64_t i = from; i < row.columns; ++i) {
    float size = std::fabs(load(row.x, row.type, i));
    if (size >= row.threshold)
      outlier[i] = 1;
    else if (size > most || size != size)
      most = size;
  }
  return most;
}

void round_scalar(const Row& row, int64_t from, float factor, const uint8_t* outlier, int8_t* codes) {
  for (int64_t i = from; i < row.columns; ++i)
    codes[i] = outlier[i] ? 0 : static_cast<int8_t>(std::nearbyint(load(row.x, row.type, i) * factor));
}

#ifdef FT_X86
FT_TARGET_AVX512 inline __m512 load16(const Row& row, int64_t at) {
  if (row.type == F32) return _mm512_loadu_ps(static_cast<const float*>(row.x) + at);
  __m256i half = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(static_cast<const uint16_t*>(row.x) + at));
  if (row.type == F16) return _mm512_cvtph_ps(half);
  return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(half), 16));
}

FT_TARGET_AVX512 float measure_avx512(const Row& row, uint8_t* outlier) {
  const __m512 threshold = _mm512_set1_ps(row.threshold);
  const __m128i one = _mm_set1_epi8(1);
  __m512 most = _mm512_setzero_ps();
  __mmask16 strange = 0;
  int64_t i = 0;
  for (; i + 16 <= row.columns; i += 16) {
    __m512 size = _mm512_abs_ps(load16(row, i));
    __mmask16 far = _mm512_cmp_ps_mask(size, threshold, _CMP_GE_OQ);
    most = _mm512_mask_max_ps(most, static_cast<__mmask16>(~far), most, size);
    strange |= _mm512_cmp_ps_mask(size, size, _CMP_UNORD_Q);
    if (far) _mm_mask_storeu_epi8(outlier + i, far, one);
  }
  float rest = measure_scalar(row, i, outlier);
  return strange ? NAN : !(rest <= _mm512_reduce_max_ps(most)) ? rest : _mm512_reduce_max_ps(most);
}

FT_TARGET_AVX512 void round_avx512(const Row& row, float factor, const uint8_t* outlier, int8_t* codes) {
  const __m512 times = _mm512_set1_ps(factor);
  int64_t i = 0;
  for (; i + 16 <= row.columns; i += 16) {
    __m128i marks = _mm_loadu_si128(reinterpret_cast<const __m128i*>(outlier + i));
    __mmask16 near = _mm_cmpeq_epi8_mask(marks, _mm_setzero_si128());
    __m512i code = _mm512_maskz_cvtps_epi32(near, _mm512_mul_ps(load16(row, i), times));
    _mm_storeu_si128(reinterpret_cast<__m128i*>(codes + i), _mm512_cvtsepi32_epi8(code));
  }
  round_scalar(row, i, factor, outlier, codes);
}
#endif

float measure(const Row& row, uint8_t* outlier) {
#ifdef FT_X86
  if (level() >= AVX512) return measure_avx512(row, outlier);
#endif
  return measure_scalar(row, 0, outlier);
}

void round_row(const Row& row, float factor, const uint8_t* outlier, int8_t* codes) {
#ifdef FT_X86
  if (level() >= AVX512) return round_avx512(row, factor, outlier, codes);
#endif
  round_scalar(row, 0, factor, outlier, codes);
}

// Row m of the result from column `from` on.
struct Scaling {
  const int32_t* product;
  const float *absmax_M, *absmax_O;
  const void *bias, *extra;
  void* y;
  DType type;
  int64_t O;
};

void scale_scalar(const Scaling& job, int64_t m, int64_t from) {
  for (int64_t o = from; o < job.O; ++o) {
    int64_t at = m * job.O + o;
    float scale = job.absmax_M[m] * job.absmax_O[o];
    scale *= 1.0f / (LEVELS * LEVELS);
    float value = static_cast<float>(job.product[at]) * scale;
    if (job.bias) value += load(job.bias, job.type, o);
    if (job.extra) value += load(job.extra, job.type, at);
    if (job.type == F32)
      static_cast<float*>(job.y)[at] = value;
    else
      static_cast<bf16*>(job.y)[at] = to_bf16(value);
  }
}

#ifdef FT_X86
FT_TARGET_AVX512 void scale_avx512(const Scaling& job, int64_t m) {
  const __m512 row = _mm512_set1_ps(job.absmax_M[m]), unit = _mm512_set1_ps(1.0f / (LEVELS * LEVELS));
  int64_t o = 0;
  for (; o + 16 <= job.O; o += 16) {
    int64_t at = m * job.O + o;
    __m512 scale = _mm512_mul_ps(_mm512_mul_ps(row, _mm512_loadu_ps(job.absmax_O + o)), unit);
    __m512 value = _mm512_mul_ps(_mm512_cvtepi32_ps(_mm512_loadu_si512(job.product + at)), scale);
    if (job.bias) value = _mm512_add_ps(value, load16({job.bias, job.type, 0, 0}, o));
    if (job.extra) value = _mm512_add_ps(value, load16({job.extra, job.type, 0, 0}, at));
    if (job.type == F32) {
      _mm512_storeu_ps(static_cast<float*>(job.y) + at, value);
      continue;
    }
    __m512i bits = _mm512_castps_si512(value);
    __m512i odd = _mm512_and_si512(_mm512_srli_epi32(bits, 16), _mm512_set1_epi32(1));
    bits = _mm512_add_epi32(_mm512_add_epi32(bits, _mm512_set1_epi32(0x7fff)), odd);
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(static_cast<bf16*>(job.y) + at),
                        _mm512_cvtepi32_epi16(_mm512_srli_epi32(bits, 16)));
  }
  scale_scalar(job, m, o);
}
#endif

}  // namespace
}  // namespace finetune

// Codes [M, I], absmax [M] and marks of outlier columns [I] (1 or 0) of rows x [M, I] in a DType; threshold 0 knows no
// outliers. Outlier columns get code 0 in every row. Returns how many there are.
FT_API int64_t ft_int8_rows(const void* x, int32_t type, int64_t M, int64_t I, float threshold, int8_t* codes,
                            float* absmax, uint8_t* outlier, int32_t threads) {
  using namespace finetune;
  const int64_t size = type == F32 ? 4 : 2;
  const float limit = threshold > 0.0f ? threshold : NAN;
  std::memset(outlier, 0, static_cast<size_t>(I));
  const bool worth = M * I > 65536;
  // Marks of several threads may meet in one byte, all of them writing 1.
#pragma omp parallel for schedule(static) num_threads(threads) if (worth)
  for (int64_t m = 0; m < M; ++m)
    absmax[m] = measure({static_cast<const char*>(x) + m * I * size, static_cast<DType>(type), I, limit}, outlier);
#pragma omp parallel for schedule(static) num_threads(threads) if (worth)
  for (int64_t m = 0; m < M; ++m)
    round_row({static_cast<const char*>(x) + m * I * size, static_cast<DType>(type), I, limit},
              absmax[m] > 0.0f ? 1.0f / absmax[m] * LEVELS : 0.0f, outlier, codes + m * I);
  int64_t count = 0;
  for (int64_t i = 0; i < I; ++i) count += outlier[i];
  return count;
}

// y[M, O] = product * (absmax_M absmax_O / 127^2) + bias[O] + extra[M, O] in float32, rounded once to the DType (float32
// or bf16) of bias, extra and y; bias and extra may be null.
FT_API void ft_int8_scale(const int32_t* product, const float* absmax_M, const float* absmax_O, const void* bias,
                          const void* extra, void* y, int32_t type, int64_t M, int64_t O, int32_t threads) {
  using namespace finetune;
  Scaling job{product, absmax_M, absmax_O, bias, extra, y, static_cast<DType>(type), O};
#pragma omp parallel for schedule(static) num_threads(threads) if (M * O > 65536)
  for (int64_t m = 0; m < M; ++m) {
#ifdef FT_X86
    if (level() >= AVX512) {
      scale_avx512(job, m);
      continue;
    }
#endif
    scale_scalar(job, m, 0);
  }
}
