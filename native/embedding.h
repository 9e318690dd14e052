// Rows of a packed matrix by id.
#ifndef HEADRACE_NATIVE_EMBEDDING_H_
#define HEADRACE_NATIVE_EMBEDDING_H_

#include <cstdint>

#include "dtype.h"
#include "packed_matrix.h"

namespace headrace {

// out[i] = scale * matrix[ids[i] + offset], [num_rows, columns] contiguous. The row is rounded to the dtype, then its
// product with the scale, as the models were trained.
// zeros_outside: a row that is not in the matrix, because another rank holds it, is zero.
struct EmbeddingCall {
  PackedView matrix;
  DType dtype;
  int64_t num_rows;
  const int64_t* ids;
  int64_t offset;
  float scale;
  bool zeros_outside;
  void* out;
};

// Throws std::out_of_range if a row is not in the matrix, unless that gives zeros; then nothing is written.
void Embed(const EmbeddingCall& call);

}  // namespace headrace

#endif  // HEADRACE_NATIVE_EMBEDDING_H_
