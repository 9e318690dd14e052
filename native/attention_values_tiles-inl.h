// o += p V of bfloat16 in tiles.
//
// An output's chain goes over the panels that any row of its block sees, one product of tiles for each. To a product a
// position contributes nothing if its p and its value are 0, which is what becomes of those that a row does not see: so
// a row's bits are those of a chain over what it sees. Where p alone is 0, the value must be finite.

#ifdef __AMX_TILE__

namespace headrace {
namespace HEADRACE_TARGET {
namespace {

constexpr int kChunkBytes = kHalfVectors * kVectorBytes;
constexpr int64_t kProbabilityRowBytes = kTilePositions * static_cast<int64_t>(sizeof(Bf16X));
constexpr int64_t kProbabilityPanelBytes = kPanelPositions * static_cast<int64_t>(sizeof(Bf16X));

template <int kChunks>
inline void LoadOutputs(const float* o, int64_t row_bytes) {
  Unroll<kChunks>([&](auto c) HEADRACE_LAMBDA { LoadTile<c>(o + c * kLanes, row_bytes); });
}
template <int kChunks>
inline void StoreOutputs(float* o, int64_t row_bytes) {
  Unroll<kChunks>([&](auto c) HEADRACE_LAMBDA { StoreTile<c>(o + c * kLanes, row_bytes); });
}

// A panel's values, as in the cache, times its p; prefetch(c): called ahead of chunk c.
template <int kChunks, class PrefetchChunk>
inline void MultiplyPanel(const char* p, const uint8_t* v, const PrefetchChunk& prefetch) {
  LoadTile<kHalfA>(p, kProbabilityRowBytes);
  Unroll<kChunks>([&](auto c) HEADRACE_LAMBDA {
    prefetch(c);
    LoadTile<kHalfB>(v + c * kChunkBytes, kVectorBytes);
    Bf16Dot::Run<c, kHalfA, kHalfB>();
  });
}

template <int kChunks>
void TileProducts(const ValueTile& at) {
  const int64_t row_bytes = OutputStride(at.call.layout) * static_cast<int64_t>(sizeof(float));
  const int64_t offset = at.call.layout.value_offset + at.chunk * kChunkBytes;
  float* o = at.o + at.chunk * kLanes;
  LoadOutputs<kChunks>(o, row_bytes);
  for (int64_t panel = at.range.begin; panel < at.range.end; ++panel) {
    const auto prefetch = [&](int64_t c) HEADRACE_LAMBDA {
      at.panels.PrefetchForValues<kHalfVectors>(panel, (at.chunk + c) * kHalfVectors);
    };
    MultiplyPanel<kChunks>(at.p + panel * kProbabilityPanelBytes, at.panels.address[panel] + offset, prefetch);
  }
  StoreOutputs<kChunks>(o, row_bytes);
}

// A chunk of a panel with 0 in place of what lies outside the lanes, and whether what is left is finite.
bool CopySeen(const uint8_t* from, Lanes lanes, uint8_t* to) {
  using Pairs = uint32_t __attribute__((vector_size(kVectorBytes)));
  constexpr uint32_t kExponents = 0x7f807f80, kOnes = 0x00800080, kSigns = 0x80008000;  // where exponents of ones carry
  Pairs carries = {};
  for (int i = 0; i < kHalfVectors; ++i) {
    const bool has_first = 2 * i >= lanes.begin && 2 * i < lanes.end;
    const bool has_second = 2 * i + 1 >= lanes.begin && 2 * i + 1 < lanes.end;
    const uint32_t mask = (has_first ? 0x0000ffff : 0) | (has_second ? 0xffff0000 : 0);
    Pairs pairs;
    memcpy(&pairs, from + i * kVectorBytes, sizeof pairs);
    pairs &= mask;
    carries |= (pairs & kExponents) + kOnes;
    memcpy(to + i * kVectorBytes, &pairs, sizeof pairs);
  }
  uint32_t all = 0;
  for (int i = 0; i < kLanes; ++i) all |= carries[i];
  return (all & kSigns) == 0;
}

// Calls visit(begin, end, lanes) for each run of rows that see the same lanes of a panel.
template <class Visit>
void ForEachRun(const TilePanels& panels, int64_t panel, const Row* rows, int count, const Visit& visit) {
  for (int r = 0; r < count;) {
    int end = r + 1;
    while (end < count && rows[end].end == rows[r].end && rows[end].begin == rows[r].begin) ++end;
    visit(r, end, VisibleLanes(panels, panel, rows[r]));
    r = end;
  }
}

// One panel, at.range.begin, of which not all rows see all. Where a value is not finite, rows that see the same are
// multiplied apart.
template <int kChunks>
void PartialTileProducts(const ValueTile& at, const Row* rows, int count) {
  const int64_t panel = at.range.begin, row_bytes = OutputStride(at.call.layout) * static_cast<int64_t>(sizeof(float));
  const uint8_t* v = at.panels.address[panel] + at.call.layout.value_offset + at.chunk * kChunkBytes;
  const char* p = at.p + panel * kProbabilityPanelBytes;
  float* o = at.o + at.chunk * kLanes;
  alignas(64) uint8_t seen[kChunks * kChunkBytes];
  const auto copy = [&](Lanes lanes) {
    bool is_finite = true;
    for (int c = 0; c < kChunks; ++c) is_finite &= CopySeen(v + c * kChunkBytes, lanes, seen + c * kChunkBytes);
    return is_finite;
  };
  Lanes all = {kPanelPositions, 0};
  ForEachRun(at.panels, panel, rows, count, [&](int, int, Lanes lanes) {
    if (lanes.begin >= lanes.end) return;
    all = {lanes.begin < all.begin ? lanes.begin : all.begin, lanes.end > all.end ? lanes.end : all.end};
  });
  if (copy(all)) {
    LoadOutputs<kChunks>(o, row_bytes);
    MultiplyPanel<kChunks>(p, seen, [](int64_t) {});
    StoreOutputs<kChunks>(o, row_bytes);
    return;
  }
  ForEachRun(at.panels, panel, rows, count, [&](int begin, int end, Lanes lanes) {
    copy(lanes);
    LoadOutputs<kChunks>(o, row_bytes);
    MultiplyPanel<kChunks>(p, seen, [](int64_t) {});
    alignas(64) float products[kTileRows][kChunks * kLanes];
    StoreOutputs<kChunks>(products[0], sizeof products[0]);
    for (int r = begin; r < end; ++r) memcpy(o + r * (row_bytes / sizeof(float)), products[r], sizeof products[r]);
  });
}

struct TileProductFunctions {
  ProductFunction whole;
  void (*partial)(const ValueTile& at, const Row* rows, int count);
};
template <int kChunks>
constexpr TileProductFunctions kTileProducts = {&TileProducts<kChunks>, &PartialTileProducts<kChunks>};

// Calls product(functions, chunk) for all chunks of head_dim.
template <class Product>
void ForEachTileChunk(const KvLayout& layout, const Product& product) {
  constexpr TileProductFunctions functions[] = {kTileProducts<1>, kTileProducts<2>, kTileProducts<3>, kTileProducts<4>};
  static_assert(std::size(functions) == kChains);
  for (int64_t chunk = 0; chunk < layout.value_chunks; chunk += kChains) {
    const int64_t rest = layout.value_chunks - chunk;
    product(functions[(rest < kChains ? rest : kChains) - 1], chunk);
  }
}

// p of the panels of a range that a row does not see becomes 0.
void ClearInvisible(char* p, Range visible, Range range) {
  memset(p + range.begin * kProbabilityPanelBytes, 0, (visible.begin - range.begin) * kProbabilityPanelBytes);
  memset(p + visible.end * kProbabilityPanelBytes, 0, (range.end - visible.end) * kProbabilityPanelBytes);
}

// visible: the panels that each row of the block sees, one or more.
void TileValues(const AttentionCall& call, const TilePanels& panels, const BlockRows& block, char* p, const Row* rows,
                const Range* visible) {
  const Range all = Hull(visible, block.count);
  Range common = {0, kTilePanels};
  for (int r = 0; r < block.count; ++r) {
    const Range full = FullPanels(panels, rows[r], visible[r]);
    common = {full.begin > common.begin ? full.begin : common.begin, full.end < common.end ? full.end : common.end};
  }
  if (common.begin >= common.end) common = {all.end, all.end};
  for (int r = 0; r < block.count; ++r) ClearInvisible(p + r * kProbabilityRowBytes, visible[r], all);
  const auto multiply_partial = [&](int64_t begin, int64_t end) {
    for (int64_t panel = begin; panel < end; ++panel) {
      ForEachTileChunk(call.layout, [&](const TileProductFunctions& functions, int64_t chunk) {
        functions.partial({call, panels, p, block.o, {panel, panel + 1}, chunk}, rows, block.count);
      });
    }
  };
  multiply_partial(all.begin, common.begin);
  if (common.begin < common.end) {
    ForEachTileChunk(call.layout, [&](const TileProductFunctions& functions, int64_t chunk) {
      functions.whole({call, panels, p, block.o, common, chunk});
    });
  }
  multiply_partial(common.end, all.end);
}

}  // namespace
}  // namespace HEADRACE_TARGET
}  // namespace headrace

#endif
