// The inner loop of products in tiles: some tiles of x and some panels of W, step by step.
#ifdef __AMX_TILE__

namespace headrace {
namespace HEADRACE_TARGET {
namespace {

// A product for each tile of x and panel, and one tile of each that is loaded anew all the time.
constexpr int kProducts = 6;
constexpr int kTileOfX = kProducts, kTileOfW = kProducts + 1;

// Tiles of x and panels that meet: integers unpacked once serve the ones, rows loaded once the others. Tiles of many
// rows do not stay in the L1 cache, and take the way from the L2 cache that weights need.
constexpr int kMostTiles = 3;
constexpr int PanelsFor(int num_a) { return std::min(3, kProducts / num_a); }

// How early weights and scales of each panel that come from memory are asked for into the L1 cache.
template <class Kernel>
constexpr int kStreamBytes = Kernel::kIsUnpacked ? 1024 : 384;
constexpr int kStreamScaleBytes = 512;

// Integers are unpacked a step before they are multiplied: tiles are loaded from the cache, not from stores under way.
// Few steps are kept, so that they stay in the L1 cache while weights pass through it.
constexpr int kKeptSteps = 2;

// Asks for lines into the L1 cache (3) or the L2 cache (2); past the end of a matrix for nothing that comes.
template <int kLocality>
inline void Fetch(const void* from, int64_t ahead_bytes, int num_lines) {
  const auto address = reinterpret_cast<uintptr_t>(from) + ahead_bytes;
  for (int i = 0; i < num_lines; ++i)
    __builtin_prefetch(reinterpret_cast<const void*>(address + i * kVectorBytes), 0, kLocality);
}

// The step of a panel that its last columns are part of, filled up with zeros.
inline void PadStep(const PackedView& w, int64_t panel, int64_t step, char* to) {
  const int64_t num_bytes = w.panel_bytes - step * kTileBytes;
  memcpy(to, w.weights + panel * w.panel_bytes + step * kTileBytes, num_bytes);
  memset(to + num_bytes, 0, kTileBytes - num_bytes);
}

// A step of two tiles of x and two panels: both tiles are kept.
template <class Dot>
inline void MultiplyPairs(const char* x, int64_t x_bytes, const char* tile, int64_t tile_bytes) {
  constexpr int kSecond = kTileOfX - 1;
  LoadTile<kTileOfX>(x, kTileRowBytes);
  LoadTile<kTileOfW>(tile, kTileRowBytes);
  Dot::template Run<0, kTileOfX, kTileOfW>();
  LoadTile<kSecond>(x + x_bytes, kTileRowBytes);
  Dot::template Run<2, kSecond, kTileOfW>();
  LoadTile<kTileOfW>(tile + tile_bytes, kTileRowBytes);
  Dot::template Run<1, kTileOfX, kTileOfW>();
  Dot::template Run<3, kSecond, kTileOfW>();
}

// A step of tiles of x and panels, which lie x_bytes and tile_bytes apart. Every other tile of x meets the panels in
// the opposite order, so that it finds one loaded.
template <class Dot, int kNumA, int kNumP>
inline void MultiplyStep(const char* x, int64_t x_bytes, const char* tile, int64_t tile_bytes) {
  if constexpr (kNumA == 2 && kNumP == 2) {
    MultiplyPairs<Dot>(x, x_bytes, tile, tile_bytes);
    return;
  }
  Unroll<kNumA>([&](auto a) HEADRACE_LAMBDA {
    LoadTile<kTileOfX>(x + a * x_bytes, kTileRowBytes);
    Unroll<kNumP>([&](auto i) HEADRACE_LAMBDA {
      constexpr int kP = a % 2 == 0 ? i : kNumP - 1 - i;
      if constexpr (a == 0 || i > 0) LoadTile<kTileOfW>(tile + kP * tile_bytes, kTileRowBytes);
      Dot::template Run<a * kNumP + kP, kTileOfX, kTileOfW>();
    });
  });
}

// Steps of some panels, which lie one behind the other, and tiles of x.
struct StepWalk {
  const uint8_t* weights;
  int64_t panel_bytes;
  const uint16_t* scales;
  int64_t panel_scales;
  const char* x;
  int64_t x_bytes;  // from one tile to the next one
  int64_t x_step_bytes;
  int64_t num_steps;
  // What is asked for beside each step where weights are in the L2 cache already: lines of panels that come later.
  int64_t fetch_bytes;
  int fetch_lines;
  char* memory;
};

template <class Kernel, int kNumP>
inline void UnpackStep(const uint8_t* w, int64_t panel_bytes, const uint16_t* scales, int64_t panel_scales, char* to) {
  for (int p = 0; p < kNumP; ++p) Kernel::Unpack(w + p * panel_bytes, scales + p * panel_scales, to + p * kTileBytes);
}

// A function of its own, and none of its variables in memory: what is unpacked goes through all places of a page, and a
// load from the stack would wait for the store that it could depend on. kIsFromMemory: the weights come from memory,
// not from the L2 cache.
template <class Kernel, int kNumA, int kNumP, bool kIsFromMemory>
__attribute__((noinline)) void MultiplyAll(const StepWalk& walk) {
  constexpr int kStepBytes = Kernel::kStepVectors * kVectorBytes;
  const uint8_t* w = walk.weights;
  const uint16_t* scales = walk.scales;
  const char* x = walk.x;
  const int64_t x_bytes = walk.x_bytes, x_step_bytes = walk.x_step_bytes;
  const int64_t panel_bytes = walk.panel_bytes, panel_scales = walk.panel_scales;
  const int64_t fetch_bytes = walk.fetch_bytes;
  const int fetch_lines = walk.fetch_lines;
  char* const memory = walk.memory;
  // Behind a panel's steps lie others of its own or of panels that are multiplied now; what its place among these goes
  // to next comes after all of them.
  const int64_t jump = kNumP * panel_bytes - walk.num_steps * kStepBytes;
  int64_t kept = 0;
  if constexpr (Kernel::kIsUnpacked) UnpackStep<Kernel, kNumP>(w, panel_bytes, scales, panel_scales, memory);
  for (int64_t left = walk.num_steps; left > 0; --left) {
    if constexpr (kIsFromMemory) {
      const int64_t ahead = kStreamBytes<Kernel> + (left * kStepBytes > kStreamBytes<Kernel> ? 0 : jump);
      for (int p = 0; p < kNumP; ++p) Fetch<3>(w + p * panel_bytes, ahead, Kernel::kStepVectors);
    } else {
      for (int p = 0; p < kNumP; ++p) Fetch<2>(w + p * panel_bytes, fetch_bytes, fetch_lines);
    }
    if constexpr (Kernel::kIsUnpacked) {
      const char* tiles = memory + kept * kNumP * kTileBytes;
      kept = (kept + 1) % kKeptSteps;
      for (int p = 0; p < kNumP && kIsFromMemory; ++p) Fetch<3>(scales + p * panel_scales, kStreamScaleBytes, 1);
      w += kStepBytes;
      scales += kLanes;
      if (left > 1) {
        UnpackStep<Kernel, kNumP>(w, panel_bytes, scales, panel_scales, memory + kept * kNumP * kTileBytes);
      }
      MultiplyStep<typename Kernel::Dot, kNumA, kNumP>(x, x_bytes, tiles, kTileBytes);
    } else {
      MultiplyStep<typename Kernel::Dot, kNumA, kNumP>(x, x_bytes, reinterpret_cast<const char*>(w), panel_bytes);
      w += kStepBytes;
    }
    x += x_step_bytes;
  }
}

}  // namespace
}  // namespace HEADRACE_TARGET
}  // namespace headrace

#endif
