// Sums over ranks: always in rank order, in float32, rounded once. So an element of the sum does not depend on the
// message it travelled in.
#ifndef HEADRACE_NATIVE_REDUCE_H_
#define HEADRACE_NATIVE_REDUCE_H_

#include <algorithm>
#include <cstddef>
#include <cstdint>
#include <vector>

#include "dtype.h"
#include "range.h"
#include "target.h"

namespace headrace {

inline size_t ElementBytes(DType dtype) { return dtype == DType::kFloat32 ? 4 : 2; }

// [num_rows, row_size] values in groups of 64 that begin anew with each row, so that a row's groups are its own.
struct GroupedRows {
  static constexpr int64_t kGroupSize = 64;

  int64_t num_rows;
  int64_t row_size;

  int64_t groups_per_row() const { return (row_size + kGroupSize - 1) / kGroupSize; }
  int64_t num_groups() const { return num_rows * groups_per_row(); }
  // The first value of a group.
  int64_t Start(int64_t group) const {
    if (row_size == 0) return 0;
    return group / groups_per_row() * row_size + group % groups_per_row() * kGroupSize;
  }
  // Of some groups as a message: a float32 scale for each, then 8 bits for each value.
  int64_t MessageBytes(Range groups) const { return 4 * (groups.end - groups.begin) + Start(groups.end) - Start(groups.begin); }
};

struct ReduceKernels {
  // out[i] = ((in[0][i] + in[1][i]) + in[2][i]) + ...; out may begin where one of the inputs does if its elements are
  // no wider.
  void (*sum)(const std::vector<const void*>& in, DType dtype, int64_t count, void* out, DType out_dtype);

  // Groups of x as a message. A group's scale is max|x| / 127, its values round(x / scale), to nearest even: an error of
  // at most max|x| / 254. A group with a value that is not finite comes out as NaN.
  void (*quantize)(const GroupedRows& rows, Range groups, DType dtype, const void* x, char* message);

  // sum[i] = the messages' values added in order; sum begins with the first of the groups.
  void (*sum_quantized)(const GroupedRows& rows, Range groups, const std::vector<const char*>& messages, float* sum);
};

// Of this machine's best instruction set; all give the same bits.
const ReduceKernels& Reduce();
const ReduceKernels& Reduce(Target target);

}  // namespace headrace

#endif  // HEADRACE_NATIVE_REDUCE_H_
