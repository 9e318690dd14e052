// The tile registers in attention: how the products of a block of rows are laid over them.
//
//   bfloat16
//   scores   C [rows, 16 positions]     += q [rows, 32 of head_dim] keys [32, 16]       a C for each of kChains panels
//   values   C [rows, 16 of head_dim]   += p [rows, 16 positions]   values [16, 16]     a C for each of kChains chunks
//   int8
//   scores   C [rows, 16 positions]     += q [rows, 64 of head_dim] keys [64, 16]       a C for each of kChains panels
//   values   C [rows, 16 of head_dim]   += p [rows, 64 positions]   values [64, 16]     a C for each digit of p
//
// The cache holds keys and values as tiles of B. A wide step is 64 bytes of each row of A and all rows of B; a half
// step is half of both: a panel of values, or what is left of a key.

#ifdef __AMX_TILE__
#include "simd/amx-inl.h"
#endif

namespace headrace {
namespace HEADRACE_TARGET {
namespace {

#ifdef __AMX_TILE__

constexpr bool HasTiles(Format format) { return format == Format::kBfloat16 || format == Format::kInt8; }

// Whether a block of so many rows is computed in tiles. Products of integers are the same on vectors, which for few rows
// take less time.
constexpr int kMinIntRows = 6;
constexpr bool UsesTiles(Format format, int rows) {
  return HasTiles(format) && (format != Format::kInt8 || rows >= kMinIntRows);
}

constexpr int kChains = 4;  // in 16 cycles each or 8, as many as hide what a product takes
constexpr int kWideA = 4, kWideB = 5, kHalfA = 6, kHalfB = 7;
constexpr int kWideVectors = kTileRows, kHalfVectors = kTileRows / 2;  // of the cache, rows of B

// The tile registers of the calling thread while it lives.
class BlockTiles {
 public:
  // Rows of the block; those beyond are neither read nor written.
  void SetRows(int rows) {
    if (rows == rows_) return;
    rows_ = rows;
    for (int c = 0; c < kChains; ++c) shapes_.Set(c, rows, kTileRowBytes);
    shapes_.Set(kWideA, rows, kTileRowBytes);
    shapes_.Set(kHalfA, rows, kTileRowBytes / 2);
    shapes_.Set(kWideB, kWideVectors, kTileRowBytes);
    shapes_.Set(kHalfB, kHalfVectors, kTileRowBytes);
    shapes_.Configure();
  }

 private:
  TileShapes shapes_;
  int rows_ = 0;
};

// A row of a tile.
inline I32x16 LoadInts(const void* from) {
  I32x16 ints;
  memcpy(&ints, from, sizeof ints);
  return ints;
}

#else

constexpr bool HasTiles(Format) { return false; }
constexpr bool UsesTiles(Format, int) { return false; }

class BlockTiles {
 public:
  void SetRows(int) {}
};

#endif

}  // namespace
}  // namespace HEADRACE_TARGET
}  // namespace headrace
