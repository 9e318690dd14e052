#include "linear.h"

#include <algorithm>
#include <cstdlib>
#include <memory>
#include <new>
#include <stdexcept>

#include "parallel.h"
#include "targets.h"

namespace headrace {
namespace {

// Bytes of activations that a block of rows may have, so that they stay in an L2 cache beside the panels passing by.
constexpr int64_t kBlockBytes = 256 * 1024;
// The fewest rows in a block: W is read again for each block, at least this much work pays for it.
constexpr int64_t kMinBlockRows = 64;
// Multiplications below which a second thread costs more than it saves: a few microseconds of work.
constexpr int64_t kMinParallelWork = 1 << 17;
constexpr int64_t kMinParallelPrepare = 1 << 15;

// Memory of the calling thread that grows to the largest request and is kept for the next one.
char* Scratch(size_t num_bytes) {
  struct Free {
    void operator()(char* memory) const { std::free(memory); }
  };
  thread_local std::unique_ptr<char, Free> memory;
  thread_local size_t capacity = 0;
  if (num_bytes > capacity) {
    memory.reset();
    capacity = 0;
    num_bytes = static_cast<size_t>(RoundUp(static_cast<int64_t>(num_bytes), 4096));
    memory.reset(static_cast<char*>(std::aligned_alloc(64, num_bytes)));
    if (memory == nullptr) throw std::bad_alloc();
    capacity = num_bytes;
  }
  return memory.get();
}

Activations PrepareActivations(const LinearKernels& kernels, const LinearCall& call) {
  const PackedView& w = call.weight;
  const int64_t value_bytes = kernels.prepared_bytes(call);
  if (value_bytes == 0) {
    const int64_t element_bytes = call.dtype == DType::kFloat32 ? 4 : 2;
    return {static_cast<char*>(const_cast<void*>(call.x)), call.x_stride * element_bytes, nullptr, nullptr};
  }
  const int64_t row_bytes = RoundUp(w.padded_columns * value_bytes, 64);
  const int64_t num_scales = call.num_rows * w.num_groups;
  char* memory = Scratch(static_cast<size_t>(call.num_rows * row_bytes + num_scales * 8));
  auto* scales = reinterpret_cast<float*>(memory + call.num_rows * row_bytes);
  const Activations activations = {memory, row_bytes, scales, reinterpret_cast<int32_t*>(scales + num_scales)};
  RunParts(call.num_rows > 1 && call.num_rows * w.columns >= kMinParallelPrepare, [&](int part, int num_parts) {
    kernels.prepare(call, Part({0, call.num_rows}, part, num_parts), activations);
  });
  return activations;
}

int64_t RowsPerBlock(Arm arm, const LinearCall& call, const Activations& activations) {
  switch (arm) {
    case Arm::kGemv:
      return 1;
    case Arm::kFlatGemm:
      return call.num_rows;
    case Arm::kGemm:
      break;
  }
  // A single row may have any stride, even none.
  return std::max(kMinBlockRows, kBlockBytes / std::max<int64_t>(activations.row_bytes, 1));
}

void CheckTypes(const LinearCall& call) {
  const Format format = call.weight.format;
  const bool fits = IsQuantized(format) || (format == Format::kFloat32) == (call.dtype == DType::kFloat32);
  if (!fits) throw std::invalid_argument("input and weight must both be float32 or both bfloat16");
}

}  // namespace

void Linear(Target target, Arm arm, const LinearCall& call) {
  CheckTypes(call);
  if (call.num_rows == 0) return;
  const LinearKernels& kernels = HEADRACE_CHOOSE(target, kLinear);
  const Activations activations = PrepareActivations(kernels, call);
  const int64_t num_panels = (call.weight.rows + kLanes - 1) / kLanes;
  const int64_t num_blocks = (call.num_rows - 1) / RowsPerBlock(arm, call, activations) + 1;
  const bool is_parallel = call.num_rows * call.weight.rows * call.weight.columns >= kMinParallelWork;
  RunParts(is_parallel, [&](int part, int num_parts) {
    const Range panels = Part({0, num_panels}, part, num_parts);
    for (int64_t block = 0; block < num_blocks; ++block) {
      kernels.compute(call, arm, activations, {panels, Part({0, call.num_rows}, block, num_blocks)});
    }
  });
}

}  // namespace headrace
