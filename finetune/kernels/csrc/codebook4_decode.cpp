// Decoding of 4-bit codebook weights to float32, bf16 and fp16.
//
// Sixteen bits: the 16 values of a block are scaled and rounded once (`scale_tables`), then a weight is one lookup of
// its code in that table (`look_up`): vpermw over 32 words on AVX-512, two byte shuffles on AVX2. Float32: the
// unscaled table is looked up and the product taken per weight.
#include "codebook4.h"

#if defined(__linux__)
#include <sys/mman.h>
#endif

namespace finetune {
namespace {

constexpr int BLOCKS = 32;  // scaled at a time: their tables take 1 KiB

// Bytes from which glibc's malloc maps fresh pages at every call (DEFAULT_MMAP_THRESHOLD_MAX); below it reuses them.
constexpr size_t LARGE = size_t{32} << 20;

// ---- scalar ----

// Weights [start, start + count) by the tables of their blocks, the first of which is start's.
void look_up_scalar(const Codebook4& weight, const Table* tables, int64_t start, int64_t count, uint16_t* out) {
  int64_t first = start >> weight.shift;
  for (int64_t i = 0; i < count; ++i) {
    int64_t index = start + i;
    out[i] = tables[(index >> weight.shift) - first][weight.code(index)];
  }
}

void decode_f32_scalar(const Codebook4& weight, int64_t start, int64_t count, float* out) {
  for (int64_t i = 0; i < count; ++i) {
    int64_t index = start + i;
    out[i] = weight.table[weight.code(index)] * weight.scale(index >> weight.shift);
  }
}

#ifdef FT_X86

// The weights of one block from `index` on, at most `left`; the first alone where it sits in a low nibble, so that the
// next begins a byte.
inline int64_t run_length(int64_t index, int64_t left, int32_t shift) {
  if (index & 1) return 1;
  int64_t inside = (((index >> shift) + 1) << shift) - index;
  return inside < left ? inside : left;
}

// ---- AVX2 ----

FT_TARGET_AVX2 void look_up_avx2(const Codebook4& weight, const Table* tables, int64_t start, int64_t count,
                                 uint16_t* out) {
  const __m128i nibble = _mm_set1_epi8(15);
  const __m128i even = _mm_setr_epi8(0, 2, 4, 6, 8, 10, 12, 14, -1, -1, -1, -1, -1, -1, -1, -1);
  const __m128i odd = _mm_setr_epi8(1, 3, 5, 7, 9, 11, 13, 15, -1, -1, -1, -1, -1, -1, -1, -1);
  int64_t first = start >> weight.shift;
  for (int64_t i = 0; i < count;) {
    int64_t index = start + i, run = run_length(index, count - i, weight.shift), j = 0;
    const uint16_t* table = tables[(index >> weight.shift) - first];
    __m128i left = _mm_loadu_si128(reinterpret_cast<const __m128i*>(table));
    __m128i right = _mm_loadu_si128(reinterpret_cast<const __m128i*>(table + 8));
    __m128i lows = _mm_unpacklo_epi64(_mm_shuffle_epi8(left, even), _mm_shuffle_epi8(right, even));
    __m128i highs = _mm_unpacklo_epi64(_mm_shuffle_epi8(left, odd), _mm_shuffle_epi8(right, odd));
    for (; j + 16 <= run; j += 16) {
      __m128i bytes = _mm_loadl_epi64(reinterpret_cast<const __m128i*>(weight.codes + ((index + j) >> 1)));
      __m128i codes = _mm_unpacklo_epi8(_mm_and_si128(_mm_srli_epi16(bytes, 4), nibble), _mm_and_si128(bytes, nibble));
      __m128i low = _mm_shuffle_epi8(lows, codes), high = _mm_shuffle_epi8(highs, codes);
      __m128i* to = reinterpret_cast<__m128i*>(out + i + j);
      _mm_storeu_si128(to, _mm_unpacklo_epi8(low, high));
      _mm_storeu_si128(to + 1, _mm_unpackhi_epi8(low, high));
    }
    for (; j < run; ++j) out[i + j] = table[weight.code(index + j)];
    i += run;
  }
}

FT_TARGET_AVX2 void decode_f32_avx2(const Codebook4& weight, int64_t start, int64_t count, float* out) {
  const __m256i shifts = _mm256_setr_epi32(4, 0, 12, 8, 20, 16, 28, 24);
  __m256 low = _mm256_loadu_ps(weight.table), high = _mm256_loadu_ps(weight.table + 8);
  for (int64_t i = 0; i < count;) {
    int64_t index = start + i, run = run_length(index, count - i, weight.shift), j = 0;
    float scale = weight.scale(index >> weight.shift);
    for (; j + 8 <= run; j += 8) {
      int32_t bytes;
      std::memcpy(&bytes, weight.codes + ((index + j) >> 1), 4);
      __m256i codes = _mm256_srlv_epi32(_mm256_set1_epi32(bytes), shifts);
      __m256 upper = _mm256_castsi256_ps(_mm256_slli_epi32(codes, 28));  // bit 3 as the sign that blends
      __m256 value =
          _mm256_blendv_ps(_mm256_permutevar8x32_ps(low, codes), _mm256_permutevar8x32_ps(high, codes), upper);
      _mm256_storeu_ps(out + i + j, _mm256_mul_ps(value, _mm256_set1_ps(scale)));
    }
    for (; j < run; ++j) out[i + j] = weight.table[weight.code(index + j)] * scale;
    i += run;
  }
}

// ---- AVX-512 ----

// The codes of 16 bytes in the low bits of 32 words, in order. Bit 4 of a word may be anything.
FT_TARGET_AVX512 inline __m512i spread(__m128i bytes) {
  // Byte k goes to words 2k and 2k + 1: one shuffle within lanes that each hold all 16 bytes.
  const __m512i twice = _mm512_set_epi64(0x800f800f800e800e, 0x800d800d800c800c, 0x800b800b800a800a, 0x8009800980088008,
                                         0x8007800780068006, 0x8005800580048004, 0x8003800380028002, 0x8001800180008000);
  const __m512i shifts = _mm512_set1_epi32(4);  // the words in turn: the high nibble, the low one
  return _mm512_srlv_epi16(_mm512_shuffle_epi8(_mm512_broadcast_i32x4(bytes), twice), shifts);
}

FT_TARGET_AVX512 inline __m512i words_of(__m512i table, const uint8_t* codes) {
  return _mm512_permutexvar_epi16(spread(_mm_loadu_si128(reinterpret_cast<const __m128i*>(codes))), table);
}

// Twice the same 16 words: bit 4 of an index is then harmless.
FT_TARGET_AVX512 inline __m512i doubled(const Table& table) {
  return _mm512_broadcast_i64x4(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(table)));
}

// Whole blocks from the start of one.
FT_TARGET_AVX512 void look_up_blocks(const Table* tables, const uint8_t* codes, int64_t blocks, int64_t block_size,
                                     uint16_t* out) {
  for (int64_t b = 0; b < blocks; ++b) {
    const __m512i table = doubled(tables[b]);
    for (int64_t j = 0; j < block_size; j += 32, codes += 16, out += 32)
      _mm512_storeu_si512(out, words_of(table, codes));
  }
}

FT_TARGET_AVX512 void stream_blocks(const Table* tables, const uint8_t* codes, int64_t blocks, int64_t block_size,
                                    uint16_t* out) {
  for (int64_t b = 0; b < blocks; ++b) {
    const __m512i table = doubled(tables[b]);
    for (int64_t j = 0; j < block_size; j += 32, codes += 16, out += 32)
      _mm512_stream_si512(reinterpret_cast<__m512i*>(out), words_of(table, codes));
  }
}

FT_TARGET_AVX512 void look_up_avx512(const Codebook4& weight, const Table* tables, int64_t start, int64_t count,
                                     uint16_t* out, bool stream) {
  const int64_t block_size = int64_t{1} << weight.shift;
  for (int64_t i = 0; i < count;) {
    int64_t index = start + i, run = run_length(index, count - i, weight.shift), j = 0;
    const Table& entries = tables[(index >> weight.shift) - (start >> weight.shift)];
    const uint8_t* codes = weight.codes + (index >> 1);
    if (run == block_size) {
      int64_t blocks = (count - i) >> weight.shift;
      (stream ? stream_blocks : look_up_blocks)(&entries, codes, blocks, block_size, out + i);
      i += blocks << weight.shift;
      continue;
    }
    if (index & 1) {
      out[i++] = entries[weight.code(index)];
      continue;
    }
    const __m512i table = doubled(entries);
    for (; j + 32 <= run; j += 32) _mm512_storeu_si512(out + i + j, words_of(table, codes + j / 2));
    if (j < run) {
      int rest = static_cast<int>(run - j);
      __m128i bytes = _mm_maskz_loadu_epi8(static_cast<__mmask16>((1u << (rest + 1) / 2) - 1), codes + j / 2);
      __mmask32 used = static_cast<__mmask32>((uint64_t{1} << rest) - 1);
      _mm512_mask_storeu_epi16(out + i + j, used, _mm512_permutexvar_epi16(spread(bytes), table));
    }
    i += run;
  }
}

FT_TARGET_AVX512 void decode_f32_avx512(const Codebook4& weight, int64_t start, int64_t count, float* out) {
  const __m512i shifts = _mm512_setr_epi32(4, 0, 12, 8, 20, 16, 28, 24, 4, 0, 12, 8, 20, 16, 28, 24);
  const __m512 table = _mm512_loadu_ps(weight.table);
  for (int64_t i = 0; i < count;) {
    int64_t index = start + i, run = run_length(index, count - i, weight.shift);
    const __m512 scale = _mm512_set1_ps(weight.scale(index >> weight.shift));
    const uint8_t* codes = weight.codes + (index >> 1);
    if (index & 1) {
      out[i++] = weight.table[weight.code(index)] * _mm512_cvtss_f32(scale);
      continue;
    }
    for (int64_t j = 0; j < run; j += 16) {
      int rest = run - j < 16 ? static_cast<int>(run - j) : 16;
      uint64_t bytes = 0;
      if (rest == 16)
        std::memcpy(&bytes, codes + j / 2, 8);
      else
        std::memcpy(&bytes, codes + j / 2, static_cast<size_t>((rest + 1) / 2));
      // Dwords 0-7 take the low half of the bytes, 8-15 the high half.
      __m512i halves = _mm512_inserti64x4(_mm512_set1_epi32(static_cast<int32_t>(bytes)),
                                          _mm256_set1_epi32(static_cast<int32_t>(bytes >> 32)), 1);
      __m512 values = _mm512_permutexvar_ps(_mm512_srlv_epi32(halves, shifts), table);
      _mm512_mask_storeu_ps(out + i + j, static_cast<__mmask16>((1u << rest) - 1), _mm512_mul_ps(values, scale));
    }
    i += run;
  }
}

#endif  // FT_X86

void look_up(const Codebook4& weight, const Table* tables, int64_t start, int64_t count, uint16_t* out, bool stream) {
#ifdef FT_X86
  if (level() >= AVX512) return look_up_avx512(weight, tables, start, count, out, stream);
  if (level() >= AVX2) return look_up_avx2(weight, tables, start, count, out);
#endif
  look_up_scalar(weight, tables, start, count, out);
}

void decode_f32(const Codebook4& weight, int64_t start, int64_t count, float* out) {
#ifdef FT_X86
  if (level() >= AVX512) return decode_f32_avx512(weight, start, count, out);
  if (level() >= AVX2) return decode_f32_avx2(weight, start, count, out);
#endif
  decode_f32_scalar(weight, start, count, out);
}

int64_t smaller(int64_t a, int64_t b) { return a < b ? a : b; }

// Blocks that [start, start + count) touches.
int64_t touched(int64_t start, int64_t count, int32_t shift) {
  return ((start + count - 1) >> shift) - (start >> shift) + 1;
}

// The pages of a large output that were never touched are faulted in by 2 MiB instead of 4 KiB: writing 32 MiB of
// fresh memory is otherwise ten times slower than decoding it. Without effect on pages that exist.
void ask_for_huge_pages(void* data, size_t bytes) {
#if defined(__linux__) && defined(MADV_HUGEPAGE)
  constexpr size_t PAGE = 4096;
  uintptr_t first = (reinterpret_cast<uintptr_t>(data) + PAGE - 1) / PAGE * PAGE;
  uintptr_t last = (reinterpret_cast<uintptr_t>(data) + bytes) / PAGE * PAGE;
  madvise(reinterpret_cast<void*>(first), last - first, MADV_HUGEPAGE);
#endif
}

}  // namespace

