// The CPU's level and the scratch memory.
#include "native.h"

#include <atomic>
#include <cstdlib>

#ifdef FT_X86
#include <cpuid.h>
#if defined(__linux__)
#include <sys/mman.h>
#include <sys/syscall.h>
#include <unistd.h>
#endif
#endif

namespace finetune {
namespace {

#ifdef FT_X86
// Linux hands out the tiles' state on demand only (Documentation/arch/x86/xstate.rst).
bool tiles_allowed() {
#if defined(__linux__)
  constexpr int ARCH_REQ_XCOMP_PERM = 0x1023, XFEATURE_XTILEDATA = 18;
  return syscall(SYS_arch_prctl, ARCH_REQ_XCOMP_PERM, XFEATURE_XTILEDATA) == 0;
#else
  return false;
#endif
}

bool has_tiles() {
  unsigned a, b, c, d;
  if (!__get_cpuid_count(7, 0, &a, &b, &c, &d)) return false;
  constexpr unsigned BF16_TILES = 1u << 22, TILES = 1u << 24, INT8_TILES = 1u << 25;
  return (d & BF16_TILES) && (d & TILES) && (d & INT8_TILES) && tiles_allowed();
}
#endif

Level detect() {
#ifdef FT_X86
  __builtin_cpu_init();
  if (!(__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma"))) return SCALAR;
  if (!(__builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512vl") &&
        __builtin_cpu_supports("avx512dq")))
    return AVX2;
  if (!(__builtin_cpu_supports("avx512vbmi") && __builtin_cpu_supports("avx512vnni") &&
        __builtin_cpu_supports("avx512bf16")))
    return AVX512;
  return has_tiles() ? AMX : AVX512_BF16;
#else
  return SCALAR;
#endif
}

Level found() {
  static const Level value = detect();
  return value;
}

std::atomic<int32_t> lowered{AMX};

struct Buffer {
  void* data = nullptr;
  size_t bytes = 0;
  ~Buffer() { std::free(data); }
};

}  // namespace

Level level() {
  int32_t most = lowered.load(std::memory_order_relaxed);
  return found() < most ? found() : static_cast<Level>(most);
}

void* scratch(Slot slot, size_t bytes) {
  static thread_local Buffer buffers[SLOTS];
  Buffer& buffer = buffers[slot];
  if (buffer.bytes >= bytes) return buffer.data;
  std::free(buffer.data);
  constexpr size_t HUGE_PAGE = size_t{1} << 21;
  size_t unit = bytes >= HUGE_PAGE ? HUGE_PAGE : 64;
  size_t size = (bytes + unit - 1) / unit * unit;
  buffer.data = std::aligned_alloc(unit, size);
  buffer.bytes = buffer.data ? size : 0;
#if defined(__linux__) && defined(MADV_HUGEPAGE)
  if (buffer.data && unit == HUGE_PAGE) madvise(buffer.data, size, MADV_HUGEPAGE);
#endif
  return buffer.data;
}

}  // namespace finetune

// Counts the versions of this interface: see ABI in finetune/kernels/native.py.
FT_API int32_t ft_abi() { return 6; }

// The level in force, as finetune/kernels/native.py numbers them.
FT_API int32_t ft_level() { return finetune::level(); }

// Use no more than a level from now on; the CPU's own is the ceiling whatever is asked.
FT_API void ft_set_level(int32_t most) { finetune::lowered.store(most, std::memory_order_relaxed); }
