#include "bind.h"
#include "norm.h"
#include "stream.h"

namespace headrace {
namespace {

void RunNorm(Stream& stream, Target target, NormKind kind, DType dtype, int64_t num_outer, int64_t num_inner,
             int64_t outer_stride, int64_t inner_stride, int64_t size, uintptr_t x, uintptr_t residual, uintptr_t weight,
             uintptr_t bias, float eps, bool unit_offset, uintptr_t out) {
  const NormCall call = {kind,
                         dtype,
                         num_outer,
                         num_inner,
                         outer_stride,
                         inner_stride,
                         size,
                         Pointer<const void>(x),
                         Pointer<void>(residual),
                         Pointer<const void>(weight),
                         Pointer<const void>(bias),
                         eps,
                         unit_offset,
                         Pointer<void>(out)};
  stream.Run("norm", [target, call] { Norm(target, call); });
}

void RunAdd(Stream& stream, Target target, DType dtype, int64_t num_elements, uintptr_t x, uintptr_t residual) {
  const AddCall call = {dtype, num_elements, Pointer<const void>(x), Pointer<void>(residual)};
  stream.Run("add", [target, call] { Add(target, call); });
}

}  // namespace

void DefineNorm(nb::module_& m) {
  nb::enum_<NormKind>(m, "NormKind").value("RMS", NormKind::kRms).value("LAYER", NormKind::kLayer);
  m.def("norm", &RunNorm, nb::arg("stream"), nb::arg("target"), nb::arg("kind"), nb::arg("dtype"), nb::arg("num_outer"),
        nb::arg("num_inner"), nb::arg("outer_stride"), nb::arg("inner_stride"), nb::arg("size"), nb::arg("x_ptr"),
        nb::arg("residual_ptr"), nb::arg("weight_ptr"), nb::arg("bias_ptr"), nb::arg("eps"), nb::arg("unit_offset"),
        nb::arg("out_ptr"), Unlocked());
  m.def("add", &RunAdd, nb::arg("stream"), nb::arg("target"), nb::arg("dtype"), nb::arg("num_elements"),
        nb::arg("x_ptr"), nb::arg("residual_ptr"), Unlocked());
}

}  // namespace headrace
