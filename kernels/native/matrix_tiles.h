// Products of bf16 numbers by whole tiles (AMX), where machine, compiler and operating system have them.
#pragma once

#include <algorithm>
#include <cstdint>

#include "simd.h"

#if defined(__AMX_TILE__) && defined(__AMX_BF16__) && defined(__AVX512BF16__) && defined(__linux__)
#include <sys/syscall.h>
#include <unistd.h>
#define SPECSERVE_MATRIX_TILES 1
#else
#define SPECSERVE_MATRIX_TILES 0
#endif

namespace specserve {

// Rows of a tile, and words of one of its rows: 16 floats, or 16 pairs of bf16.
constexpr std::int64_t kTileSide = 16;

// Whether the library was built for tiles: then rows and weights are padded to whole ones.
constexpr bool kMatrixTiles = SPECSERVE_MATRIX_TILES != 0;

#if SPECSERVE_MATRIX_TILES
// Whether the operating system lets this process use them; asked once, which is what turns them on.
inline bool matrix_tiles_allowed() {
  constexpr int kRequestPermission = 0x1023, kTileData = 18;  // ARCH_REQ_XCOMP_PERM, XFEATURE_XTILEDATA
  static const bool allowed = syscall(SYS_arch_prctl, kRequestPermission, kTileData) == 0;
  return allowed;
}

// Shapes this thread's tiles for so many rows, 1 to 32: those of weights are 16 x 16 words, those of rows and sums have as
// many rows as there are, up to 16 in the first and the rest in the second. Loading a row that is not there would take as
// long as any other. Anything else on the thread that uses tiles may have changed them.
inline void shape_matrix_tiles(std::int64_t rows) {
  struct alignas(64) {
    std::uint8_t palette = 1, start_row = 0, reserved[14] = {};
    std::uint16_t row_bytes[16] = {64, 64, 64, 64, 64, 64, 64, 64};
    std::uint8_t rows[16] = {};
  } shape;
  const auto first = static_cast<std::uint8_t>(std::min(rows, kTileSide));
  const auto second = static_cast<std::uint8_t>(std::max<std::int64_t>(rows - kTileSide, 1));
  for (int tile : {0, 1, 4}) shape.rows[tile] = first;
  for (int tile : {2, 3, 5}) shape.rows[tile] = second;
  for (int tile : {6, 7}) shape.rows[tile] = kTileSide;
  // GCC's instruction declares that it reads 8 bytes of them: all are in memory before it.
  asm volatile("" : : "r"(&shape) : "memory");
  _tile_loadconfig(&shape);
}

// As many rows of x as the tiles are shaped for, above 16 if TwoTiles, times the 32 outputs of one block. x: [rows][row_words]
// pairs, packed: [row_words][32] pairs, sums: [rows][32]; row_words is a multiple of kTileSide. Weights `ahead` words
// behind those that are used are fetched into the L2 cache, unless it is 0.
//
// Each sum is c + (e + o) over groups of 32 inputs, in their order, from c = 0: e is the chain of fmas over the group's
// even inputs, o that over its odd ones, from 0 each, as the instruction has it.
template <bool TwoTiles>
inline void multiply_matrix_tiles(const std::uint32_t* x, std::int64_t row_words, const std::uint32_t* packed,
                                  std::int64_t ahead, float* sums) {
  constexpr int kRow = 2 * kTileSide;  // outputs of a block
  const std::int64_t stride = 4 * row_words;
  _tile_zero(0);
  _tile_zero(1);
  if constexpr (TwoTiles) {
    _tile_zero(2);
    _tile_zero(3);
  }
  // GCC's loads of tiles declare that they read nothing: what was written to x and packed is in memory before them.
  asm volatile("" : : : "memory");
  for (std::int64_t word = 0; word < row_words; word += kTileSide, packed += kTileSide * kRow) {
    const std::uint32_t *soon = packed + kTileSide * kRow, *later = packed + ahead;
    asm volatile("" : "+r"(soon), "+r"(later));  // else GCC keeps each address of theirs in a register of its own
    // Of the group that comes next and of a later one an eighth, between two other instructions: fetched all at once,
    // they take every place of the lines under way, and the tiles of x, which come from the L2 cache, wait for one.
    const auto fetch = [&](int part) {
      for (std::int64_t line = 4 * part; line < 4 * (part + 1); ++line) {
        __builtin_prefetch(soon + line * kTileSide, 0, 3);
        if (ahead) __builtin_prefetch(later + line * kTileSide, 0, 2);
      }
    };
    _tile_loadd(6, packed, 4 * kRow);
    fetch(0);
    _tile_loadd(4, x + word, stride);
    fetch(1);
    _tile_dpbf16ps(0, 4, 6);
    fetch(2);
    _tile_loadd(7, packed + kTileSide, 4 * kRow);
    fetch(3);
    _tile_dpbf16ps(1, 4, 7);
    fetch(4);
    if constexpr (TwoTiles) _tile_loadd(5, x + kTileSide * row_words + word, stride);
    fetch(5);
    if constexpr (TwoTiles) _tile_dpbf16ps(2, 5, 6);
    fetch(6);
    if constexpr (TwoTiles) _tile_dpbf16ps(3, 5, 7);
    fetch(7);
  }
  _tile_stored(0, sums, 4 * kRow);
  _tile_stored(1, sums + kTileSide, 4 * kRow);
  if constexpr (TwoTiles) {
    _tile_stored(2, sums + kTileSide * kRow, 4 * kRow);
    _tile_stored(3, sums + kTileSide * kRow + kTileSide, 4 * kRow);
  }
}
#else
inline bool matrix_tiles_allowed() { return false; }
inline void shape_matrix_tiles(std::int64_t) {}
#endif

}  // namespace specserve
