// The second moment of a bf16 input, summed up in float32: what calibration spends its time on besides the model itself.
//
// The matrix is symmetric, so panels of PANEL rows are computed from their own diagonal block on. Products of bf16
// numbers are exact in float32, so only the order of the sums is another one.
//
// Shape legend: N rows of the input, I features, a multiple of 32.
#include <algorithm>

#include "attention.h"  // for its packing

#ifdef FT_X86
namespace finetune {
namespace {

constexpr int64_t PANEL = 256;  // as finetune/kernels/gram.py has it
constexpr int64_t CHUNK = 512;  // rows of the input that are summed before sums go to memory

// A chunk's rows, zeros after the last, as both operands: a [I, CHUNK] and b [CHUNK / 2, I] words.
void pack_chunk(const bf16* x_NI, int64_t rows, int64_t I, bf16* a, uint32_t* b, int threads) {
#pragma omp parallel for num_threads(threads) schedule(dynamic) if (threads > 1)
  for (int64_t r = 0; r < CHUNK; r += BLOCK) {
    const int64_t left = std::clamp<int64_t>(rows - r, 0, BLOCK);
    pack_transposed(x_NI + r * I, I, left, BLOCK, I, a + r, CHUNK);
    pack_row_pairs(x_NI + r * I, I, left, I, b + r / 2 * I);
  }
}

}  // namespace
}  // namespace finetune
#endif

// sum[I, I] += x[N, I]^T x on and right of the diagonal blocks of PANEL. Returns false, with `sum` as it was, where this
// CPU, the width or memory does not serve.
FT_API bool ft_gram(const void* x_NI, int64_t N, int64_t I, float* sum_II, int32_t threads) {
#ifdef FT_X86
  using namespace finetune;
  const Level use = level();
  const BlockProduct product = block_product(use);
  if (!product || I % 32) return false;
  auto* a = static_cast<bf16*>(scratch(SLOT_INPUT, static_cast<size_t>(I * CHUNK) * sizeof(bf16)));
  auto* b = static_cast<uint32_t*>(scratch(SLOT_WEIGHT, static_cast<size_t>(I * CHUNK) * sizeof(bf16)));
  if (!a || !b) return false;
  const int64_t blocks = (I + BLOCK - 1) / BLOCK;
  for (int64_t start = 0; start < N; start += CHUNK) {
    pack_chunk(static_cast<const bf16*>(x_NI) + start * I, std::min(CHUNK, N - start), I, a, b, threads);
#pragma omp parallel for num_threads(threads) schedule(dynamic) if (threads > 1)
    for (int64_t block = 0; block < blocks; ++block) {
      const int64_t m = block * BLOCK, height = std::min(BLOCK, I - m);
      begin_blocks(use);
      for (int64_t n = m / PANEL * PANEL; n < I; n += PANEL)
        product(height, std::min(PANEL, I - n), CHUNK, a + m * CHUNK, CHUNK, b + n, I, sum_II + m * I + n, I, true);
      end_blocks(use);
    }
  }
  return true;
#else
  return false;
#endif
}
