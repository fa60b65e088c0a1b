// float16 and rounding to the two types of 16 bits, as every decoder needs them.
#pragma once

#include "native.h"

namespace finetune {

inline float from_f16(f16 half) {
  uint32_t sign = static_cast<uint32_t>(half & 0x8000u) << 16, rest = half & 0x7fffu, bits;
  if (rest >= 0x7c00u) {
    bits = sign | 0x7f800000u | (rest & 0x3ffu) << 13;
  } else if (rest >= 0x400u) {
    bits = sign | ((rest << 13) + (112u << 23));
  } else {
    float small = static_cast<float>(rest) * 5.9604644775390625e-8f;  // 2^-24
    std::memcpy(&bits, &small, 4);
    bits |= sign;
  }
  float value;
  std::memcpy(&value, &bits, 4);
  return value;
}

inline f16 to_f16(float value) {
  uint32_t bits;
  std::memcpy(&bits, &value, 4);
  uint32_t sign = bits >> 16 & 0x8000u, size = bits & 0x7fffffffu;
  if (size >= 0x47800000u) return static_cast<f16>(sign | (size > 0x7f800000u ? 0x7e00u : 0x7c00u));  // 2^16, infinity
  if (size < 0x38800000u) {  // below 2^-14: what 0.5 is added to ends in units of 2^-24, rounded to even
    float magnitude;
    std::memcpy(&magnitude, &size, 4);
    magnitude += 0.5f;
    std::memcpy(&size, &magnitude, 4);
    return static_cast<f16>(sign | (size - 0x3f000000u));
  }
  size += 0xfffu + (size >> 13 & 1u);
  return static_cast<f16>(sign | ((size - 0x38000000u) >> 13));
}

// Writes a number to element `at` of an array of that type.
inline void put(float value, DType type, void* out, int64_t at) {
  if (type == F32)
    static_cast<float*>(out)[at] = value;
  else
    static_cast<uint16_t*>(out)[at] = type == BF16 ? to_bf16(value) : to_f16(value);
}

#ifdef FT_X86
// Sixteen finite numbers rounded to BF16 or F16.
FT_TARGET_AVX512 inline __m256i round16(__m512 x, DType type) {
  if (type == F16) return _mm512_cvtps_ph(x, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
  __m512i bits = _mm512_castps_si512(x);
  __m512i odd = _mm512_and_si512(_mm512_srli_epi32(bits, 16), _mm512_set1_epi32(1));
  __m512i sum = _mm512_add_epi32(_mm512_add_epi32(bits, _mm512_set1_epi32(0x7fff)), odd);
  return _mm512_cvtepi32_epi16(_mm512_srli_epi32(sum, 16));
}
#endif

}  // namespace finetune
