// Activations as the integer kernels read them, and as the bfloat16 kernels of machines without such instructions do.

namespace headrace {
namespace HEADRACE_TARGET {

inline float ToFloat32(float value) { return value; }
inline float ToFloat32(uint16_t value) { return FromBfloat16(value); }

// Quantizes a group: scale = max|x| / 127, q = round(x / scale), ties to even. Returns the sum of q.
//
// Loops are written so that compilers vectorize them without liberties: the maximum is taken of bit patterns, which
// order magnitudes (infinity and NaN above all numbers); rounding adds and takes off 1.5 * 2^23, whose last bit is 1. q
// needs no clamp: x / scale is at most 127 (1 + 2^-22).
inline int32_t QuantizeGroup(const float* x, int8_t* q, float* scale) {
  uint32_t largest_bits = 0;
  for (int k = 0; k < kGroup; ++k) {
    const uint32_t bits = Bits(x[k]) & 0x7fffffff;
    largest_bits = bits > largest_bits ? bits : largest_bits;
  }
  constexpr uint32_t kInfinity = 0x7f800000;
  constexpr uint32_t kSmallestNormal = 0x00800000;
  if (largest_bits >= kInfinity) {
    memset(q, 0, kGroup);
    *scale = FromBits(0x7fc00000);  // NaN
    return 0;
  }
  const float step = FromBits(largest_bits) / 127.0f;
  const bool is_zero = Bits(step) < kSmallestNormal;
  *scale = is_zero ? 0.0f : step;
  const float inverse = is_zero ? 0.0f : 1.0f / step;
  constexpr float kRound = 12582912.0f;
  int32_t sum = 0;
  for (int k = 0; k < kGroup; ++k) {
    const int32_t rounded = static_cast<int32_t>(Bits(x[k] * inverse + kRound) - Bits(kRound));
    q[k] = static_cast<int8_t>(rounded);
    sum += rounded;
  }
  return sum;
}

template <class X>
void QuantizeRow(const X* x, int64_t columns, int offset, int8_t* q, float* scales, int32_t* starts) {
  for (int64_t k = 0; k < columns; k += kGroup) {
    float group[kGroup] = {};
    const int64_t size = columns - k < kGroup ? columns - k : kGroup;
    for (int64_t i = 0; i < size; ++i) group[i] = ToFloat32(x[k + i]);
    *starts++ = -offset * QuantizeGroup(group, q + k, scales++);
  }
}

template <class X, class Out>
void ExpandRow(const X* x, int64_t columns, int64_t padded_columns, Out* out) {
  for (int64_t k = 0; k < columns; ++k) {
    if constexpr (sizeof(X) == sizeof(Out)) {
      out[k] = x[k];
    } else {
      out[k] = ToFloat32(x[k]);
    }
  }
  for (int64_t k = columns; k < padded_columns; ++k) out[k] = 0;
}

inline int PreparedBytes(const LinearCall& call) {
  switch (call.weight.format) {
    case Format::kFloat32:
      return 0;
    case Format::kBfloat16:
      // Pairs are read where they are, unless the last one is incomplete.
      return sizeof(Bf16X) == 2 && call.weight.columns % 2 == 0 ? 0 : sizeof(Bf16X);
    case Format::kInt8:
    case Format::kInt4:
      return 1;
  }
  return 0;
}

template <class X>
void PrepareRows(const LinearCall& call, Range rows, const Activations& activations) {
  const PackedView& w = call.weight;
  const int offset = w.format == Format::kInt8 ? kInt8Offset : kInt4Offset;
  for (int64_t m = rows.begin; m < rows.end; ++m) {
    const X* x = static_cast<const X*>(call.x) + m * call.x_stride;
    char* out = activations.values + m * activations.row_bytes;
    if (IsQuantized(w.format)) {
      QuantizeRow(x, w.columns, offset, reinterpret_cast<int8_t*>(out), activations.scales + m * w.num_groups,
                  activations.starts + m * w.num_groups);
    } else if constexpr (sizeof(X) == 2) {
      ExpandRow(x, w.columns, w.padded_columns, reinterpret_cast<Bf16X*>(out));
    }
  }
}

inline void Prepare(const LinearCall& call, Range rows, const Activations& activations) {
  if (call.dtype == DType::kFloat32) {
    PrepareRows<float>(call, rows, activations);
  } else {
    PrepareRows<uint16_t>(call, rows, activations);
  }
}

}  // namespace HEADRACE_TARGET
}  // namespace headrace
