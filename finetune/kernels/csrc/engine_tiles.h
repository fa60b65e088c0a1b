// The tiles that the engines compute with: what a block of the product is, and how operands are laid out for it.
//
// A block is C[32, 32] += A[32, K] @ B[K, 32], K in steps of 32. A has rows with K contiguous. B is in tiles of 16
// columns and 32 of K, 1 KiB each: 16 lines of two neighbours in K for each of 16 columns, as TDPBF16PS and VDPBF16PS
// want them. The forward takes the decoded weight for A and packed x for B, and gets y transposed; the gradient of the
// input takes packed g for A and the decoded weight, its rows interleaved by pairs, for B.
//
// Shape suffixes: M rows of the input, K what is summed over, N the columns of the result.
#pragma once

#include "native.h"

#ifdef FT_X86
namespace finetune {

constexpr int64_t TILE = 16;              // rows or columns of a tile
constexpr int64_t DEPTH = 32;             // K of a tile
constexpr int64_t CELLS = TILE * DEPTH;   // bf16 numbers of a tile
constexpr int64_t BLOCK = 2 * TILE;       // rows and columns of a block

// One block of a product; the operands are read whole, so they are padded to 16 rows, 16 columns and 32 of K.
struct Block {
  const bf16* a;       // row r, step k at a + r * a_row + k * a_step
  int64_t a_row;
  int64_t a_step;
  const bf16* b;       // step k at b + k * b_tiles * CELLS
  int64_t steps;       // of 32
  int64_t a_rows;      // 1..32
  int64_t b_tiles;     // 1 or 2
  float* c;            // [32, 32]
  bool add;            // to what c holds
};

inline int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

// Bytes of rows [M, K] packed by either function below: strips of 32 rows (the last of 16 where that is enough), each
// of ceil(K / 32) steps of two tiles (or one), padded with zeros.
size_t packed_bytes(int64_t M, int64_t K);
// Where strip s begins, and how many tiles wide it is.
inline int64_t strip_offset(int64_t strip, int64_t K) { return strip * 2 * CELLS * ceil_div(K, DEPTH); }
inline int64_t strip_tiles(int64_t strip, int64_t M) { return M - strip * BLOCK > TILE ? 2 : 1; }

// Strip s of rows[M, K] as B tiles (row m becomes column m), and as rows of A (32 or 16 rows a step).
void pack_columns(const bf16* rows, int64_t M, int64_t K, int64_t strip, bf16* packed);
void pack_rows(const bf16* rows, int64_t M, int64_t K, int64_t strip, bf16* packed);
// All rows, `height` of them a step (at most 32, of which M are there), as avx512_dots wants them.
void pack_few(const bf16* rows, int64_t M, int64_t K, int64_t height, bf16* packed);

// rows[count, columns] of K, `stride` apart, to the lines of B tiles that begin at `tiles`: those of columns 32 j and
// on at tiles + j * spacing. The count is even, columns come by 32. Within 32 columns those are first that one unpack
// instruction gives: 0-3, 8-11, 16-19, 24-27 in the first tile, the others in the second.
void interleave(const bf16* rows, int64_t stride, int64_t count, int64_t columns, bf16* tiles, int64_t spacing);

// c[m][n], m < rows and n < columns, its columns in the order of `interleave`, rounded to out[m * stride + n].
void store_rows(const float* c, int64_t rows, int64_t columns, bf16* out, int64_t stride);
// c[n][m] + bias[n], likewise; bias may be null.
void store_columns(const float* c, int64_t rows, int64_t columns, const bf16* bias, bf16* out, int64_t stride);

// What becomes of int32 sums: themselves where `rows` is null, else sum * (rows[m] * columns[n] * unit) + bias[n] in
// float32, rounded once to `type` (float32 or bf16), which the bias, where there is one, has too.
struct Scaling {
  const float* rows;
  const float* columns;
  float unit;
  const void* bias;
  DType type;
};
// c[n][m], int32, likewise to rows m.. and columns n.. of out[M, N].
void store_scaled(const int32_t* c, int64_t m, int64_t rows, int64_t n, int64_t columns, const Scaling& scaling,
                  void* out, int64_t N);

// The kernels: one block, by tiles or by vectors. Tiles are to be set up before, and given back after, by each thread.
void amx_begin();
void amx_end();
void amx_block(const Block& block);
void amx_block_int8(const Block& block);  // int8 in pairs for each bf16 number, and int32 for each float32
void avx512_block(const Block& block);

// A block whose b is packed by pack_few, for M <= MOST_DOTS: by inner products along K, where lanes over M were idle.
constexpr int64_t MOST_DOTS = 8;
int64_t dots_height(int64_t M);  // rows that pack_few is to lay out: 1, 2, 4 or 8
void avx512_dots(const Block& block, int64_t height);

}  // namespace finetune
#endif
