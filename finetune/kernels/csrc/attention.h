// Softmax attention over bf16 heads, forward and backward, with memory linear in the length.
//
// FlashAttention's scheme (Dao et al. 2022, arXiv:2205.14135, algorithms 1 and 4; Dao 2023, arXiv:2307.08691): blocks
// of queries meet blocks of keys, the softmax is kept online, and the backward makes the probabilities again from the
// log-sum-exp. Scores are held transposed (keys down, queries across), so that maxima and sums over keys are plain
// vector operations and no product needs its operand transposed anew.
//
// Shape legend: B batch rows, H query heads, G key/value heads, Q queries, K keys, D features of a head. Inside a block
// D is padded with zeros to a multiple of 32.
#pragma once

#include "block_product.h"

namespace finetune {

constexpr int64_t BLOCK = 64;  // queries of a block, and keys: a mask's bits for a key are one 64-bit word
constexpr float LOG2E = 1.4426950408889634f;

// A [B, heads, positions, D] tensor by its strides in elements; features are contiguous.
struct Heads {
  bf16* data;
  int64_t batch, head, position;
  bf16* at(int64_t b, int64_t h, int64_t p) const { return data + b * batch + h * head + p * position; }
};

struct Shape {
  int64_t B, H, G, Q, K, D;
  int64_t d() const { return (D + 31) / 32 * 32; }
  int64_t query_blocks() const { return (Q + BLOCK - 1) / BLOCK; }
  int64_t key_blocks() const { return (K + BLOCK - 1) / BLOCK; }
  int64_t keys() const { return key_blocks() * BLOCK; }
};

// Who looks at whom: for each block of queries and block of keys nothing, everything, or a word of bits for each key.
enum Sight : uint8_t { NONE = 0, ALL = 1, SOME = 2 };

struct Mask {
  bool causal;            // without a table: the keys up to the query's own position
  const uint8_t* sights;  // [B, query blocks, key blocks], null without a table
  const uint64_t* words;  // [B, query blocks, keys]: bit q says whether query q of the block sees the key
  uint64_t causal_words[BLOCK], last_words[BLOCK];
  Sight sight(const Shape& shape, int64_t b, int64_t query_block, int64_t key_block, const uint64_t** bits) const;
};

size_t mask_bytes(const Shape& shape);

// Reads a bool mask [B, 1, Q, K] (strides in bytes; null for none) into `mask`; `table` has mask_bytes.
void read_mask(const Shape& shape, const uint8_t* given, int64_t batch_stride, int64_t query_stride, bool causal,
               void* table, Mask* mask);

// ---- Packing (attention_pack.cpp). Rows and features beyond those given are zeros.

// out[r][0..d) = rows of in.
void pack_rows(const bf16* in, int64_t stride, int64_t rows, int64_t padded_rows, int64_t D, bf16* out);
// out[f][r]: features down, `ld` apart.
void pack_transposed(const bf16* in, int64_t stride, int64_t rows, int64_t padded_rows, int64_t D, bf16* out,
                     int64_t ld);
// Words of two features: out[f / 2][r], 64 words apart.
void pack_feature_pairs(const bf16* in, int64_t stride, int64_t rows, int64_t D, uint32_t* out);
// Words of two rows: out[r / 2][f], d words apart.
void pack_row_pairs(const bf16* in, int64_t stride, int64_t rows, int64_t D, uint32_t* out);
// in[f][64] float32, times factor[r], to rows of bf16.
void unpack_transposed(const float* in, const float* factor, bf16* out, int64_t stride, int64_t rows, int64_t D);
// in[r][d] float32, times a factor, to rows of bf16.
void unpack_rows(const float* in, int64_t d, float factor, bf16* out, int64_t stride, int64_t rows, int64_t D);

// ---- One batch row and key/value head, with the query heads that share it.

struct Forward {
  Shape shape;
  Mask mask;
  Heads query, key, value, out;
  float* log_sum;  // [B, H, Q], natural logarithm of the sum of exponentials, plus infinity where nothing is seen
  float scale;
};

struct Backward {
  Forward forward;
  Heads grad, grad_query, grad_key, grad_value;
};

size_t forward_bytes(const Shape& shape);
size_t backward_bytes(const Shape& shape);
void attend(const Forward& problem, BlockProduct product, int64_t b, int64_t g, void* arena);
void attend_backward(const Backward& problem, BlockProduct product, int64_t b, int64_t g, void* arena);

}  // namespace finetune
