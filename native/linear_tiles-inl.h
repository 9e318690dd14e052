// Products with the tiles of AMX (simd/amx-inl.h): bfloat16 weights where they lie, integer ones unpacked to float16.
//
// 32 columns are one step. In a step, a panel of 16 outputs is one tile of B, which is how packed_matrix.h lays out pairs
// of bfloat16 already. Integers of a group become scale * q, rounded to float16, in memory that stays in a cache; a
// product of tiles takes as long for one row as for sixteen, so that unpacking once serves them all and a batch of
// sixteen reads weights as fast as a single row does. Rows of x lie in tiles of A, step by step.
#ifdef __AMX_TILE__

#include <algorithm>
#include <cstring>

#include "simd/amx-inl.h"

namespace headrace {
namespace HEADRACE_TARGET {
namespace {

static_assert(kTileColumns == kGroup && kTileRows == kLanes);

#ifdef __AVX512FP16__
constexpr bool kHasHalfTiles = true;
#else
constexpr bool kHasHalfTiles = false;
#endif

inline int64_t NumSteps(const PackedView& w) { return (w.padded_columns + kTileColumns - 1) / kTileColumns; }

// Rows of x as tiles of A: for each step R rows of 64 bytes, and at the end of a tile, of integer weights, what each of
// its rows is to be multiplied by. One place more for each row holds that.
inline int64_t TileRowBytes(const LinearCall& call) { return (NumSteps(call.weight) + 1) * kTileRowBytes; }

// Those tiles. R is the same for all: what lies in place of a row that one has less adds to a product that nobody
// reads.
class PreparedTiles {
 public:
  PreparedTiles(RowTiles tiles, const Activations& activations)
      : tiles_(tiles), num_rows_(tiles.MaxRows()), activations_(activations) {}
  Range Rows(int64_t tile) const { return tiles_.Rows(tile); }
  int num_rows() const { return static_cast<int>(num_rows_); }
  int64_t step_bytes() const { return num_rows_ * kTileRowBytes; }
  int64_t tile_bytes() const { return num_rows_ * activations_.row_bytes; }
  char* At(int64_t tile) const { return activations_.values + tile * tile_bytes(); }
  float* Scales(const PackedView& w, int64_t tile) const {
    return reinterpret_cast<float*>(At(tile) + NumSteps(w) * step_bytes());
  }

