// Products with vectors.
//
// A tile is some rows of x times one or two panels of W. Its accumulators, one vector for each row and panel, stay in
// registers while K is walked; 64 bytes of W are loaded (and unpacked) once for all rows, a value of x once for all
// panels:
//
//               panel p (16 outputs)   panel p + 1
//     x row m   [ acc[0][0] ........ ] [ acc[1][0] ........ ]     acc[p][r] += broadcast(x[m + r][k]) * W[p][k][lane]
//     x row m+1 [ acc[0][1] ........ ] [ acc[1][1] ........ ]
//
// With floating point two panels share the loads of x. With integers one panel leaves registers for a whole group's
// unpacked weights, and for twice as many rows to share them.

#include <algorithm>
#include <utility>

namespace headrace {
namespace HEADRACE_TARGET {
namespace {

// How far ahead of a reader weights are asked for: from memory into L2, then from L2 into L1. Hardware prefetches too,
// but not far enough to hide memory behind multiplications; and a line on its way from memory straight to L1 would hold
// one of the few slots that x needs on its way from L2. Measured on Zen 4: one stream asked for so early reads as fast
// as any number of streams, and in two steps flat products are up to a tenth faster than in one. The end of a panel
// asks for the beginning of the next one.
constexpr int kPrefetchL2Bytes = 6144;
constexpr int kPrefetchL1Bytes = 768;

// Past the end of a matrix this asks for nothing; prefetching does not fault.
inline void Prefetch(const uint8_t* w) {
  const auto address = reinterpret_cast<uintptr_t>(w);
  __builtin_prefetch(reinterpret_cast<const void*>(address + kPrefetchL2Bytes), 0, 2);
  __builtin_prefetch(reinterpret_cast<const void*>(address + kPrefetchL1Bytes), 0, 3);
}

struct Float32Kernel {
  static constexpr bool kIsQuantized = false;
  using X = float;
  static constexpr int kColumns = VectorColumns(Format::kFloat32);
  using Step = F32x16;
  static Step LoadStep(const uint8_t* from) { return Load(reinterpret_cast<const float*>(from)); }
  static F32x16 MulAddStep(F32x16 acc, const Step& w, const X* x) { return MulAdd(w, Broadcast(*x), acc); }
};

struct Bfloat16Kernel {
  static constexpr bool kIsQuantized = false;
  using X = Bf16X;
  static constexpr int kColumns = VectorColumns(Format::kBfloat16);
  using Step = Bf16Step;
  static Step LoadStep(const uint8_t* from) { return LoadBf16(from); }
  static F32x16 MulAddStep(F32x16 acc, const Step& w, const X* x) { return MulAddBf16(acc, w, x); }
};

struct Int8Kernel {
  static constexpr bool kIsQuantized = true;
  static constexpr int kColumns = VectorColumns(Format::kInt8);
  using Step = Int8Step;
  static Step LoadStep(const uint8_t* from) { return LoadInt8(from); }
  static I32x16 DotStep(const I32x16& acc, const Step& w, const int8_t* x) { return DotInt8(acc, w, x); }
};

struct Int4Kernel {
  static constexpr bool kIsQuantized = true;
  static constexpr int kColumns = VectorColumns(Format::kInt4);
  using Step = Int4Step;
  static Step LoadStep(const uint8_t* from) { return LoadInt4(from); }
  static I32x16 DotStep(const I32x16& acc, const Step& w, const int8_t* x) { return DotInt4(acc, w, x); }
};

// A tile's first panel of W, and its rows of x as they are and as they were prepared.
struct TilePlace {
  int64_t panel;
  int64_t row;
  const char* x;
  int64_t x_row_bytes;
};

template <class Out, int kRows>
void StoreRows(const LinearCall& call, int64_t row, int64_t panel, const F32x16 (&acc)[kRows]) {
  const RowEnd<Out> end(call, panel);
  for (int r = 0; r < kRows; ++r) end.Store(row + r, acc[r]);
}

template <int kRows>
void StoreRows(const LinearCall& call, int64_t row, int64_t panel, const F32x16 (&acc)[kRows]) {
  if (call.out_dtype == DType::kFloat32) {
    StoreRows<float>(call, row, panel, acc);
  } else {
    StoreRows<uint16_t>(call, row, panel, acc);
  }
}

template <class Kernel, int kRows, int kPanels>
void FloatTile(const LinearCall& call, const TilePlace& at) {
  using X = typename Kernel::X;
  const PackedView& weight = call.weight;
  const uint8_t* w = weight.weights + at.panel * weight.panel_bytes;
  F32x16 acc[kPanels][kRows];
  for (int p = 0; p < kPanels; ++p) {
    for (int r = 0; r < kRows; ++r) acc[p][r] = Broadcast(0.0f);
  }
  OutputPrefetch output(call, at.row, at.panel, kRows);
  for (int64_t k = 0; k < weight.padded_columns; k += Kernel::kColumns) {
    output.Next();
    typename Kernel::Step step[kPanels];
    for (int p = 0; p < kPanels; ++p) {
      Prefetch(w + p * weight.panel_bytes);
      step[p] = Kernel::LoadStep(w + p * weight.panel_bytes);
    }
    for (int r = 0; r < kRows; ++r) {
      const X* x_row = reinterpret_cast<const X*>(at.x + r * at.x_row_bytes) + k;
      for (int p = 0; p < kPanels; ++p) acc[p][r] = Kernel::MulAddStep(acc[p][r], step[p], x_row);
    }
    w += kVectorBytes;
  }
  for (int p = 0; p < kPanels; ++p) StoreRows(call, at.row, at.panel + p, acc[p]);
}

// A group's weights of one panel, unpacked once for all rows, or anew for each where registers are few.
template <class Kernel>
struct GroupWeights {
  static constexpr int kSteps = kGroup / Kernel::kColumns;
  using Step = typename Kernel::Step;

