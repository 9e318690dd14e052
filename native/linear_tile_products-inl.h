// Products in tiles of any number of rows: x stays in the L2 cache, and panels of W pass by it, some at a time.
#ifdef __AMX_TILE__

namespace headrace {
namespace HEADRACE_TARGET {
namespace {

// Tiles of x in a block. Integers are read from memory by the first pass of some (see Passes) and unpacked by each: few
// full ones take less time than many.
constexpr int64_t kIntBlockTiles = 12;
constexpr int64_t kFloatBlockTiles = 16;
// How many steps of a tile, times tiles, are walked at once: 1.1 MiB of x, which leaves room in an L2 cache for panels
// on their way.
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

// One of them: the tiles, and the lines of each step of the panels that follow that it asks for, if any.
struct Pass {
  Range tiles;
  bool is_from_memory;
  Range lines;
};

// Weights that are not unpacked come from the L2 cache in each pass: two panels, since six, up to 1.7 MiB, would leave
// no room for x. Of integers no pass but the only one has a single tile.
template <class Kernel>
constexpr Passes PassesFor(int64_t num_tiles) {
  return Kernel::kIsUnpacked || num_tiles <= kMostTiles ? Passes{kMostTiles, 6, true} : Passes{2, 2, false};
}

template <class Kernel>
constexpr bool MayComeFromL2(int num_a, int num_p) {
  return Kernel::kIsUnpacked ? num_a > 1 : num_a <= 2 && num_p <= 2;
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
    return (kUnpacked + kProducts + num_sums) * kTileBytes;
  }
  char* Unpacked() const { return memory_; }
  float* Product(int i) const { return At(kUnpacked + i); }
  // Of a tile of x and a panel, counted from the block's first ones.
  float* Sums(int64_t tile, int64_t panel) const { return At(kUnpacked + kProducts + panel * num_tiles_ + tile); }

 private:
  static constexpr int kUnpacked = kPlaces<6> * 6;
  static_assert(kUnpacked >= kPlaces<3> * 3 && kUnpacked >= kPlaces<2> * 2 && kUnpacked >= kPlaces<1>);

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
        passes_(PassesFor<Kernel>(Size(block.tiles))),
        scratch_(Size(block.tiles), memory) {
    for (int tile = 0; tile <= kTileOfX; ++tile) shapes_.Set(tile, x.num_rows(), kTileRowBytes);
    shapes_.Set(kTileOfW, kTileRows, kTileRowBytes);
    shapes_.Configure();
  }

  void Run() {
    num_chunks_ = NumChunks(call_.weight, Size(block_.tiles));
    for (chunk_ = 0; chunk_ < num_chunks_; ++chunk_) {
      steps_ = Part({0, NumSteps(call_.weight)}, chunk_, num_chunks_);
      for (int64_t panel = block_.panels.begin; panel < block_.panels.end; panel += passes_.num_panels) {
        RunPanels({panel, std::min(panel + passes_.num_panels, block_.panels.end)});
      }
    }
  }

 private:
  void RunPanels(Range panels) const {
    const int64_t num_passes = (Size(block_.tiles) - 1) / passes_.most_tiles + 1;
    const int64_t num_from_memory = passes_.is_first_from_memory ? 1 : 0;
    for (int64_t i = 0; i < num_passes; ++i) {
      Pass pass = {Part(block_.tiles, i, num_passes), i < num_from_memory, {0, 0}};
      if (!pass.is_from_memory) {
        pass.lines = Part({0, Kernel::kStepVectors}, i - num_from_memory, num_passes - num_from_memory);
      }
      switch (Size(pass.tiles)) {
        case 1:
          RunPass<1>(pass, panels);
          break;
        case 2:
          RunPass<2>(pass, panels);
          break;
        case 3:
          RunPass<3>(pass, panels);
          break;
      }
    }
  }

  // Those that are left over are fewer at once.
  template <int kNumA, int kNumP = PanelsFor<Kernel>(kNumA)>
  void RunPass(const Pass& pass, Range panels) const {
    for (; Size(panels) >= kNumP; panels.begin += kNumP) Multiply<kNumA, kNumP>(pass, panels.begin);
    if constexpr (kNumP > 1) RunPass<kNumA, std::min(3, kNumP - 1)>(pass, panels);
  }

