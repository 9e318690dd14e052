// Loops whose turns are written out by the compiler before anything else is done with them. GCC 12 leaves an array of
// accumulators in memory if loops over it become constant indices only later.

#include <utility>

#define HEADRACE_INLINE inline __attribute__((always_inline))
#define HEADRACE_LAMBDA __attribute__((always_inline))

namespace headrace {
namespace HEADRACE_TARGET {
namespace {

template <class Turn, int... kIndex>
HEADRACE_INLINE void UnrollSequence(const Turn& turn, std::integer_sequence<int, kIndex...>) {
  (turn(std::integral_constant<int, kIndex>{}), ...);
}

// turn(0), ..., turn(kCount - 1), the index a constant.
template <int kCount, class Turn>
HEADRACE_INLINE void Unroll(const Turn& turn) {
  UnrollSequence(turn, std::make_integer_sequence<int, kCount>{});
}

// turn(row, column) for each pair, row by row.
template <int kRows, int kColumns, class Turn>
HEADRACE_INLINE void UnrollPairs(const Turn& turn) {
  Unroll<kRows * kColumns>([&](auto i) HEADRACE_LAMBDA {
    turn(std::integral_constant<int, i / kColumns>{}, std::integral_constant<int, i % kColumns>{});
  });
}

}  // namespace
}  // namespace HEADRACE_TARGET
}  // namespace headrace
