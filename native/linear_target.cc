// The linear kernels of one target. Compiled once for each, with that target's flags.
//
// A tile is kRows rows of x times kPanels panels of W: kRows * kPanels vectors of accumulators, held in registers while
// K is walked. Each 64 bytes of W are loaded once for kRows multiplications, each value of x once for kPanels:
//
//               panel p (16 outputs)   panel p + 1
//     x row m   [ acc[0][0] ........ ] [ acc[0][1] ........ ]     acc[r][p] += broadcast(x[m + r][k]) * W[p][k][lane]
//     x row m+1 [ acc[1][0] ........ ] [ acc[1][1] ........ ]
#include "linear.h"

#include <utility>

#include "simd/simd-inl.h"

#include "quantize-inl.h"

namespace headrace {
namespace HEADRACE_TARGET {
namespace {

// A tile's first panel of W and first row of x.
struct TilePlace {
  int64_t panel;
  int64_t row;
};

// How far ahead of a panel's reader its weights are asked for, where a tile has kMinPrefetchRows rows or more. Hardware
// prefetches too, but not far enough to hide memory behind the multiplications of several rows: measured on Zen 4,
// asking early makes int4 faster by a tenth to a fifth from two rows on and floating point from eight; int8 gets
// slower.
constexpr int kPrefetchBytes = 4096;
constexpr int kNever = 1 << 30;

// Past the end of a matrix this asks for nothing; prefetching does not fault.
inline void Prefetch(const uint8_t* w) {
  __builtin_prefetch(reinterpret_cast<const void*>(reinterpret_cast<uintptr_t>(w) + kPrefetchBytes));
}

struct Float32Kernel {
  static constexpr bool kIsQuantized = false;
  static constexpr int kMinPrefetchRows = 8;
  using X = float;
  static constexpr int kColumns = VectorColumns(Format::kFloat32);
  using Step = F32x16;
  static Step LoadStep(const uint8_t* from) { return Load(reinterpret_cast<const float*>(from)); }
  static F32x16 MulAddStep(F32x16 acc, const Step& w, const X* x) { return MulAdd(w, Broadcast(*x), acc); }
};

struct Bfloat16Kernel {
  static constexpr bool kIsQuantized = false;
  static constexpr int kMinPrefetchRows = 8;
  using X = Bf16X;
  static constexpr int kColumns = VectorColumns(Format::kBfloat16);
  using Step = Bf16Step;
  static Step LoadStep(const uint8_t* from) { return LoadBf16(from); }
  static F32x16 MulAddStep(F32x16 acc, const Step& w, const X* x) { return MulAddBf16(acc, w, x); }
};

struct Int8Kernel {
  static constexpr bool kIsQuantized = true;
  static constexpr int kMinPrefetchRows = kNever;
  static constexpr int kColumns = VectorColumns(Format::kInt8);
  using Step = Int8Step;
  static Step LoadStep(const uint8_t* from) { return LoadInt8(from); }
  static I32x16 DotStep(const I32x16& acc, const Step& w, const int8_t* x) { return DotInt8(acc, w, x); }
};

struct Int4Kernel {
  static constexpr bool kIsQuantized = true;
  static constexpr int kMinPrefetchRows = 2;
  static constexpr int kColumns = VectorColumns(Format::kInt4);
  using Step = Int4Step;
  static Step LoadStep(const uint8_t* from) { return LoadInt4(from); }
  static I32x16 DotStep(const I32x16& acc, const Step& w, const int8_t* x) { return DotInt4(acc, w, x); }
};

// The end of every chain: scale the row, add the bias, round, store the lanes that exist.
template <class Out>
void StoreOutputs(const LinearCall& call, int64_t row, int64_t panel, F32x16 acc) {
  const int64_t n = panel * kLanes;
  const int64_t num_lanes = call.weight.rows - n < kLanes ? call.weight.rows - n : kLanes;
  if (IsQuantized(call.weight.format)) acc = Mul(acc, Load(call.weight.row_scales + n));
  if (call.bias != nullptr) {
    float bias[kLanes] = {};
    for (int64_t i = 0; i < num_lanes; ++i) bias[i] = ToFloat32(static_cast<const Out*>(call.bias)[n + i]);
    acc = Add(acc, Load(bias));
  }
  Out* out = static_cast<Out*>(call.out) + row * call.weight.rows + n;
  float lanes[kLanes];
  Store(lanes, acc);
  for (int64_t i = 0; i < num_lanes; ++i) {
    if constexpr (sizeof(Out) == sizeof(float)) {
      out[i] = lanes[i];
    } else {
      out[i] = ToBfloat16(lanes[i]);
    }
  }
}

template <int kRows, int kPanels>
void StoreTile(const LinearCall& call, TilePlace at, const F32x16 (&acc)[kRows][kPanels]) {
  for (int r = 0; r < kRows; ++r) {
    for (int p = 0; p < kPanels; ++p) {
      if (call.dtype == DType::kFloat32) {
        StoreOutputs<float>(call, at.row + r, at.panel + p, acc[r][p]);
      } else {
        StoreOutputs<uint16_t>(call, at.row + r, at.panel + p, acc[r][p]);
      }
    }
  }
}

template <class Kernel, int kRows, int kPanels>
void FloatTile(const LinearCall& call, const Activations& activations, TilePlace at) {
  using X = typename Kernel::X;
  const PackedView& weight = call.weight;
  const uint8_t* w = weight.weights + at.panel * weight.panel_bytes;
  const char* x = activations.values + at.row * activations.row_bytes;
  F32x16 acc[kRows][kPanels];
  for (int r = 0; r < kRows; ++r) {
    for (int p = 0; p < kPanels; ++p) acc[r][p] = Broadcast(0.0f);
  }
  for (int64_t k = 0; k < weight.padded_columns; k += Kernel::kColumns) {
    typename Kernel::Step step[kPanels];
    for (int p = 0; p < kPanels; ++p) {
      Prefetch(w + p * weight.panel_bytes);
      step[p] = Kernel::LoadStep(w + p * weight.panel_bytes);
    }
    for (int r = 0; r < kRows; ++r) {
      const X* x_row = reinterpret_cast<const X*>(x + r * activations.row_bytes) + k;
      for (int p = 0; p < kPanels; ++p) acc[r][p] = Kernel::MulAddStep(acc[r][p], step[p], x_row);
    }
    w += kVectorBytes;
  }
  StoreTile(call, at, acc);
}

template <class Kernel, int kRows, int kPanels>
void IntTile(const LinearCall& call, const Activations& activations, TilePlace at) {
  const PackedView& weight = call.weight;
  const int64_t num_groups = weight.num_groups;
  const uint8_t* w = weight.weights + at.panel * weight.panel_bytes;
  const uint16_t* w_scales = weight.scales + at.panel * num_groups * kLanes;
  const auto* x = reinterpret_cast<const int8_t*>(activations.values + at.row * activations.row_bytes);
  const float* x_scales = activations.scales + at.row * num_groups;
  const int32_t* starts = activations.starts + at.row * num_groups;
  F32x16 acc[kRows][kPanels];
  for (int r = 0; r < kRows; ++r) {
    for (int p = 0; p < kPanels; ++p) acc[r][p] = Broadcast(0.0f);
  }
  for (int64_t g = 0; g < num_groups; ++g) {
    I32x16 dot[kRows][kPanels];
    for (int r = 0; r < kRows; ++r) {
      for (int p = 0; p < kPanels; ++p) dot[r][p] = BroadcastInt(starts[r * num_groups + g]);
    }
    for (int k = 0; k < kGroup; k += Kernel::kColumns) {
      typename Kernel::Step step[kPanels];
      for (int p = 0; p < kPanels; ++p) {
        if constexpr (kRows >= Kernel::kMinPrefetchRows) Prefetch(w + p * weight.panel_bytes);
        step[p] = Kernel::LoadStep(w + p * weight.panel_bytes);
      }
      for (int r = 0; r < kRows; ++r) {
        const int8_t* x_row = x + r * activations.row_bytes + g * kGroup + k;
        for (int p = 0; p < kPanels; ++p) dot[r][p] = Kernel::DotStep(dot[r][p], step[p], x_row);
      }
      w += kVectorBytes;
    }
    for (int p = 0; p < kPanels; ++p) {
      const F32x16 w_scale = LoadHalf(w_scales + (p * num_groups + g) * kLanes);
      for (int r = 0; r < kRows; ++r) {
        const F32x16 scale = Mul(Broadcast(x_scales[r * num_groups + g]), w_scale);
        acc[r][p] = MulAdd(ToFloat(dot[r][p]), scale, acc[r][p]);
      }
    }
  }
  StoreTile(call, at, acc);
}

using Tile = void (*)(const LinearCall& call, const Activations& activations, TilePlace at);

template <class Kernel, int kRows, int kPanels>
constexpr Tile TileOf() {
  if constexpr (Kernel::kIsQuantized) {
    return &IntTile<Kernel, kRows, kPanels>;
  } else {
    return &FloatTile<Kernel, kRows, kPanels>;
  }
}

template <class Kernel, int kPanels, class Rows>
struct TileTable;
// tiles[i] takes i + 1 rows.
template <class Kernel, int kPanels, int... kRows>
struct TileTable<Kernel, kPanels, std::integer_sequence<int, kRows...>> {
  static constexpr Tile tiles[] = {TileOf<Kernel, kRows + 1, kPanels>()...};
};

// The tiles of one arm: `wide` ones take num_panels panels, `narrow` ones take one, for what is left at the end.
struct TileSet {
  const Tile* wide;
  const Tile* narrow;
  int max_rows;
  int num_panels;
};

template <class Kernel, int kRows, int kPanels>
constexpr TileSet MakeTileSet() {
  using Rows = std::make_integer_sequence<int, kRows>;
  return {TileTable<Kernel, kPanels, Rows>::tiles, TileTable<Kernel, 1, Rows>::tiles, kRows, kPanels};
}

template <class Kernel>
TileSet TilesOf(Arm arm) {
  constexpr TileShapes kShapes = Kernel::kIsQuantized ? kIntTiles : kFloatTiles;
  if (arm == Arm::kGemv) return MakeTileSet<Kernel, 1, kShapes.gemv_panels>();
  return MakeTileSet<Kernel, kShapes.rows, kShapes.panels>();
}

TileSet TilesOf(Format format, Arm arm) {
  switch (format) {
    case Format::kFloat32:
      return TilesOf<Float32Kernel>(arm);
    case Format::kBfloat16:
      return TilesOf<Bfloat16Kernel>(arm);
    case Format::kInt8:
      return TilesOf<Int8Kernel>(arm);
    case Format::kInt4:
      break;
  }
  return TilesOf<Int4Kernel>(arm);
}

// Every tile of a block, panels outside: what a tile reads of W stays in L1 or L2 for the next rows of x. Rows are cut
// into parts of nearly equal size, so that none is left with a short tile.
void Compute(const LinearCall& call, Arm arm, const Activations& activations, const Block& block) {
  const TileSet tiles = TilesOf(call.weight.format, arm);
  const int64_t num_parts = (block.rows.end - block.rows.begin + tiles.max_rows - 1) / tiles.max_rows;
  for (int64_t panel = block.panels.begin; panel < block.panels.end;) {
    const bool is_wide = panel + tiles.num_panels <= block.panels.end;
    for (int64_t part = 0; part < num_parts; ++part) {
      const Range rows = Part(block.rows, part, num_parts);
      const int64_t index = rows.end - rows.begin - 1;
      const Tile tile = is_wide ? tiles.wide[index] : tiles.narrow[index];
      tile(call, activations, {panel, rows.begin});
    }
    panel += is_wide ? tiles.num_panels : 1;
  }
}

}  // namespace

extern const LinearKernels kLinear;
const LinearKernels kLinear = {&PreparedBytes, &Prepare, &Compute};

}  // namespace HEADRACE_TARGET
}  // namespace headrace
