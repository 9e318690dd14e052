// The walk along K for two panels of W and two tiles of x at most, and what becomes of the products.
#ifdef __AMX_TILE__

namespace headrace {
namespace HEADRACE_TARGET {
namespace {

// Memory of one thread: tiles of B that are not read where the weights lie, two panels of them, and sums of products.
struct TileScratch {
  char* weights[2];  // [kKeptSteps] tiles
  char* sums;        // [tile of x][panel] tiles

  explicit TileScratch(char* memory)
      : weights{memory, memory + kKeptSteps * kTileBytes}, sums(memory + 2 * kKeptSteps * kTileBytes) {}
  float* Sums(int64_t tile, int panel) const { return reinterpret_cast<float*>(sums + (2 * tile + panel) * kTileBytes); }
};

inline int64_t TileScratchBytes(const LinearCall&, int64_t tiles_per_block) {
  return (2 * kKeptSteps + 2 * tiles_per_block) * kTileBytes;
}

// Asks for weights into the L2 cache, a part of them at a time, while others are multiplied.
class Fetch {
 public:
  // The steps of two panels behind `steps`, or the first ones of the two panels that follow. Past the end of a matrix this
  // asks for nothing that comes.
  Fetch(const PackedView& w, int64_t panel, Range steps, int64_t step_bytes)
      : size_((steps.end - steps.begin) * step_bytes) {
    const bool is_last = steps.end == NumSteps(w);
    const int64_t offset = is_last ? (panel + 2) * w.panel_bytes : panel * w.panel_bytes + steps.end * step_bytes;
    for (int p = 0; p < 2; ++p) from_[p] = reinterpret_cast<uintptr_t>(w.weights) + offset + p * w.panel_bytes;
  }
  void Run(int64_t part, int64_t num_parts) const {
    const Range lines = Part({0, size_ / kVectorBytes}, part, num_parts);
    for (int64_t i = lines.begin; i < lines.end; ++i) {
      for (const uintptr_t from : from_) __builtin_prefetch(reinterpret_cast<const void*>(from + i * kVectorBytes), 0, 2);
    }
  }

 private:
  int64_t size_;
  uintptr_t from_[2];
};

// Tiles of B of up to two panels from `panel` on, of weights that are multiplied where they lie. The last step's columns
// may be fewer; they are copied, and zeros behind them.
template <class Kernel>
class PlainPanels {
 public:
  PlainPanels(const PackedView& w, int64_t panel, int count, const TileScratch& scratch)
      : num_whole_(w.padded_columns / kTileColumns) {
    const int64_t whole_bytes = num_whole_ * kTileBytes;
    for (int p = 0; p < count; ++p) {
      w_[p] = w.weights + (panel + p) * w.panel_bytes;
      last_[p] = scratch.weights[p];
      if (whole_bytes == w.panel_bytes) continue;
      memcpy(scratch.weights[p], w_[p] + whole_bytes, w.panel_bytes - whole_bytes);
      memset(scratch.weights[p] + (w.panel_bytes - whole_bytes), 0, kTileBytes - (w.panel_bytes - whole_bytes));
    }
  }
  template <int kCount>
  void Begin(Range, int64_t) const {}
  template <int kCount>
  void Next(int64_t step, Range) const {
    for (int p = 0; p < kCount; ++p) {
      const uintptr_t ahead = reinterpret_cast<uintptr_t>(w_[p]) + step * kTileBytes + kPrefetchL2Bytes;
      for (int i = 0; i < kTileRows; ++i) {
        __builtin_prefetch(reinterpret_cast<const void*>(ahead + i * kVectorBytes), 0, 2);
      }
    }
  }
  // Calls walk(step, number of steps) for steps whose tiles lie one behind the other.
  template <class Walk>
  void ForEachRun(Range steps, const Walk& walk) const {
    const int64_t end = std::min(steps.end, num_whole_);
    walk(steps.begin, end - steps.begin);
    if (end < steps.end) walk(end, 1);
  }
  const char* At(int p, int64_t step) const {
    return step < num_whole_ ? reinterpret_cast<const char*>(w_[p]) + step * kTileBytes : last_[p];
  }

