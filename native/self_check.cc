// Checks the kernels of this build without Python: for machines that only an emulator stands in for (scripts/check_aarch64).
//
// Each weight format is multiplied by each arm and compared with a sum in float64, and the arms with each other bit by bit;
// norms and activations are compared with the C library's functions, attention and a mixture of experts with plain loops in
// float64.
#include <algorithm>
#include <cmath>
#include <cstdio>
#include <cstring>
#include <random>
#include <string>
#include <utility>
#include <vector>

#include "activation.h"
#include "attention.h"
#include "float_bits.h"
#include "linear.h"
#include "mixture.h"
#include "norm.h"
#include "rotary.h"
#include "target.h"
#include "thread_pool.h"

namespace headrace {
namespace {

int num_failed = 0;

void Check(bool is_right, const std::string& what) {
  if (!is_right) {
    std::printf("FAILED %s\n", what.c_str());
    ++num_failed;
  }
}

std::vector<float> Random(int64_t size, uint32_t seed) {
  std::mt19937 generator(seed);
  std::normal_distribution<float> normal;
  std::vector<float> values(static_cast<size_t>(size));
  for (float& value : values) value = FromBfloat16(ToBfloat16(normal(generator)));  // exact in every format of x
  return values;
}

constexpr int64_t kOutputs = 37;
constexpr int64_t kInputs = 100;

struct Weight {
  PackedMatrix packed;
  std::vector<double> exact;  // [kOutputs][kInputs]
};

Weight MakeFloatWeight(Format format) {
  Weight weight = {PackedMatrix(format, kOutputs, kInputs), {}};
  const std::vector<float> values = Random(kOutputs * kInputs, 1);
  weight.exact.assign(values.begin(), values.end());
  weight.packed.WriteRows(BestTarget(), 0, {DType::kFloat32, kOutputs, values.data(), kInputs});
  return weight;
}

Weight MakeIntWeight(Format format) {
  Weight weight = {PackedMatrix(format, kOutputs, kInputs), {}};
  const bool is_int4 = format == Format::kInt4;
  const int64_t num_groups = weight.packed.layout().num_groups;
  std::mt19937 generator(2);
  std::uniform_int_distribution<int> q(is_int4 ? -8 : -127, is_int4 ? 7 : 127);
  std::vector<uint8_t> values(static_cast<size_t>(kOutputs * (is_int4 ? kInputs / 2 : kInputs)));
  std::vector<float> scales;
  for (int64_t i = 0; i < kOutputs * num_groups; ++i) scales.push_back(0.001f * static_cast<float>(1 + i % 50));
  for (int64_t n = 0; n < kOutputs; ++n) {
    for (int64_t k = 0; k < kInputs; ++k) {
      const int value = q(generator);
      if (is_int4) {
        values[static_cast<size_t>((n * kInputs + k) / 2)] |= static_cast<uint8_t>((value + 8) << (k % 2 * 4));
      } else {
        values[static_cast<size_t>(n * kInputs + k)] = static_cast<uint8_t>(value);
      }
      weight.exact.push_back(value * static_cast<double>(scales[static_cast<size_t>(n * num_groups + k / kGroup)]));
    }
  }
  weight.packed.WriteQuantizedRows(0, kOutputs, values.data(), scales.data());
  return weight;
}

void CheckLinear(const Weight& weight, Format format, double tolerance, const std::string& name) {
  for (const int64_t num_rows : {1, 2, 7, 16, 33, 100}) {
    const std::vector<float> x = Random(num_rows * kInputs, 3);
    std::vector<uint16_t> halves;
    for (const float value : x) halves.push_back(ToBfloat16(value));
    const bool is_half = format == Format::kBfloat16;
    std::vector<float> first;
    for (const Arm arm : {Arm::kGemv, Arm::kFlatGemm, Arm::kGemm}) {
      std::vector<float> out(static_cast<size_t>(num_rows * kOutputs), NAN);
      Linear(BestTarget(), arm,
             {weight.packed.view(), is_half ? DType::kBfloat16 : DType::kFloat32, num_rows,
              is_half ? static_cast<const void*>(halves.data()) : x.data(), kInputs, nullptr, out.data(),
              DType::kFloat32, true});
      if (first.empty()) first = out;
      Check(memcmp(first.data(), out.data(), out.size() * sizeof(float)) == 0, name + ": arms differ");
    }
    double error = 0;
    double size = 0;
    for (int64_t m = 0; m < num_rows; ++m) {
      for (int64_t n = 0; n < kOutputs; ++n) {
        double sum = 0;
        for (int64_t k = 0; k < kInputs; ++k) {
          sum += x[static_cast<size_t>(m * kInputs + k)] * weight.exact[static_cast<size_t>(n * kInputs + k)];
        }
        const double difference = first[static_cast<size_t>(m * kOutputs + n)] - sum;
        error += difference * difference;
        size += sum * sum;
      }
    }
    Check(std::sqrt(error / size) < tolerance, name + ": off by " + std::to_string(std::sqrt(error / size)));
  }
}

void CheckNorm() {
  const std::vector<float> x = Random(kInputs, 4);
  const std::vector<float> weight(static_cast<size_t>(kInputs), 1.0f);
  std::vector<float> out(static_cast<size_t>(kInputs));
  Norm(BestTarget(), {NormKind::kRms, DType::kFloat32, 1, 1, kInputs, 0, kInputs, x.data(), nullptr, weight.data(), nullptr,
                      1e-6f, false, out.data()});
  double squares = 0;
  for (const float value : x) squares += static_cast<double>(value) * value;
  const double scale = 1 / std::sqrt(squares / static_cast<double>(kInputs) + 1e-6);
  for (size_t i = 0; i < x.size(); ++i) Check(std::fabs(out[i] - x[i] * scale) < 1e-5, "norm");
}

void CheckActivation() {
  const std::vector<float> x = Random(kInputs, 5);
  std::vector<float> out(static_cast<size_t>(kInputs));
  Activate(BestTarget(), {ActivationKind::kSilu, false, DType::kFloat32, 1, kInputs, x.data(), out.data()});
  for (size_t i = 0; i < x.size(); ++i) {
    Check(std::fabs(out[i] - x[i] / (1 + std::exp(-static_cast<double>(x[i])))) < 1e-5, "activation");
  }
}

constexpr int64_t kHeads = 6;
constexpr int64_t kKvHeads = 2;
constexpr int64_t kHeadDim = 40;
constexpr int64_t kBlockSize = 16;
constexpr int64_t kMaxBlocks = 40;

// Two sequences in one cache: 5 new tokens behind 32, and one behind 599, which takes several tiles and splits.
struct Sequences {
  std::vector<int32_t> context_lens = {37, 600};
  std::vector<int32_t> cu_seqlens_q = {0, 5, 6};
  std::vector<int32_t> block_tables;  // [2][kMaxBlocks]

