// The int32 product of int8 codes for few rows of the input, by VNNI; many rows are the vendor's.
//
// Shape legend: M rows of the input, O out features, I in features. The instruction wants one operand unsigned: the
// weight is, by 128 more than its code, and 128 times the sum of a row of the input is taken off at the end. All sums are
// exact modulo 2^32, and so is the result, which int32 holds while I < 2^31 / 127^2.
#include <algorithm>

#include "integer.h"

namespace finetune {
namespace {

#ifdef FT_X86

constexpr int64_t STEP = 64;  // columns of a register
constexpr int64_t TALL = 8;   // rows of the input at a time

struct Codes {
  const int8_t* x;  // [M, stride], zeros beyond I
  const int32_t* sums;  // [M], 128 times the sum of a row
  const int8_t* w;  // [O, I]
  int32_t* y;       // [M, O]
  int64_t M, O, I, stride;
};

// Rows m .. m + ROWS of the input by rows o and o + 1 of the weight (the same one twice at an odd end).
template <int ROWS>
FT_TARGET_AVX512_BF16 void pair(const Codes& job, int64_t m, int64_t o) {
  const int64_t second = std::min(o + 1, job.O - 1);
  const int8_t *w0 = job.w + o * job.I, *w1 = job.w + second * job.I, *x = job.x + m * job.stride;
  const __m512i flip = _mm512_set1_epi8(-128);
  __m512i sum0[ROWS], sum1[ROWS];
  for (int r = 0; r < ROWS; ++r) sum0[r] = sum1[r] = _mm512_setzero_si512();
  int64_t i = 0;
  for (; i + STEP <= job.I; i += STEP) {
    __m512i a = _mm512_xor_si512(_mm512_loadu_si512(w0 + i), flip);
    __m512i b = _mm512_xor_si512(_mm512_loadu_si512(w1 + i), flip);
    for (int r = 0; r < ROWS; ++r) {
      __m512i codes = _mm512_load_si512(x + r * job.stride + i);
      sum0[r] = _mm512_dpbusd_epi32(sum0[r], a, codes);
      sum1[r] = _mm512_dpbusd_epi32(sum1[r], b, codes);
    }
  }
  if (i < job.I) {
    __mmask64 lanes = (uint64_t{1} << (job.I - i)) - 1;
    __m512i a = _mm512_xor_si512(_mm512_maskz_loadu_epi8(lanes, w0 + i), flip);
    __m512i b = _mm512_xor_si512(_mm512_maskz_loadu_epi8(lanes, w1 + i), flip);
    for (int r = 0; r < ROWS; ++r) {
      __m512i codes = _mm512_load_si512(x + r * job.stride + i);
      sum0[r] = _mm512_dpbusd_epi32(sum0[r], a, codes);
      sum1[r] = _mm512_dpbusd_epi32(sum1[r], b, codes);
    }
  }
  for (int r = 0; r < ROWS; ++r) {
    job.y[(m + r) * job.O + o] = _mm512_reduce_add_epi32(sum0[r]) - job.sums[m + r];
    job.y[(m + r) * job.O + second] = _mm512_reduce_add_epi32(sum1[r]) - job.sums[m + r];
  }
}

using Pair = void (*)(const Codes&, int64_t, int64_t);
constexpr Pair PAIRS[TALL] = {pair<1>, pair<2>, pair<3>, pair<4>, pair<5>, pair<6>, pair<7>, pair<8>};

// The codes with rows on cache lines and 128 times their sums. Null where there is no memory.
bool prepare(const int8_t* x, Codes& job) {
  const size_t bytes = static_cast<size_t>(job.M * job.stride);
  int8_t* rows = static_cast<int8_t*>(scratch(SLOT_INPUT, bytes + static_cast<size_t>(job.M) * sizeof(int32_t)));
  if (!rows) return false;
  int32_t* sums = reinterpret_cast<int32_t*>(rows + bytes);
  for (int64_t m = 0; m < job.M; ++m) {
    std::memcpy(rows + m * job.stride, x + m * job.I, static_cast<size_t>(job.I));
    std::memset(rows + m * job.stride + job.I, 0, static_cast<size_t>(job.stride - job.I));
    int32_t sum = 0;
    for (int64_t i = 0; i < job.I; ++i) sum += x[m * job.I + i];
    sums[m] = 128 * sum;
  }
  job.x = rows;
  job.sums = sums;
  return true;
}
#endif

}  // namespace
}  // namespace finetune

// y[M, O] = x[M, I] @ w[O, I].T in int32, exact. 0 where this CPU cannot, or many rows are better left to others.
FT_API int32_t ft_int8_product(const int8_t* x, const int8_t* w, int32_t* y, int64_t M, int64_t O, int64_t I,
                               int32_t threads) {
#ifdef FT_X86
  using namespace finetune;
  const int64_t most_rows = level() == AMX ? 12 : 32;  // where the vendor's product begins to be faster
  constexpr int64_t MOST_COLUMNS = 133144;             // 2^31 / 127^2
  if (level() < AVX512_BF16 || M > most_rows || I > MOST_COLUMNS) return 0;
  // An odd number of cache lines between rows, so that they do not share their sets.
  Codes job{nullptr, nullptr, w, y, M, O, I, ((I + STEP - 1) / STEP | 1) * STEP};
  if (!prepare(x, job)) return 0;
#pragma omp parallel for schedule(static) num_threads(threads) if (O * I > 65536)
  for (int64_t pair = 0; pair < (O + 1) / 2; ++pair)
    for (int64_t m = 0; m < M; m += TALL) PAIRS[std::min(TALL, M - m) - 1](job, m, 2 * pair);
  return 1;
#else
  return 0;
#endif
}
