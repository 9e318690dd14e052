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
  BlockTiles() = default;
  ~BlockTiles() {
    if (rows_ > 0) asm volatile("tilerelease" : : : "memory");
  }
  BlockTiles(const BlockTiles&) = delete;
  BlockTiles& operator=(const BlockTiles&) = delete;

  // Rows of the block; those beyond are neither read nor written.
  void SetRows(int rows) {
    if (rows == rows_) return;
    rows_ = rows;
    alignas(64) Configuration configuration = {};
    configuration.palette = 1;
    for (int c = 0; c < kChains; ++c) SetShape(configuration, c, rows, kTileRowBytes);
    SetShape(configuration, kWideA, rows, kTileRowBytes);
    SetShape(configuration, kHalfA, rows, kTileRowBytes / 2);
    SetShape(configuration, kWideB, kWideVectors, kTileRowBytes);
    SetShape(configuration, kHalfB, kHalfVectors, kTileRowBytes);
    asm volatile("ldtilecfg %0" : : "m"(configuration) : "memory");
  }

 private:
  struct Configuration {
    uint8_t palette;
    uint8_t start_row;
    uint8_t reserved[14];
    uint16_t row_bytes[16];
    uint8_t rows[16];
  };
  static_assert(sizeof(Configuration) == 64);

  static void SetShape(Configuration& configuration, int tile, int rows, int row_bytes) {
    configuration.rows[tile] = static_cast<uint8_t>(rows);
    configuration.row_bytes[tile] = static_cast<uint16_t>(row_bytes);
  }

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
