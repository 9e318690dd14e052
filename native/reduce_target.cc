// Sums over ranks on one target. Compiled once for each, with that target's flags.
#include "reduce.h"

#include <cstring>

#include "elements-inl.h"

namespace headrace {
namespace HEADRACE_TARGET {
namespace {

// Sums of so many elements at a time stay in the first-level cache.
constexpr int64_t kBlock = 1024;
constexpr int64_t kGroupSize = GroupedRows::kGroupSize;
constexpr float kLargest = 127.0f;
// Smaller maxima count as zero: their inverse would overflow.
constexpr float kLeastMaximum = 1e-30f;
constexpr uint32_t kInfinityBits = 0x7f800000;

template <class In>
void SumBlock(const std::vector<const void*>& in, int64_t begin, int64_t count, float* sum) {
  const In* first = static_cast<const In*>(in[0]) + begin;
  for (int64_t i = 0; i < count; ++i) sum[i] = ToFloat(first[i]);
  for (size_t rank = 1; rank < in.size(); ++rank) {
    const In* summand = static_cast<const In*>(in[rank]) + begin;
    for (int64_t i = 0; i < count; ++i) sum[i] += ToFloat(summand[i]);
  }
}

template <class In, class Out>
void SumTo(const std::vector<const void*>& in, int64_t count, Out* out) {
  float sum[kBlock];
  for (int64_t begin = 0; begin < count; begin += kBlock) {
    const int64_t size = std::min(kBlock, count - begin);
    SumBlock<In>(in, begin, size, sum);
    for (int64_t i = 0; i < size; ++i) Round(sum[i], out + begin + i);
  }
}

template <class In>
void SumOf(const std::vector<const void*>& in, int64_t count, void* out, DType out_dtype) {
  if (out_dtype == DType::kFloat32) return SumTo<In>(in, count, static_cast<float*>(out));
  SumTo<In>(in, count, static_cast<uint16_t*>(out));
}

void Sum(const std::vector<const void*>& in, DType dtype, int64_t count, void* out, DType out_dtype) {
  if (dtype == DType::kFloat32) return SumOf<float>(in, count, out, out_dtype);
  SumOf<uint16_t>(in, count, out, out_dtype);
}

// Compared as bits, by which NaN is larger than infinity, and that than any number.
uint32_t MaximumBits(const float* x, int64_t size) {
  uint32_t maximum = 0;
  for (int64_t i = 0; i < size; ++i) maximum = std::max(maximum, Bits(x[i]) & 0x7fffffff);
  return maximum;
}

float QuantizeGroup(const float* x, int64_t size, int8_t* values) {
  const uint32_t maximum_bits = MaximumBits(x, size);
  const float maximum = FromBits(maximum_bits);
  if (maximum_bits >= kInfinityBits || maximum < kLeastMaximum) {
    memset(values, 0, static_cast<size_t>(size));
    return maximum_bits >= kInfinityBits ? FromBits(0x7fc00000) : 0.0f;
  }
  const float inverse = kLargest / maximum;
  // Adding 1.5 * 2^23 rounds to an integer, to nearest even.
  for (int64_t i = 0; i < size; ++i) {
    values[i] = static_cast<int8_t>(static_cast<int32_t>((x[i] * inverse + 0x1.8p23f) - 0x1.8p23f));
  }
  return maximum / kLargest;
}

// Calls function(i, first, size) for the i-th of the groups, whose values are the first-th and following of them.
template <class Function>
void ForEachGroup(const GroupedRows& rows, Range groups, const Function& function) {
  const int64_t begin = rows.Start(groups.begin);
  for (int64_t group = groups.begin; group < groups.end; ++group) {
    const int64_t start = rows.Start(group);
    function(group - groups.begin, start - begin, rows.Start(group + 1) - start);
  }
}

template <class In>
void QuantizeAs(const GroupedRows& rows, Range groups, const In* x, char* message) {
  x += rows.Start(groups.begin);
  auto* values = reinterpret_cast<int8_t*>(message + 4 * (groups.end - groups.begin));
  ForEachGroup(rows, groups, [&](int64_t i, int64_t first, int64_t size) {
    float group[kGroupSize];
    for (int64_t k = 0; k < size; ++k) group[k] = ToFloat(x[first + k]);
    const float scale = QuantizeGroup(group, size, values + first);
    memcpy(message + 4 * i, &scale, sizeof scale);
  });
}

void Quantize(const GroupedRows& rows, Range groups, DType dtype, const void* x, char* message) {
  if (dtype == DType::kFloat32) return QuantizeAs(rows, groups, static_cast<const float*>(x), message);
  QuantizeAs(rows, groups, static_cast<const uint16_t*>(x), message);
}

void SumQuantized(const GroupedRows& rows, Range groups, const std::vector<const char*>& messages, float* sum) {
  ForEachGroup(rows, groups, [&](int64_t i, int64_t first, int64_t size) {
    for (size_t rank = 0; rank < messages.size(); ++rank) {
      const char* message = messages[rank];
      const auto* values = reinterpret_cast<const int8_t*>(message + 4 * (groups.end - groups.begin)) + first;
      float scale;
      memcpy(&scale, message + 4 * i, sizeof scale);
      float* out = sum + first;
      if (rank == 0) {
        for (int64_t k = 0; k < size; ++k) out[k] = scale * static_cast<float>(values[k]);
      } else {
        for (int64_t k = 0; k < size; ++k) out[k] += scale * static_cast<float>(values[k]);
      }
    }
  });
}

}  // namespace

extern const ReduceKernels kReduce;
const ReduceKernels kReduce = {&Sum, &Quantize, &SumQuantized};

}  // namespace HEADRACE_TARGET
}  // namespace headrace
