// The second moment of an input, summed up in float32: what calibration spends its time on besides the model itself.
//
// The matrix is symmetric, so panels of PANEL rows are computed from their own diagonal block on. bf16 inputs are
// multiplied as they are; a float32 one as the sum of two bf16 numbers, of which the product of both second ones, under
// 2^-17 of the whole, is left out.
//
// Shape legend: N rows of the input, I features, a multiple of 32.
#include <algorithm>

#include "attention.h"  // for its packing

#ifdef FT_X86
namespace finetune {
namespace {

constexpr int64_t PANEL = 256;  // as finetune/kernels/gram.py has it
constexpr int64_t CHUNK = 512;  // rows of the input that are summed before sums go to memory

// The rows of a chunk as both operands of the product; of float32 rows the second parts follow the first.
struct Packed {
  bf16* a_IN;      // [I, CHUNK]
  uint32_t* b_NI;  // [CHUNK / 2, I] words
};

// 64 rows of float32 as the sums of two rows of bf16.
FT_TARGET_AVX512_BF16 void split(const float* x, int64_t cells, bf16* first, bf16* second) {
  for (int64_t n = 0; n < cells; n += 16) {
    const __m512 value = _mm512_loadu_ps(x + n);
    const __m256i near = (__m256i)_mm512_cvtneps_pbh(value);
    const __m512 back = _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(near), 16));
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(first + n), near);
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(second + n), (__m256i)_mm512_cvtneps_pbh(_mm512_sub_ps(value, back)));
  }
}

// Rows r .. r + 63 of a chunk, of which `rows` exist, into their place.
void pack(const bf16* x, int64_t rows, int64_t r, int64_t I, const Packed& out) {
  pack_transposed(x, I, rows, BLOCK, I, out.a_IN + r, CHUNK);
  pack_row_pairs(x, I, rows, I, out.b_NI + r / 2 * I);
}

bool pack_chunk(const void* x, DType type, int64_t rows, int64_t I, const Packed (&parts)[2], int threads) {
  bool enough = true;
#pragma omp parallel for num_threads(threads) schedule(dynamic) if (threads > 1) reduction(&& : enough)
  for (int64_t r = 0; r < CHUNK; r += BLOCK) {
    const int64_t left = std::clamp<int64_t>(rows - r, 0, BLOCK);
    if (type == BF16) {
      pack(static_cast<const bf16*>(x) + r * I, left, r, I, parts[0]);
      continue;
    }
    auto* first = static_cast<bf16*>(scratch(SLOT_OUTPUT, static_cast<size_t>(2 * BLOCK * I) * sizeof(bf16)));
    enough = enough && first;
    if (!first) continue;
    bf16* second = first + BLOCK * I;
    split(static_cast<const float*>(x) + r * I, left * I, first, second);
    pack(first, left, r, I, parts[0]);
    pack(second, left, r, I, parts[1]);
  }
  return enough;
}

// One panel's columns n .. n + count of the rows m .. m + 63.
void add_block(BlockProduct product, const Packed (&parts)[2], bool both, int64_t m, int64_t n, int64_t height,
               int64_t width, int64_t I, float* sum_II) {
  for (int pair = 0; pair < (both ? 3 : 1); ++pair)
    product(height, width, CHUNK, parts[pair / 2].a_IN + m * CHUNK, CHUNK, parts[pair % 2].b_NI + n, I,
            sum_II + m * I + n, I, true);
}

}  // namespace
}  // namespace finetune
#endif

// sum[I, I] += x[N, I]^T x on and right of the diagonal blocks of PANEL; `type` is F32 or BF16. Returns false where this
// CPU, the width or memory does not serve, with `sum` as it was unless memory ran out on the way.
FT_API bool ft_gram(const void* x, int32_t type, int64_t N, int64_t I, float* sum_II, int32_t threads) {
#ifdef FT_X86
  using namespace finetune;
  const Level use = level();
  const BlockProduct product = block_product(use);
  if (!product || I % 32 || (type != BF16 && type != F32)) return false;
  const bool both = type == F32;
  const int64_t cells = (both ? 2 : 1) * I * CHUNK;
  auto* a = static_cast<bf16*>(scratch(SLOT_INPUT, static_cast<size_t>(cells) * sizeof(bf16)));
  auto* b = static_cast<uint32_t*>(scratch(SLOT_WEIGHT, static_cast<size_t>(cells) * sizeof(bf16)));
  if (!a || !b) return false;
  const Packed parts[2] = {{a, b}, {a + I * CHUNK, b + I * CHUNK / 2}};
  const int64_t blocks = (I + BLOCK - 1) / BLOCK;
  for (int64_t start = 0; start < N; start += CHUNK) {
    const char* rows = static_cast<const char*>(x) + start * I * (both ? sizeof(float) : sizeof(bf16));
    if (!pack_chunk(rows, static_cast<DType>(type), std::min(CHUNK, N - start), I, parts, threads)) return false;
#pragma omp parallel for num_threads(threads) schedule(dynamic) if (threads > 1)
    for (int64_t block = 0; block < blocks; ++block) {
      const int64_t m = block * BLOCK, height = std::min(BLOCK, I - m);
      begin_blocks(use);
      for (int64_t n = m / PANEL * PANEL; n < I; n += PANEL)
        add_block(product, parts, both, m, n, height, std::min(PANEL, I - n), I, sum_II);
      end_blocks(use);
    }
  }
  return true;
#else
  return false;
#endif
}
