// The results of a row's splits become one: (m, sum, o) of each, merged one by one, ascending.

#include <algorithm>

namespace headrace {
namespace HEADRACE_TARGET {
namespace {

// The sums of a split's rows.
void SumRows(const Workspace& w, int64_t num_rows, float* sums) {
  for (int64_t i = 0; i < num_rows; ++i) sums[i] = SumLanes(Load(w.split.sum + i * kLanes));
}

bool SeesSplit(const Row& row, int64_t split) {
  return row.panels.begin < SplitBegin(split + 1) * kTilePanels && SplitBegin(split) * kTilePanels < row.panels.end;
}

// What brings results that refer to m_total, and to m_split, to the larger of the two, for each row.
void FindFactors(const float* m_total, const float* m_split, int64_t num_rows, float* factor_total,
                 float* factor_split) {
  for (int64_t first = 0; first < num_rows; first += kLanes) {
    const int64_t count = num_rows - first < kLanes ? num_rows - first : kLanes;
    float total[kLanes] = {}, split[kLanes] = {};
    for (int64_t i = 0; i < count; ++i) {
      const float larger = Reference(m_split[first + i] > m_total[first + i] ? m_split[first + i] : m_total[first + i]);
      total[i] = m_total[first + i] - larger;
      split[i] = m_split[first + i] - larger;
    }
    Store(total, Exp2<6>(Load(total)));
    Store(split, Exp2<6>(Load(split)));
    std::copy_n(total, count, factor_total + first);
    std::copy_n(split, count, factor_split + first);
  }
}

// Adds the results of a split, m and sum of each row and rows of o one after another, to those of the rows that see it;
// the first one of a row is taken as it is.
void MergeSplit(const AttentionCall& call, const RowTile& tile, const Workspace& w, int64_t split, const float* m,
                const float* sum, const float* o, bool* is_merged) {
  const int64_t num_rows = tile.rows.end - tile.rows.begin, o_stride = OutputStride(call.layout);
  float factor_total[kPassRows], factor_split[kPassRows];
  if (call.scheme == SoftmaxScheme::kAsynchronized) {
    std::fill_n(factor_total, num_rows, 1.0f);
    std::fill_n(factor_split, num_rows, 1.0f);
  } else {
    FindFactors(w.total.m, m, num_rows, factor_total, factor_split);
  }
  for (int64_t i = 0; i < num_rows; ++i) {
    if (!SeesSplit(w.rows[i], split)) continue;
    const float* row = o + i * o_stride;
    float* total = w.total.o + i * o_stride;
    if (!is_merged[i]) {
      is_merged[i] = true;
      w.total.m[i] = m[i];
      w.total.sum[i] = sum[i];
      memcpy(total, row, o_stride * sizeof(float));
      continue;
    }
    if (call.scheme == SoftmaxScheme::kAsynchronized) {
      w.total.m[i] += m[i];  // NaN where either is marked
    } else if (m[i] > w.total.m[i]) {
      w.total.m[i] = m[i];
    }
    w.total.sum[i] = w.total.sum[i] * factor_total[i] + sum[i] * factor_split[i];
    for (int64_t d = 0; d < o_stride; d += kLanes) {
      const F32x16 scaled = Mul(Load(total + d), Broadcast(factor_total[i]));
      Store(total + d, MulAdd(Load(row + d), Broadcast(factor_split[i]), scaled));
    }
  }
}

}  // namespace
}  // namespace HEADRACE_TARGET
}  // namespace headrace
