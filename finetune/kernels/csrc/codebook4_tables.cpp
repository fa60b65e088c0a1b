// The values of a block by code: the codebook's 16 entries times absmax, rounded to 16 bits once for the whole block.
#include "codebook4.h"
#include "half.h"

namespace finetune {
namespace {

void scale_tables_scalar(const float* table, const float* scales, int blocks, DType dtype, Table* tables) {
  for (int b = 0; b < blocks; ++b)
    for (int c = 0; c < 16; ++c) {
      float value = table[c] * scales[b];
      tables[b][c] = dtype == BF16 ? to_bf16(value) : to_f16(value);
    }
}

#ifdef FT_X86

FT_TARGET_AVX2 void scale_tables_avx2(const float* table, const float* scales, int blocks, DType dtype,
                                      Table* tables) {
  if (dtype == BF16) return scale_tables_scalar(table, scales, blocks, dtype, tables);
  __m256 low = _mm256_loadu_ps(table), high = _mm256_loadu_ps(table + 8);
  for (int b = 0; b < blocks; ++b) {
    __m256 scale = _mm256_set1_ps(scales[b]);
    __m128i* to = reinterpret_cast<__m128i*>(tables[b]);
    _mm_storeu_si128(to, _mm256_cvtps_ph(_mm256_mul_ps(low, scale), _MM_FROUND_TO_NEAREST_INT));
    _mm_storeu_si128(to + 1, _mm256_cvtps_ph(_mm256_mul_ps(high, scale), _MM_FROUND_TO_NEAREST_INT));
  }
}

FT_TARGET_AVX512 void scale_tables_avx512(const float* table, const float* scales, int blocks, DType dtype,
                                          Table* tables) {
  const __m512 values = _mm512_loadu_ps(table);
  const __m512i half = _mm512_set1_epi32(0x7fff), one = _mm512_set1_epi32(1), quiet = _mm512_set1_epi32(0x7fc00000);
  for (int b = 0; b < blocks; ++b) {
    __m512 scaled = _mm512_mul_ps(values, _mm512_set1_ps(scales[b]));
    __m256i* to = reinterpret_cast<__m256i*>(tables[b]);
    if (dtype == F16) {
      _mm256_storeu_si256(to, _mm512_cvtps_ph(scaled, _MM_FROUND_TO_NEAREST_INT));
      continue;
    }
    __m512i bits = _mm512_castps_si512(scaled);
    __m512i last = _mm512_and_si512(_mm512_srli_epi32(bits, 16), one);
    __m512i rounded = _mm512_add_epi32(_mm512_add_epi32(bits, half), last);
    rounded = _mm512_mask_mov_epi32(rounded, _mm512_cmp_ps_mask(scaled, scaled, _CMP_UNORD_Q), quiet);
    _mm256_storeu_si256(to, _mm512_cvtepi32_epi16(_mm512_srli_epi32(rounded, 16)));
  }
}

// One instruction rounds two blocks, but takes subnormals for zero: the smallest entry but 0 of either codebook is
// above 2^-8 of the largest, so that scales above 2^-110 have none. (A zero or non-finite scale is served either way.)
FT_TARGET_AVX512_BF16 void scale_tables_bf16(const float* table, const float* scales, int blocks, DType dtype,
                                             Table* tables) {
  if (dtype == F16) return scale_tables_avx512(table, scales, blocks, dtype, tables);
  const __m512 values = _mm512_loadu_ps(table);
  for (int b = 0; b < blocks; b += 16) {
    __mmask16 used = static_cast<__mmask16>(blocks - b >= 16 ? 0xffff : (1 << (blocks - b)) - 1);
    __m512 group = _mm512_maskz_loadu_ps(used, scales + b);
    __m512 magnitude = _mm512_abs_ps(group);
    if (_mm512_mask_cmp_ps_mask(used, magnitude, _mm512_set1_ps(0x1p-110f), _CMP_LT_OQ) &
        _mm512_cmp_ps_mask(magnitude, _mm512_setzero_ps(), _CMP_NEQ_UQ))
      return scale_tables_avx512(table, scales, blocks, dtype, tables);
  }
  int b = 0;
  for (; b + 2 <= blocks; b += 2) {
    __m512 first = _mm512_mul_ps(values, _mm512_set1_ps(scales[b]));
    __m512 second = _mm512_mul_ps(values, _mm512_set1_ps(scales[b + 1]));
    __m512bh both = _mm512_cvtne2ps_pbh(second, first);
    std::memcpy(tables[b], &both, 64);
  }
  if (b < blocks) {
    __m256bh one = _mm512_cvtneps_pbh(_mm512_mul_ps(values, _mm512_set1_ps(scales[b])));
    std::memcpy(tables[b], &one, 32);
  }
}

// Under double quantization; a group of 16 blocks has one nested absmax, or two.
FT_TARGET_AVX512 void block_scales_avx512(const Codebook4& weight, int64_t first, int64_t count, float* room) {
  const uint8_t* codes = static_cast<const uint8_t*>(weight.absmax) + first;
  const __m512 offset = _mm512_set1_ps(weight.offset);
  for (int64_t b = 0; b < count; b += 16) {
    int64_t left = count - b, here = 256 - ((first + b) & 255);  // blocks before the next nested absmax
    __mmask16 used = static_cast<__mmask16>(left >= 16 ? 0xffff : (1 << left) - 1);
    __mmask16 later = static_cast<__mmask16>(here >= 16 ? 0 : 0xffff << here) & used;
    __m512 nested = _mm512_set1_ps(weight.nested[(first + b) >> 8]);
    if (later) nested = _mm512_mask_mov_ps(nested, later, _mm512_set1_ps(weight.nested[((first + b) >> 8) + 1]));
    __m512i index = _mm512_cvtepu8_epi32(_mm_maskz_loadu_epi8(used, codes + b));
    __m512 value = _mm512_mask_i32gather_ps(_mm512_setzero_ps(), used, index, weight.map, 4);
    _mm512_mask_storeu_ps(room + b, used, _mm512_add_ps(_mm512_mul_ps(value, nested), offset));
  }
}

#endif  // FT_X86

}  // namespace

void scale_tables(const float* table, const float* scales, int blocks, DType dtype, Table* tables) {
#ifdef FT_X86
  if (level() >= AVX512_BF16) return scale_tables_bf16(table, scales, blocks, dtype, tables);
  if (level() >= AVX512) return scale_tables_avx512(table, scales, blocks, dtype, tables);
  if (level() >= AVX2) return scale_tables_avx2(table, scales, blocks, dtype, tables);
#endif
  scale_tables_scalar(table, scales, blocks, dtype, tables);
}

const float* block_scales(const Codebook4& weight, int64_t first, int64_t count, float* room) {
  if (!weight.nested) return static_cast<const float*>(weight.absmax) + first;
#ifdef FT_X86
  if (level() >= AVX512) {
    block_scales_avx512(weight, first, count, room);
    return room;
  }
#endif
  for (int64_t b = 0; b < count; ++b) room[b] = weight.scale(first + b);
  return room;
}

}  // namespace finetune
