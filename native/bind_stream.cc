// Streams, their graphs, and tensors in their arena.
#include <nanobind/ndarray.h>
#include <nanobind/stl/map.h>
#include <nanobind/stl/string.h>
#include <nanobind/stl/unique_ptr.h>
#include <nanobind/stl/vector.h>

#include "bind.h"
#include "linear.h"
#include "stream.h"

namespace headrace {
namespace {

using Tensor = nb::ndarray<nb::pytorch>;

nb::dlpack::dtype DlpackDtype(DType dtype) {
  if (dtype == DType::kFloat32) return nb::dtype<float>();
  return {static_cast<uint8_t>(nb::dlpack::dtype_code::Bfloat), 16, 1};
}

// Goes back to the arena when the last view of the tensor dies.
struct Lease {
  std::shared_ptr<Arena> arena;
  void* buffer;
};

Tensor EmptyTensor(const Stream& stream, const std::vector<size_t>& shape, DType dtype) {
  size_t num_bytes = dtype == DType::kFloat32 ? 4 : 2;
  for (const size_t size : shape) num_bytes *= size;
  auto* lease = new Lease{stream.arena(), stream.arena()->Allocate(num_bytes)};
  const nb::capsule owner(lease, [](void* p) noexcept {
    auto* lease = static_cast<Lease*>(p);
    lease->arena->Free(lease->buffer);
    delete lease;
  });
  return Tensor(lease->buffer, shape.size(), shape.data(), owner, nullptr, DlpackDtype(dtype));
}

}  // namespace

void DefineStream(nb::module_& m) {
  nb::class_<Graph>(m, "Graph")
      .def("launch", &Graph::Launch, Unlocked())
      .def("__call__", &Graph::Launch, Unlocked())
      .def("launch_timed", &Graph::LaunchTimed, Unlocked())
      .def("then", &Graph::Then, nb::arg("following"))
      .def_prop_ro("num_ops", &Graph::num_ops);
  nb::class_<Stream>(m, "Stream")
      .def(nb::init<>())
      .def("begin_capture", &Stream::BeginCapture)
      .def("end_capture", &Stream::EndCapture)
      .def_prop_ro("is_capturing", &Stream::is_capturing)
      .def_prop_ro("arena_bytes", [](const Stream& stream) { return stream.arena()->num_bytes(); })
      .def("empty", &EmptyTensor, nb::arg("shape"), nb::arg("dtype"));
}

}  // namespace headrace
