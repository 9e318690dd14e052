// From the t of a block of rows to their p over one tile, and the rows' running state.
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
  // Without gaps only the first and the last panel can be seen in part.
  const int64_t distance = block.visible.end - 1 - block.visible.begin;
  const int64_t step = panels.has_gaps || distance == 0 ? 1 : distance;
  for (int64_t i = block.visible.begin; i < block.visible.end; i += step) {
    const Lanes lanes = VisibleLanes(panels, static_cast<int>(i), block.rows[r]);
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

inline void ZeroPanels(float* x, Range panels) {
  for (int64_t panel = panels.begin; panel < panels.end; ++panel) Store(x + panel * kPanelPositions, Broadcast(0.0f));
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

// Sets m of every row for this tile, and returns what to subtract. An asynchronized row whose t leave the bounds is
// marked by an m of NaN.
inline void ChooseReferences(const AttentionCall& call, const SoftmaxBlock& block, float* reference) {
  if (call.scheme == SoftmaxScheme::kAsynchronized) {
    for (int r = 0; r < block.count; ++r) {
      reference[r] = call.unified_max.value;
      if (!call.unified_max.is_strict) continue;
      if (!IsWithin(call.unified_max, block.t + r * kTilePositions, block.visible)) block.m[r] = FromBits(0x7fc00000);
    }
    return;
  }
  const float threshold = call.scheme == SoftmaxScheme::kLazy ? kLazyThreshold : 0.0f;
  float largest[kBlockRows];
  int r = 0;
  for (; r + kSoftmaxRows <= block.count; r += kSoftmaxRows) {
    FindLargest<kSoftmaxRows>(block.t + r * kTilePositions, block.visible, largest + r);
  }
  for (; r < block.count; ++r) FindLargest<1>(block.t + r * kTilePositions, block.visible, largest + r);
  for (r = 0; r < block.count; ++r) {
    if (largest[r] > block.m[r] + threshold) RaiseReference(largest[r], block, r);
    reference[r] = Reference(block.m[r]);
  }
}

// store(r, i, e) for e = 2^(t - reference), positions i and on of row `row` + r, and their sums, of float32 before any
// rounding.
template <int kRows, int kDegree, class StoreProbabilities>
HEADRACE_INLINE void Exponentials(const SoftmaxBlock& block, const float* reference, int row,
                                  const StoreProbabilities& store) {
  const float* t = block.t + row * kTilePositions;
  float* sums = block.sum + row * kLanes;
  F32x16 m[kRows], sum[kRows];
  Unroll<kRows>([&](auto r) HEADRACE_LAMBDA {
    m[r] = Broadcast(reference[row + r]);
    sum[r] = Load(sums + r * kLanes);
  });
  const int64_t end = block.visible.end * kPanelPositions;
  for (int64_t i = block.visible.begin * kPanelPositions; i < end; i += kPanelPositions) {
    Unroll<kRows>([&](auto r) HEADRACE_LAMBDA {
      const F32x16 e = Exp2<kDegree>(Sub(Load(t + r * kTilePositions + i), m[r]));
      sum[r] = Add(sum[r], e);
      store(r, i, e);
    });
  }
  Unroll<kRows>([&](auto r) HEADRACE_LAMBDA { Store(sums + r * kLanes, sum[r]); });
}

template <int kRows>
void Float32Probabilities(const SoftmaxBlock& block, const float* reference, int row) {
  auto* p = reinterpret_cast<float*>(block.p) + row * kTilePositions;
  Exponentials<kRows, 6>(block, reference, row, [=](auto r, int64_t i, const F32x16& e) HEADRACE_LAMBDA {
    Store(p + r * kTilePositions + i, e);
  });
}

// Four coefficients leave an error far below that of rounding to bfloat16.
template <int kRows>
void Bfloat16Probabilities(const SoftmaxBlock& block, const float* reference, int row) {
  auto* p = reinterpret_cast<Bf16X*>(block.p) + row * kTilePositions;
  Exponentials<kRows, 4>(block, reference, row, [=](auto r, int64_t i, const F32x16& e) HEADRACE_LAMBDA {
    StoreBf16X(p + r * kTilePositions + i, e);
  });
}

// Asks for the lines of a panel of the next tile's keys that the scores left out: where there are two groups of rows, half
// of them beside each.
inline void PrefetchKeys(const TilePanels& panels, int64_t panel, const SoftmaxBlock& block, int row) {
  const int64_t num_groups = block.count > kSoftmaxRows ? 2 : 1;
  const uint8_t* lines = panels.next[panel];
  for (int64_t i = 1 + 2 * (row / kSoftmaxRows); i < panels.key_vectors; i += 2 * num_groups) {
    Prefetch(lines + i * kVectorBytes);
  }
}

// p times the values' scales, as 14 bits of the largest in the tile: upper seven, then lower seven, kSplitPanels panels
// at a time (StoreSplit). Panels that a row does not see, among those, have p = 0.
template <int kRows>
void IntProbabilities(const TilePanels& panels, const SoftmaxBlock& block, const float* reference, int row) {
  constexpr float kLargest = 16383.0f;
  constexpr float kSmallest = 1e-34f;  // kLargest over it is finite
  float* scaled = block.t + row * kTilePositions;
  F32x16 max[kRows];
  Unroll<kRows>([&](auto r) HEADRACE_LAMBDA { max[r] = Broadcast(0.0f); });
  Exponentials<kRows, 4>(block, reference, row, [&](auto r, int64_t i, const F32x16& e) HEADRACE_LAMBDA {
    const F32x16 x = Mul(e, Load(panels.scales[i / kPanelPositions] + kPanelPositions));
    max[r] = Max(x, max[r]);
    Store(scaled + r * kTilePositions + i, x);
    if (r == 0 && row % kSoftmaxRows == 0) PrefetchKeys(panels, i / kPanelPositions, block, row);
  });
  const Range groups = SplitGroups(block.visible);
  for (int r = 0; r < kRows; ++r) {
    float* x = scaled + r * kTilePositions;
    // 0 times the scale of a place nobody wrote need not be 0.
    ForEachEdge(panels, block, row + r, [&](int64_t panel, Lanes lanes) {
      float* to = x + panel * kPanelPositions;
      Store(to, SelectLanes(lanes.begin, lanes.end, Load(to), Broadcast(0.0f)));
    });
    ZeroPanels(x, {groups.begin * kSplitPanels, block.visible.begin});
    ZeroPanels(x, {block.visible.end, groups.end * kSplitPanels});
  }
  F32x16 inverse[kRows];
  Unroll<kRows>([&](auto r) HEADRACE_LAMBDA {
    const float largest = MaxLane(max[r]);
    block.p_scale[row + r] = largest / kLargest;
    inverse[r] = Broadcast(largest < kSmallest ? 0.0f : kLargest / largest);
  });
  auto* high = reinterpret_cast<uint8_t*>(block.p) + row * 2 * kTilePositions;
  for (int64_t i = groups.begin * kSplitPositions; i < groups.end * kSplitPositions; i += kSplitPositions) {
    Unroll<kRows>([&](auto r) HEADRACE_LAMBDA {
      const float* x = scaled + r * kTilePositions + i;
      F32x16 p[kSplitPanels];
      Unroll<kSplitPanels>([&](auto j) HEADRACE_LAMBDA { p[j] = Mul(Load(x + j * kPanelPositions), inverse[r]); });
      uint8_t* to = high + r * 2 * kTilePositions + i;
      StoreSplit(to, to + kTilePositions, p);
    });
  }
}

template <int kRows>
void Probabilities(Format format, const TilePanels& panels, const SoftmaxBlock& block, const float* reference,
                   int row) {
  switch (format) {
    case Format::kFloat32:
      return Float32Probabilities<kRows>(block, reference, row);
    case Format::kBfloat16:
      return Bfloat16Probabilities<kRows>(block, reference, row);
    case Format::kInt8:
    case Format::kInt4:
      return IntProbabilities<kRows>(panels, block, reference, row);
  }
}

void ComputeProbabilities(const AttentionCall& call, const TilePanels& panels, const SoftmaxBlock& block) {
  float reference[kBlockRows];
  HideInvisible(panels, block);
  ChooseReferences(call, block, reference);
  const Format format = call.layout.shape.format;
  int r = 0;
  for (; r + kSoftmaxRows <= block.count; r += kSoftmaxRows) {
    Probabilities<kSoftmaxRows>(format, panels, block, reference, r);
  }
  for (; r < block.count; ++r) Probabilities<1>(format, panels, block, reference, r);
}

}  // namespace
}  // namespace HEADRACE_TARGET
}  // namespace headrace
