// The panels of one tile, found through the block table.

namespace headrace {
namespace HEADRACE_TARGET {
namespace {

// Into the second-level cache: what the first level can wait for at a time is too little for the memory's latency.
inline void Prefetch(const uint8_t* address) { __builtin_prefetch(address, 0, 2); }

// Where the panels of a tile lie, keys first. While one is read, that of the next tile, or of what comes after it, is
// fetched: `next`, or the panel itself where nothing follows. Blocks lie in any order, which no hardware foresees, and a
// tile fits the second-level cache twice.
struct TilePanels {
  const KvLayout* layout;
  int64_t first;  // of the sequence; -1 for those of other work
  int count;
  bool has_gaps;  // blocks end in a panel of fewer than 16 positions
  const uint8_t* address[kTilePanels];
  const uint8_t* next[kTilePanels];
  bool is_next_fetched;  // by the first block of rows; tiles take so little time that asking again would show
  bool is_fetch_spread;  // over all steps of a tile, and not only over those that read the cache

  // A core can wait for few lines at a time, and reading the cache by tile registers is faster than memory answers. So
  // scores and values ask for three lines where they read four, from both ends of a panel, and what is computed in
  // between for those in its middle: first of them the scaling of integers, then each part of the probabilities.
  template <int kVectors>
  void PrefetchForScores(int64_t i, int64_t vector) const {
    PrefetchLines<kVectors / 4 * 3>(i, BytesFor(vector));
  }
  void PrefetchForScaling(int64_t i) const { PrefetchLines<kScalingLines>(i, BytesFor(layout->key_vectors)); }
  // Bytes of each panel that one of so many parts of the probabilities asks for.
  Range BytesForProbabilities(int64_t part, int64_t num_parts) const {
    if (!is_fetch_spread || is_next_fetched) return {0, 0};
    const bool is_scaled = layout->shape.format == Format::kInt8;
    const int64_t begin = BytesFor(layout->key_vectors) / kVectorBytes + (is_scaled ? kScalingLines : 0);
    const Range lines = Part({begin, FirstForValues() / kVectorBytes}, part, num_parts);
    return {lines.begin * kVectorBytes, lines.end * kVectorBytes};
  }
  void PrefetchBytes(int64_t i, Range bytes) const {
    constexpr int kLines = 4;
    for (int64_t offset = bytes.begin; offset < bytes.end; offset += kLines * kVectorBytes)
      PrefetchLines<kLines>(i, offset);
  }
  template <int kVectors>
  void PrefetchForValues(int64_t i, int64_t vector) const {
    PrefetchLines<kVectors / 4 * 3>(i, FirstForValues() + BytesFor(vector));
  }

  // int8: of keys, then of values.
  const float* Scales(int64_t i) const { return reinterpret_cast<const float*>(address[i] + layout->scale_offset); }
  int64_t FirstPosition(int64_t i) const {
    const int64_t panel = first + i;
    if (!has_gaps) return panel * kPanelPositions;
    return panel / layout->panels_per_block * layout->shape.block_size +
           panel % layout->panels_per_block * kPanelPositions;
  }
  int64_t Size(int64_t i) const {
    if (!has_gaps) return kPanelPositions;
    const int64_t rest = layout->shape.block_size - (first + i) % layout->panels_per_block * kPanelPositions;
    return rest < kPanelPositions ? rest : kPanelPositions;
  }

 private:
  static constexpr int kScalingLines = 4;

  static int64_t BytesFor(int64_t num_vectors) { return num_vectors / 4 * 3 * kVectorBytes; }
  int64_t FirstForValues() const {
    return layout->panel_bytes - BytesFor((layout->scale_offset - layout->value_offset) / kVectorBytes);
  }
  template <int kLines>
  void PrefetchLines(int64_t i, int64_t offset) const {
    if (is_next_fetched) return;
    const uint8_t* from = next[i] + offset;
    Unroll<kLines>([&](auto line) HEADRACE_LAMBDA { Prefetch(from + line * kVectorBytes); });
  }
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

// Finds the panels of one tile after another: of a sequence and a KV head, `visible_end` panels of which the rows see, up
// to panel `end`, and then those of the next piece of work.
class TileReader {
 public:
  TileReader(const AttentionCall& call, const RowTile& tile, int64_t visible_end, int64_t end, const Upcoming& upcoming)
      : call_(&call), tile_(&tile), upcoming_(&upcoming), visible_end_(visible_end), end_(end) {
    tiles_[0].first = tiles_[1].first = -1;
  }

