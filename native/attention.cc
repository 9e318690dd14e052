#include "attention.h"

#include <algorithm>
#include <atomic>
#include <memory>
#include <stdexcept>
#include <string>
#include <vector>

#include "scratch.h"
#include "shared_range.h"
#include "targets.h"
#include "thread_pool.h"

namespace headrace {
namespace {

// Work is counted in rows times positions, where reading keys and values costs as much as kReadingRows rows more.
constexpr int64_t kReadingRows = 8;
// Work below which a second thread costs more than it saves: some microseconds.
constexpr int64_t kMinParallelWork = 4096;
// Pieces for each thread, so that the last ones to end do not leave the others waiting long.
constexpr int64_t kPiecesPerThread = 4;

// A tile of rows, the panels and splits they see and how many pieces these are cut into. With more than one piece, each
// split's partial result goes to partials, and whoever ends the last piece merges them.
struct TileWork {
  RowTile tile;
  Range panels;
  Range splits;
  int64_t cost;
  int num_pieces;
  int64_t partials;  // offset in floats
};

struct Piece {
  int32_t work;
  int32_t index;
};

// What one call computes. Kept by the calling thread, so that lists grow only when a call is larger than all before it.
struct Schedule {
  std::vector<TileWork> works;
  std::vector<Piece> sorted;                       // long ones first
  std::vector<Piece> pieces;                       // the same, in the order of their shares
  std::unique_ptr<std::atomic<int>[]> unfinished;  // pieces of each work
  size_t unfinished_capacity = 0;
  int64_t partial_floats = 0;
};

// How many of a sequence's first positions lie in this cache.
int64_t OwnedPositions(const AttentionCall& call, int64_t seq, int64_t position) {
  if (call.share.owned_blocks == nullptr) return position;
  const int64_t block_size = call.layout.shape.block_size, block = position / block_size, rest = position % block_size;
  const int32_t* owned = call.share.owned_blocks + seq * call.share.owned_stride + block;
  const int64_t before = owned[0] * block_size;
  return rest > 0 && owned[1] > owned[0] ? before + rest : before;
}

// Each block is one of this cache's or is not, and there is a count for each of the context.
void CheckShare(const AttentionCall& call, int64_t seq) {
  const int64_t block_size = call.layout.shape.block_size;
  const int64_t num_blocks = (call.context_lens[seq] + block_size - 1) / block_size;
  bool is_right = num_blocks < call.share.owned_stride;
  const int32_t* owned = call.share.owned_blocks + seq * call.share.owned_stride;
  for (int64_t i = 0; is_right && i <= num_blocks; ++i) {
    is_right = i == 0 ? owned[0] == 0 : owned[i] == owned[i - 1] || owned[i] == owned[i - 1] + 1;
  }
  if (is_right) return;
  throw std::out_of_range("sequence " + std::to_string(seq) + " has a context of " + std::to_string(num_blocks) +
                          " blocks and counts for " + std::to_string(call.share.owned_stride - 1) +
                          "; they begin with 0 and grow by at most 1");
}

void CheckSequence(const AttentionCall& call, int64_t seq) {
  const KvShape& shape = call.layout.shape;
  const int64_t begin = call.cu_seqlens_q[seq], end = call.cu_seqlens_q[seq + 1], length = call.context_lens[seq];
  const bool is_share = call.share.owned_blocks != nullptr;
  if (is_share && length >= 0) CheckShare(call, seq);
  const int64_t num_positions = length < 0 ? 0 : OwnedPositions(call, seq, length);
  const int64_t num_blocks = (num_positions + shape.block_size - 1) / shape.block_size;
  if (begin < 0 || begin > end || end > call.num_tokens || end - begin > length || num_blocks > call.max_blocks_per_seq) {
    throw std::out_of_range("sequence " + std::to_string(seq) + " has rows " + std::to_string(begin) + " to " +
                            std::to_string(end) + " of " + std::to_string(call.num_tokens) + ", a context of " +
                            std::to_string(length) + " and room for " +
                            std::to_string(call.max_blocks_per_seq * shape.block_size));
  }
  // Blocks before the window may have been given back; those are not read.
  const int32_t* table = call.block_tables + seq * call.max_blocks_per_seq;
  const int64_t position = length - (end - begin);
  const int64_t visible = position < call.sliding_window ? 0 : position - call.sliding_window + 1;
  const int64_t first = OwnedPositions(call, seq, visible) / shape.block_size;
  int32_t least = 0, largest = 0;
  for (int64_t i = first; i < num_blocks && begin < end; ++i) {
    least = std::min(least, table[i]);
    largest = std::max(largest, table[i]);
  }
  if (least < 0 || largest >= shape.num_blocks) {
    throw std::out_of_range("sequence " + std::to_string(seq) + " has block " +
                            std::to_string(least < 0 ? least : largest) + " of a cache with " +
                            std::to_string(shape.num_blocks));
  }
}

// The panels of positions [begin, end); none where there are none.
Range PanelsOf(const KvLayout& layout, int64_t begin, int64_t end) {
  return begin < end ? Range{layout.PanelOf(begin), layout.PanelOf(end - 1) + 1} : Range{0, 0};
}

TileWork MakeWork(const AttentionCall& call, const RowTile& tile) {
  const Row first = RowAt(call, tile, tile.rows.begin), last = RowAt(call, tile, tile.rows.end - 1);
  const Range panels = VisiblePanels(call, first, last);
  return {tile, panels, SplitsOf(panels), (last.end - first.begin) * (Size(tile.rows) + kReadingRows), 1, 0};
}

// Gives each of some threads, whose shares lie one behind the other, as many long pieces as the others, in the order of
// the list.
void Deal(const std::vector<Piece>& pieces, int num_threads, std::vector<Piece>& dealt) {
  dealt.resize(pieces.size());
  const Range all = {0, static_cast<int64_t>(pieces.size())};
  size_t next = 0;
  for (int64_t round = 0; next < pieces.size(); ++round) {
    for (int thread = 0; thread < num_threads; ++thread) {
      const Range share = Part(all, thread, num_threads);
      if (round < Size(share)) dealt[static_cast<size_t>(share.begin + round)] = pieces[next++];
    }
  }
}

void CutIntoPieces(const AttentionCall& call, int num_threads, Schedule& schedule) {
  int64_t total = 0;
  for (const TileWork& work : schedule.works) total += work.cost;
  const int64_t target = total / (num_threads * kPiecesPerThread) + 1;
  const int64_t max_pieces = call.max_pieces > 0 ? call.max_pieces : INT32_MAX;
  schedule.partial_floats = 0;
  schedule.sorted.clear();
  for (TileWork& work : schedule.works) {
    const int64_t num_splits = Size(work.splits);
    const int64_t wanted = num_threads > 1 ? (work.cost + target - 1) / target : 1;
    // Rows that see nothing of a share cost nothing, and are written all the same.
    work.num_pieces = static_cast<int>(std::max<int64_t>(1, std::min({num_splits, wanted, max_pieces})));
    if (work.num_pieces == 1) continue;
    work.partials = schedule.partial_floats;
    schedule.partial_floats += num_splits * PartialFloats(call.layout, Size(work.tile.rows));
  }
  // Threads that end with short pieces end together.
  for (const bool is_long : {true, false}) {
    for (size_t i = 0; i < schedule.works.size(); ++i) {
      const TileWork& work = schedule.works[i];
      if ((work.cost / work.num_pieces > target / 2) != is_long) continue;
      for (int index = 0; index < work.num_pieces; ++index) schedule.sorted.push_back({static_cast<int32_t>(i), index});
    }
  }
  Deal(schedule.sorted, num_threads, schedule.pieces);
  if (schedule.works.size() > schedule.unfinished_capacity) {
    schedule.unfinished_capacity = schedule.works.size();
    schedule.unfinished = std::make_unique<std::atomic<int>[]>(schedule.unfinished_capacity);
  }
  for (size_t i = 0; i < schedule.works.size(); ++i) {
    schedule.unfinished[i].store(schedule.works[i].num_pieces, std::memory_order_relaxed);
  }
}

// Pieces have as many tiles as splits allow, which differ in length.
Range SplitsOfPiece(const TileWork& work, int64_t piece) {
  const int64_t first = SplitBegin(work.splits.begin), num_tiles = SplitBegin(work.splits.end) - first;
  const auto boundary = [&](int64_t i) {
    const int64_t tile = first + num_tiles * i / work.num_pieces, split = SplitOf(tile);
    return tile - SplitBegin(split) <= SplitBegin(split + 1) - tile ? split : split + 1;
  };
  return {boundary(piece), boundary(piece + 1)};
}

Upcoming UpcomingAt(const Schedule& schedule, size_t piece) {
  if (piece >= schedule.pieces.size()) return {};
  const TileWork& work = schedule.works[schedule.pieces[piece].work];
  const Range splits = SplitsOfPiece(work, schedule.pieces[piece].index);
  const int64_t begin = SplitBegin(splits.begin) * kTilePanels, end = SplitBegin(splits.end) * kTilePanels;
  return {work.tile.seq, work.tile.kv_head, {std::max(begin, work.panels.begin), std::min(end, work.panels.end)}};
}

void ListWorks(const AttentionCall& call, Schedule& schedule) {
  schedule.works.clear();
  const int64_t group = call.num_heads / call.layout.shape.num_kv_heads;
  for (int64_t seq = 0; seq < call.num_seqs; ++seq) {
    CheckSequence(call, seq);
    const int64_t num_rows = (call.cu_seqlens_q[seq + 1] - call.cu_seqlens_q[seq]) * group;
    // The last rows see the most: they come first.
    for (int64_t end = num_rows; end > 0; end = (end - 1) / kPassRows * kPassRows) {
      TileWork work = MakeWork(call, {seq, 0, {(end - 1) / kPassRows * kPassRows, end}});
      for (; work.tile.kv_head < call.layout.shape.num_kv_heads; ++work.tile.kv_head) schedule.works.push_back(work);
    }
  }
}

}  // namespace

Row RowAt(const AttentionCall& call, const RowTile& tile, int64_t row) {
  const int64_t group = call.num_heads / call.layout.shape.num_kv_heads;
  const int64_t first = call.cu_seqlens_q[tile.seq], num_new = call.cu_seqlens_q[tile.seq + 1] - first;
  const int64_t position = call.context_lens[tile.seq] - num_new + row / group;
  const int64_t visible = position < call.sliding_window ? 0 : position - call.sliding_window + 1;
  const int64_t begin = OwnedPositions(call, tile.seq, visible), end = OwnedPositions(call, tile.seq, position + 1);
  return {first + row / group, tile.kv_head * group + row % group, begin, end, PanelsOf(call.layout, begin, end)};
}

// By positions, which grow from row to row; a row that sees nothing has no panels.
Range VisiblePanels(const AttentionCall& call, const Row& first, const Row& last) {
  return PanelsOf(call.layout, first.begin, last.end);
}

Range SplitsOf(Range panels) {
  const int64_t last = std::max(panels.end - 1, panels.begin);
  return {SplitOf(panels.begin / kTilePanels), SplitOf(last / kTilePanels) + 1};
}

void Attention(Target target, const AttentionCall& call) {
  if (call.num_heads % call.layout.shape.num_kv_heads != 0) {
    throw std::invalid_argument("query heads must be a multiple of KV heads");
  }
  thread_local Schedule schedule;
  thread_local ScratchMemory partial_memory, workspace_memory;
  const AttentionKernels& kernels = HEADRACE_CHOOSE(target, kAttention);
  ListWorks(call, schedule);
  if (schedule.works.empty()) return;
  int64_t total = 0;
  for (const TileWork& work : schedule.works) total += work.cost;
  const std::shared_ptr<ThreadPool> pool = Pool();
  const int num_threads = total < kMinParallelWork ? 1 : pool->num_threads();
  CutIntoPieces(call, num_threads, schedule);
  auto* partials =
      reinterpret_cast<float*>(partial_memory.Get(static_cast<size_t>(schedule.partial_floats) * sizeof(float)));
  const int64_t workspace_bytes = kScratchGapBytes + kernels.workspace_bytes(call);
  char* workspaces = workspace_memory.Get(static_cast<size_t>(num_threads * workspace_bytes));
  SharedRange pieces({0, static_cast<int64_t>(schedule.pieces.size())}, num_threads);
  Schedule& work_list = schedule;  // of this thread, for the others
  const auto attend = [&](int64_t index, char* workspace) {
    const Piece& piece = work_list.pieces[static_cast<size_t>(index)];
    const TileWork& work = work_list.works[static_cast<size_t>(piece.work)];
    const Upcoming upcoming = UpcomingAt(work_list, static_cast<size_t>(index + 1));
    if (work.num_pieces == 1) return kernels.attend(call, work.tile, upcoming, workspace);
    const Range splits = SplitsOfPiece(work, piece.index);
    const int64_t floats = PartialFloats(call.layout, Size(work.tile.rows));
    float* first = partials + work.partials;
    float* mine = first + (splits.begin - work.splits.begin) * floats;
    kernels.attend_splits(call, work.tile, splits, upcoming, mine, workspace);
    if (work_list.unfinished[piece.work].fetch_sub(1, std::memory_order_acq_rel) > 1) return;
    kernels.merge(call, work.tile, first, workspace);
  };
  const auto work_on = [&](int thread) {
    for (Range mine; Size(mine = pieces.Take(thread, 1)) > 0;) {
      attend(mine.begin, workspaces + thread * workspace_bytes);
    }
  };
  if (num_threads == 1) {
    work_on(0);
  } else {
    pool->Run(work_on);
  }
}

}  // namespace headrace
