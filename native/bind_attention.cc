#include "bind.h"

#include <nanobind/stl/optional.h>
#include <nanobind/stl/string.h>
#include <nanobind/stl/tuple.h>
#include <nanobind/stl/vector.h>

#include "attention.h"
#include "context_share.h"
#include "kv_cache.h"
#include "rotary.h"
#include "stream.h"

namespace headrace {
namespace {

constexpr float kLog2E = 1.44269504088896340736f;

// What stays the same for every call of one layer. Bounds and maxima come in natural logarithms, kernels use base 2.
struct AttentionSpec {
  float softmax_scale;
  std::optional<int64_t> sliding_window;
  std::optional<float> logit_soft_cap;
  SoftmaxScheme scheme;
  UnifiedMax unified_max;
};

AttentionSpec MakeSpec(float softmax_scale, std::optional<int64_t> sliding_window, std::optional<float> logit_soft_cap,
                       SoftmaxScheme scheme, float unified_max, std::optional<std::tuple<float, float>> element_bounds) {
  AttentionSpec spec = {softmax_scale, sliding_window, logit_soft_cap, scheme, {}};
  spec.unified_max.value = unified_max * kLog2E;
  if (element_bounds.has_value()) {
    spec.unified_max.is_strict = true;
    spec.unified_max.least = (unified_max + std::get<0>(*element_bounds)) * kLog2E;
    spec.unified_max.largest = (unified_max + std::get<1>(*element_bounds)) * kLog2E;
  }
  return spec;
}

// An op bound to its target, found by name once.
class NativeAttention {
 public:
  explicit NativeAttention(const std::string& target) : target_(TargetFromName(target)) {}

  void Run(Stream& stream, const AttentionSpec& spec, KvCache& cache, DType dtype, uintptr_t query, int64_t query_stride,
           int64_t num_tokens, int64_t num_heads, int64_t num_seqs, uintptr_t block_tables, int64_t max_blocks_per_seq,
           uintptr_t context_lens, uintptr_t cu_seqlens_q, uintptr_t out, int64_t max_pieces) const {
    AttentionCall call = MakeCall(spec, cache, dtype, query, query_stride, num_tokens, num_heads, num_seqs, block_tables,
                                  max_blocks_per_seq, context_lens, cu_seqlens_q, max_pieces);
    call.out = Pointer<void>(out);
    stream.Run("attention", [target = target_, call] { Attention(target, call); });
  }

  void RunShare(Stream& stream, const AttentionSpec& spec, KvCache& cache, DType dtype, uintptr_t query,
                int64_t query_stride, int64_t num_tokens, int64_t num_heads, int64_t num_seqs, uintptr_t block_tables,
                int64_t max_blocks_per_seq, uintptr_t context_lens, uintptr_t cu_seqlens_q, uintptr_t owned_blocks,
                int64_t owned_stride, uintptr_t numerators, uintptr_t normalizers, int64_t max_pieces) const {
    AttentionCall call = MakeCall(spec, cache, dtype, query, query_stride, num_tokens, num_heads, num_seqs, block_tables,
                                  max_blocks_per_seq, context_lens, cu_seqlens_q, max_pieces);
    call.share = {Pointer<const int32_t>(owned_blocks), owned_stride, Pointer<float>(numerators),
                  Pointer<float>(normalizers)};
    stream.Run("attention_share", [target = target_, call] { Attention(target, call); });
  }

 private:
  static AttentionCall MakeCall(const AttentionSpec& spec, KvCache& cache, DType dtype, uintptr_t query,
                                int64_t query_stride, int64_t num_tokens, int64_t num_heads, int64_t num_seqs,
                                uintptr_t block_tables, int64_t max_blocks_per_seq, uintptr_t context_lens,
                                uintptr_t cu_seqlens_q, int64_t max_pieces) {
    AttentionCall call = {cache.layout(), cache.data(), &cache.counters()};
    call.dtype = dtype;
    call.query = Pointer<const void>(query);
    call.query_stride = query_stride;
    call.num_tokens = num_tokens;
    call.num_heads = num_heads;
    call.num_seqs = num_seqs;
    call.block_tables = Pointer<const int32_t>(block_tables);
    call.max_blocks_per_seq = max_blocks_per_seq;
    call.context_lens = Pointer<const int32_t>(context_lens);
    call.cu_seqlens_q = Pointer<const int32_t>(cu_seqlens_q);
    call.score_scale = spec.softmax_scale;
    call.has_soft_cap = spec.logit_soft_cap.has_value();
    call.soft_cap = spec.logit_soft_cap.value_or(0.0f);
    call.sliding_window = spec.sliding_window.value_or(INT64_MAX);
    call.scheme = spec.scheme;
    call.unified_max = spec.unified_max;
    call.max_pieces = max_pieces;
    return call;
  }

