// Products in tiles of any number of rows: x stays in the L2 cache, and panels of W pass by it, some at a time.
#ifdef __AMX_TILE__

namespace headrace {
namespace HEADRACE_TARGET {
namespace {

// Tiles of x in a block, and how many steps of a tile, times tiles, are walked at once: 1 MiB of x.
constexpr int kBlockTiles = 16;
constexpr int kBlockSteps = 1152;
// Panels of a block: so few that threads end together, or, where their sums wait for the next steps (1 MiB of them) and
// each block reads all of x, more.
constexpr int kBlockPanels = 12;
constexpr int kWaitingPanels = 64;
// How all tiles of a block meet some panels before the next ones come: in passes of so many tiles. The first pass may
// take panels as they come from memory; others ask for a part each of the panels that follow.
struct Passes {
  int most_tiles;
  int num_panels;
  bool is_first_from_memory;
};

// Weights that are not unpacked come from the L2 cache in each pass: two panels, since six would take half of it.
template <class Kernel>
constexpr Passes PassesFor(int64_t num_tiles) {
  return Kernel::kIsUnpacked || num_tiles <= kMostTiles ? Passes{kMostTiles, 6, true} : Passes{2, 2, false};
}

inline int64_t NumChunks(const PackedView& w, int64_t num_tiles) {
  return (NumSteps(w) * num_tiles - 1) / kBlockSteps + 1;
}

// Memory of one thread: what is unpacked, products to be stored, and sums of products that wait for the next chunk of
// steps, if there is more than one.
class TileScratch {
 public:
  TileScratch(int64_t num_tiles, char* memory) : memory_(memory), num_tiles_(num_tiles) {}
  static int64_t NumBytes(const PackedView& w, int64_t num_tiles) {
    const int64_t num_sums = NumChunks(w, num_tiles) > 1 ? num_tiles * kWaitingPanels : 0;
    return (kKept + kProducts + num_sums) * kTileBytes;
  }
  char* Unpacked() const { return memory_; }
  float* Product(int i) const { return At(kKept + i); }
  // Of a tile of x and a panel, counted from the block's first ones.
  float* Sums(int64_t tile, int64_t panel) const { return At(kKept + kProducts + panel * num_tiles_ + tile); }

 private:
  static constexpr int kKept = kKeptSteps * PanelsFor(1);

  float* At(int64_t tile) const { return reinterpret_cast<float*>(memory_ + tile * kTileBytes); }

  char* memory_;
  int64_t num_tiles_;
};

inline int64_t TilePanelsPerBlock(const LinearCall& call, int64_t num_tiles) {
  return NumChunks(call.weight, num_tiles) > 1 ? kWaitingPanels : kBlockPanels;
}

inline int64_t TileScratchBytes(const LinearCall& call, int64_t num_tiles) {
  return TileScratch::NumBytes(call.weight, num_tiles);
}

template <class Out>
void StorePanel(const LinearCall& call, const PreparedTiles& x, int64_t tile, int64_t panel, const float* products) {
  const RowEnd<Out> end(call, panel);
  const Range rows = x.Rows(tile);
  const float* scales = IsQuantized(call.weight.format) ? x.Scales(call.weight, tile) : nullptr;
  for (int64_t row = rows.begin; row < rows.end; ++row, products += kLanes) {
    const F32x16 sum = Load(products);
    end.Store(row, scales == nullptr ? sum : Mul(sum, Broadcast(*scales++)));
  }
}

inline void StoreOutputs(const LinearCall& call, const PreparedTiles& x, int64_t tile, int64_t panel,
                         const float* sums) {
  if (call.out_dtype == DType::kFloat32) return StorePanel<float>(call, x, tile, panel, sums);
  StorePanel<uint16_t>(call, x, tile, panel, sums);
}

// All tiles of x and panels of a block.
template <class Kernel>
class BlockProducts {
 public:
  BlockProducts(const LinearCall& call, const PreparedTiles& x, const Block& block, char* memory)
      : call_(call),
        x_(x),
        block_(block),
        passes_(PassesFor<Kernel>(block.tiles.end - block.tiles.begin)),
        scratch_(block.tiles.end - block.tiles.begin, memory) {
    for (int tile = 0; tile <= kTileOfX; ++tile) shapes_.Set(tile, x.num_rows(), kTileRowBytes);
    shapes_.Set(kTileOfW, kTileRows, kTileRowBytes);
    shapes_.Configure();
  }

  void Run() {
    num_chunks_ = NumChunks(call_.weight, block_.tiles.end - block_.tiles.begin);
    for (chunk_ = 0; chunk_ < num_chunks_; ++chunk_) {
      steps_ = Part({0, NumSteps(call_.weight)}, chunk_, num_chunks_);
      for (int64_t panel = block_.panels.begin; panel < block_.panels.end; panel += passes_.num_panels) {
        RunPanels({panel, std::min(panel + passes_.num_panels, block_.panels.end)});
      }
    }
  }

 private:
  void RunPanels(Range panels) {
    const int64_t num_tiles = block_.tiles.end - block_.tiles.begin;
    const int64_t num_passes = (num_tiles - 1) / passes_.most_tiles + 1, num_before = passes_.is_first_from_memory;
    for (int64_t pass = 0; pass < num_passes; ++pass) {
      const Range tiles = Part(block_.tiles, pass, num_passes);
      is_from_memory_ = pass < num_before;
      if (!is_from_memory_) lines_ = Part({0, Kernel::kStepVectors}, pass - num_before, num_passes - num_before);
      switch (tiles.end - tiles.begin) {
        case 1:
          RunTiles<1>(tiles.begin, panels);
          break;
        case 2:
          RunTiles<2>(tiles.begin, panels);
          break;
        case 3:
          RunTiles<3>(tiles.begin, panels);
          break;
      }
    }
  }

