// Weights of which only what is not zero is kept: decoding, as kernels/sparse.py does, and products by the engines.
//
// Both layouts come down to a mask of 32 columns and the next values, which are spread over the lanes of the mask.
//
// Shape legend: M rows of the input, O out features (rows), I in features, P bytes of a row's places.
#include <algorithm>

#include "elementwise.h"
#include "engine.h"
#include "half.h"

namespace finetune {

// A weight [O, I]; kernels/cpu_sparse.py has the same fields.
struct Sparse {
  const uint8_t* places;   // [O, P]
  const void* values;      // of value_type
  const int64_t* offsets;  // [O], of a row's first value; null for groups, whose rows have as many each
  int64_t in_features;
  int64_t bytes;       // P
  int32_t kept;        // of each group; 0 for a bitmask
  int32_t group;       // 4, 8 or 16 inputs; 0 for a bitmask
  int32_t place_bits;  // 2, 3 or 4
  int32_t value_type;
};

namespace {

constexpr int64_t LANES = 32;

enum Layout : int32_t { BITMASK, GROUPS, TWO_OF_FOUR };

Layout layout_of(const Sparse& w) { return !w.group ? BITMASK : w.group == 4 && w.kept == 2 ? TWO_OF_FOUR : GROUPS; }

FT_INLINE int count_of(uint32_t mask) { return __builtin_popcount(mask); }
FT_INLINE uint32_t first(int64_t count) { return count >= 32 ? 0xffffffffu : (1u << count) - 1; }

// Four bytes of a row from one on; 0 beyond it.
FT_INLINE uint32_t word_at(const Sparse& w, int64_t row, int64_t byte) {
  uint32_t word = 0;
  const uint8_t* at = w.places + row * w.bytes + byte;
  if (byte + 4 <= w.bytes)
    std::memcpy(&word, at, 4);
  else
    for (int64_t b = 0; byte + b < w.bytes; ++b) word |= static_cast<uint32_t>(at[b]) << (8 * b);
  return word;
}

// Of each byte with the places of two groups, its eight columns.
struct TwoOfFour {
  uint8_t masks[256];
  TwoOfFour() {
    for (int byte = 0; byte < 256; ++byte) {
      const int low = 1 << (byte & 3) | 1 << (byte >> 2 & 3), high = 1 << (byte >> 4 & 3) | 1 << (byte >> 6);
      masks[byte] = static_cast<uint8_t>(low | high << 4);
    }
  }
};
const TwoOfFour two_of_four;

// Which of the columns [column, column + 32) of a row are kept; of the last ones only `columns` are there.
template <Layout LAYOUT>
FT_INLINE uint32_t mask_at(const Sparse& w, int64_t row, int64_t column, int64_t columns) {
  if (LAYOUT == BITMASK) return word_at(w, row, column / 8);
  if (LAYOUT == TWO_OF_FOUR) {
    const uint32_t places = word_at(w, row, column / 8);
    const uint8_t* masks = two_of_four.masks;
    const uint32_t low = masks[places & 255] | static_cast<uint32_t>(masks[places >> 8 & 255]) << 8;
    const uint32_t high = masks[places >> 16 & 255] | static_cast<uint32_t>(masks[places >> 24]) << 8;
    return (low | high << 16) & first(columns);
  }
  const uint8_t* places = w.places + row * w.bytes;
  int64_t bit = column / w.group * w.kept * w.place_bits;
  uint32_t mask = 0;
  for (int64_t start = 0; start < columns; start += w.group)
    for (int32_t k = 0; k < w.kept; ++k, bit += w.place_bits) {
      uint32_t byte = places[bit >> 3];
      const int32_t shift = static_cast<int32_t>(bit & 7);
      if (shift + w.place_bits > 8) byte |= static_cast<uint32_t>(places[(bit >> 3) + 1]) << 8;
      mask |= 1u << (start + (byte >> shift & ((1u << w.place_bits) - 1)));
    }
  return mask;
}

// Values of a row before a column.
template <Layout LAYOUT>
FT_INLINE int64_t before(const Sparse& w, int64_t row, int64_t column) {
  if (LAYOUT != BITMASK) return (row * w.in_features + column) / w.group * w.kept;
  int64_t count = w.offsets[row];
  for (int64_t c = 0; c < column; c += LANES) count += count_of(word_at(w, row, c / 8));
  return count;
}

FT_INLINE float value_at(const Sparse& w, int64_t at) {
  if (w.value_type == F32) return static_cast<const float*>(w.values)[at];
  const uint16_t half = static_cast<const uint16_t*>(w.values)[at];
  return w.value_type == BF16 ? from_bf16(half) : from_f16(half);
}

// The three below write `columns` (at most 32) numbers to `out` from element `at` on: where the mask is set, the values
// from `next` on.
FT_INLINE void spread_scalar(const Sparse& w, uint32_t mask, int64_t next, int64_t columns, DType type, void* out,
                             int64_t at) {
  for (int64_t c = 0; c < columns; ++c, mask >>= 1) put(mask & 1 ? value_at(w, next++) : 0.0f, type, out, at + c);
}

#ifdef FT_X86

#define FT_TARGET_EXPAND \
  __attribute__((target("avx2,fma,f16c,avx512f,avx512bw,avx512vl,avx512dq,avx512vbmi,avx512vbmi2")))

FT_TARGET_AVX512 inline __m512 load_values(const Sparse& w, int64_t next, __mmask16 some) {
  if (w.value_type == F32) return _mm512_maskz_loadu_ps(some, static_cast<const float*>(w.values) + next);
  const __m256i half = _mm256_maskz_loadu_epi16(some, static_cast<const uint16_t*>(w.values) + next);
  if (w.value_type == F16) return _mm512_cvtph_ps(half);
  return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(half), 16));
}

