#include "quantize_rows.h"

#include <atomic>
#include <cstring>
#include <stdexcept>

#include "range.h"
#include "scratch.h"
#include "targets.h"
#include "thread_pool.h"

namespace headrace {
namespace {

// Elements below which a second thread costs more than it saves.
constexpr int64_t kMinParallelElements = 1 << 14;

void StoreValues(Format format, const int8_t* q, int64_t columns, uint8_t* to) {
  if (format == Format::kInt8) {
    memcpy(to, q, columns);
    return;
  }
  // Whole groups were filled, so that the last column has a neighbour.
  for (int64_t j = 0; j < (columns + 1) / 2; ++j) {
    to[j] = static_cast<uint8_t>((q[2 * j] + kInt4Bias) | (q[2 * j + 1] + kInt4Bias) << 4);
  }
}

}  // namespace

bool QuantizeRows(Target target, Format format, const RowsView& x, int64_t columns, uint8_t* values, float* scales) {
  if (!IsQuantized(format)) throw std::invalid_argument("rows are quantized to int8 or int4");
  const QuantizeKernels& kernels = HEADRACE_CHOOSE(target, kQuantize);
  const int64_t num_groups = (columns + kGroup - 1) / kGroup;
  const int64_t row_bytes = format == Format::kInt8 ? columns : (columns + 1) / 2;
  std::atomic<bool> is_finite{true};
  RunParts(x.num_rows * columns >= kMinParallelElements, [&](int part, int num_parts) {
    auto* q = reinterpret_cast<int8_t*>(Scratch(static_cast<size_t>(num_groups * kGroup)));
    const Range rows = Part({0, x.num_rows}, part, num_parts);
    for (int64_t row = rows.begin; row < rows.end; ++row) {
      if (kernels.quantize_row(format, x.dtype, x.Row(row), columns, q, scales + row * num_groups)) {
        StoreValues(format, q, columns, values + row * row_bytes);
      } else {
        is_finite = false;
      }
    }
  });
  return is_finite;
}

}  // namespace headrace
