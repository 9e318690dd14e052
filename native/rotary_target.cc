// Rotation and cache writes of one target. Compiled once for each, with that target's flags, for the loops that compilers
// turn into vectors; results are the same on all of them.
#include "rotary.h"

#include <cstring>

#include "float_bits.h"

namespace headrace {
namespace HEADRACE_TARGET {
namespace {

inline float ToFloat32(float value) { return value; }
inline float ToFloat32(uint16_t value) { return FromBfloat16(value); }
inline void FromFloat32(float value, float* out) { *out = value; }
inline void FromFloat32(float value, uint16_t* out) { *out = ToBfloat16(value); }

constexpr int kChunk = 16;

// How the entries of a pair lie: where pair i begins, and how far its second entry is. As types, since only a stride that
// is known lets compilers make vectors.
struct Halves {
  static constexpr int64_t kStride = 1;
  static int64_t Distance(const StoreKvCall& call) { return call.half; }
};
struct Interleaved {
  static constexpr int64_t kStride = 2;
  static int64_t Distance(const StoreKvCall&) { return 1; }
};

// Pairs [0, kCount).
template <class Pairs, int kCount, class T>
inline void RotatePairs(const float* cos, const float* sin, T* first, T* second) {
  float a[kCount], b[kCount];
  for (int i = 0; i < kCount; ++i) {
    a[i] = ToFloat32(first[i * Pairs::kStride]);
    b[i] = ToFloat32(second[i * Pairs::kStride]);
  }
  for (int i = 0; i < kCount; ++i) FromFloat32(a[i] * cos[i] - b[i] * sin[i], first + i * Pairs::kStride);
  for (int i = 0; i < kCount; ++i) FromFloat32(b[i] * cos[i] + a[i] * sin[i], second + i * Pairs::kStride);
}

template <class Pairs, class T>
void RotateHead(const StoreKvCall& call, int64_t token, T* head) {
  const float* cos = call.cos + token * call.half;
  const float* sin = call.sin + token * call.half;
  T* second = head + Pairs::Distance(call);
  int64_t i = 0;
  for (; i + kChunk <= call.half; i += kChunk) {
    RotatePairs<Pairs, kChunk>(cos + i, sin + i, head + i * Pairs::kStride, second + i * Pairs::kStride);
  }
  for (; i < call.half; ++i) {
    RotatePairs<Pairs, 1>(cos + i, sin + i, head + i * Pairs::kStride, second + i * Pairs::kStride);
  }
}

template <class T>
void Rotate(const StoreKvCall& call, int64_t token, T* head) {
  if (call.is_interleaved) return RotateHead<Interleaved>(call, token, head);
  RotateHead<Halves>(call, token, head);
}

// max|x| / 127; NaN if an entry is not finite, 0 if it would be no normal number.
float ScaleOf(const float* x, int64_t head_dim) {
  uint32_t largest_bits = 0;
  for (int64_t d = 0; d < head_dim; ++d) {
    const uint32_t bits = Bits(x[d]) & 0x7fffffff;
    largest_bits = bits > largest_bits ? bits : largest_bits;
  }
  if (largest_bits >= 0x7f800000) return FromBits(0x7fc00000);
  const float scale = FromBits(largest_bits) / 127.0f;
  return scale < 0x1p-126f ? 0.0f : scale;
}

// Adding 1.5 * 2^23 rounds to nearest, ties to even. |x * inverse| is at most 127 (1 + 2^-22).
int32_t Quantized(float x, float inverse) {
  constexpr float kShift = 12582912.0f;
  return static_cast<int32_t>(Bits(x * inverse + kShift) - Bits(kShift));
}

void StoreInt8(const KvLayout& layout, const float* key, const float* value, int64_t lane, uint8_t* panel) {
  float key_scale = ScaleOf(key, layout.shape.head_dim), value_scale = ScaleOf(value, layout.shape.head_dim);
  if (key_scale != key_scale || value_scale != value_scale) key_scale = value_scale = FromBits(0x7fc00000);
  auto* scales = reinterpret_cast<float*>(panel + layout.scale_offset);
  scales[lane] = key_scale;
  scales[kPanelPositions + lane] = value_scale;
  const float key_inverse = key_scale > 0 ? 1.0f / key_scale : 0.0f;
  const float value_inverse = value_scale > 0 ? 1.0f / value_scale : 0.0f;
  for (int64_t d = 0; d < layout.shape.head_dim; ++d) {
    const int32_t k = key_inverse > 0 ? Quantized(key[d], key_inverse) : 0;
    const int32_t v = value_inverse > 0 ? Quantized(value[d], value_inverse) : 0;
    panel[layout.KeyOffset(lane, d, VectorColumns(Format::kInt8))] = static_cast<uint8_t>(k + kInt8Bias);
    panel[layout.ValueOffset(lane, d, VectorColumns(Format::kInt8))] = static_cast<uint8_t>(v);
  }
}

template <class T>
void StoreFloat(const KvLayout& layout, const float* key, const float* value, int64_t lane, uint8_t* panel) {
  constexpr int kColumns = 4 / sizeof(T);
  for (int64_t d = 0; d < layout.shape.head_dim; ++d) {
    FromFloat32(key[d], reinterpret_cast<T*>(panel + layout.KeyOffset(lane, d, kColumns)));
    FromFloat32(value[d], reinterpret_cast<T*>(panel + layout.ValueOffset(lane, d, kColumns)));
  }
}

void StoreHead(const StoreKvCall& call, int64_t token, int64_t kv_head, const float* key, const float* value) {
  const KvLayout& layout = call.layout;
  const int64_t block = call.slot_mapping[token] / layout.shape.block_size;
  const int64_t offset = call.slot_mapping[token] % layout.shape.block_size;
  const int64_t lane = offset % kPanelPositions;
  uint8_t* panel = call.cache + layout.PanelOffset(block, kv_head, offset / kPanelPositions);
  switch (layout.shape.format) {
    case Format::kFloat32:
      return StoreFloat<float>(layout, key, value, lane, panel);
    case Format::kBfloat16:
      return StoreFloat<uint16_t>(layout, key, value, lane, panel);
    case Format::kInt8:
    case Format::kInt4:
      return StoreInt8(layout, key, value, lane, panel);
  }
}

template <class T>
void RotateAndStore(const StoreKvCall& call, Range tokens) {
  const int64_t head_dim = call.layout.shape.head_dim;
  float key[kMaxHeadDim], value[kMaxHeadDim];
  for (int64_t token = tokens.begin; token < tokens.end; ++token) {
    auto* query = static_cast<T*>(call.query) + token * call.query_stride;
    for (int64_t head = 0; head < call.num_heads && call.cos != nullptr; ++head) {
      Rotate(call, token, query + head * head_dim);
    }
    if (call.slot_mapping[token] == kNotStored) continue;
    for (int64_t head = 0; head < call.layout.shape.num_kv_heads; ++head) {
      const T* k = static_cast<const T*>(call.key) + token * call.key_stride + head * head_dim;
      const T* v = static_cast<const T*>(call.value) + token * call.value_stride + head * head_dim;
      for (int64_t d = 0; d < head_dim; ++d) {
        key[d] = ToFloat32(k[d]);
        value[d] = ToFloat32(v[d]);
      }
      if (call.cos != nullptr) Rotate(call, token, key);
      StoreHead(call, token, head, key, value);
    }
  }
}

void RotateAndStoreTokens(const StoreKvCall& call, Range tokens) {
  if (call.dtype == DType::kFloat32) {
    RotateAndStore<float>(call, tokens);
  } else {
    RotateAndStore<uint16_t>(call, tokens);
  }
}

}  // namespace

extern const RotaryKernels kRotary;
const RotaryKernels kRotary = {&RotateAndStoreTokens};

}  // namespace HEADRACE_TARGET
}  // namespace headrace