  template <int kNumA, int kNumP>
  void Multiply(const Pass& pass, int64_t panel) const {
    const bool is_last = chunk_ + 1 == num_chunks_;
    const int64_t tile = pass.tiles.begin;
    const auto sums = [&](int i) HEADRACE_LAMBDA {
      return scratch_.Sums(tile + i / kNumP - block_.tiles.begin, panel + i % kNumP - block_.panels.begin);
    };
    // Those of more tiles would be gone from the L1 cache again when they are written.
    if (is_last && Size(block_.tiles) <= kMostTiles) PrefetchOutputs(panel, kNumP);
    Unroll<kNumA * kNumP>([&](auto i)
                              HEADRACE_LAMBDA { chunk_ == 0 ? ZeroTile<i>() : LoadTile<i>(sums(i), kTileRowBytes); });
    Walk<kNumA, kNumP>(pass, panel);
    Unroll<kNumA * kNumP>([&](auto i) HEADRACE_LAMBDA {
      float* to = is_last ? scratch_.Product(i) : sums(i);
      StoreTile<i>(to, kTileRowBytes);
      if (is_last) StoreOutputs(call_, x_, tile + i / kNumP, panel + i % kNumP, to);
    });
  }

  template <int kNumA, int kNumP>
  void Walk(const Pass& pass, int64_t panel) const {
    const PackedView& w = call_.weight;
    StepWalk walk = {w.weights + panel * w.panel_bytes + steps_.begin * Kernel::kStepVectors * kVectorBytes,
                     w.panel_bytes,
                     nullptr,
                     w.num_groups * kLanes,
                     x_.At(pass.tiles.begin) + steps_.begin * x_.step_bytes(),
                     x_.tile_bytes(),
                     x_.step_bytes(),
                     steps_.end - steps_.begin,
                     passes_.num_panels * w.panel_bytes + pass.lines.begin * kVectorBytes,
                     static_cast<int>(Size(pass.lines)),
                     scratch_.Unpacked()};
    if constexpr (Kernel::kIsUnpacked) {
      walk.scales = w.scales + (panel * w.num_groups + steps_.begin) * kLanes;
      MultiplySteps<kNumA, kNumP>(pass, walk);
    } else {
      const int64_t end = std::min(steps_.end, w.panel_bytes / kTileBytes);
      walk.num_steps = end - steps_.begin;
      MultiplySteps<kNumA, kNumP>(pass, walk);
      if (end == steps_.end) return;
      for (int p = 0; p < kNumP; ++p) PadStep(w, panel + p, end, scratch_.Unpacked() + p * kTileBytes);
      MultiplyStep<typename Kernel::Dot, kNumA, kNumP>(walk.x + walk.num_steps * walk.x_step_bytes, walk.x_bytes,
                                                       scratch_.Unpacked(), kTileBytes);
    }
  }

  template <int kNumA, int kNumP>
  static void MultiplySteps(const Pass& pass, const StepWalk& walk) {
    const auto multiply = [&](auto is_from_memory) HEADRACE_LAMBDA {
      if constexpr (Kernel::kIsUnpacked) {
        MultiplyUnpacked<Kernel, kNumA, kNumP, is_from_memory>(walk);
      } else {
        MultiplyStored<Kernel, kNumA, kNumP, is_from_memory>(walk);
      }
    };
    if constexpr (MayComeFromL2<Kernel>(kNumA, kNumP)) {
      if (!pass.is_from_memory) return multiply(std::false_type());
    }
    multiply(std::true_type());
  }

  // All rows' for some panels.
  void PrefetchOutputs(int64_t panel, int num_panels) const {
    for (int64_t row = x_.Rows(block_.tiles.begin).begin; row < x_.Rows(block_.tiles.end - 1).end; ++row) {
      for (int p = 0; p < num_panels; ++p) __builtin_prefetch(OutputAt(call_, row, panel + p), 1);
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
