#include "sampling.h"

#include <algorithm>
#include <utility>
#include <vector>

#include "targets.h"
#include "thread_pool.h"

namespace headrace {
namespace {

constexpr int64_t kMinParallelElements = 1 << 16;

template <class Task>
void ForEachRow(const LogitsView& view, const Task& task) {
  const bool is_parallel = view.num_rows > 1 && view.num_rows * view.vocab_size >= kMinParallelElements;
  RunParts(is_parallel, [&](int part, int num_parts) { task(Part({0, view.num_rows}, part, num_parts)); });
}

// A heap of the k largest so far, whose least one is the bound that few later entries pass. Of equals the later one is
// the lesser, so that an entry equal to the bound never has to replace it.
void TopKOfRow(const SamplingKernels& kernels, const float* row, int64_t size, int64_t k, int64_t* ids) {
  using Entry = std::pair<float, int64_t>;
  const auto is_greater = [](const Entry& a, const Entry& b) {
    return a.first > b.first || (a.first == b.first && a.second < b.second);
  };
  std::vector<Entry> heap;
  heap.reserve(static_cast<size_t>(k));
  for (int64_t i = 0; i < k; ++i) heap.emplace_back(row[i], i);
  std::make_heap(heap.begin(), heap.end(), is_greater);
  for (int64_t i = k; k > 0; ++i) {
    i = kernels.next_above(row, i, size, heap.front().first);
    if (i == size) break;
    std::pop_heap(heap.begin(), heap.end(), is_greater);
    heap.back() = {row[i], i};
    std::push_heap(heap.begin(), heap.end(), is_greater);
  }
  std::sort(heap.begin(), heap.end(), is_greater);
  for (int64_t i = 0; i < k; ++i) ids[i] = heap[static_cast<size_t>(i)].second;
}

}  // namespace

void Argmax(Target target, const LogitsView& view, int64_t* ids, float* values) {
  const SamplingKernels& kernels = HEADRACE_CHOOSE(target, kSampling);
  ForEachRow(view, [&](Range rows) { kernels.argmax(view, rows, ids, values); });
}

void LogSumExp(Target target, const LogitsView& view, float* out) {
  const SamplingKernels& kernels = HEADRACE_CHOOSE(target, kSampling);
  ForEachRow(view, [&](Range rows) { kernels.log_sum_exp(view, rows, out); });
}

void TopK(Target target, const LogitsView& view, int64_t k, int64_t* ids) {
  const SamplingKernels& kernels = HEADRACE_CHOOSE(target, kSampling);
  ForEachRow(view, [&](Range rows) {
    for (int64_t r = rows.begin; r < rows.end; ++r) {
      TopKOfRow(kernels, view.logits + r * view.row_stride, view.vocab_size, k, ids + r * k);
    }
  });
}

}  // namespace headrace
