// Decoding steps of generation: y = x @ w.T for a few rows of x, each packed byte read once, in its stored place.
//
// A step takes 128 codes of a row of w, 64 bytes, as they lie in a register: the four nibbles of each of its 32 words
// are four vectors of codes, and a dot product does not care for the order as long as x has the same one. So x is
// permuted once per call and the codes need no shuffling at all. Two blocks' values, scaled and rounded to bf16, make
// the 32 words that vpermw looks up: bit 4 of an index, set in the upper half, chooses the second block.
#include "codebook4_gemv.h"

namespace finetune {

#ifdef FT_X86
namespace {

constexpr int64_t STEP = 128;      // codes of a step
constexpr int64_t MOST_ROWS = 8;   // of x
// With more rows tiles are faster, measured on Granite Rapids at 2048x2048 and 4096x4096; at 4 the two are near.
constexpr int64_t MOST_ROWS_BESIDE_TILES = 4;

// x[M, I] in the order of the kernel: step, row, nibble, word; the last step padded with zeros.
void pack(const bf16* x, int64_t M, int64_t I, bf16* packed) {
  for (int64_t k = 0; k < I; k += STEP)
    for (int64_t m = 0; m < M; ++m)
      for (int64_t nibble = 0; nibble < 4; ++nibble)
        for (int64_t word = 0; word < 32; ++word) {
          int64_t column = k + 4 * word + (nibble ^ 1);  // the first of two codes is in the high nibble
          *packed++ = column < I ? x[m * I + column] : bf16{0};
        }
}

// What does not change over a row.
struct Constants {
  __m512 table;
  __m512i nibbles;  // 15 in every byte
  __m512i second;   // 16 in the bytes of the upper half
};

// absmax of the blocks from `first` on.
struct Scales {
  const float* values;
  int64_t first;
  int32_t shift;
  const float* at(int64_t index) const { return values + ((index >> shift) - first); }
};

// R rows of w by M of x over one step at `index`, row and column of w; a step of 64 codes has WHOLE false.
template <int M, int R, bool WHOLE>
FT_TARGET_AVX512_BF16 inline __attribute__((always_inline)) void step(const Codebook4& weight, const Constants& is,
                                                                      const Scales& scales, const bf16* packed,
                                                                      int64_t index, __m512 (&sum)[R][M]) {
  const int64_t I = weight.columns;
  __m512i low[R], high[R], values[R];
#pragma GCC unroll 8
  for (int r = 0; r < R; ++r) {
    const float* scale = scales.at(index + r * I);
    const float* next = WHOLE ? scales.at(index + r * I + 64) : scale;
    values[r] = reinterpret_cast<__m512i>(_mm512_cvtne2ps_pbh(_mm512_mul_ps(is.table, _mm512_set1_ps(*next)),
                                                              _mm512_mul_ps(is.table, _mm512_set1_ps(*scale))));
    const uint8_t* at = weight.codes + ((index + r * I) >> 1);
    _mm_prefetch(at + R * I / 2, _MM_HINT_T0);  // what the next rows will read: too short runs for the hardware
    __m512i codes =
        WHOLE ? _mm512_loadu_si512(at) : _mm512_zextsi256_si512(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(at)));
    low[r] = _mm512_ternarylogic_epi32(codes, is.nibbles, is.second, 0xea);  // (codes & nibbles) | second
    high[r] = _mm512_ternarylogic_epi32(_mm512_srli_epi16(codes, 4), is.nibbles, is.second, 0xea);
  }
#pragma GCC unroll 4
  for (int nibble = 0; nibble < 4; ++nibble) {
    __m512bh w[R];
#pragma GCC unroll 8
    for (int r = 0; r < R; ++r) {
      __m512i codes = nibble & 1 ? high[r] : low[r];
      if (nibble & 2) codes = _mm512_srli_epi16(codes, 8);
      w[r] = reinterpret_cast<__m512bh>(_mm512_permutexvar_epi16(codes, values[r]));
    }
#pragma GCC unroll 8
    for (int m = 0; m < M; ++m) {
      __m512bh x = reinterpret_cast<__m512bh>(_mm512_load_si512(packed + m * STEP + nibble * 32));
#pragma GCC unroll 8
      for (int r = 0; r < R; ++r) sum[r][m] = _mm512_dpbf16_ps(sum[r][m], w[r], x);
    }
  }
}

template <int M, int R>
FT_TARGET_AVX512_BF16 void dot(const Codebook4& weight, const Scales& scales, const bf16* packed, int64_t row,
                               float (*sums)[MOST_ROWS]) {
  const Constants is{_mm512_loadu_ps(weight.table), _mm512_set1_epi8(15),
                     _mm512_inserti64x4(_mm512_setzero_si512(), _mm256_set1_epi8(16), 1)};
  __m512 sum[R][M];
#pragma GCC unroll 8
  for (int r = 0; r < R; ++r)
#pragma GCC unroll 8
    for (int m = 0; m < M; ++m) sum[r][m] = _mm512_setzero_ps();
  int64_t index = row * weight.columns;
  const int64_t end = index + weight.columns;
  for (; index + STEP <= end; index += STEP, packed += M * STEP)
    step<M, R, true>(weight, is, scales, packed, index, sum);
  if (index < end) step<M, R, false>(weight, is, scales, packed, index, sum);
#pragma GCC unroll 8
  for (int r = 0; r < R; ++r)
#pragma GCC unroll 8
    for (int m = 0; m < M; ++m) sums[r][m] = _mm512_reduce_add_ps(sum[r][m]);
}

using Dot = void (*)(const Codebook4&, const Scales&, const bf16*, int64_t, float (*)[MOST_ROWS]);
// By M: several rows of w together, as many as leave the sums in registers, and one alone.
constexpr Dot TOGETHER[] = {dot<1, 4>, dot<2, 4>, dot<3, 4>, dot<4, 4>, dot<5, 2>, dot<6, 2>, dot<7, 2>, dot<8, 2>};
constexpr Dot ALONE[] = {dot<1, 1>, dot<2, 1>, dot<3, 1>, dot<4, 1>, dot<5, 1>, dot<6, 1>, dot<7, 1>, dot<8, 1>};
constexpr int64_t rows_together(int64_t M) { return M <= 4 ? 4 : 2; }

// Rows [begin, end) of w. False where there is no memory.
bool multiply(const Codebook4& weight, int64_t M, int64_t O, const bf16* packed, const bf16* bias, bf16* y,
              int64_t begin, int64_t end) {
  float sums[4][MOST_ROWS];
  const int64_t I = weight.columns, block = begin * I >> weight.shift;
  const int64_t blocks = ((end * I - 1) >> weight.shift) - block + 1;
  float* room = static_cast<float*>(scratch(SLOT_EXTRA, static_cast<size_t>(blocks) * sizeof(float)));
  if (!room) return false;
  const Scales scales{block_scales(weight, block, blocks, room), block, weight.shift};
  for (int64_t o = begin; o < end;) {
    int64_t rows = end - o >= rows_together(M) ? rows_together(M) : 1;
    (rows > 1 ? TOGETHER : ALONE)[M - 1](weight, scales, packed, o, sums);
    for (int64_t r = 0; r < rows; ++r, ++o)
      for (int64_t m = 0; m < M; ++m) y[m * O + o] = to_bf16(sums[r][m] + (bias ? from_bf16(bias[o]) : 0.0f));
  }
  return true;
}

}  // namespace
#endif

