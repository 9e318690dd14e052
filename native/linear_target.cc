// The linear kernels of one target: vectors, or tiles where the machine has them. Compiled once for each, with that
// target's flags.
#include "linear.h"

#include <algorithm>

#include "simd/simd-inl.h"

#include "unroll-inl.h"

#include "load-inl.h"
#include "prepare-inl.h"

#include "linear_ends-inl.h"

#include "linear_vectors-inl.h"

#include "linear_tiles-inl.h"

#include "linear_tile_steps-inl.h"

#include "linear_tile_products-inl.h"

namespace headrace {
namespace HEADRACE_TARGET {
namespace {

// With kGemm as many as stay in an L2 cache beside the panels passing by.
int64_t VectorTilesPerBlock(const LinearCall&, Arm arm, RowTiles tiles, int64_t row_bytes) {
  if (arm != Arm::kGemm) return tiles.num_tiles;
  return std::clamp<int64_t>(256 * 1024 / (tiles.Rows(0).end * row_bytes), 1, tiles.num_tiles);
}
// Pairs, which floating point takes.
int64_t VectorPanelsPerBlock(const LinearCall&, int64_t) { return 4; }
int64_t NoScratch(const LinearCall&, int64_t) { return 0; }

constexpr LinearKernels kVectorKernels = {&MaxVectorRows,  &VectorTilesPerBlock, &VectorPanelsPerBlock,
                                          &VectorRowBytes, &NoScratch,           0,
                                          &PrepareVectors, &ComputeVectors};

#ifdef __AMX_TILE__

// Two tiles: as long as each thread prepares them, the other one would have waited for its half of them.
constexpr int64_t kMaxOwnRows = 2 * kTileRows;

int MaxTileRows(Format) { return kTileRows; }
int64_t TilesPerBlock(const LinearCall& call, Arm, RowTiles tiles, int64_t) {
  return std::min(tiles.num_tiles, IsQuantized(call.weight.format) ? kIntBlockTiles : kFloatBlockTiles);
}

constexpr LinearKernels kTileKernels = {&MaxTileRows,      &TilesPerBlock, &TilePanelsPerBlock, &TileRowBytes,
                                        &TileScratchBytes, kMaxOwnRows,    &PrepareTiles,       &ComputeTiles};

const LinearKernels& KernelsFor(const LinearCall& call, Arm arm) {
  const bool are_halves =
      kHasHalfTiles && IsQuantized(call.weight.format) && (call.is_batch_invariant || arm == Arm::kGemm);
  return call.weight.format == Format::kBfloat16 || are_halves ? kTileKernels : kVectorKernels;
}

#else

const LinearKernels& KernelsFor(const LinearCall&, Arm) { return kVectorKernels; }

#endif

}  // namespace

extern const LinearTarget kLinear;
const LinearTarget kLinear = {&KernelsFor};

}  // namespace HEADRACE_TARGET
}  // namespace headrace
