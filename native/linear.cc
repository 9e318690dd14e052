#include "linear.h"

#include <algorithm>
#include <stdexcept>

#include "scratch.h"
#include "targets.h"
#include "thread_pool.h"

namespace headrace {
namespace {

// Bytes of activations that a block of rows may have, so that they stay in an L2 cache beside the panels passing by.
constexpr int64_t kBlockBytes = 256 * 1024;
// Multiplications below which a second thread costs more than it saves: a few microseconds of work.
constexpr int64_t kMinParallelWork = 1 << 17;

int64_t TilesPerBlock(Arm arm, RowTiles tiles, const Activations& activations) {
  if (arm != Arm::kGemm) return tiles.num_tiles;
  // A single row may have any stride, even none.
  const int64_t tile_bytes = tiles.Rows(0).end * std::max<int64_t>(activations.row_bytes, 1);
  return std::max<int64_t>(1, kBlockBytes / tile_bytes);
}

Activations MakeActivations(const LinearKernels& kernels, const LinearCall& call) {
  const int64_t row_bytes = kernels.prepared_row_bytes(call);
  if (row_bytes == 0) {
    const int64_t element_bytes = call.dtype == DType::kFloat32 ? 4 : 2;
    return {static_cast<char*>(const_cast<void*>(call.x)), call.x_stride * element_bytes};
  }
  return {Scratch(static_cast<size_t>(call.num_rows * row_bytes)), row_bytes};
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
  const int64_t tile_rows = arm == Arm::kGemv ? 1 : kernels.max_tile_rows(call.weight.format);
  const RowTiles tiles = {call.num_rows, (call.num_rows - 1) / tile_rows + 1};
  const Activations activations = MakeActivations(kernels, call);
  const bool is_prepared = activations.values != call.x;
  const int64_t tiles_per_block = TilesPerBlock(arm, tiles, activations);
  const int64_t num_blocks = (tiles.num_tiles - 1) / tiles_per_block + 1;
  const int64_t num_panels = (call.weight.rows + kLanes - 1) / kLanes;
  const int64_t num_groups = (call.weight.padded_columns + kGroup - 1) / kGroup;
  const bool is_parallel = call.num_rows * call.weight.rows * call.weight.columns >= kMinParallelWork;
  Barrier barrier;
  RunParts(is_parallel, [&](int part, int num_parts) {
    if (is_prepared) {
      kernels.prepare(call, tiles, Part({0, num_groups}, part, num_parts), activations);
      barrier.Wait(num_parts);
    }
    const Range panels = Part({0, num_panels}, part, num_parts);
    for (int64_t block = 0; block < num_blocks; ++block) {
      kernels.compute(call, tiles, activations, {panels, Part({0, tiles.num_tiles}, block, num_blocks)});
    }
  });
}

}  // namespace headrace
