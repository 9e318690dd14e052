// p of a block of rows over one tile, in the cache's format, from their t and references.

namespace headrace {
namespace HEADRACE_TARGET {
namespace {

// What rows `row` and on ask for of each panel that comes next. Those that are computed one by one do not.
template <int kRows>
inline Range BytesToFetch(const TilePanels& panels, const SoftmaxBlock& block, int row) {
  const int num_parts = block.count / kSoftmaxRows;
  if (num_parts == 0) return row == 0 ? panels.BytesForProbabilities(0, 1) : Range{0, 0};
  return kRows == kSoftmaxRows ? panels.BytesForProbabilities(row / kSoftmaxRows, num_parts) : Range{0, 0};
}

// store(r, i, e) for e = 2^(t - reference), positions i and on of row `row` + r, and their sums, of float32 before any
// rounding.
template <int kRows, int kDegree, class StoreProbabilities>
HEADRACE_INLINE void Exponentials(const TilePanels& panels, const SoftmaxBlock& block, const float* reference, int row,
                                  const StoreProbabilities& store) {
  const float* t = block.t + row * kTilePositions;
  float* sums = block.sum + row * kLanes;
  F32x16 m[kRows], sum[kRows];
  Unroll<kRows>([&](auto r) HEADRACE_LAMBDA {
    m[r] = Broadcast(reference[row + r]);
    sum[r] = Load(sums + r * kLanes);
  });
  const Range fetched = BytesToFetch<kRows>(panels, block, row);
  const int64_t end = block.visible.end * kPanelPositions;
  for (int64_t i = block.visible.begin * kPanelPositions; i < end; i += kPanelPositions) {
    panels.PrefetchBytes(i / kPanelPositions, fetched);
    Unroll<kRows>([&](auto r) HEADRACE_LAMBDA {
      const F32x16 e = Exp2<kDegree>(Sub(Load(t + r * kTilePositions + i), m[r]));
      sum[r] = Add(sum[r], e);
      store(r, i, e);
    });
  }
  Unroll<kRows>([&](auto r) HEADRACE_LAMBDA { Store(sums + r * kLanes, sum[r]); });
}

template <int kRows>
void Float32Probabilities(const TilePanels& panels, const SoftmaxBlock& block, const float* reference, int row) {
  auto* p = reinterpret_cast<float*>(block.p) + row * kTilePositions;
  Exponentials<kRows, 6>(panels, block, reference, row, [=](auto r, int64_t i, const F32x16& e) HEADRACE_LAMBDA {
    Store(p + r * kTilePositions + i, e);
  });
}

// Four coefficients leave an error far below that of rounding to bfloat16.
template <int kRows>
void Bfloat16Probabilities(const TilePanels& panels, const SoftmaxBlock& block, const float* reference, int row) {
  auto* p = reinterpret_cast<Bf16X*>(block.p) + row * kTilePositions;
  Exponentials<kRows, 4>(panels, block, reference, row, [=](auto r, int64_t i, const F32x16& e) HEADRACE_LAMBDA {
    StoreBf16X(p + r * kTilePositions + i, e);
  });
}

// How p times the values' scales becomes two digits, for each row of a block.
struct Digits {
  float scales[kTilePositions];
  float exponents[kTilePositions];  // no less than log2 of the scales, and of normal ones by kLogError more at most
  float inverse[kLanes];            // times this they are whole numbers below 2^(2 kDigitBits)
};

// log2(1 + f) - f is at most 0.08607; the rest is for what floats of size 256 lose, three times.
constexpr float kLogError = 0.0862f;

// From a float's bits: its exponent plus the fraction of its mantissa.
inline F32x16 ExponentsOf(const F32x16& scales) {
  I32x16 bits;
  memcpy(&bits, &scales, sizeof bits);
  return Sub(Mul(ToFloat(bits), Broadcast(0x1p-23f)), Broadcast(127.0f - kLogError));
}

// Loads the values' scales of the panels that a block sees, and 0 where their groups of kSplitPanels reach further. Those of
// places nobody wrote may be anything, and 0 times them must be 0; a value that is no number shows in its t too. Returns the
// log2 of the largest if no other is far smaller, and infinity else.
inline float LoadValueScales(const TilePanels& panels, Range visible, Digits& digits) {
  constexpr float kEven = 2.0f;  // bits by which the bound may be too large
  const Range groups = SplitGroups(visible);
  F32x16 largest = Broadcast(-kInfinity), least = Broadcast(kInfinity);
  FillPanels(0.0f, {groups.begin * kSplitPanels, visible.begin}, digits.scales);
  for (int64_t i = visible.begin; i < visible.end; ++i) {
    const F32x16 positive = Max(Load(panels.Scales(i) + kPanelPositions), Broadcast(0.0f));
    const F32x16 finite = Min(positive, Broadcast(std::numeric_limits<float>::max()));
    const F32x16 exponents = ExponentsOf(finite);
    largest = Max(exponents, largest);
    least = Min(exponents, least);
    Store(digits.scales + i * kPanelPositions, finite);
    Store(digits.exponents + i * kPanelPositions, exponents);
  }
  FillPanels(0.0f, {visible.end, groups.end * kSplitPanels}, digits.scales);
  const float exponent = MaxLane(largest);
  return exponent + MaxLane(Sub(Broadcast(0.0f), least)) <= kEven ? exponent : kInfinity;
}

// The largest t - reference + log2(scale) of a row: as t of what it does not see is -infinity, no such scale counts.
inline float LargestProduct(const SoftmaxBlock& block, int r, float reference, const float* exponents) {
  const float* t = block.t + r * kTilePositions;
  const F32x16 minus_m = Broadcast(-reference);
  F32x16 max = Broadcast(-kInfinity);
  for (int64_t i = block.visible.begin * kPanelPositions; i < block.visible.end * kPanelPositions; i += kPanelPositions) {
    max = Max(Add(AddByProduct(Load(t + i), minus_m), Load(exponents + i)), max);
  }
  return MaxLane(max);
}

// Digits count from the largest product, not from the largest p times the largest scale: the token that most of a row's
// attention rests on may have a value next to nothing (Xiao et al. 2024), and what is left of the others is the result.
// Where all scales are within a factor of four that makes two bits at most, and looking at them apart takes less time.
inline void ChooseDigits(const TilePanels& panels, const SoftmaxBlock& block, const float* largest,
                         const float* reference, Digits& digits) {
  constexpr auto kLargest = static_cast<float>((1 << 2 * kDigitBits) - 1);
  constexpr float kSmallest = 1e-33f;  // kLargest over it is finite
  float exponent[kLanes] = {}, p_scale[kLanes];
  const float even = LoadValueScales(panels, block.visible, digits);
  for (int r = 0; r < block.count; ++r) {
    const bool is_even = even < kInfinity && SeesWhole(panels, block.visible, block.rows[r]);
    exponent[r] = is_even ? largest[r] - reference[r] + even : LargestProduct(block, r, reference[r], digits.exponents);
  }
  const F32x16 bound = Max(Exp2<4>(Load(exponent)), Broadcast(kSmallest));
  Store(digits.inverse, Div(Broadcast(kLargest), bound));
  Store(p_scale, Mul(bound, Broadcast(1.0f / kLargest)));
  for (int r = 0; r < block.count; ++r) block.p_scale[r] = p_scale[r];
}

// p times the values' scales as two digits, kSplitPanels panels at a time (StoreSplit). Panels that a row does not see,
// among those, have p = 0.
template <int kRows>
void IntProbabilities(const TilePanels& panels, const SoftmaxBlock& block, const float* reference, const Digits& digits,
                      int row) {
  float* t = block.t + row * kTilePositions;
  float* sums = block.sum + row * kLanes;
  auto* high = reinterpret_cast<uint8_t*>(block.p) + row * 2 * kTilePositions;
  const Range groups = SplitGroups(block.visible), fetched = BytesToFetch<kRows>(panels, block, row);
  F32x16 minus_m[kRows], sum[kRows], inverse[kRows];
  Unroll<kRows>([&](auto r) HEADRACE_LAMBDA {
    minus_m[r] = Broadcast(-reference[row + r]);
    sum[r] = Load(sums + r * kLanes);
    inverse[r] = Broadcast(digits.inverse[row + r]);
    FillPanels(-kInfinity, {groups.begin * kSplitPanels, block.visible.begin}, t + r * kTilePositions);
    FillPanels(-kInfinity, {block.visible.end, groups.end * kSplitPanels}, t + r * kTilePositions);
  });
  for (int64_t i = groups.begin * kSplitPositions; i < groups.end * kSplitPositions; i += kSplitPositions) {
    F32x16 scale[kSplitPanels];
    Unroll<kSplitPanels>([&](auto j) HEADRACE_LAMBDA { scale[j] = Load(digits.scales + i + j * kPanelPositions); });
    Unroll<kRows>([&](auto r) HEADRACE_LAMBDA {
      if constexpr (r < kSplitPanels) panels.PrefetchBytes(i / kPanelPositions + r, fetched);
      F32x16 p[kSplitPanels];
      Unroll<kSplitPanels>([&](auto j) HEADRACE_LAMBDA {
        const float* from = t + r * kTilePositions + i + j * kPanelPositions;
        const F32x16 e = Exp2<4>(AddByProduct(Load(from), minus_m[r]));
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
  float largest[kMaxBlockRows], reference[kMaxBlockRows];
  HideInvisible(panels, block);
  if (is_int || call.scheme != SoftmaxScheme::kAsynchronized) FindLargestOfRows(block, largest);
  ChooseReferences(call, block, largest, reference);
  if (is_int) {
    Digits digits;
    ChooseDigits(panels, block, largest, reference, digits);
    ForEachRows(block, [&](auto rows, int row) { IntProbabilities<rows>(panels, block, reference, digits, row); });
  } else if (format == Format::kBfloat16) {
    ForEachRows(block, [&](auto rows, int row) { Bfloat16Probabilities<rows>(panels, block, reference, row); });
  } else {
    ForEachRows(block, [&](auto rows, int row) { Float32Probabilities<rows>(panels, block, reference, row); });
  }
}

}  // namespace
}  // namespace HEADRACE_TARGET
}  // namespace headrace
