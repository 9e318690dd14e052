// The norms of one target. Compiled once for each, with that target's flags.
#include "norm.h"

#include <cmath>

#include "elements-inl.h"

namespace headrace {
namespace HEADRACE_TARGET {
namespace {

struct Lanes {
  float lane[kWidth] = {};

  float Sum() const {
    float sum[kWidth];
    for (int i = 0; i < kWidth; ++i) sum[i] = lane[i];
    for (int half = kWidth / 2; half > 0; half /= 2) {
      for (int i = 0; i < half; ++i) sum[i] += sum[i + half];
    }
    return sum[0];
  }
};

// The sum over a row of term(value), lane by lane.
template <class X, class Term>
float SumOver(const X* row, int64_t size, const Term& term) {
  Lanes lanes;
  ForEachWidth(
      size,
      [&](int64_t k) {
        for (int i = 0; i < kWidth; ++i) lanes.lane[i] += term(ToFloat(row[k + i]));
      },
      [&](int64_t k, int rest) {
        for (int i = 0; i < rest; ++i) lanes.lane[i] += term(ToFloat(row[k + i]));
      });
  return lanes.Sum();
}

template <class X>
void AddRow(const X* x, X* residual, int64_t size) {
  for (int64_t k = 0; k < size; ++k) Round(ToFloat(residual[k]) + ToFloat(x[k]), residual + k);
}

template <class X>
void RmsRow(const NormCall& call, const X* row, X* out) {
  const auto* weight = static_cast<const X*>(call.weight);
  const float offset = call.unit_offset ? 1.0f : 0.0f;
  const float squares = SumOver(row, call.size, [](float value) { return value * value; });
  const float scale = 1.0f / std::sqrt(squares / static_cast<float>(call.size) + call.eps);
  for (int64_t k = 0; k < call.size; ++k) Round(ToFloat(row[k]) * scale * (ToFloat(weight[k]) + offset), out + k);
}

template <class X>
void LayerRow(const NormCall& call, const X* row, X* out) {
  const auto* weight = static_cast<const X*>(call.weight);
  const auto* bias = static_cast<const X*>(call.bias);
  const auto size = static_cast<float>(call.size);
  const float mean = SumOver(row, call.size, [](float value) { return value; }) / size;
  const float variance = SumOver(row, call.size, [mean](float value) { return (value - mean) * (value - mean); }) / size;
  const float scale = 1.0f / std::sqrt(variance + call.eps);
  for (int64_t k = 0; k < call.size; ++k) {
    Round((ToFloat(row[k]) - mean) * scale * ToFloat(weight[k]) + ToFloat(bias[k]), out + k);
  }
}

template <class X>
void NormRows(const NormCall& call, Range rows) {
  for (int64_t r = rows.begin; r < rows.end; ++r) {
    const X* row = static_cast<const X*>(call.x) + r / call.num_inner * call.outer_stride +
                   r % call.num_inner * call.inner_stride;
    if (call.residual != nullptr) {
      X* residual = static_cast<X*>(call.residual) + r * call.size;
      AddRow(row, residual, call.size);
      row = residual;
    }
    X* out = static_cast<X*>(call.out) + r * call.size;
    if (call.kind == NormKind::kRms) {
      RmsRow(call, row, out);
    } else {
      LayerRow(call, row, out);
    }
  }
}

void NormOf(const NormCall& call, Range rows) {
  if (call.dtype == DType::kFloat32) return NormRows<float>(call, rows);
  NormRows<uint16_t>(call, rows);
}

void AddOf(const AddCall& call, Range elements) {
  const int64_t size = elements.end - elements.begin;
  if (call.dtype == DType::kFloat32) {
    return AddRow(static_cast<const float*>(call.x) + elements.begin,
                  static_cast<float*>(call.residual) + elements.begin, size);
  }
  AddRow(static_cast<const uint16_t*>(call.x) + elements.begin,
         static_cast<uint16_t*>(call.residual) + elements.begin, size);
}

}  // namespace

extern const NormKernels kNorm;
const NormKernels kNorm = {&NormOf, &AddOf};

}  // namespace HEADRACE_TARGET
}  // namespace headrace
