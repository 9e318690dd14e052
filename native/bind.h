// What the files that define the module's parts share.
#ifndef HEADRACE_NATIVE_BIND_H_
#define HEADRACE_NATIVE_BIND_H_

#include <nanobind/nanobind.h>

#include <cstdint>

namespace headrace {

namespace nb = nanobind;

using Unlocked = nb::call_guard<nb::gil_scoped_release>;

template <class T>
T* Pointer(uintptr_t address) {
  return reinterpret_cast<T*>(address);
}

void DefineAttention(nb::module_& m);
void DefineCommunicator(nb::module_& m);
void DefineNorm(nb::module_& m);
void DefineActivation(nb::module_& m);
void DefineMixture(nb::module_& m);
void DefineSampling(nb::module_& m);
void DefineStream(nb::module_& m);

}  // namespace headrace

#endif  // HEADRACE_NATIVE_BIND_H_
