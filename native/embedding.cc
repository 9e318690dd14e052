#include "embedding.h"

#include <cstring>
#include <stdexcept>
#include <string>

#include "float_bits.h"
#include "scale_byte.h"
#include "thread_pool.h"

namespace headrace {
namespace {

constexpr int64_t kMinParallelElements = 1 << 13;

bool IsOutside(const EmbeddingCall& call, int64_t row) { return row < 0 || row >= call.matrix.rows; }

void CheckIds(const EmbeddingCall& call) {
  for (int64_t i = 0; i < call.num_rows; ++i) {
    const int64_t row = call.ids[i] + call.offset;
    if (IsOutside(call, row)) {
      throw std::out_of_range("row " + std::to_string(row) + " of an embedding with " +
                              std::to_string(call.matrix.rows));
    }
  }
}

// Calls store(k, value) for each entry of a row. One loop for each format, so that the format is not asked for each
// entry.
template <class StoreEntry>
void ReadRow(const PackedView& matrix, int64_t row, const StoreEntry& store) {
  const uint8_t* lane = matrix.weights + row / kLanes * matrix.panel_bytes + row % kLanes * 4;
  const int64_t columns = matrix.columns;
  switch (matrix.format) {
    case Format::kFloat32:
      for (int64_t k = 0; k < columns; ++k) store(k, Float32At(lane, k));
      return;
    case Format::kBfloat16:
      for (int64_t k = 0; k < columns; ++k) store(k, Bfloat16At(lane, k));
      return;
    case Format::kInt8:
    case Format::kInt4:
      break;
  }
  const uint8_t* scales = matrix.scales + row / kLanes * matrix.num_groups * kLanes + row % kLanes;
  const bool is_int4 = matrix.format == Format::kInt4;
  for (int64_t begin = 0; begin < columns; begin += kGroup) {
    const float scale = FromScaleByte(scales[begin / kGroup * kLanes]);
    const int64_t end = begin + kGroup < columns ? begin + kGroup : columns;
    for (int64_t k = begin; k < end; ++k) {
      const int q = is_int4 ? Int4At(lane, k) : Int8At(lane, k);
      store(k, matrix.row_scales[row] * (scale * static_cast<float>(q)));
    }
  }
}

void EmbedRow(const EmbeddingCall& call, int64_t i) {
  const int64_t row = call.ids[i] + call.offset;
  if (IsOutside(call, row)) {
    const int64_t row_bytes = call.matrix.columns * (call.dtype == DType::kFloat32 ? 4 : 2);
    memset(static_cast<char*>(call.out) + i * row_bytes, 0, static_cast<size_t>(row_bytes));
  } else if (call.dtype == DType::kFloat32) {
    float* out = static_cast<float*>(call.out) + i * call.matrix.columns;
    ReadRow(call.matrix, row, [&](int64_t k, float value) { out[k] = value * call.scale; });
  } else {
    uint16_t* out = static_cast<uint16_t*>(call.out) + i * call.matrix.columns;
    ReadRow(call.matrix, row,
            [&](int64_t k, float value) { out[k] = ToBfloat16(FromBfloat16(ToBfloat16(value)) * call.scale); });
  }
}

}  // namespace

void Embed(const EmbeddingCall& call) {
  if (!call.zeros_outside) CheckIds(call);
  const bool is_parallel = call.num_rows > 1 && call.num_rows * call.matrix.columns >= kMinParallelElements;
  RunParts(is_parallel, [&](int part, int num_parts) {
    const Range rows = Part({0, call.num_rows}, part, num_parts);
    for (int64_t i = rows.begin; i < rows.end; ++i) EmbedRow(call, i);
  });
}

}  // namespace headrace