void decode(const Codebook4& weight, int64_t start, int64_t count, DType dtype, void* out, bool stream) {
  if (dtype == F32) return decode_f32(weight, start, count, static_cast<float*>(out));
  float room[BLOCKS];
  alignas(64) Table tables[BLOCKS];
  for (int64_t done = 0; done < count;) {
    int64_t index = start + done, block = index >> weight.shift;
    int64_t piece = smaller(count - done, ((block + BLOCKS) << weight.shift) - index);
    int blocks = static_cast<int>(touched(index, piece, weight.shift));
    scale_tables(weight.table, block_scales(weight, block, blocks, room), blocks, dtype, tables);
    look_up(weight, tables, index, piece, static_cast<uint16_t*>(out) + done, stream);
    done += piece;
  }
}

void codebook4_panel(const void* weight, int64_t row, int64_t rows, int64_t column, int64_t columns, bf16* out,
                     int64_t stride) {
  const Codebook4& codes = *static_cast<const Codebook4*>(weight);
  float scales[BLOCKS];
  alignas(64) Table tables[BLOCKS];
  for (int64_t r = 0; r < rows;) {
    int64_t start = (row + r) * codes.columns + column;
    // As many rows as there are tables; a row more than the blocks it covers when it begins inside one.
    int64_t together = smaller(rows - r, BLOCKS / (((columns - 1) >> codes.shift) + 2));
    if (together < 2) {
      decode(codes, start, columns, BF16, out + r++ * stride, false);
      continue;
    }
    int used = 0;
    int begins[BLOCKS];
    for (int64_t k = 0; k < together; ++k) {
      int64_t index = start + k * codes.columns, block = index >> codes.shift;
      int64_t blocks = touched(index, columns, codes.shift);
      const float* own = block_scales(codes, block, blocks, scales + used);
      if (own != scales + used) std::memcpy(scales + used, own, static_cast<size_t>(blocks) * sizeof(float));
      begins[k] = used;
      used += static_cast<int>(blocks);
    }
    scale_tables(codes.table, scales, used, BF16, tables);
    for (int64_t k = 0; k < together; ++k) {
      look_up(codes, tables + begins[k], start + k * codes.columns, columns, out + (r + k) * stride, false);
    }
    r += together;
  }
}

}  // namespace finetune