  int64_t visible_end() const { return visible_end_; }

  // Valid until the next call.
  TilePanels& Read(int64_t tile_index) {
    if (tiles_[following_].first != tile_index * kTilePanels) FindTile(tile_index, tiles_[following_]);
    TilePanels& panels = tiles_[following_];
    panels.is_next_fetched = false;
    following_ = 1 - following_;
    TilePanels& following = tiles_[following_];
    if (end_ > panels.first + kTilePanels) {
      FindTile(tile_index + 1, following);
    } else {
      following.first = -1;
      Find(upcoming_->seq, upcoming_->kv_head, upcoming_->panels, following);
    }
    for (int i = 0; i < kTilePanels; ++i) panels.next[i] = i < following.count ? following.address[i] : panels.address[i];
    return panels;
  }

 private:
  void FindTile(int64_t tile_index, TilePanels& panels) const {
    panels.layout = &call_->layout;
    panels.first = tile_index * kTilePanels;
    panels.has_gaps = call_->layout.shape.block_size % kPanelPositions != 0;
    Find(tile_->seq, tile_->kv_head, {panels.first, visible_end_}, panels);
  }

  // The first kTilePanels of a range at most; where there are fewer, the last one stands for the rest.
  void Find(int64_t seq, int64_t kv_head, Range range, TilePanels& panels) const {
    const int64_t count = range.end - range.begin;
    panels.count = static_cast<int>(count < kTilePanels ? count : kTilePanels);
    PanelWalk walk(*call_, seq, kv_head, range.begin);
    for (int i = 0; i < panels.count; ++i, walk.Advance()) panels.address[i] = walk.Address();
    for (int i = panels.count; i > 0 && i < kTilePanels; ++i) panels.address[i] = panels.address[i - 1];
  }

  const AttentionCall* call_;
  const RowTile* tile_;
  const Upcoming* upcoming_;
  int64_t visible_end_;
  int64_t end_;
  int following_ = 0;
  TilePanels tiles_[2];
};

inline Lanes VisibleLanes(const TilePanels& panels, int64_t i, const Row& row) {
  const int64_t size = panels.Size(i), first = panels.FirstPosition(i), begin = row.begin - first, end = row.end - first;
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

// From the first panel that any of some rows sees to the last.
inline Range Hull(const Range* visible, int count) {
  Range hull = {kTilePanels, 0};
  for (int r = 0; r < count; ++r) {
    if (visible[r].begin < hull.begin) hull.begin = visible[r].begin;
    if (visible[r].end > hull.end) hull.end = visible[r].end;
  }
  return hull;
}

// The part of a row's visible panels whose 16 positions it all sees; none where blocks have gaps.
inline Range FullPanels(const TilePanels& panels, const Row& row, Range visible) {
  if (panels.has_gaps || visible.begin == visible.end) return {visible.begin, visible.begin};
  Range full = visible;
  if (!VisibleLanes(panels, full.begin, row).IsFull()) ++full.begin;
  if (full.begin < full.end && !VisibleLanes(panels, full.end - 1, row).IsFull()) --full.end;
  return full;
}

// Whether a row sees all positions of some panels.
inline bool SeesWhole(const TilePanels& panels, Range range, const Row& row) {
  return !panels.has_gaps && row.begin <= panels.FirstPosition(range.begin) &&
         row.end >= panels.FirstPosition(range.end);
}

}  // namespace
}  // namespace HEADRACE_TARGET
}  // namespace headrace
