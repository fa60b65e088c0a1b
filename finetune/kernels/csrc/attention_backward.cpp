// Attention backward over one key/value head; see attention.h. Everything here needs AVX512-BF16.
#include "attention.h"
#include "attention_math.h"

#ifdef FT_X86
namespace finetune {
namespace {

// What a thread works on. Names end in what lies along rows and columns; P stands for pairs in one word.
struct Arena {
  bf16 *key_KD, *value_KD, *key_DK;                        // of the whole head
  uint32_t *query_DQ, *grad_DQ, *query_QD, *grad_QD;       // a block of queries: pairs of features, pairs of queries
  float *score_KQ, *slope_KQ;                              // scores, and gradients of the probabilities
  bf16 *prob_KQ, *score_grad_KQ;                           // probabilities and gradients of the scores, by rows of keys
  uint32_t* score_grad_pairs;                              // the latter in pairs of keys
  float *grad_query_DQ, *grad_key_KD, *grad_value_KD;      // results, not scaled yet
  float *log_sum_Q, *delta_Q, *factor_Q;

  Arena(const Shape& shape, void* memory) {
    const int64_t d = shape.d(), keys = shape.keys();
    char* next = static_cast<char*>(memory);
    key_KD = take<bf16>(&next, keys * d);
    value_KD = take<bf16>(&next, keys * d);
    key_DK = take<bf16>(&next, d * (keys + 32));
    query_DQ = take<uint32_t>(&next, d / 2 * BLOCK);
    grad_DQ = take<uint32_t>(&next, d / 2 * BLOCK);
    query_QD = take<uint32_t>(&next, BLOCK / 2 * d);
    grad_QD = take<uint32_t>(&next, BLOCK / 2 * d);
    score_KQ = take<float>(&next, BLOCK * BLOCK);
    slope_KQ = take<float>(&next, BLOCK * BLOCK);
    prob_KQ = take<bf16>(&next, BLOCK * BLOCK);
    score_grad_KQ = take<bf16>(&next, BLOCK * BLOCK);
    score_grad_pairs = take<uint32_t>(&next, BLOCK / 2 * BLOCK);
    grad_query_DQ = take<float>(&next, d * BLOCK);
    grad_key_KD = take<float>(&next, keys * d);
    grad_value_KD = take<float>(&next, keys * d);
    log_sum_Q = take<float>(&next, BLOCK);
    delta_Q = take<float>(&next, BLOCK);
    factor_Q = take<float>(&next, BLOCK);
    end = next;
  }
  char* end;
};

// delta[q] = sum over features of grad * out: what every gradient of a probability of q is measured against.
FT_TARGET_AVX512_BF16 float dot_row(const bf16* a, const bf16* b, int64_t D) {
  __m512 sum = _mm512_setzero_ps();
  for (int64_t f = 0; f < D; f += 16) {
    const __mmask16 present = D - f >= 16 ? 0xffff : static_cast<__mmask16>((1u << (D - f)) - 1);
    const __m512i x = _mm512_slli_epi32(_mm512_cvtepu16_epi32(_mm256_maskz_loadu_epi16(present, a + f)), 16);
    const __m512i y = _mm512_slli_epi32(_mm512_cvtepu16_epi32(_mm256_maskz_loadu_epi16(present, b + f)), 16);
    sum = _mm512_fmadd_ps(_mm512_castsi512_ps(x), _mm512_castsi512_ps(y), sum);
  }
  return _mm512_reduce_add_ps(sum);
}

// For 16 queries and a block of keys: probabilities from scores, gradients of the scores from those of probabilities.
FT_TARGET_AVX512_BF16 void slopes(const Arena& a, const uint64_t* bits, float scale, int64_t q) {
  const __m512 factor = _mm512_set1_ps(scale), log_sum = _mm512_loadu_ps(a.log_sum_Q + q);
  const __m512 delta = _mm512_loadu_ps(a.delta_Q + q);
  for (int64_t k = 0; k < BLOCK; k += 2) {
    __m512 prob[2], grad[2];
#pragma GCC unroll 2
    for (int64_t i = 0; i < 2; ++i) {
      const int64_t at = (k + i) * BLOCK + q;
      prob[i] = exp2_16(_mm512_fmsub_ps(factor, _mm512_loadu_ps(a.score_KQ + at), log_sum));
      if (bits) prob[i] = _mm512_maskz_mov_ps(static_cast<__mmask16>(bits[k + i] >> q), prob[i]);
      grad[i] = _mm512_mul_ps(prob[i], _mm512_sub_ps(_mm512_loadu_ps(a.slope_KQ + at), delta));
    }
    const __m512i score_grad = halves(grad[0], grad[1]);
    store_halves(halves(prob[0], prob[1]), a.prob_KQ + k * BLOCK + q, a.prob_KQ + (k + 1) * BLOCK + q);
    store_halves(score_grad, a.score_grad_KQ + k * BLOCK + q, a.score_grad_KQ + (k + 1) * BLOCK + q);
    _mm512_storeu_si512(a.score_grad_pairs + k / 2 * BLOCK + q, words(score_grad));
  }
}

// Packs a block of queries with its gradient, and takes from the forward what its softmax needs.
void load_block(const Backward& problem, const Arena& a, int64_t b, int64_t h, int64_t first) {
  const Forward& forward = problem.forward;
  const Shape& shape = forward.shape;
  const int64_t rows = shape.Q - first < BLOCK ? shape.Q - first : BLOCK;
  const bf16 *query = forward.query.at(b, h, first), *grad = problem.grad.at(b, h, first);
  pack_feature_pairs(query, forward.query.position, rows, shape.D, a.query_DQ);
  pack_feature_pairs(grad, problem.grad.position, rows, shape.D, a.grad_DQ);
  pack_row_pairs(query, forward.query.position, rows, shape.D, a.query_QD);
  pack_row_pairs(grad, problem.grad.position, rows, shape.D, a.grad_QD);
  const float* log_sum = forward.log_sum + (b * shape.H + h) * shape.Q + first;
  for (int64_t q = 0; q < BLOCK; ++q) {
    const bool real = q < rows;
    // Queries that are not there, or see nothing, get probabilities of zero.
    a.log_sum_Q[q] = real && log_sum[q] < INFINITY ? log_sum[q] * LOG2E : -NEVER;
    a.delta_Q[q] = real ? dot_row(grad + q * problem.grad.position, forward.out.at(b, h, first + q), shape.D) : 0;
    a.factor_Q[q] = forward.scale;
  }
}

void block_backward(const Backward& problem, BlockProduct product, const Arena& a, int64_t b, int64_t h,
                    int64_t query_block) {
  const Forward& forward = problem.forward;
  const Shape& shape = forward.shape;
  const int64_t d = shape.d(), first = query_block * BLOCK, ld = shape.keys() + 32;
  load_block(problem, a, b, h, first);
  std::memset(a.grad_query_DQ, 0, d * BLOCK * sizeof(float));
  for (int64_t j = 0; j < shape.key_blocks(); ++j) {
    const uint64_t* bits = nullptr;
    if (forward.mask.sight(shape, b, query_block, j, &bits) == NONE) continue;
    product(BLOCK, BLOCK, d, a.key_KD + j * BLOCK * d, d, a.query_DQ, BLOCK, a.score_KQ, BLOCK, false);
    product(BLOCK, BLOCK, d, a.value_KD + j * BLOCK * d, d, a.grad_DQ, BLOCK, a.slope_KQ, BLOCK, false);
    for (int64_t q = 0; q < BLOCK; q += 16) slopes(a, bits, forward.scale * LOG2E, q);
    product(BLOCK, d, BLOCK, a.prob_KQ, BLOCK, a.grad_QD, d, a.grad_value_KD + j * BLOCK * d, d, true);
    product(BLOCK, d, BLOCK, a.score_grad_KQ, BLOCK, a.query_QD, d, a.grad_key_KD + j * BLOCK * d, d, true);
    product(d, BLOCK, BLOCK, a.key_DK + j * BLOCK, ld, a.score_grad_pairs, BLOCK, a.grad_query_DQ, BLOCK, true);
  }
  const int64_t rows = shape.Q - first < BLOCK ? shape.Q - first : BLOCK;
  unpack_transposed(a.grad_query_DQ, a.factor_Q, problem.grad_query.at(b, h, first), problem.grad_query.position, rows,
                    shape.D);
}

}  // namespace

size_t backward_bytes(const Shape& shape) { return reinterpret_cast<size_t>(Arena(shape, nullptr).end); }

void attend_backward(const Backward& problem, BlockProduct product, int64_t b, int64_t g, void* memory) {
  const Forward& forward = problem.forward;
  const Shape& shape = forward.shape;
  const Arena a(shape, memory);
  const int64_t d = shape.d(), keys = shape.keys(), group = shape.H / shape.G;
  const bf16 *key = forward.key.at(b, g, 0), *value = forward.value.at(b, g, 0);
  pack_rows(key, forward.key.position, shape.K, keys, shape.D, a.key_KD);
  pack_rows(value, forward.value.position, shape.K, keys, shape.D, a.value_KD);
  pack_transposed(key, forward.key.position, shape.K, keys, shape.D, a.key_DK, keys + 32);
  std::memset(a.grad_key_KD, 0, keys * d * sizeof(float));
  std::memset(a.grad_value_KD, 0, keys * d * sizeof(float));
  for (int64_t h = g * group; h < (g + 1) * group; ++h)
    for (int64_t i = 0; i < shape.query_blocks(); ++i) block_backward(problem, product, a, b, h, i);
  const Heads &to_key = problem.grad_key, &to_value = problem.grad_value;
  unpack_rows(a.grad_key_KD, d, forward.scale, to_key.at(b, g, 0), to_key.position, shape.K, shape.D);
  unpack_rows(a.grad_value_KD, d, 1.0f, to_value.at(b, g, 0), to_value.position, shape.K, shape.D);
}

}  // namespace finetune
#endif
