// Tiles of AMX: eight registers of up to 16 rows of 64 bytes, and products of two of them.
//
//   C [rows, 16] float32 += A [rows, 32] B [32, 16]        A: a row is 32 values, B: row i holds w[2 i][n] w[2 i + 1][n]
//
// An element of C is a chain of its own: within one product the even and the odd places along K are summed apart, each
// by fused multiply-adds in ascending order, and the two sums, added, are added to C (Intel SDM, TDPBF16PS). It depends
// on no other row or column, so that neither the shape of the tiles nor what else lies in them changes a bit of it.
//
// The compiler knows nothing of what tiles read, so all accesses here tell it that memory is used.
#ifdef __AMX_TILE__

#include <cstdint>

namespace headrace {
namespace HEADRACE_TARGET {
namespace {

constexpr int kTileRows = 16;
constexpr int kTileColumns = 32;  // of two bytes
constexpr int kTileRowBytes = 64;
constexpr int kTileBytes = kTileRows * kTileRowBytes;

// Shapes of the calling thread's tile registers, from Configure on while this lives.
class TileShapes {
 public:
  TileShapes() = default;
  ~TileShapes() {
    if (is_configured_) asm volatile("tilerelease" : : : "memory");
  }
  TileShapes(const TileShapes&) = delete;
  TileShapes& operator=(const TileShapes&) = delete;

  void Set(int tile, int rows, int row_bytes) {
    configuration_.rows[tile] = static_cast<uint8_t>(rows);
    configuration_.row_bytes[tile] = static_cast<uint16_t>(row_bytes);
  }
  // Clears all tiles.
  void Configure() {
    is_configured_ = true;
    asm volatile("ldtilecfg %0" : : "m"(configuration_) : "memory");
  }

 private:
  struct alignas(64) Configuration {
    uint8_t palette = 1;
    uint8_t start_row = 0;
    uint8_t reserved[14] = {};
    uint16_t row_bytes[16] = {};
    uint8_t rows[16] = {};
  };
  static_assert(sizeof(Configuration) == 64);

  Configuration configuration_;
  bool is_configured_ = false;
};

template <int kTile>
inline void ZeroTile() {
  asm volatile("tilezero %%tmm%c0" : : "i"(kTile) : "memory");
}
template <int kTile>
inline void LoadTile(const void* from, int64_t row_bytes) {
  asm volatile("tileloadd (%0,%1,1), %%tmm%c2" : : "r"(from), "r"(row_bytes), "i"(kTile) : "memory");
}
template <int kTile>
inline void StoreTile(void* to, int64_t row_bytes) {
  asm volatile("tilestored %%tmm%c2, (%0,%1,1)" : : "r"(to), "r"(row_bytes), "i"(kTile) : "memory");
}

// What the products of two bytes each are.
struct Bf16Dot {
  template <int kC, int kA, int kB>
  static void Run() {
    asm volatile("tdpbf16ps %%tmm%c2, %%tmm%c1, %%tmm%c0" : : "i"(kC), "i"(kA), "i"(kB) : "memory");
  }
};
// Of bytes, exact in int32: rows of A signed and B unsigned, and the other way round.
struct SignedUnsignedDot {
  template <int kC, int kA, int kB>
  static void Run() {
    asm volatile("tdpbsud %%tmm%c2, %%tmm%c1, %%tmm%c0" : : "i"(kC), "i"(kA), "i"(kB) : "memory");
  }
};
struct UnsignedSignedDot {
  template <int kC, int kA, int kB>
  static void Run() {
    asm volatile("tdpbusd %%tmm%c2, %%tmm%c1, %%tmm%c0" : : "i"(kC), "i"(kA), "i"(kB) : "memory");
  }
};
#ifdef __AVX512FP16__
struct Fp16Dot {
  // tdpfp16ps, in bytes: assemblers before binutils 2.40 do not know it.
  template <int kC, int kA, int kB>
  static void Run() {
    constexpr int kPrefix = (15 - kB) << 3 | 3, kModRm = 0xc0 | kC << 3 | kA;
    asm volatile(".byte 0xc4, 0xe2, %c0, 0x5c, %c1" : : "i"(kPrefix), "i"(kModRm) : "memory");
  }
};
#endif

}  // namespace
}  // namespace HEADRACE_TARGET
}  // namespace headrace

#endif
