// Activations as the integer kernels read them, and as the bfloat16 kernels of machines without such instructions do.

namespace headrace {
namespace HEADRACE_TARGET {
namespace {

// Quantizes a group: scale = 2^(floor(log2(max|x|)) - 6), q = round(x / scale), ties to even, clamped to -127 .. 127.
// These are the blocks of MXINT8 (OCP Microscaling Formats 1.0): dividing by a power of two is exact, and so is
// multiplying with one, which spares the inner loops a rounding and an instruction. Groups below 2^-120 count as zeros;
// from 2^111 on scales leave the range of `shift` (linear.h).
template <class X>
void QuantizeGroup(const X* x, int offset, int8_t* q, int32_t* start, float* shift) {
  static_assert(kGroup == 2 * kLanes);
  constexpr uint32_t kTooLarge = 127 + 111;
  constexpr uint32_t kTooSmall = 127 - 120;
  constexpr uint32_t kUnitShift = 0x4b400000;  // the bits of 1.5 * 2^23
  const F32x16 first = LoadAsFloat32(x), second = LoadAsFloat32(x + kLanes);
  const uint32_t largest = LargestExponent(first, second);
  if (largest >= kTooLarge || largest < kTooSmall) {
    memset(q, 0, kGroup);
    *start = static_cast<int32_t>(kUnitShift);
    *shift = FromBits(largest >= kTooLarge ? 0x7fc00000 : kUnitShift);  // NaN, or that of a scale of 1
    return;
  }
  const uint32_t scale = largest - 6;  // as an exponent's bits
  const float inverse = FromBits((254 - scale) << 23);
  const int32_t sum = RoundToBytes(first, second, inverse, q);
  const uint32_t shift_bits = kUnitShift + ((scale - 127) << 23);
  *shift = FromBits(shift_bits);
  *start = static_cast<int32_t>(shift_bits) - offset * sum;
}

// One group of a tile of x, see Activations; rows are those of the tile.
struct GroupRecord {
  int8_t* q;
  int32_t* starts;
  float* shifts;
};
constexpr int kGroupRowBytes = kGroup + sizeof(int32_t) + sizeof(float);

inline GroupRecord RecordAt(char* tile, int64_t num_rows, int64_t group) {
  char* record = tile + group * num_rows * kGroupRowBytes;
  return {reinterpret_cast<int8_t*>(record), reinterpret_cast<int32_t*>(record + num_rows * kGroup),
          reinterpret_cast<float*>(record + num_rows * (kGroup + sizeof(int32_t)))};
}

template <class X>
void QuantizeTile(const LinearCall& call, Range rows, Range groups, const Activations& activations) {
  const int64_t columns = call.weight.columns;
  const int offset = call.weight.format == Format::kInt8 ? kInt8Offset : kInt4Offset;
  char* tile = activations.values + rows.begin * activations.row_bytes;
  const int64_t num_rows = rows.end - rows.begin;
  X padded[kGroup] = {};
  for (int64_t r = 0; r < num_rows; ++r) {
    const X* x = static_cast<const X*>(call.x) + (rows.begin + r) * call.x_stride;
    for (int64_t g = groups.begin; g < groups.end; ++g) {
      const int64_t k = g * kGroup;
      const GroupRecord record = RecordAt(tile, num_rows, g);
      const X* from = x + k;
      if (columns - k < kGroup) from = static_cast<const X*>(memcpy(padded, from, (columns - k) * sizeof(X)));
      QuantizeGroup(from, offset, record.q + r * kGroup, record.starts + r, record.shifts + r);
    }
  }
}

// Columns [columns.begin, columns.end), zeros where x has none.
template <class X, class Out>
void ExpandRow(const X* x, int64_t num_columns, Range columns, Out* out) {
  const int64_t end = columns.end < num_columns ? columns.end : num_columns;
  for (int64_t k = columns.begin; k < end; ++k) {
    if constexpr (sizeof(X) == sizeof(Out)) {
      out[k] = x[k];
    } else {
      out[k] = ToFloat32(x[k]);
    }
  }
  for (int64_t k = end; k < columns.end; ++k) out[k] = 0;
}

inline int64_t VectorRowBytes(const LinearCall& call) {
  const PackedView& w = call.weight;
  switch (w.format) {
    case Format::kFloat32:
      return 0;
    case Format::kBfloat16:
      // Pairs are read where they are, unless the last one is incomplete.
      return sizeof(Bf16X) == 2 && w.columns % 2 == 0 ? 0 : RoundUp(w.padded_columns * sizeof(Bf16X), 64);
    case Format::kInt8:
    case Format::kInt4:
      return w.num_groups * kGroupRowBytes;
  }
  return 0;
}

template <class X>
void PrepareTile(const LinearCall& call, Range rows, Range groups, const Activations& activations) {
  const PackedView& w = call.weight;
  if (IsQuantized(w.format)) return QuantizeTile<X>(call, rows, groups, activations);
  if constexpr (sizeof(X) == 2) {
    const int64_t end = groups.end * kGroup;
    const Range columns = {groups.begin * kGroup, end < w.padded_columns ? end : w.padded_columns};
    for (int64_t m = rows.begin; m < rows.end; ++m) {
      const X* x = static_cast<const X*>(call.x) + m * call.x_stride;
      ExpandRow(x, w.columns, columns, reinterpret_cast<Bf16X*>(activations.values + m * activations.row_bytes));
    }
  }
}

inline void PrepareVectors(const LinearCall& call, RowTiles tiles, Range groups, const Activations& activations) {
  for (int64_t t = 0; t < tiles.num_tiles; ++t) {
    if (call.dtype == DType::kFloat32) {
      PrepareTile<float>(call, tiles.Rows(t), groups, activations);
    } else {
      PrepareTile<uint16_t>(call, tiles.Rows(t), groups, activations);
    }
  }
}

}  // namespace
}  // namespace HEADRACE_TARGET
}  // namespace headrace
