// The attention kernels of one target. Compiled once for each, with that target's flags.
#include "attention.h"

#include <algorithm>
#include <cmath>

#include "simd/simd-inl.h"

#include "exp2-inl.h"

#include "unroll-inl.h"

#include "attention_tiles-inl.h"

#include "attention_rows-inl.h"

#include "attention_panels-inl.h"

#include "attention_scores-inl.h"

#include "attention_scores_tiles-inl.h"

#include "attention_softmax-inl.h"

#include "attention_probabilities-inl.h"

#include "attention_values-inl.h"

#include "attention_int_values-inl.h"

#include "attention_values_tiles-inl.h"

#include "attention_int_values_tiles-inl.h"

#include "attention_products-inl.h"

#include "attention_merge-inl.h"

namespace headrace {
namespace HEADRACE_TARGET {
namespace {

// Rows that all see something of one tile: scores, probabilities, products. first and count: of the workspace's rows.
void AttendSeeing(const AttentionCall& call, const Workspace& w, TilePanels& panels, int first, int count,
                  BlockTiles& tiles) {
  Range visible[kMaxBlockRows];
  for (int r = 0; r < count; ++r) visible[r] = VisiblePanels(panels, w.rows[first + r]);
  panels.is_fetch_spread = UsesTiles(call.layout.shape.format, count);
  if (panels.is_fetch_spread) tiles.SetRows(count);
  ComputeScores(call, w, panels, first, count, Hull(visible, count));
  const KvLayout& layout = call.layout;
  const int64_t p_bytes = ProbabilityBytes(layout.shape.format), o_stride = OutputStride(layout);
  for (int r = 0; r < count;) {
    int end = r + 1;
    while (end < count && visible[end].begin == visible[r].begin && visible[end].end == visible[r].end) ++end;
    const int i = first + r;
    ComputeProbabilities(call, panels,
                         {w.t + r * kTilePositions, w.p + r * p_bytes, w.p_scale + r, p_bytes, visible[r], w.rows + i,
                          w.split.m + i, w.split.sum + i * kLanes, w.split.o + i * o_stride, o_stride, end - r});
    r = end;
  }
  MultiplyValues(call, w, panels, first, count, visible);
}

// One block of rows over one tile. Those that see nothing of it lie before or behind the others, or, where a window
// leaves a share of the context, between them.
void AttendBlock(const AttentionCall& call, const Workspace& w, TilePanels& panels, int first, int count,
                 BlockTiles& tiles) {
  const auto sees = [&](int i) { return VisiblePanels(panels, w.rows[i]).end > 0; };
  for (int i = first; i < first + count; ++i) {
    if (!sees(i)) continue;
    const int begin = i;
    while (i + 1 < first + count && sees(i + 1)) ++i;
    AttendSeeing(call, w, panels, begin, i + 1 - begin, tiles);
  }
}

float FirstReference(const AttentionCall& call) {
  return call.scheme == SoftmaxScheme::kAsynchronized ? call.unified_max.value : -kInfinity;
}

// All rows over the tiles of one split, into w.split.
void AttendSplit(const AttentionCall& call, const RowTile& tile, const Workspace& w, int64_t split,
                 TileReader& reader, BlockTiles& tiles) {
  const int num_rows = static_cast<int>(tile.rows.end - tile.rows.begin);
  const int block_rows = BlockRowsOf(call.layout.shape.format);
  for (int i = 0; i < num_rows; ++i) w.split.m[i] = FirstReference(call);
  memset(w.split.sum, 0, num_rows * kLanes * sizeof(float));
  memset(w.split.o, 0, num_rows * OutputStride(call.layout) * sizeof(float));
  for (int64_t t = SplitBegin(split); t < SplitBegin(split + 1) && t * kTilePanels < reader.visible_end(); ++t) {
    TilePanels& panels = reader.Read(t);
    for (int first = 0; first < num_rows; first += block_rows) {
      AttendBlock(call, w, panels, first, std::min(num_rows - first, block_rows), tiles);
      panels.is_next_fetched = true;
    }
  }
}

void StoreAs(float* to, const F32x16& a) { Store(to, a); }
void StoreAs(uint16_t* to, const F32x16& a) { StoreBf16(to, a); }

template <class Out>
void WriteRow(const float* o, float sum, int64_t head_dim, Out* out) {
  const F32x16 inverse = Broadcast(1.0f / sum);
  for (int64_t d = 0; d < head_dim; d += kLanes) {
    const F32x16 normalized = Mul(Load(o + d), inverse);
    if (d + kLanes <= head_dim) {
      StoreAs(out + d, normalized);
    } else {
      Out lanes[kLanes];
      StoreAs(lanes, normalized);
      memcpy(out + d, lanes, (head_dim - d) * sizeof(Out));
    }
  }
}

// The largest sum whose inverse is a normal number; and of a share, so that those of 2^16 ranks add up to one.
constexpr float kLargestSum = 0x1p126f;
constexpr float kLargestShareSum = 0x1p110f;

bool IsShare(const AttentionCall& call) { return call.share.owned_blocks != nullptr; }

// A row's result over a share of its context. Where a rank's share is sound by the bounds of a whole row, so is what all
// shares add up to: bounds below grow with the number of keys, and those above are far enough off.
void WriteShare(const AttentionCall& call, const Workspace& w, int i) {
  const Row& row = w.rows[i];
  const int64_t head_dim = call.layout.shape.head_dim, index = row.token * call.num_heads + row.head;
  const bool is_empty = row.begin == row.end;
  float* o = call.share.numerators + index * head_dim;
  if (is_empty) {
    memset(o, 0, head_dim * sizeof(float));
  } else {
    memcpy(o, w.total.o + i * OutputStride(call.layout), head_dim * sizeof(float));
  }
  const float m = call.scheme == SoftmaxScheme::kAsynchronized ? call.unified_max.value : w.total.m[i];
  call.share.normalizers[2 * index] = is_empty ? 0.0f : w.total.sum[i];
  call.share.normalizers[2 * index + 1] = is_empty ? -kInfinity : m;
}

// See UnifiedMax. Infinity and NaN times 0 are NaN, which no sum loses.
bool IsSound(const AttentionCall& call, const Workspace& w, int i) {
  const int64_t o_stride = OutputStride(call.layout);
  const float sum = w.total.sum[i];
  F32x16 zero = Mul(Broadcast(w.total.m[i]), Broadcast(0.0f));
  for (int64_t d = 0; d < call.layout.shape.head_dim; d += kLanes) {
    zero = MulAdd(Load(w.total.o + i * o_stride + d), Broadcast(0.0f), zero);
  }
  const float smallest = call.layout.shape.format == Format::kInt8 ? 0x1p-64f : 0x1p-102f;
  const auto num_keys = static_cast<float>(w.rows[i].end - w.rows[i].begin);
  const float largest = IsShare(call) ? kLargestShareSum : kLargestSum;
  return SumLanes(zero) == 0 && sum >= num_keys * smallest && sum <= largest;
}

void Attend(const AttentionCall& call, const RowTile& tile, const Upcoming& upcoming, const Workspace& w);

// Divides and writes every row, or writes a share undivided; those that the unified maximum did not suit are computed again.
void Finish(const AttentionCall& call, const RowTile& tile, const Workspace& w) {
  const int num_rows = static_cast<int>(tile.rows.end - tile.rows.begin);
  const bool is_checked = call.scheme == SoftmaxScheme::kAsynchronized;
  bool is_unsound[kPassRows] = {};
  int64_t num_unsound = 0;
  for (int i = 0; i < num_rows; ++i) {
    is_unsound[i] = is_checked && w.rows[i].begin < w.rows[i].end && !IsSound(call, w, i);
    num_unsound += is_unsound[i];
    if (is_unsound[i]) continue;
    if (IsShare(call)) {
      WriteShare(call, w, i);
      continue;
    }
    const int64_t head_dim = call.layout.shape.head_dim;
    const int64_t offset = (w.rows[i].token * call.num_heads + w.rows[i].head) * head_dim;
    const float* o = w.total.o + i * OutputStride(call.layout);
    if (call.dtype == DType::kFloat32) {
      WriteRow(o, w.total.sum[i], head_dim, static_cast<float*>(call.out) + offset);
    } else {
      WriteRow(o, w.total.sum[i], head_dim, static_cast<uint16_t*>(call.out) + offset);
    }
  }
  if (is_checked) {
    call.counters->rows.fetch_add(num_rows, std::memory_order_relaxed);
    call.counters->recomputed_rows.fetch_add(num_unsound, std::memory_order_relaxed);
  }
  AttentionCall again = call;
  again.scheme = SoftmaxScheme::kSynchronized;
  for (int i = 0; i < num_rows && num_unsound > 0; ++i) {
    const int64_t row = tile.rows.begin + i;
    if (is_unsound[i]) Attend(again, {tile.seq, tile.kv_head, {row, row + 1}}, {}, w);
  }
}

void Attend(const AttentionCall& call, const RowTile& tile, const Upcoming& upcoming, const Workspace& w) {
  PrepareRows(call, tile, w);
  bool is_merged[kPassRows] = {};
  std::fill_n(w.total.m, tile.rows.end - tile.rows.begin, -kInfinity);
  const Range panels = VisiblePanels(call, w.rows[0], w.rows[Size(tile.rows) - 1]), splits = SplitsOf(panels);
  TileReader reader(call, tile, panels.end, panels.end, upcoming);
  BlockTiles tiles;
  for (int64_t split = splits.begin; split < splits.end; ++split) {
    AttendSplit(call, tile, w, split, reader, tiles);
    float sums[kPassRows];
    SumRows(w, tile.rows.end - tile.rows.begin, sums);
    MergeSplit(call, tile, w, split, w.split.m, sums, w.split.o, is_merged);
  }
  Finish(call, tile, w);
}

Workspace WorkspaceIn(const AttentionCall& call, char* memory) {
  Cutter cutter(memory);
  return CutWorkspace(call.layout, cutter);
}

void AttendRows(const AttentionCall& call, const RowTile& tile, const Upcoming& upcoming, char* workspace) {
  Attend(call, tile, upcoming, WorkspaceIn(call, workspace));
}

void AttendSplits(const AttentionCall& call, const RowTile& tile, Range splits, const Upcoming& upcoming,
                  float* partials, char* workspace) {
  const Workspace w = WorkspaceIn(call, workspace);
  PrepareRows(call, tile, w);
  const int64_t num_rows = tile.rows.end - tile.rows.begin, o_stride = OutputStride(call.layout);
  const int64_t visible = VisiblePanels(call, w.rows[0], w.rows[num_rows - 1]).end;
  const int64_t mine = SplitBegin(splits.end) * kTilePanels;
  TileReader reader(call, tile, visible, mine < visible ? mine : visible, upcoming);
  BlockTiles tiles;
  for (int64_t split = splits.begin; split < splits.end; ++split, partials += PartialFloats(call.layout, num_rows)) {
    AttendSplit(call, tile, w, split, reader, tiles);
    SumRows(w, num_rows, partials + num_rows);
    memcpy(partials, w.split.m, num_rows * sizeof(float));
    memcpy(partials + 2 * num_rows, w.split.o, num_rows * o_stride * sizeof(float));
  }
}

void Merge(const AttentionCall& call, const RowTile& tile, const float* partials, char* workspace) {
  const Workspace w = WorkspaceIn(call, workspace);
  const int64_t num_rows = tile.rows.end - tile.rows.begin;
  bool is_merged[kPassRows] = {};
  std::fill_n(w.total.m, num_rows, -kInfinity);
  FindRows(call, tile, w);
  const Range splits = SplitsOf(VisiblePanels(call, w.rows[0], w.rows[num_rows - 1]));
  for (int64_t split = splits.begin; split < splits.end; ++split, partials += PartialFloats(call.layout, num_rows)) {
    MergeSplit(call, tile, w, split, partials, partials + num_rows, partials + 2 * num_rows, is_merged);
  }
  Finish(call, tile, w);
}

}  // namespace

extern const AttentionKernels kAttention;
const AttentionKernels kAttention = {&WorkspaceBytes, &AttendRows, &AttendSplits, &Merge};

}  // namespace HEADRACE_TARGET
}  // namespace headrace
