// A block of a product by AMX: four accumulators of 16x16, two tiles of each operand a step.
#include "engine_tiles.h"

#ifdef FT_X86
namespace finetune {
namespace {

// Palette 1 of the tile configuration: eight tiles of 16 rows of 64 bytes (Intel SDM, LDTILECFG).
struct alignas(64) TileConfig {
  uint8_t palette = 1;
  uint8_t start_row = 0;
  uint8_t reserved[14] = {};
  uint16_t row_bytes[16] = {64, 64, 64, 64, 64, 64, 64, 64};
  uint8_t rows[16] = {16, 16, 16, 16, 16, 16, 16, 16};
};

// In memory for good: gcc 12 takes LDTILECFG to read 8 bytes and would drop the stores of the others.
const TileConfig CONFIG;

constexpr int LINE = 64;  // bytes of a line of a packed tile

// Granite Rapids stalls for some 230 ns at a tile store that comes more than 20 steps after the one before (seen with
// loads from the second-level cache; no fence or branch cures it). A store now and then that nobody reads does: a block
// of 32 steps takes 1.04 us in the place of 1.27.
constexpr int64_t STORE_EVERY = 8;

// C += A @ B of three tiles. A macro, since gcc puts the tiles' numbers into the text of the instruction.
#define FT_TILE_PRODUCT(c, a, b) \
  do {                           \
    if (INT8)                    \
      _tile_dpbssd(c, a, b);     \
    else                         \
      _tile_dpbf16ps(c, a, b);   \
  } while (0)

template <bool INT8, int A_TILES, int B_TILES>
FT_TARGET_AMX void multiply(const Block& block) {
  constexpr int64_t C_ROW = BLOCK * sizeof(float);
  const bf16* a = block.a;
  const bf16* b = block.b;
  const int64_t a_row = block.a_row * static_cast<int64_t>(sizeof(bf16));
  const int64_t second = TILE * block.a_row;
  alignas(64) char unread[TILE * LINE];
  if (block.add) {
    _tile_loadd(0, block.c, C_ROW);
    if (B_TILES > 1) _tile_loadd(1, block.c + TILE, C_ROW);
    if (A_TILES > 1) _tile_loadd(2, block.c + TILE * BLOCK, C_ROW);
    if (A_TILES > 1 && B_TILES > 1) _tile_loadd(3, block.c + TILE * BLOCK + TILE, C_ROW);
  } else {
    _tile_zero(0);
    _tile_zero(1);
    _tile_zero(2);
    _tile_zero(3);
  }
  for (int64_t step = 0; step < block.steps; ++step, a += block.a_step, b += B_TILES * CELLS) {
    _tile_loadd(4, a, a_row);
    _tile_loadd(6, b, LINE);
    FT_TILE_PRODUCT(0, 4, 6);
    if (B_TILES > 1) {
      _tile_loadd(7, b + CELLS, LINE);
      FT_TILE_PRODUCT(1, 4, 7);
    }
    if (A_TILES > 1) {
      _tile_loadd(5, a + second, a_row);
      FT_TILE_PRODUCT(2, 5, 6);
    }
    if (A_TILES > 1 && B_TILES > 1) FT_TILE_PRODUCT(3, 5, 7);
    if (step % STORE_EVERY == STORE_EVERY - 1) _tile_stored(4, unread, LINE);
  }
  _tile_stored(0, block.c, C_ROW);
  if (B_TILES > 1) _tile_stored(1, block.c + TILE, C_ROW);
  if (A_TILES > 1) _tile_stored(2, block.c + TILE * BLOCK, C_ROW);
  if (A_TILES > 1 && B_TILES > 1) _tile_stored(3, block.c + TILE * BLOCK + TILE, C_ROW);
}

template <bool INT8>
void any_shape(const Block& block) {
  __asm__ volatile("" ::: "memory");  // gcc's tile loads do not say that they read memory
  if (block.a_rows > TILE)
    block.b_tiles > 1 ? multiply<INT8, 2, 2>(block) : multiply<INT8, 2, 1>(block);
  else
    block.b_tiles > 1 ? multiply<INT8, 1, 2>(block) : multiply<INT8, 1, 1>(block);
}

}  // namespace

FT_TARGET_AMX void amx_begin() { _tile_loadconfig(&CONFIG); }

FT_TARGET_AMX void amx_end() { _tile_release(); }

void amx_block(const Block& block) { any_shape<false>(block); }
void amx_block_int8(const Block& block) { any_shape<true>(block); }

}  // namespace finetune
#endif
