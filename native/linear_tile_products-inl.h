// Products in tiles: of few rows of x as weights come from memory, of many in blocks that stay in the L2 cache.
#ifdef __AMX_TILE__

namespace headrace {
namespace HEADRACE_TARGET {
namespace {

// Tiles of x in a block, and steps that are walked at once: 1 MiB of x, which two panels of weights at a time pass by.
constexpr int kBlockTiles = 16;
constexpr int kChunkSteps = 64;
// Panels whose sums wait for the next chunk of steps: 4 MiB of them.
constexpr int kBlockPanels = 256;
// Tiles of x that meet a panel as it comes from memory.
constexpr int kStreamedTiles = 2;

inline int64_t NumChunks(const PackedView& w) { return (NumSteps(w) + kChunkSteps - 1) / kChunkSteps; }

// Memory of one thread: tiles of B of two panels that are not read where the weights lie, and sums of products. Those
// wait there for the next chunk of steps, or lie where the last ones did if there is one chunk alone.
class TileScratch {
 public:
  TileScratch(const PackedView& w, int64_t num_tiles, char* memory)
      : memory_(memory), num_tiles_(num_tiles), keeps_sums_(NumChunks(w) > 1) {}
  static int64_t NumBytes(const PackedView& w, int64_t num_tiles, int64_t num_panels) {
    if (num_tiles <= kStreamedTiles) return kStreamScratchBytes;
    num_panels = std::min<int64_t>(num_panels, kBlockPanels);
    return (2 * kChunkSteps + (NumChunks(w) > 1 ? num_tiles * num_panels : 4)) * kTileBytes;
  }
  char* Weights(int panel) const { return memory_ + panel * kChunkSteps * kTileBytes; }
  // Of a tile of x and a panel, counted from the block's first ones.
  float* Sums(int64_t tile, int64_t panel) const {
    const int64_t place = keeps_sums_ ? panel * num_tiles_ + tile : panel % 2 * 2 + tile % 2;
    return reinterpret_cast<float*>(memory_ + (2 * kChunkSteps + place) * kTileBytes);
  }

