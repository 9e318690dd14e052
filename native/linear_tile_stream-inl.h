// Products of up to 32 rows of x in tiles: panels of W are read from memory once, some at a time, as they are
// multiplied.
#ifdef __AMX_TILE__

namespace headrace {
namespace HEADRACE_TARGET {
namespace {

// Panels that a tile of x is multiplied by when it is loaded: tiles of many rows do not stay in the L1 cache, and would
// take the way from the L2 cache that weights need.
constexpr int kStreamPanels = 3;

// Which tiles are what: a product of each tile of x and panel, and one tile of each that is loaded anew all the time.
constexpr int StreamC(int a, int p) { return kStreamPanels * a + p; }
constexpr int kStreamA = 6, kStreamB = 7;

// How early weights and scales of each panel are asked for into the L1 cache.
template <class Kernel>
constexpr int kStreamBytes = Kernel::kIsUnpacked ? 1024 : 384;
constexpr int kStreamScaleBytes = 512;

// Integers are unpacked a step before they are multiplied: tiles are loaded from the cache, not from stores under way.
// Few steps are kept, so that they stay in the L1 cache while weights pass through it.
constexpr int kKeptSteps = 2;

constexpr int64_t kStreamScratchBytes = kKeptSteps * kStreamPanels * kTileBytes;
static_assert(kKeptSteps >= 2);  // products of two tiles of x are stored there in the end

// Past the end of a matrix this asks for nothing that comes.
inline void PrefetchAhead(const void* from, int64_t ahead_bytes, int num_lines) {
  const auto address = reinterpret_cast<uintptr_t>(from) + ahead_bytes;
  for (int i = 0; i < num_lines; ++i)
    __builtin_prefetch(reinterpret_cast<const void*>(address + i * kVectorBytes), 0, 3);
}

// Up to two tiles of rows of x, prepared.
struct RowPair {
  Range rows[2];
  char* x[2];

