#include "context_share.h"

#include <cstring>
#include <stdexcept>

#include "targets.h"
#include "thread_pool.h"

namespace headrace {
namespace {

constexpr int64_t kMinParallelElements = 1 << 14;

}  // namespace

void JoinHeads(const JoinHeadsCall& call) {
  const auto num_parts = static_cast<int64_t>(call.parts.size());
  auto* out = static_cast<char*>(call.out);
  for (int64_t row = 0; row < call.num_rows; ++row) {
    for (int64_t part = 0; part < num_parts; ++part) {
      const char* from = static_cast<const char*>(call.parts[part]) + row * call.stride_bytes[part];
      memcpy(out + (row * num_parts + part) * call.row_bytes, from, call.row_bytes);
    }
  }
}

void WeighShare(Target target, const WeighShareCall& call) {
  if (call.num_parts < 1 || call.num_heads % call.num_parts != 0 || call.own_rank < 0 ||
      call.own_rank >= static_cast<int64_t>(call.normalizers.size())) {
    throw std::invalid_argument("heads must divide into parts, and a rank be one of those that share");
  }
  const ContextShareKernels& kernels = HEADRACE_CHOOSE(target, kContextShare);
  const int64_t num_elements = call.num_tokens * call.num_heads * call.head_dim;
  RunParts(call.num_tokens > 1 && num_elements >= kMinParallelElements, [&](int part, int num_parts) {
    kernels.weigh(call, Part({0, call.num_tokens}, part, num_parts));
  });
}

}  // namespace headrace
