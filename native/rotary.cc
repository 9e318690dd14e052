#include "rotary.h"

#include <cmath>
#include <stdexcept>
#include <string>

#include "targets.h"
#include "thread_pool.h"

namespace headrace {
namespace {

// Entries, and angles, below which a second thread costs more than it saves.
constexpr int64_t kMinParallelEntries = 1 << 12;
constexpr int64_t kMinParallelAngles = 1 << 9;

}  // namespace

void RotateAndStoreKv(Target target, const StoreKvCall& call) {
  const KvShape& shape = call.layout.shape;
  const int64_t num_slots = shape.num_blocks * shape.block_size;
  for (int64_t i = 0; i < call.num_tokens; ++i) {
    if (call.slot_mapping[i] == kNotStored) continue;
    if (call.slot_mapping[i] < 0 || call.slot_mapping[i] >= num_slots) {
      throw std::out_of_range("slot " + std::to_string(call.slot_mapping[i]) + " of a KV cache with " +
                              std::to_string(num_slots));
    }
  }
  const RotaryKernels& kernels = HEADRACE_CHOOSE(target, kRotary);
  const int64_t num_entries = call.num_tokens * (call.num_heads + 2 * shape.num_kv_heads) * shape.head_dim;
  RunParts(call.num_tokens > 1 && num_entries >= kMinParallelEntries, [&](int part, int num_parts) {
    kernels.rotate_and_store(call, Part({0, call.num_tokens}, part, num_parts));
  });
}

void RotaryTable(const RotaryTableCall& call) {
  RunParts(call.num_tokens * call.half >= kMinParallelAngles, [&](int part, int num_parts) {
    const Range tokens = Part({0, call.num_tokens}, part, num_parts);
    for (int64_t token = tokens.begin; token < tokens.end; ++token) {
      const auto position = static_cast<float>(call.positions[token]);
      for (int64_t i = 0; i < call.half; ++i) {
        const float angle = position * call.inv_freq[i];
        call.cos[token * call.half + i] = std::cos(angle) * call.amplitude;
        call.sin[token * call.half + i] = std::sin(angle) * call.amplitude;
      }
    }
  });
}

}  // namespace headrace
