// llama.cpp's blocks of 32 weights: decoding, bit for bit what kernels/ggml.py gives, and products by the engines.
//
// Shape legend: M rows of the input, O out features (rows), I in features, P bytes of a row, K weights kept aside.
#include <algorithm>

#include "engine.h"
#include "half.h"

namespace finetune {

// A weight [O, I] as kernels/ggml.py lays it out; kernels/cpu_ggml.py has the same fields.
struct Ggml {
  const uint8_t* blocks;  // [O, P]
  const uint8_t* places;  // [O, K] in their blocks, or null
  const f16* values;      // [O, K]
  int64_t in_features;
  int64_t bytes;  // P
  int64_t aside;  // weights of a block that are kept aside
  int32_t size;   // bytes of a block
  int32_t bits;   // 4, 5 or 8
  int32_t least;  // whether a block has a least value
};

namespace {

constexpr int64_t WEIGHTS = 32;

inline uint16_t half_at(const uint8_t* at) { return static_cast<uint16_t>(at[0] | at[1] << 8); }

// Where the parts of a block lie behind its scale.
template <int BITS, bool LEAST>
struct Parts {
  static constexpr int64_t FIFTH = LEAST ? 4 : 2, CODES = FIFTH + (BITS == 5 ? 4 : 0);
};

// One block's first `count` weights, from element `at` of `out` on.
template <int BITS, bool LEAST>
void decode_scalar(const uint8_t* block, int64_t count, DType type, void* out, int64_t at) {
  using Of = Parts<BITS, LEAST>;
  const float scale = from_f16(half_at(block)), least = LEAST ? from_f16(half_at(block + 2)) : 0.0f;
  const uint8_t* codes = block + Of::CODES;
  for (int64_t j = 0; j < count; ++j) {
    int32_t code = BITS == 8 ? static_cast<int8_t>(codes[j]) : j < 16 ? codes[j] & 15 : codes[j - 16] >> 4;
    if (BITS == 5) code |= (block[Of::FIFTH + j / 8] >> (j % 8) & 1) << 4;
    if (BITS != 8 && !LEAST) code -= 1 << (BITS - 1);
    float value = static_cast<float>(code) * scale;
    if (LEAST) value = value + least;
    put(value, type, out, at + j);
  }
}

#ifdef FT_X86

template <int BITS, bool LEAST>
FT_TARGET_AVX512 inline __m512 values_of(__m128i codes, __m512 scale, __m512 least) {
  __m512i wide = BITS == 8 ? _mm512_cvtepi8_epi32(codes) : _mm512_cvtepu8_epi32(codes);
  if (BITS != 8 && !LEAST) wide = _mm512_sub_epi32(wide, _mm512_set1_epi32(1 << (BITS - 1)));
  const __m512 product = _mm512_mul_ps(_mm512_cvtepi32_ps(wide), scale);
  return LEAST ? _mm512_add_ps(product, least) : product;
}

// The block's 32 weights in two halves.
template <int BITS, bool LEAST>
FT_TARGET_AVX512 inline void decode_block(const uint8_t* block, __m512& first, __m512& second) {
  using Of = Parts<BITS, LEAST>;
  const __m512 scale = _mm512_set1_ps(_cvtsh_ss(half_at(block)));
  const __m512 least = LEAST ? _mm512_set1_ps(_cvtsh_ss(half_at(block + 2))) : _mm512_setzero_ps();
  const __m128i* codes = reinterpret_cast<const __m128i*>(block + Of::CODES);
  __m128i low = _mm_loadu_si128(codes), high;
  if (BITS == 8) {
    high = _mm_loadu_si128(codes + 1);
  } else {
    const __m128i nibble = _mm_set1_epi8(15);
    high = _mm_and_si128(_mm_srli_epi16(low, 4), nibble);
    low = _mm_and_si128(low, nibble);
  }
  if (BITS == 5) {
    uint32_t fifth;
    std::memcpy(&fifth, block + Of::FIFTH, 4);
    const __m128i sixteen = _mm_set1_epi8(16);
    low = _mm_mask_add_epi8(low, static_cast<__mmask16>(fifth), low, sixteen);
    high = _mm_mask_add_epi8(high, static_cast<__mmask16>(fifth >> 16), high, sixteen);
  }
  first = values_of<BITS, LEAST>(low, scale, least);
  second = values_of<BITS, LEAST>(high, scale, least);
}

template <int BITS, bool LEAST>
FT_TARGET_AVX512 void decode_avx512(const uint8_t* block, int64_t count, DType type, void* out, int64_t at) {
  __m512 first, second;
  decode_block<BITS, LEAST>(block, first, second);
  const uint32_t lanes = count >= WEIGHTS ? 0xffffffffu : (1u << count) - 1;
  if (type == F32) {
    float* to = static_cast<float*>(out) + at;
    _mm512_mask_storeu_ps(to, static_cast<__mmask16>(lanes), first);
    _mm512_mask_storeu_ps(to + 16, static_cast<__mmask16>(lanes >> 16), second);
    return;
  }
  const __m512i both =
      _mm512_inserti64x4(_mm512_castsi256_si512(round16(first, type)), round16(second, type), 1);
  _mm512_mask_storeu_epi16(static_cast<uint16_t*>(out) + at, lanes, both);
}

// Whole blocks to bf16. The instruction takes what is below 2^-126 for zero: no value here is, but zero. The 16 values
// of a block of 4 bits are made once and looked up, in a table that repeats, so that bits above a code do no harm.
template <int BITS, bool LEAST>
FT_TARGET_AVX512_BF16 void decode_bf16(const uint8_t* block, int64_t, DType, void* out, int64_t at) {
  __m512i* to = reinterpret_cast<__m512i*>(static_cast<bf16*>(out) + at);
  if (BITS == 4) {
    const __m128i numbers = _mm_setr_epi8(0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15);
    const __m512 scale = _mm512_set1_ps(_cvtsh_ss(half_at(block)));
    const __m512 least = LEAST ? _mm512_set1_ps(_cvtsh_ss(half_at(block + 2))) : _mm512_setzero_ps();
    const __m256i values = (__m256i)_mm512_cvtneps_pbh(values_of<BITS, LEAST>(numbers, scale, least));
    const __m128i low = _mm_loadu_si128(reinterpret_cast<const __m128i*>(block + Parts<BITS, LEAST>::CODES));
    const __m512i codes = _mm512_cvtepu8_epi16(_mm256_set_m128i(_mm_srli_epi16(low, 4), low));
    _mm512_storeu_si512(to, _mm512_permutexvar_epi16(codes, _mm512_broadcast_i64x4(values)));
    return;
  }
  __m512 first, second;
  decode_block<BITS, LEAST>(block, first, second);
  _mm512_storeu_si512(to, (__m512i)_mm512_cvtne2ps_pbh(second, first));
}

#endif

using Decode = void (*)(const uint8_t* block, int64_t count, DType type, void* out, int64_t at);

// What decodes whole blocks, and what decodes the last one of a row that it does not fill.
struct Decoders {
  Decode whole, part;
};

template <int BITS, bool LEAST>
Decoders decoders(DType type) {
#ifdef FT_X86
  if (level() >= AVX512_BF16 && type == BF16) return {decode_bf16<BITS, LEAST>, decode_avx512<BITS, LEAST>};
  if (level() >= AVX512) return {decode_avx512<BITS, LEAST>, decode_avx512<BITS, LEAST>};
#endif
  return {decode_scalar<BITS, LEAST>, decode_scalar<BITS, LEAST>};
}

Decoders decoders_of(const Ggml& w, DType type) {
  if (w.bits == 4) return w.least ? decoders<4, true>(type) : decoders<4, false>(type);
  if (w.bits == 5) return w.least ? decoders<5, true>(type) : decoders<5, false>(type);
  return decoders<8, false>(type);
}

// Columns [column, column + columns) of a row, from a block's first one on.
void decode_row(const Ggml& w, const Decoders& by, int64_t row, int64_t column, int64_t columns, DType type, void* out) {
  int64_t block = column / WEIGHTS;
  const uint8_t* at = w.blocks + row * w.bytes + block * w.size;
  const int64_t kept = (row * (w.bytes / w.size) + block) * w.aside;
  const uint8_t* places = w.places + kept;
  const f16* values = w.values + kept;
  for (int64_t c = 0; c < columns; c += WEIGHTS, at += w.size) {
    const int64_t count = std::min(WEIGHTS, columns - c);
    (count == WEIGHTS ? by.whole : by.part)(at, count, type, out, c);
    for (int64_t k = 0; k < w.aside; ++k, ++places, ++values)
      if (*places < count) put(from_f16(*values), type, out, c + *places);
  }
}

// The engines come back for the rows below soon, each on a page of its own: what the CPU does not foresee.
constexpr int64_t ROWS_AHEAD = 8;

void panel(const void* weight, int64_t row, int64_t rows, int64_t column, int64_t columns, bf16* out, int64_t stride) {
  const Ggml& w = *static_cast<const Ggml*>(weight);
  const Decoders by = decoders_of(w, BF16);
  const uint8_t* ahead = w.blocks + (row + ROWS_AHEAD) * w.bytes + column / WEIGHTS * w.size;
  const int64_t bytes = columns / WEIGHTS * w.size;
  for (int64_t r = 0; r < rows; ++r, ahead += w.bytes) {
    for (int64_t b = 0; b < bytes; b += 64) __builtin_prefetch(ahead + b);
    decode_row(w, by, row + r, column, columns, BF16, out + r * stride);
  }
}

}  // namespace
}  // namespace finetune

// Decodes `rows` rows to `out` [rows, in_features] in a DType.
FT_API void ft_ggml_decode(const finetune::Ggml* w, int64_t rows, int32_t type, void* out, int32_t threads) {
  using namespace finetune;
  const DType kind = static_cast<DType>(type);
  const Decoders by = decoders_of(*w, kind);
  const int64_t size = kind == F32 ? 4 : 2;
#pragma omp parallel for schedule(static) num_threads(threads) if (rows * w->in_features > 65536)
  for (int64_t row = 0; row < rows; ++row)
    decode_row(*w, by, row, 0, w->in_features, kind, static_cast<char*>(out) + row * w->in_features * size);
}

FT_PRODUCTS(ggml, finetune::Ggml, finetune::panel)
