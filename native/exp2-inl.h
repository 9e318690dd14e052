// 2^x for vectors, from the operations of simd/: the same on every lane, whatever lies beside it.

namespace headrace {
namespace HEADRACE_TARGET {

// 2^f for 0 <= f <= 1 is 1 + f (c[0] + f (c[1] + ...)), minimax in relative error: 2.9e-6 with four coefficients, 6.4e-8
// (half a unit in the last place of a float) with six, rounding of Horner's scheme included.
template <int kDegree>
struct Exp2Coefficients;
template <>
struct Exp2Coefficients<4> {
  static constexpr float c[] = {0x1.62d6c6p-1f, 0x1.ee2450p-3f, 0x1.abf868p-5f, 0x1.b7f730p-7f};
};
template <>
struct Exp2Coefficients<6> {
  static constexpr float c[] = {0x1.62e42cp-1f, 0x1.ebfd58p-3f, 0x1.c68912p-5f,
                                0x1.3d0b92p-7f, 0x1.46d64ep-10f, 0x1.c54174p-13f};
};

// Exactly 0 from -infinity and below -150, infinity from 128 up, NaN from NaN; exactly 1 from 0.
template <int kDegree>
inline F32x16 Exp2(const F32x16& x) {
  constexpr auto& c = Exp2Coefficients<kDegree>::c;
  const F32x16 f = Fraction(x);
  F32x16 sum = Broadcast(c[kDegree - 1]);
  for (int i = kDegree - 2; i >= 0; --i) sum = MulAdd(sum, f, Broadcast(c[i]));
  return TimesPowerOfTwo(MulAdd(sum, f, Broadcast(1.0f)), x);
}

// tanh(x) = 1 - 2 / (e^2x + 1); absolute error below 1e-6. Beyond 30 it is 1 to the last bit.
inline F32x16 Tanh(const F32x16& x) {
  constexpr float kTwoOverLn2 = 2.885390082f;
  const F32x16 clamped = Max(Broadcast(-30.0f), Min(Broadcast(30.0f), x));
  const F32x16 squared = Exp2<6>(Mul(clamped, Broadcast(kTwoOverLn2)));
  return Sub(Broadcast(1.0f), Div(Broadcast(2.0f), Add(squared, Broadcast(1.0f))));
}

}  // namespace HEADRACE_TARGET
}  // namespace headrace
