// The engines over a dense weight: what tests and measurements compare with the vendor's product.
#include "engine.h"

namespace {

struct Dense {
  const finetune::bf16* weight;
  int64_t in_features;
};

void copy_panel(const void* weight, int64_t row, int64_t rows, int64_t column, int64_t columns, finetune::bf16* out,
                int64_t stride) {
  const Dense& dense = *static_cast<const Dense*>(weight);
  for (int64_t r = 0; r < rows; ++r)
    std::memcpy(out + r * stride, dense.weight + (row + r) * dense.in_features + column,
                static_cast<size_t>(columns) * sizeof(finetune::bf16));
}

}  // namespace

// y[M, O] = x[M, I] @ w[O, I].T + bias[O], all bf16; bias may be null. 0 where there is no engine for it.
FT_API int32_t ft_linear_dense(const void* w, int64_t M, int64_t O, int64_t I, const void* x, const void* bias, void* y,
                               int32_t threads) {
  Dense dense{static_cast<const finetune::bf16*>(w), I};
  return finetune::engine_linear({&dense, copy_panel}, M, O, I, static_cast<const finetune::bf16*>(x),
                                 static_cast<const finetune::bf16*>(bias), static_cast<finetune::bf16*>(y), threads);
}

// gx[M, I] = g[M, O] @ w[O, I], all bf16. 0 where there is no engine for it.
FT_API int32_t ft_input_gradient_dense(const void* w, int64_t M, int64_t O, int64_t I, const void* g, void* gx,
                                       int32_t threads) {
  Dense dense{static_cast<const finetune::bf16*>(w), I};
  return finetune::engine_input_gradient({&dense, copy_panel}, M, O, I, static_cast<const finetune::bf16*>(g),
                                         static_cast<finetune::bf16*>(gx), threads);
}
