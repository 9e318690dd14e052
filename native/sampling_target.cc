// Sampling of one target. Compiled once for each, with that target's flags.
#include "sampling.h"

#include <cmath>

#include "exp-inl.h"

namespace headrace {
namespace HEADRACE_TARGET {
namespace {

// A float's bits as an integer that orders as the floats do, NaN of either sign above infinity.
inline int32_t Order(float value) {
  const auto bits = static_cast<int32_t>(Bits(value));
  const int32_t magnitude = bits & 0x7fffffff;
  const int32_t ordered = bits < 0 ? -magnitude : bits;  // -0 and 0 are equal
  return magnitude > 0x7f800000 ? 0x7fffffff : ordered;
}

int32_t LargestOrder(const float* row, int64_t size) {
  int32_t largest = Order(row[0]);
  for (int64_t k = 0; k < size; ++k) {
    const int32_t order = Order(row[k]);
    largest = order > largest ? order : largest;
  }
  return largest;
}

int64_t FirstOf(const float* row, int64_t size, int32_t order) {
  // In blocks: whether one holds it vectorizes, where in it does not.
  constexpr int64_t kBlock = 256;
  for (int64_t begin = 0; begin < size; begin += kBlock) {
    const int64_t end = begin + kBlock < size ? begin + kBlock : size;
    int32_t num_found = 0;
    for (int64_t k = begin; k < end; ++k) num_found += Order(row[k]) == order;
    for (int64_t k = begin; num_found > 0; ++k) {
      if (Order(row[k]) == order) return k;
    }
  }
  return 0;
}

void ArgmaxOf(const LogitsView& view, Range rows, int64_t* ids, float* values) {
  for (int64_t r = rows.begin; r < rows.end; ++r) {
    const float* row = view.logits + r * view.row_stride;
    ids[r] = FirstOf(row, view.vocab_size, LargestOrder(row, view.vocab_size));
    values[r] = row[ids[r]];
  }
}

// Lane i of 16 takes entries i, i + 16, ... of a block; blocks are added in float64.
double SumOfExp(const float* row, int64_t size, float largest) {
  constexpr int64_t kBlock = 1024;
  double total = 0;
  for (int64_t begin = 0; begin < size; begin += kBlock) {
    const int64_t end = begin + kBlock < size ? begin + kBlock : size;
    float lanes[kWidth] = {};
    ForEachWidth(
        end - begin,
        [&](int64_t k) {
          for (int i = 0; i < kWidth; ++i) lanes[i] += Exp(row[begin + k + i] - largest);
        },
        [&](int64_t k, int rest) {
          for (int i = 0; i < rest; ++i) lanes[i] += Exp(row[begin + k + i] - largest);
        });
    for (const float lane : lanes) total += lane;
  }
  return total;
}

void LogSumExpOf(const LogitsView& view, Range rows, float* out) {
  for (int64_t r = rows.begin; r < rows.end; ++r) {
    const float* row = view.logits + r * view.row_stride;
    int64_t id;
    float largest;
    ArgmaxOf({row, 1, 0, view.vocab_size}, {0, 1}, &id, &largest);
    out[r] = largest;
    if (std::isfinite(largest)) {
      out[r] = static_cast<float>(largest + std::log(SumOfExp(row, view.vocab_size, largest)));
    }
  }
}

int64_t NextAbove(const float* row, int64_t begin, int64_t end, float bound) {
  constexpr int64_t kBlock = 64;
  while (begin < end) {
    const int64_t stop = begin + kBlock < end ? begin + kBlock : end;
    int32_t num_found = 0;
    for (int64_t k = begin; k < stop; ++k) num_found += row[k] > bound;
    if (num_found > 0) break;
    begin = stop;
  }
  while (begin < end && !(row[begin] > bound)) ++begin;
  return begin;
}

}  // namespace

extern const SamplingKernels kSampling;
const SamplingKernels kSampling = {&ArgmaxOf, &LogSumExpOf, &NextAbove};

}  // namespace HEADRACE_TARGET
}  // namespace headrace
