// Vectors of 16 lanes as two of 8, with AVX2, FMA and F16C; see avx512-inl.h for what the operations mean.

#include <immintrin.h>

#include <cstdint>
#include <cstring>

#include "float_bits.h"
#include "linear.h"
#include "scale_byte.h"

namespace headrace {
namespace avx2 {

// 16 registers: two accumulators for each row, four with integers.
constexpr int kFloatRows = 3;
constexpr int kFloatPanels = 2;
constexpr int kIntRows = 2;
constexpr int kIntRowsAtOnce = 2;
constexpr bool kKeepsGroup = false;
// int8 weights become signed below, so that nothing needs to be taken off again.
constexpr int kInt8Offset = 0;
constexpr int kDigitBits = 7;  // sums of two products have 16 bits
constexpr int kInt4Offset = 8;

struct F32x16 {
  __m256 half[2];
};
struct I32x16 {
  __m256i half[2];
};

inline __m256i LoadHalfVector(const void* from) { return _mm256_loadu_si256(static_cast<const __m256i*>(from)); }

inline F32x16 Broadcast(float value) { return {{_mm256_set1_ps(value), _mm256_set1_ps(value)}}; }
inline F32x16 Load(const float* from) { return {{_mm256_loadu_ps(from), _mm256_loadu_ps(from + 8)}}; }
inline F32x16 LoadScales(const uint8_t* from) {
  F32x16 out;
  for (int h = 0; h < 2; ++h) {
    const __m128i bytes = _mm_loadl_epi64(reinterpret_cast<const __m128i*>(from + 8 * h));
    const __m256i wide = _mm256_slli_epi32(_mm256_cvtepi8_epi32(bytes), kScaleShift);
    const __m256i kept = _mm256_and_si256(wide, _mm256_set1_epi32(static_cast<int>(kScaleBits)));
    out.half[h] = _mm256_castsi256_ps(_mm256_or_si256(kept, _mm256_set1_epi32(kScaleExponent)));
  }
  return out;
}
inline F32x16 LoadBfloat16(const uint16_t* from) {
  const auto* halves = reinterpret_cast<const __m128i*>(from);
  F32x16 out;
  for (int h = 0; h < 2; ++h) {
    const __m256i wide = _mm256_cvtepu16_epi32(_mm_loadu_si128(halves + h));
    out.half[h] = _mm256_castsi256_ps(_mm256_slli_epi32(wide, 16));
  }
  return out;
}
inline void Store(float* to, const F32x16& a) {
  _mm256_storeu_ps(to, a.half[0]);
  _mm256_storeu_ps(to + 8, a.half[1]);
}
inline __m256i RoundToBfloat16(__m256 a) {
  const __m256i bits = _mm256_castps_si256(a);
  const __m256i last = _mm256_and_si256(_mm256_srli_epi32(bits, 16), _mm256_set1_epi32(1));
  const __m256i rounded = _mm256_add_epi32(_mm256_add_epi32(bits, _mm256_set1_epi32(0x7fff)), last);
  const __m256i quiet_nan = _mm256_or_si256(bits, _mm256_set1_epi32(0x00400000));
  const __m256i is_nan = _mm256_castps_si256(_mm256_cmp_ps(a, a, _CMP_UNORD_Q));
  return _mm256_srli_epi32(_mm256_blendv_epi8(rounded, quiet_nan, is_nan), 16);
}
inline void StoreBfloat16(uint16_t* to, const F32x16& a) {
  const __m256i words = _mm256_packus_epi32(RoundToBfloat16(a.half[0]), RoundToBfloat16(a.half[1]));
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(to), _mm256_permute4x64_epi64(words, _MM_SHUFFLE(3, 1, 2, 0)));
}
inline F32x16 Add(const F32x16& a, const F32x16& b) {
  return {{_mm256_add_ps(a.half[0], b.half[0]), _mm256_add_ps(a.half[1], b.half[1])}};
}
inline F32x16 AddByProduct(const F32x16& a, const F32x16& b) { return Add(a, b); }
inline F32x16 Sub(const F32x16& a, const F32x16& b) {
  return {{_mm256_sub_ps(a.half[0], b.half[0]), _mm256_sub_ps(a.half[1], b.half[1])}};
}
inline F32x16 Mul(const F32x16& a, const F32x16& b) {
  return {{_mm256_mul_ps(a.half[0], b.half[0]), _mm256_mul_ps(a.half[1], b.half[1])}};
}
inline F32x16 MulAdd(const F32x16& a, const F32x16& b, const F32x16& c) {
  return {{_mm256_fmadd_ps(a.half[0], b.half[0], c.half[0]), _mm256_fmadd_ps(a.half[1], b.half[1], c.half[1])}};
}

using Bf16X = float;
struct Bf16Step {
  F32x16 first;
  F32x16 second;
};
inline Bf16Step LoadBf16(const void* from) {
  const __m256i high_half = _mm256_set1_epi32(static_cast<int>(0xffff0000));
  Bf16Step step;
  for (int h = 0; h < 2; ++h) {
    const __m256i pairs = LoadHalfVector(static_cast<const uint8_t*>(from) + 32 * h);
    step.first.half[h] = _mm256_castsi256_ps(_mm256_slli_epi32(pairs, 16));
    step.second.half[h] = _mm256_castsi256_ps(_mm256_and_si256(pairs, high_half));
  }
  return step;
}
inline F32x16 MulAddBf16(const F32x16& acc, const Bf16Step& w, const Bf16X* x) {
  return MulAdd(w.second, Broadcast(x[1]), MulAdd(w.first, Broadcast(x[0]), acc));
}

inline I32x16 BroadcastInt(int32_t value) { return {{_mm256_set1_epi32(value), _mm256_set1_epi32(value)}}; }
inline F32x16 ToFloat(const I32x16& a) { return {{_mm256_cvtepi32_ps(a.half[0]), _mm256_cvtepi32_ps(a.half[1])}}; }

inline __m256i BroadcastBytes(const int8_t* x) {
  int32_t four;
  memcpy(&four, x, sizeof four);
  return _mm256_set1_epi32(four);
}
inline F32x16 BitsToFloat(const I32x16& a) {
  return {{_mm256_castsi256_ps(a.half[0]), _mm256_castsi256_ps(a.half[1])}};
}

inline __m256i Magnitudes(__m256 a) {
  return _mm256_and_si256(_mm256_castps_si256(a), _mm256_set1_epi32(0x7fffffff));
}
inline uint32_t LargestBits(const F32x16& a, const F32x16& b) {
  const __m256i largest =
      _mm256_max_epu32(_mm256_max_epu32(Magnitudes(a.half[0]), Magnitudes(a.half[1])),
                       _mm256_max_epu32(Magnitudes(b.half[0]), Magnitudes(b.half[1])));
  __m128i four = _mm_max_epu32(_mm256_castsi256_si128(largest), _mm256_extracti128_si256(largest, 1));
  four = _mm_max_epu32(four, _mm_shuffle_epi32(four, _MM_SHUFFLE(1, 0, 3, 2)));
  four = _mm_max_epu32(four, _mm_shuffle_epi32(four, _MM_SHUFFLE(2, 3, 0, 1)));
  return static_cast<uint32_t>(_mm_cvtsi128_si32(four));
}
inline uint32_t EqualLanes(const F32x16& a, __m256i magnitude) {
  const __m256i low = _mm256_cmpeq_epi32(Magnitudes(a.half[0]), magnitude);
  const __m256i high = _mm256_cmpeq_epi32(Magnitudes(a.half[1]), magnitude);
  const int mask = _mm256_movemask_ps(_mm256_castsi256_ps(low)) | _mm256_movemask_ps(_mm256_castsi256_ps(high)) << 8;
  return static_cast<uint32_t>(mask);
}
inline uint32_t LargestExponent(const F32x16& a, const F32x16& b) { return LargestBits(a, b) >> 23; }
inline int FirstOfMagnitude(const F32x16& a, const F32x16& b, uint32_t bits) {
  const __m256i wanted = _mm256_set1_epi32(static_cast<int>(bits));
  return __builtin_ctz(EqualLanes(a, wanted) | EqualLanes(b, wanted) << 16);
}
// Eight at a time as 16-bit integers, those of the lower and the upper 128 bits taking turns by fours.
inline __m256i RoundToWords(const F32x16& a, float factor) {
  const F32x16 scaled = Mul(a, Broadcast(factor));
  return _mm256_packs_epi32(_mm256_cvtps_epi32(scaled.half[0]), _mm256_cvtps_epi32(scaled.half[1]));
}
inline int32_t RoundToBytes(const F32x16& a, const F32x16& b, float factor, int8_t* q) {
  // Packing clamps to -128 .. 127.
  const __m256i packed = _mm256_packs_epi16(RoundToWords(a, factor), RoundToWords(b, factor));
  const __m256i ordered = _mm256_permutevar8x32_epi32(packed, _mm256_setr_epi32(0, 4, 1, 5, 2, 6, 3, 7));
  const __m256i bytes = _mm256_max_epi8(ordered, _mm256_set1_epi8(-127));
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(q), bytes);
  // Sums of eight unsigned bytes each: those of q + 128.
  const __m256i sums = _mm256_sad_epu8(_mm256_xor_si256(bytes, _mm256_set1_epi8(-128)), _mm256_setzero_si256());
  const __m128i two = _mm_add_epi64(_mm256_castsi256_si128(sums), _mm256_extracti128_si256(sums, 1));
  return _mm_cvtsi128_si32(two) + _mm_extract_epi32(two, 2) - 32 * 128;
}


