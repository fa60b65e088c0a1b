// Decoding integer codes to float32, bf16 or float16: bit for bit what kernels/affine.py and kernels/int8.py give.
//
// Up to 4 bits a group's values fit a vector: a table of 16-bit numbers is made once a group, and 32 codes are spread
// over the 16-bit lanes (a byte shuffle and a shift a lane), which then index it. The table repeats every 2^bits entries,
// so that bits of the next code above an index do no harm. 8 bits are converted and scaled.
#include <algorithm>

#include "integer.h"

namespace finetune {
namespace {

// The groups that a run of columns touches, and the part of the run in each.
struct Span {
  int64_t group, first = 0, last = 0;
  const int64_t size, columns;
  int64_t end;
  Span(const Integer& w, int64_t column, int64_t columns)
      : group(column / w.group - 1), size(w.group), columns(columns), end((group + 1) * w.group - column) {}
  bool next() {
    ++group;
    first = last;
    end += size;
    last = std::min(end, columns);
    return first < columns;
  }
};

inline uint32_t code_at(const Integer& w, const uint8_t* codes, int64_t column) {
  if (w.bits == 8) return codes[column];
  int64_t bit = column * w.bits;
  uint32_t byte = codes[bit >> 3];
  int32_t shift = static_cast<int32_t>(bit & 7);
  if (shift + w.bits > 8) byte |= static_cast<uint32_t>(codes[(bit >> 3) + 1]) << 8;
  return byte >> shift & ((1u << w.bits) - 1);
}

void decode_scalar(const Integer& w, int64_t row, int64_t column, int64_t columns, DType type, void* out) {
  const uint8_t* codes = w.codes + row * w.bytes;
  for (Span span(w, column, columns); span.next();) {
    const Step step = step_of(w, row, span.group);
    for (int64_t c = span.first; c < span.last; ++c) {
      uint32_t code = code_at(w, codes, column + c);
      float number = w.is_signed() ? static_cast<float>(static_cast<int8_t>(code)) : static_cast<float>(code);
      put(value_of(step, number), type, out, c);
    }
  }
}

#ifdef FT_X86

constexpr int64_t LANES = 32;

inline __mmask32 first(int64_t count) { return count >= 32 ? 0xffffffffu : (1u << count) - 1; }
inline __mmask16 first16(int64_t count) {
  return count >= 16 ? static_cast<__mmask16>(0xffff) : static_cast<__mmask16>((1u << std::max<int64_t>(count, 0)) - 1);
}

// Where lane i of 32 finds its code among the bytes loaded: the byte pair, and the shift within it.
struct Spread {
  alignas(64) uint8_t bytes[64];
  alignas(64) uint16_t shifts[32];
  explicit Spread(int bits) {
    for (int i = 0; i < 32; ++i) {
      int byte = i * bits / 8;
      shifts[i] = static_cast<uint16_t>(i * bits % 8);
      bytes[2 * i] = static_cast<uint8_t>(byte);
      bytes[2 * i + 1] = static_cast<uint8_t>(byte + 1 < 16 ? byte + 1 : 0x80);
    }
  }
};

const Spread& spread_of(int bits) {
  static const Spread two(2), three(3), four(4);
  return bits == 2 ? two : bits == 3 ? three : four;
}

FT_TARGET_AVX512 inline __m512 values(__m512 codes, const Step& step) {
  __m512 scale = _mm512_set1_ps(step.scale), zero = _mm512_set1_ps(step.zero);
  if (step.real) return _mm512_add_ps(_mm512_mul_ps(codes, scale), zero);
  return _mm512_mul_ps(_mm512_sub_ps(codes, zero), scale);
}

// As step_of, by the CPU's own conversion.
FT_TARGET_AVX512 inline Step load_step(const Integer& w, int64_t row, int64_t group) {
  if (w.is_signed() || w.scale_type != F16) return step_of(w, row, group);
  int64_t at = row * w.groups + group;
  float scale = _cvtsh_ss(static_cast<const f16*>(w.scale)[at]);
  if (w.zeros == Integer::INTEGER) return {scale, static_cast<float>(static_cast<const uint8_t*>(w.zero)[at]), false};
  if (w.zeros == Integer::REAL) return {scale, static_cast<const float*>(w.zero)[at], true};
  return {scale, static_cast<float>(1 << (w.bits - 1)), false};
}

// 32 codes in 16-bit lanes; above a code's own bits are those of codes after it.
FT_TARGET_AVX512 inline __m512i spread_codes(__m128i packed, __m512i bytes, __m512i shifts) {
  return _mm512_srlv_epi16(_mm512_shuffle_epi8(_mm512_broadcast_i32x4(packed), bytes), shifts);
}

FT_TARGET_AVX512 void decode_few_bits(const Integer& w, int64_t row, int64_t column, int64_t columns, DType type,
                                      void* out) {
  const Spread& spread = spread_of(w.bits);
  const __m512i bytes = _mm512_load_si512(spread.bytes), shifts = _mm512_load_si512(spread.shifts);
  const uint8_t* codes = w.codes + row * w.bytes + column * w.bits / 8;
  // The values of a group by code fill 16 lanes, repeating.
  const __m512i lane = _mm512_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15);
  const __m512 codes_by_lane = _mm512_cvtepi32_ps(_mm512_and_si512(lane, _mm512_set1_epi32((1 << w.bits) - 1)));
  const int64_t piece = 4 * w.bits, left = w.bytes - column * w.bits / 8;
  int64_t at = 0;
  for (Span span(w, column, columns); span.next();) {
    const __m512 entries = values(codes_by_lane, load_step(w, row, span.group));
    const __m256i half = round16(entries, type);
    const __m512i both = _mm512_inserti64x4(_mm512_castsi256_si512(half), half, 1);
    int64_t c = span.first;
    if (type != F32)
      for (; c + LANES <= span.last && at + 16 <= left; c += LANES, at += piece) {
        __m512i index = spread_codes(_mm_loadu_si128(reinterpret_cast<const __m128i*>(codes + at)), bytes, shifts);
        _mm512_storeu_si512(static_cast<bf16*>(out) + c, _mm512_permutexvar_epi16(index, both));
      }
    for (; c < span.last; c += LANES, at += piece) {
      __m128i some = _mm_maskz_loadu_epi8(first16(std::min(piece, left - at)), codes + at);
      __m512i index = spread_codes(some, bytes, shifts);
      __mmask32 lanes = first(span.last - c);
      if (type != F32) {
        _mm512_mask_storeu_epi16(static_cast<bf16*>(out) + c, lanes, _mm512_permutexvar_epi16(index, both));
        continue;
      }
      float* to = static_cast<float*>(out) + c;
      __m512i low = _mm512_cvtepu16_epi32(_mm512_castsi512_si256(index));
      __m512i high = _mm512_cvtepu16_epi32(_mm512_extracti64x4_epi64(index, 1));
      _mm512_mask_storeu_ps(to, static_cast<__mmask16>(lanes), _mm512_permutexvar_ps(low, entries));
      _mm512_mask_storeu_ps(to + 16, static_cast<__mmask16>(lanes >> 16), _mm512_permutexvar_ps(high, entries));
    }
  }
}

FT_TARGET_AVX512 void decode_bytes(const Integer& w, int64_t row, int64_t column, int64_t columns, DType type,
                                   void* out) {
  const uint8_t* codes = w.codes + row * w.bytes + column;
  for (Span span(w, column, columns); span.next();) {
    const Step step = load_step(w, row, span.group);
    for (int64_t c = span.first; c < span.last; c += 16) {
      __mmask16 lanes = first16(span.last - c);
      __m128i packed = _mm_maskz_loadu_epi8(lanes, codes + c);
      __m512i wide = w.is_signed() ? _mm512_cvtepi8_epi32(packed) : _mm512_cvtepu8_epi32(packed);
      __m512 value = values(_mm512_cvtepi32_ps(wide), step);
      if (type == F32)
        _mm512_mask_storeu_ps(static_cast<float*>(out) + c, lanes, value);
      else
        _mm256_mask_storeu_epi16(static_cast<bf16*>(out) + c, lanes, round16(value, type));
    }
  }
}

// Numbers below 2^-126 are what this instruction takes for zero; no value is that small where a step is above.
constexpr float SAFE_SCALE = 7.9e-31f, SAFE_ZERO = 8.7e-19f;  // 2^-100, 2^-60

inline bool rounds_safely(const Step& step) {
  float zero = step.zero < 0 ? -step.zero : step.zero;
  return step.scale >= SAFE_SCALE && (!step.real || zero == 0 || zero >= SAFE_ZERO);
}

template <int KIND>
FT_TARGET_AVX512_BF16 inline __m512 byte_values(__m128i packed, __m512 scale, __m512 zero) {
  __m512 code = _mm512_cvtepi32_ps(KIND == Integer::SIGNED ? _mm512_cvtepi8_epi32(packed) : _mm512_cvtepu8_epi32(packed));
  if (KIND == Integer::REAL) return _mm512_add_ps(_mm512_mul_ps(code, scale), zero);
  return _mm512_mul_ps(KIND == Integer::SIGNED ? code : _mm512_sub_ps(code, zero), scale);
}

template <int KIND>
FT_TARGET_AVX512_BF16 void decode_bytes_bf16(const Integer& w, int64_t row, int64_t column, int64_t columns, bf16* out) {
  const uint8_t* codes = w.codes + row * w.bytes + column;
  for (Span span(w, column, columns); span.next();) {
    const Step step = load_step(w, row, span.group);
    int64_t c = span.first;
    const int64_t whole = rounds_safely(step) ? c + (span.last - c) / LANES * LANES : c;
    const __m512 scale = _mm512_set1_ps(step.scale), zero = _mm512_set1_ps(step.zero);
    for (; c < whole; c += LANES) {
      __m512 low = byte_values<KIND>(_mm_loadu_si128(reinterpret_cast<const __m128i*>(codes + c)), scale, zero);
      __m512 high = byte_values<KIND>(_mm_loadu_si128(reinterpret_cast<const __m128i*>(codes + c + 16)), scale, zero);
      _mm512_storeu_si512(out + c, (__m512i)_mm512_cvtne2ps_pbh(high, low));
    }
    if (c < span.last) decode_bytes(w, row, column + c, span.last - c, BF16, out + c);
  }
}

void decode_bytes_best(const Integer& w, int64_t row, int64_t column, int64_t columns, DType type, void* out) {
  if (type != BF16 || level() < AVX512_BF16) return decode_bytes(w, row, column, columns, type, out);
  bf16* to = static_cast<bf16*>(out);
  if (w.is_signed()) return decode_bytes_bf16<Integer::SIGNED>(w, row, column, columns, to);
  if (w.zeros == Integer::REAL) return decode_bytes_bf16<Integer::REAL>(w, row, column, columns, to);
  return decode_bytes_bf16<Integer::INTEGER>(w, row, column, columns, to);
}

#endif

}  // namespace

