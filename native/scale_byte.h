// Scales of integer weights in a byte: a sign, four bits of exponent, 1 to 14, and the three bits after a mantissa's
// leading one. 2^-14 to 0.9375, no zero. Exponent 15 is left out, since it has no place in float16 beside the others
// where tiles want them (linear_tiles-inl.h).
#ifndef HEADRACE_NATIVE_SCALE_BYTE_H_
#define HEADRACE_NATIVE_SCALE_BYTE_H_

#include <cstdint>

#include "float_bits.h"

namespace headrace {
namespace {

// So many places further left a byte lies as in a float32 of its value, whose sign and other bits of its own these are,
// and where the upper half of the exponent is that.
constexpr int kScaleShift = 20;
constexpr uint32_t kScaleBits = 0x87f00000;
constexpr uint32_t kScaleExponent = 0x38000000;
constexpr float kLeastScale = 0x1p-14f;

inline float FromScaleByte(uint8_t byte) {
  const uint32_t sign = static_cast<uint32_t>(byte & 0x80) << 24;
  return FromBits(sign | kScaleExponent | static_cast<uint32_t>(byte & 0x7f) << kScaleShift);
}

// Of a value that a byte holds.
inline uint8_t ToScaleByte(float value) {
  return static_cast<uint8_t>((Bits(value) >> 24 & 0x80) | (Bits(value) >> kScaleShift & 0x7f));
}

// With three bits after the leading one, whatever the exponent: the nearest, of two the larger; or the next from zero
// on.
inline float NearestScale(float value) {
  return FromBits((Bits(value) + (1u << (kScaleShift - 1))) & ~0u << kScaleShift);
}
inline float ScaleFrom(float value) { return FromBits((Bits(value) + (1u << kScaleShift) - 1) & ~0u << kScaleShift); }

}  // namespace
}  // namespace headrace

#endif  // HEADRACE_NATIVE_SCALE_BYTE_H_
