// Root mean square and layer normalization over rows, with the residual addition that comes before most of them.
//
// A row's result depends on that row alone: sums run over 16 lanes, lane i taking columns i, i + 16, ..., and then over
// the lanes in one fixed order.
#ifndef HEADRACE_NATIVE_NORM_H_
#define HEADRACE_NATIVE_NORM_H_

#include <cstdint>

#include "dtype.h"
#include "range.h"
#include "target.h"

namespace headrace {

enum class NormKind { kRms, kLayer };

// Row (i, j) of x begins at i * outer_stride + j * inner_stride and has `size` adjacent elements; out is contiguous.
//
//   residual  null, or contiguous rows like out's: x + residual, rounded to the dtype, replaces them and is normalized
//   weight    [size] of the dtype; with unit_offset, 1 + weight is meant
//   bias      [size] of the dtype, layer norm only
struct NormCall {
  NormKind kind;
  DType dtype;
  int64_t num_outer;
  int64_t num_inner;
  int64_t outer_stride;
  int64_t inner_stride;
  int64_t size;
  const void* x;
  void* residual;
  const void* weight;
  const void* bias;
  float eps;
  bool unit_offset;
  void* out;
};

void Norm(Target target, const NormCall& call);

// residual += x, both contiguous, rounded to the dtype.
struct AddCall {
  DType dtype;
  int64_t num_elements;
  const void* x;
  void* residual;
};

void Add(Target target, const AddCall& call);

struct NormKernels {
  void (*norm)(const NormCall& call, Range rows);
  void (*add)(const AddCall& call, Range elements);
};

}  // namespace headrace

#endif  // HEADRACE_NATIVE_NORM_H_
