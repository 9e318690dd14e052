// Vectors of 16 lanes with AVX-512 F, BW, DQ, VL and VNNI, and with BF16 where the target has it.
//
// A SIMD header gives the kernels one vocabulary, in the namespace of its target:
//   F32x16, I32x16             16 lanes, one for each output of a panel
//   Bf16Step, Int8Step, ...    64 bytes of packed weights (packed_matrix.h), unpacked as far as all rows of x share it
//   Bf16X                      how prepared activations hold bfloat16: as pairs, or expanded to float32
//   kInt8Offset, kInt4Offset   added to stored weights by Dot...: sums start at -offset * sum(x), and come out exact
//   kDigitBits                 of the unsigned bytes that DotSigned multiplies
//   kFloatRows, kFloatPanels, kIntRows
//                              the largest tiles whose accumulators stay in registers
//   kKeepsGroup                whether a group's unpacked weights stay in registers too, for kIntRowsAtOnce rows after
//                              another
// Nothing here may have external linkage shared with another target: the linker would keep one copy for all.

#include <immintrin.h>

#include <cstdint>
#include <cstring>

#include "float_bits.h"
#include "linear.h"
#include "scale_byte.h"

namespace headrace {
namespace HEADRACE_TARGET {

constexpr int kFloatRows = 8;
constexpr int kFloatPanels = 2;
constexpr int kIntRows = 16;
constexpr int kIntRowsAtOnce = 5;  // as many chains of dot products as hide an instruction's latency
constexpr bool kKeepsGroup = true;
constexpr int kInt8Offset = 128;
constexpr int kDigitBits = 8;
constexpr int kInt4Offset = 8;

using F32x16 = __m512;
using I32x16 = __m512i;

inline F32x16 Broadcast(float value) { return _mm512_set1_ps(value); }
inline F32x16 Load(const float* from) { return _mm512_loadu_ps(from); }
inline F32x16 LoadScales(const uint8_t* from) {
  constexpr int kAndThenOr = 0xea;
  const __m512i wide = _mm512_cvtepi8_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(from)));
  return _mm512_castsi512_ps(_mm512_ternarylogic_epi32(_mm512_slli_epi32(wide, kScaleShift),
                                                       _mm512_set1_epi32(static_cast<int>(kScaleBits)),
                                                       _mm512_set1_epi32(kScaleExponent), kAndThenOr));
}
inline F32x16 LoadBfloat16(const uint16_t* from) {
  const __m256i halves = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(from));
  return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(halves), 16));
}
inline void Store(float* to, F32x16 a) { _mm512_storeu_ps(to, a); }
// To nearest, ties to even; NaN stays NaN (ToBfloat16). The instruction for it would flush subnormals.
inline void StoreBfloat16(uint16_t* to, F32x16 a) {
  const __m512i bits = _mm512_castps_si512(a);
  const __m512i last = _mm512_and_si512(_mm512_srli_epi32(bits, 16), _mm512_set1_epi32(1));
  const __m512i rounded = _mm512_add_epi32(_mm512_add_epi32(bits, _mm512_set1_epi32(0x7fff)), last);
  const __mmask16 is_nan = _mm512_cmp_ps_mask(a, a, _CMP_UNORD_Q);
  const __m512i result = _mm512_mask_or_epi32(rounded, is_nan, bits, _mm512_set1_epi32(0x00400000));
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(to), _mm512_cvtepi32_epi16(_mm512_srli_epi32(result, 16)));
}
inline F32x16 Add(F32x16 a, F32x16 b) { return _mm512_add_ps(a, b); }
// The same on the units that multiply: Zen 4 has others for sums, comparisons and powers of two, and softmax is mostly
// those. In assembly, because GCC takes a product with 1 for none.
inline F32x16 AddByProduct(F32x16 a, F32x16 b) {
  asm("vfmadd132ps %2, %1, %0" : "+v"(a) : "v"(b), "v"(_mm512_set1_ps(1.0f)));
  return a;
}
inline F32x16 Sub(F32x16 a, F32x16 b) { return _mm512_sub_ps(a, b); }
inline F32x16 Mul(F32x16 a, F32x16 b) { return _mm512_mul_ps(a, b); }
// a * b + c, rounded once.
inline F32x16 MulAdd(F32x16 a, F32x16 b, F32x16 c) { return _mm512_fmadd_ps(a, b, c); }