FT_TARGET_AVX512 FT_INLINE void spread_avx512(const Sparse& w, uint32_t mask, int64_t next, int64_t columns, DType type,
                                              void* out, int64_t at) {
  for (int64_t c = 0; c < columns; c += 16, mask >>= 16) {
    const __mmask16 here = static_cast<__mmask16>(mask);
    const __mmask16 lanes = static_cast<__mmask16>(first(std::min<int64_t>(16, columns - c)));
    const int count = count_of(here);
    const __m512 numbers = _mm512_maskz_expand_ps(here, load_values(w, next, static_cast<__mmask16>(first(count))));
    if (type == F32)
      _mm512_mask_storeu_ps(static_cast<float*>(out) + at + c, lanes, numbers);
    else
      _mm256_mask_storeu_epi16(static_cast<uint16_t*>(out) + at + c, lanes, round16(numbers, type));
    next += count;
  }
}

// Values of 16 bits as they are.
FT_TARGET_EXPAND FT_INLINE void spread_halves(const Sparse& w, uint32_t mask, int64_t next, int64_t columns, DType,
                                              void* out, int64_t at) {
  const uint16_t* values = static_cast<const uint16_t*>(w.values) + next;
  const __m512i numbers = _mm512_maskz_expand_epi16(mask, _mm512_maskz_loadu_epi16(first(count_of(mask)), values));
  _mm512_mask_storeu_epi16(static_cast<uint16_t*>(out) + at, first(columns), numbers);
}

#endif

// Decodes columns [column, column + columns) of a row to `out`; the first one is a multiple of 32.
using Decode = void (*)(const Sparse& w, int64_t row, int64_t column, int64_t columns, DType type, void* out);

