// Attention's interface and its masks; see attention.h.
#include "attention.h"

namespace finetune {
namespace {

// Transposes 64 x 64 bits (Hacker's Delight, 2nd edition, section 7-3): bit q of word k for bit k of word q.
void transpose_bits(uint64_t words[BLOCK]) {
  uint64_t mask = 0x00000000ffffffffull;
  for (int width = 32; width; width >>= 1, mask ^= mask << width)
    for (int i = 0; i < BLOCK; i = ((i | width) + 1) & ~width) {
      const uint64_t swap = ((words[i] >> width) ^ words[i | width]) & mask;
      words[i] ^= swap << width;
      words[i | width] ^= swap;
    }
}

// Bits of up to 64 bytes that are 0 or 1, eight at a time.
uint64_t bits_of(const uint8_t* bytes, int64_t count) {
  uint64_t word = 0;
  int64_t i = 0;
  for (; i + 8 <= count; i += 8) {
    uint64_t eight;
    std::memcpy(&eight, bytes + i, 8);
    word |= ((eight * 0x0102040810204080ull) >> 56) << i;
  }
  for (; i < count; ++i) word |= static_cast<uint64_t>(bytes[i] != 0) << i;
  return word;
}

// The words of one block of queries and keys, and what they amount to.
Sight read_block(const uint8_t* given, int64_t query_stride, int64_t queries, int64_t keys, uint64_t* words) {
  for (int64_t q = 0; q < BLOCK; ++q) words[q] = q < queries ? bits_of(given + q * query_stride, keys) : 0;
  transpose_bits(words);
  uint64_t any = 0, all = ~uint64_t{0};
  for (int64_t k = 0; k < BLOCK; ++k) any |= words[k], all &= words[k];
  return !any ? NONE : all == ~uint64_t{0} ? ALL : SOME;
}

}  // namespace

size_t mask_bytes(const Shape& s) {
  return s.B * s.query_blocks() * (s.keys() * sizeof(uint64_t) + s.key_blocks()) + 64;
}

void read_mask(const Shape& s, const uint8_t* given, int64_t batch_stride, int64_t query_stride, bool causal,
               void* table, Mask* mask) {
  mask->causal = causal;
  mask->sights = nullptr;
  const int64_t rest = s.K % BLOCK;
  for (int64_t k = 0; k < BLOCK; ++k) {
    mask->causal_words[k] = ~uint64_t{0} << k;
    mask->last_words[k] = !rest || k < rest ? ~uint64_t{0} : 0;
  }
  if (!given) return;
  auto* words = static_cast<uint64_t*>(table);
  auto* sights = reinterpret_cast<uint8_t*>(words + s.B * s.query_blocks() * s.keys());
  mask->words = words;
  mask->sights = sights;
  for (int64_t b = 0; b < s.B; ++b)
    for (int64_t i = 0; i < s.query_blocks(); ++i)
      for (int64_t j = 0; j < s.key_blocks(); ++j, words += BLOCK) {
        const int64_t q = i * BLOCK, k = j * BLOCK;
        const int64_t queries = s.Q - q < BLOCK ? s.Q - q : BLOCK, keys = s.K - k < BLOCK ? s.K - k : BLOCK;
        *sights++ = read_block(given + b * batch_stride + q * query_stride + k, query_stride, queries, keys, words);
      }
}

Sight Mask::sight(const Shape& s, int64_t b, int64_t i, int64_t j, const uint64_t** bits) const {
  if (sights) {
    const int64_t at = (b * s.query_blocks() + i) * s.key_blocks() + j;
    *bits = sights[at] == SOME ? words + at * BLOCK : nullptr;
    return static_cast<Sight>(sights[at]);
  }
  if (causal && j > i) return NONE;
  if (causal && j == i) {
    *bits = causal_words;
    return SOME;
  }
  const bool ragged = !causal && j == s.key_blocks() - 1 && s.K % BLOCK;
  *bits = ragged ? last_words : nullptr;
  return ragged ? SOME : ALL;
}

#ifdef FT_X86
namespace {

Heads heads(void* data, const int64_t* strides) {
  return Heads{static_cast<bf16*>(data), strides[0], strides[1], strides[2]};
}

// Each batch row and key/value head to a thread; false where memory ran out.
template <typename Problem, typename Work>
bool each_head(const Problem& problem, const Shape& shape, size_t bytes, Work work, int threads) {
  const Level use = level();
  const BlockProduct product = block_product(use);
  const int64_t count = shape.B * shape.G;
  bool enough = true;
#pragma omp parallel for num_threads(threads) schedule(dynamic) if (threads > 1 && count > 1) reduction(&& : enough)
  for (int64_t n = 0; n < count; ++n) {
    void* arena = scratch(SLOT_EXTRA, bytes);
    enough = enough && arena;
    if (!arena) continue;
    begin_blocks(use);
    work(problem, product, n / shape.G, n % shape.G, arena);
    end_blocks(use);
  }
  return enough;
}

}  // namespace
#endif

}  // namespace finetune

// Attention of bf16 heads. `sizes`: B, H, G, Q, K, D. `strides`: of query, key, value and out, each over batch, head
// and position, then of the mask over batch and query (bytes). `mask`: bool [B, 1, Q, K] or null; `causal` (Q == K)
// counts only without one. `log_sum`: float32 [B, H, Q]. Returns false where this CPU or memory does not serve.
FT_API bool ft_attention(const int64_t* sizes, const int64_t* strides, void* query, void* key, void* value,
                         const uint8_t* mask, bool causal, float scale, void* out, float* log_sum, int threads) {
#ifdef FT_X86
  using namespace finetune;
  if (!block_product(level())) return false;
  const Shape shape{sizes[0], sizes[1], sizes[2], sizes[3], sizes[4], sizes[5]};
  Forward problem{shape, {}, heads(query, strides), heads(key, strides + 3), heads(value, strides + 6),
                  heads(out, strides + 9), log_sum, scale};
  void* table = mask ? scratch(SLOT_INPUT, mask_bytes(shape)) : nullptr;
  if (mask && !table) return false;
  read_mask(shape, mask, strides[12], strides[13], causal, table, &problem.mask);
  return each_head(problem, shape, forward_bytes(shape), attend, threads);
#else
  return false;
#endif
}

// The gradients, given `out` and `log_sum` of the forward. `strides`: of query, key, value, out, then the mask's two,
// then of grad, grad_query, grad_key and grad_value.
FT_API bool ft_attention_backward(const int64_t* sizes, const int64_t* strides, void* query, void* key, void* value,
                                  const uint8_t* mask, bool causal, float scale, void* out, float* log_sum, void* grad,
                                  void* grad_query, void* grad_key, void* grad_value, int threads) {
#ifdef FT_X86
  using namespace finetune;
  if (!block_product(level())) return false;
  const Shape shape{sizes[0], sizes[1], sizes[2], sizes[3], sizes[4], sizes[5]};
  Backward problem{{shape, {}, heads(query, strides), heads(key, strides + 3), heads(value, strides + 6),
                    heads(out, strides + 9), log_sum, scale},
                   heads(grad, strides + 14), heads(grad_query, strides + 17), heads(grad_key, strides + 20),
                   heads(grad_value, strides + 23)};
  void* table = mask ? scratch(SLOT_INPUT, mask_bytes(shape)) : nullptr;
  if (mask && !table) return false;
  read_mask(shape, mask, strides[12], strides[13], causal, table, &problem.forward.mask);
  return each_head(problem, shape, backward_bytes(shape), attend_backward, threads);
#else
  return false;
#endif
}
