// Where the chains of a linear layer end: what a sum goes through on its way to the output.

#include <algorithm>
#include <cstring>

namespace headrace {
namespace HEADRACE_TARGET {
namespace {

// Where a tile will store row r of its first panel.
inline char* OutputAt(const LinearCall& call, int64_t row, int64_t panel) {
  const int64_t element_bytes = call.out_dtype == DType::kFloat32 ? sizeof(float) : sizeof(uint16_t);
  return static_cast<char*>(call.out) + (row * call.weight.rows + panel * kLanes) * element_bytes;
}

// Asks for the lines that a tile will write, one row in each step of its walk along K: they come from memory while it
// computes, instead of holding up the stores at its end. All at once they would hold up its loads.
class OutputPrefetch {
 public:
  OutputPrefetch(const LinearCall& call, int64_t row, int64_t panel, int num_rows)
      : next_(OutputAt(call, row, panel)), stride_(OutputAt(call, row + 1, panel) - next_), left_(num_rows) {}
  void Next() {
    if (left_ == 0) return;
    __builtin_prefetch(next_, 1);
    next_ += stride_;
    --left_;
  }

 private:
  const char* next_;
  int64_t stride_;
  int left_;
};

inline F32x16 LoadBias(const LinearCall& call, int64_t n, int64_t num_lanes) {
  float wide[kLanes] = {};
  uint16_t narrow[kLanes] = {};
  if (call.dtype == DType::kFloat32) {
    memcpy(wide, static_cast<const float*>(call.bias) + n, num_lanes * sizeof(float));
    return LoadAsFloat32(wide);
  }
  memcpy(narrow, static_cast<const uint16_t*>(call.bias) + n, num_lanes * sizeof(uint16_t));
  return LoadAsFloat32(narrow);
}

// The end of every chain of a panel: scale the row, add the bias, round, store the lanes that exist.
template <class Out>
class RowEnd {
 public:
  RowEnd(const LinearCall& call, int64_t panel)
      : out_(reinterpret_cast<Out*>(OutputAt(call, 0, panel))),
        stride_(call.weight.rows),
        num_lanes_(std::min<int64_t>(call.weight.rows - panel * kLanes, kLanes)),
        is_scaled_(IsQuantized(call.weight.format)),
        has_bias_(call.bias != nullptr),
        scale_(is_scaled_ ? Load(call.weight.row_scales + panel * kLanes) : Broadcast(1.0f)),
        bias_(has_bias_ ? LoadBias(call, panel * kLanes, num_lanes_) : Broadcast(0.0f)) {}

  void Store(int64_t row, F32x16 sum) const {
    if (is_scaled_) sum = Mul(sum, scale_);
    if (has_bias_) sum = Add(sum, bias_);
    Out* out = out_ + row * stride_;
    if (num_lanes_ == kLanes) return StoreAs(out, sum);
    Out lanes[kLanes];
    StoreAs(lanes, sum);
    memcpy(out, lanes, num_lanes_ * sizeof(Out));
  }

 private:
  Out* out_;
  int64_t stride_;
  int64_t num_lanes_;
  bool is_scaled_;
  bool has_bias_;
  F32x16 scale_;
  F32x16 bias_;
};

}  // namespace
}  // namespace HEADRACE_TARGET
}  // namespace headrace
