#ifndef HEADRACE_NATIVE_RANGE_H_
#define HEADRACE_NATIVE_RANGE_H_

#include <cstdint>

namespace headrace {

// [begin, end).
struct Range {
  int64_t begin;
  int64_t end;
};

static inline int64_t Size(Range range) { return range.end - range.begin; }

// The t-th of n nearly equal parts of a range; together they are the range.
static inline Range Part(Range whole, int64_t t, int64_t n) {
  const int64_t size = Size(whole);
  return {whole.begin + size * t / n, whole.begin + size * (t + 1) / n};
}

}  // namespace headrace

#endif  // HEADRACE_NATIVE_RANGE_H_