#define FT_DECODE(name, TARGET, spread)                                                                       \
  template <Layout LAYOUT>                                                                                    \
  TARGET void name(const Sparse& w, int64_t row, int64_t column, int64_t columns, DType type, void* out) {    \
    int64_t next = before<LAYOUT>(w, row, column);                                                            \
    for (int64_t c = 0; c < columns; c += LANES) {                                                            \
      const int64_t count = std::min(LANES, columns - c);                                                     \
      const uint32_t mask = mask_at<LAYOUT>(w, row, column + c, count);                                       \
      spread(w, mask, next, count, type, out, c);                                                             \
      next += LAYOUT == BITMASK ? count_of(mask) : count / w.group * w.kept;                                  \
    }                                                                                                         \
  }

FT_DECODE(decode_scalar, , spread_scalar)
#ifdef FT_X86
FT_DECODE(decode_avx512, FT_TARGET_AVX512, spread_avx512)
FT_DECODE(decode_halves, FT_TARGET_EXPAND, spread_halves)
#endif

template <Layout LAYOUT>
Decode decode_by(const Sparse& w, DType type) {
#ifdef FT_X86
  static const bool expands = __builtin_cpu_supports("avx512vbmi2");
  if (level() >= AVX512_BF16 && expands && type != F32 && w.value_type == type) return decode_halves<LAYOUT>;
  if (level() >= AVX512) return decode_avx512<LAYOUT>;
#endif
  return decode_scalar<LAYOUT>;
}

Decode decode_of(const Sparse& w, DType type) {
  switch (layout_of(w)) {
    case BITMASK:
      return decode_by<BITMASK>(w, type);
    case TWO_OF_FOUR:
      return decode_by<TWO_OF_FOUR>(w, type);
    default:
      return decode_by<GROUPS>(w, type);
  }
}

void panel(const void* weight, int64_t row, int64_t rows, int64_t column, int64_t columns, bf16* out, int64_t stride) {
  const Sparse& w = *static_cast<const Sparse*>(weight);
  const Decode decode = decode_of(w, BF16);
  for (int64_t r = 0; r < rows; ++r) decode(w, row + r, column, columns, BF16, out + r * stride);
}

FT_INLINE void count_rows(const uint8_t* places, int64_t rows, int64_t bytes, int64_t* counts) {
  for (int64_t row = 0; row < rows; ++row) {
    const uint8_t* at = places + row * bytes;
    int64_t count = 0, b = 0;
    for (; b + 8 <= bytes; b += 8) {
      uint64_t bits;
      std::memcpy(&bits, at + b, 8);
      count += __builtin_popcountll(bits);
    }
    for (; b < bytes; ++b) count += __builtin_popcount(at[b]);
    counts[row] = count;
  }
}

#ifdef FT_X86
FT_TARGET_AVX2 void count_rows_avx2(const uint8_t* places, int64_t rows, int64_t bytes, int64_t* counts) {
  count_rows(places, rows, bytes, counts);
}
#endif

}  // namespace
}  // namespace finetune

// How many weights each row of a bitmask [rows, bytes] keeps.
FT_API void ft_sparse_counts(const uint8_t* places, int64_t rows, int64_t bytes, int64_t* counts) {
#ifdef FT_X86
  if (finetune::level() >= finetune::AVX2) return finetune::count_rows_avx2(places, rows, bytes, counts);
#endif
  finetune::count_rows(places, rows, bytes, counts);
}

// Decodes `rows` rows to `out` [rows, in_features] in a DType.
FT_API void ft_sparse_decode(const finetune::Sparse* w, int64_t rows, int32_t type, void* out, int32_t threads) {
  using namespace finetune;
  const DType kind = static_cast<DType>(type);
  const Decode decode = decode_of(*w, kind);
  const int64_t size = kind == F32 ? 4 : 2;
#pragma omp parallel for schedule(static) num_threads(threads) if (rows * w->in_features > 65536)
  for (int64_t row = 0; row < rows; ++row)
    decode(*w, row, 0, w->in_features, kind, static_cast<char*>(out) + row * w->in_features * size);
}

FT_PRODUCTS(sparse, finetune::Sparse, finetune::panel)
