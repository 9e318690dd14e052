// o += p V for a block of rows and the panels of a tile.
//
// A tile of the product is kRows rows of p times kChunks chunks of 16 entries of head_dim; lanes are head_dim. An
// output is one chain over the positions a row sees, ascending, however rows are put together: panels that all rows of
// a block see whole are walked for all at once; those before and after them, for the rows that see the same of them.
// Positions that are not seen are no step of the chain: what lies there may be anything, NaN too.

namespace headrace {
namespace HEADRACE_TARGET {
namespace {

struct Float32Values {
  using X = float;
  static constexpr int kPositions = VectorColumns(Format::kFloat32);
  using Step = F32x16;
  static Step LoadStep(const uint8_t* from) { return Load(reinterpret_cast<const float*>(from)); }
  static Step LoadStep(const uint8_t* from, int, Lanes) { return LoadStep(from); }
  static F32x16 MulAddStep(const F32x16& acc, const Step& v, const X* p) { return MulAdd(v, Broadcast(*p), acc); }
};

struct Bfloat16Values {
  using X = Bf16X;
  static constexpr int kPositions = VectorColumns(Format::kBfloat16);
  using Step = Bf16Step;
  static Step LoadStep(const uint8_t* from) { return LoadBf16(from); }
  // Two positions, of which those outside the lanes become 0.
  static Step LoadStep(const uint8_t* from, int position, Lanes lanes) {
    const uint32_t first = position < lanes.begin ? 0 : 0x0000ffff, second = position + 1 < lanes.end ? 0xffff0000 : 0;
    return LoadBf16Masked(from, first | second);
  }
  static F32x16 MulAddStep(const F32x16& acc, const Step& v, const X* p) { return MulAddBf16(acc, v, p); }
};

// kRows rows from `row` of a block on; panels of the range, chunks from `chunk` on.
struct ValueTile {
  const AttentionCall& call;
  const TilePanels& panels;
  const char* p;  // of the first row
  float* o;
  Range range;
  int64_t chunk;
};

template <class Values, int kRows, int kChunks>
void FloatProducts(const ValueTile& at) {
  using X = typename Values::X;
  constexpr int kSteps = kPanelPositions / Values::kPositions;
  const int64_t o_stride = OutputStride(at.call.layout);
  const int64_t offset = at.call.layout.value_offset + at.chunk * kSteps * kVectorBytes;
  float* o = at.o + at.chunk * kLanes;
  F32x16 acc[kRows][kChunks];
  UnrollPairs<kRows, kChunks>(
      [&](auto r, auto c) HEADRACE_LAMBDA { acc[r][c] = Load(o + r * o_stride + c * kLanes); });
  const X* p = reinterpret_cast<const X*>(at.p) + at.range.begin * kPanelPositions;
  const uint8_t* const* end = at.panels.address + at.range.end;
  const uint8_t* const* next = at.panels.next + at.range.begin;
  for (const uint8_t* const* panel = at.panels.address + at.range.begin; panel < end; ++panel) {
    const uint8_t* v = *panel + offset;
    const uint8_t* ahead = *next++ + offset;
    for (int i = 0; i < kSteps; ++i) {
      typename Values::Step step[kChunks];
      Unroll<kChunks>([&](auto c) HEADRACE_LAMBDA {
        Prefetch(ahead + (c * kSteps + i) * kVectorBytes);
        step[c] = Values::LoadStep(v + (c * kSteps + i) * kVectorBytes);
      });
      UnrollPairs<kRows, kChunks>([&](auto r, auto c) HEADRACE_LAMBDA {
        acc[r][c] = Values::MulAddStep(acc[r][c], step[c], p + r * kTilePositions);
      });
      p += Values::kPositions;
    }
  }
  UnrollPairs<kRows, kChunks>(
      [&](auto r, auto c) HEADRACE_LAMBDA { Store(o + r * o_stride + c * kLanes, acc[r][c]); });
}

// Some lanes of one panel, at.range.begin.
template <class Values, int kRows, int kChunks>
void FloatProductsOf(const ValueTile& at, Lanes lanes) {
  using X = typename Values::X;
  constexpr int kSteps = kPanelPositions / Values::kPositions;
  const int64_t o_stride = OutputStride(at.call.layout);
  const uint8_t* v = at.panels.address[at.range.begin] + at.call.layout.value_offset;
  v += at.chunk * kSteps * kVectorBytes;
  const X* p = reinterpret_cast<const X*>(at.p) + at.range.begin * kPanelPositions;
  float* o = at.o + at.chunk * kLanes;
  F32x16 acc[kRows][kChunks];
  UnrollPairs<kRows, kChunks>(
      [&](auto r, auto c) HEADRACE_LAMBDA { acc[r][c] = Load(o + r * o_stride + c * kLanes); });
  for (int i = lanes.begin / Values::kPositions; i * Values::kPositions < lanes.end; ++i) {
    typename Values::Step step[kChunks];
    Unroll<kChunks>([&](auto c) HEADRACE_LAMBDA {
      step[c] = Values::LoadStep(v + (c * kSteps + i) * kVectorBytes, i * Values::kPositions, lanes);
    });
    UnrollPairs<kRows, kChunks>([&](auto r, auto c) HEADRACE_LAMBDA {
      acc[r][c] = Values::MulAddStep(acc[r][c], step[c], p + r * kTilePositions + i * Values::kPositions);
    });
  }
  UnrollPairs<kRows, kChunks>(
      [&](auto r, auto c) HEADRACE_LAMBDA { Store(o + r * o_stride + c * kLanes, acc[r][c]); });
}

using ProductFunction = void (*)(const ValueTile& at);
using PartialProductFunction = void (*)(const ValueTile& at, Lanes lanes);

template <class Values, int kChunks, class Rows>
struct FloatProductTable;
template <class Values, int kChunks, int... kRows>
struct FloatProductTable<Values, kChunks, std::integer_sequence<int, kRows...>> {
  static constexpr ProductFunction whole[] = {&FloatProducts<Values, kRows + 1, kChunks>...};
  static constexpr PartialProductFunction partial[] = {&FloatProductsOf<Values, kRows + 1, kChunks>...};
};

constexpr int kWideChunks = 2;

// Calls product(chunk, is_wide) for all chunks of head_dim.
template <class Product>
void ForEachChunk(const KvLayout& layout, const Product& product) {
  for (int64_t chunk = 0; chunk < layout.value_chunks;) {
    const bool is_wide = chunk + kWideChunks <= layout.value_chunks;
    product(chunk, is_wide);
    chunk += is_wide ? kWideChunks : 1;
  }
}

// Rows [first, first + count) of a block, and where their p and o lie.
struct BlockRows {
  const char* p;
  float* o;
  int count;
};

// Panels that come one after another through memory before the next chunks of head_dim are computed from them.
constexpr int64_t kPanelsAtOnce = 4;

template <class Values>
void WholePanels(const AttentionCall& call, const TilePanels& panels, const BlockRows& rows, Range range) {
  using Rows = std::make_integer_sequence<int, kBlockRows>;
  using Wide = FloatProductTable<Values, kWideChunks, Rows>;
  using Narrow = FloatProductTable<Values, 1, Rows>;
  for (int64_t begin = range.begin; begin < range.end; begin += kPanelsAtOnce) {
    const int64_t end = begin + kPanelsAtOnce < range.end ? begin + kPanelsAtOnce : range.end;
    ForEachChunk(call.layout, [&](int64_t chunk, bool is_wide) {
      (is_wide ? Wide::whole : Narrow::whole)[rows.count - 1]({call, panels, rows.p, rows.o, {begin, end}, chunk});
    });
  }
}

template <class Values>
void PartialPanel(const AttentionCall& call, const TilePanels& panels, const BlockRows& rows, int64_t panel,
                  Lanes lanes) {
  using Rows = std::make_integer_sequence<int, kBlockRows>;
  using Wide = FloatProductTable<Values, kWideChunks, Rows>;
  using Narrow = FloatProductTable<Values, 1, Rows>;
  ForEachChunk(call.layout, [&](int64_t chunk, bool is_wide) {
    const ValueTile at = {call, panels, rows.p, rows.o, {panel, panel + 1}, chunk};
    (is_wide ? Wide::partial : Narrow::partial)[rows.count - 1](at, lanes);
  });
}

// Panels of the range for rows that see the same of them.
template <class Values>
void AlikePanels(const AttentionCall& call, const TilePanels& panels, const BlockRows& rows, const Row& row,
                 Range range) {
  int64_t begin = range.begin;  // of whole panels not yet computed
  for (int64_t panel = range.begin; panel < range.end; ++panel) {
    const Lanes lanes = VisibleLanes(panels, panel, row);
    if (lanes.IsFull()) continue;
    WholePanels<Values>(call, panels, rows, {begin, panel});
    PartialPanel<Values>(call, panels, rows, panel, lanes);
    begin = panel + 1;
  }
  WholePanels<Values>(call, panels, rows, {begin, range.end});
}

// visible: the panels that each row of the block sees, one or more.
template <class Values>
void FloatValues(const AttentionCall& call, const TilePanels& panels, const BlockRows& block, const Row* rows,
                 const Range* visible) {
  Range common = {0, kTilePanels};
  for (int r = 0; r < block.count; ++r) {
    const Range full = FullPanels(panels, rows[r], visible[r]);
    if (full.begin > common.begin) common.begin = full.begin;
    if (full.end < common.end) common.end = full.end;
  }
  const int64_t p_bytes = ProbabilityBytes(call.layout.shape.format);
  const int64_t o_stride = OutputStride(call.layout);
  // Calls compute(rows, row, visible) for each run of rows that see the same: those of one token.
  const auto for_each_run = [&](const auto& compute) {
    for (int r = 0; r < block.count;) {
      int end = r + 1;
      while (end < block.count && rows[end].end == rows[r].end && rows[end].begin == rows[r].begin) ++end;
      compute(BlockRows{block.p + r * p_bytes, block.o + r * o_stride, end - r}, rows[r], visible[r]);
      r = end;
    }
  };
  if (common.begin >= common.end) {
    for_each_run([&](const BlockRows& run, const Row& row, Range seen) {
      AlikePanels<Values>(call, panels, run, row, seen);
    });
    return;
  }
  for_each_run([&](const BlockRows& run, const Row& row, Range seen) {
    AlikePanels<Values>(call, panels, run, row, {seen.begin, common.begin});
  });
  WholePanels<Values>(call, panels, block, common);
  for_each_run([&](const BlockRows& run, const Row& row, Range seen) {
    AlikePanels<Values>(call, panels, run, row, {common.end, seen.end});
  });
}

}  // namespace
}  // namespace HEADRACE_TARGET
}  // namespace headrace
