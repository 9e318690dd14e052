// The scores of a block of rows and its products with values: in tiles where the target has them, else on vectors.

namespace headrace {
namespace HEADRACE_TARGET {
namespace {

// t of num_rows rows from `row` on, for the panels of a range. What the rows do not see is computed too, and not used.
void ComputeScores(const AttentionCall& call, const Workspace& w, const TilePanels& panels, int64_t row, int num_rows,
                   Range range) {
#ifdef __AMX_TILE__
  if (HasTiles(call.layout.shape.format)) {
    ComputeTileScores(call, w, panels, row, num_rows, range);
    if (call.has_soft_cap) CapScores(call, w.t, num_rows, range);
    return;
  }
#endif
  ComputeVectorScores(call, w, panels, row, num_rows, range);
  if (call.has_soft_cap) CapScores(call, w.t, num_rows, range);
}

// o += p V of rows from `first` on; visible: the panels that each sees, one or more. Consumes p.
void MultiplyValues(const AttentionCall& call, const Workspace& w, const TilePanels& panels, int first, int count,
                    const Range* visible) {
  const BlockRows block = {w.p, w.split.o + first * OutputStride(call.layout), count};
#ifdef __AMX_TILE__
  if (HasTiles(call.layout.shape.format)) return TileValues(call, panels, block, w.p, w.rows + first, visible);
#endif
  switch (call.layout.shape.format) {
    case Format::kFloat32:
      return FloatValues<Float32Values>(call, panels, block, w.rows + first, visible);
    case Format::kBfloat16:
      return FloatValues<Bfloat16Values>(call, panels, block, w.rows + first, visible);
    case Format::kInt8:
    case Format::kInt4:
      return IntValues(call, panels, block, w.p, w.p_scale, visible);
  }
}

}  // namespace
}  // namespace HEADRACE_TARGET
}  // namespace headrace
