// Attention forward over one key/value head; see attention.h. Everything here needs AVX512-BF16.
#include "attention.h"
#include "attention_math.h"

#ifdef FT_X86
namespace finetune {
namespace {

// What a thread works on, carved out of one piece of memory.
struct Arena {
  bf16 *key_KD, *value_DK;      // the head's keys by rows, its values transposed
  uint32_t *query_DQ, *prob_KQ;  // a block of queries in pairs of features, of probabilities in pairs of keys
  float *score_KQ, *out_DQ;      // transposed scores of a block, transposed output
  float *most_Q, *sum_Q;         // running maximum of the scores, running sum of exponentials

  Arena(const Shape& shape, void* memory) {
    const int64_t d = shape.d(), keys = shape.keys();
    char* next = static_cast<char*>(memory);
    key_KD = take<bf16>(&next, keys * d);
    value_DK = take<bf16>(&next, d * (keys + 32));
    query_DQ = take<uint32_t>(&next, d / 2 * BLOCK);
    prob_KQ = take<uint32_t>(&next, BLOCK / 2 * BLOCK);
    score_KQ = take<float>(&next, BLOCK * BLOCK);
    out_DQ = take<float>(&next, d * BLOCK);
    most_Q = take<float>(&next, BLOCK);
    sum_Q = take<float>(&next, BLOCK);
    end = next;
  }
  char* end;
};

// The largest score of 16 queries among the keys of a block and `most`; scores not seen are put out of the way.
FT_TARGET_AVX512_BF16 inline __m512 largest(float* score_KQ, const uint64_t* bits, int64_t q, __m512 most) {
  const __m512 never = _mm512_set1_ps(NEVER);
  __m512 second = never;
  for (int64_t k = 0; k < BLOCK; k += 2) {
    float *even = score_KQ + k * BLOCK + q, *odd = even + BLOCK;
    __m512 a = _mm512_loadu_ps(even), b = _mm512_loadu_ps(odd);
    if (bits) {
      a = _mm512_mask_mov_ps(never, static_cast<__mmask16>(bits[k] >> q), a);
      b = _mm512_mask_mov_ps(never, static_cast<__mmask16>(bits[k + 1] >> q), b);
      _mm512_storeu_ps(even, a);
      _mm512_storeu_ps(odd, b);
    }
    most = _mm512_max_ps(most, a);
    second = _mm512_max_ps(second, b);
  }
  return _mm512_max_ps(most, second);
}

// Probabilities 2^(scale * score - reference) of 16 queries, as bf16 pairs of keys; returns their sum.
FT_TARGET_AVX512_BF16 inline __m512 exponentials(const float* score_KQ, int64_t q, __m512 scale, __m512 reference,
                                                 uint32_t* prob_KQ) {
  __m512 sum = _mm512_setzero_ps();
  for (int64_t k = 0; k < BLOCK; k += 2) {
    const float *even = score_KQ + k * BLOCK + q, *odd = even + BLOCK;
    const __m512 a = exp2_16(_mm512_fmsub_ps(_mm512_loadu_ps(even), scale, reference));
    const __m512 b = exp2_16(_mm512_fmsub_ps(_mm512_loadu_ps(odd), scale, reference));
    sum = _mm512_add_ps(sum, _mm512_add_ps(a, b));
    _mm512_storeu_si512(prob_KQ + k / 2 * BLOCK + q, words(halves(a, b)));
  }
  return sum;
}

// The online softmax of a block of keys: probabilities, running maximum and sum, and the output so far set to match.
FT_TARGET_AVX512_BF16 void soften(const Arena& a, const uint64_t* bits, float scale, int64_t d) {
  const __m512 factor = _mm512_set1_ps(scale);
  for (int64_t q = 0; q < BLOCK; q += 16) {
    const __m512 before = _mm512_loadu_ps(a.most_Q + q);
    const __m512 most = largest(a.score_KQ, bits, q, before);
    // A query that has seen nothing so far measures against 0, which makes all its probabilities zeros.
    const __mmask16 any = _mm512_cmp_ps_mask(most, _mm512_set1_ps(NEVER), _CMP_GT_OQ);
    const __m512 reference = _mm512_maskz_mul_ps(any, most, factor);
    const __m512 keep = exp2_16(_mm512_fmsub_ps(before, factor, reference));
    const __m512 sum = exponentials(a.score_KQ, q, factor, reference, a.prob_KQ);
    _mm512_storeu_ps(a.most_Q + q, most);
    _mm512_storeu_ps(a.sum_Q + q, _mm512_fmadd_ps(_mm512_loadu_ps(a.sum_Q + q), keep, sum));
    if (_mm512_cmp_ps_mask(keep, _mm512_set1_ps(1.0f), _CMP_NEQ_UQ))
      for (int64_t f = 0; f < d; ++f)
        _mm512_storeu_ps(a.out_DQ + f * BLOCK + q, _mm512_mul_ps(keep, _mm512_loadu_ps(a.out_DQ + f * BLOCK + q)));
  }
}

// Divides by the sums and hands out a block: the output, and the log-sum-exp for the backward.
FT_TARGET_AVX512_BF16 void finish(const Forward& problem, const Arena& a, int64_t b, int64_t h, int64_t first) {
  const Shape& shape = problem.shape;
  const int64_t rows = shape.Q - first < BLOCK ? shape.Q - first : BLOCK;
  float* log_sum = problem.log_sum + (b * shape.H + h) * shape.Q + first;
  for (int64_t q = 0; q < rows; ++q) {
    const float sum = a.sum_Q[q];
    log_sum[q] = sum > 0 ? a.most_Q[q] * problem.scale + std::log(sum) : INFINITY;
    a.sum_Q[q] = sum > 0 ? 1.0f / sum : 0.0f;
  }
  unpack_transposed(a.out_DQ, a.sum_Q, problem.out.at(b, h, first), problem.out.position, rows, shape.D);
}

void attend_block(const Forward& problem, BlockProduct product, const Arena& a, int64_t b, int64_t h,
                  int64_t query_block) {
  const Shape& shape = problem.shape;
  const int64_t d = shape.d(), first = query_block * BLOCK, ld = shape.keys() + 32;
  pack_feature_pairs(problem.query.at(b, h, first), problem.query.position, shape.Q - first, shape.D, a.query_DQ);
  std::memset(a.out_DQ, 0, d * BLOCK * sizeof(float));
  for (int64_t q = 0; q < BLOCK; ++q) a.most_Q[q] = NEVER, a.sum_Q[q] = 0;
  for (int64_t j = 0; j < shape.key_blocks(); ++j) {
    const uint64_t* bits = nullptr;
    if (problem.mask.sight(shape, b, query_block, j, &bits) == NONE) continue;
    product(BLOCK, BLOCK, d, a.key_KD + j * BLOCK * d, d, a.query_DQ, BLOCK, a.score_KQ, BLOCK, false);
    soften(a, bits, problem.scale * LOG2E, d);
    product(d, BLOCK, BLOCK, a.value_DK + j * BLOCK, ld, a.prob_KQ, BLOCK, a.out_DQ, BLOCK, true);
  }
  finish(problem, a, b, h, first);
}

}  // namespace

size_t forward_bytes(const Shape& shape) { return reinterpret_cast<size_t>(Arena(shape, nullptr).end); }

void attend(const Forward& problem, BlockProduct product, int64_t b, int64_t g, void* memory) {
  const Shape& shape = problem.shape;
  const Arena a(shape, memory);
  pack_rows(problem.key.at(b, g, 0), problem.key.position, shape.K, shape.keys(), shape.D, a.key_KD);
  pack_transposed(problem.value.at(b, g, 0), problem.value.position, shape.K, shape.keys(), shape.D, a.value_DK,
                  shape.keys() + 32);
  const int64_t group = shape.H / shape.G;
  for (int64_t h = g * group; h < (g + 1) * group; ++h)
    for (int64_t i = 0; i < shape.query_blocks(); ++i) attend_block(problem, product, a, b, h, i);
}

}  // namespace finetune
#endif
