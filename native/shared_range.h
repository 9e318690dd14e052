// A range that the threads of a task share out among themselves while they work.
#ifndef HEADRACE_NATIVE_SHARED_RANGE_H_
#define HEADRACE_NATIVE_SHARED_RANGE_H_

#include <atomic>
#include <cstdint>
#include <vector>

#include "range.h"

namespace headrace {

// Each part begins with an equal share and takes pieces from its front, one behind the other. One that has nothing left
// goes on with the back half of what the part with the most has left. So threads end together, though one of them
// shares its core with somebody else's work or has a slower one.
//
// Threads may take at the same time, each for a part of its own. Every item is taken exactly once.
class SharedRange {
 public:
  // The range must lie in [0, 2^32).
  SharedRange(Range whole, int64_t num_parts);

  // Up to `most` items for a part; none when no part has any left that it could take, so that what is being moved from
  // one part to another meanwhile is that one's alone.
  Range Take(int64_t part, int64_t most);

 private:
  // What a part has left, begin and end in one word. On a line of its own: others look at it only once they are done.
  struct alignas(64) Share {
    std::atomic<uint64_t> left{0};
  };

  // Moves half of what another part has left to one that has nothing; false if none has any.
  bool Steal(int64_t part);

  std::vector<Share> shares_;
};

}  // namespace headrace

#endif  // HEADRACE_NATIVE_SHARED_RANGE_H_
