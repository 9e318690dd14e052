// Argmax is an op of a stream, as the last one of a greedy step. The others' results are read by the host at once.
#include "bind.h"
#include "sampling.h"
#include "stream.h"

namespace headrace {
namespace {

LogitsView View(uintptr_t logits, int64_t num_rows, int64_t row_stride, int64_t vocab_size) {
  return {Pointer<const float>(logits), num_rows, row_stride, vocab_size};
}

void RunArgmax(Stream& stream, Target target, uintptr_t logits, int64_t num_rows, int64_t row_stride,
               int64_t vocab_size, uintptr_t ids, uintptr_t values) {
  const LogitsView view = View(logits, num_rows, row_stride, vocab_size);
  stream.Run("argmax", [target, view, ids, values] {
    Argmax(target, view, Pointer<int64_t>(ids), Pointer<float>(values));
  });
}

}  // namespace

void DefineSampling(nb::module_& m) {
  m.def("argmax", &RunArgmax, nb::arg("stream"), nb::arg("target"), nb::arg("logits_ptr"), nb::arg("num_rows"),
        nb::arg("row_stride"), nb::arg("vocab_size"), nb::arg("ids_ptr"), nb::arg("values_ptr"), Unlocked());
  m.def(
      "log_sum_exp",
      [](Target target, uintptr_t logits, int64_t num_rows, int64_t row_stride, int64_t vocab_size, uintptr_t out) {
        LogSumExp(target, View(logits, num_rows, row_stride, vocab_size), Pointer<float>(out));
      },
      nb::arg("target"), nb::arg("logits_ptr"), nb::arg("num_rows"), nb::arg("row_stride"), nb::arg("vocab_size"),
      nb::arg("out_ptr"), Unlocked());
  m.def(
      "top_k",
      [](Target target, uintptr_t logits, int64_t num_rows, int64_t row_stride, int64_t vocab_size, int64_t k,
         uintptr_t ids) {
        TopK(target, View(logits, num_rows, row_stride, vocab_size), k, Pointer<int64_t>(ids));
      },
      nb::arg("target"), nb::arg("logits_ptr"), nb::arg("num_rows"), nb::arg("row_stride"), nb::arg("vocab_size"),
      nb::arg("k"), nb::arg("ids_ptr"), Unlocked());
}

}  // namespace headrace