// acc + w x, where w * x summed over two neighbours must fit 16 bits: the instruction saturates.
inline __m256i DotBytes(__m256i acc, __m256i w, __m256i x) {
  return _mm256_add_epi32(acc, _mm256_madd_epi16(_mm256_maddubs_epi16(w, x), _mm256_set1_epi16(1)));
}

// Bytes as |w| and w: |w| times x with the sign of w. Two products are at most 2 * 128 * 127 < 2^15.
struct Int8Step {
  __m256i magnitude[2];
  __m256i value[2];
};
inline Int8Step LoadInt8(const uint8_t* from) {
  Int8Step step;
  for (int h = 0; h < 2; ++h) {
    step.value[h] = _mm256_xor_si256(LoadHalfVector(from + 32 * h), _mm256_set1_epi8(-128));
    step.magnitude[h] = _mm256_abs_epi8(step.value[h]);
  }
  return step;
}
inline I32x16 DotInt8(const I32x16& acc, const Int8Step& w, const int8_t* x) {
  const __m256i four = BroadcastBytes(x);
  return {{DotBytes(acc.half[0], w.magnitude[0], _mm256_sign_epi8(four, w.value[0])),
           DotBytes(acc.half[1], w.magnitude[1], _mm256_sign_epi8(four, w.value[1]))}};
}