  explicit GroupWeights(const uint8_t* from) : from(from) {
    if constexpr (kKeepsGroup) {
      for (int s = 0; s < kSteps; ++s) steps[s] = Kernel::LoadStep(from + s * kVectorBytes);
    }
  }
  Step At(int s) const {
    if constexpr (kKeepsGroup) {
      return steps[s];
    } else {
      return Kernel::LoadStep(from + s * kVectorBytes);
    }
  }

  const uint8_t* from;
  Step steps[kKeepsGroup ? kSteps : 1];
};

// acc[r] += scale_w * scale_x * (q_x . q_w) for one group of one panel, rows from kBegin on. By recursion, since
// compilers unroll no loop that long, and accumulators whose number is not known stay in memory.
template <class Kernel, int kRows, int kBegin = 0>
inline void AddGroup(const GroupWeights<Kernel>& w, const F32x16& w_scale, const char* record, F32x16 (&acc)[kRows]) {
  constexpr int kSize = kRows - kBegin < kIntRowsAtOnce ? kRows - kBegin : kIntRowsAtOnce;
  const auto* q = reinterpret_cast<const int8_t*>(record) + kBegin * kGroup;
  const auto* starts = reinterpret_cast<const int32_t*>(record + kRows * kGroup);
  const auto* shifts = reinterpret_cast<const float*>(starts + kRows);
  I32x16 dot[kSize];
  for (int i = 0; i < kSize; ++i) dot[i] = BroadcastInt(starts[kBegin + i]);
  for (int s = 0; s < w.kSteps; ++s) {
    const auto step = w.At(s);
    for (int i = 0; i < kSize; ++i) dot[i] = Kernel::DotStep(dot[i], step, q + i * kGroup + s * Kernel::kColumns);
  }
  for (int i = 0; i < kSize; ++i) {
    const F32x16 product = Sub(BitsToFloat(dot[i]), Broadcast(shifts[kBegin + i]));
    acc[kBegin + i] = MulAdd(product, w_scale, acc[kBegin + i]);
  }
  if constexpr (kBegin + kSize < kRows) AddGroup<Kernel, kRows, kBegin + kSize>(w, w_scale, record, acc);
}

template <class Kernel, int kRows>
void IntTile(const LinearCall& call, const TilePlace& at) {
  const PackedView& weight = call.weight;
  const uint8_t* w = weight.weights + at.panel * weight.panel_bytes;
  const uint8_t* w_scales = weight.scales + at.panel * weight.num_groups * kLanes;
  const char* x = at.x;
  F32x16 acc[kRows];
  for (int r = 0; r < kRows; ++r) acc[r] = Broadcast(0.0f);
  OutputPrefetch output(call, at.row, at.panel, kRows);
  for (int64_t g = 0; g < weight.num_groups; ++g) {
    output.Next();
    for (int s = 0; s < GroupWeights<Kernel>::kSteps; ++s) Prefetch(w + s * kVectorBytes);
    AddGroup<Kernel>(GroupWeights<Kernel>(w), LoadScales(w_scales), x, acc);
    w += GroupWeights<Kernel>::kSteps * kVectorBytes;
    w_scales += kLanes;
    x += kRows * kGroupRowBytes;
  }
  StoreRows(call, at.row, at.panel, acc);
}

using Tile = void (*)(const LinearCall& call, const TilePlace& at);

template <class Kernel, int kRows, int kPanels>
constexpr Tile TileOf() {
  if constexpr (Kernel::kIsQuantized) {
    static_assert(kPanels == 1);
    return &IntTile<Kernel, kRows>;
  } else {
    return &FloatTile<Kernel, kRows, kPanels>;
  }
}

// The tiles for some number of rows: `wide` takes num_panels panels, `narrow` takes one, for what is left at the end.
struct TileChoice {
  Tile wide;
  Tile narrow;
  int num_panels;
};

template <class Kernel, int kRows>
constexpr TileChoice ChoiceOf() {
  constexpr int kPanels = Kernel::kIsQuantized ? 1 : kFloatPanels;
  return {TileOf<Kernel, kRows, kPanels>(), TileOf<Kernel, kRows, 1>(), kPanels};
}

template <class Kernel, class Rows>
struct TileTable;
// tiles[i] takes i + 1 rows.
template <class Kernel, int... kRows>
struct TileTable<Kernel, std::integer_sequence<int, kRows...>> {
  static constexpr TileChoice tiles[] = {ChoiceOf<Kernel, kRows + 1>()...};
};

constexpr int MaxRows(bool is_quantized) { return is_quantized ? kIntRows : kFloatRows; }

template <class Kernel>
const TileChoice* TilesOf() {
  return TileTable<Kernel, std::make_integer_sequence<int, MaxRows(Kernel::kIsQuantized)>>::tiles;
}

int MaxVectorRows(Format format) { return MaxRows(IsQuantized(format)); }

const TileChoice* TilesOf(Format format) {
  switch (format) {
    case Format::kFloat32:
      return TilesOf<Float32Kernel>();
    case Format::kBfloat16:
      return TilesOf<Bfloat16Kernel>();
    case Format::kInt8:
      return TilesOf<Int8Kernel>();
    case Format::kInt4:
      break;
  }
  return TilesOf<Int4Kernel>();
}

// Every tile of a block, panels outside: what a tile reads of W stays in L1 or L2 for the next rows of x.
void ComputeVectors(const LinearCall& call, RowTiles tiles, const Activations& activations, const Block& block, char*) {
  const TileChoice* choices = TilesOf(call.weight.format);
  const auto choice_of = [&](int64_t tile) { return choices[tiles.Rows(tile).end - tiles.Rows(tile).begin - 1]; };
  int64_t step = 1;
  for (int64_t t = block.tiles.begin; t < block.tiles.end; ++t) step = std::max<int64_t>(step, choice_of(t).num_panels);
  for (int64_t begin = block.panels.begin; begin < block.panels.end; begin += step) {
    const int64_t end = std::min(begin + step, block.panels.end);
    for (int64_t t = block.tiles.begin; t < block.tiles.end; ++t) {
      const TileChoice choice = choice_of(t);
      const int64_t row = tiles.Rows(t).begin;
      const char* x = activations.values + row * activations.row_bytes;
      for (int64_t panel = begin; panel < end;) {
        const bool is_wide = panel + choice.num_panels <= end;
        (is_wide ? choice.wide : choice.narrow)(call, {panel, row, x, activations.row_bytes});
        panel += is_wide ? choice.num_panels : 1;
      }
    }
  }
}

}  // namespace
}  // namespace HEADRACE_TARGET
}  // namespace headrace
