// The instruction sets this build has kernels for, and which of them this machine can run.
#ifndef HEADRACE_NATIVE_TARGET_H_
#define HEADRACE_NATIVE_TARGET_H_

#include <string>
#include <vector>

namespace headrace {

// In order of preference, the best one last.
enum class Target { kPortable, kAvx2, kAvx512, kAvx512Bf16, kAmx, kAmxFp16 };

const char* Name(Target target);

// Targets compiled into this build: the portable one, on x86-64 those of AVX, and where the compiler knows them those of
// AMX.
const std::vector<Target>& CompiledTargets();

// Whether the CPU has the instructions and the operating system saves their registers. Linux must be asked to save tiles
// before they are used; the first call for a target with AMX does that, for the whole process.
bool IsSupported(Target target);

// The target of that name. Throws std::invalid_argument, naming those that run here, if it cannot run on this machine.
Target TargetFromName(const std::string& name);

Target BestTarget();

}  // namespace headrace

#endif  // HEADRACE_NATIVE_TARGET_H_
