// Weights in 4-bit codebooks (NF4, FP4) as bitsandbytes and finetune/kernels/reference.py store them.
//
// Two codes a byte, the first in the high nibble; blocks of `1 << shift` weights share one absmax and run over the
// FLATTENED weight, so that a row may begin inside a block, and inside a byte. A weight is `table[code] * absmax` in
// float32, rounded to nearest even where 16 bits are asked for.
#pragma once

#include "engine.h"
#include "native.h"

namespace finetune {

struct Codebook4 {
  const uint8_t* codes;  // [ceil(N / 2)]
  const void* absmax;    // float [G], or uint8_t [G] under double quantization
  const float* nested;   // [ceil(G / 256)] under double quantization, else null
  const float* map;      // [256], the values of absmax' codes
  const float* table;    // [16]
  float offset;          // added to absmax under double quantization
  int32_t shift;         // log2 of the block size, 5 to 12
  int64_t columns;       // I

  // absmax of a block; two roundings under double quantization, as in the reference.
  float scale(int64_t block) const {
    if (!nested) return static_cast<const float*>(absmax)[block];
    return map[static_cast<const uint8_t*>(absmax)[block]] * nested[block >> 8] + offset;
  }

  unsigned code(int64_t index) const { return index & 1 ? codes[index >> 1] & 15u : codes[index >> 1] >> 4; }
};

// The values of a block by code, in 16 bits.
using Table = uint16_t[16];

// Tables of `blocks` blocks, 64-byte aligned, from their absmax; `dtype` is BF16 or F16.
void scale_tables(const float* table, const float* scales, int blocks, DType dtype, Table* tables);

// absmax of the blocks [first, first + count), in `room` or, where it is stored as float32, in place.
const float* block_scales(const Codebook4& weight, int64_t first, int64_t count, float* room);

// Decodes the weights [start, start + count) of the flattened matrix to `out`, of type `dtype`. With `stream` the
// stores go past the caches; `out` is then 64-byte aligned and `start` a multiple of 32.
void decode(const Codebook4& weight, int64_t start, int64_t count, DType dtype, void* out, bool stream);

// As Decoder::panel, over a Codebook4.
void codebook4_panel(const void* weight, int64_t row, int64_t rows, int64_t column, int64_t columns, bf16* out,
                     int64_t stride);

}  // namespace finetune
