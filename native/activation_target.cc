// The activations of one target. Compiled once for each, with that target's flags.
#include "activation.h"

#include <cmath>

#include "exp-inl.h"

namespace headrace {
namespace HEADRACE_TARGET {
namespace {

struct Silu {
  static float Of(float x) { return x / (1.0f + Exp(-x)); }
};

struct GeluTanh {
  // tanh(y) = 1 - 2 / (e^(2y) + 1)
  static float Of(float x) {
    const float y = 0.797884561f * (x + 0.044715f * x * x * x);
    return 0.5f * x * (2.0f - 2.0f / (Exp(2.0f * y) + 1.0f));
  }
};

struct Gelu {
  static float Of(float x) { return 0.5f * x * (1.0f + std::erf(x * 0.707106781f)); }
};

struct Relu {
  // A comparison that NaN fails, so that it stays.
  static float Of(float x) { return x < 0.0f ? 0.0f : x; }
};

template <class Function, class X>
void ActivateRow(const ActivationCall& call, int64_t row, Range columns) {
  const X* x = static_cast<const X*>(call.x) + row * (call.is_gated ? 2 * call.size : call.size);
  X* out = static_cast<X*>(call.out) + row * call.size;
  if (!call.is_gated) {
    for (int64_t k = columns.begin; k < columns.end; ++k) Round(Function::Of(ToFloat(x[k])), out + k);
    return;
  }
  const X* up = x + call.size;
  for (int64_t k = columns.begin; k < columns.end; ++k) {
    const float gate = Rounded(Function::Of(ToFloat(x[k])), x);
    Round(gate * ToFloat(up[k]), out + k);
  }
}

template <class Function>
void ActivateAs(const ActivationCall& call, int64_t row, Range columns) {
  if (call.dtype == DType::kFloat32) return ActivateRow<Function, float>(call, row, columns);
  ActivateRow<Function, uint16_t>(call, row, columns);
}

void ActivateOf(const ActivationCall& call, int64_t row, Range columns) {
  switch (call.kind) {
    case ActivationKind::kSilu:
      return ActivateAs<Silu>(call, row, columns);
    case ActivationKind::kGelu:
      return ActivateAs<Gelu>(call, row, columns);
    case ActivationKind::kGeluTanh:
      return ActivateAs<GeluTanh>(call, row, columns);
    case ActivationKind::kRelu:
      return ActivateAs<Relu>(call, row, columns);
  }
}

}  // namespace

extern const ActivationKernels kActivation;
const ActivationKernels kActivation = {&ActivateOf};

}  // namespace HEADRACE_TARGET
}  // namespace headrace
