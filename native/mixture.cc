#include "mixture.h"

#include <algorithm>
#include <cmath>
#include <cstring>
#include <stdexcept>

#include "float_bits.h"
#include "thread_pool.h"

namespace headrace {
namespace {

// Tokens of one expert at a time: enough to make the most of its weights once they are read.
constexpr int64_t kMaxRows = 512;
constexpr int64_t kMinParallelElements = 1 << 14;

// Of a token that takes an expert: which one it is, and with what weight.
struct Pick {
  int32_t token;
  float weight;
};

struct Shape {
  int64_t num_experts;
  int64_t hidden_size;
  int64_t intermediate_size;
  int64_t max_rows;
  int64_t element_bytes;
};

Shape ShapeOf(const MixtureCall& call) {
  const std::vector<Expert>& experts = *call.experts;
  const auto num_experts = static_cast<int64_t>(experts.size());
  if (call.experts_per_token < 1 || call.experts_per_token > num_experts) {
    throw std::invalid_argument("a token takes at least one expert, and each at most once");
  }
  const PackedView& down = experts[0].down;
  for (const Expert& expert : experts) {
    if (expert.up.columns != down.rows || expert.up.rows != 2 * down.columns || expert.down.rows != down.rows ||
        expert.down.columns != down.columns) {
      throw std::invalid_argument("the experts of a mixture have one shape: up [2 i, h], down [h, i]");
    }
  }
  const int64_t element_bytes = call.dtype == DType::kFloat32 ? 4 : 2;
  return {num_experts, down.rows, down.columns, std::min(call.num_tokens, kMaxRows), element_bytes};
}

// Where things lie in the workspace.
struct Workspace {
  int64_t* starts;      // [num_experts + 1]: picks of an expert begin here
  int32_t* ids;         // [num_tokens, k]: experts taken
  float* weights;       // [num_tokens, k]
  float* exponentials;  // [num_tokens, num_experts]; those of experts taken become negative
  Pick* picks;          // [num_tokens * k], by expert, tokens ascending
  char* x;              // [max_rows, hidden_size] of an expert's tokens
  char* up;             // [max_rows, 2 * intermediate_size]
  char* activated;      // [max_rows, intermediate_size]
  float* down;          // [max_rows, hidden_size]
  float* sums;          // [num_tokens, hidden_size]
  size_t num_bytes;
};

Workspace Cut(const MixtureCall& call, const Shape& shape) {
  size_t used = 0;
  // Also without a workspace, to find out how large one must be.
  const auto cut = [&](int64_t num_bytes) {
    char* part = call.workspace == nullptr ? nullptr : call.workspace + used;
    used += static_cast<size_t>((num_bytes + 63) / 64 * 64);
    return part;
  };
  const int64_t num_picks = call.num_tokens * call.experts_per_token;
  Workspace w = {};
  w.starts = reinterpret_cast<int64_t*>(cut((shape.num_experts + 1) * 8));
  w.ids = reinterpret_cast<int32_t*>(cut(num_picks * 4));
  w.weights = reinterpret_cast<float*>(cut(num_picks * 4));
  w.exponentials = reinterpret_cast<float*>(cut(call.num_tokens * shape.num_experts * 4));
  w.picks = reinterpret_cast<Pick*>(cut(num_picks * static_cast<int64_t>(sizeof(Pick))));
  w.x = cut(shape.max_rows * shape.hidden_size * shape.element_bytes);
  w.up = cut(shape.max_rows * 2 * shape.intermediate_size * shape.element_bytes);
  w.activated = cut(shape.max_rows * shape.intermediate_size * shape.element_bytes);
  w.down = reinterpret_cast<float*>(cut(shape.max_rows * shape.hidden_size * 4));
  w.sums = reinterpret_cast<float*>(cut(call.num_tokens * shape.hidden_size * 4));
  w.num_bytes = used;
  return w;
}

float LogitAt(const MixtureCall& call, int64_t index) {
  if (call.dtype == DType::kFloat32) return static_cast<const float*>(call.router_logits)[index];
  return FromBfloat16(static_cast<const uint16_t*>(call.router_logits)[index]);
}

// The experts of one token, the most probable first.
void Route(const MixtureCall& call, const Shape& shape, const Workspace& w, int64_t token) {
  const int64_t k = call.experts_per_token;
  int32_t* ids = w.ids + token * k;
  float* weights = w.weights + token * k;
  float* exponentials = w.exponentials + token * shape.num_experts;
  float largest = -INFINITY;
  for (int64_t e = 0; e < shape.num_experts; ++e) {
    exponentials[e] = LogitAt(call, token * shape.num_experts + e);
    largest = std::max(largest, exponentials[e]);
  }
  float sum = 0;
  for (int64_t e = 0; e < shape.num_experts; ++e) {
    exponentials[e] = std::exp(exponentials[e] - largest);
    sum += exponentials[e];
  }
  float taken = 0;
  for (int64_t i = 0; i < k; ++i) {
    int32_t best = -1;
    for (int32_t e = 0; e < shape.num_experts; ++e) {
      const bool is_free = !(exponentials[e] < 0);
      if (is_free && (best < 0 || exponentials[e] > exponentials[best])) best = e;
    }
    ids[i] = best;
    weights[i] = exponentials[best] / sum;
    exponentials[best] = -1;
    taken += weights[i];
  }
  if (!call.is_renormalized) return;
  for (int64_t i = 0; i < k; ++i) weights[i] /= taken;
}

// Tokens apart, on all threads where there are many.
void RouteAll(const MixtureCall& call, const Shape& shape, const Workspace& w) {
  RunParts(call.num_tokens * shape.num_experts >= kMinParallelElements, [&](int part, int num_parts) {
    const Range tokens = Part({0, call.num_tokens}, part, num_parts);
    for (int64_t token = tokens.begin; token < tokens.end; ++token) Route(call, shape, w, token);
  });
}

// Sums, rounded once.
void StoreSums(const MixtureCall& call, const float* sums, int64_t num_entries) {
  RunParts(num_entries >= kMinParallelElements, [&](int part, int num_parts) {
    const Range entries = Part({0, num_entries}, part, num_parts);
    if (call.dtype == DType::kFloat32) {
      std::copy(sums + entries.begin, sums + entries.end, static_cast<float*>(call.out) + entries.begin);
    } else {
      std::transform(sums + entries.begin, sums + entries.end, static_cast<uint16_t*>(call.out) + entries.begin,
                     ToBfloat16);
    }
  });
}

// Sorts what the tokens take by expert.
void SortPicks(const MixtureCall& call, const Shape& shape, const Workspace& w) {
  const int64_t k = call.experts_per_token;
  std::fill(w.starts, w.starts + shape.num_experts + 1, 0);
  for (int64_t i = 0; i < call.num_tokens * k; ++i) ++w.starts[w.ids[i] + 1];
  for (int64_t e = 0; e < shape.num_experts; ++e) w.starts[e + 1] += w.starts[e];
  // Each start moves to the end of its expert's picks, which is the next one's start, and all are moved back.
  for (int64_t i = 0; i < call.num_tokens * k; ++i) {
    w.picks[w.starts[w.ids[i]]++] = {static_cast<int32_t>(i / k), w.weights[i]};
  }
  for (int64_t e = shape.num_experts; e > 0; --e) w.starts[e] = w.starts[e - 1];
  w.starts[0] = 0;
}

// One expert on some of its tokens, added to their sums.
void RunExpert(Target target, const MixtureCall& call, const Shape& shape, const Workspace& w, const Expert& expert,
               const Pick* picks, int64_t num_rows) {
  const int64_t size = shape.hidden_size;
  const auto row_bytes = static_cast<size_t>(size * shape.element_bytes);
  for (int64_t i = 0; i < num_rows; ++i) {
    memcpy(w.x + static_cast<size_t>(i) * row_bytes,
           static_cast<const char*>(call.x) + static_cast<size_t>(picks[i].token) * row_bytes, row_bytes);
  }
  Linear(target, call.up_arms.At(num_rows),
         {expert.up, call.dtype, num_rows, w.x, size, nullptr, w.up, call.dtype, call.is_batch_invariant});
  Activate(target, {call.activation, true, call.dtype, num_rows, shape.intermediate_size, w.up, w.activated});
  Linear(target, call.down_arms.At(num_rows),
         {expert.down, call.dtype, num_rows, w.activated, shape.intermediate_size, nullptr, w.down, DType::kFloat32,
          call.is_batch_invariant});
  RunParts(num_rows * size >= kMinParallelElements, [&](int part, int num_parts) {
    const Range columns = Part({0, size}, part, num_parts);
    for (int64_t i = 0; i < num_rows; ++i) {
      float* sum = w.sums + picks[i].token * size;
      for (int64_t d = columns.begin; d < columns.end; ++d) sum[d] += picks[i].weight * w.down[i * size + d];
    }
  });
}

}  // namespace

size_t MixtureWorkspaceBytes(const MixtureCall& call) { return Cut(call, ShapeOf(call)).num_bytes; }

void Mixture(Target target, const MixtureCall& call) {
  const Shape shape = ShapeOf(call);
  const Workspace w = Cut(call, shape);
  RouteAll(call, shape, w);
  SortPicks(call, shape, w);
  const int64_t num_entries = call.num_tokens * shape.hidden_size;
  std::fill(w.sums, w.sums + num_entries, 0.0f);
  for (int64_t e = 0; e < shape.num_experts; ++e) {
    for (int64_t begin = w.starts[e]; begin < w.starts[e + 1]; begin += shape.max_rows) {
      const int64_t num_rows = std::min(shape.max_rows, w.starts[e + 1] - begin);
      RunExpert(target, call, shape, w, (*call.experts)[static_cast<size_t>(e)], w.picks + begin, num_rows);
    }
  }
  StoreSums(call, w.sums, num_entries);
}

}  // namespace headrace
