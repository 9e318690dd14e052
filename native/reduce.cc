#include "reduce.h"

#include "targets.h"

namespace headrace {

const ReduceKernels& Reduce(Target target) { return HEADRACE_CHOOSE(target, kReduce); }

const ReduceKernels& Reduce() {
  static const ReduceKernels& best = Reduce(BestTarget());
  return best;
}

}  // namespace headrace