bool codebook4_gemv(const Codebook4& weight, int64_t M, int64_t O, const bf16* x, const bf16* bias, bf16* y,
                    int threads) {
#ifdef FT_X86
  const int64_t I = weight.columns;
  // Every 64 codes of a row lie in one block.
  const int64_t most = level() >= AMX ? MOST_ROWS_BESIDE_TILES : MOST_ROWS;
  if (level() < AVX512_BF16 || M < 1 || M > most || I % 64 != 0 || weight.shift < 6) return false;
  int64_t width = (I + STEP - 1) / STEP * STEP;
  bf16* packed = static_cast<bf16*>(scratch(SLOT_INPUT, static_cast<size_t>(M * width) * sizeof(bf16)));
  if (!packed) return false;
  pack(x, M, I, packed);
  constexpr int64_t CHUNK = 32, WORTH = 1 << 18;  // rows of w; weights that pay for a team
  bool done = true;
#pragma omp parallel for schedule(static) num_threads(O * I < WORTH ? 1 : threads) reduction(&& : done)
  for (int64_t o = 0; o < O; o += CHUNK)
    done = multiply(weight, M, O, packed, bias, y, o, O - o < CHUNK ? O : o + CHUNK) && done;
  return done;
#else
  return false;
#endif
}

}  // namespace finetune