  template <int kNumA>
  void RunTiles(int64_t tile, Range panels) const {
    constexpr int kNumP = PanelsFor(kNumA);
    int64_t panel = panels.begin;
    for (; panel + kNumP <= panels.end; panel += kNumP) Multiply<kNumA, kNumP>(tile, panel);
    if (kNumP > 2 && panels.end - panel == 2) return Multiply<kNumA, 2>(tile, panel);
    if (kNumP > 1 && panels.end - panel == 1) return Multiply<kNumA, 1>(tile, panel);
  }

  template <int kNumA, int kNumP>
  void Multiply(int64_t tile, int64_t panel) const {
    const bool is_last = chunk_ + 1 == num_chunks_;
    const auto sums = [&](int i) HEADRACE_LAMBDA {
      return scratch_.Sums(tile + i / kNumP - block_.tiles.begin, panel + i % kNumP - block_.panels.begin);
    };
    // Those of more tiles would be gone from the L1 cache again when they are written.
    if (is_last && block_.tiles.end - block_.tiles.begin <= kMostTiles) PrefetchOutputs(tile, panel, kNumP);
    Unroll<kNumA * kNumP>([&](auto i)
                              HEADRACE_LAMBDA { chunk_ == 0 ? ZeroTile<i>() : LoadTile<i>(sums(i), kTileRowBytes); });
    Walk<kNumA, kNumP>(tile, panel);
    Unroll<kNumA * kNumP>([&](auto i) HEADRACE_LAMBDA {
      float* to = is_last ? scratch_.Product(i) : sums(i);
      StoreTile<i>(to, kTileRowBytes);
      if (is_last) StoreOutputs(call_, x_, tile + i / kNumP, panel + i % kNumP, to);
    });
  }

  template <int kNumA, int kNumP>
  void Walk(int64_t tile, int64_t panel) const {
    const PackedView& w = call_.weight;
    StepWalk walk = {w.weights + panel * w.panel_bytes + steps_.begin * Kernel::kStepVectors * kVectorBytes,
                     w.panel_bytes,
                     nullptr,
                     w.num_groups * kLanes,
                     x_.At(tile) + steps_.begin * x_.step_bytes(),
                     x_.tile_bytes(),
                     x_.step_bytes(),
                     steps_.end - steps_.begin,
                     passes_.num_panels * w.panel_bytes + lines_.begin * kVectorBytes,
                     static_cast<int>(lines_.end - lines_.begin),
                     scratch_.Unpacked()};
    if constexpr (Kernel::kIsUnpacked) {
      walk.scales = w.scales + (panel * w.num_groups + steps_.begin) * kLanes;
      return MultiplySteps<kNumA, kNumP>(walk);
    } else {
      const int64_t end = std::min(steps_.end, w.panel_bytes / kTileBytes);
      walk.num_steps = end - steps_.begin;
      MultiplySteps<kNumA, kNumP>(walk);
      if (end == steps_.end) return;
      for (int p = 0; p < kNumP; ++p) PadStep(w, panel + p, end, scratch_.Unpacked() + p * kTileBytes);
      MultiplyStep<typename Kernel::Dot, kNumA, kNumP>(walk.x + walk.num_steps * walk.x_step_bytes, walk.x_bytes,
                                                       scratch_.Unpacked(), kTileBytes);
    }
  }

  template <int kNumA, int kNumP>
  void MultiplySteps(const StepWalk& walk) const {
    is_from_memory_ ? MultiplyAll<Kernel, kNumA, kNumP, true>(walk) : MultiplyAll<Kernel, kNumA, kNumP, false>(walk);
  }

  void PrefetchOutputs(int64_t first_tile, int64_t panel, int num_panels) const {
    for (int64_t row = x_.Rows(first_tile).begin; row < x_.Rows(block_.tiles.end - 1).end; ++row) {
      __builtin_prefetch(OutputAt(call_, row, panel), 1);
      __builtin_prefetch(OutputAt(call_, row, panel + num_panels - 1), 1);
    }
  }

  const LinearCall& call_;
  const PreparedTiles& x_;
  Block block_;
  Passes passes_;
  TileScratch scratch_;
  TileShapes shapes_;
  int64_t num_chunks_ = 0;
  int64_t chunk_ = 0;
  Range steps_ = {0, 0};
  bool is_from_memory_ = true;
  Range lines_ = {0, 0};
};

inline void ComputeTiles(const LinearCall& call, RowTiles tiles, const Activations& activations, const Block& block,
                         char* memory) {
  const PreparedTiles x(tiles, activations);
  switch (call.weight.format) {
#ifdef __AVX512FP16__
    case Format::kInt8:
      return BlockProducts<Int8Tiles>(call, x, block, memory).Run();
    case Format::kInt4:
      return BlockProducts<Int4Tiles>(call, x, block, memory).Run();
#endif
    default:
      return BlockProducts<Bfloat16Tiles>(call, x, block, memory).Run();
  }
}

}  // namespace
}  // namespace HEADRACE_TARGET
}  // namespace headrace

#endif
