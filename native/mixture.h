// A mixture of experts: each token through its most probable experts, their outputs summed by probability.
//
//   p = softmax(router_logits), the k largest of them taken (of equals the first), divided by their sum if renormalized
//   out = sum of p[e] * (act(x gate_e^T) * (x up_e^T)) down_e^T over the experts taken, e ascending
//
// The sum is in float32 and rounded once. Which experts run is read from the logits when the call runs, so that it can be
// recorded: a row's bits depend on that row alone, and each expert meets its tokens together, up to 512 at a time.
// A row of logits with NaN takes some experts and becomes NaN.
#ifndef HEADRACE_NATIVE_MIXTURE_H_
#define HEADRACE_NATIVE_MIXTURE_H_

#include <cstddef>
#include <cstdint>
#include <memory>
#include <vector>

#include "activation.h"
#include "dtype.h"
#include "linear.h"
#include "packed_matrix.h"
#include "target.h"

namespace headrace {

// up is [2 * intermediate_size, hidden_size], gate first; down is [hidden_size, intermediate_size].
struct Expert {
  PackedView up;
  PackedView down;
};

// The numbers of rows from which a linear layer takes another arm.
struct ArmsByRows {
  int64_t flat_gemm_from;
  int64_t gemm_from;

  Arm At(int64_t num_rows) const {
    return num_rows >= gemm_from ? Arm::kGemm : num_rows >= flat_gemm_from ? Arm::kFlatGemm : Arm::kGemv;
  }
};

// x and out [num_tokens, hidden_size] and router_logits [num_tokens, number of experts], contiguous, of one type.
struct MixtureCall {
  std::shared_ptr<const std::vector<Expert>> experts;
  ArmsByRows up_arms;
  ArmsByRows down_arms;
  int64_t experts_per_token;
  bool is_renormalized;
  bool is_batch_invariant;  // as in LinearCall
  ActivationKind activation;
  DType dtype;
  int64_t num_tokens;
  const void* x;
  const void* router_logits;
  void* out;
  char* workspace;  // MixtureWorkspaceBytes, aligned to 64
};

size_t MixtureWorkspaceBytes(const MixtureCall& call);

// Throws std::invalid_argument if the experts' shapes do not fit each other or experts_per_token.
void Mixture(Target target, const MixtureCall& call);

}  // namespace headrace

#endif  // HEADRACE_NATIVE_MIXTURE_H_
