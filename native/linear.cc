#include "linear.h"

#include <algorithm>
#include <memory>
#include <stdexcept>

#include "scratch.h"
#include "targets.h"
#include "thread_pool.h"

namespace headrace {
namespace {

// Multiplications below which a second thread costs more than it saves: a few microseconds of work.
constexpr int64_t kMinParallelWork = 1 << 17;

// Panels of a thread from which on preparing all rows is a small part of its work.
constexpr int64_t kMinOwnPanels = 32;

// As they are.
Activations Unprepared(const LinearCall& call) {
  const int64_t element_bytes = call.dtype == DType::kFloat32 ? 4 : 2;
  return {static_cast<char*>(const_cast<void*>(call.x)), call.x_stride * element_bytes};
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
  const LinearKernels& kernels = HEADRACE_CHOOSE(target, kLinear).kernels(call, arm);
  const int64_t tile_rows = arm == Arm::kGemv ? 1 : kernels.max_tile_rows(call.weight.format);
  const RowTiles tiles = {call.num_rows, (call.num_rows - 1) / tile_rows + 1};
  const bool is_parallel = call.num_rows * call.weight.rows * call.weight.columns >= kMinParallelWork;
  // The pool of now, whose threads are counted here: another one may be set meanwhile.
  const std::shared_ptr<ThreadPool> pool = is_parallel ? Pool() : nullptr;
  const int64_t prepared_bytes = kernels.prepared_row_bytes(call);
  const bool is_prepared = prepared_bytes != 0;
  const int64_t row_bytes = is_prepared ? prepared_bytes : Unprepared(call).row_bytes;
  // A single row may have any stride, even none.
  const int64_t tiles_per_block = kernels.tiles_per_block(arm, tiles, std::max<int64_t>(row_bytes, 1));
  const int64_t num_panels = (call.weight.rows + kLanes - 1) / kLanes;
  const int64_t max_parts = is_parallel ? pool->num_threads() : 1;
  // What another core has just written takes long to come from there, and waiting for it takes longer still: where rows
  // are few and panels many, it is quicker to do all of it.
  const bool is_own = call.num_rows <= kernels.max_own_rows && num_panels >= kMinOwnPanels * max_parts;
  const int64_t activations_bytes = RoundUp(tiles.num_tiles * tiles.MaxRows() * prepared_bytes, kVectorBytes);
  const int64_t scratch_bytes =
      RoundUp(kernels.scratch_bytes(call, tiles_per_block, (num_panels - 1) / max_parts + 1), kVectorBytes);
  const int64_t part_bytes = scratch_bytes + (is_own ? activations_bytes : 0) + kScratchGapBytes;
  // Of each thread, then what they share.
  char* memory = Scratch(static_cast<size_t>(max_parts * part_bytes + (is_own ? 0 : activations_bytes)));
  const int64_t num_blocks = (tiles.num_tiles - 1) / tiles_per_block + 1;
  const Range groups = {0, (call.weight.padded_columns + kGroup - 1) / kGroup};
  Barrier barrier;
  RunParts(pool.get(), [&](int part, int num_parts) {
    char* scratch = memory + part * part_bytes;
    Activations activations = Unprepared(call);
    if (is_prepared) {
      activations = {is_own ? scratch + scratch_bytes : memory + max_parts * part_bytes, row_bytes};
      kernels.prepare(call, tiles, is_own ? groups : Part(groups, part, num_parts), activations);
      if (!is_own) barrier.Wait(num_parts);
    }
    const Range panels = Part({0, num_panels}, part, num_parts);
    for (int64_t block = 0; block < num_blocks; ++block) {
      kernels.compute(call, tiles, activations, {panels, Part({0, tiles.num_tiles}, block, num_blocks)}, scratch);
    }
  });
}

}  // namespace headrace