// Decodes `count` weights to out[count] of type `dtype`. `absmax` holds float32, or uint8 where `nested` and `offset`
// are given; `map` has 256 values, `table` 16. `recycled` says that the pages of `out` were written before.
FT_API void ft_dequantize_codebook4(const uint8_t* codes, const void* absmax, const float* nested, const float* offset,
                                    const float* map, const float* table, int32_t block_size, int64_t count,
                                    int32_t dtype, void* out, int32_t recycled, int32_t threads) {
  using namespace finetune;
  Codebook4 weight{codes, absmax, nested, map, table, offset ? *offset : 0.0f, __builtin_ctz(block_size), count};
  constexpr int64_t CHUNK = 1 << 15, WORTH = 1 << 17;  // a multiple of every block size; weights that pay for a team
  size_t size = dtype == F32 ? 4 : 2, bytes = static_cast<size_t>(count) * size;
  if (bytes >= LARGE && !recycled) ask_for_huge_pages(out, bytes);
  // Past the caches: these outputs would not fit them. Pages that the kernel has just cleared are in them.
  bool stream = recycled && bytes >= LARGE && reinterpret_cast<uintptr_t>(out) % 64 == 0;
  int64_t chunks = (count + CHUNK - 1) / CHUNK;
#pragma omp parallel for schedule(static) num_threads(count < WORTH ? 1 : threads)
  for (int64_t c = 0; c < chunks; ++c) {
    int64_t start = c * CHUNK;
    decode(weight, start, smaller(count - start, CHUNK), static_cast<DType>(dtype), static_cast<char*>(out) + start * size,
           stream);
  }
#ifdef FT_X86
  if (stream) _mm_sfence();
#endif
}
