// Not ops of a stream: their results are read by the host at once.
#include "bind.h"
#include "sampling.h"

namespace headrace {
namespace {

LogitsView View(uintptr_t logits, int64_t num_rows, int64_t row_stride, int64_t vocab_size) {
  return {Pointer<const float>(logits), num_rows, row_stride, vocab_size};
}

}  // namespace

void DefineSampling(nb::module_& m) {
  m.def(
      "argmax",
      [](Target target, uintptr_t logits, int64_t num_rows, int64_t row_stride, int64_t vocab_size, uintptr_t ids,
         uintptr_t values) {
        Argmax(target, View(logits, num_rows, row_stride, vocab_size), Pointer<int64_t>(ids), Pointer<float>(values));
      },
      nb::arg("target"), nb::arg("logits_ptr"), nb::arg("num_rows"), nb::arg("row_stride"), nb::arg("vocab_size"),
      nb::arg("ids_ptr"), nb::arg("values_ptr"), Unlocked());
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