// Two products are at most 2 * 15 * 127.
struct Int4Step {
  __m256i low[2];
  __m256i high[2];
};
inline Int4Step LoadInt4(const uint8_t* from) {
  const __m256i nibble = _mm256_set1_epi8(15);
  Int4Step step;
  for (int h = 0; h < 2; ++h) {
    const __m256i bytes = LoadHalfVector(from + 32 * h);
    step.low[h] = _mm256_and_si256(bytes, nibble);
    step.high[h] = _mm256_and_si256(_mm256_srli_epi16(bytes, 4), nibble);
  }
  return step;
}
// Both products fit 16 bits together: 4 * 15 * 127 < 2^15.
inline I32x16 DotInt4(const I32x16& acc, const Int4Step& w, const int8_t* x) {
  const __m256i first = BroadcastBytes(x), second = BroadcastBytes(x + 4), ones = _mm256_set1_epi16(1);
  I32x16 out;
  for (int h = 0; h < 2; ++h) {
    const __m256i sums =
        _mm256_add_epi16(_mm256_maddubs_epi16(w.low[h], first), _mm256_maddubs_epi16(w.high[h], second));
    out.half[h] = _mm256_add_epi32(acc.half[h], _mm256_madd_epi16(sums, ones));
  }
  return out;
}

