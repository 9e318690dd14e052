// Scores in tiles. A score's chain goes over head_dim, ascending, in wide steps, and what is left in half steps.

#ifdef __AMX_TILE__

namespace headrace {
namespace HEADRACE_TARGET {
namespace {

// The last vectors of a key, fewer than a half step has, with zeros behind them: there the cache goes on with values.
inline const uint8_t* Padded(const uint8_t* from, int64_t num_vectors, uint8_t* to) {
  memcpy(to, from, num_vectors * kVectorBytes);
  memset(to + num_vectors * kVectorBytes, 0, (kHalfVectors - num_vectors) * kVectorBytes);
  return to;
}

// A step of kPanels panels from a vector of them on; of a half step only num_vectors may be read.
template <class Dot, int kPanels>
inline void WideScoreStep(const ScoreTile& at, int64_t vector) {
  Unroll<kPanels>([&](auto p) HEADRACE_LAMBDA {
    at.panels.PrefetchForScores<kWideVectors>(at.panel + p, vector);
    LoadTile<kWideB>(at.panels.address[at.panel + p] + vector * kVectorBytes, kVectorBytes);
    Dot::template Run<p, kWideA, kWideB>();
  });
}
template <class Dot, int kPanels>
inline void HalfScoreStep(const ScoreTile& at, int64_t vector, int64_t num_vectors) {
  Unroll<kPanels>([&](auto p) HEADRACE_LAMBDA {
    alignas(64) uint8_t padded[kHalfVectors * kVectorBytes];
    const uint8_t* from = at.panels.address[at.panel + p] + vector * kVectorBytes;
    at.panels.PrefetchForScores<kHalfVectors>(at.panel + p, vector);
    LoadTile<kHalfB>(num_vectors < kHalfVectors ? Padded(from, num_vectors, padded) : from, kVectorBytes);
    Dot::template Run<p, kHalfA, kHalfB>();
  });
}

// Products, not yet scaled, to t.
template <class Dot, int kPanels>
void TileScores(const ScoreTile& at) {
  const int64_t num_vectors = at.call.layout.key_vectors, row_bytes = QueryBytes(at.call.layout);
  const char* query = at.workspace.query + at.row * row_bytes;
  constexpr int kQueryBytes = 4;  // for a vector
  Unroll<kPanels>([&](auto p) HEADRACE_LAMBDA { ZeroTile<p>(); });
  int64_t i = 0;
  for (; i + kWideVectors <= num_vectors; i += kWideVectors) {
    LoadTile<kWideA>(query + i * kQueryBytes, row_bytes);
    WideScoreStep<Dot, kPanels>(at, i);
  }
  for (; i < num_vectors; i += kHalfVectors) {
    const int64_t rest = num_vectors - i;
    LoadTile<kHalfA>(query + i * kQueryBytes, row_bytes);
    HalfScoreStep<Dot, kPanels>(at, i, rest < kHalfVectors ? rest : kHalfVectors);
  }
  Unroll<kPanels>([&](auto p) HEADRACE_LAMBDA {
    StoreTile<p>(at.t + p * kPanelPositions, kTilePositions * static_cast<int64_t>(sizeof(float)));
  });
}

// A function for each number of panels.
template <class Dot>
constexpr ScoreFunction kTileScores[kChains] = {&TileScores<Dot, 1>, &TileScores<Dot, 2>, &TileScores<Dot, 3>,
                                                &TileScores<Dot, 4>};

// Sums of float32, in t, times a scale.
void ScaleScores(const AttentionCall& call, float* t, int num_rows, Range range) {
  const F32x16 scale = Broadcast(ScoreScale(call));
  for (int r = 0; r < num_rows; ++r, t += kTilePositions) {
    for (int64_t i = range.begin * kPanelPositions; i < range.end * kPanelPositions; i += kPanelPositions) {
      Store(t + i, Mul(Load(t + i), scale));
    }
  }
}

// Sums of integers, in t, as IntScores ends. row: of the workspace.
void ScaleIntScores(const Workspace& w, const TilePanels& panels, int64_t row, int num_rows, Range range) {
  for (int64_t panel = range.begin; panel < range.end; ++panel) {
    panels.PrefetchForScaling(panel);
    const F32x16 key_scale = Load(panels.Scales(panel));
    float* t = w.t + panel * kPanelPositions;
    for (int r = 0; r < num_rows; ++r, t += kTilePositions) {
      const F32x16 sum = ToFloat(AddInt(LoadInts(t), BroadcastInt(w.query_start[row + r])));
      Store(t, Mul(sum, Mul(key_scale, Broadcast(w.query_scale[row + r]))));
    }
  }
}

// As ComputeScores, but for the soft cap. All are scaled at last: reading a tile just stored takes long.
void ComputeTileScores(const AttentionCall& call, const Workspace& w, const TilePanels& panels, int64_t row,
                       int num_rows, Range range) {
  const bool is_int = call.layout.shape.format == Format::kInt8;
  const ScoreFunction* functions = is_int ? kTileScores<SignedUnsignedDot> : kTileScores<Bf16Dot>;
  for (int64_t panel = range.begin; panel < range.end; panel += kChains) {
    const int64_t count = range.end - panel < kChains ? range.end - panel : kChains;
    functions[count - 1]({call, w, panels, 1.0f, row, static_cast<int>(panel), w.t + panel * kPanelPositions});
  }
  if (is_int) return ScaleIntScores(w, panels, row, num_rows, range);
  ScaleScores(call, w.t, num_rows, range);
}

}  // namespace
}  // namespace HEADRACE_TARGET
}  // namespace headrace

#endif
