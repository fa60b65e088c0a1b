// What every file of the CPU kernels shares: element types, the CPU's level, scratch memory.
//
// The library has a plain C interface (pointers, sizes, a thread count) and is loaded by ctypes. A function of one
// instruction set carries its own target attribute (FT_TARGET_...), so that no flag on the command line raises what the
// rest of the library demands of a CPU; which one runs is chosen by level().
//
// Shape suffixes: M rows of the input, O out features, I in features, N weights, G blocks or groups.
#pragma once

#include <cstddef>
#include <cstdint>
#include <cstring>

#define FT_API extern "C" __attribute__((visibility("default")))

#if defined(__x86_64__) && defined(__GNUC__)
#define FT_X86 1
#include <immintrin.h>
#define FT_TARGET_AVX2 __attribute__((target("avx2,fma,f16c")))
#define FT_TARGET_AVX512 __attribute__((target("avx2,fma,f16c,avx512f,avx512bw,avx512vl,avx512dq")))
#define FT_TARGET_AVX512_BF16 \
  __attribute__((target("avx2,fma,f16c,avx512f,avx512bw,avx512vl,avx512dq,avx512vbmi,avx512vnni,avx512bf16")))
#define FT_TARGET_AMX \
  __attribute__((target("avx2,fma,f16c,avx512f,avx512bw,avx512vl,avx512dq,avx512vbmi,avx512vnni,avx512bf16," \
                        "amx-tile,amx-bf16,amx-int8")))
#endif

namespace finetune {

using bf16 = uint16_t;
using f16 = uint16_t;

// As finetune/kernels/native.py numbers them.
enum DType : int32_t { F32 = 0, BF16 = 1, F16 = 2 };

// What the CPU offers, each level with all that comes before it.
enum Level : int32_t {
  SCALAR = 0,
  AVX2 = 1,         // with FMA and F16C
  AVX512 = 2,       // F, BW, VL, DQ
  AVX512_BF16 = 3,  // with VBMI and VNNI: Zen 4, Sapphire Rapids
  AMX = 4,          // tiles of bf16 and int8, and the kernel's leave to use them
};

// The level in force: the CPU's, unless ft_set_level lowered it.
Level level();

// Scratch memory of the calling thread, 64-byte aligned, reused by the next call that names the same slot, never smaller
// than before. Null where memory ran out.
enum Slot : int32_t { SLOT_WEIGHT = 0, SLOT_INPUT, SLOT_OUTPUT, SLOT_EXTRA, SLOTS };
void* scratch(Slot slot, size_t bytes);

inline float from_bf16(bf16 value) {
  uint32_t bits = static_cast<uint32_t>(value) << 16;
  float result;
  std::memcpy(&result, &bits, 4);
  return result;
}

// To nearest, ties to even; a NaN stays one.
inline bf16 to_bf16(float value) {
  uint32_t bits;
  std::memcpy(&bits, &value, 4);
  if ((bits & 0x7fffffffu) > 0x7f800000u) return static_cast<bf16>((bits >> 16) | 0x40u);
  return static_cast<bf16>((bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16);
}

}  // namespace finetune