inline F32x16 Div(const F32x16& a, const F32x16& b) {
  return {{_mm256_div_ps(a.half[0], b.half[0]), _mm256_div_ps(a.half[1], b.half[1])}};
}
inline F32x16 Max(const F32x16& a, const F32x16& b) {
  return {{_mm256_max_ps(a.half[0], b.half[0]), _mm256_max_ps(a.half[1], b.half[1])}};
}
inline F32x16 Min(const F32x16& a, const F32x16& b) {
  return {{_mm256_min_ps(a.half[0], b.half[0]), _mm256_min_ps(a.half[1], b.half[1])}};
}
// The exponents whose bits are those of 0 and of infinity; NaN stays NaN.
inline __m256 ClampExponent(__m256 x) {
  return _mm256_max_ps(_mm256_set1_ps(-127.0f), _mm256_min_ps(_mm256_set1_ps(128.0f), x));
}
inline F32x16 Fraction(const F32x16& x) {
  F32x16 out;
  for (int h = 0; h < 2; ++h) {
    const __m256 clamped = ClampExponent(x.half[h]);
    out.half[h] = _mm256_sub_ps(clamped, _mm256_floor_ps(clamped));
  }
  return out;
}
inline F32x16 TimesPowerOfTwo(const F32x16& a, const F32x16& x) {
  F32x16 power;
  for (int h = 0; h < 2; ++h) {
    const __m256i exponent = _mm256_cvtps_epi32(_mm256_floor_ps(ClampExponent(x.half[h])));
    power.half[h] = _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_add_epi32(exponent, _mm256_set1_epi32(127)), 23));
  }
  return Mul(a, power);
}
inline F32x16 SelectLanes(int begin, int end, const F32x16& a, const F32x16& b) {
  F32x16 out;
  for (int h = 0; h < 2; ++h) {
    const __m256i lane = _mm256_add_epi32(_mm256_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7), _mm256_set1_epi32(8 * h));
    const __m256i is_outside = _mm256_or_si256(_mm256_cmpgt_epi32(_mm256_set1_epi32(begin), lane),
                                               _mm256_cmpgt_epi32(lane, _mm256_set1_epi32(end - 1)));
    out.half[h] = _mm256_blendv_ps(a.half[h], b.half[h], _mm256_castsi256_ps(is_outside));
  }
  return out;
}
inline float MaxLane(const F32x16& a) {
  const __m256 eight = _mm256_max_ps(a.half[0], a.half[1]);
  const __m128 four = _mm_max_ps(_mm256_castps256_ps128(eight), _mm256_extractf128_ps(eight, 1));
  const __m128 two = _mm_max_ps(four, _mm_movehl_ps(four, four));
  return _mm_cvtss_f32(_mm_max_ss(two, _mm_movehdup_ps(two)));
}
inline float SumLanes(const F32x16& a) {
  const __m256 eight = _mm256_add_ps(a.half[0], a.half[1]);
  const __m128 four = _mm_add_ps(_mm256_castps256_ps128(eight), _mm256_extractf128_ps(eight, 1));
  const __m128 two = _mm_add_ps(four, _mm_movehl_ps(four, four));
  return _mm_cvtss_f32(_mm_add_ss(two, _mm_movehdup_ps(two)));
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
  __m256i half[2];
};
inline SignedStep LoadSigned(const uint8_t* from) { return {{LoadHalfVector(from), LoadHalfVector(from + 32)}}; }
// Two products are at most 2 * 127 * 128 < 2^15.
inline I32x16 DotSigned(const I32x16& acc, const SignedStep& v, const uint8_t* p) {
  const __m256i four = BroadcastBytes(reinterpret_cast<const int8_t*>(p));
  return {{DotBytes(acc.half[0], four, v.half[0]), DotBytes(acc.half[1], four, v.half[1])}};
}
inline I32x16 AddInt(const I32x16& a, const I32x16& b) {
  return {{_mm256_add_epi32(a.half[0], b.half[0]), _mm256_add_epi32(a.half[1], b.half[1])}};
}
inline I32x16 Join(const I32x16& high, const I32x16& low) {
  return AddInt({{_mm256_slli_epi32(high.half[0], kDigitBits), _mm256_slli_epi32(high.half[1], kDigitBits)}}, low);
}
// Four vectors of nearest whole numbers, which must be in [0, 2^14), as their upper and lower seven bits: lanes 4 i to
// 4 i + 3 of vector j go to bytes 16 i + 4 j and on, where DotSigned wants four consecutive ones.
inline void StoreSplit(uint8_t* high, uint8_t* low, const F32x16 (&a)[4]) {
  const __m256i bits = _mm256_set1_epi16(127);
  for (int h = 0; h < 2; ++h) {
    const __m256i first = _mm256_packs_epi32(_mm256_cvtps_epi32(a[0].half[h]), _mm256_cvtps_epi32(a[1].half[h]));
    const __m256i second = _mm256_packs_epi32(_mm256_cvtps_epi32(a[2].half[h]), _mm256_cvtps_epi32(a[3].half[h]));
    const __m256i upper = _mm256_packus_epi16(_mm256_srli_epi16(first, 7), _mm256_srli_epi16(second, 7));
    const __m256i lower = _mm256_packus_epi16(_mm256_and_si256(first, bits), _mm256_and_si256(second, bits));
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(high + 32 * h), upper);
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(low + 32 * h), lower);
  }
}

}  // namespace avx2
}  // namespace headrace
