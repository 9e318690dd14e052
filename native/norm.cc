#include "norm.h"

#include "targets.h"
#include "thread_pool.h"

namespace headrace {
namespace {

// Elements below which a second thread costs more than it saves.
constexpr int64_t kMinParallelElements = 1 << 14;

}  // namespace

void Norm(Target target, const NormCall& call) {
  const NormKernels& kernels = HEADRACE_CHOOSE(target, kNorm);
  const Range rows = {0, call.num_outer * call.num_inner};
  const bool is_parallel = rows.end > 1 && rows.end * call.size >= kMinParallelElements;
  RunParts(is_parallel, [&](int part, int num_parts) { kernels.norm(call, Part(rows, part, num_parts)); });
}

void Add(Target target, const AddCall& call) {
  const NormKernels& kernels = HEADRACE_CHOOSE(target, kNorm);
  RunParts(call.num_elements >= kMinParallelElements, [&](int part, int num_parts) {
    kernels.add(call, Part({0, call.num_elements}, part, num_parts));
  });
}

}  // namespace headrace
