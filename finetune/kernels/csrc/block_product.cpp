// Products of packed bf16 blocks by AMX tiles and by AVX512-BF16 dot products; see block_product.h.
#include "block_product.h"

namespace finetune {
#ifdef FT_X86
namespace {

// ---- AMX: a result of 32 x 32 in four tiles, two tiles of each operand.

struct alignas(64) TileConfig {
  uint8_t palette = 1, start_row = 0, reserved[14] = {};
  uint16_t row_bytes[16] = {64, 64, 64, 64, 64, 64, 64, 64};
  uint8_t rows[16] = {16, 16, 16, 16, 16, 16, 16, 16};
};

FT_TARGET_AMX void tiles_on() {
  static const TileConfig config;
  _tile_loadconfig(&config);
}

FT_TARGET_AMX void tiles_off() { _tile_release(); }

FT_TARGET_AMX void product_amx(int64_t M, int64_t N, int64_t K, const bf16* a, int64_t lda, const uint32_t* b,
                               int64_t ldb, float* c, int64_t ldc, bool add) {
  for (int64_t n = 0; n < N; n += 32) {
    for (int64_t m = 0; m < M; m += 32) {
      float *c0 = c + m * ldc + n, *c1 = c0 + 16 * ldc;
      if (add) {
        _tile_loadd(0, c0, ldc * 4);
        _tile_loadd(1, c0 + 16, ldc * 4);
        _tile_loadd(2, c1, ldc * 4);
        _tile_loadd(3, c1 + 16, ldc * 4);
      } else {
        _tile_zero(0);
        _tile_zero(1);
        _tile_zero(2);
        _tile_zero(3);
      }
      for (int64_t k = 0; k < K; k += 32) {
        const bf16* a0 = a + m * lda + k;
        const uint32_t* b0 = b + k / 2 * ldb + n;
        _tile_loadd(4, a0, lda * 2);
        _tile_loadd(6, b0, ldb * 4);
        _tile_loadd(7, b0 + 16, ldb * 4);
        _tile_loadd(5, a0 + 16 * lda, lda * 2);
        _tile_dpbf16ps(0, 4, 6);
        _tile_dpbf16ps(1, 4, 7);
        _tile_dpbf16ps(2, 5, 6);
        _tile_dpbf16ps(3, 5, 7);
      }
      _tile_stored(0, c0, ldc * 4);
      _tile_stored(1, c0 + 16, ldc * 4);
      _tile_stored(2, c1, ldc * 4);
      _tile_stored(3, c1 + 16, ldc * 4);
    }
  }
}

// ---- AVX512-BF16: a result of ROWS x 16 VECTORS in registers, one operand broadcast a pair at a time.

template <int ROWS, int VECTORS>
FT_TARGET_AVX512_BF16 inline void strip(int64_t K, const bf16* a, int64_t lda, const uint32_t* b, int64_t ldb, float* c,
                                        int64_t ldc, bool add) {
  __m512 sum[ROWS][VECTORS];
#pragma GCC unroll 8
  for (int r = 0; r < ROWS; ++r)
#pragma GCC unroll 4
    for (int v = 0; v < VECTORS; ++v) sum[r][v] = add ? _mm512_loadu_ps(c + r * ldc + 16 * v) : _mm512_setzero_ps();
  for (int64_t k = 0; k < K / 2; ++k) {
    __m512i column[VECTORS];
#pragma GCC unroll 4
    for (int v = 0; v < VECTORS; ++v) column[v] = _mm512_loadu_si512(b + k * ldb + 16 * v);
#pragma GCC unroll 8
    for (int r = 0; r < ROWS; ++r) {
      int32_t pair;
      std::memcpy(&pair, a + r * lda + 2 * k, 4);
      const __m512i both = _mm512_set1_epi32(pair);
#pragma GCC unroll 4
      for (int v = 0; v < VECTORS; ++v) sum[r][v] = _mm512_dpbf16_ps(sum[r][v], (__m512bh)both, (__m512bh)column[v]);
    }
  }
#pragma GCC unroll 8
  for (int r = 0; r < ROWS; ++r)
#pragma GCC unroll 4
    for (int v = 0; v < VECTORS; ++v) _mm512_storeu_ps(c + r * ldc + 16 * v, sum[r][v]);
}

FT_TARGET_AVX512_BF16 void product_avx512(int64_t M, int64_t N, int64_t K, const bf16* a, int64_t lda,
                                          const uint32_t* b, int64_t ldb, float* c, int64_t ldc, bool add) {
  int64_t n = 0;
  for (; n + 64 <= N; n += 64)
    for (int64_t m = 0; m < M; m += 4) strip<4, 4>(K, a + m * lda, lda, b + n, ldb, c + m * ldc + n, ldc, add);
  for (; n < N; n += 32)
    for (int64_t m = 0; m < M; m += 8) strip<8, 2>(K, a + m * lda, lda, b + n, ldb, c + m * ldc + n, ldc, add);
}

}  // namespace

BlockProduct block_product(Level level) {
  if (level >= AMX) return product_amx;
  return level >= AVX512_BF16 ? product_avx512 : nullptr;
}

void begin_blocks(Level level) {
  if (level >= AMX) tiles_on();
}

void end_blocks(Level level) {
  if (level >= AMX) tiles_off();
}

#else

BlockProduct block_product(Level) { return nullptr; }
void begin_blocks(Level) {}
void end_blocks(Level) {}

#endif
}  // namespace finetune
