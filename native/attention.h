// out = softmax(soft_cap(scale * q K^T) + mask) V over the paged cache, for the new tokens of several sequences.
//
// A row is one query of one head. Rows that share a KV head are computed together, so that keys and values are read once
// for all of them: one token's query heads while decoding, many tokens' while a prompt is read.
//
// Order of operations. The positions of a sequence lie in tiles of 16 panels (256 positions if the block size is a
// multiple of 16), the tiles in splits, both at places that depend on nothing else:
//
//   scores     t = log2(e) * score, 16 positions at a time; one chain over head_dim for each
//   tile       p = 2^(t - m) for a reference m of the split so far; sum += p, o += p V, positions ascending
//   split      (m, sum, o) over its tiles, ascending; where m grows, sum and o are scaled down
//   row        the splits merged one by one, ascending; out = o / sum, rounded once
//
// Positions that a row may not see take no part: not in a maximum, nor a sum, nor a product. So a row's bits depend on
// its query and the keys and values it sees, and not on the batch, the chunk of the prompt it came in, the rows computed
// beside it, the pieces a context was cut into or the number of threads.
//
// Where ranks share a context (`ContextShare`), each attends the blocks it holds and leaves out the division: o, sum and
// m of its positions. context_share.h joins those of all ranks.
//
// p is as exact as the cache: float32; bfloat16 where the machine multiplies those (float32 elsewhere); for int8 two digits
// (16 bits, 14 with AVX2, of which up to two are spare) of a tile's largest p times its value's scale, since a long
// context's many small p must not be lost. Queries of int8 have 8 bits of the row's largest entry, as keys have
// (SageAttention, Zhang et al. 2024).
#ifndef HEADRACE_NATIVE_ATTENTION_H_
#define HEADRACE_NATIVE_ATTENTION_H_

#include <cstdint>

#include "kv_cache.h"
#include "linear.h"
#include "range.h"
#include "target.h"

