// Conversions between float32 and the 16-bit formats, by bits, the same on every machine.
#ifndef HEADRACE_NATIVE_FLOAT_BITS_H_
#define HEADRACE_NATIVE_FLOAT_BITS_H_

#include <cstdint>
#include <cstring>

namespace headrace {
// Internal linkage: these are compiled for several instruction sets, and the linker must not keep one for all.
namespace {

inline uint32_t Bits(float value) {
  uint32_t bits;
  memcpy(&bits, &value, sizeof bits);
  return bits;
}

inline float FromBits(uint32_t bits) {
  float value;
  memcpy(&value, &bits, sizeof value);
  return value;
}

inline float FromBfloat16(uint16_t bits) { return FromBits(static_cast<uint32_t>(bits) << 16); }

// To nearest, ties to even; NaN stays NaN.
inline uint16_t ToBfloat16(float value) {
  const uint32_t bits = Bits(value);
  const uint32_t rounded = bits + 0x7fff + ((bits >> 16) & 1);
  const uint32_t quiet_nan = bits | 0x00400000;
  return static_cast<uint16_t>((value != value ? quiet_nan : rounded) >> 16);
}

// Exact. Halves with exponent e are 2^112 times the float of the same bits moved into place; subnormals too, because
// the product normalizes them. Infinity and NaN never occur among scales.
inline float FromHalf(uint16_t bits) {
  const uint32_t sign = static_cast<uint32_t>(bits & 0x8000) << 16;
  const float magnitude = FromBits(static_cast<uint32_t>(bits & 0x7fff) << 13) * 0x1p112f;
  return FromBits(Bits(magnitude) | sign);
}

// To nearest, ties to even, for |value| < 65504. The inverse product puts the exponent in place, subnormals rounded by
// the addition of a number whose last bit is theirs.
inline uint16_t ToHalf(float value) {
  const uint32_t sign = (Bits(value) >> 16) & 0x8000;
  const float magnitude = FromBits(Bits(value) & 0x7fffffff);
  if (magnitude < 0x1p-14f) return static_cast<uint16_t>(sign | (Bits(magnitude + 0.5f) - Bits(0.5f)));
  const uint32_t bits = Bits(magnitude) - (112u << 23);
  return static_cast<uint16_t>(sign | ((bits + 0xfff + ((bits >> 13) & 1)) >> 13));
}

}  // namespace
}  // namespace headrace

#endif  // HEADRACE_NATIVE_FLOAT_BITS_H_
