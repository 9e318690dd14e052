#include "activation.h"
#include "bind.h"
#include "stream.h"

namespace headrace {
namespace {

void RunActivation(Stream& stream, Target target, ActivationKind kind, bool is_gated, DType dtype, int64_t num_rows,
                   int64_t size, uintptr_t x, uintptr_t out) {
  const ActivationCall call = {kind, is_gated, dtype, num_rows, size, Pointer<const void>(x), Pointer<void>(out)};
  stream.Run("activation", [target, call] { Activate(target, call); });
}

}  // namespace

void DefineActivation(nb::module_& m) {
  nb::enum_<ActivationKind>(m, "ActivationKind")
      .value("SILU", ActivationKind::kSilu)
      .value("GELU", ActivationKind::kGelu)
      .value("GELU_TANH", ActivationKind::kGeluTanh)
      .value("RELU", ActivationKind::kRelu);
  m.def("activation", &RunActivation, nb::arg("stream"), nb::arg("target"), nb::arg("kind"), nb::arg("is_gated"),
        nb::arg("dtype"), nb::arg("num_rows"), nb::arg("size"), nb::arg("x_ptr"), nb::arg("out_ptr"), Unlocked());
}

}  // namespace headrace
