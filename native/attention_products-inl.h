// The scores of a block of rows and its products with values: in tiles where the target has them, else on vectors.

namespace headrace {
namespace HEADRACE_TARGET {
namespace {

// t of num_rows rows from `row` on, for the panels of a range. What the rows do not see is computed too, and not used.
void ComputeScores(const AttentionCall& call, const Workspace& w, const TilePanels& panels, int64_t row, int num_rows,
                   Range range) {
  const auto compute = [&] {
#ifdef __AMX_TILE__
    if (UsesTiles(call.layout.shape.format, num_rows)) return ComputeTileScores(call, w, panels, row, num_rows, range);
#endif
    ComputeVectorScores(call, w, panels, row, num_rows, range);
  };
  compute();
  if (call.has_soft_cap) CapScores(call, w.t, num_rows, range);
}

void MultiplyFloats(const AttentionCall& call, [[maybe_unused]] const Workspace& w, const TilePanels& panels,
                    const BlockRows& block, const Row* rows, const Range* visible) {
#ifdef __AMX_TILE__
  if (HasTiles(call.layout.shape.format)) return TileValues(call, panels, block, w.p, rows, visible);
#endif
  const bool is_bfloat16 = call.layout.shape.format == Format::kBfloat16;
  (is_bfloat16 ? &FloatValues<Bfloat16Values> : &FloatValues<Float32Values>)(call, panels, block, rows, visible);
}

void MultiplyInts(const AttentionCall& call, const Workspace& w, const TilePanels& panels, const BlockRows& block,
                  const Range* visible) {
  const Range all = Hull(visible, block.count);
  ClearInvisibleDigits(block, w.p, visible);
#ifdef __AMX_TILE__
  if (UsesTiles(call.layout.shape.format, block.count)) {
    return TileIntValues(call, panels, block, w.p_scale, SplitGroups(all));
  }
#endif
  IntValues(call, panels, block, w.p_scale, all);
}

// o += p V of rows from `first` on; visible: the panels that each sees, one or more. Clears p of what they do not see.
void MultiplyValues(const AttentionCall& call, const Workspace& w, const TilePanels& panels, int first, int count,
                    const Range* visible) {
  const BlockRows block = {w.p, w.split.o + first * OutputStride(call.layout), count};
  if (call.layout.shape.format == Format::kInt8) return MultiplyInts(call, w, panels, block, visible);
  MultiplyFloats(call, w, panels, block, w.rows + first, visible);
}

}  // namespace
}  // namespace HEADRACE_TARGET
}  // namespace headrace
