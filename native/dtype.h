#ifndef HEADRACE_NATIVE_DTYPE_H_
#define HEADRACE_NATIVE_DTYPE_H_

namespace headrace {

// Of activations.
enum class DType { kFloat32, kBfloat16 };

}  // namespace headrace

#endif  // HEADRACE_NATIVE_DTYPE_H_
