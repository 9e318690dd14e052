#include "rotary.h"

#include <cmath>
#include <memory>
#include <stdexcept>
#include <string>

#include "targets.h"
#include "thread_pool.h"

namespace headrace {
namespace {

// Entries, and angles, below which a second thread costs more than it saves.
constexpr int64_t kMinParallelEntries = 1 << 15;
constexpr int64_t kMinParallelAngles = 1 << 9;

template <class Task>
void ForTokens(int64_t num_tokens, bool is_parallel, const Task& task) {
  if (!is_parallel) return task(Range{0, num_tokens});
  const std::shared_ptr<ThreadPool> pool = Pool();
  const int num_threads = pool->num_threads();
  pool->Run([&](int thread) { task(Part({0, num_tokens}, thread, num_threads)); });
}

}  // namespace

void RotateAndStoreKv(Target target, const StoreKvCall& call) {
  const KvShape& shape = call.layout.shape;
  const int64_t num_slots = shape.num_blocks * shape.block_size;
  for (int64_t i = 0; i < call.num_tokens; ++i) {
    if (call.slot_mapping[i] < 0 || call.slot_mapping[i] >= num_slots) {
      throw std::out_of_range("slot " + std::to_string(call.slot_mapping[i]) + " of a KV cache with " +
                              std::to_string(num_slots));
    }
  }
  const RotaryKernels& kernels = HEADRACE_CHOOSE(target, kRotary);
  const int64_t num_entries = call.num_tokens * (call.num_heads + 2 * shape.num_kv_heads) * shape.head_dim;
  ForTokens(call.num_tokens, num_entries >= kMinParallelEntries,
            [&](Range tokens) { kernels.rotate_and_store(call, tokens); });
}

void RotaryTable(const RotaryTableCall& call) {
  ForTokens(call.num_tokens, call.num_tokens * call.half >= kMinParallelAngles, [&](Range tokens) {
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
