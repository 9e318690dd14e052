// p of a block of rows over one tile, in the cache's format, from their t and references.

namespace headrace {
namespace HEADRACE_TARGET {
namespace {

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

// The values' scales of the panels that a block sees, and 0 where their groups of kSplitPanels reach further; returns the
// largest of each lane. Those of places nobody wrote may be anything, and 0 times them must be 0; a value that is no number
// shows in its t too.
inline F32x16 LoadValueScales(const TilePanels& panels, Range visible, float* scales) {
  const Range groups = SplitGroups(visible);
  F32x16 largest = Broadcast(0.0f);
  FillPanels(0.0f, {groups.begin * kSplitPanels, visible.begin}, scales);
  for (int64_t i = visible.begin; i < visible.end; ++i) {
    const F32x16 positive = Max(Load(panels.Scales(i) + kPanelPositions), Broadcast(0.0f));
    const F32x16 finite = Min(positive, Broadcast(std::numeric_limits<float>::max()));
    largest = Max(finite, largest);
    Store(scales + i * kPanelPositions, finite);
  }
  FillPanels(0.0f, {visible.end, groups.end * kSplitPanels}, scales);
  return largest;
}

// The largest scale of a value that row r sees.
inline float LargestScale(const TilePanels& panels, const SoftmaxBlock& block, int r, const float* scales) {
  F32x16 largest = Broadcast(0.0f);
  for (int64_t i = block.visible.begin; i < block.visible.end; ++i) {
    const Lanes lanes = VisibleLanes(panels, i, block.rows[r]);
    const F32x16 scale = Load(scales + i * kPanelPositions);
    largest = Max(SelectLanes(lanes.begin, lanes.end, scale, Broadcast(0.0f)), largest);
  }
  return MaxLane(largest);
}

// How p times the values' scales becomes two digits, for each row of a block.
struct Digits {
  float scales[kTilePositions];
  float inverse[kLanes];  // times this they are whole numbers below 2^(2 kDigitBits)
};

// No p exceeds that of the largest t, and no product this p times the largest scale, wherever the two lie.
inline void ChooseDigits(const TilePanels& panels, const SoftmaxBlock& block, const float* largest,
                         const float* reference, Digits& digits) {
  static_assert(kBlockRows <= kLanes);
  constexpr auto kLargest = static_cast<float>((1 << 2 * kDigitBits) - 1);
  constexpr float kSmallest = 1e-33f;  // kLargest over it is finite
  const float whole_scale = MaxLane(LoadValueScales(panels, block.visible, digits.scales));
  float exponent[kLanes] = {}, scale[kLanes] = {}, p_scale[kLanes];
  for (int r = 0; r < block.count; ++r) {
    const bool is_whole = SeesWhole(panels, block.visible, block.rows[r]);
    exponent[r] = largest[r] - reference[r];
    scale[r] = is_whole ? whole_scale : LargestScale(panels, block, r, digits.scales);
  }
  const F32x16 bound = Max(Mul(Exp2<4>(Load(exponent)), Load(scale)), Broadcast(kSmallest));
  Store(digits.inverse, Div(Broadcast(kLargest), bound));
  Store(p_scale, Mul(bound, Broadcast(1.0f / kLargest)));
  for (int r = 0; r < block.count; ++r) block.p_scale[r] = p_scale[r];
}

// p times the values' scales as two digits, kSplitPanels panels at a time (StoreSplit). Panels that a row does not see,
// among those, have p = 0.
template <int kRows>
void IntProbabilities(const SoftmaxBlock& block, const float* reference, const Digits& digits, int row) {
  float* t = block.t + row * kTilePositions;
  float* sums = block.sum + row * kLanes;
  auto* high = reinterpret_cast<uint8_t*>(block.p) + row * 2 * kTilePositions;
  const Range groups = SplitGroups(block.visible);
  F32x16 m[kRows], sum[kRows], inverse[kRows];
  Unroll<kRows>([&](auto r) HEADRACE_LAMBDA {
    m[r] = Broadcast(reference[row + r]);
    sum[r] = Load(sums + r * kLanes);
    inverse[r] = Broadcast(digits.inverse[row + r]);
    FillPanels(-kInfinity, {groups.begin * kSplitPanels, block.visible.begin}, t + r * kTilePositions);
    FillPanels(-kInfinity, {block.visible.end, groups.end * kSplitPanels}, t + r * kTilePositions);
  });
  for (int64_t i = groups.begin * kSplitPositions; i < groups.end * kSplitPositions; i += kSplitPositions) {
    F32x16 scale[kSplitPanels];
    Unroll<kSplitPanels>([&](auto j) HEADRACE_LAMBDA { scale[j] = Load(digits.scales + i + j * kPanelPositions); });
    Unroll<kRows>([&](auto r) HEADRACE_LAMBDA {
      F32x16 p[kSplitPanels];
      Unroll<kSplitPanels>([&](auto j) HEADRACE_LAMBDA {
        const F32x16 e = Exp2<4>(Sub(Load(t + r * kTilePositions + i + j * kPanelPositions), m[r]));
        sum[r] = Add(sum[r], e);
        p[j] = Mul(Mul(e, scale[j]), inverse[r]);
      });
      uint8_t* to = high + r * 2 * kTilePositions + i;
      StoreSplit(to, to + kTilePositions, p);
    });
  }
  Unroll<kRows>([&](auto r) HEADRACE_LAMBDA { Store(sums + r * kLanes, sum[r]); });
}

// compute(rows, row) for kSoftmaxRows rows of the block at a time, then one by one.
template <class Compute>
inline void ForEachRows(const SoftmaxBlock& block, const Compute& compute) {
  int r = 0;
  for (; r + kSoftmaxRows <= block.count; r += kSoftmaxRows) {
    compute(std::integral_constant<int, kSoftmaxRows>(), r);
  }
  for (; r < block.count; ++r) compute(std::integral_constant<int, 1>(), r);
}

void ComputeProbabilities(const AttentionCall& call, const TilePanels& panels, const SoftmaxBlock& block) {
  const Format format = call.layout.shape.format;
  const bool is_int = format == Format::kInt8 || format == Format::kInt4;
  float largest[kBlockRows], reference[kBlockRows];
  HideInvisible(panels, block);
  if (is_int || call.scheme != SoftmaxScheme::kAsynchronized) FindLargestOfRows(block, largest);
  ChooseReferences(call, block, largest, reference);
  if (is_int) {
    Digits digits;
    ChooseDigits(panels, block, largest, reference, digits);
    ForEachRows(block, [&](auto rows, int row) { IntProbabilities<rows>(block, reference, digits, row); });
  } else if (format == Format::kBfloat16) {
    ForEachRows(block, [&](auto rows, int row) { Bfloat16Probabilities<rows>(block, reference, row); });
  } else {
    ForEachRows(block, [&](auto rows, int row) { Float32Probabilities<rows>(block, reference, row); });
  }
}

}  // namespace
}  // namespace HEADRACE_TARGET
}  // namespace headrace
