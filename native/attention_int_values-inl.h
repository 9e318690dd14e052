// o += p_scale (p V) of int8 with vectors, for a block of rows and the panels of a tile.

namespace headrace {
namespace HEADRACE_TARGET {
namespace {

// Integers inside the brackets: exact in any order, and unseen positions have p = 0.
template <int kRows, int kChunks>
void IntProducts(const ValueTile& at, const float* p_scale) {
  constexpr int kSteps = kPanelPositions / VectorColumns(Format::kInt8);
  const int64_t o_stride = OutputStride(at.call.layout);
  const int64_t offset = at.call.layout.value_offset + at.chunk * kSteps * kVectorBytes;
  I32x16 high[kRows][kChunks], low[kRows][kChunks];
  UnrollPairs<kRows, kChunks>([&](auto r, auto c) HEADRACE_LAMBDA { high[r][c] = low[r][c] = BroadcastInt(0); });
  for (int64_t panel = at.range.begin; panel < at.range.end; ++panel) {
    const uint8_t* v = at.panels.address[panel] + offset;
    const uint8_t* ahead = at.panels.next[panel] + offset;
    const auto* p = reinterpret_cast<const uint8_t*>(at.p) + panel / kSplitPanels * kSplitPositions;
    p += panel % kSplitPanels * 4;
    for (int i = 0; i < kSteps; ++i) {
      SignedStep step[kChunks];
      Unroll<kChunks>([&](auto c) HEADRACE_LAMBDA {
        Prefetch(ahead + (c * kSteps + i) * kVectorBytes);
        step[c] = LoadSigned(v + (c * kSteps + i) * kVectorBytes);
      });
      UnrollPairs<kRows, kChunks>([&](auto r, auto c) HEADRACE_LAMBDA {
        high[r][c] = DotSigned(high[r][c], step[c], p + r * 2 * kTilePositions);
        low[r][c] = DotSigned(low[r][c], step[c], p + (r * 2 + 1) * kTilePositions);
      });
      p += kSplitPanels * 4;
    }
  }
  float* o = at.o + at.chunk * kLanes;
  UnrollPairs<kRows, kChunks>([&](auto r, auto c) HEADRACE_LAMBDA {
    float* to = o + r * o_stride + c * kLanes;
    Store(to, MulAdd(ToFloat(Join(high[r][c], low[r][c])), Broadcast(p_scale[r]), Load(to)));
  });
}

using IntProductFunction = void (*)(const ValueTile& at, const float* p_scale);

template <int kChunks, class Rows>
struct IntProductTable;
template <int kChunks, int... kRows>
struct IntProductTable<kChunks, std::integer_sequence<int, kRows...>> {
  static constexpr IntProductFunction functions[] = {&IntProducts<kRows + 1, kChunks>...};
};

constexpr int kIntValueRows = kBlockRows / 2;

// Digits of panels that a row does not see but another of its block does become 0.
void ClearInvisibleDigits(const BlockRows& block, char* p, const Range* visible) {
  const Range all = Hull(visible, block.count);
  const Range groups = SplitGroups(all);
  for (int r = 0; r < block.count; ++r) {
    const Range seen = SplitGroups(visible[r]);
    if (seen.begin == groups.begin && seen.end == groups.end) continue;
    for (char* half = p + r * 2 * kTilePositions; half < p + (r + 1) * 2 * kTilePositions; half += kTilePositions) {
      memset(half + groups.begin * kSplitPositions, 0, (seen.begin - groups.begin) * kSplitPositions);
      memset(half + seen.end * kSplitPositions, 0, (groups.end - seen.end) * kSplitPositions);
    }
  }
}

void IntValues(const AttentionCall& call, const TilePanels& panels, const BlockRows& block, const float* p_scale,
               Range all) {
  using Rows = std::make_integer_sequence<int, kIntValueRows>;
  const int64_t o_stride = OutputStride(call.layout);
  for (int r = 0; r < block.count; r += kIntValueRows) {
    const int count = block.count - r < kIntValueRows ? block.count - r : kIntValueRows;
    ForEachChunk(call.layout, [&](int64_t chunk, bool is_wide) {
      const ValueTile at = {call, panels, block.p + r * 2 * kTilePositions, block.o + r * o_stride, all, chunk};
      const auto& functions =
          is_wide ? IntProductTable<kWideChunks, Rows>::functions : IntProductTable<1, Rows>::functions;
      functions[count - 1](at, p_scale + r);
    });
  }
}

}  // namespace
}  // namespace HEADRACE_TARGET
}  // namespace headrace
