// A block of a product by VDPBF16PS: up to 12 rows of A by 32 columns of B in registers; or inner products along K, for
// so few columns that the lanes would be idle.
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

// ROWS rows of A by HEIGHT columns of B, as inner products.
template <int ROWS, int HEIGHT>
FT_TARGET_AVX512_BF16 void dots(const Block& block, int64_t row) {
  __m512 sum[ROWS][HEIGHT];
#pragma GCC unroll 24
  for (int r = 0; r < ROWS; ++r)
#pragma GCC unroll 8
    for (int m = 0; m < HEIGHT; ++m) sum[r][m] = _mm512_setzero_ps();
  const bf16* a = block.a + row * block.a_row;
  const bf16* b = block.b;
  for (int64_t step = 0; step < block.steps; ++step, a += block.a_step, b += HEIGHT * DEPTH) {
    __m512bh line[ROWS];
#pragma GCC unroll 24
    for (int r = 0; r < ROWS; ++r) line[r] = reinterpret_cast<__m512bh>(_mm512_loadu_si512(a + r * block.a_row));
#pragma GCC unroll 8
    for (int m = 0; m < HEIGHT; ++m) {
      __m512bh column = reinterpret_cast<__m512bh>(_mm512_load_si512(b + m * DEPTH));
#pragma GCC unroll 24
      for (int r = 0; r < ROWS; ++r) sum[r][m] = _mm512_dpbf16_ps(sum[r][m], line[r], column);
    }
  }
  float* c = block.c + row * BLOCK;
#pragma GCC unroll 24
  for (int r = 0; r < ROWS; ++r)
#pragma GCC unroll 8
    for (int m = 0; m < HEIGHT; ++m) {
      float total = _mm512_reduce_add_ps(sum[r][m]);
      c[r * BLOCK + m] = block.add ? c[r * BLOCK + m] + total : total;
    }
}

template <int ROWS, int HEIGHT>
void all_dots(const Block& block) {
  int64_t row = 0;
  for (; row + ROWS <= block.a_rows; row += ROWS) dots<ROWS, HEIGHT>(block, row);
  for (; row < block.a_rows; ++row) dots<1, HEIGHT>(block, row);
}

}  // namespace

int64_t dots_height(int64_t M) { return M <= 2 ? M : M <= 4 ? 4 : 8; }

void avx512_dots(const Block& block, int64_t height) {
  switch (height) {
    case 1: return all_dots<8, 1>(block);
    case 2: return all_dots<8, 2>(block);
    case 4: return all_dots<4, 4>(block);
    default: return all_dots<2, 8>(block);
  }
}

void avx512_block(const Block& block) { block.b_tiles > 1 ? rows_of<2>(block) : rows_of<1>(block); }

}  // namespace finetune
#endif
