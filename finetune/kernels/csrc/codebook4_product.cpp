// Products with a 4-bit codebook weight, bf16: a few rows by the kernel of codebook4_gemv.cpp, more by the engines.
#include "codebook4.h"
#include "codebook4_gemv.h"

namespace finetune {
namespace {

Codebook4 weight_of(const uint8_t* codes, const void* absmax, const float* nested, const float* offset,
                    const float* map, const float* table, int32_t block_size, int64_t columns) {
  return {codes, absmax, nested, map, table, offset ? *offset : 0.0f, __builtin_ctz(block_size), columns};
}

}  // namespace
}  // namespace finetune

// y[M, O] = x[M, I] @ w[O, I].T + bias[O]; storage as ft_dequantize_codebook4 takes it, everything contiguous, bias
// may be null. Returns 0 where decoding everything and the vendor's product are the better way: then y means nothing.
FT_API int32_t ft_linear_codebook4(const uint8_t* codes, const void* absmax, const float* nested, const float* offset,
                                   const float* map, const float* table, int32_t block_size, int64_t M, int64_t O,
                                   int64_t I, const uint16_t* x, const uint16_t* bias, uint16_t* y, int32_t threads) {
  using namespace finetune;
  Codebook4 weight = weight_of(codes, absmax, nested, offset, map, table, block_size, I);
  if (codebook4_gemv(weight, M, O, x, bias, y, threads)) return 1;
  return engine_linear({&weight, codebook4_panel}, M, O, I, x, bias, y, threads);
}

// gx[M, I] = g[M, O] @ w[O, I], likewise.
FT_API int32_t ft_input_gradient_codebook4(const uint8_t* codes, const void* absmax, const float* nested,
                                           const float* offset, const float* map, const float* table,
                                           int32_t block_size, int64_t M, int64_t O, int64_t I, const uint16_t* g,
                                           uint16_t* gx, int32_t threads) {
  using namespace finetune;
  Codebook4 weight = weight_of(codes, absmax, nested, offset, map, table, block_size, I);
  return engine_input_gradient({&weight, codebook4_panel}, M, O, I, g, gx, threads);
}
