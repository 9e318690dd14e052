#ifndef HEADRACE_NATIVE_BIND_ATTENTION_H_
#define HEADRACE_NATIVE_BIND_ATTENTION_H_

#include <nanobind/nanobind.h>

namespace headrace {

// The KV cache, attention over it and what writes to it.
void DefineAttention(nanobind::module_& m);

}  // namespace headrace

#endif  // HEADRACE_NATIVE_BIND_ATTENTION_H_