  Target target_;
};

class NativeStoreKv {
 public:
  explicit NativeStoreKv(const std::string& target) : target_(TargetFromName(target)) {}

  void Run(Stream& stream, KvCache& cache, DType dtype, int64_t num_tokens, int64_t num_heads, uintptr_t query, int64_t query_stride,
           uintptr_t key, int64_t key_stride, uintptr_t value, int64_t value_stride, uintptr_t cos, uintptr_t sin,
           int64_t half, bool is_interleaved, uintptr_t slot_mapping) const {
    StoreKvCall call = {cache.layout(), cache.data(), dtype, num_tokens, num_heads};
    call.query = Pointer<void>(query);
    call.query_stride = query_stride;
    call.key = Pointer<const void>(key);
    call.key_stride = key_stride;
    call.value = Pointer<const void>(value);
    call.value_stride = value_stride;
    call.cos = Pointer<const float>(cos);
    call.sin = Pointer<const float>(sin);
    call.half = half;
    call.is_interleaved = is_interleaved;
    call.slot_mapping = Pointer<const int64_t>(slot_mapping);
    stream.Run("rotary_store_kv", [target = target_, call] { RotateAndStoreKv(target, call); });
  }

 private:
  Target target_;
};

template <class T>
std::vector<const T*> Pointers(const std::vector<uintptr_t>& addresses) {
  std::vector<const T*> pointers;
  for (const uintptr_t address : addresses) pointers.push_back(Pointer<const T>(address));
  return pointers;
}

void RunJoinHeads(Stream& stream, const std::vector<uintptr_t>& parts, const std::vector<int64_t>& stride_bytes,
                  int64_t num_rows, int64_t row_bytes, uintptr_t out) {
  if (parts.size() != stride_bytes.size()) throw std::invalid_argument("each part has a stride");
  const JoinHeadsCall call = {Pointers<void>(parts), stride_bytes, num_rows, row_bytes, Pointer<void>(out)};
  stream.Run("join_heads", [call] { JoinHeads(call); });
}

void RunWeighShare(Stream& stream, Target target, const std::vector<uintptr_t>& normalizers, int64_t own_rank,
                   int64_t num_tokens, int64_t num_heads, int64_t head_dim, int64_t num_parts, uintptr_t numerators,
                   DType dtype, uintptr_t out) {
  const WeighShareCall call = {Pointers<float>(normalizers), own_rank, num_tokens, num_heads,         head_dim,
                               num_parts, Pointer<const float>(numerators), dtype, Pointer<void>(out)};
  stream.Run("weigh_share", [target, call] { WeighShare(target, call); });
}

KvShape MakeShape(Format format, int64_t num_blocks, int64_t block_size, int64_t num_kv_heads, int64_t head_dim) {
  return {format, num_blocks, block_size, num_kv_heads, head_dim};
}

void ReadSlots(const KvCache& cache, uintptr_t slots, int64_t num_slots, uintptr_t keys, uintptr_t values) {
  const KvShape& shape = cache.layout().shape;
  const auto* ids = Pointer<const int64_t>(slots);
  for (int64_t i = 0; i < num_slots; ++i) {
    for (int64_t head = 0; head < shape.num_kv_heads; ++head) {
      const int64_t offset = (i * shape.num_kv_heads + head) * shape.head_dim;
      cache.Read(ids[i], head, Pointer<float>(keys) + offset, Pointer<float>(values) + offset);
    }
  }
}

void DefineCache(nb::module_& m) {
  nb::class_<KvCache>(m, "KvCache")
      .def(
          "__init__",
          [](KvCache* self, Format format, int64_t num_blocks, int64_t block_size, int64_t num_kv_heads,
             int64_t head_dim) {
            new (self) KvCache(MakeShape(format, num_blocks, block_size, num_kv_heads, head_dim));
          },
          nb::arg("cache_format"), nb::arg("num_blocks"), nb::arg("block_size"), nb::arg("num_kv_heads"),
          nb::arg("head_dim"))
      .def("read_slots", &ReadSlots, nb::arg("slots_ptr"), nb::arg("num_slots"), nb::arg("keys_ptr"),
           nb::arg("values_ptr"), Unlocked())
      .def("num_rows", [](KvCache& cache) { return cache.counters().rows.load(); })
      .def("num_recomputed_rows", [](KvCache& cache) { return cache.counters().recomputed_rows.load(); });
  m.def(
      "kv_cache_bytes",
      [](Format format, int64_t num_blocks, int64_t block_size, int64_t num_kv_heads, int64_t head_dim) {
        return KvLayout(MakeShape(format, num_blocks, block_size, num_kv_heads, head_dim)).num_bytes;
      },
      nb::arg("cache_format"), nb::arg("num_blocks"), nb::arg("block_size"), nb::arg("num_kv_heads"),
      nb::arg("head_dim"));
}

}  // namespace

void DefineAttention(nb::module_& m) {
  DefineCache(m);
  nb::enum_<SoftmaxScheme>(m, "SoftmaxScheme")
      .value("SYNCHRONIZED", SoftmaxScheme::kSynchronized)
      .value("ASYNCHRONIZED", SoftmaxScheme::kAsynchronized)
      .value("LAZY", SoftmaxScheme::kLazy);
  nb::class_<AttentionSpec>(m, "AttentionSpec")
      .def(
          "__init__",
          [](AttentionSpec* self, float softmax_scale, std::optional<int64_t> sliding_window,
             std::optional<float> logit_soft_cap, SoftmaxScheme scheme, float unified_max,
             std::optional<std::tuple<float, float>> element_bounds) {
            new (self) AttentionSpec(
                MakeSpec(softmax_scale, sliding_window, logit_soft_cap, scheme, unified_max, element_bounds));
          },
          nb::arg("softmax_scale"), nb::arg("sliding_window").none(), nb::arg("logit_soft_cap").none(),
          nb::arg("scheme"), nb::arg("unified_max"), nb::arg("element_bounds").none());
  nb::class_<NativeAttention>(m, "Attention")
      .def(nb::init<const std::string&>(), nb::arg("target"))
      .def("run", &NativeAttention::Run, nb::arg("stream"), nb::arg("spec"), nb::arg("cache"), nb::arg("dtype"), nb::arg("query_ptr"),
           nb::arg("query_stride"), nb::arg("num_tokens"), nb::arg("num_heads"), nb::arg("num_seqs"),
           nb::arg("block_tables_ptr"), nb::arg("max_blocks_per_seq"), nb::arg("context_lens_ptr"),
           nb::arg("cu_seqlens_q_ptr"), nb::arg("out_ptr"), nb::arg("max_pieces"), Unlocked())
      .def("run_share", &NativeAttention::RunShare, nb::arg("stream"), nb::arg("spec"), nb::arg("cache"),
           nb::arg("dtype"), nb::arg("query_ptr"), nb::arg("query_stride"), nb::arg("num_tokens"), nb::arg("num_heads"),
           nb::arg("num_seqs"), nb::arg("block_tables_ptr"), nb::arg("max_blocks_per_seq"), nb::arg("context_lens_ptr"),
           nb::arg("cu_seqlens_q_ptr"), nb::arg("owned_blocks_ptr"), nb::arg("owned_stride"), nb::arg("numerators_ptr"),
           nb::arg("normalizers_ptr"), nb::arg("max_pieces"), Unlocked());
  nb::class_<NativeStoreKv>(m, "StoreKv")
      .def(nb::init<const std::string&>(), nb::arg("target"))
      .def("run", &NativeStoreKv::Run, nb::arg("stream"), nb::arg("cache"), nb::arg("dtype"), nb::arg("num_tokens"), nb::arg("num_heads"),
           nb::arg("query_ptr"), nb::arg("query_stride"), nb::arg("key_ptr"), nb::arg("key_stride"),
           nb::arg("value_ptr"), nb::arg("value_stride"), nb::arg("cos_ptr"), nb::arg("sin_ptr"), nb::arg("half"),
           nb::arg("is_interleaved"), nb::arg("slot_mapping_ptr"), Unlocked());
  m.def("join_heads", &RunJoinHeads, nb::arg("stream"), nb::arg("part_ptrs"), nb::arg("stride_bytes"),
        nb::arg("num_rows"), nb::arg("row_bytes"), nb::arg("out_ptr"), Unlocked());
  m.def("weigh_share", &RunWeighShare, nb::arg("stream"), nb::arg("target"), nb::arg("normalizers_ptrs"),
        nb::arg("own_rank"), nb::arg("num_tokens"), nb::arg("num_heads"), nb::arg("head_dim"), nb::arg("num_parts"),
        nb::arg("numerators_ptr"), nb::arg("dtype"), nb::arg("out_ptr"), Unlocked());
  m.def(
      "rotary_table",
      [](Stream& stream, uintptr_t positions, int64_t num_tokens, uintptr_t inv_freq, int64_t half, float amplitude, uintptr_t cos,
         uintptr_t sin) {
        const RotaryTableCall call = {Pointer<const int64_t>(positions), num_tokens, Pointer<const float>(inv_freq), half,
                                      amplitude, Pointer<float>(cos), Pointer<float>(sin)};
        stream.Run("rotary_table", [call] { RotaryTable(call); });
      },
      nb::arg("stream"), nb::arg("positions_ptr"), nb::arg("num_tokens"), nb::arg("inv_freq_ptr"), nb::arg("half"), nb::arg("amplitude"),
      nb::arg("cos_ptr"), nb::arg("sin_ptr"), Unlocked());
}

}  // namespace headrace
