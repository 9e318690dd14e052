#include "target.h"

#include <stdexcept>

#ifdef HEADRACE_AMX
#include <cpuid.h>
#include <sys/syscall.h>
#include <unistd.h>
#endif

namespace headrace {
namespace {

#ifdef HEADRACE_AMX

struct CpuidLeaf {
  unsigned eax = 0, ebx = 0, ecx = 0, edx = 0;
  CpuidLeaf(unsigned leaf, unsigned subleaf) { __get_cpuid_count(leaf, subleaf, &eax, &ebx, &ecx, &edx); }
};

bool HasBit(unsigned bits, int bit) { return (bits >> bit & 1) != 0; }

// Linux refuses where it, or a hypervisor under it, does not save tiles.
bool AskForTiles() {
  constexpr long kRequestPermission = 0x1023, kTileData = 18;  // ARCH_REQ_XCOMP_PERM, XFEATURE_XTILEDATA
  return syscall(SYS_arch_prctl, kRequestPermission, kTileData) == 0;
}

bool FindAmx() {
  const CpuidLeaf seven(7, 0);
  const bool has_bf16 = HasBit(seven.edx, 22), has_tiles = HasBit(seven.edx, 24), has_int8 = HasBit(seven.edx, 25);
  return has_bf16 && has_tiles && has_int8 && AskForTiles();
}

bool HasAmx() {
  static const bool has_amx = FindAmx();
  return has_amx;
}

bool HasAmxFp16() {
  static const bool has_amx_fp16 = HasAmx() && HasBit(CpuidLeaf(7, 0).edx, 23) && HasBit(CpuidLeaf(7, 1).eax, 21);
  return has_amx_fp16;
}

#else

bool HasAmx() { return false; }
bool HasAmxFp16() { return false; }

#endif

}  // namespace

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
    case Target::kAmx:
      return "amx";
    case Target::kAmxFp16:
      return "amx_fp16";
  }
  return "unknown";
}

const std::vector<Target>& CompiledTargets() {
#ifdef HEADRACE_X86
  static const std::vector<Target> targets = {
      Target::kPortable, Target::kAvx2, Target::kAvx512, Target::kAvx512Bf16,
#ifdef HEADRACE_AMX
      Target::kAmx, Target::kAmxFp16,
#endif
  };
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
  const bool avx512_bf16 = avx512 && __builtin_cpu_supports("avx512bf16");
  switch (target) {
    case Target::kPortable:
      return true;
    case Target::kAvx2:
      return avx2;
    case Target::kAvx512:
      return avx512;
    case Target::kAvx512Bf16:
      return avx512_bf16;
    case Target::kAmx:
      return avx512_bf16 && HasAmx();
    case Target::kAmxFp16:
      return avx512_bf16 && HasAmxFp16();
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
