// out = x W^T + bias, W packed.
//
// Each output (m, n) is one chain of the same operations in the same order, whatever M, the arm, the tile or the number
// of threads: a row's result never depends on what else is in the batch.
//
//   float32    acc = fma(x[k], w[k], acc), k ascending
//   bfloat16   the same for pairs (or the machine's dot product of two), x and w in bfloat16, acc in float32
//   int8, int4 x is quantized by row and group of 32: scale max|x| / 127. Then for each group, ascending,
//              acc = fma(float(sum of q_x q_w), scale_x * scale_w, acc), the sum exact; out = acc * row_scale.
//              A group of x with NaN or infinity makes its row NaN.
//   then       acc + bias, rounded once to the type of x.
#ifndef HEADRACE_NATIVE_LINEAR_H_
#define HEADRACE_NATIVE_LINEAR_H_

#include <cstdint>

#include "dtype.h"
#include "packed_matrix.h"
#include "range.h"
#include "target.h"

namespace headrace {

// How the loops over rows of x and panels of W nest. W is streamed from memory, x stays in a cache.
//   kGemv      each row of x alone, several panels at once: the chains of one row and one panel are too few to hide the
//              latency of an addition.
//   kFlatGemm  W once; each panel meets all rows of x while it is in the L1 or L2 cache.
//   kGemm      rows of x in blocks that fit L2; each block meets all of W.
enum class Arm { kGemv, kFlatGemm, kGemm };

// What does not change while a product is computed. Rows of x are x_stride elements apart; out and bias are contiguous
// and of x's type; bias may be null.
struct LinearCall {
  PackedView weight;
  DType dtype;
  int64_t num_rows;
  const void* x;
  int64_t x_stride;
  const void* bias;
  void* out;
};

// Throws std::invalid_argument if x's type does not fit a floating-point weight's.
void Linear(Target target, Arm arm, const LinearCall& call);

// Activations in the form the kernels read, one row after another.
//   values   float32, or bfloat16 (as Bf16X), or int8, filled with zeros up to padded_columns
//   scales   [row][group], scale_x (integers only)
//   starts   [row][group], -offset * sum of q_x (integers only)
struct Activations {
  char* values;
  int64_t row_bytes;
  float* scales;
  int32_t* starts;
};

// How many panels of W the tiles of kGemv take, and how many rows of x and panels of W, at most, those of the others.
struct TileShapes {
  int gemv_panels;
  int rows;
  int panels;
};

struct Block {
  Range panels;
  Range rows;
};

// What each target provides.
struct LinearKernels {
  // Bytes of one prepared value; 0 if the kernel reads x as it is.
  int (*prepared_bytes)(const LinearCall& call);
  // Fills rows [rows.begin, rows.end) of activations.
  void (*prepare)(const LinearCall& call, Range rows, const Activations& activations);
  // Computes a block of the output.
  void (*compute)(const LinearCall& call, Arm arm, const Activations& activations, const Block& block);
};

}  // namespace headrace

#endif  // HEADRACE_NATIVE_LINEAR_H_
