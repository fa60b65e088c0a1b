// Products with a frozen weight in integer codes, by the engines.
#include "engine.h"
#include "integer.h"

// y[M, O] = x[M, I] @ w[O, I].T + bias[O], all bf16; bias may be null. 0 where there is no engine for it.
FT_API int32_t ft_integer_linear(const finetune::Integer* w, int64_t M, int64_t O, const void* x, const void* bias,
                                 void* y, int32_t threads) {
  return finetune::engine_linear({w, finetune::integer_panel}, M, O, w->in_features,
                                 static_cast<const finetune::bf16*>(x), static_cast<const finetune::bf16*>(bias),
                                 static_cast<finetune::bf16*>(y), threads);
}

// gx[M, I] = g[M, O] @ w[O, I], all bf16. 0 where there is no engine for it.
FT_API int32_t ft_integer_input_gradient(const finetune::Integer* w, int64_t M, int64_t O, const void* g, void* gx,
                                         int32_t threads) {
  return finetune::engine_input_gradient({w, finetune::integer_panel}, M, O, w->in_features,
                                         static_cast<const finetune::bf16*>(g), static_cast<finetune::bf16*>(gx),
                                         threads);
}
