#include "linear.h"

#include <algorithm>
#include <memory>
#include <stdexcept>
#include <vector>

#include "scratch.h"
#include "shared_range.h"
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

// How a product is cut, and what memory its threads need.
struct Plan {
  RowTiles tiles;
  int64_t num_row_blocks;
  int64_t num_panels;
  int64_t block_panels;
  int64_t prepared_row_bytes;
  bool is_own;  // each thread prepares all rows for itself
  int64_t scratch_bytes;
  int64_t prepared_bytes;

  int64_t PartBytes() const { return scratch_bytes + (is_own ? prepared_bytes : 0) + kScratchGapBytes; }
  int64_t SharedBytes() const { return is_own ? 0 : prepared_bytes; }
};

Plan MakePlan(const LinearKernels& kernels, Arm arm, const LinearCall& call, int64_t num_parts) {
  Plan plan = {};
  const int64_t tile_rows = arm == Arm::kGemv ? 1 : kernels.max_tile_rows(call.weight.format);
  plan.tiles = {call.num_rows, (call.num_rows - 1) / tile_rows + 1};
  plan.prepared_row_bytes = kernels.prepared_row_bytes(call);
  const int64_t row_bytes = plan.prepared_row_bytes == 0 ? Unprepared(call).row_bytes : plan.prepared_row_bytes;
  // A single row may have any stride, even none.
  const int64_t block_tiles = kernels.tiles_per_block(call, arm, plan.tiles, std::max<int64_t>(row_bytes, 1));
  plan.num_row_blocks = (plan.tiles.num_tiles - 1) / block_tiles + 1;
  plan.num_panels = (call.weight.rows + kLanes - 1) / kLanes;
  plan.block_panels = kernels.panels_per_block(call, block_tiles);
  // What another core has just written takes long to come from there, and waiting for it takes longer still: where rows
  // are few and panels many, it is quicker to do all of it.
  plan.is_own = call.num_rows <= kernels.max_own_rows && plan.num_panels >= kMinOwnPanels * num_parts;
  plan.scratch_bytes = RoundUp(kernels.scratch_bytes(call, block_tiles), kVectorBytes);
  plan.prepared_bytes = RoundUp(plan.tiles.num_tiles * plan.tiles.MaxRows() * plan.prepared_row_bytes, kVectorBytes);
  return plan;
}

}  // namespace

void Linear(Target target, Arm arm, const LinearCall& call) {
  CheckTypes(call);
  if (call.num_rows == 0) return;
  const LinearKernels& kernels = HEADRACE_CHOOSE(target, kLinear).kernels(call, arm);
  const bool is_parallel = call.num_rows * call.weight.rows * call.weight.columns >= kMinParallelWork;
  // The pool of now, whose threads are counted here: another one may be set meanwhile.
  const std::shared_ptr<ThreadPool> pool = is_parallel ? Pool() : nullptr;
  const int64_t num_parts = is_parallel ? pool->num_threads() : 1;
  const Plan plan = MakePlan(kernels, arm, call, num_parts);
  const Range all_groups = {0, (call.weight.padded_columns + kGroup - 1) / kGroup};
  // Of each thread, then what they share.
  char* memory = Scratch(static_cast<size_t>(num_parts * plan.PartBytes() + plan.SharedBytes()));
  std::vector<SharedRange> panels;
  panels.reserve(static_cast<size_t>(plan.num_row_blocks));
  for (int64_t block = 0; block < plan.num_row_blocks; ++block)
    panels.emplace_back(Range{0, plan.num_panels}, num_parts);
  Barrier barrier;
  RunParts(pool.get(), [&](int part, int) {
    char* scratch = memory + part * plan.PartBytes();
    Activations x = Unprepared(call);
    if (plan.prepared_row_bytes != 0) {
      x = {plan.is_own ? scratch + plan.scratch_bytes : memory + num_parts * plan.PartBytes(), plan.prepared_row_bytes};
      kernels.prepare(call, plan.tiles, plan.is_own ? all_groups : Part(all_groups, part, num_parts), x);
      if (!plan.is_own) barrier.Wait(static_cast<int>(num_parts));
    }
    for (int64_t block = 0; block < plan.num_row_blocks; ++block) {
      const Range tiles = Part({0, plan.tiles.num_tiles}, block, plan.num_row_blocks);
      SharedRange& left = panels[static_cast<size_t>(block)];
      for (Range piece; Size(piece = left.Take(part, plan.block_panels)) > 0;) {
        kernels.compute(call, plan.tiles, x, {piece, tiles}, scratch);
      }
    }
  });
}

}  // namespace headrace
