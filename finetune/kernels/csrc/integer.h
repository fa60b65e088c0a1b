// Frozen weights in integer codes: what decoding, products and quantizers of int8 and of the affine formats share.
//
// Shape legend: O out features (rows), I in features, G groups of a row, P packed bytes of a row.
#pragma once

#include "half.h"

namespace finetune {

// A weight [O, I] in rows of codes; kernels/affine.py, int8.py and w8a8.py say what they mean. A code q stands for
// (q - zero) * scale, or for q * scale + zero where the zero point is real.
struct Integer {
  enum Zero : int32_t { MIDDLE = 0, INTEGER = 1, REAL = 2, SIGNED = 3, PLAIN = 4 };
  const uint8_t* codes;  // [O, P]
  const void* scale;     // [O, G] in scale_type; for SIGNED absmax [O], of which a 127th is the scale
  const void* zero;      // uint8 or float32 [O, G]; null for MIDDLE (2^(bits-1)), SIGNED and PLAIN (int8 codes, 0)
  int64_t in_features;
  int64_t group;  // columns under one scale, a multiple of 32 or all of them
  int64_t groups;
  int64_t bytes;  // P
  int32_t bits;   // 2, 3, 4 or 8
  int32_t scale_type;
  int32_t zeros;
  bool is_signed() const { return zeros == SIGNED || zeros == PLAIN; }
};

// Scale and zero point of one group.
struct Step {
  float scale, zero;
  bool real;
};

inline Step step_of(const Integer& w, int64_t row, int64_t group) {
  int64_t at = row * w.groups + group;
  if (w.zeros == Integer::SIGNED) return {static_cast<const float*>(w.scale)[at] * (1.0f / 127.0f), 0.0f, false};
  float scale = w.scale_type == F16 ? from_f16(static_cast<const f16*>(w.scale)[at])
                                    : static_cast<const float*>(w.scale)[at];
  switch (w.zeros) {
    case Integer::INTEGER:
      return {scale, static_cast<float>(static_cast<const uint8_t*>(w.zero)[at]), false};
    case Integer::REAL:
      return {scale, static_cast<const float*>(w.zero)[at], true};
    case Integer::PLAIN:
      return {scale, 0.0f, false};
    default:
      return {scale, static_cast<float>(1 << (w.bits - 1)), false};
  }
}

// Each operation rounded on its own.
inline float value_of(const Step& step, float code) {
  if (step.real) {
    float product = code * step.scale;
    return product + step.zero;
  }
  return (code - step.zero) * step.scale;
}

// Decodes columns [column, column + columns) of a row; `out` is of that DType.
void decode_row(const Integer& w, int64_t row, int64_t column, int64_t columns, DType type, void* out);

// As Decoder::panel, of an Integer.
void integer_panel(const void* weight, int64_t row, int64_t rows, int64_t column, int64_t columns, bf16* out,
                   int64_t stride);

}  // namespace finetune
