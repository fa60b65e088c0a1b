// The quantizer of the 4-bit codebooks: codes and absmax with the bits of finetune/kernels/reference.py.
//
// u = w / max|w| (by the reciprocal; the last short block divides), code = the nearest table entry, a tie to the lower
// one: the number of midpoints below u, found by 15 comparisons without a branch, which compilers turn into vectors of
// whatever width the target has. A NaN counts as above them all, and makes its block's absmax NaN.
#include "codebook4.h"

namespace finetune {
namespace {

constexpr int64_t LARGEST_BLOCK = 4096;
constexpr float TINY = 1e-38f;  // keeps 1 / absmax finite for blocks of zeros

struct Quantizer {
  const float* midpoints;  // [15], ascending
  const uint8_t* order;    // [16], the codes of the table's entries in ascending order
  int64_t block_size;
  const void* weight;
  DType dtype;
  uint8_t* codes;
  float* absmax;
};

inline __attribute__((always_inline)) float from_f16(f16 value) {
  uint32_t sign = (value & 0x8000u) << 16, rest = static_cast<uint32_t>(value & 0x7fffu) << 13;
  float result;
  if (rest >= 0x0f800000u) {  // infinity, NaN
    rest |= 0x7f800000u;
    std::memcpy(&result, &rest, 4);
  } else {
    std::memcpy(&result, &rest, 4);
    result *= 0x1p112f;  // the difference of the exponents' biases; exact, subnormals included
  }
  uint32_t bits;
  std::memcpy(&bits, &result, 4);
  bits |= sign;
  std::memcpy(&result, &bits, 4);
  return result;
}

// Weights [start, start + count) as float32, in `room` where they are stored otherwise.
inline __attribute__((always_inline)) const float* widened(const Quantizer& q, int64_t start, int64_t count,
                                                           float* room) {
  if (q.dtype == F32) return static_cast<const float*>(q.weight) + start;
  const uint16_t* half = static_cast<const uint16_t*>(q.weight) + start;
  if (q.dtype == BF16)
    for (int64_t i = 0; i < count; ++i) room[i] = from_bf16(half[i]);
  else
    for (int64_t i = 0; i < count; ++i) room[i] = from_f16(half[i]);
  return room;
}

// One block; `count` is less than the block size for the last short one.
inline __attribute__((always_inline)) void encode_block(const Quantizer& q, int64_t block, int64_t count) {
  float room[LARGEST_BLOCK];
  const int64_t start = block * q.block_size;
  const float* w = widened(q, start, count, room);
  int32_t largest = 0;  // the bits of |w|: ordered as the values are, NaN above infinity
  for (int64_t i = 0; i < count; ++i) {
    int32_t bits;
    std::memcpy(&bits, w + i, 4);
    bits &= 0x7fffffff;
    largest = bits > largest ? bits : largest;
  }
  float absmax;
  std::memcpy(&absmax, &largest, 4);
  const float divisor = absmax < TINY ? TINY : absmax;
  const bool whole = count == q.block_size;
  q.absmax[block] = whole ? absmax : divisor;
  float unit[LARGEST_BLOCK + 1];
  unit[count] = 0.0f;  // the other half of the last byte of an odd count
  if (whole) {
    const float factor = 1.0f / divisor;
    for (int64_t i = 0; i < count; ++i) unit[i] = w[i] * factor;
  } else {
    for (int64_t i = 0; i < count; ++i) unit[i] = w[i] / divisor;
  }
  float midpoints[15];
  std::memcpy(midpoints, q.midpoints, sizeof(midpoints));
  int32_t ranks[LARGEST_BLOCK + 1];
  for (int64_t i = 0; i < count + (count & 1); ++i) {
    int32_t rank = 0;
#pragma GCC unroll 15
    for (int m = 0; m < 15; ++m) rank += !(unit[i] <= midpoints[m]);
    ranks[i] = rank;
  }
  uint8_t* codes = q.codes + (start >> 1);
  for (int64_t i = 0; i < count; i += 2)
    codes[i >> 1] = static_cast<uint8_t>(q.order[ranks[i]] << 4 | q.order[ranks[i + 1]]);
}

inline __attribute__((always_inline)) void encode_blocks(const Quantizer& q, int64_t begin, int64_t end, int64_t N) {
  for (int64_t block = begin; block < end; ++block) {
    int64_t left = N - block * q.block_size;
    encode_block(q, block, left < q.block_size ? left : q.block_size);
  }
}

void encode_scalar(const Quantizer& q, int64_t begin, int64_t end, int64_t N) { encode_blocks(q, begin, end, N); }
#ifdef FT_X86
FT_TARGET_AVX2 void encode_avx2(const Quantizer& q, int64_t begin, int64_t end, int64_t N) {
  encode_blocks(q, begin, end, N);
}
FT_TARGET_AVX512 void encode_avx512(const Quantizer& q, int64_t begin, int64_t end, int64_t N) {
  encode_blocks(q, begin, end, N);
}
#endif

void encode(const Quantizer& q, int64_t begin, int64_t end, int64_t N) {
#ifdef FT_X86
  if (level() >= AVX512) return encode_avx512(q, begin, end, N);
  if (level() >= AVX2) return encode_avx2(q, begin, end, N);
#endif
  encode_scalar(q, begin, end, N);
}

}  // namespace
}  // namespace finetune

// Encodes weight[count] of type `dtype` to codes[ceil(count / 2)] and absmax[ceil(count / block_size)]; an odd count
// ends in the code of 0.
FT_API void ft_quantize_codebook4(const void* weight, int32_t dtype, int64_t count, int32_t block_size,
                                  const float* midpoints, const uint8_t* order, uint8_t* codes, float* absmax,
                                  int32_t threads) {
  using namespace finetune;
  Quantizer q{midpoints, order, block_size, weight, static_cast<DType>(dtype), codes, absmax};
  constexpr int64_t CHUNK = 1 << 14, WORTH = 1 << 16;  // weights handed out together; weights that pay for a team
  int64_t blocks = (count + block_size - 1) / block_size, together = CHUNK / block_size;
#pragma omp parallel for schedule(static) num_threads(count < WORTH ? 1 : threads)
  for (int64_t b = 0; b < blocks; b += together) encode(q, b, b + together < blocks ? b + together : blocks, count);
}
