// The nonlinear part of a feed-forward layer: act(x), or act(gate) * up with both side by side in x.
#ifndef HEADRACE_NATIVE_ACTIVATION_H_
#define HEADRACE_NATIVE_ACTIVATION_H_

#include <cstdint>

#include "dtype.h"
#include "range.h"
#include "target.h"

namespace headrace {

enum class ActivationKind { kSilu, kGelu, kGeluTanh, kRelu };

// x is [num_rows, size], or [num_rows, 2 * size] if gated, gate first; out is [num_rows, size]; both contiguous.
// act(gate) is rounded to the dtype before the product, as the models were trained.
struct ActivationCall {
  ActivationKind kind;
  bool is_gated;
  DType dtype;
  int64_t num_rows;
  int64_t size;
  const void* x;
  void* out;
};

void Activate(Target target, const ActivationCall& call);

struct ActivationKernels {
  // Computes elements [columns.begin, columns.end) of one row.
  void (*activate)(const ActivationCall& call, int64_t row, Range columns);
};

}  // namespace headrace

#endif  // HEADRACE_NATIVE_ACTIVATION_H_
