// The private module headrace._native: pointers and shapes in, nothing known of tensors. Its callers
// (headrace.kernels.cpu) check shapes, types and strides; what is checked here keeps memory safe within a matrix.
#include <nanobind/nanobind.h>
#include <nanobind/stl/string.h>
#include <nanobind/stl/vector.h>

#include "bind.h"
#include "embedding.h"
#include "linear.h"
#include "packed_matrix.h"
#include "peaks.h"
#include "quantize_rows.h"
#include "stream.h"
#include "target.h"
#include "thread_pool.h"

namespace headrace {
namespace {

std::vector<std::string> Names(bool is_only_supported) {
  std::vector<std::string> names;
  for (const Target target : CompiledTargets()) {
    if (!is_only_supported || IsSupported(target)) names.push_back(Name(target));
  }
  return names;
}

bool WriteRows(PackedMatrix& matrix, const std::string& target, int64_t row, DType dtype, int64_t num_rows,
               uintptr_t x, int64_t x_stride) {
  return matrix.WriteRows(TargetFromName(target), row, {dtype, num_rows, Pointer<const void>(x), x_stride});
}

void WriteQuantizedRows(PackedMatrix& matrix, int64_t row, int64_t num_rows, uintptr_t values, uintptr_t scales) {
  matrix.WriteQuantizedRows(row, num_rows, Pointer<const uint8_t>(values),
                            Pointer<const float>(scales));
}

bool QuantizeRowsByName(const std::string& target, Format format, DType dtype, int64_t num_rows, int64_t columns,
                        uintptr_t x, int64_t x_stride, uintptr_t values, uintptr_t scales) {
  return QuantizeRows(TargetFromName(target), format, {dtype, num_rows, Pointer<const void>(x), x_stride}, columns,
                      Pointer<uint8_t>(values), Pointer<float>(scales));
}

void RunEmbedding(Stream& stream, const PackedMatrix& matrix, DType dtype, int64_t num_rows, uintptr_t ids, int64_t offset,
                  float scale, bool zeros_outside, uintptr_t out) {
  const EmbeddingCall call = {matrix.view(), dtype, num_rows,      Pointer<const int64_t>(ids),
                              offset,        scale, zeros_outside, Pointer<void>(out)};
  stream.Run("embedding", [call] { Embed(call); });
}

// An op bound to its target, found by name once.
class NativeLinear {
 public:
  NativeLinear(const std::string& target, bool is_batch_invariant)
      : target_(TargetFromName(target)), is_batch_invariant_(is_batch_invariant) {}

  void Run(Stream& stream, Arm arm, const PackedMatrix& weight, DType dtype, int64_t num_rows, uintptr_t x, int64_t x_stride,
           uintptr_t bias, uintptr_t out, DType out_dtype) const {
    const LinearCall call = {weight.view(),          dtype,     num_rows,
                             Pointer<const void>(x), x_stride,  Pointer<const void>(bias),
                             Pointer<void>(out),     out_dtype, is_batch_invariant_};
    stream.Run("linear", [target = target_, arm, call] { Linear(target, arm, call); });
  }

