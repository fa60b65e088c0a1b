// Choosing and packing integer codes for scales and zero points that are given: bit for bit quant/affine_grid.py.
//
// Shape legend: O out features (rows), I in features.
#include <algorithm>
#include <cmath>

#include "integer.h"

namespace finetune {
namespace {

constexpr int64_t PIECE = 64;  // columns whose codes are chosen, then packed

inline float load(const void* x, DType type, int64_t at) {
  if (type == F32) return static_cast<const float*>(x)[at];
  uint16_t half = static_cast<const uint16_t*>(x)[at];
  return type == BF16 ? from_bf16(half) : from_f16(half);
}

// Codes of columns [column, column + columns) of a row x, all of one group.
void choose_scalar(const void* x, DType type, int64_t column, int64_t columns, const Step& step, float most,
                   uint8_t* codes) {
  for (int64_t c = 0; c < columns; ++c) {
    float value = load(x, type, column + c);
    float code = step.real ? std::nearbyint((value - step.zero) / step.scale)
                           : std::nearbyint(value / step.scale) + step.zero;
    codes[c] = static_cast<uint8_t>(std::min(std::max(code, 0.0f), most));
  }
}

#ifdef FT_X86
FT_TARGET_AVX512 inline __m512 load_lanes(const void* x, DType type, int64_t at, __mmask16 lanes) {
  if (type == F32) return _mm512_maskz_loadu_ps(lanes, static_cast<const float*>(x) + at);
  __m256i half = _mm256_maskz_loadu_epi16(lanes, static_cast<const uint16_t*>(x) + at);
  if (type == F16) return _mm512_cvtph_ps(half);
  return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(half), 16));
}

FT_TARGET_AVX512 void choose_avx512(const void* x, DType type, int64_t column, int64_t columns, const Step& step,
                                    float most, uint8_t* codes) {
  constexpr int NEAREST = _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC;
  const __m512 scale = _mm512_set1_ps(step.scale), zero = _mm512_set1_ps(step.zero);
  for (int64_t c = 0; c < columns; c += 16) {
    __mmask16 lanes = columns - c >= 16 ? static_cast<__mmask16>(0xffff) : static_cast<__mmask16>((1u << (columns - c)) - 1);
    __m512 value = load_lanes(x, type, column + c, lanes);
    __m512 code = step.real
                      ? _mm512_roundscale_ps(_mm512_div_ps(_mm512_sub_ps(value, zero), scale), NEAREST)
                      : _mm512_add_ps(_mm512_roundscale_ps(_mm512_div_ps(value, scale), NEAREST), zero);
    code = _mm512_min_ps(_mm512_max_ps(code, _mm512_setzero_ps()), _mm512_set1_ps(most));
    _mm512_mask_cvtepi32_storeu_epi8(codes + c, lanes, _mm512_cvtps_epi32(code));
  }
}
#endif

// The codes of a piece, zeros after its end, as bytes; `bytes` of them are written.
void pack_piece(const uint8_t* codes, int bits, int64_t bytes, uint8_t* out) {
  if (bits == 8) {
    std::memcpy(out, codes, static_cast<size_t>(bytes));
    return;
  }
  for (int64_t first = 0, at = 0; at < bytes; first += 8, at += bits) {
    uint32_t word = 0;
    for (int i = 0; i < 8; ++i) word |= static_cast<uint32_t>(codes[first + i]) << (i * bits);
    for (int64_t b = 0; b < bits && at + b < bytes; ++b) out[at + b] = static_cast<uint8_t>(word >> (8 * b));
  }
}

void encode_row(const Integer& w, int64_t row, const void* x, DType type, uint8_t* out) {
  const float most = static_cast<float>((1 << w.bits) - 1);
  alignas(64) uint8_t codes[PIECE];
  for (int64_t column = 0; column < w.in_features; column += PIECE) {
    const int64_t end = std::min(column + PIECE, w.in_features);
    std::memset(codes, 0, PIECE);
    for (int64_t c = column; c < end;) {
      const int64_t group = c / w.group, stop = std::min(end, (group + 1) * w.group);
      const Step step = step_of(w, row, group);
#ifdef FT_X86
      if (level() >= AVX512)
        choose_avx512(x, type, c, stop - c, step, most, codes + (c - column));
      else
#endif
        choose_scalar(x, type, c, stop - c, step, most, codes + (c - column));
      c = stop;
    }
    const int64_t from = column * w.bits / 8;
    pack_piece(codes, w.bits, std::min<int64_t>(PIECE * w.bits / 8, w.bytes - from), out + from);
  }
}

}  // namespace
}  // namespace finetune

// Writes the nearest codes of x [rows, in_features] in a DType to `out` [rows, P]; `w` gives all but the codes.
FT_API void ft_integer_encode(const finetune::Integer* w, int64_t rows, const void* x, int32_t type, void* out,
                              int32_t threads) {
  const int64_t size = type == finetune::F32 ? 4 : 2;
#pragma omp parallel for schedule(static) num_threads(threads) if (rows * w->in_features > 65536)
  for (int64_t row = 0; row < rows; ++row)
    finetune::encode_row(*w, row, static_cast<const char*>(x) + row * w->in_features * size,
                         static_cast<finetune::DType>(type), static_cast<uint8_t*>(out) + row * w->bytes);
}
