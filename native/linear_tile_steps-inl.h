// The inner loop of products in tiles: some tiles of x and some panels of W, step by step.
#ifdef __AMX_TILE__

namespace headrace {
namespace HEADRACE_TARGET {
namespace {

// A product for each tile of x and panel, and one tile of each that is loaded anew all the time.
constexpr int kProducts = 6;
constexpr int kTileOfX = kProducts, kTileOfW = kProducts + 1;

// Tiles of x and panels that meet: integers unpacked once serve the ones, rows loaded once the others. Weights that
// pass through the L1 cache drive x out of it, and its tiles take the way from the L2 cache that weights need.
constexpr int kMostTiles = 3;
template <class Kernel>
constexpr int PanelsFor(int num_a) {
  return std::min(Kernel::kIsUnpacked ? 6 : 3, kProducts / num_a);
}

// How early weights and scales of each panel that come from memory are asked for into the L1 cache.
template <class Kernel>
constexpr int kStreamBytes = Kernel::kIsUnpacked ? 1024 : 384;
constexpr int kStreamScaleBytes = 512;

// Integers are unpacked between the products of an earlier step, a vector here and there: a core looks ahead too little
// to find out that tiles and vectors could work at the same time, the less where it shares itself with another thread.
// Tiles are loaded from the cache, not from stores under way, which wait for the products before them: there lie two of
// those between, or more, but where a step has a single one. As few steps as that takes have a place, so that they stay
// in the L1 cache.
template <int kNumP>
constexpr int kPlaces = kNumP > 2 ? 2 : 3;

// Asks for lines into the L1 cache (3) or the L2 cache (2); past the end of a matrix for nothing that comes.
template <int kLocality>
inline void Fetch(const void* from, int64_t ahead_bytes, int num_lines) {
  const auto address = reinterpret_cast<uintptr_t>(from) + ahead_bytes;
  for (int i = 0; i < num_lines; ++i)
    __builtin_prefetch(reinterpret_cast<const void*>(address + i * kVectorBytes), 0, kLocality);
}

// The step of a panel that its last columns are part of, filled up with zeros.
inline void PadStep(const PackedView& w, int64_t panel, int64_t step, char* to) {
  const int64_t num_bytes = w.panel_bytes - step * kTileBytes;
  memcpy(to, w.weights + panel * w.panel_bytes + step * kTileBytes, num_bytes);
  memset(to + num_bytes, 0, kTileBytes - num_bytes);
}

// A step of two tiles of x and two panels: both tiles are kept.
template <class Dot, class Between>
HEADRACE_INLINE void MultiplyPairs(const char* x, int64_t x_bytes, const char* tile, int64_t tile_bytes,
                                   const Between& between) {
  constexpr int kSecond = kTileOfX - 1;
  LoadTile<kTileOfX>(x, kTileRowBytes);
  LoadTile<kTileOfW>(tile, kTileRowBytes);
  Dot::template Run<0, kTileOfX, kTileOfW>();
  between(std::integral_constant<int, 0>{});
  LoadTile<kSecond>(x + x_bytes, kTileRowBytes);
  Dot::template Run<2, kSecond, kTileOfW>();
  between(std::integral_constant<int, 1>{});
  LoadTile<kTileOfW>(tile + tile_bytes, kTileRowBytes);
  Dot::template Run<1, kTileOfX, kTileOfW>();
  between(std::integral_constant<int, 2>{});
  Dot::template Run<3, kSecond, kTileOfW>();
  between(std::integral_constant<int, 3>{});
}

// A step of tiles of x and panels, which lie x_bytes and tile_bytes apart. Every other tile of x meets the panels in
// the opposite order, so that it finds one loaded. between(i) runs behind the i-th product.
template <class Dot, int kNumA, int kNumP, class Between>
HEADRACE_INLINE void MultiplyStep(const char* x, int64_t x_bytes, const char* tile, int64_t tile_bytes,
                                  const Between& between) {
  if constexpr (kNumA == 2 && kNumP == 2) {
    MultiplyPairs<Dot>(x, x_bytes, tile, tile_bytes, between);
    return;
  }
  Unroll<kNumA>([&](auto a) HEADRACE_LAMBDA {
    LoadTile<kTileOfX>(x + a * x_bytes, kTileRowBytes);
    Unroll<kNumP>([&](auto i) HEADRACE_LAMBDA {
      constexpr int kP = a % 2 == 0 ? i : kNumP - 1 - i;
      if constexpr (a == 0 || i > 0) LoadTile<kTileOfW>(tile + kP * tile_bytes, kTileRowBytes);
      Dot::template Run<a * kNumP + kP, kTileOfX, kTileOfW>();
      between(std::integral_constant<int, a * kNumP + i>{});
    });
  });
}

template <class Dot, int kNumA, int kNumP>
inline void MultiplyStep(const char* x, int64_t x_bytes, const char* tile, int64_t tile_bytes) {
  MultiplyStep<Dot, kNumA, kNumP>(x, x_bytes, tile, tile_bytes, [](auto) HEADRACE_LAMBDA {});
}

// Steps of some panels, which lie one behind the other, and tiles of x.
struct StepWalk {
  const uint8_t* weights;
  int64_t panel_bytes;
  const uint8_t* scales;
  int64_t panel_scales;
  const char* x;
  int64_t x_bytes;  // from one tile to the next one
  int64_t x_step_bytes;
  int64_t num_steps;
  // What is asked for beside each step where weights are in the L2 cache already: lines of panels that come later.
  int64_t fetch_bytes;
  int fetch_lines;
  char* memory;
};

// How far ahead of a step what is asked for with it lies, in weights or in scales. Behind a panel's steps lie others of
// its own or of panels that are multiplied now; what its place among these goes to next comes after all of them.
template <int kAheadBytes, int kStepBytes>
class StreamAhead {
 public:
  HEADRACE_INLINE StreamAhead(int64_t panel_bytes, int num_panels, int64_t num_steps)
      : jump_(num_panels * panel_bytes - num_steps * kStepBytes) {}
  HEADRACE_INLINE int64_t Bytes(int64_t steps_left) const {
    return kAheadBytes + (steps_left * kStepBytes > kAheadBytes ? 0 : jump_);
  }

