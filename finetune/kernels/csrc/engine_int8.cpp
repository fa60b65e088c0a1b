// The product of int8 codes by AMX: x[M, I] @ w[O, I].T in int32, exact, scaled back on the way out where that is
// asked.
//
// The forward of engine.cpp with two codes in the place of one bf16 number. Rows of the weight are copied, a panel at a
// time: as they are stored, 16 of them would meet in one set of the first-level cache wherever I is a power of two.
#include <algorithm>
#include <atomic>

#ifdef _OPENMP
#include <omp.h>
#endif

#include "engine.h"
#include "engine_tiles.h"

namespace finetune {

#ifdef FT_X86
namespace {

constexpr int64_t PANEL_BYTES = int64_t{1} << 20;
constexpr int64_t MOST_COLUMNS = (int64_t{1} << 17) - 1;  // sums of (-128)^2 stay below 2^31

struct Job {
  const Int8Product* product;
  int64_t cells;    // pairs of codes of a row, in whole steps
  int64_t spacing;  // pairs between rows of a panel: an odd number of cache lines
  int64_t width;    // rows of a panel
  const bf16* packed;
};

// Rows of x, zeros behind them, for a packing that reads pairs.
void copy_rows(const int8_t* rows, int64_t count, int64_t I, bf16* out, int64_t spacing, int64_t cells) {
  for (int64_t r = 0; r < count; ++r) {
    char* to = reinterpret_cast<char*>(out + r * spacing);
    std::memcpy(to, rows + r * I, static_cast<size_t>(I));
    std::memset(to + I, 0, static_cast<size_t>(2 * cells - I));
  }
}

// Rows [first, last) of the weight: columns of the result. False where there is no memory.
bool compute_range(const Job& job, int64_t first, int64_t last) {
  const Int8Product& product = *job.product;
  const int64_t strips = ceil_div(product.M, BLOCK), steps = job.cells / DEPTH;
  bf16* panel = static_cast<bf16*>(scratch(SLOT_WEIGHT, static_cast<size_t>(job.width * job.spacing) * sizeof(bf16)));
  float* c = static_cast<float*>(scratch(SLOT_OUTPUT, BLOCK * BLOCK * sizeof(float)));
  if (!panel || !c) return false;
  const Scaling scaling{product.scale_M, product.scale_O, product.unit, product.bias, product.type};
  amx_begin();
  for (int64_t n = first; n < last; n += job.width) {
    int64_t width = std::min(job.width, last - n);
    copy_rows(product.w + n * product.I, width, product.I, panel, job.spacing, job.cells);
    for (int64_t s = 0; s < strips; ++s)
      for (int64_t j = 0; j < width; j += BLOCK) {
        int64_t columns = std::min(BLOCK, width - j), rows = std::min(BLOCK, product.M - s * BLOCK);
        amx_block_int8({panel + j * job.spacing, job.spacing, DEPTH, job.packed + strip_offset(s, job.cells), steps,
                        columns, strip_tiles(s, product.M), c, false});
        store_scaled(reinterpret_cast<int32_t*>(c), s * BLOCK, rows, n + j, columns, scaling, product.y, product.O);
      }
  }
  amx_end();
  return true;
}

// Strip s of x, packed by way of a copy whose rows are whole steps. False where there is no memory.
bool pack(const Job& job, int64_t s, bf16* packed) {
  const Int8Product& product = *job.product;
  int64_t rows = std::min(BLOCK, product.M - s * BLOCK);
  bf16* copy = static_cast<bf16*>(scratch(SLOT_WEIGHT, static_cast<size_t>(BLOCK * job.cells) * sizeof(bf16)));
  if (!copy) return false;
  copy_rows(product.x + s * BLOCK * product.I, rows, product.I, copy, job.cells, job.cells);
  pack_columns(copy, rows, job.cells, 0, packed + strip_offset(s, job.cells));
  return true;
}

}  // namespace
#endif

bool engine_linear_int8(const Int8Product& product, int threads) {
#ifdef FT_X86
  const int64_t M = product.M, O = product.O, I = product.I;
  if (M <= 0 || O <= 0 || I <= 0 || I > MOST_COLUMNS || level() < AMX) return false;
  Job job{&product, ceil_div(I, 2 * DEPTH) * DEPTH, 0, 0, nullptr};
  job.spacing = (job.cells / DEPTH | 1) * DEPTH;
  int64_t fitting = PANEL_BYTES / static_cast<int64_t>(sizeof(bf16)) / job.spacing / BLOCK * BLOCK;
  job.width = M <= BLOCK ? BLOCK : std::max(BLOCK, std::min(fitting, ceil_div(O, BLOCK) * BLOCK));
  bf16* packed = static_cast<bf16*>(scratch(SLOT_INPUT, packed_bytes(M, job.cells)));
  if (!packed) return false;
  job.packed = packed;
  int64_t strips = ceil_div(M, BLOCK), units = ceil_div(O, BLOCK);
  threads = static_cast<int>(std::max<int64_t>(1, std::min<int64_t>(threads, units)));
  std::atomic<bool> done{true};
#pragma omp parallel num_threads(threads)
  {
#ifdef _OPENMP
    int64_t team = omp_get_num_threads(), me = omp_get_thread_num();
#else
    int64_t team = 1, me = 0;
#endif
#pragma omp for schedule(static)
    for (int64_t s = 0; s < strips; ++s)
      if (!pack(job, s, packed)) done = false;
    int64_t first = units * me / team * BLOCK, last = std::min(O, units * (me + 1) / team * BLOCK);
    if (first < last && !compute_range(job, first, last)) done = false;
  }
  return done;
#else
  return false;
#endif
}

}  // namespace finetune

// y[M, O] = x[M, I] @ w[O, I].T of int8 codes in int32, exact; or, where scale_M is given, in the DType `type` (float32
// or bf16) y = product * (scale_M[m] * scale_O[o] * unit) + bias[o], in float32 and rounded once; bias, of that type,
// may be null. 0 where this CPU has no tiles.
FT_API int32_t ft_int8_linear(const int8_t* x, const int8_t* w, const float* scale_M, const float* scale_O, float unit,
                              const void* bias, void* y, int32_t type, int64_t M, int64_t O, int64_t I,
                              int32_t threads) {
  using namespace finetune;
  return engine_linear_int8({x, w, scale_M, scale_O, unit, bias, y, static_cast<DType>(type), M, O, I}, threads);
}