  Sequences() {
    for (int32_t i = 0; i < kMaxBlocks; ++i) block_tables.push_back(i < 3 ? 50 - i : -1);
    for (int32_t i = 0; i < kMaxBlocks; ++i) block_tables.push_back(i * 7 % kMaxBlocks);
  }
  int64_t Slot(size_t seq, int64_t position) const {
    const int32_t block = block_tables[seq * kMaxBlocks + static_cast<size_t>(position / kBlockSize)];
    return block * kBlockSize + position % kBlockSize;
  }
};

void FillCache(const Sequences& sequences, KvCache& cache) {
  for (size_t seq = 0; seq < 2; ++seq) {
    std::vector<int64_t> slots;
    for (int64_t position = 0; position < sequences.context_lens[seq]; ++position) {
      slots.push_back(sequences.Slot(seq, position));
    }
    const int64_t stride = kKvHeads * kHeadDim;
    const int64_t num_tokens = static_cast<int64_t>(slots.size());
    const auto seed = static_cast<uint32_t>(seq);
    const std::vector<float> key = Random(num_tokens * stride, 6 + seed);
    const std::vector<float> value = Random(num_tokens * stride, 8 + seed);
    StoreKvCall call = {cache.layout(), cache.data()};
    call.num_tokens = num_tokens;
    call.key = key.data();
    call.value = value.data();
    call.key_stride = call.value_stride = stride;
    call.slot_mapping = slots.data();
    RotateAndStoreKv(BestTarget(), call);
  }
}

// One row in float64, over what the cache holds: the last `window` of `num_visible` positions.
std::vector<double> AttendPlainly(const Sequences& sequences, const KvCache& cache, size_t seq, const float* query,
                                  int64_t kv_head, int64_t num_visible, int64_t window) {
  std::vector<float> key(kHeadDim);
  std::vector<float> value(kHeadDim);
  std::vector<double> out(kHeadDim);
  double sum = 0;
  for (int64_t position = std::max<int64_t>(0, num_visible - window); position < num_visible; ++position) {
    cache.Read(sequences.Slot(seq, position), kv_head, key.data(), value.data());
    double score = 0;
    for (size_t d = 0; d < kHeadDim; ++d) score += static_cast<double>(query[d]) * key[d];
    const double p = std::exp(score / std::sqrt(static_cast<double>(kHeadDim)));
    sum += p;
    for (size_t d = 0; d < kHeadDim; ++d) out[d] += p * value[d];
  }
  for (double& entry : out) entry /= sum;
  return out;
}

void CheckAttention(Format format, int64_t window, double tolerance, const std::string& name) {
  const Sequences sequences;
  KvCache cache({format, 64, kBlockSize, kKvHeads, kHeadDim});
  FillCache(sequences, cache);
  const int64_t num_tokens = sequences.cu_seqlens_q.back();
  const std::vector<float> query = Random(num_tokens * kHeads * kHeadDim, 10);
  for (const SoftmaxScheme scheme : {SoftmaxScheme::kSynchronized, SoftmaxScheme::kAsynchronized, SoftmaxScheme::kLazy}) {
    std::vector<float> first;
    for (const int64_t max_pieces : {1, 2, 3, 0}) {
      std::vector<float> out(query.size(), NAN);
      AttentionCall call = {cache.layout(), cache.data(), &cache.counters()};
      call.query = query.data();
      call.query_stride = kHeads * kHeadDim;
      call.out = out.data();
      call.num_tokens = num_tokens;
      call.num_heads = kHeads;
      call.num_seqs = 2;
      call.block_tables = sequences.block_tables.data();
      call.max_blocks_per_seq = kMaxBlocks;
      call.context_lens = sequences.context_lens.data();
      call.cu_seqlens_q = sequences.cu_seqlens_q.data();
      call.score_scale = 1 / std::sqrt(static_cast<float>(kHeadDim));
      call.sliding_window = window;
      call.scheme = scheme;
      call.max_pieces = max_pieces;
      Attention(BestTarget(), call);
      if (first.empty()) first = out;
      Check(memcmp(first.data(), out.data(), out.size() * sizeof(float)) == 0, name + ": pieces differ");
    }
    int num_wrong = 0;
    for (size_t seq = 0; seq < 2; ++seq) {
      const int32_t end = sequences.cu_seqlens_q[seq + 1];
      for (int32_t token = sequences.cu_seqlens_q[seq]; token < end; ++token) {
        const int64_t num_visible = sequences.context_lens[seq] - (end - 1 - token);
        for (int64_t head = 0; head < kHeads; ++head) {
          const size_t at = static_cast<size_t>((token * kHeads + head) * kHeadDim);
          const std::vector<double> expected = AttendPlainly(sequences, cache, seq, query.data() + at,
                                                             head / (kHeads / kKvHeads), num_visible, window);
          for (size_t d = 0; d < kHeadDim; ++d) {
            // Counted where it is NaN, too.
            if (!(std::fabs(first[at + d] - expected[d]) < tolerance)) ++num_wrong;
          }
        }
      }
    }
    Check(num_wrong == 0, name + ": " + std::to_string(num_wrong) + " entries are wrong");
  }
}

struct PlainExpert {
  std::vector<float> up;    // [2 * kExpertSize, kOutputs], gate first
  std::vector<float> down;  // [kOutputs, kExpertSize]
};

constexpr int64_t kExpertSize = 20;
constexpr int64_t kExperts = 5;
constexpr int64_t kTaken = 2;

double Dot(const float* a, const float* b, int64_t size) {
  double sum = 0;
  for (int64_t i = 0; i < size; ++i) sum += static_cast<double>(a[i]) * b[i];
  return sum;
}

// out += share * down(silu(gate(x)) * up(x)).
void AddExpert(const PlainExpert& expert, const float* x, double share, std::vector<double>& out) {
  std::vector<double> activated;
  for (int64_t i = 0; i < kExpertSize; ++i) {
    const double gate = Dot(x, expert.up.data() + i * kOutputs, kOutputs);
    activated.push_back(gate / (1 + std::exp(-gate)) * Dot(x, expert.up.data() + (kExpertSize + i) * kOutputs, kOutputs));
  }
  for (int64_t d = 0; d < kOutputs; ++d) {
    for (int64_t i = 0; i < kExpertSize; ++i) {
      out[static_cast<size_t>(d)] += share * activated[static_cast<size_t>(i)] *
                                     expert.down[static_cast<size_t>(d * kExpertSize + i)];
    }
  }
}

void CheckMixture() {
  constexpr int64_t kTokens = 9;
  std::vector<PlainExpert> plain;
  std::vector<PackedMatrix> matrices;
  std::vector<Expert> experts;
  matrices.reserve(2 * kExperts);
  for (uint32_t e = 0; e < kExperts; ++e) {
    plain.push_back({Random(2 * kExpertSize * kOutputs, 20 + e), Random(kOutputs * kExpertSize, 30 + e)});
    PackedMatrix& up = matrices.emplace_back(Format::kFloat32, 2 * kExpertSize, kOutputs);
    PackedMatrix& down = matrices.emplace_back(Format::kFloat32, kOutputs, kExpertSize);
    up.WriteRows(BestTarget(), 0, {DType::kFloat32, 2 * kExpertSize, plain[e].up.data(), kOutputs});
    down.WriteRows(BestTarget(), 0, {DType::kFloat32, kOutputs, plain[e].down.data(), kExpertSize});
    experts.push_back({up.view(), down.view()});
  }
  const std::vector<float> x = Random(kTokens * kOutputs, 40);
  const std::vector<float> logits = Random(kTokens * kExperts, 41);
  std::vector<float> out(x.size(), NAN);
  MixtureCall call = {};
  call.experts = std::make_shared<const std::vector<Expert>>(experts);
  call.up_arms = call.down_arms = {2, 4};
  call.experts_per_token = kTaken;
  call.is_renormalized = true;
  call.activation = ActivationKind::kSilu;
  call.dtype = DType::kFloat32;
  call.num_tokens = kTokens;
  call.x = x.data();
  call.router_logits = logits.data();
  call.out = out.data();
  std::vector<char> workspace(MixtureWorkspaceBytes(call) + 64);
  call.workspace = workspace.data() + (64 - reinterpret_cast<uintptr_t>(workspace.data()) % 64) % 64;
  Mixture(BestTarget(), call);
  for (int64_t token = 0; token < kTokens; ++token) {
    std::vector<std::pair<float, size_t>> ranked;
    for (int64_t e = 0; e < kExperts; ++e) {
      ranked.emplace_back(-logits[static_cast<size_t>(token * kExperts + e)], static_cast<size_t>(e));
    }
    std::sort(ranked.begin(), ranked.end());
    double sum = 0;
    for (int64_t i = 0; i < kTaken; ++i) sum += std::exp(-ranked[static_cast<size_t>(i)].first);
    std::vector<double> expected(kOutputs);
    for (int64_t i = 0; i < kTaken; ++i) {
      const auto& [negative_logit, e] = ranked[static_cast<size_t>(i)];
      AddExpert(plain[e], x.data() + token * kOutputs, std::exp(-negative_logit) / sum, expected);
    }
    for (int64_t d = 0; d < kOutputs; ++d) {
      const double wanted = expected[static_cast<size_t>(d)];
      Check(std::fabs(out[static_cast<size_t>(token * kOutputs + d)] - wanted) < 1e-4 * (1 + std::fabs(wanted)),
            "mixture");
    }
  }
}

int Main() {
  SetNumThreads(3);
  CheckLinear(MakeFloatWeight(Format::kFloat32), Format::kFloat32, 1e-6, "float32");
  CheckLinear(MakeFloatWeight(Format::kBfloat16), Format::kBfloat16, 1e-6, "bfloat16");
  CheckLinear(MakeIntWeight(Format::kInt8), Format::kInt8, 0.02, "int8");
  CheckLinear(MakeIntWeight(Format::kInt4), Format::kInt4, 0.02, "int4");
  CheckNorm();
  CheckActivation();
  CheckMixture();
  // Of values of size 1. Queries and probabilities may be rounded to bfloat16, or to integers of 8 and of 14 bits or more.
  for (const int64_t window : {int64_t{100}, INT64_MAX}) {
    CheckAttention(Format::kFloat32, window, 1e-5, "attention over float32");
    CheckAttention(Format::kBfloat16, window, 0.02, "attention over bfloat16");
    CheckAttention(Format::kInt8, window, 2e-3, "attention over int8");
  }
  std::printf("%s: %s\n", Name(BestTarget()), num_failed == 0 ? "all right" : "wrong");
  return num_failed == 0 ? 0 : 1;
}

}  // namespace
}  // namespace headrace

int main() { return headrace::Main(); }
