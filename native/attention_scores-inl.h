// t = log2(e) * soft_cap(softmax_scale * q k) for a block of rows and the panels of a tile.
//
// As in linear_vectors-inl.h, a tile of the product is kRows rows of q times kPanels panels of keys, one vector of
// accumulators for each pair; lanes are positions. Whatever the tile, a score is one chain over head_dim, ascending.

namespace headrace {
namespace HEADRACE_TARGET {
namespace {

struct Float32Keys {
  using X = float;
  static constexpr int kColumns = VectorColumns(Format::kFloat32);
  using Step = F32x16;
  static Step LoadStep(const uint8_t* from) { return Load(reinterpret_cast<const float*>(from)); }
  static F32x16 MulAddStep(const F32x16& acc, const Step& k, const X* q) { return MulAdd(k, Broadcast(*q), acc); }
};

struct Bfloat16Keys {
  using X = Bf16X;
  static constexpr int kColumns = VectorColumns(Format::kBfloat16);
  using Step = Bf16Step;
  static Step LoadStep(const uint8_t* from) { return LoadBf16(from); }
  static F32x16 MulAddStep(const F32x16& acc, const Step& k, const X* q) { return MulAddBf16(acc, k, q); }
};

// First row of a block and first panel of a tile of the product; t as in Workspace, from the block's first row and the
// tile's first panel on.
struct ScoreTile {
  const AttentionCall& call;
  const Workspace& workspace;
  const TilePanels& panels;
  float scale;
  int64_t row;
  int panel;
  float* t;
};

template <class Keys, int kRows, int kPanels>
void FloatScores(const ScoreTile& at) {
  using X = typename Keys::X;
  const int64_t num_vectors = at.call.layout.key_vectors, row_bytes = QueryBytes(at.call.layout);
  const char* query = at.workspace.query + at.row * row_bytes;
  const uint8_t* const* keys = at.panels.address + at.panel;
  const uint8_t* const* next = at.panels.next + at.panel;
  F32x16 acc[kRows][kPanels];
  UnrollPairs<kRows, kPanels>([&](auto r, auto p) HEADRACE_LAMBDA { acc[r][p] = Broadcast(0.0f); });
  for (int64_t i = 0; i < num_vectors; ++i) {
    typename Keys::Step step[kPanels];
    Unroll<kPanels>([&](auto p) HEADRACE_LAMBDA {
      Prefetch(next[p] + i * kVectorBytes);
      step[p] = Keys::LoadStep(keys[p] + i * kVectorBytes);
    });
    UnrollPairs<kRows, kPanels>([&](auto r, auto p) HEADRACE_LAMBDA {
      const X* x = reinterpret_cast<const X*>(query + r * row_bytes) + i * Keys::kColumns;
      acc[r][p] = Keys::MulAddStep(acc[r][p], step[p], x);
    });
  }
  const F32x16 scale = Broadcast(at.scale);
  float* t = at.t;
  UnrollPairs<kRows, kPanels>([&](auto r, auto p) HEADRACE_LAMBDA {
    Store(t + r * kTilePositions + p * kPanelPositions, Mul(acc[r][p], scale));
  });
}

// The same with integers.
template <int kRows, int kPanels>
void IntScores(const ScoreTile& at) {
  const int64_t num_vectors = at.call.layout.key_vectors, row_bytes = QueryBytes(at.call.layout);
  const auto* query = reinterpret_cast<const int8_t*>(at.workspace.query + at.row * row_bytes);
  const uint8_t* const* keys = at.panels.address + at.panel;
  const uint8_t* const* next = at.panels.next + at.panel;
  I32x16 acc[kRows][kPanels];
  UnrollPairs<kRows, kPanels>(
      [&](auto r, auto p) HEADRACE_LAMBDA { acc[r][p] = BroadcastInt(at.workspace.query_start[at.row + r]); });
  for (int64_t i = 0; i < num_vectors; ++i) {
    Int8Step step[kPanels];
    Unroll<kPanels>([&](auto p) HEADRACE_LAMBDA {
      Prefetch(next[p] + i * kVectorBytes);
      step[p] = LoadInt8(keys[p] + i * kVectorBytes);
    });
    UnrollPairs<kRows, kPanels>([&](auto r, auto p) HEADRACE_LAMBDA {
      acc[r][p] = DotInt8(acc[r][p], step[p], query + r * row_bytes + i * VectorColumns(Format::kInt8));
    });
  }
  float* t = at.t;
  const float* query_scale = at.workspace.query_scale + at.row;
  Unroll<kPanels>([&](auto p) HEADRACE_LAMBDA {
    const uint8_t* next_scales = next[p] + at.call.layout.scale_offset;
    Prefetch(next_scales);
    Prefetch(next_scales + kVectorBytes);
    const F32x16 key_scale = Load(at.panels.Scales(at.panel + p));
    Unroll<kRows>([&](auto r) HEADRACE_LAMBDA {
      const F32x16 scale = Mul(key_scale, Broadcast(query_scale[r]));
      Store(t + r * kTilePositions + p * kPanelPositions, Mul(ToFloat(acc[r][p]), scale));
    });
  });
}

// A tile of the product for each number of rows.
using ScoreFunction = void (*)(const ScoreTile& at);

template <class Keys, int kPanels, class Rows>
struct FloatScoreTable;
template <class Keys, int kPanels, int... kRows>
struct FloatScoreTable<Keys, kPanels, std::integer_sequence<int, kRows...>> {
  static constexpr ScoreFunction functions[] = {&FloatScores<Keys, kRows + 1, kPanels>...};
};

template <int kPanels, class Rows>
struct IntScoreTable;
template <int kPanels, int... kRows>
struct IntScoreTable<kPanels, std::integer_sequence<int, kRows...>> {
  static constexpr ScoreFunction functions[] = {&IntScores<kRows + 1, kPanels>...};
};

struct ScoreFunctions {
  const ScoreFunction* wide;    // kFloatPanels panels at a time
  const ScoreFunction* narrow;  // one
};

inline ScoreFunctions ScoreFunctionsOf(Format format) {
  using Rows = std::make_integer_sequence<int, kBlockRows>;
  constexpr int kPanels = kFloatPanels;
  switch (format) {
    case Format::kFloat32:
      return {FloatScoreTable<Float32Keys, kPanels, Rows>::functions, FloatScoreTable<Float32Keys, 1, Rows>::functions};
    case Format::kBfloat16:
      return {FloatScoreTable<Bfloat16Keys, kPanels, Rows>::functions,
              FloatScoreTable<Bfloat16Keys, 1, Rows>::functions};
    case Format::kInt8:
    case Format::kInt4:
      break;
  }
  return {IntScoreTable<kPanels, Rows>::functions, IntScoreTable<1, Rows>::functions};
}

// t = cap * tanh(t), cap in base 2.
void CapScores(const AttentionCall& call, float* t, int num_rows, Range range) {
  const F32x16 cap = Broadcast(call.soft_cap * kLog2E);
  for (int r = 0; r < num_rows; ++r, t += kTilePositions) {
    for (int64_t i = range.begin * kPanelPositions; i < range.end * kPanelPositions; i += kPanelPositions) {
      Store(t + i, Mul(cap, Tanh(Load(t + i))));
    }
  }
}

// As ComputeScores, but for the soft cap.
void ComputeVectorScores(const AttentionCall& call, const Workspace& w, const TilePanels& panels, int64_t row,
                         int num_rows, Range range) {
  const ScoreFunctions functions = ScoreFunctionsOf(call.layout.shape.format);
  const float scale = ScoreScale(call);
  for (int64_t panel = range.begin; panel < range.end;) {
    const bool is_wide = panel + kFloatPanels <= range.end;
    const ScoreTile at = {call, w, panels, scale, row, static_cast<int>(panel), w.t + panel * kPanelPositions};
    (is_wide ? functions.wide : functions.narrow)[num_rows - 1](at);
    panel += is_wide ? kFloatPanels : 1;
  }
}

}  // namespace
}  // namespace HEADRACE_TARGET
}  // namespace headrace
