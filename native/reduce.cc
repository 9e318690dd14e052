#include "reduce.h"

#include <algorithm>

#include "float_bits.h"

namespace headrace {
namespace {

// Sums of so many elements at a time stay in the first-level cache.
constexpr int64_t kBlock = 1024;

float ToFloat(float value) { return value; }
float ToFloat(uint16_t value) { return FromBfloat16(value); }

template <class In>
void SumBlock(const std::vector<const void*>& in, int64_t begin, int64_t count, float* sum) {
  const In* first = static_cast<const In*>(in[0]) + begin;
  for (int64_t i = 0; i < count; ++i) sum[i] = ToFloat(first[i]);
  for (size_t rank = 1; rank < in.size(); ++rank) {
    const In* summand = static_cast<const In*>(in[rank]) + begin;
    for (int64_t i = 0; i < count; ++i) sum[i] += ToFloat(summand[i]);
  }
}

void Store(const float* sum, int64_t count, float* out) { std::copy(sum, sum + count, out); }
void Store(const float* sum, int64_t count, uint16_t* out) {
  for (int64_t i = 0; i < count; ++i) out[i] = ToBfloat16(sum[i]);
}

template <class In, class Out>
void Sum(const std::vector<const void*>& in, int64_t count, Out* out) {
  float sum[kBlock];
  for (int64_t begin = 0; begin < count; begin += kBlock) {
    const int64_t size = std::min(kBlock, count - begin);
    SumBlock<In>(in, begin, size, sum);
    Store(sum, size, out + begin);
  }
}

template <class In>
void SumTo(const std::vector<const void*>& in, int64_t count, void* out, DType out_dtype) {
  if (out_dtype == DType::kFloat32) {
    Sum<In>(in, count, static_cast<float*>(out));
  } else {
    Sum<In>(in, count, static_cast<uint16_t*>(out));
  }
}

}  // namespace

void SumInRankOrder(const std::vector<const void*>& in, DType dtype, int64_t count, void* out, DType out_dtype) {
  if (dtype == DType::kFloat32) {
    SumTo<float>(in, count, out, out_dtype);
  } else {
    SumTo<uint16_t>(in, count, out, out_dtype);
  }
}

}  // namespace headrace
