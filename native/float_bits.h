// Conversions between float32 and bfloat16, by bits, the same on every machine.
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

}  // namespace
}  // namespace headrace

#endif  // HEADRACE_NATIVE_FLOAT_BITS_H_
