#include "kv_cache.h"

#include <algorithm>
#include <stdexcept>
#include <string>

#include "float_bits.h"

namespace headrace {
namespace {

const KvShape& Checked(const KvShape& shape) {
  if (shape.format == Format::kInt4) throw std::invalid_argument("a KV cache is float32, bfloat16 or int8");
  if (std::min({shape.num_blocks, shape.block_size, shape.num_kv_heads, shape.head_dim}) < 1) {
    throw std::invalid_argument("a KV cache has at least one block, token, head and dimension");
  }
  if (shape.head_dim > kMaxHeadDim) {
    throw std::invalid_argument("head_dim is " + std::to_string(shape.head_dim) + "; a KV cache has at most " +
                                std::to_string(kMaxHeadDim));
  }
  return shape;
}

}  // namespace

KvLayout::KvLayout(const KvShape& given)
    : shape(Checked(given)),
      panels_per_block((shape.block_size + kPanelPositions - 1) / kPanelPositions),
      key_vectors((shape.head_dim + VectorColumns(shape.format) - 1) / VectorColumns(shape.format)),
      value_chunks((shape.head_dim + kLanes - 1) / kLanes),
      chunk_vectors(kPanelPositions / VectorColumns(shape.format)),
      value_offset(key_vectors * kVectorBytes),
      scale_offset(value_offset + value_chunks * chunk_vectors * kVectorBytes),
      panel_bytes(scale_offset + (shape.format == Format::kInt8 ? 2 * kVectorBytes : 0)),
      num_bytes(shape.num_blocks * shape.num_kv_heads * panels_per_block * panel_bytes) {}

KvCache::KvCache(const KvShape& shape)
    : layout_(shape),
      memory_(MapMemory(static_cast<size_t>(layout_.num_bytes))),
      counters_(std::make_unique<SoftmaxCounters>()) {}

void KvCache::Read(int64_t slot, int64_t kv_head, float* key, float* value) const {
  const KvShape& shape = layout_.shape;
  if (slot < 0 || slot >= shape.num_blocks * shape.block_size || kv_head < 0 || kv_head >= shape.num_kv_heads) {
    throw std::out_of_range("slot " + std::to_string(slot) + " of head " + std::to_string(kv_head) +
                            " of a KV cache with " + std::to_string(shape.num_blocks * shape.block_size) + " and " +
                            std::to_string(shape.num_kv_heads));
  }
  const int64_t offset = slot % shape.block_size;
  const int64_t lane = offset % kPanelPositions;
  const uint8_t* panel =
      memory_.get() + layout_.PanelOffset(slot / shape.block_size, kv_head, offset / kPanelPositions);
  const auto* scales = reinterpret_cast<const float*>(panel + layout_.scale_offset);
  const int columns = VectorColumns(shape.format);
  for (int64_t d = 0; d < shape.head_dim; ++d) {
    const uint8_t* k = panel + layout_.KeyOffset(lane, d, columns);
    const uint8_t* v = panel + layout_.ValueOffset(lane, d, columns);
    switch (shape.format) {
      case Format::kFloat32:
        memcpy(key + d, k, sizeof(float));
        memcpy(value + d, v, sizeof(float));
        break;
      case Format::kBfloat16:
        key[d] = FromBfloat16(*reinterpret_cast<const uint16_t*>(k));
        value[d] = FromBfloat16(*reinterpret_cast<const uint16_t*>(v));
        break;
      case Format::kInt8:
      case Format::kInt4:
        key[d] = scales[lane] * static_cast<float>(*k - kInt8Bias);
        value[d] = scales[kPanelPositions + lane] * static_cast<float>(static_cast<int8_t>(*v));
        break;
    }
  }
}

}  // namespace headrace
