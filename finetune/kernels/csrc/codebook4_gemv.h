// The product of a few rows with a 4-bit codebook weight.
#pragma once

#include "codebook4.h"

namespace finetune {

// y[M, O] = x[M, I] @ w[O, I].T + bias[O] for small M; false where the shape or the CPU is not for it (nothing is
// written then).
bool codebook4_gemv(const Codebook4& weight, int64_t M, int64_t O, const bf16* x, const bf16* bias, bf16* y,
                    int threads);

}  // namespace finetune
