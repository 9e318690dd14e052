// Rows of activations, 16 elements at a time, as float32. Loops over the 16 are written so that compilers make them one
// vector operation without liberties.

#include "dtype.h"
#include "float_bits.h"

namespace headrace {
namespace HEADRACE_TARGET {
namespace {

constexpr int kWidth = 16;

inline float ToFloat(float value) { return value; }
inline float ToFloat(uint16_t value) { return FromBfloat16(value); }
inline void Round(float value, float* to) { *to = value; }
inline void Round(float value, uint16_t* to) { *to = ToBfloat16(value); }
// The float32 that is left of a value once it has been stored as X.
inline float Rounded(float value, const float*) { return value; }
inline float Rounded(float value, const uint16_t*) { return FromBfloat16(ToBfloat16(value)); }

// a * b + c, rounded once where the machine can.
inline float MultiplyAdd(float a, float b, float c) {
#ifdef __FP_FAST_FMAF
  return __builtin_fmaf(a, b, c);
#else
  return a * b + c;
#endif
}

// Calls full(k) for every 16 columns from k on, then partial(k, rest) for those left.
template <class Full, class Partial>
inline void ForEachWidth(int64_t size, const Full& full, const Partial& partial) {
  int64_t k = 0;
  for (; k + kWidth <= size; k += kWidth) full(k);
  if (k < size) partial(k, static_cast<int>(size - k));
}

}  // namespace
}  // namespace HEADRACE_TARGET
}  // namespace headrace
