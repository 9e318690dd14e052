#include "packed_matrix.h"

#include <algorithm>
#include <atomic>
#include <cmath>
#include <cstring>
#include <stdexcept>
#include <string>

#include "float_bits.h"
#include "quantize_rows.h"
#include "scale_byte.h"
#include "scratch.h"
#include "targets.h"
#include "thread_pool.h"

namespace headrace {
namespace {

void CheckRows(const PackedLayout& layout, int64_t row, int64_t num_rows) {
  if (row < 0 || num_rows < 0 || row > layout.rows - num_rows) {
    throw std::out_of_range("rows " + std::to_string(row) + " to " + std::to_string(row + num_rows) +
                            " of a matrix with " + std::to_string(layout.rows));
  }
}

// Calls move(k, place of column k) for a row whose lane begins at `lane`, `vector_columns` of it in each 64 bytes.
template <class Element, class Move>
void ForEachElement(int64_t columns, int vector_columns, uint8_t* lane, const Move& move) {
  for (int64_t k = 0; k < columns; ++k) {
    auto* vector = reinterpret_cast<Element*>(lane + k / vector_columns * kVectorBytes);
    move(k, vector + k % vector_columns);
  }
}

// Elements below which a second thread costs more than it saves.
constexpr int64_t kMinParallelElements = 1 << 14;

int64_t ElementBytes(Format format) {
  return format == Format::kFloat32 ? 4 : format == Format::kBfloat16 ? 2 : 1;
}

uint32_t WordAt(const uint8_t* bytes, int64_t word) {
  uint32_t value;
  memcpy(&value, bytes + 4 * word, sizeof value);
  return value;
}

// Four signed bytes -8 .. 7 as nibbles q + 8, one in each byte.
uint32_t AsNibbles(uint32_t bytes) { return (bytes & 0x0f0f0f0f) ^ 0x08080808; }

// What a row has in the vector of 64 bytes: its word, four bytes wide.
template <Format kFormat>
uint32_t PackedWord(const uint8_t* row, int64_t vector) {
  if constexpr (kFormat == Format::kInt8) return WordAt(row, vector) ^ 0x80808080;
  if constexpr (kFormat == Format::kInt4) {
    return AsNibbles(WordAt(row, 2 * vector)) | AsNibbles(WordAt(row, 2 * vector + 1)) << 4;
  }
  return WordAt(row, vector);
}

// Some vectors at a time, so that they stay in the L1 cache until every row has come to them.
template <Format kFormat>
void Interleave(const uint8_t* const* rows, int64_t num_rows, int64_t num_vectors, uint8_t* lane) {
  constexpr int64_t kVectorsAtOnce = 64;
  for (int64_t begin = 0; begin < num_vectors; begin += kVectorsAtOnce) {
    const int64_t end = std::min(begin + kVectorsAtOnce, num_vectors);
    for (int64_t i = 0; i < num_rows; ++i) {
      for (int64_t v = begin; v < end; ++v) {
        const uint32_t word = PackedWord<kFormat>(rows[i], v);
        memcpy(lane + v * kVectorBytes + 4 * i, &word, sizeof word);
      }
    }
  }
}

template <class To, class From, class Convert>
void ConvertRow(const void* from, int64_t columns, To* to, const Convert& convert) {
  for (int64_t k = 0; k < columns; ++k) to[k] = convert(static_cast<const From*>(from)[k]);
}

// One row of floating point in the matrix's own type.
void CopyRow(Format format, DType dtype, const void* from, int64_t columns, void* to) {
  const bool is_to_float32 = format == Format::kFloat32;
  if (is_to_float32 == (dtype == DType::kFloat32)) {
    memcpy(to, from, columns * ElementBytes(format));
  } else if (is_to_float32) {
    ConvertRow<float, uint16_t>(from, columns, static_cast<float*>(to), FromBfloat16);
  } else {
    ConvertRow<uint16_t, float>(from, columns, static_cast<uint16_t*>(to), ToBfloat16);
  }
}

void ExpandPairs(const uint8_t* pairs, int64_t columns, uint8_t* to) {
  for (int64_t k = 0; k + 1 < columns; k += 2) {
    to[k] = static_cast<uint8_t>((pairs[k / 2] & 15) - kInt4Bias);
    to[k + 1] = static_cast<uint8_t>((pairs[k / 2] >> 4) - kInt4Bias);
  }
  if (columns % 2 != 0) to[columns - 1] = static_cast<uint8_t>((pairs[columns / 2] & 15) - kInt4Bias);
}

// The least magnitude that a byte holds and a scale does not exceed, which is at most 0.9375 itself; with its sign.
float HeldScale(double scale) {
  const float magnitude = ScaleFrom(std::max(static_cast<float>(std::fabs(scale)), kLeastScale));
  return scale < 0 ? -magnitude : magnitude;
}

void Requantize(double factor, int8_t* q) {
  for (int k = 0; k < kGroup; ++k) q[k] = static_cast<int8_t>(std::lrint(factor * q[k]));
}

}  // namespace

PackedLayout::PackedLayout(Format format, int64_t rows, int64_t columns)
    : format(format),
      rows(rows),
      columns(columns),
      num_panels((rows + kLanes - 1) / kLanes),
      padded_columns(RoundUp(columns, IsQuantized(format) ? kGroup : VectorColumns(format))),
      num_groups(IsQuantized(format) ? padded_columns / kGroup : 0),
      panel_bytes(padded_columns / VectorColumns(format) * kVectorBytes),
      num_bytes(num_panels * (panel_bytes + num_groups * kLanes +
                              (IsQuantized(format) ? kLanes * static_cast<int64_t>(sizeof(float)) : 0))) {
  if (rows < 0 || columns < 1) throw std::invalid_argument("a matrix has at least one column, and no fewer rows than 0");
}

PackedMatrix::PackedMatrix(Format format, int64_t rows, int64_t columns)
    : layout_(format, rows, columns),
      memory_(MapMemory(std::max<size_t>(static_cast<size_t>(layout_.num_bytes), 1))),
      weights_(memory_.get()) {
  uint8_t* end_of_weights = weights_ + layout_.num_panels * layout_.panel_bytes;
  scales_ = end_of_weights;
  row_scales_ = reinterpret_cast<float*>(scales_ + layout_.num_panels * layout_.num_groups * kLanes);
}

PackedMatrix PackedMatrix::Rows(int64_t begin, int64_t end) const {
  CheckRows(layout_, begin, end - begin);
  const bool are_panels = begin % kLanes == 0 && (end % kLanes == 0 || end == layout_.rows);
  if (begin != end && !are_panels) {
    throw std::invalid_argument("rows " + std::to_string(begin) + " to " + std::to_string(end) +
                                " do not begin and end with a panel of " + std::to_string(kLanes));
  }
  const int64_t panel = begin / kLanes;
  PackedMatrix rows = *this;
  rows.layout_ = PackedLayout(layout_.format, end - begin, layout_.columns);
  rows.weights_ += panel * layout_.panel_bytes;
  rows.scales_ += panel * layout_.num_groups * kLanes;
  if (IsQuantized(layout_.format)) rows.row_scales_ += panel * kLanes;
  return rows;
}

template <class Write>
void PackedMatrix::ForEachPanel(int64_t row, int64_t num_rows, const Write& write) {
  if (num_rows == 0) return;
  const Range panels = {row / kLanes, (row + num_rows - 1) / kLanes + 1};
  RunParts(num_rows * layout_.columns >= kMinParallelElements, [&](int part, int num_parts) {
    const Range mine = Part(panels, part, num_parts);
    for (int64_t panel = mine.begin; panel < mine.end; ++panel) {
      write(Range{std::max(panel * kLanes, row), std::min((panel + 1) * kLanes, row + num_rows)});
    }
  });
}

void PackedMatrix::PackRows(int64_t row, int64_t num_rows, const uint8_t* const* from) {
  const int64_t num_vectors = layout_.padded_columns / VectorColumns(layout_.format);
  switch (layout_.format) {
    case Format::kFloat32:
    case Format::kBfloat16:
      return Interleave<Format::kFloat32>(from, num_rows, num_vectors, Lane(row));
    case Format::kInt8:
      return Interleave<Format::kInt8>(from, num_rows, num_vectors, Lane(row));
    case Format::kInt4:
      return Interleave<Format::kInt4>(from, num_rows, num_vectors, Lane(row));
  }
}

bool PackedMatrix::WriteRows(Target target, int64_t row, const RowsView& x) {
  CheckRows(layout_, row, x.num_rows);
  const QuantizeKernels& kernels = HEADRACE_CHOOSE(target, kQuantize);
  const bool is_quantized = IsQuantized(layout_.format);
  const int64_t row_bytes = RoundUp(layout_.padded_columns * ElementBytes(layout_.format), 64);
  std::atomic<bool> is_finite{true};
  ForEachPanel(row, x.num_rows, [&](Range rows) {
    char* memory = Scratch(static_cast<size_t>(kLanes * row_bytes + layout_.num_groups * 4));
    auto* scales = reinterpret_cast<float*>(memory + kLanes * row_bytes);
    const uint8_t* packed[kLanes];
    for (int64_t i = 0; i < rows.end - rows.begin; ++i) {
      char* values = memory + i * row_bytes;
      packed[i] = reinterpret_cast<const uint8_t*>(values);
      const void* from = x.Row(rows.begin - row + i);
      if (!is_quantized) {
        memset(values, 0, row_bytes);
        CopyRow(layout_.format, x.dtype, from, layout_.columns, values);
      } else if (kernels.quantize_row(layout_.format, x.dtype, from, layout_.columns,
                                      reinterpret_cast<int8_t*>(values), scales)) {
        WriteScales(rows.begin + i, scales, reinterpret_cast<int8_t*>(values));
      } else {
        is_finite = false;
        memset(values, 0, row_bytes);
      }
    }
    PackRows(rows.begin, rows.end - rows.begin, packed);
  });
  return is_finite;
}

void PackedMatrix::WriteQuantizedRows(int64_t row, int64_t num_rows, const uint8_t* values, const float* scales) {
  CheckRows(layout_, row, num_rows);
  if (!IsQuantized(layout_.format)) throw std::invalid_argument("a floating-point matrix takes floating-point rows");
  const bool is_int4 = layout_.format == Format::kInt4;
  const int64_t from_bytes = is_int4 ? (layout_.columns + 1) / 2 : layout_.columns;
  const int64_t num_scales = num_rows * layout_.num_groups;
  if (!std::all_of(scales, scales + num_scales, [](float scale) { return std::fabs(scale) < 0x1p126f; })) {
    throw std::invalid_argument("a weight's scale is NaN, infinite or above 2^126");
  }
  ForEachPanel(row, num_rows, [&](Range rows) {
    char* memory = Scratch(static_cast<size_t>(kLanes * layout_.padded_columns));
    const uint8_t* packed[kLanes];
    for (int64_t i = 0; i < rows.end - rows.begin; ++i) {
      auto* to = reinterpret_cast<uint8_t*>(memory + i * layout_.padded_columns);
      packed[i] = to;
      memset(to, 0, layout_.padded_columns);
      const uint8_t* from = values + (rows.begin - row + i) * from_bytes;
      if (is_int4) {
        ExpandPairs(from, layout_.columns, to);
      } else {
        memcpy(to, from, layout_.columns);
      }
      const float* row_scales = scales + (rows.begin - row + i) * layout_.num_groups;
      WriteScales(rows.begin + i, row_scales, reinterpret_cast<int8_t*>(to));
    }
    PackRows(rows.begin, rows.end - rows.begin, packed);
  });
}

void PackedMatrix::WriteScales(int64_t row, const float* scales, int8_t* q) {
  float largest = 0;
  for (int64_t g = 0; g < layout_.num_groups; ++g) largest = std::max(largest, std::fabs(scales[g]));
  const int exponent = largest > 0 ? std::ilogb(ScaleFrom(largest)) + 1 : 0;
  row_scales_[row] = std::ldexp(1.0f, exponent);
  const double inverse = std::ldexp(1.0, -exponent);
  uint8_t* packed = scales_ + row / kLanes * layout_.num_groups * kLanes + row % kLanes;
  for (int64_t g = 0; g < layout_.num_groups; ++g) {
    const double scale = scales[g] * inverse;
    const float held = HeldScale(scale);
    packed[g * kLanes] = ToScaleByte(held);
    if (held != scale) Requantize(scale / held, q + g * kGroup);
  }
}

}  // namespace headrace
