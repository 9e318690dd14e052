// o += p_scale (p V) of int8 in tiles: as IntProducts, and with the same result.
//
// Four panels at a time make a tile: their vectors of values are copied into the order in which p's digits lie
// (StoreSplit), that of vectors first and panels second.

#ifdef __AMX_TILE__

namespace headrace {
namespace HEADRACE_TARGET {
namespace {

constexpr int kDigits = 2;
constexpr int kIntChunks = kChains / kDigits;
constexpr int kIntSteps = kPanelPositions / VectorColumns(Format::kInt8);
static_assert(kIntSteps * kSplitPanels == kTileRows);

// The products of a block of rows with some chunks of head_dim, digit by digit.
struct alignas(64) IntSums {
  int32_t of[kIntChunks][kDigits][kTileRows][kLanes];
};

// A chunk's values of the panels of a group, of which those outside the range, whose p is 0, stand for anything.
inline void GatherValues(const TilePanels& panels, int64_t group, int64_t chunk, uint8_t* to) {
  const uint8_t* const* address = panels.address + group * kSplitPanels;
  const int64_t offset = panels.layout->value_offset + chunk * kIntSteps * kVectorBytes;
  Unroll<kSplitPanels>([&](auto j) HEADRACE_LAMBDA {
    panels.PrefetchForValues<kIntSteps>(group * kSplitPanels + j, chunk * kIntSteps);
    Unroll<kIntSteps>([&](auto i) HEADRACE_LAMBDA {
      memcpy(to + (i * kSplitPanels + j) * kVectorBytes, address[j] + offset + i * kVectorBytes, kVectorBytes);
    });
  });
}

// The values of a group are gathered between the products of the group before it: a tile cannot be loaded from what is
// still being stored.
template <int kChunks>
void TileIntProducts(const ValueTile& at, IntSums& sums) {
  alignas(64) uint8_t values[2][kChunks][kTileBytes];
  const auto gather = [&](int64_t group, auto c) HEADRACE_LAMBDA {
    if (group < at.range.end) GatherValues(at.panels, group, at.chunk + c, values[group % 2][c]);
  };
  Unroll<kChunks * kDigits>([&](auto c) HEADRACE_LAMBDA { ZeroTile<c>(); });
  Unroll<kChunks>([&](auto c) HEADRACE_LAMBDA { gather(at.range.begin, c); });
  for (int64_t group = at.range.begin; group < at.range.end; ++group) {
    const char* p = at.p + group * kSplitPositions;
    Unroll<kChunks>([&](auto c) HEADRACE_LAMBDA {
      gather(group + 1, c);
      LoadTile<kWideB>(values[group % 2][c], kVectorBytes);
      Unroll<kDigits>([&](auto digit) HEADRACE_LAMBDA {
        LoadTile<kWideA>(p + digit * kTilePositions, kDigits * kTilePositions);
        UnsignedSignedDot::Run<c * kDigits + digit, kWideA, kWideB>();
      });
    });
  }
  Unroll<kChunks * kDigits>([&](auto c) HEADRACE_LAMBDA {
    StoreTile<c>(sums.of[c / kDigits][c % kDigits], kLanes * static_cast<int64_t>(sizeof(int32_t)));
  });
}

void AddIntProducts(const IntSums& sums, int chunks, int num_rows, const float* p_scale, int64_t o_stride, float* o) {
  for (int r = 0; r < num_rows; ++r, o += o_stride) {
    for (int c = 0; c < chunks; ++c) {
      const F32x16 product = ToFloat(Join(LoadInts(sums.of[c][0][r]), LoadInts(sums.of[c][1][r])));
      Store(o + c * kLanes, MulAdd(product, Broadcast(p_scale[r]), Load(o + c * kLanes)));
    }
  }
}

// groups: of kSplitPanels panels. Sums are read when those of the next chunks have been stored: reading a tile just
// stored takes long.
void TileIntValues(const AttentionCall& call, const TilePanels& panels, const BlockRows& block, const float* p_scale,
                   Range groups) {
  const int64_t num_chunks = call.layout.value_chunks, o_stride = OutputStride(call.layout);
  const auto chunks_at = [&](int64_t chunk) {
    return static_cast<int>(num_chunks - chunk < kIntChunks ? num_chunks - chunk : kIntChunks);
  };
  IntSums sums[2];
  const auto add = [&](int64_t chunk) {
    AddIntProducts(sums[chunk / kIntChunks % 2], chunks_at(chunk), block.count, p_scale, o_stride,
                   block.o + chunk * kLanes);
  };
  constexpr auto kLast = kIntChunks;
  for (int64_t chunk = 0; chunk < num_chunks; chunk += kIntChunks) {
    const ValueTile at = {call, panels, block.p, block.o, groups, chunk};
    (chunks_at(chunk) == kLast ? &TileIntProducts<kLast> : &TileIntProducts<1>)(at, sums[chunk / kIntChunks % 2]);
    if (chunk > 0) add(chunk - kIntChunks);
  }
  add((num_chunks - 1) / kIntChunks * kIntChunks);
}

}  // namespace
}  // namespace HEADRACE_TARGET
}  // namespace headrace

#endif
