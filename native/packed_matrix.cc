#include "packed_matrix.h"

#include <sys/mman.h>

#include <cmath>
#include <new>
#include <stdexcept>
#include <string>

#include "float_bits.h"

namespace headrace {
namespace {

constexpr size_t kHugePageBytes = size_t{2} << 20;

// Zeroed memory, in huge pages where the system has them: streaming 4 KiB pages costs a TLB miss for each 64 vectors.
// Aligned to 64 bytes because pages are.
uint8_t* Map(size_t num_bytes) {
  void* memory = mmap(nullptr, num_bytes, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
  if (memory == MAP_FAILED) throw std::bad_alloc();
#ifdef MADV_HUGEPAGE
  if (num_bytes >= kHugePageBytes) madvise(memory, num_bytes, MADV_HUGEPAGE);  // a wish: failing is no error
#endif
  return static_cast<uint8_t*>(memory);
}

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

int Nibble(const uint8_t* pairs, int64_t k) { return (pairs[k / 2] >> (k % 2 * 4)) & 15; }

void PackInt4Row(const uint8_t* pairs, int64_t columns, int64_t padded_columns, uint8_t* lane) {
  for (int64_t k = 0; k < padded_columns; ++k) {
    const int value = k < columns ? Nibble(pairs, k) : kInt4Bias;
    uint8_t* byte = lane + Int4Byte(k);
    *byte = static_cast<uint8_t>((*byte & (0xf0 >> Int4Shift(k))) | (value << Int4Shift(k)));
  }
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
      num_bytes(num_panels * (panel_bytes + num_groups * kLanes * static_cast<int64_t>(sizeof(uint16_t)) +
                              (IsQuantized(format) ? kLanes * static_cast<int64_t>(sizeof(float)) : 0))) {
  if (rows < 1 || columns < 1) throw std::invalid_argument("a matrix has at least one row and one column");
}

PackedMatrix::PackedMatrix(Format format, int64_t rows, int64_t columns)
    : layout_(format, rows, columns),
      memory_(Map(static_cast<size_t>(layout_.num_bytes)), Unmap{static_cast<size_t>(layout_.num_bytes)}) {
  uint8_t* end_of_weights = memory_.get() + layout_.num_panels * layout_.panel_bytes;
  scales_ = reinterpret_cast<uint16_t*>(end_of_weights);
  row_scales_ = reinterpret_cast<float*>(scales_ + layout_.num_panels * layout_.num_groups * kLanes);
}

void PackedMatrix::Unmap::operator()(uint8_t* memory) const { munmap(memory, num_bytes); }

void PackedMatrix::WriteRows(int64_t row, int64_t num_rows, const void* block) {
  CheckRows(layout_, row, num_rows);
  if (IsQuantized(layout_.format)) throw std::invalid_argument("a quantized matrix takes quantized rows");
  const int vector_columns = VectorColumns(layout_.format);
  for (int64_t i = 0; i < num_rows; ++i) {
    uint8_t* lane = Lane(row + i);
    if (layout_.format == Format::kFloat32) {
      const auto* from = static_cast<const float*>(block) + i * layout_.columns;
      ForEachElement<float>(layout_.columns, vector_columns, lane, [&](int64_t k, float* to) { *to = from[k]; });
    } else {
      const auto* from = static_cast<const uint16_t*>(block) + i * layout_.columns;
      ForEachElement<uint16_t>(layout_.columns, vector_columns, lane, [&](int64_t k, uint16_t* to) { *to = from[k]; });
    }
  }
}

void PackedMatrix::WriteQuantizedRows(int64_t row, int64_t num_rows, const void* values, const float* scales) {
  CheckRows(layout_, row, num_rows);
  if (!IsQuantized(layout_.format)) throw std::invalid_argument("a floating-point matrix takes floating-point rows");
  const bool is_int4 = layout_.format == Format::kInt4;
  const int64_t row_bytes = is_int4 ? (layout_.columns + 1) / 2 : layout_.columns;
  const auto* from = static_cast<const uint8_t*>(values);
  for (int64_t i = 0; i < num_rows; ++i, from += row_bytes) {
    uint8_t* lane = Lane(row + i);
    if (is_int4) {
      PackInt4Row(from, layout_.columns, layout_.padded_columns, lane);
    } else {
      ForEachElement<uint8_t>(layout_.padded_columns, 4, lane, [&](int64_t k, uint8_t* to) {
        *to = static_cast<uint8_t>((k < layout_.columns ? from[k] : 0) ^ kInt8Bias);
      });
    }
    WriteScales(row + i, scales + i * layout_.num_groups);
  }
}

void PackedMatrix::WriteScales(int64_t row, const float* scales) {
  float largest = 0;
  for (int64_t g = 0; g < layout_.num_groups; ++g) {
    if (!std::isfinite(scales[g])) throw std::invalid_argument("a weight's scale is NaN or infinite");
    largest = std::fmax(largest, std::fabs(scales[g]));
  }
  int exponent = 0;
  if (largest > 0) exponent = std::ilogb(largest);
  row_scales_[row] = std::ldexp(1.0f, exponent);
  uint16_t* packed = scales_ + row / kLanes * layout_.num_groups * kLanes + row % kLanes;
  for (int64_t g = 0; g < layout_.num_groups; ++g) packed[g * kLanes] = ToHalf(std::ldexp(scales[g], -exponent));
}

}  // namespace headrace
