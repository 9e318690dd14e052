#include "shared_range.h"

#include <algorithm>
#include <cstddef>

namespace headrace {
namespace {

constexpr int kEndBits = 32;

uint64_t Packed(Range range) {
  return static_cast<uint64_t>(range.begin) << kEndBits | static_cast<uint64_t>(range.end);
}

Range Unpacked(uint64_t bits) {
  return {static_cast<int64_t>(bits >> kEndBits), static_cast<int64_t>(static_cast<uint32_t>(bits))};
}

}  // namespace

SharedRange::SharedRange(Range whole, int64_t num_parts) : shares_(static_cast<size_t>(num_parts)) {
  for (int64_t part = 0; part < num_parts; ++part) {
    shares_[static_cast<size_t>(part)].left.store(Packed(Part(whole, part, num_parts)), std::memory_order_relaxed);
  }
}

Range SharedRange::Take(int64_t part, int64_t most) {
  std::atomic<uint64_t>& left = shares_[static_cast<size_t>(part)].left;
  do {
    for (uint64_t seen = left.load(); Size(Unpacked(seen)) > 0;) {
      const Range mine = Unpacked(seen);
      const int64_t end = std::min(mine.begin + most, mine.end);
      if (left.compare_exchange_weak(seen, Packed({end, mine.end}))) return {mine.begin, end};
    }
  } while (Steal(part));
  return {0, 0};
}

// A share that reads as it was seen has those very items, whatever happened meanwhile.
bool SharedRange::Steal(int64_t part) {
  while (true) {
    Share* richest = nullptr;
    uint64_t seen = 0;
    for (Share& share : shares_) {
      const uint64_t left = share.left.load();
      if (Size(Unpacked(left)) <= Size(Unpacked(seen))) continue;
      richest = &share;
      seen = left;
    }
    if (richest == nullptr) return false;
    const Range theirs = Unpacked(seen);
    const int64_t middle = theirs.begin + Size(theirs) / 2;
    if (!richest->left.compare_exchange_strong(seen, Packed({theirs.begin, middle}))) continue;
    shares_[static_cast<size_t>(part)].left.store(Packed({middle, theirs.end}));
    return true;
  }
}

}  // namespace headrace
