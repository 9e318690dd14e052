// The references of a block of rows over one tile, from their t, and the rows' running state.
//
// Rows that see the same panels are taken kSoftmaxRows at a time, so that one row's chain of operations fills the gaps in
// another's; what is computed for a row does not depend on it.

#include <limits>

namespace headrace {
namespace HEADRACE_TARGET {
namespace {

constexpr float kInfinity = std::numeric_limits<float>::infinity();
constexpr int kSoftmaxRows = kBlockRows < 4 ? kBlockRows : 4;

// A block of rows over one tile: where row r's t, p and state lie is r strides on. All rows see the same panels of the
// tile, one or more, but not always the same lanes of the first and the last one.
struct SoftmaxBlock {
  float* t;        // kTilePositions apart
  char* p;         // p_bytes apart
  float* p_scale;  // int8
  int64_t p_bytes;
  Range visible;
  const Row* rows;
  float* m;
  float* sum;  // kLanes apart
  float* o;    // o_stride apart
  int64_t o_stride;
  int count;
};

// visit(panel, lanes) for each panel that row r sees only in part.
template <class Visit>
inline void ForEachEdge(const TilePanels& panels, const SoftmaxBlock& block, int r, const Visit& visit) {
  if (SeesWhole(panels, block.visible, block.rows[r])) return;
  // Without gaps only the first and the last panel can be seen in part.
  const int64_t distance = block.visible.end - 1 - block.visible.begin;
  const int64_t step = panels.has_gaps || distance == 0 ? 1 : distance;
  for (int64_t i = block.visible.begin; i < block.visible.end; i += step) {
    const Lanes lanes = VisibleLanes(panels, i, block.rows[r]);
    if (!lanes.IsFull()) visit(i, lanes);
  }
}

// t of the positions that a row does not see, in the panels it sees, becomes -infinity.
inline void HideInvisible(const TilePanels& panels, const SoftmaxBlock& block) {
  for (int r = 0; r < block.count; ++r) {
    ForEachEdge(panels, block, r, [&](int64_t panel, Lanes lanes) {
      float* t = block.t + r * kTilePositions + panel * kPanelPositions;
      Store(t, SelectLanes(lanes.begin, lanes.end, Load(t), Broadcast(-kInfinity)));
    });
  }
}

inline void FillPanels(float value, Range panels, float* x) {
  for (int64_t panel = panels.begin; panel < panels.end; ++panel) Store(x + panel * kPanelPositions, Broadcast(value));
}

template <int kRows>
inline void FindLargest(const float* t, Range visible, float* largest) {
  F32x16 max[kRows];
  Unroll<kRows>([&](auto r) HEADRACE_LAMBDA { max[r] = Broadcast(-kInfinity); });
  for (int64_t i = visible.begin * kPanelPositions; i < visible.end * kPanelPositions; i += kPanelPositions) {
    Unroll<kRows>([&](auto r) HEADRACE_LAMBDA { max[r] = Max(Load(t + r * kTilePositions + i), max[r]); });
  }
  Unroll<kRows>([&](auto r) HEADRACE_LAMBDA { largest[r] = MaxLane(max[r]); });
}

inline float Exp2Of(float x) {
  float lanes[kLanes];
  Store(lanes, Exp2<6>(Broadcast(x)));
  return lanes[0];
}

inline void ScaleBy(float factor, float* values, int64_t count) {
  for (int64_t i = 0; i < count; i += kLanes) Store(values + i, Mul(Load(values + i), Broadcast(factor)));
}

// 2^-infinity is 0 whatever m is, but infinity - infinity is not a number: a state without any weight refers to 0.
inline float Reference(float m) { return m == -kInfinity ? 0.0f : m; }

// Raises m of row r to a new reference, and brings its sum and o along.
inline void RaiseReference(float m, const SoftmaxBlock& block, int r) {
  if (block.m[r] != -kInfinity) {
    const float factor = Exp2Of(block.m[r] - m);
    ScaleBy(factor, block.sum + r * kLanes, kLanes);
    ScaleBy(factor, block.o + r * block.o_stride, block.o_stride);
  }
  block.m[r] = m;
}

// Whether every t lies strictly between the bounds. -infinity and NaN, which t + 0 * t makes of any infinity, do not
// count as too small; infinity counts as too large.
inline bool IsWithin(const UnifiedMax& unified_max, const float* t, Range visible) {
  F32x16 least = Broadcast(kInfinity);
  for (int64_t i = visible.begin * kPanelPositions; i < visible.end * kPanelPositions; i += kPanelPositions) {
    const F32x16 x = Load(t + i);
    least = Min(Add(x, Mul(x, Broadcast(0.0f))), least);
  }
  float lanes[kLanes];
  Store(lanes, least);
  float smallest = lanes[0], largest;
  for (const float lane : lanes) smallest = lane < smallest ? lane : smallest;
  FindLargest<1>(t, visible, &largest);
  return smallest > unified_max.least && largest < unified_max.largest;
}

// The largest t of each row.
inline void FindLargestOfRows(const SoftmaxBlock& block, float* largest) {
  int r = 0;
  for (; r + kSoftmaxRows <= block.count; r += kSoftmaxRows) {
    FindLargest<kSoftmaxRows>(block.t + r * kTilePositions, block.visible, largest + r);
  }
  for (; r < block.count; ++r) FindLargest<1>(block.t + r * kTilePositions, block.visible, largest + r);
}

// Sets m of every row for this tile, whose largest t are given but for asynchronized rows, and returns what to subtract.
// An asynchronized row whose t leave the bounds is marked by an m of NaN.
inline void ChooseReferences(const AttentionCall& call, const SoftmaxBlock& block, const float* largest,
                             float* reference) {
  if (call.scheme == SoftmaxScheme::kAsynchronized) {
    for (int r = 0; r < block.count; ++r) {
      reference[r] = call.unified_max.value;
      if (!call.unified_max.is_strict) continue;
      if (!IsWithin(call.unified_max, block.t + r * kTilePositions, block.visible)) block.m[r] = FromBits(0x7fc00000);
    }
    return;
  }
  const float threshold = call.scheme == SoftmaxScheme::kLazy ? kLazyThreshold : 0.0f;
  for (int r = 0; r < block.count; ++r) {
    if (largest[r] > block.m[r] + threshold) RaiseReference(largest[r], block, r);
    reference[r] = Reference(block.m[r]);
  }
}

}  // namespace
}  // namespace HEADRACE_TARGET
}  // namespace headrace