  RowPair(RowTiles tiles, const Activations& activations, int64_t tile, int count)
      : rows{tiles.Rows(tile), count == 2 ? tiles.Rows(tile + 1) : Range{0, 0}},
        x{activations.values + rows[0].begin * activations.row_bytes,
          activations.values + rows[1].begin * activations.row_bytes} {}
  int Count(int a) const { return static_cast<int>(rows[a].end - rows[a].begin); }
  int64_t StepBytes(int a) const { return Count(a) * kTileRowBytes; }
};

template <class Out>
void StorePanel(const LinearCall& call, const RowPair& pair, int a, int64_t panel, const float* products) {
  const RowEnd<Out> end(call, panel);
  const int num_rows = pair.Count(a);
  const float* scales = IsQuantized(call.weight.format) ? RowScales(call.weight, pair.x[a], num_rows) : nullptr;
  for (int r = 0; r < num_rows; ++r) {
    const F32x16 sum = Load(products + r * kLanes);
    end.Store(pair.rows[a].begin + r, scales == nullptr ? sum : Mul(sum, Broadcast(scales[r])));
  }
}

inline void StoreOutputs(const LinearCall& call, const RowPair& pair, int a, int64_t panel, const float* sums) {
  if (call.out_dtype == DType::kFloat32) return StorePanel<float>(call, pair, a, panel, sums);
  StorePanel<uint16_t>(call, pair, a, panel, sums);
}

// The tile of B of one step of a panel: where it lies, or its columns and zeros behind them if the matrix ends within
// it.
inline const char* WholeTile(const PackedView& w, int64_t panel, int64_t step, char* padded) {
  const uint8_t* from = w.weights + panel * w.panel_bytes + step * kTileBytes;
  const int64_t num_bytes = w.panel_bytes - step * kTileBytes;
  if (num_bytes >= kTileBytes) return reinterpret_cast<const char*>(from);
  memcpy(padded, from, num_bytes);
  memset(padded + num_bytes, 0, kTileBytes - num_bytes);
  return padded;
}

template <class Dot, int kA, int kP, bool kIsLoaded>
inline void MultiplyPanel(const char* tile) {
  if constexpr (!kIsLoaded) LoadTile<kStreamB>(tile, kTileRowBytes);
  Dot::template Run<StreamC(kA, kP), kStreamA, kStreamB>();
}

// A step of kNumP panels, whose tiles of B lie tile_bytes apart. The second tile of x meets them in the opposite order,
// so that it finds one loaded.
template <class Dot, int kNumA, int kNumP>
inline void MultiplyStep(const char* tile, int64_t tile_bytes, const char* x0, const char* x1) {
  LoadTile<kStreamA>(x0, kTileRowBytes);
  MultiplyPanel<Dot, 0, 0, false>(tile);
  if constexpr (kNumP > 1) MultiplyPanel<Dot, 0, 1, false>(tile + tile_bytes);
  if constexpr (kNumP > 2) MultiplyPanel<Dot, 0, 2, false>(tile + 2 * tile_bytes);
  if constexpr (kNumA == 1) return;
  LoadTile<kStreamA>(x1, kTileRowBytes);
  if constexpr (kNumP > 2) MultiplyPanel<Dot, 1, 2, true>(tile + 2 * tile_bytes);
  if constexpr (kNumP > 1) MultiplyPanel<Dot, 1, 1, kNumP == 2>(tile + tile_bytes);
  MultiplyPanel<Dot, 1, 0, kNumP == 1>(tile);
}

// Some panels, one behind the other, from their first step on.
struct StreamWalk {
  const uint8_t* weights;
  int64_t panel_bytes;
  const uint16_t* scales;
  int64_t panel_scales;
  const char* x[2];
  int64_t x_bytes[2];  // from one step to the next one
  int64_t num_steps;
  char* memory;
};

template <class Kernel, int kNumP>
inline void UnpackStep(const uint8_t* w, int64_t panel_bytes, const uint16_t* scales, int64_t panel_scales, char* to) {
  for (int p = 0; p < kNumP; ++p) Kernel::Unpack(w + p * panel_bytes, scales + p * panel_scales, to + p * kTileBytes);
}

// A function of its own, like MultiplyTiles, and none of its variables in memory: what is unpacked goes through all
// places of a page, and a load from the stack would wait for the store that it could depend on.
template <class Kernel, int kNumA, int kNumP>
__attribute__((noinline)) void MultiplyStream(const StreamWalk& walk) {
  constexpr int kStepBytes = Kernel::kStepVectors * kVectorBytes;
  const uint8_t* w = walk.weights;
  const uint16_t* scales = walk.scales;
  const char *x0 = walk.x[0], *x1 = walk.x[1];
  const int64_t x0_bytes = walk.x_bytes[0], x1_bytes = walk.x_bytes[1], panel_bytes = walk.panel_bytes;
  const int64_t panel_scales = walk.panel_scales;
  char* const memory = walk.memory;
  int64_t kept = 0;
  if constexpr (Kernel::kIsUnpacked) UnpackStep<Kernel, kNumP>(w, panel_bytes, scales, panel_scales, memory);
  for (int64_t left = walk.num_steps; left > 0; --left) {
    // Behind a panel lie others that are multiplied now; what its place among these goes to comes after them.
    const int64_t ahead =
        kStreamBytes<Kernel> + (left * kStepBytes > kStreamBytes<Kernel> ? 0 : (kNumP - 1) * panel_bytes);
    for (int p = 0; p < kNumP; ++p) PrefetchAhead(w + p * panel_bytes, ahead, Kernel::kStepVectors);
    if constexpr (Kernel::kIsUnpacked) {
      const char* tiles = memory + kept * kNumP * kTileBytes;
      kept = (kept + 1) % kKeptSteps;
      for (int p = 0; p < kNumP; ++p) PrefetchAhead(scales + p * panel_scales, kStreamScaleBytes, 1);
      w += kStepBytes;
      scales += kLanes;
      if (left > 1) {
        UnpackStep<Kernel, kNumP>(w, panel_bytes, scales, panel_scales, memory + kept * kNumP * kTileBytes);
      }
      MultiplyStep<typename Kernel::Dot, kNumA, kNumP>(tiles, kTileBytes, x0, x1);
    } else {
      MultiplyStep<typename Kernel::Dot, kNumA, kNumP>(reinterpret_cast<const char*>(w), panel_bytes, x0, x1);
      w += kStepBytes;
    }
    x0 += x0_bytes;
    x1 += x1_bytes;
  }
}

// Products of up to two tiles of rows and all panels of a block.
template <class Kernel, int kNumA>
class PanelStream {
 public:
  PanelStream(const LinearCall& call, const RowPair& pair, char* memory)
      : call_(call), pair_(pair), num_steps_(NumSteps(call.weight)), memory_(memory) {
    // Both tiles of x are loaded as if they had as many rows: what comes then instead of a row that is missing, the
    // next step's first one, adds to a row of products that nobody reads.
    const int num_rows = std::max(pair.Count(0), pair.Count(1));
    for (int tile = 0; tile < kStreamB; ++tile) shapes_.Set(tile, num_rows, kTileRowBytes);
    shapes_.Set(kStreamB, kTileRows, kTileRowBytes);
    shapes_.Configure();
  }

