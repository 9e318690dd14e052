// The exponential function, in a form that compilers vectorize.

#include "elements-inl.h"

namespace headrace {
namespace HEADRACE_TARGET {
namespace {

// e^x to about one unit in the last place: x = n ln 2 + r, a polynomial for e^r (its Taylor series, whose next term is
// below 2^-26 for |r| <= ln 2 / 2), n into the exponent. Results outside [2^-126, 2^127] are held there, which an
// activation or a sum that holds a 1 cannot tell from 0 and infinity. NaN stays NaN.
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

}  // namespace
}  // namespace HEADRACE_TARGET
}  // namespace headrace
