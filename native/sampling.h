// What sampling asks of rows of logits: the largest, the k largest, the logarithm of the sum of their exponentials.
#ifndef HEADRACE_NATIVE_SAMPLING_H_
#define HEADRACE_NATIVE_SAMPLING_H_

#include <cstdint>

#include "range.h"
#include "target.h"

namespace headrace {

// Rows of float32, row_stride elements apart. Each row's answer depends on that row alone.
struct LogitsView {
  const float* logits;
  int64_t num_rows;
  int64_t row_stride;
  int64_t vocab_size;
};

// Of each row the largest logit and the first id that has it. NaN counts as largest, so that one look finds an unusable
// row.
void Argmax(Target target, const LogitsView& view, int64_t* ids, float* values);

// Of each row log(sum(exp(logits))), by way of the largest logit; NaN or infinity if that is.
void LogSumExp(Target target, const LogitsView& view, float* out);

// Of each row the ids of the k <= vocab_size largest logits, largest first, equals by id: [num_rows, k]. The rows must
// hold no NaN.
void TopK(Target target, const LogitsView& view, int64_t k, int64_t* ids);

struct SamplingKernels {
  void (*argmax)(const LogitsView& view, Range rows, int64_t* ids, float* values);
  void (*log_sum_exp)(const LogitsView& view, Range rows, float* out);
  // The first entry of [begin, end) above the bound, or end.
  int64_t (*next_above)(const float* row, int64_t begin, int64_t end, float bound);
};

}  // namespace headrace

#endif  // HEADRACE_NATIVE_SAMPLING_H_