 private:
  int64_t jump_;
};

template <class Kernel>
using WeightsAhead = StreamAhead<kStreamBytes<Kernel>, Kernel::kStepVectors * kVectorBytes>;
using ScalesAhead = StreamAhead<kStreamScaleBytes, kLanes>;

// Unpacks the steps of some panels one after the other into a few places, a vector at a time.
template <class Kernel, int kNumP, bool kIsFromMemory>
class StepUnpacking {
 public:
  HEADRACE_INLINE explicit StepUnpacking(const StepWalk& walk)
      : weights_(walk.weights),
        panel_bytes_(walk.panel_bytes),
        scales_(walk.scales),
        panel_scales_(walk.panel_scales),
        steps_left_(walk.num_steps),
        weights_ahead_(walk.panel_bytes, kNumP, walk.num_steps),
        scales_ahead_(walk.panel_scales, kNumP, walk.num_steps),
        fetch_bytes_(walk.fetch_bytes),
        fetch_lines_(walk.fetch_lines),
        memory_(walk.memory) {
    LookAhead();
  }

  // One of so many parts of a step, and asks for what comes later.
  template <int kPart, int kNumParts>
  HEADRACE_INLINE void UnpackPart() {
    constexpr int kFirst = kPart * kVectors / kNumParts, kEnd = (kPart + 1) * kVectors / kNumParts;
    Unroll<kEnd - kFirst>([&](auto i) HEADRACE_LAMBDA { UnpackVector<kFirst + i>(); });
  }
  HEADRACE_INLINE void Advance() {
    weights_ += kStepBytes;
    scales_ += kLanes;
    place_ = After(place_);
    --steps_left_;
    LookAhead();
  }
  HEADRACE_INLINE bool IsDone() const { return steps_left_ == 0; }
  // Where the step to be unpacked goes, and where the one after that in a place does.
  HEADRACE_INLINE int64_t place() const { return place_; }
  HEADRACE_INLINE static int64_t After(int64_t place) {
    return place + kPlaceBytes == kPlaces<kNumP> * kPlaceBytes ? 0 : place + kPlaceBytes;
  }

 private:
  static constexpr int kStepBytes = Kernel::kStepVectors * kVectorBytes;
  static constexpr int kVectors = kNumP * Kernel::kStepVectors;
  static constexpr int kPlaceBytes = kNumP * kTileBytes;

  HEADRACE_INLINE void LookAhead() {
    weights_bytes_ = weights_ahead_.Bytes(steps_left_);
    scales_bytes_ = scales_ahead_.Bytes(steps_left_);
    // The compiler would keep an address for each panel instead of what lies between them, more than it has registers.
    asm("" : "+r"(panel_bytes_), "+r"(panel_scales_), "+r"(weights_bytes_), "+r"(scales_bytes_));
  }