 private:
  RowTiles tiles_;
  int64_t num_rows_;
  Activations activations_;
};

// x times a power of two that brings the largest magnitude of its row into [2^14, 2^15), or times 2^126 if that is not
// enough, as float16: off by at most 2^-12 of itself or 2^-39 of that largest one. Rows below 2^-120 count as zeros; NaN,
// infinity or a magnitude of 2^111 makes its row NaN. As where x becomes int8 (prepare-inl.h).
constexpr int kHalfExponent = 14;
// Unpacked weights are too small by this power of two, so that both they and what integers' bits are multiplied by
// (LoadGroupScales) are float16. Those of int4 are exact: four bits of a scale times four, no less than 2^-24. Those of
// int8 are off by at most 2^-12 of themselves.
constexpr int kUnpackedExponent = 8;

#ifdef __AVX512FP16__

template <class X>
uint32_t LargestExponentOf(const X* x, int64_t columns) {
  uint32_t largest = 0;
  int64_t k = 0;
  for (; k + 2 * kLanes <= columns; k += 2 * kLanes) {
    largest = std::max(largest, LargestExponent(LoadAsFloat32(x + k), LoadAsFloat32(x + k + kLanes)));
  }
  if (k == columns) return largest;
  X rest[2 * kLanes] = {};
  memcpy(rest, x + k, (columns - k) * sizeof(X));
  return std::max(largest, LargestExponent(LoadAsFloat32(rest), LoadAsFloat32(rest + kLanes)));
}

// Four columns lie in the order 0 2 1 3, as those of unpacked integers do.
inline void StoreHalves(char* to, F32x16 first, F32x16 second, F32x16 factor) {
  const __m256i low = _mm512_cvtps_ph(Mul(first, factor), _MM_FROUND_TO_NEAREST_INT);
  const __m256i high = _mm512_cvtps_ph(Mul(second, factor), _MM_FROUND_TO_NEAREST_INT);
  const __m512i halves = _mm512_inserti64x4(_mm512_castsi256_si512(low), high, 1);
  const __m512i order = _mm512_set4_epi32(0x0f0e0b0a, 0x0d0c0908, 0x07060302, 0x05040100);
  _mm512_store_si512(to, _mm512_shuffle_epi8(halves, order));
}

template <class X>
void PrepareHalves(const X* x, int64_t columns, Range steps, char* to, int64_t step_bytes, float* scale) {
  constexpr uint32_t kTooLarge = 127 + 111, kTooSmall = 127 - 120;
  const uint32_t largest = LargestExponentOf(x, columns);
  const bool is_empty = largest < kTooSmall, is_too_large = largest >= kTooLarge;
  const uint32_t exponent = is_empty || is_too_large ? 127 : std::max<uint32_t>(largest, kHalfExponent + 1) - kHalfExponent;
  *scale = FromBits(is_too_large ? 0x7fc00000 : (exponent + kUnpackedExponent) << 23);
  const F32x16 factor = Broadcast(is_empty ? 0.0f : FromBits((254 - exponent) << 23));
  for (int64_t step = steps.begin; step < steps.end; ++step) {
    const int64_t k = step * kTileColumns;
    X padded[kTileColumns] = {};
    const X* from = x + k;
    if (columns - k < kTileColumns) from = static_cast<const X*>(memcpy(padded, from, (columns - k) * sizeof(X)));
    StoreHalves(to + step * step_bytes, LoadAsFloat32(from), LoadAsFloat32(from + kLanes), factor);
  }
}

// A group's scales, each of them twice, for the two entries along K that lie side by side: times two powers of two, and
// times minus the offset that integers are stored with, times a third.
struct GroupScales {
  __m512h low;     // 2^(24 - kUnpackedExponent)
  __m512h high;    // 2^(20 - kUnpackedExponent)
  __m512h offset;  // 2^-kUnpackedExponent
};

// A byte in the high half of a word and one place further right has its exponent and the rest where float16 has them,
// only that the sign is there twice. With the second one set it is the scale times 2^16.
inline GroupScales LoadGroupScales(const uint8_t* scales, int bias) {
  constexpr int kAndThenOr = 0xea;
  static_assert(24 - kUnpackedExponent == 16);
  const __m512i bytes = _mm512_broadcast_i32x4(_mm_loadu_si128(reinterpret_cast<const __m128i*>(scales)));
  const __m512i to_words =
      _mm512_set_epi32(0x0fff0fff, 0x0eff0eff, 0x0dff0dff, 0x0cff0cff, 0x0bff0bff, 0x0aff0aff, 0x09ff09ff, 0x08ff08ff,
                       0x07ff07ff, 0x06ff06ff, 0x05ff05ff, 0x04ff04ff, 0x03ff03ff, 0x02ff02ff, 0x01ff01ff, 0x00ff00ff);
  const __m512i words = _mm512_srai_epi16(_mm512_shuffle_epi8(bytes, to_words), 1);
  const __m512i sign_and_rest = _mm512_set1_epi16(static_cast<short>(0xbfff)), second = _mm512_set1_epi16(0x4000);
  const auto low = _mm512_castsi512_ph(_mm512_ternarylogic_epi32(words, sign_and_rest, second, kAndThenOr));
  const auto times = [&](float factor) { return _mm512_mul_ph(low, _mm512_set1_ph(static_cast<_Float16>(factor))); };
  return {low, times(0x1p-4f), times(static_cast<float>(-bias) * 0x1p-24f)};
}

// A tile row of scale * q * 2^-kUnpackedExponent. The bits of a small integer are those of a subnormal
// float16, the integer times 2^-24; times 2^4 if it lies four bits higher.
inline void UnpackRow(__m512i bits, __m512i mask, __m512h scale, __m512h offset, char* to) {
  _mm512_store_ph(to, _mm512_fmadd_ph(_mm512_castsi512_ph(_mm512_and_si512(bits, mask)), scale, offset));
}

// One vector of a step: four tile rows of int4, two of int8. Its even bytes are entries of the one row, its odd bytes
// those of the next.
inline void UnpackInt4(__m512i bytes, const GroupScales& scale, char* to) {
  const __m512i low = _mm512_set1_epi16(0x000f), high = _mm512_set1_epi16(0x00f0);
  const __m512i odd = _mm512_srli_epi16(bytes, 8);
  UnpackRow(bytes, low, scale.low, scale.offset, to);
  UnpackRow(odd, low, scale.low, scale.offset, to + kTileRowBytes);
  UnpackRow(bytes, high, scale.high, scale.offset, to + 2 * kTileRowBytes);
  UnpackRow(odd, high, scale.high, scale.offset, to + 3 * kTileRowBytes);
}

inline void UnpackInt8(__m512i bytes, const GroupScales& scale, char* to) {
  const __m512i low = _mm512_set1_epi16(0x00ff);
  UnpackRow(bytes, low, scale.low, scale.offset, to);
  UnpackRow(_mm512_srli_epi16(bytes, 8), low, scale.low, scale.offset, to + kTileRowBytes);
}

struct Int8Tiles {
  using Dot = Fp16Dot;
  static constexpr bool kIsUnpacked = true;
  static constexpr int kStepVectors = kGroup / VectorColumns(Format::kInt8);
  using Scale = GroupScales;
  static GroupScales LoadScale(const uint8_t* scales) { return LoadGroupScales(scales, kInt8Bias); }
  static void Unpack(__m512i w, const GroupScales& scale, char* to) { UnpackInt8(w, scale, to); }
};

struct Int4Tiles {
  using Dot = Fp16Dot;
  static constexpr bool kIsUnpacked = true;
  static constexpr int kStepVectors = kGroup / VectorColumns(Format::kInt4);
  using Scale = GroupScales;
  static GroupScales LoadScale(const uint8_t* scales) { return LoadGroupScales(scales, kInt4Bias); }
  static void Unpack(__m512i w, const GroupScales& scale, char* to) { UnpackInt4(w, scale, to); }
};

#endif

struct Bfloat16Tiles {
  using Dot = Bf16Dot;
  static constexpr bool kIsUnpacked = false;
  static constexpr int kStepVectors = kGroup / VectorColumns(Format::kBfloat16);
};

inline void PrepareBfloat16(const uint16_t* x, int64_t columns, Range steps, char* to, int64_t step_bytes) {
  for (int64_t step = steps.begin; step < steps.end; ++step) {
    const int64_t k = step * kTileColumns, count = std::min<int64_t>(columns - k, kTileColumns);
    char* row = to + step * step_bytes;
    if (count == kTileColumns) {
      memcpy(row, x + k, kTileRowBytes);
      continue;
    }
    memcpy(row, x + k, count * sizeof(uint16_t));
    memset(row + count * sizeof(uint16_t), 0, (kTileColumns - count) * sizeof(uint16_t));
  }
}

inline void PrepareTiles(const LinearCall& call, RowTiles tiles, Range steps, const Activations& activations) {
  if (steps.begin == steps.end) return;
  const PreparedTiles prepared(tiles, activations);
  const int64_t columns = call.weight.columns, step_bytes = prepared.step_bytes();
  for (int64_t t = 0; t < tiles.num_tiles; ++t) {
    const Range rows = tiles.Rows(t);
    for (int64_t r = 0; r < rows.end - rows.begin; ++r) {
      const int64_t at = (rows.begin + r) * call.x_stride;
      char* to = prepared.At(t) + r * kTileRowBytes;
      if (!IsQuantized(call.weight.format)) {
        PrepareBfloat16(static_cast<const uint16_t*>(call.x) + at, columns, steps, to, step_bytes);
        continue;
      }
#ifdef __AVX512FP16__
      // Every thread finds all scales: that is quicker than to wait for the others in between. The first writes them.
      float unused, *scale = steps.begin == 0 ? prepared.Scales(call.weight, t) + r : &unused;
      if (call.dtype == DType::kFloat32) {
        PrepareHalves(static_cast<const float*>(call.x) + at, columns, steps, to, step_bytes, scale);
      } else {
        PrepareHalves(static_cast<const uint16_t*>(call.x) + at, columns, steps, to, step_bytes, scale);
      }
#endif
    }
  }
}

}  // namespace
}  // namespace HEADRACE_TARGET
}  // namespace headrace

#endif
