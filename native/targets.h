// The kernels of each target; every *_target.cc is compiled once for each.
#ifndef HEADRACE_NATIVE_TARGETS_H_
#define HEADRACE_NATIVE_TARGETS_H_

#include <cstddef>
#include <initializer_list>

#include "activation.h"
#include "attention.h"
#include "context_share.h"
#include "linear.h"
#include "norm.h"
#include "peaks.h"
#include "quantize_rows.h"
#include "reduce.h"
#include "rotary.h"
#include "sampling.h"

#define HEADRACE_DECLARE_TARGET(target)           \
  namespace target {                              \
  extern const ActivationKernels kActivation;     \
  extern const AttentionKernels kAttention;       \
  extern const ContextShareKernels kContextShare; \
  extern const LinearTarget kLinear;              \
  extern const NormKernels kNorm;                 \
  extern const PeakKernels kPeaks;                \
  extern const QuantizeKernels kQuantize;         \
  extern const ReduceKernels kReduce;             \
  extern const RotaryKernels kRotary;             \
  extern const SamplingKernels kSampling;         \
  }

namespace headrace {

HEADRACE_DECLARE_TARGET(portable)
#ifdef HEADRACE_X86
HEADRACE_DECLARE_TARGET(avx2)
HEADRACE_DECLARE_TARGET(avx512)
HEADRACE_DECLARE_TARGET(avx512_bf16)
#endif
#ifdef HEADRACE_AMX
HEADRACE_DECLARE_TARGET(amx)
HEADRACE_DECLARE_TARGET(amx_fp16)
#endif

// The one of `kernels`, in the order of Target, that a target has; the portable one where this build lacks it.
template <class Kernels>
const Kernels& Choose(Target target, std::initializer_list<const Kernels*> kernels) {
  const auto index = static_cast<size_t>(target);
  return **(kernels.begin() + (index < kernels.size() ? index : 0));
}

#if defined(HEADRACE_AMX)
#define HEADRACE_CHOOSE(target, kernels)                                                                   \
  Choose(target, {&portable::kernels, &avx2::kernels, &avx512::kernels, &avx512_bf16::kernels, &amx::kernels, \
                  &amx_fp16::kernels})
#elif defined(HEADRACE_X86)
#define HEADRACE_CHOOSE(target, kernels) \
  Choose(target, {&portable::kernels, &avx2::kernels, &avx512::kernels, &avx512_bf16::kernels})
#else
#define HEADRACE_CHOOSE(target, kernels) Choose(target, {&portable::kernels})
#endif

}  // namespace headrace

#endif  // HEADRACE_NATIVE_TARGETS_H_
