// out = x W^T + bias, W packed.
//
// Each output (m, n) is one chain of the same operations in the same order, whatever M, the tile, the number of threads
// or the arm: a row's result never depends on what else is in the batch.
//
//   float32    acc = fma(x[k], w[k], acc), k ascending
//   bfloat16   the same for pairs (or the machine's dot product of two), x and w in bfloat16, acc in float32
//   int8, int4 x is quantized by row and group of 32 with scales that are powers of two (prepare-inl.h). Then for each
//              group, ascending, acc = fma(float(sum of q_x q_w) * scale_x, scale_w, acc), sum and product exact;
//              out = acc * row_scale. A group of x with NaN, infinity or a magnitude of 2^111 makes its row NaN.
//   bfloat16 with AMX
//              the chain of tiles (simd/amx-inl.h), 32 columns at a time
//   int8, int4 with AMX-FP16
//              the same of x, times a power of two for each row, and scale_w q_w, both in float16, which is exact for
//              int4 weights (linear_tiles-inl.h); out = acc * 2^-e * row_scale. NaN from 2^111 on, as there. Rounds
//              less than bytes of x do, by a factor of some 20. Of few rows reading takes longer than multiplying
//              either way, and bytes leave it more to spare: calls that need not be batch invariant use them in kGemv
//              and kFlatGemm.
//   then       acc + bias, rounded once to the type of out.
#ifndef HEADRACE_NATIVE_LINEAR_H_
#define HEADRACE_NATIVE_LINEAR_H_

#include <cstdint>

#include "dtype.h"
#include "packed_matrix.h"
#include "range.h"
#include "rows_view.h"
#include "target.h"

namespace headrace {

// How the loops over rows of x and panels of W nest. W is streamed from memory, x stays in a cache.
//   kGemv      each row of x alone, several panels at once: the chains of one row and one panel are too few to hide the
//              latency of an addition.
//   kFlatGemm  W once; each panel meets all rows of x while it is in the L1 or L2 cache.
//   kGemm      rows of x in blocks that fit L2, or a part of K of which does; each block meets all of W.
enum class Arm { kGemv, kFlatGemm, kGemm };

// What does not change while a product is computed. Rows of x are x_stride elements apart; out and bias are contiguous,
// bias of x's type; it may be null. Without is_batch_invariant implementations may differ in their order of sums where
// that is faster, so that a row's last bits depend on how many there are.
struct LinearCall {
  PackedView weight;
  DType dtype;
  int64_t num_rows;
  const void* x;
  int64_t x_stride;
  const void* bias;
  void* out;
  DType out_dtype;
  bool is_batch_invariant;
};

// Throws std::invalid_argument if x's type does not fit a floating-point weight's.
void Linear(Target target, Arm arm, const LinearCall& call);

// How rows of x are cut into tiles of nearly equal size, so that none is left with a short one. A tile meets one panel of
// W, or a few, at a time; it holds its accumulators in registers meanwhile.
struct RowTiles {
  int64_t num_rows;
  int64_t num_tiles;

  Range Rows(int64_t tile) const { return Part({0, num_rows}, tile, num_tiles); }
  int64_t MaxRows() const { return (num_rows + num_tiles - 1) / num_tiles; }
};

// Activations in the form the kernels read: num_tiles * MaxRows() places of row_bytes each.
//
// Floating point: row m begins at values + m * row_bytes: float32, or bfloat16 (as Bf16X), with zeros up to
// padded_columns.
// Tiles: tile t begins at values + t * MaxRows() * row_bytes; see linear_tiles-inl.h.
// Integers: a tile of R rows is one block of records, one for each group along K, in the order in which it is read:
//   int8 q[R][32]      the group's quantized values
//   int32 start[R]     where its sums of products begin: the bits of `shift`, less offset * sum of q
//   float shift[R]     1.5 * 2^23 * scale_x: bits of a float whose last place is worth scale_x. Integers added to those
//                      bits add as many scale_x to the float, so that (bits of the sum) - shift = scale_x * sum, exact.
struct Activations {
  char* values;
  int64_t row_bytes;
};

struct Block {
  Range panels;
  Range tiles;
};

// One way to compute products, with vectors or with tiles.
struct LinearKernels {
  // The most rows a tile takes.
  int (*max_tile_rows)(Format format);
  // How many tiles, of rows of so many bytes, a block has at most.
  int64_t (*tiles_per_block)(const LinearCall& call, Arm arm, RowTiles tiles, int64_t row_bytes);
  // How many panels a block of so many tiles has at most. Threads take blocks one by one: those of few panels let them
  // end together, those of many let what they share be read less often.
  int64_t (*panels_per_block)(const LinearCall& call, int64_t num_tiles);
  // Bytes of one prepared row; 0 if the kernel reads x as it is.
  int64_t (*prepared_row_bytes)(const LinearCall& call);
  // Bytes of memory of its own that each caller of `compute` needs for blocks of so many tiles.
  int64_t (*scratch_bytes)(const LinearCall& call, int64_t num_tiles);
  // The most rows that every thread prepares for itself, if it has panels enough to make that a small part of its work.
  int64_t max_own_rows;
  // Fills columns [kGroup * groups.begin, kGroup * groups.end) of all rows of activations.
  void (*prepare)(const LinearCall& call, RowTiles tiles, Range groups, const Activations& activations);
  // Computes a block of the output.
  void (*compute)(const LinearCall& call, RowTiles tiles, const Activations& activations, const Block& block,
                  char* scratch);
};

// What each target provides.
struct LinearTarget {
  const LinearKernels& (*kernels)(const LinearCall& call, Arm arm);
};

}  // namespace headrace

#endif  // HEADRACE_NATIVE_LINEAR_H_
