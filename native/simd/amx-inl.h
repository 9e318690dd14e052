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

// Which tiles are what: two of A, two of B, and a C for each pair.
constexpr int TileC(int a, int b) { return 2 * a + b; }
constexpr int TileA(int a) { return 4 + a; }
constexpr int TileB(int b) { return 6 + b; }

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

// Tiles of a product as above, of rows of one or two tiles of A.
class Tiles {
 public:
  // Rows of the two tiles of A and of the products they take part in. Clears all tiles if that is new.
  void SetRows(int first, int second) {
    if (first == rows_[0] && second == rows_[1]) return;
    rows_[0] = first;
    rows_[1] = second;
    for (int a = 0; a < 2; ++a) {
      shapes_.Set(TileA(a), rows_[a], kTileRowBytes);
      shapes_.Set(TileB(a), kTileRows, kTileRowBytes);
      for (int b = 0; b < 2; ++b) shapes_.Set(TileC(a, b), rows_[a], kTileRowBytes);
    }
    shapes_.Configure();
  }

 private:
  TileShapes shapes_;
  int rows_[2] = {0, 0};
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

// Lines to ask for into the L2 cache beside each step of a walk, from two places.
struct TileFetch {
  const char* from[2];
  int lines_per_step;
};

// Where a walk over steps of 32 columns begins: two tiles of A, each `a_bytes` from its next one, and two of B, which lie
// one behind the other.
struct TileWalk {
  const char* a[2];
  int64_t a_bytes[2];
  const char* b[2];
  TileFetch fetch;
};

// C += A B for each pair of kNumA tiles of A and kNumB tiles of B, step by step. A function of its own, so that nothing
// else takes the registers that addresses are kept in.
template <class Dot, int kNumA, int kNumB>
__attribute__((noinline)) void MultiplyTiles(const TileWalk& walk, int64_t num_steps) {
  const char *a0 = walk.a[0], *a1 = walk.a[1], *b0 = walk.b[0], *b1 = walk.b[1];
  const int64_t a0_bytes = walk.a_bytes[0], a1_bytes = walk.a_bytes[1];
  const char *fetch0 = walk.fetch.from[0], *fetch1 = walk.fetch.from[1];
  const int fetch_lines = walk.fetch.lines_per_step;
  for (; num_steps > 0; --num_steps) {
    for (int i = 0; i < fetch_lines; ++i, fetch0 += 64, fetch1 += 64) {
      __builtin_prefetch(fetch0, 0, 2);
      __builtin_prefetch(fetch1, 0, 2);
    }
    LoadTile<TileA(0)>(a0, kTileRowBytes);
    LoadTile<TileB(0)>(b0, kTileRowBytes);
    Dot::template Run<TileC(0, 0), TileA(0), TileB(0)>();
    if constexpr (kNumB == 2) {
      LoadTile<TileB(1)>(b1, kTileRowBytes);
      Dot::template Run<TileC(0, 1), TileA(0), TileB(1)>();
    }
    if constexpr (kNumA == 2) {
      LoadTile<TileA(1)>(a1, kTileRowBytes);
      Dot::template Run<TileC(1, 0), TileA(1), TileB(0)>();
      if constexpr (kNumB == 2) Dot::template Run<TileC(1, 1), TileA(1), TileB(1)>();
    }
    a0 += a0_bytes;
    a1 += a1_bytes;
    b0 += kTileBytes;
    b1 += kTileBytes;
  }
}

inline void ZeroProducts() {
  ZeroTile<0>();
  ZeroTile<1>();
  ZeroTile<2>();
  ZeroTile<3>();
}

}  // namespace
}  // namespace HEADRACE_TARGET
}  // namespace headrace

#endif