 private:
  int64_t num_whole_;
  const uint8_t* w_[2] = {};
  const char* last_[2] = {};
};

// The same of integer weights, unpacked some steps ahead of their use while the first tiles of x come by, and kept for
// those that follow.
template <class Kernel>
class UnpackedPanels {
 public:
  UnpackedPanels(const PackedView& w, int64_t panel, int count, const TileScratch& scratch) {
    for (int p = 0; p < count; ++p) {
      w_[p] = w.weights + (panel + p) * w.panel_bytes;
      scales_[p] = w.scales + (panel + p) * w.num_groups * kLanes;
      to_[p] = scratch.weights[p];
    }
  }
  template <int kCount>
  void Begin(Range steps, int64_t num_steps) const {
    for (int64_t i = 0; i < num_steps; ++i) Unpack<kCount>(steps.begin + i, steps.end);
  }
  template <int kCount>
  void Next(int64_t step, Range steps) const {
    Unpack<kCount>(step + kUnpackAhead, steps.end);
  }
  template <class Walk>
  void ForEachRun(Range steps, const Walk& walk) const {
    walk(steps.begin, steps.end - steps.begin);
  }
  const char* At(int p, int64_t step) const { return to_[p] + step % kKeptSteps * kTileBytes; }

 private:
  template <int kCount>
  void Unpack(int64_t step, int64_t end) const {
    if (step >= end) return;
    for (int p = 0; p < kCount; ++p) {
      const uint8_t* w = w_[p] + step * Kernel::kStepVectors * kVectorBytes;
      for (int i = 0; i < Kernel::kStepVectors; ++i) Prefetch(w + i * kVectorBytes);
      Kernel::Unpack(w, scales_[p] + step * kLanes, to_[p] + step % kKeptSteps * kTileBytes);
    }
  }

  const uint8_t* w_[2] = {};
  const uint16_t* scales_[2] = {};
  char* to_[2] = {};
};

// Up to two tiles of rows of x, prepared.
struct RowPair {
  Range rows[2];
  char* x[2];

