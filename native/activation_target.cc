// The activations of one target. Compiled once for each, with that target's flags.
#include "activation.h"

#include <cmath>

#include "elements-inl.h"

namespace headrace {
namespace HEADRACE_TARGET {
namespace {

// e^x to about one unit in the last place: x = n ln 2 + r, a polynomial for e^r (its Taylor series, whose next term is
// below 2^-26 for |r| <= ln 2 / 2), n into the exponent. Results outside [2^-126, 2^127] are held there, which an
// activation cannot tell from 0 and infinity. NaN stays NaN.
inline float Exp(float x) {
  constexpr float kLowest = -87.33654f;
  constexpr float kHighest = 88.02f;
  constexpr float kRound = 12582912.0f;  // 1.5 * 2^23: adding it leaves no room for a fraction
  x = x < kLowest ? kLowest : x;
  x = x > kHighest ? kHighest : x;
  const float shifted = MultiplyAdd(x, 1.44269504f, kRound);
  const float n = shifted - kRound;
  // ln 2 in two parts; n times the first is exact.
  const float r = MultiplyAdd(n, 2.12194440e-4f, MultiplyAdd(n, -0.693359375f, x));
  float p = MultiplyAdd(r, 1.0f / 720, 1.0f / 120);
  p = MultiplyAdd(p, r, 1.0f / 24);
  p = MultiplyAdd(p, r, 1.0f / 6);
  p = MultiplyAdd(p, r, 0.5f);
  p = MultiplyAdd(p, r, 1.0f);
  p = MultiplyAdd(p, r, 1.0f);
  const uint32_t exponent = (Bits(shifted) - Bits(kRound) + 127) << 23;
  return p * FromBits(exponent);
}

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
