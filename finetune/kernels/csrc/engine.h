// Products with a frozen weight that is decoded a panel at a time, so that the dense weight never exists.
//
// A storage format supplies a Decoder; the engines below know nothing else about it. Both products read the one stored
// layout, rows of O with I contiguous; nothing is repacked in place.
//
// The engines work in the slots SLOT_WEIGHT, SLOT_INPUT and SLOT_OUTPUT of every thread that takes part; a Decoder may
// use SLOT_EXTRA. bf16 numbers below 2^-126 in size count as zero, in and out: so the instructions want it.
#pragma once

#include "native.h"

namespace finetune {

// A frozen weight [O, I] as the engines read it.
struct Decoder {
  const void* weight;  // whatever the function below understands
  // Writes w[row + r][column + c] as bf16 to out[r * stride + c], for r < rows and c < columns: the value that the
  // format decodes to in float32, rounded to nearest even. Called from any thread; never writes past columns.
  // The engines ask for as many columns of few rows as fit (8 of about 1024 columns, 32 and more of about 2048), from a
  // multiple of 32 on.
  void (*panel)(const void* weight, int64_t row, int64_t rows, int64_t column, int64_t columns, bf16* out,
                int64_t stride);
};

// y[M, O] = x[M, I] @ w[O, I].T + bias[O], bf16 in and out, accumulated in float32, rounded once at the end.
// `x` and `y` are contiguous; `bias` may be null. Returns false where this CPU has no engine for it, or another way is
// faster (decoding into a scratch, then the vendor's product): what `y` holds then means nothing.
bool engine_linear(const Decoder& decoder, int64_t M, int64_t O, int64_t I, const bf16* x, const bf16* bias, bf16* y,
                   int threads);

// gx[M, I] = g[M, O] @ w[O, I], as above.
bool engine_input_gradient(const Decoder& decoder, int64_t M, int64_t O, int64_t I, const bf16* g, bf16* gx,
                           int threads);

// The two products of a format as C functions, `ft_<name>_linear` and `ft_<name>_input_gradient`, over a weight with
// `in_features`; 0 where there is no engine for it. Stands outside of the namespace.
#define FT_PRODUCTS(name, Weight, panel)                                                                          \
  FT_API int32_t ft_##name##_linear(const Weight* w, int64_t M, int64_t O, const void* x, const void* bias,       \
                                    void* y, int32_t threads) {                                                   \
    using finetune::bf16;                                                                                         \
    return finetune::engine_linear({w, panel}, M, O, w->in_features, static_cast<const bf16*>(x),                 \
                                   static_cast<const bf16*>(bias), static_cast<bf16*>(y), threads);               \
  }                                                                                                               \
  FT_API int32_t ft_##name##_input_gradient(const Weight* w, int64_t M, int64_t O, const void* g, void* gx,       \
                                            int32_t threads) {                                                    \
    using finetune::bf16;                                                                                         \
    return finetune::engine_input_gradient({w, panel}, M, O, w->in_features, static_cast<const bf16*>(g),         \
                                           static_cast<bf16*>(gx), threads);                                      \
  }

// y[M, O] = x[M, I] @ w[O, I].T of int8 codes (-128 among them or not).
struct Int8Product {
  const int8_t* x;
  const int8_t* w;
  const float* scale_M;  // null: y is int32, the exact product
  const float* scale_O;  // else y = product * (scale_M[m] * scale_O[o] * unit) + bias[o] in float32, rounded once
  float unit;
  const void* bias;  // of the type of y, or null
  void* y;
  DType type;  // of y where it is scaled: F32 or BF16
  int64_t M, O, I;
};

// False where this CPU has no tiles (what `y` holds then means nothing).
bool engine_linear_int8(const Int8Product& product, int threads);

}  // namespace finetune