 private:
  Target target_;
  bool is_batch_invariant_;
};

void DefineTypes(nb::module_& m) {
  nb::enum_<Format>(m, "Format")
      .value("FLOAT32", Format::kFloat32)
      .value("BFLOAT16", Format::kBfloat16)
      .value("INT8", Format::kInt8)
      .value("INT4", Format::kInt4);
  nb::enum_<DType>(m, "DType").value("FLOAT32", DType::kFloat32).value("BFLOAT16", DType::kBfloat16);
  nb::enum_<Target>(m, "Target")
      .value("PORTABLE", Target::kPortable)
      .value("AVX2", Target::kAvx2)
      .value("AVX512", Target::kAvx512)
      .value("AVX512_BF16", Target::kAvx512Bf16)
      .value("AMX", Target::kAmx)
      .value("AMX_FP16", Target::kAmxFp16);
  nb::enum_<Arm>(m, "Arm").value("GEMV", Arm::kGemv).value("FLAT_GEMM", Arm::kFlatGemm).value("GEMM", Arm::kGemm);
}

void DefineMatrix(nb::module_& m) {
  nb::class_<PackedMatrix>(m, "PackedMatrix")
      .def(nb::init<Format, int64_t, int64_t>(), nb::arg("weight_format"), nb::arg("rows"), nb::arg("columns"))
      .def("write_rows", &WriteRows, nb::arg("target"), nb::arg("row"), nb::arg("dtype"), nb::arg("num_rows"),
           nb::arg("x_ptr"), nb::arg("x_stride"), Unlocked())
      .def("write_quantized_rows", &WriteQuantizedRows, nb::arg("row"), nb::arg("num_rows"), nb::arg("values_ptr"),
           nb::arg("scales_ptr"), Unlocked())
      .def("rows", &PackedMatrix::Rows, nb::arg("begin"), nb::arg("end"));
  m.def(
      "packed_bytes",
      [](Format format, int64_t rows, int64_t columns) { return PackedLayout(format, rows, columns).num_bytes; },
      nb::arg("weight_format"), nb::arg("rows"), nb::arg("columns"));
}

void DefineQuantizeRows(nb::module_& m) {
  m.def("quantize_rows", &QuantizeRowsByName, nb::arg("target"), nb::arg("weight_format"), nb::arg("dtype"),
        nb::arg("num_rows"), nb::arg("columns"), nb::arg("x_ptr"), nb::arg("x_stride"), nb::arg("values_ptr"),
        nb::arg("scales_ptr"), Unlocked());
}

void DefineLinear(nb::module_& m) {
  m.def("embedding", &RunEmbedding, nb::arg("stream"), nb::arg("weight"), nb::arg("dtype"), nb::arg("num_rows"),
        nb::arg("ids_ptr"), nb::arg("offset"), nb::arg("scale"), nb::arg("zeros_outside"), nb::arg("out_ptr"),
        Unlocked());
  nb::class_<NativeLinear>(m, "Linear")
      .def(nb::init<const std::string&, bool>(), nb::arg("target"), nb::arg("batch_invariant"))
      .def("run", &NativeLinear::Run, nb::arg("stream"), nb::arg("arm"), nb::arg("weight"), nb::arg("dtype"),
           nb::arg("num_rows"), nb::arg("x_ptr"), nb::arg("x_stride"), nb::arg("bias_ptr"), nb::arg("out_ptr"),
           nb::arg("out_dtype"), Unlocked());
}

void DefinePeaks(nb::module_& m) {
  m.def(
      "measure_read_bytes_per_s",
      [](const std::string& target, int64_t buffer_bytes, int num_passes) {
        return MeasureReadBytesPerSecond(TargetFromName(target), buffer_bytes, num_passes);
      },
      nb::arg("target"), nb::arg("buffer_bytes"), nb::arg("num_passes"), Unlocked());
  m.def(
      "measure_ops_per_s",
      [](const std::string& target, Format format, int num_passes) {
        return MeasureOpsPerSecond(TargetFromName(target), format, num_passes);
      },
      nb::arg("target"), nb::arg("weight_format"), nb::arg("num_passes"), Unlocked());
}

}  // namespace

NB_MODULE(_native, m) {
  DefineTypes(m);
  DefineMatrix(m);
  DefineQuantizeRows(m);
  DefineLinear(m);
  DefinePeaks(m);
  DefineAttention(m);
  DefineCommunicator(m);
  DefineStream(m);
  DefineNorm(m);
  DefineActivation(m);
  DefineMixture(m);
  DefineSampling(m);
  m.def("target_from_name", &TargetFromName, nb::arg("name"));
  m.def("compiled_targets", [] { return Names(false); });
  m.def("supported_targets", [] { return Names(true); });
  m.def("best_target", [] { return std::string(Name(BestTarget())); });
  m.def("set_num_threads", &SetNumThreads, nb::arg("num_threads"), nb::call_guard<nb::gil_scoped_release>());
  m.def("num_threads", &NumThreads);
}

}  // namespace headrace
