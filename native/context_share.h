// What ranks that share a context do with their partial results: queries put together before, shares weighted after.
#ifndef HEADRACE_NATIVE_CONTEXT_SHARE_H_
#define HEADRACE_NATIVE_CONTEXT_SHARE_H_

#include <cstdint>
#include <vector>

#include "dtype.h"
#include "range.h"
#include "target.h"

namespace headrace {

// out[t] = parts[0][t], parts[1][t], ...: each part has num_rows rows of row_bytes, its stride apart; out is contiguous.
struct JoinHeadsCall {
  std::vector<const void*> parts;
  std::vector<int64_t> stride_bytes;
  int64_t num_rows;
  int64_t row_bytes;
  void* out;
};

void JoinHeads(const JoinHeadsCall& call);

// out = numerator * 2^(m_own - M) / sum over ranks of denominator * 2^(m - M), with M the largest m: what this rank adds
// to softmax(logits) V, so that the sum over ranks is it. Computed in float32 in order of ranks, rounded once.
//
// normalizers: of each rank, [num_tokens, num_heads, 2], denominator and m (in base 2).
// out: [num_parts, num_tokens, num_heads / num_parts, head_dim].
struct WeighShareCall {
  std::vector<const float*> normalizers;
  int64_t own_rank;
  int64_t num_tokens;
  int64_t num_heads;
  int64_t head_dim;
  int64_t num_parts;
  const float* numerators;
  DType dtype;
  void* out;
};

void WeighShare(Target target, const WeighShareCall& call);

// What each target provides: the tokens of a range.
struct ContextShareKernels {
  void (*weigh)(const WeighShareCall& call, Range tokens);
};

}  // namespace headrace

#endif  // HEADRACE_NATIVE_CONTEXT_SHARE_H_
