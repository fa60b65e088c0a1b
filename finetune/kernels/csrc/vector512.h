// Sixteen floats at a time: loads, stores and the functions that the AVX512 kernels between the products share.
#pragma once

#include "native.h"

#ifdef FT_X86
namespace finetune {

#define FT_VECTOR FT_TARGET_AVX512 inline __attribute__((always_inline))

// The lanes of elements n .. n + 15 that exist among N.
FT_VECTOR __mmask16 lanes(int64_t n, int64_t N) {
  return N - n >= 16 ? static_cast<__mmask16>(0xffff) : static_cast<__mmask16>((1u << (N - n)) - 1);
}

FT_VECTOR __m512 load16(const float* at, __mmask16 lanes) { return _mm512_maskz_loadu_ps(lanes, at); }

FT_VECTOR __m512 load16(const bf16* at, __mmask16 lanes) {
  return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(_mm256_maskz_loadu_epi16(lanes, at)), 16));
}

FT_VECTOR void store16(float* at, __mmask16 lanes, __m512 x) { _mm512_mask_storeu_ps(at, lanes, x); }

// To nearest, ties to even; a NaN stays one.
FT_VECTOR void store16(bf16* at, __mmask16 lanes, __m512 x) {
  const __m512i bits = _mm512_castps_si512(x), high = _mm512_srli_epi32(bits, 16);
  const __m512i odd = _mm512_and_si512(high, _mm512_set1_epi32(1));
  __m512i rounded = _mm512_add_epi32(_mm512_add_epi32(bits, _mm512_set1_epi32(0x7fff)), odd);
  rounded = _mm512_mask_or_epi32(_mm512_srli_epi32(rounded, 16), _mm512_cmp_ps_mask(x, x, _CMP_UNORD_Q), high,
                                 _mm512_set1_epi32(0x40));
  _mm512_mask_cvtepi32_storeu_epi16(at, lanes, rounded);
}

// 2 to the x, exactly 1 at 0, relative error under 3e-7, 0 for what is far below the smallest float. The polynomial is
// the minimax one of degree 5 for 2^f on [-1/2, 1/2] through 1 at 0.
FT_VECTOR __m512 exp2_16(__m512 x) {
  const __m512 whole = _mm512_roundscale_ps(x, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
  const __m512 f = _mm512_sub_ps(x, whole);
  __m512 p = _mm512_set1_ps(1.32647282e-3f);
  p = _mm512_fmadd_ps(p, f, _mm512_set1_ps(9.67151269e-3f));
  p = _mm512_fmadd_ps(p, f, _mm512_set1_ps(5.55073374e-2f));
  p = _mm512_fmadd_ps(p, f, _mm512_set1_ps(2.40222421e-1f));
  p = _mm512_fmadd_ps(p, f, _mm512_set1_ps(6.93146978e-1f));
  p = _mm512_fmadd_ps(p, f, _mm512_set1_ps(1.0f));
  return _mm512_scalef_ps(p, whole);
}

// 1 / x for a normal x: an estimate of 14 bits and a step of Newton's.
FT_VECTOR __m512 inverse16(__m512 x) {
  const __m512 estimate = _mm512_rcp14_ps(x);
  return _mm512_mul_ps(estimate, _mm512_fnmadd_ps(x, estimate, _mm512_set1_ps(2.0f)));
}

// 1 / (1 + e^-x).
FT_VECTOR __m512 sigmoid16(__m512 x) {
  const __m512 power = _mm512_min_ps(_mm512_mul_ps(x, _mm512_set1_ps(-1.44269504f)), _mm512_set1_ps(126.0f));
  return inverse16(_mm512_add_ps(_mm512_set1_ps(1.0f), exp2_16(power)));
}

}  // namespace finetune
#endif
