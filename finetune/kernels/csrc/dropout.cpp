// Which elements dropout keeps, as bits, and zeros in the place of the others.
//
// Bits are a function of a seed and of the element's number alone, whatever the instruction set and the number of
// threads: four elements share the 64 bits that SplitMix64 (Steele, Lea, Flood 2014, "Fast splittable pseudorandom
// number generators", figure 14) gives at their place in its sequence, 16 bits each.
//
// Shape suffixes: K bytes of packed bits, element 8 k + i in bit i of byte k.
#include "native.h"

namespace finetune {
namespace {

#define FT_BODY inline __attribute__((always_inline))

FT_BODY uint64_t splitmix(uint64_t seed, uint64_t place) {
  uint64_t z = seed + (place + 1) * 0x9e3779b97f4a7c15u;
  z = (z ^ (z >> 30)) * 0xbf58476d1ce4e5b9u;
  z = (z ^ (z >> 27)) * 0x94d049bb133111ebu;
  return z ^ (z >> 31);
}

// Four bits: which of the quarters of a number are below the threshold.
FT_BODY uint64_t below(uint64_t z, uint64_t threshold) {
  uint64_t bits = 0;
  for (int i = 0; i < 4; ++i) bits |= static_cast<uint64_t>(((z >> (16 * i)) & 0xffffu) < threshold) << i;
  return bits;
}

FT_BODY void bits_body(uint64_t seed, uint64_t threshold, int64_t first, int64_t last, uint8_t* out_K) {
  for (int64_t k = first; k < last; ++k) {
    uint64_t place = 2 * static_cast<uint64_t>(k);
    out_K[k] = static_cast<uint8_t>(below(splitmix(seed, place), threshold) |
                                    below(splitmix(seed, place + 1), threshold) << 4);
  }
}

void bits_scalar(uint64_t seed, uint64_t threshold, int64_t first, int64_t last, uint8_t* out_K) {
  bits_body(seed, threshold, first, last, out_K);
}

template <typename T>
void zero_scalar(const T* x, const uint8_t* kept_K, int64_t first, int64_t last, T* out) {
  for (int64_t n = first; n < last; ++n) out[n] = kept_K[n / 8] >> (n % 8) & 1 ? x[n] : T{0};
}

#ifdef FT_X86
FT_TARGET_AVX2 void bits_avx2(uint64_t seed, uint64_t threshold, int64_t first, int64_t last, uint8_t* out_K) {
  bits_body(seed, threshold, first, last, out_K);
}

FT_TARGET_AVX512 void bits_avx512(uint64_t seed, uint64_t threshold, int64_t first, int64_t last, uint8_t* out_K) {
  bits_body(seed, threshold, first, last, out_K);
}

FT_TARGET_AVX512 void zero_avx512(const uint16_t* x, const uint8_t* kept_K, int64_t first, int64_t last,
                                  uint16_t* out) {
  int64_t n = first;
  for (; n + 32 <= last; n += 32) {
    uint32_t mask;
    std::memcpy(&mask, kept_K + n / 8, 4);
    _mm512_storeu_si512(out + n, _mm512_maskz_loadu_epi16(mask, x + n));
  }
  zero_scalar(x, kept_K, n, last, out);
}

FT_TARGET_AVX512 void zero_avx512(const uint32_t* x, const uint8_t* kept_K, int64_t first, int64_t last,
                                  uint32_t* out) {
  int64_t n = first;
  for (; n + 16 <= last; n += 16) {
    uint16_t mask;
    std::memcpy(&mask, kept_K + n / 8, 2);
    _mm512_storeu_si512(out + n, _mm512_maskz_loadu_epi32(mask, x + n));
  }
  zero_scalar(x, kept_K, n, last, out);
}
#endif

template <typename T>
void zero(const void* x, const uint8_t* kept_K, int64_t first, int64_t last, void* out) {
  const T* from = static_cast<const T*>(x);
  T* to = static_cast<T*>(out);
#ifdef FT_X86
  if (level() >= AVX512) return zero_avx512(from, kept_K, first, last, to);
#endif
  zero_scalar(from, kept_K, first, last, to);
}

void bits(uint64_t seed, uint64_t threshold, int64_t first, int64_t last, uint8_t* out_K) {
#ifdef FT_X86
  if (level() >= AVX512) return bits_avx512(seed, threshold, first, last, out_K);
  if (level() >= AVX2) return bits_avx2(seed, threshold, first, last, out_K);
#endif
  bits_scalar(seed, threshold, first, last, out_K);
}

constexpr int64_t CHUNK = 1 << 14;  // elements or bytes that a thread takes at a time: a multiple of 32

}  // namespace
}  // namespace finetune

// out_K[k] gets the bits of eight elements; a bit is set where 16 random bits are below the threshold, 0 to 65536.
FT_API void ft_kept_bits(uint64_t seed, int64_t threshold, int64_t K, uint8_t* out_K, int32_t threads) {
#pragma omp parallel for num_threads(threads) schedule(static) if (threads > 1)
  for (int64_t k = 0; k < K; k += finetune::CHUNK)
    finetune::bits(seed, threshold, k, k + finetune::CHUNK < K ? k + finetune::CHUNK : K, out_K);
}

// out[n] = x[n] where the bit of n is set, else 0; elements of 2 or 4 bytes.
FT_API void ft_zero_dropped(int32_t element_bytes, const void* x, const uint8_t* kept_K, int64_t N, void* out,
                            int32_t threads) {
#pragma omp parallel for num_threads(threads) schedule(static) if (threads > 1)
  for (int64_t n = 0; n < N; n += finetune::CHUNK) {
    int64_t last = n + finetune::CHUNK < N ? n + finetune::CHUNK : N;
    if (element_bytes == 2)
      finetune::zero<uint16_t>(x, kept_K, n, last, out);
    else
      finetune::zero<uint32_t>(x, kept_K, n, last, out);
  }
}