#ifdef __AVX512BF16__

using Bf16X = uint16_t;
using Bf16Step = __m512i;
inline Bf16Step LoadBf16(const void* from) { return _mm512_loadu_si512(from); }
inline F32x16 MulAddBf16(F32x16 acc, Bf16Step w, const Bf16X* x) {
  int32_t pair;
  memcpy(&pair, x, sizeof pair);
  return _mm512_dpbf16_ps(acc, (__m512bh)w, (__m512bh)_mm512_set1_epi32(pair));
}

#else

using Bf16X = float;
struct Bf16Step {
  F32x16 first;
  F32x16 second;
};
inline Bf16Step LoadBf16(const void* from) {
  const __m512i pairs = _mm512_loadu_si512(from);
  const __m512i high_half = _mm512_set1_epi32(static_cast<int>(0xffff0000));
  return {_mm512_castsi512_ps(_mm512_slli_epi32(pairs, 16)), _mm512_castsi512_ps(_mm512_and_si512(pairs, high_half))};
}
inline F32x16 MulAddBf16(F32x16 acc, const Bf16Step& w, const Bf16X* x) {
  return MulAdd(w.second, Broadcast(x[1]), MulAdd(w.first, Broadcast(x[0]), acc));
}

#endif

inline I32x16 BroadcastInt(int32_t value) { return _mm512_set1_epi32(value); }
// The float with those bits.
inline F32x16 ToFloat(I32x16 a) { return _mm512_cvtepi32_ps(a); }
inline F32x16 BitsToFloat(I32x16 a) { return _mm512_castsi512_ps(a); }

// The largest bit pattern among |a| and |b|: magnitudes in order, infinity and NaN above all numbers.
inline uint32_t LargestBits(F32x16 a, F32x16 b) {
  const __m512i largest = _mm512_max_epu32(_mm512_castps_si512(_mm512_abs_ps(a)), _mm512_castps_si512(_mm512_abs_ps(b)));
  return _mm512_reduce_max_epu32(largest);
}
// The first of those 32 values whose magnitude has these bits; there must be one.
inline int FirstOfMagnitude(F32x16 a, F32x16 b, uint32_t bits) {
  const __m512i wanted = _mm512_set1_epi32(static_cast<int>(bits));
  const uint32_t first = _mm512_cmpeq_epi32_mask(_mm512_castps_si512(_mm512_abs_ps(a)), wanted);
  const uint32_t second = _mm512_cmpeq_epi32_mask(_mm512_castps_si512(_mm512_abs_ps(b)), wanted);
  return __builtin_ctz(first | second << 16);
}
// The largest exponent among a and b, as in their bits: 255 for infinity and NaN.
inline uint32_t LargestExponent(F32x16 a, F32x16 b) {
  const __m512i largest = _mm512_max_epu32(_mm512_castps_si512(_mm512_abs_ps(a)), _mm512_castps_si512(_mm512_abs_ps(b)));
  const __m256i upper = _mm512_cvtepi32_epi16(_mm512_srli_epi32(largest, 16));
  const __m128i eight = _mm_max_epu16(_mm256_castsi256_si128(upper), _mm256_extracti128_si256(upper, 1));
  // The one instruction that finds an extreme lane finds the least one.
  const __m128i least = _mm_minpos_epu16(_mm_xor_si128(eight, _mm_set1_epi16(-1)));
  return (~static_cast<uint32_t>(_mm_cvtsi128_si32(least)) & 0xffff) >> 7;
}
// a and b times a factor, to the nearest integer, ties to even, clamped to -127 .. 127: the values of q[0..31], whose
// sum is returned.
inline int32_t RoundToBytes(F32x16 a, F32x16 b, float factor, int8_t* q) {
  const __m128i first = _mm512_cvtsepi32_epi8(_mm512_cvtps_epi32(Mul(a, Broadcast(factor))));
  const __m128i second = _mm512_cvtsepi32_epi8(_mm512_cvtps_epi32(Mul(b, Broadcast(factor))));
  const __m256i bytes = _mm256_max_epi8(_mm256_set_m128i(second, first), _mm256_set1_epi8(-127));
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(q), bytes);
  // Sums of eight bytes exist for unsigned ones: of q + 128.
  const __m256i sums = _mm256_sad_epu8(_mm256_xor_si256(bytes, _mm256_set1_epi8(-128)), _mm256_setzero_si256());
  const __m128i two = _mm_add_epi64(_mm256_castsi256_si128(sums), _mm256_extracti128_si256(sums, 1));
  return _mm_cvtsi128_si32(_mm_add_epi64(two, _mm_unpackhi_epi64(two, two))) - 32 * 128;
}

