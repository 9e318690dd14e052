// The rows of a tile: what they see, their queries as the kernels read them, and their results so far.

namespace headrace {
namespace HEADRACE_TARGET {
namespace {

// Rows whose scores and products are computed together: as many as their accumulators fit the registers, or a tile.
constexpr int kBlockRows = kFloatRows;
constexpr int kMaxBlockRows = 16;
static_assert(kBlockRows <= kMaxBlockRows && kMaxBlockRows <= kLanes);
inline int BlockRowsOf(Format format) { return HasTiles(format) ? kMaxBlockRows : kBlockRows; }

constexpr int kTilePositions = kTilePanels * kPanelPositions;

// Probabilities of int8 are stored for so many panels at a time (StoreSplit).
constexpr int kSplitPanels = 4;
constexpr int64_t kSplitPositions = kSplitPanels * kPanelPositions;
static_assert(kTilePanels % kSplitPanels == 0);

// The groups of so many panels in which those of a range lie.
inline Range SplitGroups(Range panels) {
  return {panels.begin / kSplitPanels, (panels.end + kSplitPanels - 1) / kSplitPanels};
}

// Running results of every row: the reference m, the sum and o, unnormalized.
struct State {
  float* m;
  float* sum;  // kLanes for each row within a split, else one
  float* o;    // o_stride for each row
};

// A thread's memory, cut into parts.
struct Workspace {
  Row* rows;
  char* query;          // query_bytes for each row
  float* query_scale;   // int8: ScoreScale * the scale of the row's query
  int32_t* query_start; // int8: -offset * sum of the query
  float* t;             // [BlockRowsOf(format)][kTilePositions]
  char* p;              // [BlockRowsOf(format)], p_bytes each
  float* p_scale;       // int8: [BlockRowsOf(format)]
  State split;
  State total;
};

// Entries of the query are padded like those of a key, or where there are tiles to a step of theirs.
inline int64_t QueryEntries(const KvLayout& layout) {
  constexpr int64_t kStepVectors = 8;
  const Format format = layout.shape.format;
  const int64_t num_vectors = HasTiles(format) ? RoundUp(layout.key_vectors, kStepVectors) : layout.key_vectors;
  return num_vectors * VectorColumns(format);
}

inline int64_t QueryBytes(const KvLayout& layout) {
  switch (layout.shape.format) {
    case Format::kFloat32:
      return QueryEntries(layout) * static_cast<int64_t>(sizeof(float));
    case Format::kBfloat16:
      return QueryEntries(layout) * static_cast<int64_t>(sizeof(Bf16X));
    case Format::kInt8:
    case Format::kInt4:
      break;
  }
  return QueryEntries(layout);
}

inline int64_t ProbabilityBytes(Format format) {
  switch (format) {
    case Format::kFloat32:
      return kTilePositions * static_cast<int64_t>(sizeof(float));
    case Format::kBfloat16:
      return kTilePositions * static_cast<int64_t>(sizeof(Bf16X));
    case Format::kInt8:
    case Format::kInt4:
      break;
  }
  return 2 * kTilePositions;
}

inline int64_t OutputStride(const KvLayout& layout) { return layout.value_chunks * kLanes; }

// Cuts memory into parts aligned to 64 bytes; with no memory it only adds them up.
class Cutter {
 public:
  explicit Cutter(char* memory) : memory_(memory) {}
  template <class T>
  T* Cut(int64_t count) {
    T* part = memory_ == nullptr ? nullptr : reinterpret_cast<T*>(memory_ + num_bytes_);
    num_bytes_ += RoundUp(count * static_cast<int64_t>(sizeof(T)), 64);
    return part;
  }
  int64_t num_bytes() const { return num_bytes_; }

