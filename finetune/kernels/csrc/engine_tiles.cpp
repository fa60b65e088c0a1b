// Laying out operands for the engines' blocks, and writing their results: see engine_tiles.h.
#include "engine_tiles.h"

#ifdef FT_X86
namespace finetune {
namespace {

FT_TARGET_AVX512_BF16 inline __mmask32 first_words(int64_t count) {
  return count >= 32 ? 0xffffffffu : count <= 0 ? 0u : (1u << count) - 1u;
}

// A 16x16 matrix of 32-bit elements, transposed in registers.
FT_TARGET_AVX512_BF16 inline __attribute__((always_inline)) void transpose(__m512i (&row)[16]) {
  __m512i t[16];
#pragma GCC unroll 8
  for (int i = 0; i < 8; ++i) {
    t[2 * i] = _mm512_unpacklo_epi32(row[2 * i], row[2 * i + 1]);
    t[2 * i + 1] = _mm512_unpackhi_epi32(row[2 * i], row[2 * i + 1]);
  }
#pragma GCC unroll 4
  for (int i = 0; i < 16; i += 4) {
    row[i] = _mm512_unpacklo_epi64(t[i], t[i + 2]);
    row[i + 1] = _mm512_unpackhi_epi64(t[i], t[i + 2]);
    row[i + 2] = _mm512_unpacklo_epi64(t[i + 1], t[i + 3]);
    row[i + 3] = _mm512_unpackhi_epi64(t[i + 1], t[i + 3]);
  }
#pragma GCC unroll 4
  for (int j = 0; j < 4; ++j) {  // row[4 i + j] has columns j, 4 + j, 8 + j, 12 + j of rows 4 i .. 4 i + 3
    t[j] = _mm512_shuffle_i32x4(row[j], row[4 + j], 0x88);
    t[4 + j] = _mm512_shuffle_i32x4(row[j], row[4 + j], 0xdd);
    t[8 + j] = _mm512_shuffle_i32x4(row[8 + j], row[12 + j], 0x88);
    t[12 + j] = _mm512_shuffle_i32x4(row[8 + j], row[12 + j], 0xdd);
  }
#pragma GCC unroll 4
  for (int j = 0; j < 4; ++j) {
    row[j] = _mm512_shuffle_i32x4(t[j], t[8 + j], 0x88);
    row[4 + j] = _mm512_shuffle_i32x4(t[4 + j], t[12 + j], 0x88);
    row[8 + j] = _mm512_shuffle_i32x4(t[j], t[8 + j], 0xdd);
    row[12 + j] = _mm512_shuffle_i32x4(t[4 + j], t[12 + j], 0xdd);
  }
}

FT_TARGET_AVX512_BF16 inline __m512 widened(const bf16* values, __mmask16 mask) {
  __m512i words = _mm512_cvtepu16_epi32(_mm256_maskz_loadu_epi16(mask, values));
  return _mm512_castsi512_ps(_mm512_slli_epi32(words, 16));
}

FT_TARGET_AVX512_BF16 inline __m512i narrowed(__m512 low, __m512 high) {
  return reinterpret_cast<__m512i>(_mm512_cvtne2ps_pbh(high, low));
}

}  // namespace

size_t packed_bytes(int64_t M, int64_t K) {
  return static_cast<size_t>(ceil_div(M, TILE) * ceil_div(K, DEPTH) * CELLS) * sizeof(bf16);
}

FT_TARGET_AVX512_BF16 void pack_columns(const bf16* rows, int64_t M, int64_t K, int64_t strip, bf16* packed) {
  int64_t tiles = strip_tiles(strip, M);
  for (int64_t k = 0; k < K; k += DEPTH) {
    __mmask32 mask = first_words(K - k);
    for (int64_t tile = 0; tile < tiles; ++tile, packed += CELLS) {
      int64_t first = strip * BLOCK + tile * TILE;
      const bf16* source = rows + first * K + k;
      __m512i lines[16];
#pragma GCC unroll 16
      for (int64_t r = 0; r < TILE; ++r)
        lines[r] = _mm512_maskz_loadu_epi16(first + r < M ? mask : 0, source + r * K);
      transpose(lines);
#pragma GCC unroll 16
      for (int64_t r = 0; r < TILE; ++r) _mm512_store_si512(packed + r * DEPTH, lines[r]);
    }
  }
}

FT_TARGET_AVX512_BF16 void pack_few(const bf16* rows, int64_t M, int64_t K, int64_t height, bf16* packed) {
  for (int64_t k = 0; k < K; k += DEPTH) {
    __mmask32 mask = first_words(K - k);
    for (int64_t r = 0; r < height; ++r, packed += DEPTH)
      _mm512_store_si512(packed, _mm512_maskz_loadu_epi16(r < M ? mask : 0, rows + r * K + k));
  }
}

void pack_rows(const bf16* rows, int64_t M, int64_t K, int64_t strip, bf16* packed) {
  pack_few(rows + strip * BLOCK * K, M - strip * BLOCK, K, strip_tiles(strip, M) * TILE, packed);
}

FT_TARGET_AVX512_BF16 void interleave(const bf16* rows, int64_t stride, int64_t count, int64_t columns, bf16* tiles,
                                      int64_t spacing) {
  for (int64_t column = 0; column < columns; column += BLOCK, tiles += spacing)
    for (int64_t pair = 0; pair < count / 2; ++pair) {
      __m512i even = _mm512_loadu_si512(rows + 2 * pair * stride + column);
      __m512i odd = _mm512_loadu_si512(rows + (2 * pair + 1) * stride + column);
      _mm512_store_si512(tiles + pair * DEPTH, _mm512_unpacklo_epi16(even, odd));
      _mm512_store_si512(tiles + CELLS + pair * DEPTH, _mm512_unpackhi_epi16(even, odd));
    }
}

FT_TARGET_AVX512_BF16 void store_rows(const float* c, int64_t rows, int64_t columns, bf16* out, int64_t stride) {
  // Undoes the order of `interleave`: columns 8 q + j, j < 4, are in the first tile, and the other four in the second.
  const __m512i order = _mm512_set_epi16(31, 30, 29, 28, 15, 14, 13, 12, 27, 26, 25, 24, 11, 10, 9, 8, 23, 22, 21, 20,
                                         7, 6, 5, 4, 19, 18, 17, 16, 3, 2, 1, 0);
  __mmask32 mask = first_words(columns);
  for (int64_t r = 0; r < rows; ++r) {
    __m512i line = narrowed(_mm512_load_ps(c + r * BLOCK), _mm512_load_ps(c + r * BLOCK + TILE));
    _mm512_mask_storeu_epi16(out + r * stride, mask, _mm512_permutexvar_epi16(order, line));
  }
}

FT_TARGET_AVX512_BF16 void store_columns(const float* c, int64_t rows, int64_t columns, const bf16* bias, bf16* out,
                                         int64_t stride) {
  __mmask32 mask = first_words(columns);
  __m512 bias_low = _mm512_setzero_ps(), bias_high = _mm512_setzero_ps();
  if (bias) {
    bias_low = widened(bias, static_cast<__mmask16>(mask));
    bias_high = widened(bias + TILE, static_cast<__mmask16>(mask >> 16));
  }
  for (int64_t first = 0; first < rows; first += TILE) {
    __m512i low[16], high[16];
#pragma GCC unroll 16
    for (int64_t r = 0; r < TILE; ++r) low[r] = _mm512_load_si512(c + r * BLOCK + first);
    transpose(low);
#pragma GCC unroll 16
    for (int64_t r = 0; r < TILE; ++r) high[r] = _mm512_load_si512(c + (TILE + r) * BLOCK + first);
    transpose(high);
    for (int64_t r = 0; r < TILE && first + r < rows; ++r) {
      __m512i line = narrowed(_mm512_add_ps(_mm512_castsi512_ps(low[r]), bias_low),
                              _mm512_add_ps(_mm512_castsi512_ps(high[r]), bias_high));
      _mm512_mask_storeu_epi16(out + (first + r) * stride, mask, line);
    }
  }
}

namespace {

// 16 sums of row m and columns n.. as the scaling wants them in float32.
FT_TARGET_AVX512_BF16 inline __m512 scaled(__m512i sums, const Scaling& scaling, int64_t m, int64_t n, __mmask16 mask) {
  __m512 scale = _mm512_mul_ps(_mm512_set1_ps(scaling.rows[m]), _mm512_maskz_loadu_ps(mask, scaling.columns + n));
  __m512 value = _mm512_mul_ps(_mm512_cvtepi32_ps(sums), _mm512_mul_ps(scale, _mm512_set1_ps(scaling.unit)));
  if (!scaling.bias) return value;
  if (scaling.type == F32)
    return _mm512_add_ps(value, _mm512_maskz_loadu_ps(mask, static_cast<const float*>(scaling.bias) + n));
  return _mm512_add_ps(value, widened(static_cast<const bf16*>(scaling.bias) + n, mask));
}

// 32 sums of row m and columns n.. to where they belong in out[M, N].
FT_TARGET_AVX512_BF16 inline void store_line(__m512i low, __m512i high, const Scaling& scaling, int64_t m, int64_t n,
                                             __mmask32 mask, void* out, int64_t N) {
  __mmask16 first = static_cast<__mmask16>(mask), second = static_cast<__mmask16>(mask >> 16);
  if (scaling.rows) {
    __m512 a = scaled(low, scaling, m, n, first), b = scaled(high, scaling, m, n + TILE, second);
    if (scaling.type == BF16)
      return _mm512_mask_storeu_epi16(static_cast<bf16*>(out) + m * N + n, mask, narrowed(a, b));
    low = _mm512_castps_si512(a);
    high = _mm512_castps_si512(b);
  }
  int32_t* at = static_cast<int32_t*>(out) + m * N + n;
  _mm512_mask_storeu_epi32(at, first, low);
  _mm512_mask_storeu_epi32(at + TILE, second, high);
}

}  // namespace

FT_TARGET_AVX512_BF16 void store_scaled(const int32_t* c, int64_t m, int64_t rows, int64_t n, int64_t columns,
                                        const Scaling& scaling, void* out, int64_t N) {
  __mmask32 mask = first_words(columns);
  for (int64_t first = 0; first < rows; first += TILE) {
    __m512i low[16], high[16];
#pragma GCC unroll 16
    for (int64_t r = 0; r < TILE; ++r) low[r] = _mm512_load_si512(c + r * BLOCK + first);
    transpose(low);
#pragma GCC unroll 16
    for (int64_t r = 0; r < TILE; ++r) high[r] = _mm512_load_si512(c + (TILE + r) * BLOCK + first);
    transpose(high);
    for (int64_t r = 0; r < TILE && first + r < rows; ++r)
      store_line(low[r], high[r], scaling, m + first + r, n, mask, out, N);
  }
}

}  // namespace finetune
#endif
