// Rotary position embedding, and the write of new keys and values to the cache.
//
// Pairs (a, b) of the first 2 * half entries of a head become (a cos - b sin, b cos + a sin): entries i and i + half, or
// 2 i and 2 i + 1 if interleaved (RoFormer, arXiv:2104.09864). Computed in float32. Queries are rotated where they are;
// keys on their way to the cache, rounded once, to its format. int8: q = round(x * (1 / scale)), scale = max|x| / 127.
#ifndef HEADRACE_NATIVE_ROTARY_H_
#define HEADRACE_NATIVE_ROTARY_H_

#include <cstdint>

#include "kv_cache.h"
#include "linear.h"
#include "range.h"
#include "target.h"

namespace headrace {

// query, key and value: tokens their stride apart in elements, heads and head_dim contiguous. cos and sin [num_tokens,
// half], null for no rotation.
struct StoreKvCall {
  KvLayout layout;
  uint8_t* cache = nullptr;
  DType dtype = DType::kFloat32;
  int64_t num_tokens = 0;
  int64_t num_heads = 0;
  void* query = nullptr;
  int64_t query_stride = 0;
  const void* key = nullptr;
  int64_t key_stride = 0;
  const void* value = nullptr;
  int64_t value_stride = 0;
  const float* cos = nullptr;
  const float* sin = nullptr;
  int64_t half = 0;
  bool is_interleaved = false;
  const int64_t* slot_mapping = nullptr;  // [num_tokens], kNotStored for none; read when the call runs
};

// Throws std::out_of_range for a slot the cache has not, before anything is written.
void RotateAndStoreKv(Target target, const StoreKvCall& call);

// cos and sin [num_tokens, half] = amplitude * cos and sin of float32(position * inv_freq[i]).
struct RotaryTableCall {
  const int64_t* positions;
  int64_t num_tokens;
  const float* inv_freq;
  int64_t half;
  float amplitude;
  float* cos;
  float* sin;
};

void RotaryTable(const RotaryTableCall& call);

// What each target provides: the tokens of a range.
struct RotaryKernels {
  void (*rotate_and_store)(const StoreKvCall& call, Range tokens);
};

}  // namespace headrace

#endif  // HEADRACE_NATIVE_ROTARY_H_