 private:
  char* memory_;
  int64_t num_bytes_ = 0;
};

inline Workspace CutWorkspace(const KvLayout& layout, Cutter& cutter) {
  Workspace w;
  const int64_t block_rows = BlockRowsOf(layout.shape.format);
  w.rows = cutter.Cut<Row>(kPassRows);
  w.query = cutter.Cut<char>(kPassRows * QueryBytes(layout));
  w.query_scale = cutter.Cut<float>(kPassRows);
  w.query_start = cutter.Cut<int32_t>(kPassRows);
  w.t = cutter.Cut<float>(block_rows * kTilePositions);
  w.p = cutter.Cut<char>(block_rows * ProbabilityBytes(layout.shape.format));
  w.p_scale = cutter.Cut<float>(block_rows);
  w.split = {cutter.Cut<float>(kPassRows), cutter.Cut<float>(kPassRows * kLanes),
             cutter.Cut<float>(kPassRows * OutputStride(layout))};
  w.total = {cutter.Cut<float>(kPassRows), cutter.Cut<float>(kPassRows),
             cutter.Cut<float>(kPassRows * OutputStride(layout))};
  return w;
}

inline int64_t WorkspaceBytes(const AttentionCall& call) {
  Cutter cutter(nullptr);
  CutWorkspace(call.layout, cutter);
  return cutter.num_bytes();
}

inline float ToFloat32(float value) { return value; }
inline float ToFloat32(uint16_t value) { return FromBfloat16(value); }

template <class X, class Out>
void ExpandQuery(const X* x, int64_t head_dim, int64_t num_entries, Out* out) {
  if constexpr (sizeof(X) == sizeof(Out)) {
    memcpy(out, x, head_dim * sizeof(X));
  } else if constexpr (sizeof(Out) == 2) {
    for (int64_t d = 0; d < head_dim; ++d) out[d] = ToBfloat16(x[d]);
  } else {
    for (int64_t d = 0; d < head_dim; ++d) out[d] = ToFloat32(x[d]);
  }
  for (int64_t d = head_dim; d < num_entries; ++d) out[d] = 0;
}

// Rounds to whole numbers times the returned scale, the largest of which is 127; NaN for a query with NaN or infinity.
template <class X>
float QuantizeQuery(const X* x, int64_t head_dim, int64_t num_entries, int8_t* out, int32_t* start) {
  uint32_t largest_bits = 0;
  for (int64_t d = 0; d < head_dim; ++d) {
    const uint32_t bits = Bits(ToFloat32(x[d])) & 0x7fffffff;
    largest_bits = bits > largest_bits ? bits : largest_bits;
  }
  constexpr uint32_t kInfinity = 0x7f800000;
  constexpr float kLargest = 127.0f, kSmallestScale = 0x1p-126f;
  memset(out, 0, num_entries);
  *start = 0;
  if (largest_bits >= kInfinity) return FromBits(0x7fc00000);
  const float scale = FromBits(largest_bits) / kLargest;
  if (scale < kSmallestScale) return 0.0f;
  const float inverse = 1.0f / scale;
  int32_t sum = 0;
  for (int64_t d = 0; d < head_dim; ++d) {
    // Adding 1.5 * 2^23 rounds; its bits then count up from those of that number.
    constexpr float kShift = 12582912.0f;
    const int32_t whole = static_cast<int32_t>(Bits(ToFloat32(x[d]) * inverse + kShift) - Bits(kShift));
    out[d] = static_cast<int8_t>(whole);
    sum += whole;
  }
  *start = -kInt8Offset * sum;
  return scale;
}

constexpr float kLog2E = 1.44269504088896340736f;

// A product times this is t, or with a soft cap what the hyperbolic tangent is taken of.
inline float ScoreScale(const AttentionCall& call) {
  return call.has_soft_cap ? call.score_scale / call.soft_cap : call.score_scale * kLog2E;
}

template <class X>
void PrepareQuery(const AttentionCall& call, const X* x, int64_t i, const Workspace& w) {
  const int64_t head_dim = call.layout.shape.head_dim, num_entries = QueryEntries(call.layout);
  char* out = w.query + i * QueryBytes(call.layout);
  switch (call.layout.shape.format) {
    case Format::kFloat32:
      return ExpandQuery(x, head_dim, num_entries, reinterpret_cast<float*>(out));
    case Format::kBfloat16:
      return ExpandQuery(x, head_dim, num_entries, reinterpret_cast<Bf16X*>(out));
    case Format::kInt8:
    case Format::kInt4:
      break;
  }
  const float scale = QuantizeQuery(x, head_dim, num_entries, reinterpret_cast<int8_t*>(out), w.query_start + i);
  w.query_scale[i] = scale * ScoreScale(call);
}

// Fills w.rows. Rows of one token differ in their head only.
void FindRows(const AttentionCall& call, const RowTile& tile, const Workspace& w) {
  const int64_t group = call.num_heads / call.layout.shape.num_kv_heads;
  const int64_t num_rows = tile.rows.end - tile.rows.begin;
  for (int64_t i = 0; i < num_rows;) {
    w.rows[i] = RowAt(call, tile, tile.rows.begin + i);
    const int64_t end = i + (tile.kv_head + 1) * group - w.rows[i].head;
    for (++i; i < end && i < num_rows; ++i) {
      w.rows[i] = w.rows[i - 1];
      ++w.rows[i].head;
    }
  }
}

void PrepareRows(const AttentionCall& call, const RowTile& tile, const Workspace& w) {
  FindRows(call, tile, w);
  for (int64_t i = 0; i < tile.rows.end - tile.rows.begin; ++i) {
    const int64_t offset = w.rows[i].token * call.query_stride + w.rows[i].head * call.layout.shape.head_dim;
    if (call.dtype == DType::kFloat32) {
      PrepareQuery(call, static_cast<const float*>(call.query) + offset, i, w);
    } else {
      PrepareQuery(call, static_cast<const uint16_t*>(call.query) + offset, i, w);
    }
  }
}

}  // namespace
}  // namespace HEADRACE_TARGET
}  // namespace headrace
