// Products of up to 32 rows of x in tiles: each panel of W is read from memory once, as it is multiplied.
#ifdef __AMX_TILE__

namespace headrace {
namespace HEADRACE_TARGET {
namespace {

// How early weights and scales are asked for into the L1 cache. Hardware brings them from memory into the L2 cache
// early enough if nothing holds up its stream; so they arrive as fast as a thread reads them that does nothing else.
constexpr int kStreamBytes = 1024;
constexpr int kStreamScaleBytes = 512;

// Past the end of a matrix this asks for nothing that comes.
inline void PrefetchAhead(const void* from, int ahead_bytes, int num_lines) {
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

// Which products of two panels a walk adds to: those of the other one wait meanwhile to be stored.
enum class Side { kEven, kOdd };

template <Side kSide, int kA>
constexpr int kTileOf = TileC(kA, static_cast<int>(kSide));

template <class Dot, Side kSide, int kNumA>
inline void MultiplyStep(const char* tile, const char* x0, const char* x1) {
  LoadTile<TileA(0)>(x0, kTileRowBytes);
  LoadTile<TileB(0)>(tile, kTileRowBytes);
  Dot::template Run<kTileOf<kSide, 0>, TileA(0), TileB(0)>();
  if constexpr (kNumA == 1) return;
  LoadTile<TileA(1)>(x1, kTileRowBytes);
  Dot::template Run<kTileOf<kSide, 1>, TileA(1), TileB(0)>();
}

// Part of a panel. Integers are unpacked some steps before they are multiplied, those of the next panel too; steps are
// counted from the first one that was ever unpacked.
struct StreamWalk {
  const uint8_t* weights;  // of the next step to unpack, or to multiply if none is unpacked
  const uint16_t* scales;
  const char* x[2];
  int64_t x_bytes[2];  // from one step to the next one
  Range steps;
  int64_t end;  // of all steps there are
  char* memory;
};

// A function of its own, like MultiplyTiles, and none of its variables in memory: what is unpacked goes through all
// places of a page, and a load from the stack would wait for the store that it could depend on.
template <class Kernel, Side kSide, int kNumA>
__attribute__((noinline)) void MultiplyStream(const StreamWalk& walk) {
  const uint8_t* w = walk.weights;
  const uint16_t* scales = walk.scales;
  const char *x0 = walk.x[0], *x1 = walk.x[1];
  const int64_t x0_bytes = walk.x_bytes[0], x1_bytes = walk.x_bytes[1], steps_end = walk.steps.end, end = walk.end;
  char* const memory = walk.memory;
  for (int64_t step = walk.steps.begin; step < steps_end; ++step) {
    const char* tile = reinterpret_cast<const char*>(w);
    PrefetchAhead(w, kStreamBytes, Kernel::kStepVectors);
    if constexpr (Kernel::kIsUnpacked) {
      const int64_t next = step + kUnpackAhead;
      PrefetchAhead(scales, kStreamScaleBytes, 1);
      if (next < end) Kernel::Unpack(w, scales, memory + next % kKeptSteps * kTileBytes);
      tile = memory + step % kKeptSteps * kTileBytes;
      scales += kLanes;
    }
    w += Kernel::kStepVectors * kVectorBytes;
    MultiplyStep<typename Kernel::Dot, kSide, kNumA>(tile, x0, x1);
    x0 += x0_bytes;
    x1 += x1_bytes;
  }
}

// All panels of a block, one after the other. The products of a panel are stored a few steps into the next one, when
// none of them is under way any more, and the lines they go to are asked for a panel earlier.
template <class Kernel, int kNumA>
class PanelStream {
 public:
  PanelStream(const LinearCall& call, const RowPair& pair, Range panels, char* memory)
      : call_(call), pair_(pair), panels_(panels), num_steps_(NumSteps(call.weight)), memory_(memory) {
    if constexpr (Kernel::kIsUnpacked) {
      for (int64_t step = 0; step < std::min<int64_t>(kUnpackAhead, num_steps_ * Count()); ++step) {
        Kernel::Unpack(WeightsAt(panels.begin, step), ScalesAt(panels.begin, step), memory_ + step * kTileBytes);
      }
    }
  }

  void Run() {
    for (int64_t panel = panels_.begin; panel < panels_.end; panel += 2) {
      RunPanel<Side::kEven, Side::kOdd>(panel);
      if (panel + 1 < panels_.end) RunPanel<Side::kOdd, Side::kEven>(panel + 1);
    }
    Count() % 2 == 1 ? Store<Side::kEven>(panels_.end - 1) : Store<Side::kOdd>(panels_.end - 1);
  }

 private:
  static constexpr int kStepsBeforeStore = 4;

  int64_t Count() const { return panels_.end - panels_.begin; }
  const uint8_t* WeightsAt(int64_t panel, int64_t step) const {
    return call_.weight.weights + panel * call_.weight.panel_bytes + step * Kernel::kStepVectors * kVectorBytes;
  }
  const uint16_t* ScalesAt(int64_t panel, int64_t step) const {
    return call_.weight.scales + (panel * call_.weight.num_groups + step) * kLanes;
  }

  template <Side kSide, Side kOther>
  void RunPanel(int64_t panel) {
    ZeroTile<kTileOf<kSide, 0>>();
    ZeroTile<kTileOf<kSide, 1>>();
    PrefetchOutputs(panel);
    const int64_t first = std::min<int64_t>(kStepsBeforeStore, num_steps_);
    Multiply<kSide>(panel, {0, first});
    if (panel > panels_.begin) Store<kOther>(panel - 1);
    Multiply<kSide>(panel, {first, num_steps_});
  }

  template <Side kSide>
  void Multiply(int64_t panel, Range steps) {
    const char* x[2] = {pair_.x[0] + steps.begin * pair_.StepBytes(0), pair_.x[1] + steps.begin * pair_.StepBytes(1)};
    StreamWalk walk = {WeightsAt(panel, steps.begin),
                       nullptr,
                       {x[0], x[1]},
                       {pair_.StepBytes(0), pair_.StepBytes(1)},
                       steps,
                       steps.end,
                       memory_};
    if constexpr (Kernel::kIsUnpacked) {
      const int64_t before = (panel - panels_.begin) * num_steps_;
      walk.weights = WeightsAt(panel, steps.begin + kUnpackAhead);
      walk.scales = ScalesAt(panel, steps.begin + kUnpackAhead);
      walk.steps = {before + steps.begin, before + steps.end};
      walk.end = num_steps_ * Count();
      return MultiplyStream<Kernel, kSide, kNumA>(walk);
    } else {
      walk.steps.end = std::clamp(call_.weight.panel_bytes / kTileBytes, steps.begin, steps.end);
      MultiplyStream<Kernel, kSide, kNumA>(walk);
      if (walk.steps.end == steps.end) return;
      const int64_t count = walk.steps.end - steps.begin;
      MultiplyStep<typename Kernel::Dot, kSide, kNumA>(WholeTile(call_.weight, panel, walk.steps.end, memory_),
                                                       x[0] + count * pair_.StepBytes(0),
                                                       x[1] + count * pair_.StepBytes(1));
    }
  }

  void PrefetchOutputs(int64_t panel) const {
    for (const Range& rows : pair_.rows) {
      for (int64_t row = rows.begin; row < rows.end; ++row) __builtin_prefetch(OutputAt(call_, row, panel), 1);
    }
  }

  template <Side kSide>
  void Store(int64_t panel) const {
    auto* sums = reinterpret_cast<float*>(memory_ + kKeptSteps * kTileBytes);
    StoreTile<kTileOf<kSide, 0>>(sums, kTileRowBytes);
    StoreOutputs(call_, pair_, 0, panel, sums);
    if constexpr (kNumA == 1) return;
    StoreTile<kTileOf<kSide, 1>>(sums, kTileRowBytes);
    StoreOutputs(call_, pair_, 1, panel, sums);
  }

  const LinearCall& call_;
  const RowPair& pair_;
  Range panels_;
  int64_t num_steps_;
  char* memory_;
};

}  // namespace
}  // namespace HEADRACE_TARGET
}  // namespace headrace

#endif