// acc[n] + sum over i of w[4 n + i] x[i]: unsigned weights times signed activations, exact in 32 bits. In assembly,
// because GCC loads the broadcast apart, which fills the window in which the processor looks for independent work.
inline I32x16 DotBytes(I32x16 acc, __m512i w, const int8_t* x) {
  using Four = int32_t __attribute__((may_alias, aligned(1)));
  asm("vpdpbusd %2%{1to16%}, %1, %0" : "+v"(acc) : "v"(w), "m"(*reinterpret_cast<const Four*>(x)));
  return acc;
}

using Int8Step = __m512i;
inline Int8Step LoadInt8(const uint8_t* from) { return _mm512_loadu_si512(from); }
inline I32x16 DotInt8(I32x16 acc, Int8Step w, const int8_t* x) { return DotBytes(acc, w, x); }

struct Int4Step {
  __m512i low;
  __m512i high;
};
inline Int4Step LoadInt4(const uint8_t* from) {
  const __m512i bytes = _mm512_loadu_si512(from);
  const __m512i nibble = _mm512_set1_epi8(15);
  return {_mm512_and_si512(bytes, nibble), _mm512_and_si512(_mm512_srli_epi16(bytes, 4), nibble)};
}
inline I32x16 DotInt4(I32x16 acc, const Int4Step& w, const int8_t* x) {
  return DotBytes(DotBytes(acc, w.low, x), w.high, x + 4);
}

// Softmax.

inline F32x16 Div(F32x16 a, F32x16 b) { return _mm512_div_ps(a, b); }
// a > b ? a : b, and so b where either is NaN.
inline F32x16 Max(F32x16 a, F32x16 b) { return _mm512_max_ps(a, b); }
// a < b ? a : b.
inline F32x16 Min(F32x16 a, F32x16 b) { return _mm512_min_ps(a, b); }
// x - floor(x), and a * 2^floor(x) for a in [1, 2]. Of infinities: 0, and 0 or infinity. Below 2^-126 a product may be
// rounded to 0; it is from 2^-150 down.
inline F32x16 Fraction(F32x16 x) { return _mm512_reduce_ps(x, _MM_FROUND_TO_NEG_INF | _MM_FROUND_NO_EXC); }
inline F32x16 TimesPowerOfTwo(F32x16 a, F32x16 x) { return _mm512_scalef_ps(a, x); }
// Lanes [begin, end) of a, the others from b.
inline F32x16 SelectLanes(int begin, int end, F32x16 a, F32x16 b) {
  return _mm512_mask_blend_ps(static_cast<__mmask16>((1u << end) - (1u << begin)), b, a);
}
inline float MaxLane(F32x16 a) {
  const __m256 eight = _mm256_max_ps(_mm512_castps512_ps256(a), _mm512_extractf32x8_ps(a, 1));
  const __m128 four = _mm_max_ps(_mm256_castps256_ps128(eight), _mm256_extractf128_ps(eight, 1));
  const __m128 two = _mm_max_ps(four, _mm_movehl_ps(four, four));
  return _mm_cvtss_f32(_mm_max_ss(two, _mm_movehdup_ps(two)));
}
// Pairwise: lane i with i + 8, then i + 4, i + 2, i + 1.
inline float SumLanes(F32x16 a) {
  const __m256 eight = _mm256_add_ps(_mm512_castps512_ps256(a), _mm512_extractf32x8_ps(a, 1));
  const __m128 four = _mm_add_ps(_mm256_castps256_ps128(eight), _mm256_extractf128_ps(eight, 1));
  const __m128 two = _mm_add_ps(four, _mm_movehl_ps(four, four));
  return _mm_cvtss_f32(_mm_add_ss(two, _mm_movehdup_ps(two)));
}

