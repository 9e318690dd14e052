// Quantizing weights on one target. Compiled once for each, with that target's flags.
#include "quantize_rows.h"

#include <cstring>

#include "simd/simd-inl.h"

#include "load-inl.h"
#include "scale_byte.h"

namespace headrace {
namespace HEADRACE_TARGET {
namespace {

constexpr uint32_t kInfinity = 0x7f800000;
constexpr uint32_t kSmallestNormal = 0x00800000;

// The scale of a group whose largest magnitude has these bits.
template <class X>
float ScaleOf(Format format, const X* x, const F32x16& first, const F32x16& second, uint32_t largest) {
  const float scale = format == Format::kInt8
                          ? FromBits(largest) / 127.0f
                          : ToFloat32(x[FirstOfMagnitude(first, second, largest)]) / -8.0f;
  if ((Bits(scale) & 0x7fffffff) < kSmallestNormal) return 0.0f;
  return format == Format::kInt8 ? ScaleFrom(scale) : NearestScale(scale);
}

template <class X>
bool QuantizeGroup(Format format, const X* x, int8_t* q, float* scale) {
  const F32x16 first = LoadAsFloat32(x), second = LoadAsFloat32(x + kLanes);
  const uint32_t largest = LargestBits(first, second);
  if (largest >= kInfinity) return false;
  *scale = ScaleOf(format, x, first, second, largest);
  RoundToBytes(first, second, *scale == 0.0f ? 0.0f : 1.0f / *scale, q);
  if (format == Format::kInt4) {
    // w / scale is above -8.5, which rounds to -8.
    for (int i = 0; i < kGroup; ++i) q[i] = q[i] > 7 ? 7 : q[i];
  }
  return true;
}

template <class X>
bool QuantizeRow(Format format, const X* x, int64_t columns, int8_t* values, float* scales) {
  for (int64_t k = 0; k < columns; k += kGroup) {
    X padded[kGroup] = {};
    const bool is_whole = columns - k >= kGroup;
    if (!is_whole) memcpy(padded, x + k, (columns - k) * sizeof(X));
    if (!QuantizeGroup(format, is_whole ? x + k : padded, values + k, scales++)) return false;
  }
  return true;
}

bool QuantizeAnyRow(Format format, DType dtype, const void* x, int64_t columns, int8_t* values, float* scales) {
  if (dtype == DType::kFloat32) return QuantizeRow(format, static_cast<const float*>(x), columns, values, scales);
  return QuantizeRow(format, static_cast<const uint16_t*>(x), columns, values, scales);
}

}  // namespace

extern const QuantizeKernels kQuantize;
const QuantizeKernels kQuantize = {&QuantizeAnyRow};

}  // namespace HEADRACE_TARGET
}  // namespace headrace
