// Products over a Decoder: what is decoded when, who computes it, and by which instructions.
//
// A thread takes a range of N, the columns of the result, and goes through it a panel at a time: it decodes the panel
// into a scratch that stays in its second-level cache and multiplies all of the packed input by it. K is cut where a
// panel would grow too large; then the blocks of the result wait in float32 for the next part.
#include "engine.h"

#include <algorithm>
#include <atomic>

#ifdef _OPENMP
#include <omp.h>
#endif

#include "engine_tiles.h"

namespace finetune {

#ifdef FT_X86
namespace {

// result[M, N] = input[M, K] @ (w[N, K].T or w[K, N]) + bias[N]
struct Job {
  const Decoder* decoder;
  int64_t M, N, K;
  bool transposed;  // w is [N, K]: the forward
  const bf16* input;
  const bf16* bias;
  bf16* result;
  bool tiles;      // AMX
  int64_t height;  // rows that pack_few lays out, where inner products serve; else 0
  int64_t depth;  // K of a panel, a multiple of 32
  int64_t width;  // N of a panel, a multiple of 32
  const bf16* packed;
};

// Panels, measured on Granite Rapids and meant for second-level caches from 1 MiB (Zen 4). The forward takes long
// pieces of rows, which decode fast, and writes few partial results. The gradient would read short pieces of very many
// rows; it takes longer pieces of fewer rows, and its blocks of packed input then fit the first-level cache.
constexpr int64_t LINEAR_DEPTH = 2048, GRADIENT_DEPTH = 320;
constexpr int64_t WHOLE_DEPTH = 1024;  // up to it a gradient is not cut: the rows are few
constexpr int64_t PANEL_BYTES = int64_t{1} << 20;
constexpr int64_t GROUP = 8;  // rows that are decoded before their pairs are interleaved
// Above these M decoding everything and the vendor's product are as fast where there are no tiles: by VDPBF16PS, the
// vendor already computes at 95 % of what the CPU can (measured on Zen 4): there is nothing to hide the decoding in.
constexpr int64_t MOST_ROWS_WITHOUT_TILES = 128;

// Between rows of decoded numbers: an odd number of cache lines, so that rows do not share their sets.
int64_t row_spacing(int64_t columns) { return (ceil_div(columns, DEPTH) | 1) * DEPTH; }

size_t panel_bytes(const Job& job) {
  int64_t cells = job.transposed ? job.width * row_spacing(job.depth)
                                 : job.width * job.depth + GROUP * row_spacing(job.width);
  return static_cast<size_t>(cells) * sizeof(bf16);
}

// Rows n.. of w, columns k.., as A; numbers beyond K are zero.
void fill_rows(const Job& job, int64_t n, int64_t width, int64_t k, int64_t depth, bf16* panel) {
  int64_t spacing = row_spacing(job.depth);
  job.decoder->panel(job.decoder->weight, n, width, k, depth, panel, spacing);
  int64_t missing = ceil_div(depth, DEPTH) * DEPTH - depth;
  if (missing)
    for (int64_t r = 0; r < width; ++r)
      std::memset(panel + r * spacing + depth, 0, static_cast<size_t>(missing) * sizeof(bf16));
}

// Rows k.. of w, columns n.., as B; rows beyond K are zero. A few rows at a time, which stay in the first-level cache.
void fill_columns(const Job& job, int64_t n, int64_t width, int64_t k, int64_t depth, bf16* panel) {
  int64_t steps = ceil_div(depth, DEPTH), columns = ceil_div(width, BLOCK) * BLOCK, spacing = row_spacing(width);
  bf16* rows = panel + job.depth * job.width;
  for (int64_t first = 0; first < steps * DEPTH; first += GROUP) {
    int64_t count = std::max<int64_t>(0, std::min(GROUP, depth - first));
    if (count) job.decoder->panel(job.decoder->weight, k + first, count, n, width, rows, spacing);
    std::memset(rows + count * spacing, 0, static_cast<size_t>((GROUP - count) * spacing) * sizeof(bf16));
    bf16* tiles = panel + first / DEPTH * 2 * CELLS + first % DEPTH / 2 * DEPTH;
    interleave(rows, spacing, GROUP, columns, tiles, steps * 2 * CELLS);
  }
}

// One block of the result: strip s by columns n + j.. over a panel of `depth` from k.
void compute(const Job& job, int64_t s, int64_t n, int64_t j, int64_t k, int64_t depth, const bf16* panel, float* c) {
  int64_t steps = ceil_div(depth, DEPTH), tiles = strip_tiles(s, job.M);
  int64_t step_cells = job.height ? job.height * DEPTH : tiles * CELLS;
  int64_t rows = std::min(BLOCK, job.M - s * BLOCK), columns = std::min(BLOCK, job.N - n - j);
  const bf16* strip = job.packed + strip_offset(s, job.K) + k / DEPTH * step_cells;
  int64_t spacing = row_spacing(job.depth);
  const bf16* part = job.transposed ? panel + j * spacing : panel + j * steps * DEPTH;
  Block block = job.transposed ? Block{part, spacing, DEPTH, strip, steps, columns, tiles, c, k > 0}
                               : Block{strip, DEPTH, tiles * CELLS, part, steps, rows, 2, c, k > 0};
  if (job.tiles)
    amx_block(block);
  else if (job.height)
    avx512_dots(block, job.height);
  else
    avx512_block(block);
  if (k + depth < job.K) return;
  bf16* out = job.result + s * BLOCK * job.N + n + j;
  if (job.transposed)
    store_columns(c, rows, columns, job.bias ? job.bias + n + j : nullptr, out, job.N);
  else
    store_rows(c, rows, columns, out, job.N);
}

// Columns [first, last) of the result. False where there is no memory.
bool compute_range(const Job& job, int64_t first, int64_t last) {
  int64_t strips = ceil_div(job.M, BLOCK);
  bool whole = job.depth >= job.K;
  bf16* panel = static_cast<bf16*>(scratch(SLOT_WEIGHT, panel_bytes(job)));
  int64_t blocks = whole ? 1 : strips * (job.width / BLOCK);
  size_t partial_bytes = static_cast<size_t>(blocks * BLOCK * BLOCK) * sizeof(float);
  float* partial = static_cast<float*>(scratch(SLOT_OUTPUT, partial_bytes));
  if (!panel || !partial) return false;
  if (job.tiles) amx_begin();
  for (int64_t n = first; n < last; n += job.width)
    for (int64_t k = 0; k < job.K; k += job.depth) {
      int64_t width = std::min(job.width, last - n), depth = std::min(job.depth, job.K - k);
      (job.transposed ? fill_rows : fill_columns)(job, n, width, k, depth, panel);
      for (int64_t s = 0; s < strips; ++s)
        for (int64_t j = 0; j < width; j += BLOCK) {
          int64_t slot = whole ? 0 : s * (job.width / BLOCK) + j / BLOCK;
          compute(job, s, n, j, k, depth, panel, partial + slot * BLOCK * BLOCK);
        }
    }
  if (job.tiles) amx_end();
  return true;
}

void pack(const Job& job, int64_t s, bf16* packed) {
  if (job.height)
    pack_few(job.input, job.M, job.K, job.height, packed);
  else
    (job.transposed ? pack_columns : pack_rows)(job.input, job.M, job.K, s, packed + strip_offset(s, job.K));
}

void plan(Job& job) {
  bool cut = !job.transposed && job.K > WHOLE_DEPTH;
  int64_t parts = ceil_div(job.K, cut ? GRADIENT_DEPTH : LINEAR_DEPTH);
  job.depth = ceil_div(ceil_div(job.K, parts), DEPTH) * DEPTH;
  int64_t bytes = PANEL_BYTES / (cut || !job.tiles ? 2 : 1);
  int64_t width = bytes / static_cast<int64_t>(sizeof(bf16)) / job.depth / BLOCK * BLOCK;
  if (job.transposed && job.M <= BLOCK) width = BLOCK;  // nothing is used twice
  job.width = std::max(BLOCK, std::min(width, ceil_div(job.N, BLOCK) * BLOCK));
}

bool run(Job& job, int threads) {
  if (job.M <= 0 || job.N <= 0 || job.K <= 0) return false;
  if (level() < AVX512_BF16) return false;
  job.tiles = level() == AMX;
  if (!job.tiles && job.M > MOST_ROWS_WITHOUT_TILES) return false;
  job.height = !job.tiles && job.transposed && job.M <= MOST_DOTS ? dots_height(job.M) : 0;
  plan(job);
  bf16* packed = static_cast<bf16*>(scratch(SLOT_INPUT, packed_bytes(job.M, job.K)));
  if (!packed) return false;
  job.packed = packed;
  int64_t strips = ceil_div(job.M, BLOCK), units = ceil_div(job.N, BLOCK);
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
    for (int64_t s = 0; s < strips; ++s) pack(job, s, packed);
    int64_t first = units * me / team * BLOCK, last = std::min(job.N, units * (me + 1) / team * BLOCK);
    if (first < last && !compute_range(job, first, last)) done = false;
  }
  return done;
}

}  // namespace
#endif

bool engine_linear(const Decoder& decoder, int64_t M, int64_t O, int64_t I, const bf16* x, const bf16* bias, bf16* y,
                   int threads) {
#ifdef FT_X86
  Job job{&decoder, M, O, I, true, x, bias, y, false, 0, 0, 0, nullptr};
  return run(job, threads);
#else
  return false;
#endif
}

bool engine_input_gradient(const Decoder& decoder, int64_t M, int64_t O, int64_t I, const bf16* g, bf16* gx,
                           int threads) {
#ifdef FT_X86
  Job job{&decoder, M, I, O, false, g, nullptr, gx, false, 0, 0, 0, nullptr};
  return run(job, threads);
#else
  return false;
#endif
}

}  // namespace finetune
