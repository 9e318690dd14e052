// Weights as integers in groups along K, as headrace.kernels.reference.quantize_rows does it, to the bit.
//
//   int8   scale = max|w| / 127, rounded up to 4 bits, q = round(w / scale)
//   int4   scale = w_max / -8 with w_max the first entry of largest magnitude, rounded to 4 bits, q clamped to -8 .. 7
//   w / scale is w * (1 / scale); a scale below the smallest normal float is 0, and so are its q.
#ifndef HEADRACE_NATIVE_QUANTIZE_ROWS_H_
#define HEADRACE_NATIVE_QUANTIZE_ROWS_H_

#include <cstdint>

#include "packed_matrix.h"
#include "rows_view.h"
#include "target.h"

namespace headrace {

// What each target provides.
struct QuantizeKernels {
  // One row. values: int8, filled with zeros to whole groups; scales: one for each group. False if x holds NaN or
  // infinity; what was written then means nothing.
  bool (*quantize_row)(Format format, DType dtype, const void* x, int64_t columns, int8_t* values, float* scales);
};

// Rows as a checkpoint stores them, in parallel. values: int8 [num_rows, columns], or int4 pairs as q + 8,
// [num_rows, ceil(columns / 2)], the lower column in the low nibble. scales: [num_rows, ceil(columns / 32)].
// False if x holds NaN or infinity.
bool QuantizeRows(Target target, Format format, const RowsView& x, int64_t columns, uint8_t* values, float* scales);

}  // namespace headrace

#endif  // HEADRACE_NATIVE_QUANTIZE_ROWS_H_
