// Sums over ranks: always in rank order, in float32, rounded once. So an element of the sum does not depend on the
// message it travelled in.
#ifndef HEADRACE_NATIVE_REDUCE_H_
#define HEADRACE_NATIVE_REDUCE_H_

#include <cstddef>
#include <cstdint>
#include <vector>

#include "dtype.h"

namespace headrace {

inline size_t ElementBytes(DType dtype) { return dtype == DType::kFloat32 ? 4 : 2; }

// out[i] = ((in[0][i] + in[1][i]) + in[2][i]) + ...; out may begin where one of the inputs does if its elements are no
// wider.
void SumInRankOrder(const std::vector<const void*>& in, DType dtype, int64_t count, void* out, DType out_dtype);

}  // namespace headrace

#endif  // HEADRACE_NATIVE_REDUCE_H_