// Sixteen values as bfloat16, and as Bf16X, rounded to nearest; and LoadBf16 of `pair & mask` for each pair.
#ifdef __AVX512BF16__

inline void StoreBf16(uint16_t* to, F32x16 a) {
  const __m256bh halves = _mm512_cvtneps_pbh(a);
  memcpy(to, &halves, sizeof halves);
}
inline void StoreBf16X(Bf16X* to, F32x16 a) { StoreBf16(to, a); }
inline Bf16Step LoadBf16Masked(const void* from, uint32_t mask) {
  return _mm512_and_si512(_mm512_loadu_si512(from), _mm512_set1_epi32(static_cast<int>(mask)));
}

#else

inline void StoreBf16(uint16_t* to, F32x16 a) {
  const __m512i bits = _mm512_castps_si512(a);
  const __m512i last = _mm512_and_si512(_mm512_srli_epi32(bits, 16), _mm512_set1_epi32(1));
  const __m512i rounded = _mm512_add_epi32(bits, _mm512_add_epi32(last, _mm512_set1_epi32(0x7fff)));
  const __m512i quiet = _mm512_or_si512(bits, _mm512_set1_epi32(0x00400000));
  const __m512i chosen = _mm512_mask_blend_epi32(_mm512_cmp_ps_mask(a, a, _CMP_UNORD_Q), rounded, quiet);
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(to), _mm512_cvtepi32_epi16(_mm512_srli_epi32(chosen, 16)));
}
inline void StoreBf16X(Bf16X* to, F32x16 a) { Store(to, a); }
inline Bf16Step LoadBf16Masked(const void* from, uint32_t mask) {
  alignas(64) uint8_t masked[64];
  _mm512_store_si512(masked, _mm512_and_si512(_mm512_loadu_si512(from), _mm512_set1_epi32(static_cast<int>(mask))));
  return LoadBf16(masked);
}

#endif

// Signed bytes, four consecutive ones for each lane, times unsigned ones below 2^kDigitBits.
using SignedStep = __m512i;
inline SignedStep LoadSigned(const uint8_t* from) { return _mm512_loadu_si512(from); }
inline I32x16 DotSigned(I32x16 acc, SignedStep v, const uint8_t* p) {
  int32_t four;
  memcpy(&four, p, sizeof four);
  return _mm512_dpbusd_epi32(acc, _mm512_set1_epi32(four), v);
}
// 2^kDigitBits * high + low.
inline I32x16 Join(I32x16 high, I32x16 low) { return _mm512_add_epi32(_mm512_slli_epi32(high, kDigitBits), low); }
inline I32x16 AddInt(I32x16 a, I32x16 b) { return _mm512_add_epi32(a, b); }
// Four vectors of nearest whole numbers, which must be in [0, 2^16), as their upper and lower digit: lanes 4 i to 4 i + 3
// of vector j go to bytes 16 i + 4 j and on, where DotSigned wants four consecutive ones.
inline void StoreSplit(uint8_t* high, uint8_t* low, const F32x16 (&a)[4]) {
  const __m512i first = _mm512_packus_epi32(_mm512_cvtps_epi32(a[0]), _mm512_cvtps_epi32(a[1]));
  const __m512i second = _mm512_packus_epi32(_mm512_cvtps_epi32(a[2]), _mm512_cvtps_epi32(a[3]));
  const __m512i bits = _mm512_set1_epi16(255);
  _mm512_storeu_si512(high, _mm512_packus_epi16(_mm512_srli_epi16(first, 8), _mm512_srli_epi16(second, 8)));
  _mm512_storeu_si512(low, _mm512_packus_epi16(_mm512_and_si512(first, bits), _mm512_and_si512(second, bits)));
}

}  // namespace HEADRACE_TARGET
}  // namespace headrace
