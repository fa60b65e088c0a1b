// Small products of packed bf16 blocks that stay in a core's cache: what attention is made of.
//
// Shape legend: M, N rows and columns of the result, K the dimension summed over. All three are multiples of 32.
#pragma once

#include "native.h"

namespace finetune {

// C[M, N] = (add ? C : 0) + A[M, K] B[K, N], accumulated in float32.
// A: bf16 rows of K, lda apart. B: pairs of rows of K interleaved, a 32-bit word a column, [K / 2, N] words, ldb apart.
// C: float32 rows, ldc apart.
using BlockProduct = void (*)(int64_t M, int64_t N, int64_t K, const bf16* a, int64_t lda, const uint32_t* b,
                              int64_t ldb, float* c, int64_t ldc, bool add);

// The product of a level, null below AVX512_BF16.
BlockProduct block_product(Level level);

// Around a thread's use of the level's product: the tiles have to be set up and given back.
void begin_blocks(Level level);
void end_blocks(Level level);

}  // namespace finetune