  RowPair(RowTiles tiles, const Activations& activations, int64_t tile, int count)
      : rows{tiles.Rows(tile), count == 2 ? tiles.Rows(tile + 1) : Range{0, 0}},
        x{activations.values + rows[0].begin * activations.row_bytes,
          activations.values + rows[1].begin * activations.row_bytes} {}
  int Count(int a) const { return static_cast<int>(rows[a].end - rows[a].begin); }
};

inline void LoadSums(const TileScratch& scratch, int64_t tile, int num_a, int num_b) {
  LoadTile<TileC(0, 0)>(scratch.Sums(tile, 0), kTileRowBytes);
  if (num_b == 2) LoadTile<TileC(0, 1)>(scratch.Sums(tile, 1), kTileRowBytes);
  if (num_a == 1) return;
  LoadTile<TileC(1, 0)>(scratch.Sums(tile + 1, 0), kTileRowBytes);
  if (num_b == 2) LoadTile<TileC(1, 1)>(scratch.Sums(tile + 1, 1), kTileRowBytes);
}

inline void StoreSums(const TileScratch& scratch, int64_t tile, int num_a, int num_b) {
  StoreTile<TileC(0, 0)>(scratch.Sums(tile, 0), kTileRowBytes);
  if (num_b == 2) StoreTile<TileC(0, 1)>(scratch.Sums(tile, 1), kTileRowBytes);
  if (num_a == 1) return;
  StoreTile<TileC(1, 0)>(scratch.Sums(tile + 1, 0), kTileRowBytes);
  if (num_b == 2) StoreTile<TileC(1, 1)>(scratch.Sums(tile + 1, 1), kTileRowBytes);
}

// When weights are unpacked: step by step beside the products of the one pair of tiles of x there is, all before the first
// of several, or by an earlier one.
enum class Weights { kStreamed, kNew, kKept };

// The sums of some steps.
template <class Dot, int kNumA, int kNumB, class Panels>
void WalkSteps(const Panels& panels, const RowPair& pair, Range steps, Weights weights) {
  const int64_t a_bytes[2] = {pair.Count(0) * kTileRowBytes, pair.Count(1) * kTileRowBytes};
  const auto walk = [&](int64_t step, int64_t num_steps) {
    MultiplyTiles<Dot, kNumA, kNumB>({{pair.x[0] + step * a_bytes[0], pair.x[1] + step * a_bytes[1]},
                                      {a_bytes[0], a_bytes[1]},
                                      {panels.At(0, step), panels.At(kNumB - 1, step)}},
                                     num_steps);
  };
  if (weights == Weights::kNew) panels.template Begin<kNumB>(steps, kKeptSteps);
  if (weights != Weights::kStreamed) return panels.ForEachRun(steps, walk);
  panels.template Begin<kNumB>(steps, kUnpackAhead);
  for (int64_t step = steps.begin; step < steps.end; ++step) {
    panels.template Next<kNumB>(step, steps);
    walk(step, 1);
  }
}

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

template <class Dot, class Panels>
void Walk(const Panels& panels, const RowPair& pair, int num_a, int num_b, Range steps, Weights weights) {
  if (num_a == 2 && num_b == 2) return WalkSteps<Dot, 2, 2>(panels, pair, steps, weights);
  if (num_a == 2) return WalkSteps<Dot, 2, 1>(panels, pair, steps, weights);
  if (num_b == 2) return WalkSteps<Dot, 1, 2>(panels, pair, steps, weights);
  WalkSteps<Dot, 1, 1>(panels, pair, steps, weights);
}

inline void StoreOutputs(const LinearCall& call, const RowPair& pair, int a, int64_t panel, const float* sums) {
  if (call.out_dtype == DType::kFloat32) return StorePanel<float>(call, pair, a, panel, sums);
  StorePanel<uint16_t>(call, pair, a, panel, sums);
}

// Every product of a block, pairs of panels outside. Where more than one pair of tiles of x comes by, they do so for
// kKeptSteps at a time, whose weights stay in the L1 cache, and sums wait in memory meanwhile.
template <class Kernel, class Panels>
void TileBlock(const LinearCall& call, RowTiles tiles, const Activations& activations, const Block& block, char* memory) {
  Tiles registers;
  const TileScratch scratch(memory);
  const int64_t num_tiles = block.tiles.end - block.tiles.begin, num_steps = NumSteps(call.weight);
  const int64_t steps_at_once = num_tiles > 2 ? kKeptSteps : num_steps;
  for (int64_t panel = block.panels.begin; panel < block.panels.end; panel += 2) {
    const int num_b = panel + 1 < block.panels.end ? 2 : 1;
    const Panels panels(call.weight, panel, num_b, scratch);
    for (int64_t begin = 0; begin < num_steps; begin += steps_at_once) {
      const Range steps = {begin, std::min(begin + steps_at_once, num_steps)};
      const Fetch fetch(call.weight, panel, steps, Kernel::kStepVectors * kVectorBytes);
      for (int64_t t = 0; t < num_tiles; t += 2) {
        const int num_a = t + 1 < num_tiles ? 2 : 1;
        const RowPair pair(tiles, activations, block.tiles.begin + t, num_a);
        registers.SetRows(pair.Count(0), std::max(1, pair.Count(1)));
        if (t > 0) fetch.Run(t / 2 - 1, (num_tiles - 1) / 2);
        begin == 0 ? ZeroProducts() : LoadSums(scratch, t, num_a, num_b);
        const Weights weights = num_tiles <= 2 ? Weights::kStreamed : t == 0 ? Weights::kNew : Weights::kKept;
        Walk<typename Kernel::Dot>(panels, pair, num_a, num_b, steps, weights);
        StoreSums(scratch, t, num_a, num_b);
        for (int i = 0; i < num_a * num_b && steps.end == num_steps; ++i) {
          StoreOutputs(call, pair, i / num_b, panel + i % num_b, scratch.Sums(t + i / num_b, i % num_b));
        }
      }
    }
  }
}

inline void ComputeTiles(const LinearCall& call, RowTiles tiles, const Activations& activations, const Block& block,
                         char* memory) {
  switch (call.weight.format) {
#ifdef __AVX512FP16__
    case Format::kInt8:
      return TileBlock<Int8Tiles, UnpackedPanels<Int8Tiles>>(call, tiles, activations, block, memory);
    case Format::kInt4:
      return TileBlock<Int4Tiles, UnpackedPanels<Int4Tiles>>(call, tiles, activations, block, memory);
#endif
    default:
      return TileBlock<Bfloat16Tiles, PlainPanels<Bfloat16Tiles>>(call, tiles, activations, block, memory);
  }
}

}  // namespace
}  // namespace HEADRACE_TARGET
}  // namespace headrace

#endif
