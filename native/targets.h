// The kernels of each target; every *_target.cc is compiled once for each.
#ifndef HEADRACE_NATIVE_TARGETS_H_
#define HEADRACE_NATIVE_TARGETS_H_

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
  extern const LinearKernels kLinear;             \
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

// One of four, by target.
template <class Kernels>
const Kernels& Choose(Target target, const Kernels& portable, [[maybe_unused]] const Kernels& avx2,
                      [[maybe_unused]] const Kernels& avx512, [[maybe_unused]] const Kernels& avx512_bf16) {
  switch (target) {
    case Target::kAvx2:
      return avx2;
    case Target::kAvx512:
      return avx512;
    case Target::kAvx512Bf16:
      return avx512_bf16;
    case Target::kPortable:
      break;
  }
  return portable;
}

#ifdef HEADRACE_X86
#define HEADRACE_CHOOSE(target, kernels) \
  Choose(target, portable::kernels, avx2::kernels, avx512::kernels, avx512_bf16::kernels)
#else
#define HEADRACE_CHOOSE(target, kernels) \
  Choose(target, portable::kernels, portable::kernels, portable::kernels, portable::kernels)
#endif

}  // namespace headrace

#endif  // HEADRACE_NATIVE_TARGETS_H_
