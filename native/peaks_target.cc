// Limits of one target. Compiled once for each, with that target's flags.
#include "peaks.h"

#include <cstring>

#include "simd/simd-inl.h"

#include "simd/amx-inl.h"

namespace headrace {
namespace HEADRACE_TARGET {
namespace {

constexpr int kStreams = 8;  // places read at once: more than one hardware prefetcher's worth
// Independent accumulators: more than latency times throughput, and as many as there are registers for.
constexpr int kChains = kFloatRows * kFloatPanels;

uint64_t Read(const uint8_t* buffer, int64_t num_bytes) {
  const int64_t stream_bytes = num_bytes / kStreams;
  F32x16 sum[kStreams];
  for (int s = 0; s < kStreams; ++s) sum[s] = Broadcast(0.0f);
  for (int64_t offset = 0; offset < stream_bytes; offset += 64) {
    for (int s = 0; s < kStreams; ++s) {
      sum[s] = Add(sum[s], Load(reinterpret_cast<const float*>(buffer + s * stream_bytes + offset)));
    }
  }
  float lanes[16], total = 0;
  for (int s = 0; s < kStreams; ++s) {
    Store(lanes, sum[s]);
    total += lanes[0];
  }
  return static_cast<uint64_t>(total);
}

// Numbers as a model has them, normal ones in each type of two bytes or four: a core that multiplies zeros takes less
// power, and runs faster than it ever does with a model (by a fifth with the tiles of an Intel Granite Rapids).
void FillWithNumbers(void* to, int64_t num_bytes) {
  uint32_t random = 1;
  for (int64_t i = 0; i < num_bytes; i += sizeof(uint16_t)) {
    random = random * 1664525 + 1013904223;
    const auto bits = static_cast<uint16_t>((random >> 16 & 0x83ff) | 0x3c00);
    memcpy(static_cast<char*>(to) + i, &bits, sizeof(bits));
  }
}

// One step of weights and what each chain multiplies it with.
struct Operands {
  alignas(64) uint8_t w[64];
  alignas(64) float x[kChains][2];
};

// kChains accumulators, named one by one by recursion: GCC 12 leaves an array in memory when a loop holds an asm
// statement.
template <int kChain, class Vector>
struct Chains {
  Vector acc;
  Chains<kChain - 1, Vector> rest;
  explicit Chains(const Vector& start) : acc(start), rest(start) {}
  template <class Step>
  void Run(const Step& step) {
    acc = step(acc, kChain - 1);
    rest.Run(step);
  }
  void Keep() const {
    const Vector result = acc;
    asm volatile("" : : "m"(result));
    rest.Keep();
  }
};
template <class Vector>
struct Chains<0, Vector> {
  explicit Chains(const Vector&) {}
  template <class Step>
  void Run(const Step&) {}
  void Keep() const {}
};

// multiply(acc, step, x of the chain) for each chain, num_repeats times. The compiler is told that the operands change
// each time, so that it leaves nothing out.
template <class Vector, class Load, class Multiply>
void Repeat(int64_t num_repeats, const Vector& start, const Load& load, const Multiply& multiply) {
  Operands operands;
  FillWithNumbers(&operands, sizeof(operands));
  Chains<kChains, Vector> chains(start);
  for (int64_t i = 0; i < num_repeats; ++i) {
    asm volatile("" : "+m"(operands));
    const auto step = load(operands.w);
    chains.Run([&](const Vector& acc, int chain) { return multiply(acc, step, operands.x[chain]); });
  }
  chains.Keep();
}

#ifdef __AMX_TILE__

// The four products of two tiles and two, again and again.
template <class Dot>
int64_t MultiplyTilesOnly(int64_t num_repeats) {
  TileShapes shapes;
  for (int tile = 0; tile < 8; ++tile) shapes.Set(tile, kTileRows, kTileRowBytes);
  shapes.Configure();
  char numbers[kTileBytes];
  FillWithNumbers(numbers, sizeof(numbers));
  LoadTile<4>(numbers, kTileRowBytes);
  LoadTile<5>(numbers, kTileRowBytes);
  LoadTile<6>(numbers, kTileRowBytes);
  LoadTile<7>(numbers, kTileRowBytes);
  for (int64_t i = 0; i < num_repeats; ++i) {
    Dot::template Run<0, 4, 6>();
    Dot::template Run<1, 4, 7>();
    Dot::template Run<2, 5, 6>();
    Dot::template Run<3, 5, 7>();
  }
  return num_repeats * 4 * 2 * kTileRows * kLanes * kTileColumns;
}

#endif

int64_t Multiply(Format format, int64_t num_repeats) {
#ifdef __AVX512FP16__
  if (IsQuantized(format)) return MultiplyTilesOnly<Fp16Dot>(num_repeats);
#endif
#ifdef __AMX_TILE__
  if (format == Format::kBfloat16) return MultiplyTilesOnly<Bf16Dot>(num_repeats);
#endif
  const auto bytes = [](const float* x) { return reinterpret_cast<const int8_t*>(x); };
  switch (format) {
    case Format::kFloat32:
      Repeat(
          num_repeats, Broadcast(0.0f), [](const uint8_t* w) { return Load(reinterpret_cast<const float*>(w)); },
          [](const F32x16& acc, const F32x16& w, const float* x) { return MulAdd(w, Broadcast(*x), acc); });
      break;
    case Format::kBfloat16:
      Repeat(num_repeats, Broadcast(0.0f), LoadBf16, [](const F32x16& acc, const Bf16Step& w, const float* x) {
        return MulAddBf16(acc, w, reinterpret_cast<const Bf16X*>(x));
      });
      break;
    case Format::kInt8:
      Repeat(num_repeats, BroadcastInt(0), LoadInt8, [&](const I32x16& acc, const Int8Step& w, const float* x) {
        return DotInt8(acc, w, bytes(x));
      });
      break;
    case Format::kInt4:
      Repeat(num_repeats, BroadcastInt(0), LoadInt4, [&](const I32x16& acc, const Int4Step& w, const float* x) {
        return DotInt4(acc, w, bytes(x));
      });
      break;
  }
  return 2 * num_repeats * kChains * kLanes * VectorColumns(format);
}

}  // namespace

extern const PeakKernels kPeaks;
const PeakKernels kPeaks = {&Read, &Multiply};

}  // namespace HEADRACE_TARGET
}  // namespace headrace