 private:
  char* memory_;
  int64_t num_tiles_;
  bool keeps_sums_;
};

inline int64_t TileScratchBytes(const LinearCall& call, int64_t num_tiles, int64_t num_panels) {
  return TileScratch::NumBytes(call.weight, num_tiles, num_panels);
}

// Tiles of B of a panel in one chunk of steps: one behind the other, but for one that was filled up with zeros.
struct PanelChunk {
  const char* tiles;
  int64_t num_steps;
  const char* padded;
};

template <class Kernel>
PanelChunk ChunkOf(const PackedView& w, int64_t panel, Range steps, char* memory) {
  const int64_t num_steps = steps.end - steps.begin;
  if constexpr (Kernel::kIsUnpacked) {
    const uint8_t* from = w.weights + panel * w.panel_bytes;
    const uint16_t* scales = w.scales + panel * w.num_groups * kLanes;
    for (int64_t step = steps.begin; step < steps.end; ++step) {
      Kernel::Unpack(from + step * Kernel::kStepVectors * kVectorBytes, scales + step * kLanes,
                     memory + (step - steps.begin) * kTileBytes);
    }
    return {memory, num_steps, nullptr};
  } else {
    const char* last = WholeTile(w, panel, steps.end - 1, memory);
    const char* tiles = reinterpret_cast<const char*>(w.weights) + panel * w.panel_bytes + steps.begin * kTileBytes;
    return last == memory ? PanelChunk{tiles, num_steps - 1, last} : PanelChunk{tiles, num_steps, nullptr};
  }
}

// The weights of the two panels that follow, asked for in equal parts beside every step in which these are multiplied:
// all at once they would hold up what those steps load. What lies behind the last ones is asked for in vain.
template <class Kernel>
TileFetch FetchAfter(const PackedView& w, int64_t panel, Range steps, int64_t pair, int64_t num_pairs) {
  const int64_t most = (Kernel::kStepVectors + num_pairs - 1) / num_pairs;
  const int64_t lines = std::clamp<int64_t>(Kernel::kStepVectors - pair * most, 0, most);
  const int64_t at = steps.begin * Kernel::kStepVectors + pair * (steps.end - steps.begin) * most;
  const auto from = reinterpret_cast<uintptr_t>(w.weights) + (panel + 2) * w.panel_bytes + at * kVectorBytes;
  return {{reinterpret_cast<const char*>(from), reinterpret_cast<const char*>(from + w.panel_bytes)}, static_cast<int>(lines)};
}

inline void LoadSums(const TileScratch& scratch, int64_t tile, int64_t panel, int num_a, int num_b) {
  LoadTile<TileC(0, 0)>(scratch.Sums(tile, panel), kTileRowBytes);
  if (num_b == 2) LoadTile<TileC(0, 1)>(scratch.Sums(tile, panel + 1), kTileRowBytes);
  if (num_a == 1) return;
  LoadTile<TileC(1, 0)>(scratch.Sums(tile + 1, panel), kTileRowBytes);
  if (num_b == 2) LoadTile<TileC(1, 1)>(scratch.Sums(tile + 1, panel + 1), kTileRowBytes);
}

inline void StoreSums(const TileScratch& scratch, int64_t tile, int64_t panel, int num_a, int num_b) {
  StoreTile<TileC(0, 0)>(scratch.Sums(tile, panel), kTileRowBytes);
  if (num_b == 2) StoreTile<TileC(0, 1)>(scratch.Sums(tile, panel + 1), kTileRowBytes);
  if (num_a == 1) return;
  StoreTile<TileC(1, 0)>(scratch.Sums(tile + 1, panel), kTileRowBytes);
  if (num_b == 2) StoreTile<TileC(1, 1)>(scratch.Sums(tile + 1, panel + 1), kTileRowBytes);
}

template <class Dot, int kNumA, int kNumB>
void WalkChunk(const RowPair& pair, int64_t begin, const PanelChunk (&panels)[2], const TileFetch& fetch) {
  const int64_t a_bytes[2] = {pair.StepBytes(0), pair.StepBytes(1)}, num_steps = panels[0].num_steps;
  const char* x[2] = {pair.x[0] + begin * a_bytes[0], pair.x[1] + begin * a_bytes[1]};
  MultiplyTiles<Dot, kNumA, kNumB>({{x[0], x[1]}, {a_bytes[0], a_bytes[1]}, {panels[0].tiles, panels[1].tiles}, fetch},
                                   num_steps);
  if (panels[0].padded == nullptr) return;
  MultiplyTiles<Dot, kNumA, kNumB>({{x[0] + num_steps * a_bytes[0], x[1] + num_steps * a_bytes[1]},
                                    {a_bytes[0], a_bytes[1]},
                                    {panels[0].padded, panels[1].padded},
                                    {}},
                                   1);
}

template <class Dot>
void WalkChunk(const RowPair& pair, int num_a, int num_b, int64_t begin, const PanelChunk (&panels)[2],
               const TileFetch& fetch) {
  if (num_a == 2 && num_b == 2) return WalkChunk<Dot, 2, 2>(pair, begin, panels, fetch);
  if (num_a == 2) return WalkChunk<Dot, 2, 1>(pair, begin, panels, fetch);
  if (num_b == 2) return WalkChunk<Dot, 1, 2>(pair, begin, panels, fetch);
  WalkChunk<Dot, 1, 1>(pair, begin, panels, fetch);
}

// Chunks of steps outside, then pairs of panels, then pairs of tiles of x.
template <class Kernel>
void MultiplyBlock(const LinearCall& call, RowTiles tiles, const Activations& activations, const Block& block,
                   char* memory) {
  const int64_t num_tiles = block.tiles.end - block.tiles.begin, num_pairs = (num_tiles + 1) / 2;
  const int64_t num_panels = block.panels.end - block.panels.begin, num_chunks = NumChunks(call.weight);
  const TileScratch scratch(call.weight, num_tiles, memory);
  Tiles registers;
  for (int64_t chunk = 0; chunk < num_chunks; ++chunk) {
    const Range steps = Part({0, NumSteps(call.weight)}, chunk, num_chunks);
    for (int64_t p = 0; p < num_panels; p += 2) {
      const int64_t panel = block.panels.begin + p;
      const int num_b = p + 1 < num_panels ? 2 : 1;
      PanelChunk panels[2] = {};
      for (int b = 0; b < num_b; ++b) panels[b] = ChunkOf<Kernel>(call.weight, panel + b, steps, scratch.Weights(b));
      for (int64_t t = 0; t < num_tiles; t += 2) {
        const int num_a = t + 1 < num_tiles ? 2 : 1;
        const RowPair pair(tiles, activations, block.tiles.begin + t, num_a);
        registers.SetRows(pair.Count(0), std::max(1, pair.Count(1)));
        chunk == 0 ? ZeroProducts() : LoadSums(scratch, t, p, num_a, num_b);
        WalkChunk<typename Kernel::Dot>(pair, num_a, num_b, steps.begin, panels,
                                        FetchAfter<Kernel>(call.weight, panel, steps, t / 2, num_pairs));
        StoreSums(scratch, t, p, num_a, num_b);
        for (int i = 0; i < num_a * num_b && chunk + 1 == num_chunks; ++i) {
          StoreOutputs(call, pair, i / num_b, panel + i % num_b, scratch.Sums(t + i / num_b, p + i % num_b));
        }
      }
    }
  }
}

// Panels some at a time, for up to two tiles of x.
template <class Kernel>
void StreamBlock(const LinearCall& call, RowTiles tiles, const Activations& activations, const Block& block,
                 char* memory) {
  const int num_a = static_cast<int>(block.tiles.end - block.tiles.begin);
  const RowPair pair(tiles, activations, block.tiles.begin, num_a);
  num_a == 2 ? PanelStream<Kernel, 2>(call, pair, memory).Run(block.panels)
             : PanelStream<Kernel, 1>(call, pair, memory).Run(block.panels);
}

template <class Kernel>
void ComputeTiles(const LinearCall& call, RowTiles tiles, const Activations& activations, const Block& block,
                  char* memory) {
  if (block.tiles.end - block.tiles.begin <= kStreamedTiles) {
    return StreamBlock<Kernel>(call, tiles, activations, block, memory);
  }
  for (int64_t begin = block.panels.begin; begin < block.panels.end; begin += kBlockPanels) {
    const Range panels = {begin, std::min(begin + kBlockPanels, block.panels.end)};
    MultiplyBlock<Kernel>(call, tiles, activations, {panels, block.tiles}, memory);
  }
}

inline void ComputeTiles(const LinearCall& call, RowTiles tiles, const Activations& activations, const Block& block,
                         char* memory) {
  switch (call.weight.format) {
#ifdef __AVX512FP16__
    case Format::kInt8:
      return ComputeTiles<Int8Tiles>(call, tiles, activations, block, memory);
    case Format::kInt4:
      return ComputeTiles<Int4Tiles>(call, tiles, activations, block, memory);
#endif
    default:
      return ComputeTiles<Bfloat16Tiles>(call, tiles, activations, block, memory);
  }
}

}  // namespace
}  // namespace HEADRACE_TARGET
}  // namespace headrace

#endif