void decode_row(const Integer& w, int64_t row, int64_t column, int64_t columns, DType type, void* out) {
#ifdef FT_X86
  if (level() >= AVX512 && column % LANES == 0 && (w.group % LANES == 0 || w.groups == 1)) {
    if (w.bits == 8) return decode_bytes_best(w, row, column, columns, type, out);
    return decode_few_bits(w, row, column, columns, type, out);
  }
#endif
  decode_scalar(w, row, column, columns, type, out);
}

// The engines come back for the rows below soon, each on a page of its own: what the CPU does not foresee.
constexpr int64_t ROWS_AHEAD = 8;

void integer_panel(const void* weight, int64_t row, int64_t rows, int64_t column, int64_t columns, bf16* out,
                   int64_t stride) {
  const Integer& w = *static_cast<const Integer*>(weight);
  const uint8_t* ahead = w.codes + (row + ROWS_AHEAD) * w.bytes + column * w.bits / 8;
  const int64_t bytes = columns * w.bits / 8;
  for (int64_t r = 0; r < rows; ++r, ahead += w.bytes) {
    for (int64_t b = 0; b < bytes; b += 64) __builtin_prefetch(ahead + b);
    decode_row(w, row + r, column, columns, BF16, out + r * stride);
  }
}

}  // namespace finetune

// Decodes `rows` rows to `out` [rows, in_features] in a DType.
FT_API void ft_integer_decode(const finetune::Integer* w, int64_t rows, int32_t type, void* out, int32_t threads) {
  const int64_t size = type == finetune::F32 ? 4 : 2;
#pragma omp parallel for schedule(static) num_threads(threads) if (rows * w->in_features > 65536)
  for (int64_t row = 0; row < rows; ++row)
    finetune::decode_row(*w, row, 0, w->in_features, static_cast<finetune::DType>(type),
                         static_cast<char*>(out) + row * w->in_features * size);
}
