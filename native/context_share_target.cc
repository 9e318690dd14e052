// The weighting of shares on one target. Compiled once for each, with that target's flags.
#include "context_share.h"

#include <cstring>
#include <limits>

#include "simd/simd-inl.h"

#include "exp2-inl.h"

namespace headrace {
namespace HEADRACE_TARGET {
namespace {

constexpr float kInfinity = std::numeric_limits<float>::infinity();

float Exp2Of(float x) {
  float lanes[kLanes];
  Store(lanes, Exp2<6>(Broadcast(x)));
  return lanes[0];
}

// What the own numerators of a token and head are multiplied by. Where no rank sees anything of weight it is 0 / 0, as it
// is for one rank alone.
float WeightOf(const WeighShareCall& call, int64_t row) {
  float largest = -kInfinity;
  for (const float* normalizers : call.normalizers) {
    const float m = normalizers[2 * row + 1];
    largest = m > largest ? m : largest;
  }
  // 2^-infinity is 0 whatever it is compared with, but infinity - infinity is not a number.
  if (largest == -kInfinity) largest = 0;
  float sum = 0;
  for (const float* normalizers : call.normalizers) {
    sum += normalizers[2 * row] * Exp2Of(normalizers[2 * row + 1] - largest);
  }
  return Exp2Of(call.normalizers[call.own_rank][2 * row + 1] - largest) / sum;
}

void StoreAs(float* to, const F32x16& a) { Store(to, a); }
void StoreAs(uint16_t* to, const F32x16& a) { StoreBf16(to, a); }

template <class Out>
void WriteScaled(const float* from, float factor, int64_t count, Out* out) {
  int64_t d = 0;
  for (; d + kLanes <= count; d += kLanes) StoreAs(out + d, Mul(Load(from + d), Broadcast(factor)));
  if (d == count) return;
  float rest[kLanes] = {};
  Out rounded[kLanes];
  memcpy(rest, from + d, (count - d) * sizeof(float));
  StoreAs(rounded, Mul(Load(rest), Broadcast(factor)));
  memcpy(out + d, rounded, (count - d) * sizeof(Out));
}

template <class Out>
void WeighAs(const WeighShareCall& call, Range tokens) {
  const int64_t part_heads = call.num_heads / call.num_parts;
  auto* out = static_cast<Out*>(call.out);
  for (int64_t token = tokens.begin; token < tokens.end; ++token) {
    for (int64_t head = 0; head < call.num_heads; ++head) {
      const int64_t row = token * call.num_heads + head;
      const int64_t to = (head / part_heads * call.num_tokens + token) * part_heads + head % part_heads;
      WriteScaled(call.numerators + row * call.head_dim, WeightOf(call, row), call.head_dim, out + to * call.head_dim);
    }
  }
}

void Weigh(const WeighShareCall& call, Range tokens) {
  if (call.dtype == DType::kFloat32) return WeighAs<float>(call, tokens);
  WeighAs<uint16_t>(call, tokens);
}

}  // namespace

extern const ContextShareKernels kContextShare;
const ContextShareKernels kContextShare = {&Weigh};

}  // namespace HEADRACE_TARGET
}  // namespace headrace
