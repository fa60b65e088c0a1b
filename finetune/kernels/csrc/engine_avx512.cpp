// A block of a product by VDPBF16PS: up to 12 rows of A by 32 columns of B in registers.
#include "engine_tiles.h"

#ifdef FT_X86
namespace finetune {
namespace {

// The two neighbours in K at `at`, in every lane.
FT_TARGET_AVX512_BF16 inline __attribute__((always_inline)) __m512bh pair_of(const bf16* at) {
  int32_t bits;
  std::memcpy(&bits, at, sizeof(bits));
  return reinterpret_cast<__m512bh>(_mm512_set1_epi32(bits));
}

template <int ROWS, int TILES>
FT_TARGET_AVX512_BF16 void multiply(const Block& block, int64_t row) {
  __m512 sum[ROWS][TILES];
  float* c = block.c + row * BLOCK;
#pragma GCC unroll 24
  for (int r = 0; r < ROWS; ++r)
#pragma GCC unroll 2
    for (int t = 0; t < TILES; ++t)
      sum[r][t] = block.add ? _mm512_load_ps(c + r * BLOCK + t * TILE) : _mm512_setzero_ps();
  const bf16* a = block.a + row * block.a_row;
  const bf16* b = block.b;
  for (int64_t step = 0; step < block.steps; ++step, a += block.a_step, b += TILES * CELLS)
    for (int64_t pair = 0; pair < TILE; ++pair) {
      __m512bh line[TILES];
#pragma GCC unroll 2
      for (int t = 0; t < TILES; ++t)
        line[t] = reinterpret_cast<__m512bh>(_mm512_load_si512(b + t * CELLS + pair * DEPTH));
#pragma GCC unroll 24
      for (int r = 0; r < ROWS; ++r) {
        __m512bh both = pair_of(a + r * block.a_row + 2 * pair);
#pragma GCC unroll 2
        for (int t = 0; t < TILES; ++t) sum[r][t] = _mm512_dpbf16_ps(sum[r][t], both, line[t]);
      }
    }
#pragma GCC unroll 24
  for (int r = 0; r < ROWS; ++r)
#pragma GCC unroll 2
    for (int t = 0; t < TILES; ++t) _mm512_store_ps(c + r * BLOCK + t * TILE, sum[r][t]);
}

template <int TILES>
void rows_of(const Block& block) {
  int64_t row = 0, left = block.a_rows;
  for (; left >= 12; row += 12, left -= 12) multiply<12, TILES>(block, row);
  for (; left >= 8; row += 8, left -= 8) multiply<8, TILES>(block, row);
  for (; left >= 4; row += 4, left -= 4) multiply<4, TILES>(block, row);
  for (; left >= 2; row += 2, left -= 2) multiply<2, TILES>(block, row);
  if (left) multiply<1, TILES>(block, row);
}

}  // namespace

void avx512_block(const Block& block) { block.b_tiles > 1 ? rows_of<2>(block) : rows_of<1>(block); }

}  // namespace finetune
#endif
