// Scores of bfloat16 in tiles. A score's chain goes over head_dim as on vectors, in steps of 32, and what is left in
// steps of 16.

#ifdef __AMX_TILE__

#include <iterator>

namespace headrace {
namespace HEADRACE_TARGET {
namespace {

// The last vectors of a key, fewer than a half step has, with zeros behind them: there the cache goes on with values.
inline const uint8_t* Padded(const uint8_t* from, int64_t num_vectors, uint8_t* to) {
  memcpy(to, from, num_vectors * kVectorBytes);
  memset(to + num_vectors * kVectorBytes, 0, (kHalfVectors - num_vectors) * kVectorBytes);
  return to;
}

// A step of kPanels panels, `offset` into them; of a half step only num_vectors may be read.
template <int kPanels>
inline void WideScoreStep(const uint8_t* const* keys, const uint8_t* const* next, int64_t offset) {
  Unroll<kPanels>([&](auto p) HEADRACE_LAMBDA {
    PrefetchVectors(next[p] + offset, kWideVectors);
    LoadTile<kWideB>(keys[p] + offset, kVectorBytes);
    Bf16Dot::Run<p, kWideA, kWideB>();
  });
}
template <int kPanels>
inline void HalfScoreStep(const uint8_t* const* keys, const uint8_t* const* next, int64_t offset, int64_t num_vectors) {
  Unroll<kPanels>([&](auto p) HEADRACE_LAMBDA {
    alignas(64) uint8_t padded[kHalfVectors * kVectorBytes];
    const uint8_t* from = keys[p] + offset;
    PrefetchVectors(next[p] + offset, num_vectors);
    LoadTile<kHalfB>(num_vectors < kHalfVectors ? Padded(from, num_vectors, padded) : from, kVectorBytes);
    Bf16Dot::Run<p, kHalfA, kHalfB>();
  });
}

// Products, not yet scaled, to t.
template <int kPanels>
void TileScores(const ScoreTile& at) {
  const int64_t num_vectors = at.call.layout.key_vectors, row_bytes = QueryBytes(at.call.layout);
  const char* query = at.workspace.query + at.row * row_bytes;
  const uint8_t* const* keys = at.panels.address + at.panel;
  const uint8_t* const* next = at.panels.next + at.panel;
  constexpr int kQueryBytes = 4;  // for a vector
  Unroll<kPanels>([&](auto p) HEADRACE_LAMBDA { ZeroTile<p>(); });
  int64_t i = 0;
  for (; i + kWideVectors <= num_vectors; i += kWideVectors) {
    LoadTile<kWideA>(query + i * kQueryBytes, row_bytes);
    WideScoreStep<kPanels>(keys, next, i * kVectorBytes);
  }
  for (; i < num_vectors; i += kHalfVectors) {
    const int64_t rest = num_vectors - i;
    LoadTile<kHalfA>(query + i * kQueryBytes, row_bytes);
    HalfScoreStep<kPanels>(keys, next, i * kVectorBytes, rest < kHalfVectors ? rest : kHalfVectors);
  }
  Unroll<kPanels>([&](auto p) HEADRACE_LAMBDA {
    StoreTile<p>(at.t + p * kPanelPositions, kTilePositions * static_cast<int64_t>(sizeof(float)));
  });
}

// As ComputeScores, but for the soft cap. All are scaled at last: a stored tile is not read back at once for nothing.
void ComputeTileScores(const AttentionCall& call, const Workspace& w, const TilePanels& panels, int64_t row,
                       int num_rows, Range range) {
  constexpr ScoreFunction functions[] = {&TileScores<1>, &TileScores<2>, &TileScores<3>, &TileScores<4>};
  static_assert(std::size(functions) == kChains);
  for (int64_t panel = range.begin; panel < range.end; panel += kChains) {
    const int64_t count = range.end - panel < kChains ? range.end - panel : kChains;
    functions[count - 1]({call, w, panels, 1.0f, row, static_cast<int>(panel), w.t + panel * kPanelPositions});
  }
  const F32x16 scale = Broadcast(ScoreScale(call));
  for (int r = 0; r < num_rows; ++r) {
    float* t = w.t + r * kTilePositions;
    for (int64_t i = range.begin * kPanelPositions; i < range.end * kPanelPositions; i += kPanelPositions) {
      Store(t + i, Mul(Load(t + i), scale));
    }
  }
}

}  // namespace
}  // namespace HEADRACE_TARGET
}  // namespace headrace

#endif
