// Keys and values of one layer, in blocks of tokens, in the one layout that the attention kernels read.
//
// A block holds, for each KV head, panels of 16 positions (the last one shorter where block_size is no multiple of 16;
// its places stay empty). A panel is contiguous: keys, then values, then for int8 their scales. Both are laid out like
// the weights of a matrix product (packed_matrix.h), in vectors of 64 bytes whose 16 lanes are outputs:
//
//   keys     lanes are positions, walked along head_dim    scores of 16 positions need no sum across lanes
//   values   lanes are head_dim, walked along positions    one panel of them for each 16 of head_dim
//
//               one vector of keys                               one vector of values
//   float32     k[0..15][d]                                      v[t][n..n+15]
//   bfloat16    k[0][d] k[0][d+1] k[1][d] k[1][d+1] ...          v[t][n] v[t+1][n] v[t][n+1] v[t+1][n+1] ...
//   int8        k[0][d..d+3] k[1][d..d+3] ..., as q + 128        v[t..t+3][n] v[t..t+3][n+1] ..., as q
//
// int8 has one scale for each token and KV head, max|x| / 127; scales [16] of keys, then [16] of values, float32. A key
// or value with NaN or infinity makes both scales NaN, so that whoever sees the token gets NaN.
#ifndef HEADRACE_NATIVE_KV_CACHE_H_
#define HEADRACE_NATIVE_KV_CACHE_H_

#include <atomic>
#include <cstddef>
#include <cstdint>
#include <memory>

#include "huge_memory.h"
#include "packed_matrix.h"

namespace headrace {

constexpr int kPanelPositions = kLanes;
constexpr int64_t kMaxHeadDim = 1024;
// The slot of a token whose key and value another rank keeps. Not -1, which is what the end of a missing block gives.
constexpr int64_t kNotStored = INT64_MIN;

struct KvShape {
  Format format;  // kFloat32, kBfloat16 or kInt8
  int64_t num_blocks;
  int64_t block_size;
  int64_t num_kv_heads;
  int64_t head_dim;
};

// Where things lie. Plain data: kernels for several instruction sets read it.
struct KvLayout {
  // Throws std::invalid_argument for a size below one or a format that a cache cannot have.
  explicit KvLayout(const KvShape& shape);

  KvShape shape;
  int64_t panels_per_block;
  int64_t key_vectors;        // of a panel: head_dim over the entries in a vector, rounded up
  int64_t value_chunks;       // of a panel: head_dim / 16, rounded up
  int64_t chunk_vectors;      // of a chunk: 16 positions over the entries in a vector
  int64_t value_offset;       // bytes from the start of a panel
  int64_t scale_offset;
  int64_t panel_bytes;
  int64_t num_bytes;

  int64_t PanelOffset(int64_t block, int64_t kv_head, int64_t panel) const {
    return ((block * shape.num_kv_heads + kv_head) * panels_per_block + panel) * panel_bytes;
  }
  // The panel of a position, counting a sequence's panels from its first block on.
  int64_t PanelOf(int64_t position) const {
    return position / shape.block_size * panels_per_block + position % shape.block_size / kPanelPositions;
  }
  // Bytes from the start of a panel to entry d of the key or value in a lane. columns is that of the format; where it is
  // a constant, so are the divisors.
  int64_t KeyOffset(int64_t lane, int64_t d, int columns) const {
    return d / columns * kVectorBytes + lane * 4 + d % columns * (4 / columns);
  }
  int64_t ValueOffset(int64_t lane, int64_t d, int columns) const {
    const int64_t vector = d / kLanes * chunk_vectors + lane / columns;
    return value_offset + vector * kVectorBytes + d % kLanes * 4 + lane % columns * (4 / columns);
  }
};

// Rows that attention computed over a cache, one for each query and head, and how many of them a second time.
struct SoftmaxCounters {
  std::atomic<int64_t> rows{0};
  std::atomic<int64_t> recomputed_rows{0};
};

// Owns the memory, zero until written and claimed from the system as it is.
class KvCache {
 public:
  explicit KvCache(const KvShape& shape);

  const KvLayout& layout() const { return layout_; }
  uint8_t* data() const { return memory_.get(); }
  SoftmaxCounters& counters() { return *counters_; }

  // The key and value of a slot as float32 [head_dim]. Throws std::out_of_range for a slot or a head it has not.
  void Read(int64_t slot, int64_t kv_head, float* key, float* value) const;

 private:
  KvLayout layout_;
  MappedMemory memory_;
  std::unique_ptr<SoftmaxCounters> counters_;
};

}  // namespace headrace

#endif  // HEADRACE_NATIVE_KV_CACHE_H_
