// The panels of one tile, found through the block table.

namespace headrace {
namespace HEADRACE_TARGET {
namespace {

// keys and values point to the first vector. While a panel is read, that of the next tile, or of what comes after it, is
// fetched: `next`, or the panel itself where nothing follows. Blocks lie in any order, which no hardware foresees, and a
// tile fits the second-level cache twice.
struct TilePanels {
  int64_t first;  // of the sequence
  int count;
  int64_t key_vectors;
  bool has_gaps;  // blocks end in a panel of fewer than 16 positions
  int64_t begin[kTilePanels];  // first position
  int size[kTilePanels];       // positions
  const uint8_t* keys[kTilePanels];
  const uint8_t* values[kTilePanels];
  const uint8_t* next[kTilePanels];
  const float* scales[kTilePanels];  // int8: of keys, then of values
};

// Lanes [begin, end) of a panel.
struct Lanes {
  int begin;
  int end;
  bool IsFull() const { return begin == 0 && end == kPanelPositions; }
};

// Walks the panels of a sequence in order, without a division for each.
class PanelWalk {
 public:
  PanelWalk(const AttentionCall& call, int64_t seq, int64_t kv_head, int64_t panel)
      : call_(&call),
        table_(call.block_tables + seq * call.max_blocks_per_seq),
        kv_head_(kv_head),
        block_(panel / call.layout.panels_per_block),
        in_block_(panel % call.layout.panels_per_block) {}

  const uint8_t* Address() const { return call_->cache + call_->layout.PanelOffset(table_[block_], kv_head_, in_block_); }
  int64_t FirstPosition() const { return block_ * call_->layout.shape.block_size + in_block_ * kPanelPositions; }
  int Size() const {
    const int64_t rest = call_->layout.shape.block_size - in_block_ * kPanelPositions;
    return static_cast<int>(rest < kPanelPositions ? rest : kPanelPositions);
  }
  void Advance() {
    if (++in_block_ < call_->layout.panels_per_block) return;
    in_block_ = 0;
    ++block_;
  }

 private:
  const AttentionCall* call_;
  const int32_t* table_;
  int64_t kv_head_;
  int64_t block_;
  int64_t in_block_;
};

// What is read after a tile: panels of the same sequence and head up to `end`, then those of the next piece of work.
struct Ahead {
  int64_t end;
  Upcoming upcoming;
};

// The panels of a tile that the rows, whose panels end at `end`, may see.
inline TilePanels FindPanels(const AttentionCall& call, const RowTile& tile, int64_t tile_index, int64_t end,
                             const Ahead& after) {
  const KvLayout& layout = call.layout;
  TilePanels panels;
  panels.first = tile_index * kTilePanels;
  panels.count = static_cast<int>(end - panels.first < kTilePanels ? end - panels.first : kTilePanels);
  panels.key_vectors = layout.key_vectors;
  panels.has_gaps = layout.shape.block_size % kPanelPositions != 0;
  PanelWalk walk(call, tile.seq, tile.kv_head, panels.first);
  for (int i = 0; i < panels.count; ++i, walk.Advance()) {
    const uint8_t* address = walk.Address();
    panels.begin[i] = walk.FirstPosition();
    panels.size[i] = walk.Size();
    panels.keys[i] = panels.next[i] = address;
    panels.values[i] = address + layout.value_offset;
    panels.scales[i] = reinterpret_cast<const float*>(address + layout.scale_offset);
  }
  const int64_t ahead = after.end - panels.first - kTilePanels;
  const Range upcoming = after.upcoming.panels;
  if (ahead <= 0) walk = PanelWalk(call, after.upcoming.seq, after.upcoming.kv_head, upcoming.begin);
  const int64_t num_next = ahead > 0 ? ahead : upcoming.end - upcoming.begin;
  for (int i = 0; i < num_next && i < panels.count; ++i, walk.Advance()) panels.next[i] = walk.Address();
  return panels;
}

inline Lanes VisibleLanes(const TilePanels& panels, int i, const Row& row) {
  const int64_t size = panels.size[i];
  const int64_t begin = row.begin - panels.begin[i], end = row.end - panels.begin[i];
  return {static_cast<int>(begin < 0 ? 0 : begin < size ? begin : size),
          static_cast<int>(end < 0 ? 0 : end < size ? end : size)};
}

// Panels of the tile, counted from its first, that a row sees; empty (0, 0) if none.
inline Range VisiblePanels(const TilePanels& panels, const Row& row) {
  const int64_t begin = row.panels.begin > panels.first ? row.panels.begin - panels.first : 0;
  const int64_t last = row.panels.end - panels.first;
  const int64_t end = last < panels.count ? last : panels.count;
  return begin < end ? Range{begin, end} : Range{0, 0};
}

// The part of a row's visible panels whose 16 positions it all sees; none where blocks have gaps.
inline Range FullPanels(const TilePanels& panels, const Row& row, Range visible) {
  if (panels.has_gaps || visible.begin == visible.end) return {visible.begin, visible.begin};
  Range full = visible;
  if (!VisibleLanes(panels, static_cast<int>(full.begin), row).IsFull()) ++full.begin;
  if (full.begin < full.end && !VisibleLanes(panels, static_cast<int>(full.end - 1), row).IsFull()) --full.end;
  return full;
}

// Into the second-level cache: what the first level can wait for at a time is too little for the memory's latency.
inline void Prefetch(const uint8_t* address) { __builtin_prefetch(address, 0, 2); }

}  // namespace
}  // namespace HEADRACE_TARGET
}  // namespace headrace
