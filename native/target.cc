#include "target.h"

#include <stdexcept>

namespace headrace {

const char* Name(Target target) {
  switch (target) {
    case Target::kPortable:
      return "portable";
    case Target::kAvx2:
      return "avx2";
    case Target::kAvx512:
      return "avx512";
    case Target::kAvx512Bf16:
      return "avx512_bf16";
  }
  return "unknown";
}

const std::vector<Target>& CompiledTargets() {
#ifdef HEADRACE_X86
  static const std::vector<Target> targets = {Target::kPortable, Target::kAvx2, Target::kAvx512, Target::kAvx512Bf16};
#else
  static const std::vector<Target> targets = {Target::kPortable};
#endif
  return targets;
}

bool IsSupported(Target target) {
#ifdef HEADRACE_X86
  // The builtin reads CPUID, and for AVX and AVX-512 also XCR0: registers the system does not save do not count.
  __builtin_cpu_init();
  const bool avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("f16c");
  const bool avx512 = avx2 && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                      __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl") &&
                      __builtin_cpu_supports("avx512vnni");
  switch (target) {
    case Target::kPortable:
      return true;
    case Target::kAvx2:
      return avx2;
    case Target::kAvx512:
      return avx512;
    case Target::kAvx512Bf16:
      return avx512 && __builtin_cpu_supports("avx512bf16");
  }
  return false;
#else
  return target == Target::kPortable;
#endif
}

Target TargetFromName(const std::string& name) {
  std::string runnable;
  for (const Target target : CompiledTargets()) {
    if (!IsSupported(target)) continue;
    if (name == Name(target)) return target;
    runnable += (runnable.empty() ? "" : ", ") + std::string(Name(target));
  }
  throw std::invalid_argument("instruction set '" + name + "' cannot run here; these can: " + runnable);
}

Target BestTarget() {
  Target best = Target::kPortable;
  for (const Target target : CompiledTargets()) {
    if (IsSupported(target)) best = target;
  }
  return best;
}

}  // namespace headrace
