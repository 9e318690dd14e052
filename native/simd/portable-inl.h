// Vectors of 16 lanes in plain C++, for any machine; see avx512-inl.h for what the operations mean.

#include <cstdint>
#include <cstring>

#include "float_bits.h"
#include "linear.h"
#include "scale_byte.h"

namespace headrace {
namespace portable {

constexpr int kFloatRows = 4;
constexpr int kFloatPanels = 1;
constexpr int kIntRows = 2;
constexpr int kIntRowsAtOnce = 2;
constexpr bool kKeepsGroup = false;
constexpr int kInt8Offset = 128;
constexpr int kDigitBits = 8;
constexpr int kInt4Offset = 8;

struct F32x16 {
  float lane[16];
};
struct I32x16 {
  int32_t lane[16];
};

template <class Op>
inline F32x16 MakeF32(const Op& op) {
  F32x16 out;
  for (int i = 0; i < 16; ++i) out.lane[i] = op(i);
  return out;
}

inline F32x16 Broadcast(float value) {
  return MakeF32([&](int) { return value; });
}
inline F32x16 Load(const float* from) {
  return MakeF32([&](int i) { return from[i]; });
}
inline F32x16 LoadScales(const uint8_t* from) {
  return MakeF32([&](int i) { return FromScaleByte(from[i]); });
}
inline F32x16 LoadBfloat16(const uint16_t* from) {
  return MakeF32([&](int i) { return FromBfloat16(from[i]); });
}
inline void Store(float* to, const F32x16& a) { memcpy(to, a.lane, sizeof a.lane); }
inline void StoreBfloat16(uint16_t* to, const F32x16& a) {
  for (int i = 0; i < 16; ++i) to[i] = ToBfloat16(a.lane[i]);
}
inline F32x16 Add(const F32x16& a, const F32x16& b) {
  return MakeF32([&](int i) { return a.lane[i] + b.lane[i]; });
}
inline F32x16 AddByProduct(const F32x16& a, const F32x16& b) { return Add(a, b); }
inline F32x16 Sub(const F32x16& a, const F32x16& b) {
  return MakeF32([&](int i) { return a.lane[i] - b.lane[i]; });
}
inline F32x16 Mul(const F32x16& a, const F32x16& b) {
  return MakeF32([&](int i) { return a.lane[i] * b.lane[i]; });
}
inline F32x16 MulAdd(const F32x16& a, const F32x16& b, const F32x16& c) {
#ifdef FP_FAST_FMAF
  return MakeF32([&](int i) { return __builtin_fmaf(a.lane[i], b.lane[i], c.lane[i]); });
#else
  return MakeF32([&](int i) { return a.lane[i] * b.lane[i] + c.lane[i]; });
#endif
}

using Bf16X = float;
struct Bf16Step {
  F32x16 first;
  F32x16 second;
};
inline Bf16Step LoadBf16(const void* from) {
  uint32_t pairs[16];
  memcpy(pairs, from, sizeof pairs);
  return {MakeF32([&](int i) { return FromBits(pairs[i] << 16); }),
          MakeF32([&](int i) { return FromBits(pairs[i] & 0xffff0000); })};
}
inline F32x16 MulAddBf16(const F32x16& acc, const Bf16Step& w, const Bf16X* x) {
  return MulAdd(w.second, Broadcast(x[1]), MulAdd(w.first, Broadcast(x[0]), acc));
}

inline I32x16 BroadcastInt(int32_t value) {
  I32x16 out;
  for (int i = 0; i < 16; ++i) out.lane[i] = value;
  return out;
}
inline F32x16 ToFloat(const I32x16& a) {
  return MakeF32([&](int i) { return static_cast<float>(a.lane[i]); });
}
inline F32x16 BitsToFloat(const I32x16& a) {
  return MakeF32([&](int i) { return FromBits(static_cast<uint32_t>(a.lane[i])); });
}

inline uint32_t LargestBits(const F32x16& a, const F32x16& b) {
  uint32_t largest = 0;
  for (int i = 0; i < 32; ++i) {
    const uint32_t bits = Bits(i < 16 ? a.lane[i] : b.lane[i - 16]) & 0x7fffffff;
    largest = bits > largest ? bits : largest;
  }
  return largest;
}
inline uint32_t LargestExponent(const F32x16& a, const F32x16& b) { return LargestBits(a, b) >> 23; }
inline int FirstOfMagnitude(const F32x16& a, const F32x16& b, uint32_t bits) {
  int i = 0;
  while ((Bits(i < 16 ? a.lane[i] : b.lane[i - 16]) & 0x7fffffff) != bits) ++i;
  return i;
}
// Adding 1.5 * 2^23, whose last place is 1, rounds.
inline int32_t RoundToBytes(const F32x16& a, const F32x16& b, float factor, int8_t* q) {
  constexpr float kRound = 12582912.0f;
  int32_t sum = 0;
  for (int i = 0; i < 32; ++i) {
    const float value = i < 16 ? a.lane[i] : b.lane[i - 16];
    const int32_t rounded = static_cast<int32_t>(Bits(value * factor + kRound) - Bits(kRound));
    const int32_t clamped = rounded > 127 ? 127 : rounded < -127 ? -127 : rounded;
    q[i] = static_cast<int8_t>(clamped);
    sum += clamped;
  }
  return sum;
}

struct U8x64 {
  uint8_t lane[64];
};
inline I32x16 DotBytes(const I32x16& acc, const U8x64& w, const int8_t* x) {
  I32x16 out = acc;
  for (int i = 0; i < 16; ++i) {
    for (int k = 0; k < 4; ++k) out.lane[i] += w.lane[4 * i + k] * x[k];
  }
  return out;
}

using Int8Step = U8x64;
inline Int8Step LoadInt8(const uint8_t* from) {
  Int8Step step;
  memcpy(step.lane, from, sizeof step.lane);
  return step;
}
inline I32x16 DotInt8(const I32x16& acc, const Int8Step& w, const int8_t* x) { return DotBytes(acc, w, x); }

struct Int4Step {
  U8x64 low;
  U8x64 high;
};
inline Int4Step LoadInt4(const uint8_t* from) {
  Int4Step step;
  for (int i = 0; i < 64; ++i) {
    step.low.lane[i] = from[i] & 15;
    step.high.lane[i] = from[i] >> 4;
  }
  return step;
}
inline I32x16 DotInt4(const I32x16& acc, const Int4Step& w, const int8_t* x) {
  return DotBytes(DotBytes(acc, w.low, x), w.high, x + 4);
}

inline F32x16 Div(const F32x16& a, const F32x16& b) {
  return MakeF32([&](int i) { return a.lane[i] / b.lane[i]; });
}
inline F32x16 Max(const F32x16& a, const F32x16& b) {
  return MakeF32([&](int i) { return a.lane[i] > b.lane[i] ? a.lane[i] : b.lane[i]; });
}
inline F32x16 Min(const F32x16& a, const F32x16& b) {
  return MakeF32([&](int i) { return a.lane[i] < b.lane[i] ? a.lane[i] : b.lane[i]; });
}
// Adding 1.5 * 2^23 to a small number leaves no bits for a fraction; the last ones are the whole number's.
constexpr float kRoundingShift = 12582912.0f;
// The exponents whose bits are those of 0 and of infinity; NaN stays NaN.
inline float ClampExponent(float x) {
  const float below = 128.0f < x ? 128.0f : x;
  return -127.0f > below ? -127.0f : below;
}
inline float Floor(float clamped) {
  const float nearest = (clamped + kRoundingShift) - kRoundingShift;
  return nearest > clamped ? nearest - 1.0f : nearest;
}
inline F32x16 Fraction(const F32x16& x) {
  return MakeF32([&](int i) { return ClampExponent(x.lane[i]) - Floor(ClampExponent(x.lane[i])); });
}
inline F32x16 TimesPowerOfTwo(const F32x16& a, const F32x16& x) {
  return MakeF32([&](int i) {
    const float whole = Floor(ClampExponent(x.lane[i]));
    return a.lane[i] * FromBits((Bits(whole + kRoundingShift) + 127) << 23);
  });
}
inline F32x16 SelectLanes(int begin, int end, const F32x16& a, const F32x16& b) {
  return MakeF32([&](int i) { return begin <= i && i < end ? a.lane[i] : b.lane[i]; });
}
inline float MaxLane(const F32x16& a) {
  float largest = a.lane[0];
  for (int i = 1; i < 16; ++i) largest = largest > a.lane[i] ? largest : a.lane[i];
  return largest;
}
inline float SumLanes(F32x16 a) {
  for (int half = 8; half > 0; half /= 2) {
    for (int i = 0; i < half; ++i) a.lane[i] += a.lane[i + half];
  }
  return a.lane[0];
}

inline Bf16Step LoadBf16Masked(const void* from, uint32_t mask) {
  uint32_t pairs[16];
  memcpy(pairs, from, sizeof pairs);
  for (uint32_t& pair : pairs) pair &= mask;
  return LoadBf16(pairs);
}
inline void StoreBf16(uint16_t* to, const F32x16& a) {
  float lanes[16];
  Store(lanes, a);
  for (int i = 0; i < 16; ++i) to[i] = ToBfloat16(lanes[i]);
}
inline void StoreBf16X(Bf16X* to, const F32x16& a) { Store(to, a); }

struct SignedStep {
  int8_t lane[64];
};
inline SignedStep LoadSigned(const uint8_t* from) {
  SignedStep step;
  memcpy(step.lane, from, sizeof step.lane);
  return step;
}
inline I32x16 DotSigned(const I32x16& acc, const SignedStep& v, const uint8_t* p) {
  I32x16 out = acc;
  for (int i = 0; i < 16; ++i) {
    for (int k = 0; k < 4; ++k) out.lane[i] += v.lane[4 * i + k] * p[k];
  }
  return out;
}
inline I32x16 AddInt(const I32x16& a, const I32x16& b) {
  I32x16 out;
  for (int i = 0; i < 16; ++i) out.lane[i] = a.lane[i] + b.lane[i];
  return out;
}
inline I32x16 Join(const I32x16& high, const I32x16& low) {
  I32x16 out;
  for (int i = 0; i < 16; ++i) out.lane[i] = high.lane[i] * (1 << kDigitBits) + low.lane[i];
  return out;
}
inline void StoreSplit(uint8_t* high, uint8_t* low, const F32x16 (&a)[4]) {
  for (int j = 0; j < 4; ++j) {
    for (int i = 0; i < 16; ++i) {
      const uint32_t whole = Bits(a[j].lane[i] + kRoundingShift) - Bits(kRoundingShift);
      const int place = i / 4 * 16 + 4 * j + i % 4;
      high[place] = static_cast<uint8_t>(whole >> kDigitBits & 255);
      low[place] = static_cast<uint8_t>(whole & 255);
    }
  }
}

}  // namespace portable
}  // namespace headrace
