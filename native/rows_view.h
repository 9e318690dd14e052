// Rows of numbers that belong to a caller.
#ifndef HEADRACE_NATIVE_ROWS_VIEW_H_
#define HEADRACE_NATIVE_ROWS_VIEW_H_

#include <cstdint>

#include "dtype.h"

namespace headrace {

static constexpr int64_t BytesOf(DType dtype) { return dtype == DType::kFloat32 ? 4 : 2; }

// Rows begin `stride` elements apart.
struct RowsView {
  DType dtype;
  int64_t num_rows;
  const void* data;
  int64_t stride;

  const void* Row(int64_t row) const { return static_cast<const char*>(data) + row * stride * BytesOf(dtype); }
};

}  // namespace headrace

#endif  // HEADRACE_NATIVE_ROWS_VIEW_H_
