// Packing of heads into the operands of block products, and back; see attention.h.
#include "attention.h"

#ifdef FT_X86
namespace finetune {
namespace {

using Square = __m512i[16];

// Transposes 16 x 16 words in registers.
FT_TARGET_AVX512_BF16 inline __attribute__((always_inline)) void transpose(Square& w) {
  Square t;
#pragma GCC unroll 8
  for (int i = 0; i < 16; i += 2) {
    t[i] = _mm512_unpacklo_epi32(w[i], w[i + 1]);
    t[i + 1] = _mm512_unpackhi_epi32(w[i], w[i + 1]);
  }
#pragma GCC unroll 4
  for (int i = 0; i < 16; i += 4) {
    w[i] = _mm512_unpacklo_epi64(t[i], t[i + 2]);
    w[i + 1] = _mm512_unpackhi_epi64(t[i], t[i + 2]);
    w[i + 2] = _mm512_unpacklo_epi64(t[i + 1], t[i + 3]);
    w[i + 3] = _mm512_unpackhi_epi64(t[i + 1], t[i + 3]);
  }
#pragma GCC unroll 4
  for (int i = 0; i < 4; ++i) {
    t[i] = _mm512_shuffle_i32x4(w[i], w[i + 4], 0x88);
    t[i + 4] = _mm512_shuffle_i32x4(w[i], w[i + 4], 0xdd);
    t[i + 8] = _mm512_shuffle_i32x4(w[i + 8], w[i + 12], 0x88);
    t[i + 12] = _mm512_shuffle_i32x4(w[i + 8], w[i + 12], 0xdd);
  }
#pragma GCC unroll 4
  for (int i = 0; i < 4; ++i) {
    w[i] = _mm512_shuffle_i32x4(t[i], t[i + 8], 0x88);
    w[i + 8] = _mm512_shuffle_i32x4(t[i], t[i + 8], 0xdd);
    w[i + 4] = _mm512_shuffle_i32x4(t[i + 4], t[i + 12], 0x88);
    w[i + 12] = _mm512_shuffle_i32x4(t[i + 4], t[i + 12], 0xdd);
  }
}

// A mask of the features f .. f + 31 that exist.
inline uint32_t present(int64_t D, int64_t f) {
  const int64_t left = D - f;
  return left >= 32 ? ~0u : left <= 0 ? 0u : (1u << left) - 1;
}

// 32 features of row r as 16 words, zeros where there is no such row or feature.
FT_TARGET_AVX512_BF16 inline __m512i row_words(const bf16* in, int64_t stride, int64_t rows, int64_t r, int64_t D,
                                               int64_t f) {
  return _mm512_maskz_loadu_epi16(r < rows ? present(D, f) : 0, in + r * stride + f);
}

// Words (feature f + i of row r, the same of row r + 1), as they lie in memory: features across two vectors.
FT_TARGET_AVX512_BF16 inline void pair_rows(__m512i even, __m512i odd, __m512i* low, __m512i* high) {
  const __m512i first = _mm512_set_epi16(47, 15, 46, 14, 45, 13, 44, 12, 43, 11, 42, 10, 41, 9, 40, 8, 39, 7, 38, 6, 37,
                                         5, 36, 4, 35, 3, 34, 2, 33, 1, 32, 0);
  const __m512i second = _mm512_add_epi16(first, _mm512_set1_epi16(16));
  *low = _mm512_permutex2var_epi16(even, first, odd);
  *high = _mm512_permutex2var_epi16(even, second, odd);
}

}  // namespace

FT_TARGET_AVX512_BF16 void pack_rows(const bf16* in, int64_t stride, int64_t rows, int64_t padded_rows, int64_t D,
                                     bf16* out) {
  const int64_t d = (D + 31) / 32 * 32;
  for (int64_t r = 0; r < padded_rows; ++r)
    for (int64_t f = 0; f < d; f += 32) _mm512_storeu_si512(out + r * d + f, row_words(in, stride, rows, r, D, f));
}

FT_TARGET_AVX512_BF16 void pack_transposed(const bf16* in, int64_t stride, int64_t rows, int64_t padded_rows, int64_t D,
                                           bf16* out, int64_t ld) {
  for (int64_t f = 0; f < D; f += 32)
    for (int64_t r = 0; r < padded_rows; r += 32) {
      Square low, high;
      for (int i = 0; i < 16; ++i)
        pair_rows(row_words(in, stride, rows, r + 2 * i, D, f), row_words(in, stride, rows, r + 2 * i + 1, D, f),
                  &low[i], &high[i]);
      transpose(low);
      transpose(high);
      for (int i = 0; i < 16; ++i) {
        _mm512_storeu_si512(out + (f + i) * ld + r, low[i]);
        _mm512_storeu_si512(out + (f + 16 + i) * ld + r, high[i]);
      }
    }
}

FT_TARGET_AVX512_BF16 void pack_feature_pairs(const bf16* in, int64_t stride, int64_t rows, int64_t D, uint32_t* out) {
  for (int64_t f = 0; f < D; f += 32)
    for (int64_t r = 0; r < BLOCK; r += 16) {
      Square words;
      for (int i = 0; i < 16; ++i) words[i] = row_words(in, stride, rows, r + i, D, f);
      transpose(words);
      for (int i = 0; i < 16; ++i) _mm512_storeu_si512(out + (f / 2 + i) * BLOCK + r, words[i]);
    }
}

FT_TARGET_AVX512_BF16 void pack_row_pairs(const bf16* in, int64_t stride, int64_t rows, int64_t D, uint32_t* out) {
  const int64_t d = (D + 31) / 32 * 32;
  for (int64_t r = 0; r < BLOCK; r += 2)
    for (int64_t f = 0; f < d; f += 32) {
      __m512i low, high;
      pair_rows(row_words(in, stride, rows, r, D, f), row_words(in, stride, rows, r + 1, D, f), &low, &high);
      _mm512_storeu_si512(out + r / 2 * d + f, low);
      _mm512_storeu_si512(out + r / 2 * d + f + 16, high);
    }
}

FT_TARGET_AVX512_BF16 void unpack_transposed(const float* in, const float* factor, bf16* out, int64_t stride,
                                             int64_t rows, int64_t D) {
  for (int64_t f = 0; f < D; f += 16)
    for (int64_t r = 0; r < rows; r += 16) {
      Square words;
      const __m512 scale = _mm512_loadu_ps(factor + r);
      for (int i = 0; i < 16; ++i)
        words[i] = _mm512_castps_si512(_mm512_mul_ps(scale, _mm512_loadu_ps(in + (f + i) * BLOCK + r)));
      transpose(words);
      const __mmask16 columns = static_cast<__mmask16>(present(D, f) & 0xffff);
      for (int i = 0; i < 16 && r + i < rows; ++i)
        _mm256_mask_storeu_epi16(out + (r + i) * stride + f, columns,
                                 (__m256i)_mm512_cvtneps_pbh(_mm512_castsi512_ps(words[i])));
    }
}

FT_TARGET_AVX512_BF16 void unpack_rows(const float* in, int64_t d, float factor, bf16* out, int64_t stride,
                                       int64_t rows, int64_t D) {
  const __m512 scale = _mm512_set1_ps(factor);
  for (int64_t r = 0; r < rows; ++r)
    for (int64_t f = 0; f < D; f += 16)
      _mm256_mask_storeu_epi16(out + r * stride + f, static_cast<__mmask16>(present(D, f) & 0xffff),
                               (__m256i)_mm512_cvtneps_pbh(_mm512_mul_ps(scale, _mm512_loadu_ps(in + r * d + f))));
}

}  // namespace finetune
#endif
