#include "activation.h"

#include <algorithm>

#include "targets.h"
#include "thread_pool.h"

namespace headrace {
namespace {

constexpr int64_t kMinParallelElements = 1 << 12;

}  // namespace

// Cut by element, so that a single wide row is shared by the threads too.
void Activate(Target target, const ActivationCall& call) {
  const ActivationKernels& kernels = HEADRACE_CHOOSE(target, kActivation);
  const Range all = {0, call.num_rows * call.size};
  RunParts(all.end >= kMinParallelElements, [&](int part, int num_parts) {
    const Range elements = Part(all, part, num_parts);
    for (int64_t begin = elements.begin; begin < elements.end;) {
      const int64_t row = begin / call.size;
      const int64_t end = std::min(elements.end, (row + 1) * call.size);
      kernels.activate(call, row, {begin - row * call.size, end - row * call.size});
      begin = end;
    }
  });
}

}  // namespace headrace