namespace headrace {

// How m is chosen.
//   kSynchronized   the largest t so far; every tile waits for its maximum
//   kAsynchronized  a constant; a row that leaves the range where this is sound is computed again, synchronized
//   kLazy           an earlier maximum, until a tile's is kLazyThreshold above it (FlashAttention-4)
enum class SoftmaxScheme { kSynchronized, kAsynchronized, kLazy };

constexpr float kLazyThreshold = 8.0f;  // in t: p stays below 2^8

// The numbers of kAsynchronized, all in t.
//
// A row of n keys is sound if o is finite and n 2^-102 <= sum <= 2^126: then what was lost below the least float is less
// than 2^-24 of the sum. For int8, whose values are scaled before they meet p, n 2^-64; what is lost there are values whose
// products with p are below 1e-33, whatever the scheme.
// is_strict also asks of each t that it lies between least and largest (exclusively), as FlashDecoding++ published it;
// -infinity, which contributes nothing, is exempt.
struct UnifiedMax {
  float value = 0;
  bool is_strict = false;
  float least = 0;
  float largest = 0;
};

// The part of every context that this cache holds, where ranks share contexts, and the partial results over it.
//
// block_tables then list this cache's blocks alone. owned_blocks[seq][i] says how many of them are among the first i
// blocks of the sequence, wherever those lie; rows are owned_stride apart.
struct ContextShare {
  const int32_t* owned_blocks = nullptr;  // null for whole contexts
  int64_t owned_stride = 0;
  float* numerators = nullptr;   // [num_tokens, num_heads, head_dim]: o
  float* normalizers = nullptr;  // [num_tokens, num_heads, 2]: sum, m; 0 and -infinity where a row sees nothing
};

struct AttentionCall {
  KvLayout layout;
  const uint8_t* cache = nullptr;
  SoftmaxCounters* counters = nullptr;
  DType dtype = DType::kFloat32;  // of query and out
  // [num_tokens, num_heads, head_dim], tokens query_stride elements apart, the rest contiguous; out contiguous.
  const void* query = nullptr;
  int64_t query_stride = 0;
  void* out = nullptr;
  int64_t num_tokens = 0;
  int64_t num_heads = 0;
  int64_t num_seqs = 0;
  // [num_seqs, max_blocks_per_seq], [num_seqs], [num_seqs + 1]: read when the call runs.
  const int32_t* block_tables = nullptr;
  int64_t max_blocks_per_seq = 0;
  const int32_t* context_lens = nullptr;
  const int32_t* cu_seqlens_q = nullptr;
  float score_scale = 1;  // softmax_scale
  bool has_soft_cap = false;
  float soft_cap = 0;
  int64_t sliding_window = INT64_MAX;  // INT64_MAX for none
  SoftmaxScheme scheme = SoftmaxScheme::kSynchronized;
  UnifiedMax unified_max = {};
  ContextShare share = {};  // if it has owned_blocks, partial results are written instead of out
  int64_t max_pieces = 0;  // a context is cut into at most so many pieces; 0 leaves it to the kernel
};

// Throws std::out_of_range if a block, a length or a row lies outside what the call names.
void Attention(Target target, const AttentionCall& call);

constexpr int64_t kTilePanels = 16;
constexpr int64_t kPassRows = 64;  // rows at a time over one pass of keys and values

// Tiles of a split: one each near the start, so that short contexts have enough splits for several threads; four
// further on, so that long ones do not have more than it takes.
constexpr int64_t kShortSplits = 8;
constexpr int64_t kLongSplitTiles = 4;
static constexpr int64_t SplitBegin(int64_t split) {
  return split < kShortSplits ? split : kShortSplits + (split - kShortSplits) * kLongSplitTiles;
}
static constexpr int64_t SplitOf(int64_t tile) {
  return tile < kShortSplits ? tile : kShortSplits + (tile - kShortSplits) / kLongSplitTiles;
}

// Rows [begin, end) of a sequence and a KV head: row r is token r / group of the new ones, query head
// kv_head * group + r % group, where group query heads share a KV head.
struct RowTile {
  int64_t seq;
  int64_t kv_head;
  Range rows;
};

// A row: its token, of all new ones, and query head; the positions [begin, end) of this cache it sees, and the panels
// they lie in, none where a share of a context has none of them.
struct Row {
  int64_t token;
  int64_t head;
  int64_t begin;
  int64_t end;
  Range panels;
};

Row RowAt(const AttentionCall& call, const RowTile& tile, int64_t row);

// The panels that at least one of some rows of a sequence sees, by the first and the last of them.
Range VisiblePanels(const AttentionCall& call, const Row& first, const Row& last);
// The splits that some panels lie in. Rows have one even where they see nothing.
Range SplitsOf(Range panels);

// Floats of one split's partial result: m of all rows, then their sums, then their o, head_dim rounded up to 16.
static inline int64_t PartialFloats(const KvLayout& layout, int64_t num_rows) {
  return RoundUp(num_rows * (2 + layout.value_chunks * kLanes), kLanes);
}

// Panels of a sequence and a KV head that a thread will probably read next: it asks memory for the first of them while it
// computes its last tile.
struct Upcoming {
  int64_t seq = 0;
  int64_t kv_head = 0;
  Range panels = {0, 0};
};

// What each target provides.
struct AttentionKernels {
  // Bytes of memory, aligned to 64, that a thread needs for the functions below.
  int64_t (*workspace_bytes)(const AttentionCall& call);
  // Rows over all the splits they see, to the output.
  void (*attend)(const AttentionCall& call, const RowTile& tile, const Upcoming& upcoming, char* workspace);
  // Rows over some splits, each to its own partial result.
  void (*attend_splits)(const AttentionCall& call, const RowTile& tile, Range splits, const Upcoming& upcoming,
                        float* partials, char* workspace);
  // The partial results of all splits that the rows see, to the output.
  void (*merge)(const AttentionCall& call, const RowTile& tile, const float* partials, char* workspace);
};

}  // namespace headrace

#endif  // HEADRACE_NATIVE_ATTENTION_H_