  template <int kIndex>
  HEADRACE_INLINE void UnpackVector() {
    constexpr int kPanel = kIndex / Kernel::kStepVectors, kVector = kIndex % Kernel::kStepVectors;
    const uint8_t* panel = weights_ + kPanel * panel_bytes_;
    const uint8_t* from = panel + kVector * kVectorBytes;
    if constexpr (kVector == 0) {
      scale_ = Kernel::LoadScale(scales_ + kPanel * panel_scales_);
      if constexpr (kIsFromMemory) Fetch<3>(scales_ + kPanel * panel_scales_, scales_bytes_, 1);
      if constexpr (!kIsFromMemory) Fetch<2>(panel, fetch_bytes_, fetch_lines_);
    }
    if constexpr (kIsFromMemory) Fetch<3>(from, weights_bytes_, 1);
    constexpr int kBytes = kPanel * kTileBytes + kVector * kTileBytes / Kernel::kStepVectors;
    Kernel::Unpack(_mm512_loadu_si512(from), scale_, memory_ + place_ + kBytes);
  }

  const uint8_t* weights_;
  int64_t panel_bytes_;
  const uint8_t* scales_;
  int64_t panel_scales_;
  int64_t steps_left_;
  WeightsAhead<Kernel> weights_ahead_;
  ScalesAhead scales_ahead_;
  int64_t weights_bytes_;
  int64_t scales_bytes_;
  int64_t fetch_bytes_;
  int fetch_lines_;
  char* memory_;
  int64_t place_ = 0;
  typename Kernel::Scale scale_;
};

// Functions of their own, and few of their variables in memory: what is unpacked goes through all places of a page, and
// a load from the stack would wait for the store that it could depend on. kIsFromMemory: the weights come from memory,
// not from the L2 cache.
template <class Kernel, int kNumA, int kNumP, bool kIsFromMemory>
__attribute__((noinline)) void MultiplyUnpacked(const StepWalk& walk) {
  using Dot = typename Kernel::Dot;
  StepUnpacking<Kernel, kNumP, kIsFromMemory> unpacking(walk);
  const char* x = walk.x;
  const int64_t x_bytes = walk.x_bytes, x_step_bytes = walk.x_step_bytes;
  const char* const memory = walk.memory;
  for (int i = 1; i < kPlaces<kNumP> && !unpacking.IsDone(); ++i, unpacking.Advance()) {
    unpacking.template UnpackPart<0, 1>();
  }
  int64_t place = 0;
  const auto advance = [&]() HEADRACE_LAMBDA {
    x += x_step_bytes;
    place = unpacking.After(place);
  };
  for (; !unpacking.IsDone(); unpacking.Advance(), advance()) {
    MultiplyStep<Dot, kNumA, kNumP>(x, x_bytes, memory + place, kTileBytes, [&](auto product) HEADRACE_LAMBDA {
      unpacking.template UnpackPart<product, kNumA * kNumP>();
    });
  }
  for (; place != unpacking.place(); advance()) {
    MultiplyStep<Dot, kNumA, kNumP>(x, x_bytes, memory + place, kTileBytes);
  }
}

template <class Kernel, int kNumA, int kNumP, bool kIsFromMemory>
__attribute__((noinline)) void MultiplyStored(const StepWalk& walk) {
  const WeightsAhead<Kernel> ahead(walk.panel_bytes, kNumP, walk.num_steps);
  const uint8_t* w = walk.weights;
  const char* x = walk.x;
  const int64_t panel_bytes = walk.panel_bytes, fetch_bytes = walk.fetch_bytes;
  const int64_t x_bytes = walk.x_bytes, x_step_bytes = walk.x_step_bytes;
  const int fetch_lines = walk.fetch_lines;
  for (int64_t left = walk.num_steps; left > 0; --left) {
    const int64_t ahead_bytes = ahead.Bytes(left);
    for (int p = 0; p < kNumP; ++p) {
      if constexpr (kIsFromMemory) {
        Fetch<3>(w + p * panel_bytes, ahead_bytes, Kernel::kStepVectors);
      } else {
        Fetch<2>(w + p * panel_bytes, fetch_bytes, fetch_lines);
      }
    }
    MultiplyStep<typename Kernel::Dot, kNumA, kNumP>(x, x_bytes, reinterpret_cast<const char*>(w), panel_bytes);
    w += kTileBytes;
    x += x_step_bytes;
  }
}

}  // namespace
}  // namespace HEADRACE_TARGET
}  // namespace headrace

#endif
