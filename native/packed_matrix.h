// Weight matrices in the one layout that all linear kernels read.
//
// W is [N, K]. Outputs (rows of W) lie in panels of 16, one per lane of a vector of float32; a panel is stored from
// k = 0 to K without a gap, so that a kernel that keeps 16 accumulators reads memory in order:
//
//   float32   one k is one vector:          w[0..15][k]                                          64 bytes
//   bfloat16  two k are one vector:         w[0][k] w[0][k+1] w[1][k] w[1][k+1] ...              64 bytes
//   int8      four k are one vector:        w[0][k..k+3] w[1][k..k+3] ...       stored as q + 128, 64 bytes
//   int4      eight k are one vector:       byte 4 n + i holds w[n][k+i] in its low, w[n][k+4+i] in its high nibble,
//                                           stored as q + 8, 64 bytes
//
// N is filled up to a multiple of 16 and K to one of 1, 2, 32 and 32, with zeros.
//
// Scales of the integer formats: w[n][k] = row_scale[n] * scale[n][k / 32] * q, scale in a byte (scale_byte.h),
// row_scale a power of two. Lying [panel][group][16], scales cost a quarter of a bit for each weight, where float16
// would cost half a bit and float32 one. The power of two brings the largest |scale| of a row into [1/2, 1).
// QuantizeRows chooses scales that bytes hold; a group whose scale is below 2^-14 of the row's power of two, or none of
// a byte's, has its integers rounded once more, to steps of the next scale.
#ifndef HEADRACE_NATIVE_PACKED_MATRIX_H_
#define HEADRACE_NATIVE_PACKED_MATRIX_H_

#include <cstddef>
#include <cstdint>
#include <cstring>
#include <memory>

#include "float_bits.h"
#include "huge_memory.h"
#include "range.h"
#include "rows_view.h"
#include "target.h"

namespace headrace {

enum class Format { kFloat32, kBfloat16, kInt8, kInt4 };

constexpr int kLanes = 16;  // outputs in a panel
constexpr int kGroup = 32;  // entries along K that share a scale
constexpr int kVectorBytes = 64;
constexpr int kInt8Bias = 128;
constexpr int kInt4Bias = 8;

static constexpr bool IsQuantized(Format format) { return format == Format::kInt8 || format == Format::kInt4; }

// Entries along K in one vector of 64 bytes.
static constexpr int VectorColumns(Format format) {
  switch (format) {
    case Format::kFloat32:
      return 1;
    case Format::kBfloat16:
      return 2;
    case Format::kInt8:
      return 4;
    case Format::kInt4:
      return 8;
  }
  return 0;
}

static constexpr int64_t RoundUp(int64_t value, int64_t step) { return (value + step - 1) / step * step; }

// Sizes that follow from a format and a shape.
struct PackedLayout {
  PackedLayout(Format format, int64_t rows, int64_t columns);

  Format format;
  int64_t rows;
  int64_t columns;
  int64_t num_panels;
  int64_t padded_columns;
  int64_t num_groups;   // along K; 0 for floating point
  int64_t panel_bytes;  // of weights
  int64_t num_bytes;    // of weights, scales and row scales
};

// Where the parts of a packed matrix lie. Plain data: kernels for several instruction sets read it.
//   weights [panel][k][lane], scales [panel][group][lane] bytes, row_scales [panel][lane]
struct PackedView {
  Format format;
  int64_t rows;
  int64_t columns;
  int64_t padded_columns;
  int64_t num_groups;
  int64_t panel_bytes;
  const uint8_t* weights;
  const uint8_t* scales;
  const float* row_scales;
};

// Where entry k of an int4 lane lies: byte and shift.
static inline int64_t Int4Byte(int64_t k) { return k / 8 * kVectorBytes + k % 4; }
static inline int Int4Shift(int64_t k) { return k % 8 < 4 ? 0 : 4; }

// Entry k of the row whose lane begins at `lane`, without its scale.
static inline float Float32At(const uint8_t* lane, int64_t k) {
  float value;
  memcpy(&value, lane + k * kVectorBytes, sizeof value);
  return value;
}
static inline float Bfloat16At(const uint8_t* lane, int64_t k) {
  uint16_t bits;
  memcpy(&bits, lane + k / 2 * kVectorBytes + k % 2 * 2, sizeof bits);
  return FromBfloat16(bits);
}
static inline int Int8At(const uint8_t* lane, int64_t k) { return lane[k / 4 * kVectorBytes + k % 4] - kInt8Bias; }
static inline int Int4At(const uint8_t* lane, int64_t k) {
  return ((lane[Int4Byte(k)] >> Int4Shift(k)) & 15) - kInt4Bias;
}

// Owns a packed matrix, together with those made of its rows; all zero until rows are written, by one caller at a time.
class PackedMatrix {
 public:
  PackedMatrix(Format format, int64_t rows, int64_t columns);

  const PackedLayout& layout() const { return layout_; }

  // Rows [begin, end) as a matrix of their own in the same memory, which lives as long as either. `begin` is that of a
  // panel, and so is `end` unless it is the last row's.
  PackedMatrix Rows(int64_t begin, int64_t end) const;

  // Store rows [row, row + x.num_rows) of floating point, rounding or quantizing them if the format says so; all threads
  // of the pool take part. Integers are those of QuantizeRows. False if they are to be and x holds NaN or infinity.
  bool WriteRows(Target target, int64_t row, const RowsView& x);
  // The same for rows already quantized, as QuantizeRows writes them.
  void WriteQuantizedRows(int64_t row, int64_t num_rows, const uint8_t* values, const float* scales);

  PackedView view() const {
    return {layout_.format,     layout_.rows,        layout_.columns, layout_.padded_columns,
            layout_.num_groups, layout_.panel_bytes, weights_,        scales_,
            row_scales_};
  }

 private:
  uint8_t* Lane(int64_t row) const { return weights_ + row / kLanes * layout_.panel_bytes + row % kLanes * 4; }
  // Stores rows of one panel, each in its format's type, filled up to padded_columns: integers as signed bytes.
  void PackRows(int64_t row, int64_t num_rows, const uint8_t* const* from);
  // Rounds q anew, signed bytes filled up to padded_columns, where a byte does not hold a scale.
  void WriteScales(int64_t row, const float* scales, int8_t* q);
  // write(part of the rows, none of which shares a panel with another part), in parallel.
  template <class Write>
  void ForEachPanel(int64_t row, int64_t num_rows, const Write& write);

  PackedLayout layout_;
  std::shared_ptr<uint8_t> memory_;
  uint8_t* weights_;
  uint8_t* scales_;
  float* row_scales_;
};

}  // namespace headrace

#endif  // HEADRACE_NATIVE_PACKED_MATRIX_H_