  void Run(Range panels) const {
    int64_t panel = panels.begin;
    for (; panel + kStreamPanels <= panels.end; panel += kStreamPanels) Run<kStreamPanels>(panel);
    if (panels.end - panel == 2) return Run<2>(panel);
    if (panels.end - panel == 1) return Run<1>(panel);
  }

 private:
  template <int kNumP>
  void Run(int64_t panel) const {
    for (const Range& rows : pair_.rows) {
      for (int64_t row = rows.begin; row < rows.end; ++row) {
        __builtin_prefetch(OutputAt(call_, row, panel), 1);
        __builtin_prefetch(OutputAt(call_, row, panel + kNumP - 1), 1);
      }
    }
    ZeroProducts();
    Multiply<kNumP>(panel);
    Store<0, kNumP>(panel);
    if constexpr (kNumA == 2) Store<1, kNumP>(panel);
  }

  static void ZeroProducts() {
    ZeroTile<StreamC(0, 0)>();
    ZeroTile<StreamC(0, 1)>();
    ZeroTile<StreamC(0, 2)>();
    ZeroTile<StreamC(1, 0)>();
    ZeroTile<StreamC(1, 1)>();
    ZeroTile<StreamC(1, 2)>();
  }

  template <int kNumP>
  void Multiply(int64_t panel) const {
    const PackedView& w = call_.weight;
    StreamWalk walk = {w.weights + panel * w.panel_bytes,
                       w.panel_bytes,
                       nullptr,
                       w.num_groups * kLanes,
                       {pair_.x[0], pair_.x[1]},
                       {pair_.StepBytes(0), pair_.StepBytes(1)},
                       num_steps_,
                       memory_};
    if constexpr (Kernel::kIsUnpacked) {
      walk.scales = w.scales + panel * walk.panel_scales;
      return MultiplyStream<Kernel, kNumA, kNumP>(walk);
    } else {
      walk.num_steps = w.panel_bytes / kTileBytes;
      MultiplyStream<Kernel, kNumA, kNumP>(walk);
      if (walk.num_steps == num_steps_) return;
      for (int p = 0; p < kNumP; ++p) WholeTile(w, panel + p, walk.num_steps, memory_ + p * kTileBytes);
      MultiplyStep<typename Kernel::Dot, kNumA, kNumP>(memory_, kTileBytes,
                                                       walk.x[0] + walk.num_steps * walk.x_bytes[0],
                                                       walk.x[1] + walk.num_steps * walk.x_bytes[1]);
    }
  }

  template <int kA, int kNumP>
  void Store(int64_t panel) const {
    auto* sums = reinterpret_cast<float*>(memory_ + kA * kStreamPanels * kTileBytes);
    constexpr int kTileFloats = kTileRows * kLanes;
    StoreTile<StreamC(kA, 0)>(sums, kTileRowBytes);
    if constexpr (kNumP > 1) StoreTile<StreamC(kA, 1)>(sums + kTileFloats, kTileRowBytes);
    if constexpr (kNumP > 2) StoreTile<StreamC(kA, 2)>(sums + 2 * kTileFloats, kTileRowBytes);
    for (int p = 0; p < kNumP; ++p) StoreOutputs(call_, pair_, kA, panel + p, sums + p * kTileFloats);
  }

  const LinearCall& call_;
  const RowPair& pair_;
  int64_t num_steps_;
  char* memory_;
  TileShapes shapes_;
};

}  // namespace
}  // namespace HEADRACE_TARGET
}  // namespace headrace

#endif
